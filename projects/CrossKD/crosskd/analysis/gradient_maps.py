"""How strongly a distillation loss pulls at each cell of a head's feature (Fig. 4).

The gradient is taken before the ReLU of stage i unless asked otherwise. Behind it, the map would
show what never reaches the student: a channel that is zero everywhere in its level has the
standard deviation 0, which alignment and PKD divide by after adding 1e-6, and its gradient, up to
a million times the others', is what the ReLU then throws away.
"""

from typing import Dict, List, Sequence, Tuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from kd_d2.distillation import Teacher, build_distillers, build_tap

from ..distiller import CrossKD
from .observer import Observation, Observer

__all__ = [
    "box_coverage",
    "gradient_maps",
    "gradient_observer",
    "min_max",
    "share_inside",
    "tap_keys",
    "to_image",
]

# config name of a branch -> the taps' name
_BRANCHES = {"cls": "cls", "reg": "box"}


def tap_keys(crosskd: CrossKD, before_activation: bool = True) -> Dict[str, str]:
    """Tower -> key of f_i^s, the feature that changes heads.

    Args:
        crosskd: says i and the towers.
        before_activation: f_i before its ReLU, whatever ``KD.CROSSKD.TAP`` says.

    Returns:
        dict: "cls" and "reg", as far as they are distilled; for i = 0 "pyramid" alone, which
        feeds both towers.

    Raises:
        ValueError: i differs between the towers, or is that of prediction mimicking.
    """
    stages = set(crosskd.positions.values())
    if len(stages) != 1:
        raise ValueError(
            f"KD.CROSSKD has the positions {crosskd.positions}; give --position, one stage for "
            "both towers"
        )
    (stage,) = stages
    limit = min(crosskd.num_stages.values())
    if stage > limit:
        raise ValueError(
            f"KD.CROSSKD.POSITION {stage} is prediction mimicking, which taps no feature; give "
            f"--position 0..{limit}"
        )
    if stage == 0:
        return {"pyramid": "head.cls[0]"}
    suffix = ":pre" if before_activation else ""
    return {branch: f"head.{_BRANCHES[branch]}[{stage}]{suffix}" for branch in crosskd.positions}


def gradient_observer(
    cfg,
    student: nn.Module,
    teacher: Teacher,
    methods: Sequence[str] = ("CrossKD", "PKD"),
    position: int = -1,
    before_activation: bool = True,
) -> Tuple[Observer, Dict[str, str], List[str]]:
    """An observer whose losses are those of ``methods``, all at the same features.

    CrossKD is the config's, with position i. PKD imitates the feature that CrossKD taps, f_i of
    the same towers (its weight is ``KD.PKD.WEIGHT``): on the pyramid, as it is trained, it has no
    gradient at a tower. Other methods are as configured.

    Args:
        cfg: whole config.
        methods: entries as in ``KD.DISTILLERS``.
        position: i; -1: as the config (or its preset) says.
        before_activation: see :func:`tap_keys`.

    Returns:
        observer; tower -> key; labels of the methods, in their order.

    Raises:
        ValueError: see :func:`tap_keys`; or a method does not fit the pair, or CrossKD taps
            before the ReLU and its gradient is asked for behind it.
    """
    keys = build_tap(student).keys(student)
    cfg = cfg.clone()
    cfg.defrost()
    if position >= 0:
        cfg.KD.CROSSKD.POSITION = position
        cfg.KD.CROSSKD.POSITION_CLS = cfg.KD.CROSSKD.POSITION_REG = -1
    cfg.KD.DISTILLERS = ("CrossKD",)
    crosskd = build_distillers(cfg, keys, teacher.keys)[0]["crosskd"]
    if crosskd.before_activation and not before_activation:
        raise ValueError(
            'KD.CROSSKD.TAP is "pre_act": its loss does not depend on the features behind the '
            "ReLU; leave --after-relu out"
        )
    taps = tap_keys(crosskd, before_activation)
    towers = tuple(tower for tower in taps if tower != "pyramid")
    cfg.KD.PKD.LOCATIONS = towers or ("neck",)
    if towers:
        cfg.KD.PKD.STAGE = crosskd.positions[towers[0]]
    cfg.KD.DISTILLERS = tuple(methods)
    distillers, _ = build_distillers(cfg, keys, teacher.keys)
    distillers.to(cfg.MODEL.DEVICE)
    observer = Observer(student, teacher, set(taps.values()), (), distillers)
    return observer, taps, list(distillers)


def gradient_maps(seen: Observation, label: str, key: str) -> List[torch.Tensor]:
    """Mean over channels of |dL/df| of one method, per level (N, H, W).

    Zero where the loss does not reach a feature.

    Args:
        seen: of an observer with that method; may be asked repeatedly.
        label: of the method; L is the sum of its weighted terms.
        key: of the feature, a per-level list.
    """
    prefix = f"loss_kd/{label}/"
    loss = sum(value for name, value in seen.losses.items() if name.startswith(prefix))
    features = seen.student[key]
    gradients = torch.autograd.grad(loss, features, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(feature[:, 0]) if gradient is None else gradient.abs().mean(dim=1)
        for feature, gradient in zip(features, gradients)
    ]


def box_coverage(
    boxes: torch.Tensor, size: Tuple[int, int], stride: int, offset: float = 0.5
) -> torch.Tensor:
    """Share of each cell's area that lies in at least one box, (H, W).

    A cell is the square of side ``stride`` around its reference point, (row, column) plus
    ``offset``, times ``stride``.

    Args:
        boxes: (M, 4) XYXY in pixels of the padded image; a pixel belongs to a box if its centre
            does.
        size: (H, W), number of cells.
        offset: of the anchor generator, in cells.
    """
    height, width = size
    corner = round((offset - 0.5) * stride)
    rows = torch.arange(corner, corner + height * stride, device=boxes.device) + 0.5
    columns = torch.arange(corner, corner + width * stride, device=boxes.device) + 0.5
    mask = torch.zeros(len(rows), len(columns), device=boxes.device)
    for x0, y0, x1, y1 in boxes.tolist():
        inside_rows, inside_columns = (rows >= y0) & (rows < y1), (columns >= x0) & (columns < x1)
        mask[inside_rows[:, None] & inside_columns[None]] = 1.0
    return F.avg_pool2d(mask[None], stride)[0]


def share_inside(values: torch.Tensor, coverage: torch.Tensor) -> float:
    """Fraction of the sum of ``values`` (H, W) that lies inside boxes; NaN if the sum is 0."""
    total = float(values.double().sum())
    return float((values.double() * coverage.double()).sum()) / total if total else float("nan")


def to_image(
    values: torch.Tensor,
    stride: int,
    size: Tuple[int, int],
    offset: float = 0.5,
    mode: str = "bilinear",
) -> torch.Tensor:
    """A map of cells (H, W) at the resolution of the image (h, w), without its padding.

    Args:
        offset: of the anchor generator, in cells; see :func:`box_coverage`.
        mode: "bilinear" or "nearest".
    """
    full = (values.shape[0] * stride, values.shape[1] * stride)
    corners = {"align_corners": False} if mode == "bilinear" else {}
    resized = F.interpolate(values[None, None].float(), size=full, mode=mode, **corners)
    shift = round((0.5 - offset) * stride)
    resized = F.pad(resized, (0, shift, 0, shift), mode="replicate")[0, 0, shift:, shift:]
    return resized[: size[0], : size[1]]


def min_max(maps: Sequence[np.ndarray], shared: bool = False) -> List[np.ndarray]:
    """Maps stretched to 0..1, each by itself or all with one range; 0 where there is no range."""
    ranges = [(float(m.min()), float(m.max())) for m in maps]
    if shared:
        ranges = [(min(low for low, _ in ranges), max(high for _, high in ranges))] * len(maps)
    return [
        (m - low) / (high - low) if high > low else np.zeros_like(m)
        for m, (low, high) in zip(maps, ranges)
    ]
