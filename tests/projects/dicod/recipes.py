"""What the tests of the recipes share."""

import functools
import re
from pathlib import Path

from kd_d2.engine.main import build_config

PROJECT = Path(__file__).parents[3] / "projects/DICOD"
CONFIGS = PROJECT / "configs"
README = (PROJECT / "README.md").read_text()
MEAN, STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


@functools.lru_cache(maxsize=None)
def config(path):
    return build_config(str(CONFIGS / f"{path}.yaml"))


def check_published(path, published):
    """The README's tables and the comment of the config have the paper's number, and no other.

    Args:
        path: of the config, without ".yaml".
        published: as it is written; empty: none.

    Returns:
        the comments of the config.
    """
    link = f"(configs/{path}.yaml)"
    lines = [line for line in README.splitlines() if line.startswith("|") and link in line]
    assert lines
    for line in lines:
        *_, number, ours, end = (cell.strip() for cell in line.split("|"))
        assert number.split(" ")[0] == published and ours == end == ""
    text = (CONFIGS / f"{path}.yaml").read_text()
    comment = " ".join(line[2:] for line in text.splitlines() if line.startswith("# "))
    found = re.findall(r"Published (?:AP|top-1) ([\d.]+\d)", comment)
    assert found == ([published] if published else []), comment
    return comment
