#!/usr/bin/env python
"""List the distillation methods, or the blocks that recipes are made of.

    python tools/list_methods.py                       a table of all methods
    python tools/list_methods.py --method PKD          one method with its config keys
    python tools/list_methods.py --blocks              what KD.PAIR.TERMS can name
    python tools/list_methods.py --imports my_method.py --markdown

Gains are published ones, measured by the authors of the papers that are named beside them.
"""

import argparse
import json
import shutil
import sys
import textwrap
from typing import List, Optional, Sequence

from tabulate import tabulate

from kd_d2.distillation import MethodInfo
from kd_d2.distillation.recorder import near_matches
from kd_d2.engine.catalogue import Block, Method, list_blocks, list_methods
from kd_d2.engine.main import build_config

_NO_INFO = MethodInfo(title="", paper="", compares="")
_HEADER = ["Method", "Compares", "Needs", "Published gains", "Paper", "Config keys"]
# shares of the terminal's width
_SHARES = [0.12, 0.16, 0.16, 0.22, 0.17, 0.17]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", metavar="NAME", help="one method in detail")
    parser.add_argument("--blocks", action="store_true", help="list blocks instead of methods")
    parser.add_argument(
        "--imports",
        action="append",
        default=[],
        metavar="FILE",
        help="module (dotted name or .py file) that registers more, as in KD.IMPORTS; may be "
        "repeated",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--markdown", action="store_true", help="print Markdown")
    form.add_argument("--json", action="store_true", help="print JSON")
    return parser


def table(header: Sequence[str], rows: List[List[str]], markdown: bool, shares=None) -> str:
    """Return a table; on the terminal its columns get ``shares`` of the width."""
    if markdown:
        rows = [[cell.replace("|", "\\|").replace("\n", "<br>") for cell in row] for row in rows]
        return tabulate(rows, header, tablefmt="github", disable_numparse=True)
    width = max(shutil.get_terminal_size((140, 24)).columns, 80) - 3 * len(header)
    limits = [int(width * share) for share in shares]
    limits[0] = max(limits[0], *(len(row[0]) for row in rows))  # names stay whole
    wrapped = [[_wrap(cell, limit) for cell, limit in zip(row, limits)] for row in rows]
    return tabulate(wrapped, header, tablefmt="grid", disable_numparse=True)


def _wrap(text: str, width: int) -> str:
    lines = [textwrap.wrap(line, width) or [""] for line in text.split("\n")]
    return "\n".join(part for line in lines for part in line)


def methods_table(methods: Sequence[Method], markdown: bool) -> str:
    rows = []
    for method in methods:
        info = method.info or _NO_INFO
        own = [key.name[len(method.node) + 1 :] for key in method.keys]
        own = [key for key in own if not key.startswith("SCHEDULE.")]
        rows.append(
            [
                method.name,
                info.compares or method.summary,
                "\n".join(_needs(method)),
                "\n".join(info.gains),
                info.paper,
                f"{method.node}: {', '.join([*own, 'SCHEDULE.*'])}",
            ]
        )
    return table(_HEADER, rows, markdown, _SHARES)


def _needs(method: Method) -> List[str]:
    needs = list((method.info or _NO_INFO).requires)
    return needs if method.needs_teacher else ["no teacher", *needs]


def method_details(method: Method, markdown: bool) -> str:
    """Everything that is known of one method."""
    info = method.info or _NO_INFO
    facts = [
        ("paper", [info.paper]),
        ("compares", [info.compares]),
        ("needs", _needs(method)),
        ("published gains", info.gains),
        ("unverified", [info.unverified]),
        ("defined in", [method.module]),
        ("use", [f"KD.DISTILLERS \"('{method.name}',)\""]),
    ]
    lines = [f"## {method.name}" if markdown else method.name]
    lines += ["", info.title or method.summary, method.summary if info.title else "", ""]
    for name, values in facts:
        values = [value for value in values if value]
        if values and markdown:
            lines.append(f"* {name}: {'; '.join(values)}")
        elif values:
            lines.append(_indented(f"{name + ':':<17}", "\n".join(values)))
    lines.append("")
    if not method.keys:
        lines.append(f"{method.node} is not declared: no function in CONFIG_NODES adds it")
    elif markdown:
        rows = [[f"`{k.name}`", f"`{k.default!r}`", k.type, k.comment] for k in method.keys]
        lines.append(table(["Key", "Default", "Type", "Meaning"], rows, True))
    else:
        for key in method.keys:
            lines.append(f"{key.name} = {key.default!r}  ({key.type})")
            lines.append(_indented("    ", key.comment) if key.comment else "")
    return "\n".join(lines)


def _indented(head: str, text: str) -> str:
    width = max(shutil.get_terminal_size((100, 24)).columns, 60) - len(head)
    pad = " " * len(head)
    return head + textwrap.indent(_wrap(text, min(width, 100)), pad)[len(pad) :]


def blocks_table(blocks: Sequence[Block], markdown: bool) -> str:
    rows = [[block.registry, block.signature, block.summary] for block in blocks]
    return table(["Registry", "Block", "Meaning"], rows, markdown, [0.15, 0.4, 0.45])


def report(args: argparse.Namespace) -> str:
    """What the command line asks for.

    Raises:
        ValueError: a module that cannot be imported, or a method that is not registered.
    """
    # registers the library, the projects and what the user names
    build_config(opts=["KD.IMPORTS", repr(tuple(args.imports))] if args.imports else [])
    if args.blocks:
        blocks = list_blocks()
        if args.json:
            return json.dumps([block.as_dict() for block in blocks], indent=2)
        return blocks_table(blocks, args.markdown)
    methods = list_methods()
    if args.method:
        names = {method.name.lower(): method for method in methods}
        if args.method.lower() not in names:
            known = [method.name for method in methods]
            raise ValueError(
                f"no method '{args.method}' is registered; known: {', '.join(known)}; similar: "
                f"{near_matches(args.method.lower(), names)}"
            )
        methods = [names[args.method.lower()]]
    if args.json:
        return json.dumps([method.as_dict() for method in methods], indent=2)
    if args.method:
        return method_details(methods[0], args.markdown)
    return methods_table(methods, args.markdown)


def main(argv: Optional[Sequence[str]] = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        print(report(args))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
