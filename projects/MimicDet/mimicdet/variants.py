"""The three designs of the heads that the paper compares (Table 3)."""

from typing import Dict, NamedTuple, Tuple

from .options import choice

__all__ = ["HEAD_VARIANTS", "Branch", "HeadVariant", "head_variant"]


class Branch(NamedTuple):
    """Layers of one branch of the T-head."""

    num_convs: int
    num_fcs: int


class HeadVariant(NamedTuple):
    """A design: branches of the T-head.

    Two branches are classification and regression, each with a feature vector of its own in both
    heads; of a single one both predictions come, in the S-head as well (Sec. 5.1).
    """

    branches: Tuple[Branch, ...]

    @property
    def split(self) -> bool:
        """Whether classification and regression have a feature vector each."""
        return len(self.branches) == 2


HEAD_VARIANTS: Dict[str, HeadVariant] = {
    "dual": HeadVariant((Branch(num_convs=0, num_fcs=2), Branch(num_convs=4, num_fcs=1))),
    "light": HeadVariant((Branch(num_convs=0, num_fcs=2),)),
    "heavy": HeadVariant((Branch(num_convs=4, num_fcs=2),)),
}


def head_variant(cfg) -> HeadVariant:
    """The design that ``MODEL.MIMICDET.T_HEAD.VARIANT`` names.

    Raises:
        ValueError: there is no such design.
    """
    return choice("T_HEAD.VARIANT", cfg.MODEL.MIMICDET.T_HEAD.VARIANT, HEAD_VARIANTS)
