"""The projects: one package per distillation method, ``kd_d2.projects.<pkg>``.

An installed wheel has them in this folder. In a checkout they are ``projects/<Name>/<pkg>``, so
that each method's code lies beside its configs and README; the search path of this package is
extended accordingly. Nothing is imported here.
"""

from pathlib import Path

__all__ = []


def _checkout_folders(package_folder: Path) -> list[str]:
    """The folders ``projects/*/`` of the checkout that holds this package; [] if installed."""
    root = package_folder.parents[1]
    # An unrelated folder "projects" may lie beside an installed kd_d2; setup.cfg marks ours.
    if not (root / "setup.cfg").is_file():
        return []
    return sorted(str(path) for path in (root / "projects").glob("*") if path.is_dir())


__path__.extend(_checkout_folders(Path(__file__).resolve().parent))
