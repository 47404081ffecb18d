"""Every block of code of the documentation does what its page says."""

import re
from collections import Counter

import pytest

from tests.documents import ROOT, check_commands, parse_page
from tests.running import Page

DOCS = ROOT / "docs"
PAGES = sorted(
    path.relative_to(DOCS).as_posix()
    for path in DOCS.rglob("*.md")
    if not path.relative_to(DOCS).parts[0].startswith("_")
)
# Blocks that are not run here, but checked as far as that goes (scripts and options exist, configs
# build), with the reason that is on the page. Number by page.
ONLY_CHECKED = {"quick_start.md": 1}
# Pages below this folder say how their figures were made, which took hours: none of their blocks
# is run.
RESULTS = "results/"
WITH_CODE = [page for page in PAGES if parse_page(DOCS / page)]


@pytest.mark.parametrize("page", [page for page in WITH_CODE if not page.startswith(RESULTS)])
def test_blocks(page, tmp_path):
    blocks = parse_page(DOCS / page, page)
    runner = Page(tmp_path)
    runner.run_all(blocks)
    assert len(runner.only_checked) == ONLY_CHECKED.get(page, 0), [
        f"{block.where}: {block.marks['only checked']}" for block in runner.only_checked
    ]


def test_blocks_only_checked():
    """The list above is complete."""
    found = Counter(
        page for page in WITH_CODE for b in parse_page(DOCS / page) if "only checked" in b.marks
    )
    assert dict(found) == ONLY_CHECKED


@pytest.mark.parametrize("page", [page for page in WITH_CODE if page.startswith(RESULTS)])
def test_commands_of_results(page):
    """The commands that figures were made with still exist."""
    for block in parse_page(DOCS / page, page):
        if block.language == "sh":
            check_commands(block.code, block.where)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)\)", (DOCS / page).read_text()):
        if "://" not in target:
            assert ((DOCS / page).parent / target).exists(), target
