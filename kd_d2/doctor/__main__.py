"""Say what is installed and registered and, of a config, whether it would train.

    python -m kd_d2.doctor
    python -m kd_d2.doctor --config-file configs/x.yaml KD.TEACHER.WEIGHTS teacher.pth

With a config everything that training builds is built, the teacher with its weights included, and
one training step runs on two images of noise; nothing is trained and nothing is written. The last
line says OK or what is wrong; the exit status is 0 or 1.
"""

import argparse
import sys
from typing import List, Optional, Sequence

from .environment import describe_environment

__all__ = ["main"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m kd_d2.doctor",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", default="", metavar="YAML", help="config to check")
    parser.add_argument(
        "--skip-data",
        action="store_true",
        help="do not look for the config's data sets, e.g. on another machine than the training's",
    )
    parser.add_argument(
        "--skip-step", action="store_true", help="build everything, but run no training step"
    )
    parser.add_argument(
        "opts",
        nargs=argparse.REMAINDER,
        metavar="KEY VALUE",
        help="overrides of config keys, separated by spaces, after all options",
    )
    return parser


def main(arguments: Optional[Sequence[str]] = None) -> int:
    """Print the report; return the exit status."""
    args = build_parser().parse_args(arguments)
    facts = describe_environment()
    _section("environment", [f"{fact.name:<12} {fact.text}" for fact in facts])
    broken = [fact.name for fact in facts if fact.broken]
    if broken:
        return _failed(f"{', '.join(broken)} cannot be imported, see above")
    _inventory(args)
    if not args.config_file and not args.opts:
        print("OK: the environment is usable; give a --config-file to have it checked")
        return 0
    return _check(args)


def _section(title: str, lines: List[str]) -> None:
    print("\n".join([title, *(f"  {line}" for line in lines), ""]), flush=True)


def _failed(message: str) -> int:
    sys.stdout.flush()
    print(f"doctor: error: {message}", file=sys.stderr)
    return 1


def _inventory(args: argparse.Namespace) -> None:
    # imported here: they need PyTorch and Detectron2
    from kd_d2.data import register_all
    from kd_d2.engine.main import import_components

    from .inventory import datasets_text, list_components, list_datasets

    import_components()
    register_all()
    print("\n".join([*datasets_text(list_datasets()), ""]))
    components = list_components()
    lines = [f"{kind} ({len(names)}): {', '.join(names)}" for kind, names in components.items()]
    _section("registered", lines)


def _check(args: argparse.Namespace) -> int:
    from .check import FAILED, SKIPPED, check_config

    title = args.config_file or "the default config"
    print(f"check of {title}", flush=True)
    errors, skipped = [], []
    for finding in check_config(
        args.config_file, args.opts, data=not args.skip_data, step=not args.skip_step
    ):
        print(f"  {finding.status:<8} {finding.name}")
        print("".join(f"             {line}\n" for line in _lines(finding)), end="", flush=True)
        if finding.status == FAILED:
            errors.append(finding.lines[0])
        if finding.status == SKIPPED:
            skipped.append(finding.name)
    if errors:
        return _failed(errors[0])
    unseen = f", as far as was looked (not: {', '.join(skipped)})" if skipped else ""
    print(f"OK: {title} would train here{unseen}")
    return 0


def _lines(finding) -> List[str]:
    return [line for text in finding.lines for line in text.splitlines()]


if __name__ == "__main__":
    sys.exit(main())
