"""Feature terms: what of the pyramids is compared, by ``KD.GDETKD.FEAT.MODE``."""

from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.structures import Boxes
from detectron2.utils.events import get_event_storage
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from kd_d2.config import choice
from kd_d2.distillation import DistillationContext, KeyInfo

from .level_pooling import pool_all_levels, pool_by_size
from .records import RoIBatch
from .sgfi import MIN_SIZE, SGFI, SGFIOutput

__all__ = ["FEATURE_TERMS", "FeatureTerm", "RoIFITerm", "SGFITerm", "build_feature_term"]

Keys = Mapping[str, KeyInfo]

FEATURE_TERMS = Registry("GDETKD_FEATURES")
FEATURE_TERMS.__doc__ = """
Feature terms by their name in the config, called as ``Term(cfg, student_keys, teacher_keys)``.
"""


class FeatureTerm(nn.Module):
    """Interface of the feature terms.

    Attributes:
        student_needs, teacher_needs: keys that :meth:`forward` reads. ``roi.*`` ones of the teacher
            are run for all boxes of the step before.
        default_weight: factor of the loss where the config has none.
        uses_rois: False: :meth:`forward` does not look at its second argument, which may be None.
    """

    student_needs: Tuple[str, ...] = ()
    teacher_needs: Tuple[str, ...] = ()
    default_weight: float = 1.0
    uses_rois: bool = True

    def forward(self, ctx: DistillationContext, rois: RoIBatch) -> Tensor:
        """Return the unweighted fp32 scalar, 0 with a graph where there is nothing to compare.

        Args:
            rois: all boxes of the step, of a cascade those of its first stage.
        """
        raise NotImplementedError

    def optimizer_overrides(self) -> Dict[str, Dict[str, float]]:
        """As :meth:`Distiller.optimizer_overrides`, names relative to this module."""
        return {}


def build_feature_term(cfg, student_keys: Keys, teacher_keys: Keys) -> Optional[FeatureTerm]:
    """Return the term that ``KD.GDETKD.FEAT.MODE`` names; None for "none".

    Raises:
        ValueError: an unknown name, or networks that the term cannot compare.
    """
    mode = cfg.KD.GDETKD.FEAT.MODE
    choice("KD.GDETKD.FEAT.MODE", mode, [name for name, _ in FEATURE_TERMS] + ["none"])
    return None if mode == "none" else FEATURE_TERMS.get(mode)(cfg, student_keys, teacher_keys)


class SGFITerm(FeatureTerm):
    """SGFI on RoIs: the student's features of all levels against the teacher's of one.

    Logs ``gdetkd/sgfi_rois`` (of this rank) and, where there are several levels and RoIs,
    ``sgfi_tau``, ``sgfi_entropy`` (mean of alpha's, nats) and ``sgfi_alpha_<level>``.
    """

    name = "sgfi"

    @configurable
    def __init__(
        self,
        *,
        levels: Mapping[str, KeyInfo],
        roi_feat: KeyInfo,
        key_dim: int = 128,
        tau_init: float = 0.0,
        chunk: int = 0,
        rois: str = "positive",
        max_rois_per_image: int = 128,
        sampling_ratio: int = 4,
    ):
        """
        Args:
            levels: keys of the student's maps and what is known of them, fine to coarse.
            roi_feat: what is known of the teacher's ``roi.feat``; its size is the student's too.
            key_dim, tau_init, chunk: see :class:`SGFI`.
            rois: "positive" or "all".
            max_rois_per_image: a random subset of so many is compared; 0: all of them.
            sampling_ratio: of the student's RoIAlign, see :func:`pool_all_levels`.

        Raises:
            ValueError: a value that does not exist or is out of its range, or RoI features that are
                too small for the embedding.
        """
        super().__init__()
        choice("KD.GDETKD.SGFI.ROIS", rois, ("positive", "all"))
        for key, value in (
            ("MAX_ROIS_PER_IMAGE", max_rois_per_image),
            ("SAMPLING_RATIO", sampling_ratio),
        ):
            if value < 0:
                raise ValueError(f"KD.GDETKD.SGFI.{key} must be at least 0, got {value}")
        num_levels = self.weighted_levels(levels)
        self.size = tuple(roi_feat.signature[:2])
        if num_levels > 1 and min(self.size) < MIN_SIZE:
            raise ValueError(
                f"KD.GDETKD.FEAT.MODE 'sgfi' embeds RoI features of at least {MIN_SIZE}x{MIN_SIZE} "
                f"cells, but the teacher pools {self.size[0]}x{self.size[1]}; use a teacher with "
                f"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION {MIN_SIZE} or more, or the mode 'roifi'"
            )
        self.student_needs = tuple(levels)
        self.teacher_needs = ("roi.feat",)
        self.sgfi = SGFI(
            student_channels=next(iter(levels.values())).channels,
            teacher_channels=roi_feat.channels,
            num_levels=num_levels,
            key_dim=key_dim,
            tau_init=tau_init,
            chunk=chunk,
        )
        self.strides = [info.strides[0] for info in levels.values()]
        self._positive = rois == "positive"
        self._max_rois, self._sampling_ratio = max_rois_per_image, sampling_ratio

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        node = cfg.KD.GDETKD.SGFI
        if "roi.feat" not in teacher_keys:
            raise ValueError(
                f"KD.GDETKD.FEAT.MODE '{cls.name}' compares features of RoIs, but the teacher has "
                "no RoI head; give a two-stage teacher in KD.TEACHER.CONFIG_FILE"
            )
        return {
            "levels": cls.levels_from_config(node, student_keys),
            "roi_feat": teacher_keys["roi.feat"],
            "key_dim": node.KEY_DIM,
            "tau_init": node.TAU_INIT,
            "chunk": node.CHUNK,
            "rois": node.ROIS,
            "max_rois_per_image": node.MAX_ROIS_PER_IMAGE,
            "sampling_ratio": node.SAMPLING_RATIO,
        }

    @classmethod
    def levels_from_config(cls, node, student_keys: Keys) -> Dict[str, KeyInfo]:
        """Return the levels of ``STUDENT_LEVELS``, fine to coarse.

        Raises:
            ValueError: a name that the student's pyramid does not have.
        """
        pyramid = _pyramid(student_keys)
        if node.STUDENT_LEVELS == "all":
            return pyramid
        names = [f"neck.{name.strip()}" for name in node.STUDENT_LEVELS.split(",")]
        if not set(names) <= set(pyramid):
            known = ", ".join(name.partition(".")[2] for name in pyramid)
            raise ValueError(
                f"KD.GDETKD.SGFI.STUDENT_LEVELS is '{node.STUDENT_LEVELS}'; it must be 'all' or "
                f"names, separated by commas, of the student's levels: {known}"
            )
        return {name: info for name, info in pyramid.items() if name in names}

    def weighted_levels(self, levels: Mapping[str, KeyInfo]) -> int:
        """Return L of :class:`SGFI`."""
        return len(levels)

    def optimizer_overrides(self):
        if self.sgfi.num_levels == 1:
            return {}
        return {"sgfi.log_tau": {"weight_decay": 0.0}}

    def forward(self, ctx, rois):
        mask = self.chosen(rois)
        boxes = [Boxes(b.tensor[m]) for b, m in zip(rois.boxes, mask.split(rois.counts))]
        teacher = ctx.teacher.run(self.teacher_needs, rois.boxes)["roi.feat"][mask]
        features = [ctx.student[key] for key in self.student_needs]
        output = self.sgfi(self.pool(features, boxes), teacher)
        self._log(output)
        return output.loss

    def pool(self, features: Sequence[Tensor], boxes: List[Boxes]) -> Tensor:
        """Return (R, L, C, h, w)."""
        return pool_all_levels(features, self.strides, boxes, self.size, self._sampling_ratio)

    def chosen(self, rois: RoIBatch) -> Tensor:
        """(R,) bool, the RoIs that are compared; a new random subset in every call."""
        mask = rois.positive if self._positive else torch.ones_like(rois.positive)
        if self._max_rois == 0:
            return mask
        return torch.cat([_subset(m, self._max_rois) for m in mask.split(rois.counts)])

    @torch.no_grad()
    def _log(self, output: SGFIOutput) -> None:
        storage, alpha = get_event_storage(), output.alpha
        storage.put_scalar(f"gdetkd/{self.name}_rois", len(alpha))
        if len(alpha) == 0 or alpha.shape[1] == 1:
            return
        names = ["tau", "entropy"] + [f"alpha_{k.partition('.')[2]}" for k in self.student_needs]
        entropy = torch.special.entr(alpha).sum(dim=1).mean()
        # one transfer for all of them
        values = torch.cat([torch.stack([output.tau, entropy]), alpha.mean(dim=0)]).tolist()
        for name, value in zip(names, values):
            storage.put_scalar(f"gdetkd/{self.name}_{name}", value)


class RoIFITerm(SGFITerm):
    """RoI features of one level of the student, chosen by the size of the box: Table 6's RoIFI.

    RoIs, adapter and loss are those of SGFI. Levels are those that the student's head reads.
    """

    name = "roifi"

    @classmethod
    def levels_from_config(cls, node, student_keys):
        strides = student_keys["neck"].strides
        return {k: v for k, v in _pyramid(student_keys).items() if v.strides[0] in strides}

    def weighted_levels(self, levels):
        return 1

    def pool(self, features, boxes):
        pooled = pool_by_size(features, self.strides, boxes, self.size, self._sampling_ratio)
        return pooled.unsqueeze(1)


for _term in (SGFITerm, RoIFITerm):
    FEATURE_TERMS._do_register(_term.name, _term)


def _pyramid(keys: Keys) -> Dict[str, KeyInfo]:
    """All levels as wide as those that the head reads, by stride."""
    levels = [
        (name, info)
        for name, info in keys.items()
        if name.startswith("neck.") and info.channels == keys["neck"].channels
    ]
    return dict(sorted(levels, key=lambda level: level[1].strides))


def _subset(mask: Tensor, number: int) -> Tensor:
    """``mask`` with at most ``number`` of its True entries, random ones."""
    rows = mask.nonzero().squeeze(1)
    if len(rows) <= number:
        return mask
    rows = rows[torch.randperm(len(rows), device=rows.device)[:number]]
    return torch.zeros_like(mask).index_fill_(0, rows, True)
