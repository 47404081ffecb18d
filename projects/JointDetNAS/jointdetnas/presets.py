"""Architectures by name: the base networks and the results that the paper publishes."""

import ast
from typing import Dict, List, Sequence, Tuple

from .space import Architecture, parse

__all__ = ["PRESETS", "config_text", "resolve"]


def _basic(depths: Sequence[int]) -> str:
    return _text([[(64 * 2**s,) * 2] * depth for s, depth in enumerate(depths)])


def _bottleneck(depths: Sequence[int]) -> str:
    widths = [(64 * 2**s, 64 * 2**s, 256 * 2**s) for s in range(4)]
    return _text([[width] * depth for width, depth in zip(widths, depths)])


def _resnext(depths: Sequence[int], groups: int, width_per_group: int) -> str:
    inner = [groups * width_per_group * 2**s for s in range(4)]
    stages = [[(c, c, 256 * 2**s)] * depth for s, (c, depth) in enumerate(zip(inner, depths))]
    return _text(stages, f"g{groups}")


def _text(stages: Sequence[List[Tuple[int, ...]]], suffix: str = "") -> str:
    def block(channels: Tuple[int, ...]) -> str:
        return f"({','.join(map(str, channels))}){suffix}"

    return ",".join(f"[{'-'.join(map(block, blocks))}]" for blocks in stages)


# Name -> encoding. "searched_*" are transcribed from appendix B of the paper, input 1080x720. That
# of X101 is left out: its text is damaged in print (borders of stages are missing, one block has
# unequal widths around its grouped conv), and no reading of it has the published FLOPs.
PRESETS: Dict[str, str] = {
    "r18": _basic((2, 2, 2, 2)),
    "r50": _bottleneck((3, 4, 6, 3)),
    "r101": _bottleneck((3, 4, 23, 3)),
    "x101_32x4d": _resnext((3, 4, 23, 3), 32, 4),
    "searched_r18": "[(64,64)],[(128,128)-(128,128)],[(256,256)-(256,256)],[(512,512)-(512,512)]",
    "searched_r50": (
        "[(58,59,205)-(60,64,205)-(63,62,205)],"
        "[(127,128,314)-(109,122,314)-(127,123,314)-(125,124,314)],"
        "[(256,255,591)-(243,245,591)-(237,247,591)-(243,246,591)-(252,244,591)-(252,254,591)],"
        "[(509,507,1856)-(509,506,1856)-(508,507,1856)]"
    ),
    "searched_r101": (
        "[(49,62,202)-(35,33,202)-(56,62,202)],"
        "[(123,128,300)-(57,90,300)-(117,113,300)-(124,117,300)],"
        "[(255,254,321)-(65,127,321)-(32,47,321)-(32,63,321)-(120,161,321)-(132,181,321)-"
        "(162,232,321)-(175,241,321)-(143,237,321)-(199,246,321)-(210,238,321)-(201,225,321)-"
        "(210,215,321)-(211,222,321)-(201,208,321)-(198,206,321)-(200,213,321)-(226,221,321)-"
        "(234,221,321)-(237,222,321)],"
        "[(249,229,321)-(245,231,321)-(511,478,2031)-(507,503,2031)-(491,477,2031)]"
    ),
}


def resolve(text: str, stem: int = 64) -> Architecture:
    """The architecture of a preset's name or of an encoding.

    Args:
        text: key of ``PRESETS``, or a literal in the grammar of :mod:`.space`; see
            :func:`config_text` for quotes around it.
        stem: output channels of the stem.

    Raises:
        ValueError: neither; the message lists the presets, or names the malformed block.
    """
    name = text.strip().strip("\"'")
    if name not in PRESETS and "[" not in name:
        raise ValueError(
            f"'{text}' is neither an encoding [...],[...],[...],[...] nor one of the presets "
            f"{sorted(PRESETS)}"
        )
    return parse(PRESETS.get(name, name), stem)


def config_text(architecture: Architecture) -> str:
    """The encoding as the value of a config key that is still a text when it has been read.

    Whatever is a Python literal becomes one when a config is read. An encoding is one if all its
    stages have a single block and no block has a suffix; it is then put in quotes.
    """
    text = str(architecture)
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
    return f'"{text}"'
