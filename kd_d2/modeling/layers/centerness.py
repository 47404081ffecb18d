"""Centerness of a point in a box."""

from torch import Tensor

__all__ = ["centerness"]


def centerness(distances: Tensor) -> Tensor:
    """How central a point is in a box: 1 in the middle, 0 on the border.

    sqrt(min(l, r) / max(l, r) * min(t, b) / max(t, b)), eq. 3 of FCOS (Tian et al., ICCV 2019).
    For l, t, r, b = 1, 2, 3, 2: 0.577350.

    Args:
        distances: (R, 4), left, top, right, bottom, from points inside of their boxes, any unit.

    Returns:
        (R,) in [0, 1].
    """
    horizontal, vertical = distances[:, 0::2], distances[:, 1::2]
    ratio = horizontal.amin(dim=1) / horizontal.amax(dim=1)
    ratio = ratio * vertical.amin(dim=1) / vertical.amax(dim=1)
    return ratio.clamp(min=0).sqrt()
