"""A feature pyramid whose finest levels can be left out of a forward pass."""

from typing import Dict

import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN
from torch import Tensor

from kd_d2.modeling.backbone.fpn import build_fpn_from_config, build_resnet_from_config

__all__ = ["StaggeredFPN", "build_mimicdet_resnet_fpn_backbone"]


class StaggeredFPN(FPN):
    """Detectron2's FPN with the same parameters, keys and outputs.

    The T-head reads the list P2..P6, the S-head P3..P7 (staggered, Sec. 3.3): the finest level
    exists for the T-head only, and being the end of the top-down path it can be left out without
    any effect on the others.
    """

    def forward(self, x: Tensor, num_skip: int = 0) -> Dict[str, Tensor]:
        """Return the maps "p<l>", finest first.

        ``output_shape()`` names those that may be skipped as well.

        Args:
            x: (N, 3, H, W), sides divisible by ``size_divisibility``.
            num_skip: number of finest levels that are neither computed nor returned.

        Raises:
            ValueError: ``num_skip`` is negative or leaves no level of the top-down path.
        """
        if not 0 <= num_skip < len(self.in_features):
            raise ValueError(
                f"num_skip {num_skip} must be at least 0 and less than the number of "
                f"MODEL.FPN.IN_FEATURES, {list(self.in_features)}"
            )
        bottom_up = self.bottom_up(x)
        sources = self.in_features[num_skip:]
        names = self._out_features[num_skip : len(self.in_features)]
        pyramid: Dict[str, Tensor] = {}
        merged = None
        for source, name, lateral, output in zip(
            reversed(sources), reversed(names), self.lateral_convs, self.output_convs
        ):
            merged = self._merge(lateral(bottom_up[source]), merged)
            pyramid[name] = output(merged)
        results = {name: pyramid[name] for name in names}
        if self.top_block is not None:
            top = self.top_block({**bottom_up, **results}[self.top_block.in_feature])
            results.update(zip(self._out_features[len(self.in_features) :], top))
        return results

    def _merge(self, lateral: Tensor, coarser: Tensor) -> Tensor:
        """``lateral`` and the upsampled next coarser map, which the coarsest level lacks."""
        if coarser is None:
            return lateral
        merged = lateral + F.interpolate(coarser, scale_factor=2.0, mode="nearest")
        return merged / 2 if self._fuse_type == "avg" else merged


@BACKBONE_REGISTRY.register()
def build_mimicdet_resnet_fpn_backbone(cfg, input_shape: ShapeSpec) -> StaggeredFPN:
    """Return Detectron2's ResNet below a staggered pyramid, P2..P7 or P3..P7.

    ``MODEL.FPN.IN_FEATURES`` decides: a detector that never reads P2 starts with res3, otherwise
    the layers of P2 would be parameters without gradients. P6 and P7 lie on C5 by default.

    Raises:
        ValueError: see ``build_kd_resnet_fpn_backbone``.
    """
    bottom_up = build_resnet_from_config(cfg, input_shape)
    return build_fpn_from_config(cfg, bottom_up, StaggeredFPN)
