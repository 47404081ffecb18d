"""Checks of what a MimicDet is composed of."""

from typing import Any, Optional, Sequence

__all__ = ["check_heads", "check_levels"]


def check_heads(
    s_head: Optional[Any], t_head: Optional[Any], mimic_loss: Optional[Any], evaluate_t_head: bool
) -> None:
    """
    Args:
        s_head, t_head, mimic_loss: None where there is none.
        evaluate_t_head: whether detections come from the T-head.

    Raises:
        ValueError: a head is missing that detections or the mimic loss need.
    """
    if mimic_loss is not None and (s_head is None or t_head is None):
        missing = "S_HEAD" if s_head is None else "T_HEAD"
        raise ValueError(
            f"MODEL.MIMICDET.MIMIC.WEIGHT is {mimic_loss.weight}, but {missing}.ENABLED is False, "
            "and one head alone has nothing to mimic: set MIMIC.WEIGHT to 0"
        )
    head, name = (t_head, "T_HEAD") if evaluate_t_head else (s_head, "S_HEAD")
    if head is None:
        value, other = ("teacher", "student") if evaluate_t_head else ("student", "teacher")
        raise ValueError(
            f"MODEL.MIMICDET.EVAL_HEAD is '{value}', but {name}.ENABLED is False: enable it, or "
            f"set EVAL_HEAD to '{other}'"
        )


def check_levels(finer: Sequence[str], t_levels: Sequence[str], skippable: bool) -> None:
    """
    Args:
        finer: levels of the backbone that are finer than those of the S-head.
        t_levels: those that the T-head reads.
        skippable: whether the backbone can leave them out.

    Raises:
        ValueError: a level that nothing reads, whose layers would get no gradient, or one that
            inference would compute for nothing.
    """
    unused = [name for name in finer if name not in t_levels]
    if unused:
        raise ValueError(
            f"MODEL.FPN.IN_FEATURES makes {unused}, which neither MODEL.RPN.IN_FEATURES nor an "
            "enabled T-head with MODEL.ROI_HEADS.IN_FEATURES "
            f"{list(t_levels)} reads: leave res2 out of MODEL.FPN.IN_FEATURES"
        )
    if finer and not skippable:
        raise ValueError(
            f"MODEL.BACKBONE.NAME makes {list(finer)} for the T-head and cannot leave it out at "
            "inference: use build_mimicdet_resnet_fpn_backbone"
        )
