"""L1 penalty on the batch-norm weights of the backbone (Sec. 3.3)."""

from typing import Any, Dict, List

import torch
from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from torch import nn

from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, DistillationContext, Distiller, MethodInfo

from .morph_resnet import MORPH_BUILDERS
from .surgery import bottom_up_of

__all__ = ["BNSparsity", "add_bnsparsity_config", "norm_weights"]


@CONFIG_NODES.register()
def add_bnsparsity_config(cfg: CN) -> None:
    """Add ``KD.BNSPARSITY``."""
    cfg.KD.BNSPARSITY = node = CN()
    # lambda, the factor of the sum of |gamma|, for base training, search and fine-tuning. Paper.
    node.WEIGHT = 1e-5
    add_schedule_config(node)


def norm_weights(model: nn.Module) -> List[nn.Parameter]:
    """The weights gamma of all batch norms in the four stages of a MorphResNet.

    The last one of each block is among them, although it is no key of the ranking: a channel of a
    stream is dead only if it is zero there, too. Stem and pyramid are not. Ours; the paper says "BN
    weights".
    """
    body = bottom_up_of(model)
    return [
        module.weight
        for position in body.architecture.positions
        for name, module in body.block_at(position).named_modules()
        if name.endswith("norm") and isinstance(getattr(module, "weight", None), nn.Parameter)
    ]


@DISTILLER_REGISTRY.register()
class BNSparsity(Distiller):
    """L_BN, the sum of |gamma|: it makes channels small that are then pruned. Needs no teacher.

    Weights (1, -2, 0) give 3 lambda and the gradient lambda (1, -1, 0).
    """

    needs_teacher = False
    info = MethodInfo(
        title="Network slimming's sparsity term, as in Joint-DetNAS",
        paper="Liu et al., Learning Efficient Convolutional Networks through Network Slimming, "
        "ICCV 2017; Yao et al., Joint-DetNAS, CVPR 2021, arXiv 2105.12971",
        compares="nothing: it penalises the student's batch-norm weights",
        requires=("a MorphResNet with trained batch norm",),
        unverified="which batch norms are meant: all of the four stages is our reading",
    )

    @configurable
    def __init__(self, *, weight: float = 1e-5):
        """
        Args:
            weight: lambda.
        """
        super().__init__(weights={"sparsity": weight}, student_needs=())

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys) -> Dict[str, Any]:
        """
        Raises:
            ValueError: the student has no MorphResNet, or one without trained batch norm.
        """
        name, norm = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.NORM
        if name not in MORPH_BUILDERS:
            raise ValueError(
                f"BNSparsity is for MODEL.BACKBONE.NAME among {list(MORPH_BUILDERS)}, got '{name}'"
            )
        if norm in ("", "FrozenBN"):
            raise ValueError(
                f"BNSparsity needs batch norms that are trained, MODEL.RESNETS.NORM is '{norm}': "
                "set it to 'SyncBN' or 'BN'"
            )
        return {"weight": cls.config_node(cfg).WEIGHT}

    def compute(self, ctx: DistillationContext) -> Dict[str, torch.Tensor]:
        weights = norm_weights(ctx.student.model)
        return {"sparsity": torch.stack([w.float().abs().sum() for w in weights]).sum()}
