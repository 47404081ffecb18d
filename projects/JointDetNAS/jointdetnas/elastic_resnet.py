"""Elastic ResNet with pyramid: the backbone of the supernet of the teacher pool (A.1.3).

Module names are Detectron2's, and the weights of a subnet are leading slices of the supernet's, in
the first blocks of each stage.
"""

from dataclasses import asdict
from functools import partial
from typing import Any, Callable, Dict, Mapping, Optional, Sequence, Union

from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock
from torch import nn

from kd_d2.config import choice

from .elastic_config import pool_of
from .elastic_layers import ElasticBatchNorm2d, make_convs_elastic
from .subnet import Geometry, Subnet

__all__ = ["ElasticFPN", "ElasticResNet", "build_elastic_resnet_fpn_backbone"]

# norms by their names in Detectron2's config; value: statistics of all processes together
_NORMS = {"BN": False, "SyncBN": True, "naiveSyncBN": True}
# what an elastic backbone cannot have
_FIXED = {
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NUM_GROUPS": 1,
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
}


class _Stem(BasicStem):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        make_convs_elastic(self)


class _Bottleneck(BottleneckBlock):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        make_convs_elastic(self)

    def set_active(self, inner: int, outer: int) -> None:
        self.conv1.active_out = self.conv2.active_out = inner
        self.conv3.active_out = outer
        if self.shortcut is not None:
            self.shortcut.active_out = outer


class _Stage(nn.Sequential):
    """Runs its first ``active_depth`` blocks; the others are skipped and get no gradient."""

    def __init__(self, *blocks: nn.Module):
        super().__init__(*blocks)
        self.active_depth = len(blocks)

    def forward(self, x):
        for index in range(self.active_depth):
            x = self[index](x)
        return x


class ElasticResNet(ResNet):
    """A ResNet of bottlenecks whose stages run with fewer blocks and channels."""

    def __init__(self, geometry: Geometry, norm: Callable[[int], nn.Module]):
        """
        Args:
            geometry: numbers of channels.
            norm: called with the number of channels of the supernet.
        """
        largest = geometry.largest
        width = stem = geometry.stem_channels(largest.stem)
        stages = []
        for stage, (depth, quarters) in enumerate(zip(largest.depths, largest.widths)):
            outer = geometry.outer_channels(stage, quarters)
            stages.append([])
            for index in range(depth):
                block = _Bottleneck(
                    width,
                    outer,
                    bottleneck_channels=geometry.inner_channels(stage, quarters),
                    stride=2 if stage and not index else 1,
                    norm=norm,
                )
                stages[-1].append(block)
                width = outer
        names = [f"res{stage + 2}" for stage in range(len(stages))]
        super().__init__(_Stem(3, stem, norm), stages, out_features=names)
        self.geometry = geometry
        for index, name in enumerate(names):
            # Detectron2's forward iterates over the list
            self.stages[index] = _Stage(*getattr(self, name))
            setattr(self, name, self.stages[index])

    # ------------------------------------------------------ see kd_d2.checkpoint.architecture
    def architecture_entry(self, model: nn.Module) -> Dict[str, Any]:
        """The entry ``arch`` of the supernet's checkpoints."""
        numbers = asdict(self.geometry)
        return {"pool": {**numbers, "depths": list(numbers["depths"])}}

    def check_architecture(self, model: nn.Module, entry: Optional[Mapping[str, Any]]) -> None:
        """Compare the entry of a checkpoint with this supernet.

        Raises:
            ValueError: they differ, or the file holds another network.
        """
        ours = self.architecture_entry(model)
        if entry is not None and dict(entry) != ours:
            raise ValueError(f"it holds {dict(entry)}, MODEL.ELASTIC_RESNET describes {ours}")

    def set_active(self, subnet: Subnet) -> None:
        """Run with the depths and widths of ``subnet`` from now on."""
        geometry = self.geometry
        self.stem.conv1.active_out = geometry.stem_channels(subnet.stem)
        for index, stage in enumerate(self.stages):
            stage.active_depth = subnet.depths[index]
            inner = geometry.inner_channels(index, subnet.widths[index])
            outer = geometry.outer_channels(index, subnet.widths[index])
            for block in stage:
                block.set_active(inner, outer)


class ElasticFPN(FPN):
    """Detectron2's pyramid with fewer channels; its ``output_shape`` is the supernet's."""

    def __init__(
        self,
        bottom_up: ElasticResNet,
        in_features: Sequence[str],
        norm: Union[str, Callable[[int], nn.Module]] = "",
        fuse_type: str = "sum",
    ):
        geometry = bottom_up.geometry
        super().__init__(
            bottom_up=bottom_up,
            in_features=in_features,
            out_channels=geometry.neck_channels(geometry.max_width),
            norm=norm,
            top_block=LastLevelMaxPool(),
            fuse_type=fuse_type,
        )
        make_convs_elastic(self)
        # Detectron2's forward iterates over these lists, top down
        stages = [name[len("res") :] for name in reversed(in_features)]
        self.lateral_convs = [getattr(self, f"fpn_lateral{stage}") for stage in stages]
        self.output_convs = [getattr(self, f"fpn_output{stage}") for stage in stages]

    def set_active(self, subnet: Subnet) -> None:
        """Run with the width of ``subnet`` from now on, the bottom-up network included."""
        self.bottom_up.set_active(subnet)
        channels = self.bottom_up.geometry.neck_channels(subnet.neck)
        for conv in (*self.lateral_convs, *self.output_convs):
            conv.active_out = channels


def _norm(key: str, name: str) -> Callable[[int], nn.Module]:
    return partial(ElasticBatchNorm2d, synchronised=_NORMS[choice(key, name, _NORMS)])


@BACKBONE_REGISTRY.register()
def build_elastic_resnet_fpn_backbone(cfg, input_shape=None) -> ElasticFPN:
    """Return the supernet's backbone, all of it active.

    Raises:
        ValueError: a key has a value that an elastic backbone cannot have.
    """
    resnets, fpn = cfg.MODEL.RESNETS, cfg.MODEL.FPN
    values: Dict[str, object] = {
        "MODEL.BACKBONE.FREEZE_AT": cfg.MODEL.BACKBONE.FREEZE_AT,
        **{f"MODEL.RESNETS.{key}": value for key, value in resnets.items()},
        "MODEL.FPN.IN_FEATURES": fpn.IN_FEATURES,
    }
    for key, expected in _FIXED.items():
        value = list(values[key]) if isinstance(expected, list) else values[key]
        if value != expected:
            raise ValueError(f"{key} of an elastic backbone must be {expected}, got {value}")
    if any(resnets.DEFORM_ON_PER_STAGE):
        raise ValueError("MODEL.RESNETS.DEFORM_ON_PER_STAGE: elastic blocks are not deformable")
    geometry, _ = pool_of(cfg)
    bottom_up = ElasticResNet(geometry, _norm("MODEL.RESNETS.NORM", resnets.NORM))
    return ElasticFPN(
        bottom_up,
        fpn.IN_FEATURES,
        norm=fpn.NORM and _norm("MODEL.FPN.NORM", fpn.NORM),
        fuse_type=fpn.FUSE_TYPE,
    )
