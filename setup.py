"""Package map of kd_d2; everything else about the distribution is in setup.cfg."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent


def find_projects():
    """Map each package of a project to its folder, by the name under which it is imported.

    Returns:
        dict[str, str]: ``{"kd_d2.projects.<pkg>": "projects/<Name>/<pkg>"}``, sub-packages
        included. A package is a folder with an ``__init__.py``.
    """
    packages = {}
    for init in sorted(ROOT.glob("projects/*/*/__init__.py")):
        folder = init.parent
        name = f"kd_d2.projects.{folder.name}"
        if name in packages:
            raise ValueError(
                f"{folder.relative_to(ROOT)} and {packages[name]} are both imported as {name}: "
                "rename one of the two folders."
            )
        packages[name] = folder.relative_to(ROOT).as_posix()
        for sub in find_packages(str(folder)):
            packages[f"{name}.{sub}"] = f"{packages[name]}/{sub.replace('.', '/')}"
    return packages


PROJECTS = find_projects()

setup(
    packages=find_packages(str(ROOT), include=["kd_d2", "kd_d2.*"]) + list(PROJECTS),
    package_dir=PROJECTS,
)
