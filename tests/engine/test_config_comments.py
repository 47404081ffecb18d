"""Comments of config keys are found in the ways in which keys are declared, and nowhere else."""

import functools

from detectron2.config import CfgNode as CN

from kd_d2.engine.config_comments import declared_comments


def add_deeper(node):
    # Of the deeper node.
    node.DEEP = CN()
    # First part,
    # second part.
    node.DEEP.KEY = 1


def add_more(node, unused):
    node.MORE = 2  # behind the line


def add_config(cfg):
    # The node itself.
    cfg.KD.TOY = node = CN()
    # Meaning of A: "x # y"
    # goes on here
    node.A = "# no comment"
    node.B = 1

    # separated by an empty line

    node.C = 2
    # a list:
    #   ONE: 1
    #   TWO: 2
    # and the end.
    node.D = (
        1,
        2,
    )
    other = cfg.KD
    # Through another name.
    other.TOY.E = 3
    if node.B:
        # Inside a block.
        node.F = 4
    # Of the dict.
    cfg.KD.DICT = CN(
        {
            # Above the entry.
            "G": 1,
            "H": {"I": 2},  # nested
        }
    )
    add_deeper(node)
    add_more(cfg.KD.TOY, 1)
    print(node)
    # Not a node.
    unrelated = {}
    unrelated.setdefault("J", 1)


def add_itself(cfg):
    # Once.
    cfg.KD.LOOP = 1
    add_itself(cfg)


def add_computed(cfg):
    for name in ("A", "B"):
        # Cannot be known without running it.
        cfg.KD[name] = 1


def test_every_way_to_declare_a_key():
    assert declared_comments([add_config]) == {
        "KD.TOY": "The node itself.",
        "KD.TOY.A": 'Meaning of A: "x # y" goes on here',
        "KD.TOY.D": "a list:\n  ONE: 1\n  TWO: 2\nand the end.",
        "KD.TOY.E": "Through another name.",
        "KD.TOY.F": "Inside a block.",
        "KD.DICT": "Of the dict.",
        "KD.DICT.G": "Above the entry.",
        "KD.DICT.H": "nested",
        "KD.DICT.H.I": "nested",
        "KD.TOY.DEEP": "Of the deeper node.",
        "KD.TOY.DEEP.KEY": "First part, second part.",
        "KD.TOY.MORE": "behind the line",
    }


def test_what_cannot_be_read_has_no_comments():
    made = {}
    exec("def no_source(cfg):\n    # lost\n    cfg.KD.X = 1", made)
    odd = [made["no_source"], functools.partial(add_config), print, CN, lambda cfg: None]
    assert declared_comments([*odd, add_computed]) == {}
    assert declared_comments([add_itself]) == {"KD.LOOP": "Once."}
