"""FGD: focal and global distillation."""

from typing import Dict

import torch
from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from torch import nn

from kd_d2.blocks import ContextBlock, ConvAdapter, MapSource, Pair
from kd_d2.blocks.regions.gt import ScaledBackground, ScaledGT
from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, Distiller, MethodInfo
from kd_d2.losses.attention import channel_attention, spatial_attention
from kd_d2.losses.precision import full_precision

from .options import choice, preset

__all__ = ["FGD", "PRESETS", "add_fgd_config"]

# field of KD.FGD -> MODEL.META_ARCHITECTURE -> value of the official configs. ATSS: ours, as GFL.
PRESETS: Dict[str, Dict[str, float]] = {
    field: dict(zip(("RetinaNet", "GFL", "ATSS", "FCOS", "GeneralizedRCNN"), values))
    for field, values in {
        "TEMPERATURE": (0.5, 0.5, 0.5, 0.8, 0.5),
        "FG_WEIGHT": (1e-3, 1e-3, 1e-3, 1.6e-3, 5e-5),
        "BG_WEIGHT": (5e-4, 5e-4, 5e-4, 8e-4, 2.5e-5),
        "ATTENTION_WEIGHT": (5e-4, 5e-4, 5e-4, 8e-4, 5e-5),
        "RELATION_WEIGHT": (5e-6, 5e-6, 5e-6, 8e-6, 5e-7),
    }.items()
}


@CONFIG_NODES.register()
def add_fgd_config(cfg: CN) -> None:
    """Add ``KD.FGD``. -1.0: the official value of the student's family (``PRESETS``)."""
    cfg.KD.FGD = node = CN()
    # tau of both attentions; 0.5, FCOS 0.8.
    node.TEMPERATURE = -1.0
    # Weight alpha of the foreground; like the others of a sum per image, summed over the levels.
    # 1e-3 (FCOS 1.6e-3, two-stage 5e-5).
    node.FG_WEIGHT = -1.0
    # Weight beta of the background; 5e-4 (FCOS 8e-4, two-stage 2.5e-5).
    node.BG_WEIGHT = -1.0
    # Weight gamma of the attention; 5e-4 (FCOS 8e-4, two-stage 5e-5). The default of the authors'
    # class, 1e-3, is in no config.
    node.ATTENTION_WEIGHT = -1.0
    # Weight lambda of the relations; 5e-6 (FCOS 8e-6, two-stage 5e-7).
    node.RELATION_WEIGHT = -1.0
    # How boxes become cells: "stride" divides by the stride (ours); "image" is the official code,
    # which stretches boxes where the batch is padded.
    node.SCALE = "stride"
    add_schedule_config(node)


@DISTILLER_REGISTRY.register()
class FGD(Distiller):
    """Imitation weighted by the teacher's attention, on objects and background apart; relations.

    Per pyramid level, sums over all axes divided by the images N: ``fg`` and ``bg``
    w A_T^S A_T^C (S - T)^2 with the masks of :class:`ScaledGT` and :class:`ScaledBackground`;
    ``attention`` |A_S^C - A_T^C| + |A_S^S - A_T^S|; ``relation`` (R_S(S) - R_T(T))^2 with a
    trainable block on either side. (The one on the teacher's map trains, too, as in the official
    code.) S passes a 1x1 convolution where the widths differ. Two-stage: the levels of the RoI
    head, P2-P5. The official recipes clip the norm of the gradient at 35.
    """

    info = MethodInfo(
        title="FGD: focal and global knowledge distillation",
        paper="Yang et al., Focal and Global Knowledge Distillation for Detectors, CVPR 2022",
        compares="pyramid maps: values, attention and relations between positions",
        requires=("equal strides", "ground truth"),
        gains=(
            "GFL R-101 -> R-50: 43.5 with inherited neck and head (FGD's repository), 40.2 -> "
            "41.3 (CrossKD's table)",
            "RetinaNet X101-64x4d -> R-50 2x: 37.4 -> 40.7 (FGD's repository)",
            "Faster R-CNN, Cascade Mask X101-DCN -> R-50 2x: 38.4 -> 42.0 (FGD's repository)",
            "FCOS R-101 -> R-50 2x: 38.5 -> 42.7 with inheriting and other FCOS switches",
            "RepPoints X101-DCN -> R-50 2x: 38.6 -> 42.0 (FGD's repository)",
        ),
        unverified="weights for ATSS are those of GFL without a published result",
    )

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        temperature: float = 0.5,
        fg_weight: float = 1e-3,
        bg_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        relation_weight: float = 5e-6,
        scale: str = "stride",
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            temperature, fg_weight, bg_weight, attention_weight, relation_weight, scale: see
                :func:`add_fgd_config`; the defaults are RetinaNet's.

        Raises:
            ValueError: a temperature that is not positive, unknown ``scale``, or no level in
                common.
        """
        if not temperature > 0:
            raise ValueError(f"KD.FGD.TEMPERATURE must be positive, got {temperature}")
        choice("KD.FGD.SCALE", scale, ("stride", "image"))
        self._source = MapSource("neck")
        try:
            self._source.bind(student_keys, teacher_keys)
        except ValueError as error:
            raise ValueError(f"FGD: {error}") from None
        self._foreground, self._background = ScaledGT(scale), ScaledBackground(scale)
        self._temperature = temperature
        super().__init__(
            weights={
                "fg": fg_weight,
                "bg": bg_weight,
                "attention": attention_weight,
                "relation": relation_weight,
            },
            student_needs=self._source.student_needs,
            teacher_needs=self._source.teacher_needs,
        )
        self.adapter = ConvAdapter(1, only_if_needed=True)
        self.adapter.build(self._source.widths)
        widths = [teacher for _, teacher in self._source.widths]
        self.student_relation = nn.ModuleList(ContextBlock(width) for width in widths)
        self.teacher_relation = nn.ModuleList(ContextBlock(width) for width in widths)

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        node, arch = cls.config_node(cfg), cfg.MODEL.META_ARCHITECTURE
        numbers = {
            field.lower(): preset(f"KD.FGD.{field}", node[field], values, arch)
            for field, values in PRESETS.items()
        }
        return {
            "student_keys": student_keys,
            "teacher_keys": teacher_keys,
            "scale": node.SCALE,
            **numbers,
        }

    def compute(self, ctx) -> Dict[str, torch.Tensor]:
        levels = []
        for index, pair in enumerate(self._source(ctx)):
            pair.student = self.adapter(pair.student, index)
            pair.teacher = pair.teacher.detach()
            with torch.autocast(pair.student.device.type, enabled=False):
                levels.append(self._level(ctx, pair.map(full_precision), index))
        images = max(len(ctx.image_sizes), 1)
        return {term: sum(level[term] for level in levels) / images for term in self.weights}

    def _level(self, ctx, pair: Pair, index: int) -> Dict[str, torch.Tensor]:
        """Return the sums of one level."""
        spatial_s, spatial_t, channel_s, channel_t = (
            attention(x, self._temperature)
            for attention in (spatial_attention, channel_attention)
            for x in (pair.student, pair.teacher)
        )
        difference = (pair.student - pair.teacher).square()
        values = (difference * channel_t).sum(dim=1) * spatial_t[:, 0]
        ours = self.student_relation[index](pair.student)
        theirs = self.teacher_relation[index](pair.teacher)
        return {
            "fg": (values * self._foreground(ctx, pair)).sum(),
            "bg": (values * self._background(ctx, pair)).sum(),
            "attention": (channel_s - channel_t).abs().sum() + (spatial_s - spatial_t).abs().sum(),
            "relation": (ours - theirs).square().sum(),
        }
