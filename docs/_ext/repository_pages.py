"""Sphinx extension: pages and parts of pages that are made from the repository itself.

``docs/_generated`` gets

* ``parts/<method>.md``, what ``tools/list_methods.py`` knows of a method, and
  ``parts/baselines.md`` and ``parts/blocks.md``, to be included in hand-written pages;
* ``api_others.md``, the reference of packages that no page of ``docs/api`` names;
* ``readme/<project>.md``, the README files of projects and benchmarks as pages of their own.

Links that leave the folder ``docs`` work in the repository as they are; on the pages they become
links to the page of that README, or offer the file for download.
"""

import importlib.util
import os
import pkgutil
import re
from pathlib import Path
from typing import Any, Dict

DOCS = Path(__file__).resolve().parents[1]
ROOT = DOCS.parent
GENERATED = DOCS / "_generated"

# README files that become pages: name of the page -> folder.
READMES = {
    "crosskd": "projects/CrossKD",
    "dicod": "projects/DICOD",
    "gdetkd": "projects/GDetKD",
    "jointdetnas": "projects/JointDetNAS",
    "mimicdet": "projects/MimicDet",
    "benchmarks": "benchmarks",
}
_LINK = re.compile(r"\[([^\[\]]*)\]\(([^)\s#]+)(#[^)]*)?\)")


def setup(app) -> Dict[str, Any]:
    app.connect("builder-inited", lambda app: write_generated())
    app.connect("source-read", _read)
    app.connect("autodoc-process-docstring", _escape_bars)
    return {"parallel_read_safe": True}


def write_generated() -> None:
    """Write everything below ``docs/_generated``; files that would not change are left alone."""
    for name, text in method_parts().items():
        _write(GENERATED / "parts" / f"{name}.md", text)
    _write(GENERATED / "api_others.md", other_packages())
    for name, folder in READMES.items():
        page = GENERATED / "readme" / f"{name}.md"
        text = (ROOT / folder / "README.md").read_text()
        _write(page, rewrite_links(text, ROOT / folder, page.parent))


def method_parts() -> Dict[str, str]:
    """Name of a part -> Markdown; methods by their names in lower case."""
    from kd_d2.engine.catalogue import list_blocks, list_methods
    from kd_d2.engine.main import import_components

    script = _list_methods_script()
    import_components()
    methods = list_methods()
    result = {method.name.lower(): _details(script, method) for method in methods}
    baselines = [method for method in methods if method.module.startswith("kd_d2.baselines.")]
    result["baselines"] = "\n".join(
        f"## {method.name}\n{result[method.name.lower()]}" for method in baselines
    )
    result["blocks"] = script.blocks_table(list_blocks(), markdown=True) + "\n"
    return result


def other_packages() -> str:
    """Return a page with the packages of kd_d2 that the hand-written reference leaves out."""
    pages = "\n".join(path.read_text() for path in sorted((DOCS / "api").glob("*.md")))
    known = re.findall(r"automodule:: (\S+)", pages)
    result = "# Further packages\n"
    for module in pkgutil.iter_modules([str(ROOT / "kd_d2")], "kd_d2."):
        name = module.name
        if name != "kd_d2.projects" and not any(f"{k}.".startswith(f"{name}.") for k in known):
            result += f"\n## `{name}`\n\n```{{eval-rst}}\n.. automodule:: {name}\n```\n"
    return result


def rewrite_links(text: str, source: Path, page: Path) -> str:
    """Return Markdown of the folder ``source`` with its links as seen from the folder ``page``.

    Args:
        text: content of a file of ``source``.
        source: folder that relative links start from.
        page: folder of the page that shows the text.
    """
    pages = {(ROOT / folder / "README.md"): name for name, folder in READMES.items()}

    def replace(match: "re.Match[str]") -> str:
        label, target, anchor = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group(0)
        path = Path(os.path.normpath(source / target))
        if path in pages:
            path = GENERATED / "readme" / f"{pages[path]}.md"
        if path.is_dir():  # there is nothing to show or to download
            return label
        relative = Path(os.path.relpath(path, page)).as_posix()
        return f"[{label}]({relative}{anchor or ''})"

    return _LINK.sub(replace, text)


def _read(app, docname: str, content) -> None:
    """Links of hand-written pages that lead to a README lead to its page instead."""
    if not docname.startswith("_generated/"):
        folder = (DOCS / docname).parent
        content[0] = rewrite_links(content[0], folder, folder)


def _escape_bars(app, what, name, obj, options, lines) -> None:
    """|x| is an absolute value in our docstrings, not a substitution of reStructuredText."""
    for index, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        parts[::2] = [part.replace("|", "\\|") for part in parts[::2]]
        lines[index] = "".join(parts)


def _list_methods_script():
    path = ROOT / "tools" / "list_methods.py"
    spec = importlib.util.spec_from_file_location("list_methods", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _details(script, method) -> str:
    """What ``list_methods.py --method NAME --markdown`` prints, without the heading."""
    text = script.method_details(method, markdown=True).partition("\n")[2] + "\n"
    # title and summary are lines of one paragraph there
    title = method.info.title if method.info else ""
    return text.replace(f"\n{title}\n", f"\n**{title}**\n\n", 1) if title else text


def _write(path: Path, text: str) -> None:
    if path.is_file() and path.read_text() == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
