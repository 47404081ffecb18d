"""MorphResNet: a ResNet made from an encoding, as a Detectron2 backbone."""

import os
from typing import Any, Dict, Mapping, Optional, Sequence

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem
from detectron2.utils.file_io import PathManager
from torch import nn

from kd_d2.checkpoint import MissingFileError, load_checkpoint_file
from kd_d2.config import CONFIG_RESOLVERS
from kd_d2.modeling.backbone.fpn import build_fpn_from_config

from .morph_blocks import MorphBlock, Norm
from .presets import config_text, resolve
from .space import Architecture

__all__ = [
    "MORPH_BUILDERS",
    "MorphResNet",
    "build_morph_resnet_backbone",
    "build_morph_resnet_fpn_backbone",
    "build_retinanet_morph_resnet_fpn_backbone",
    "config_architecture",
    "find_pyramid",
    "resolve_encoding",
]

# Values of MODEL.BACKBONE.NAME.
MORPH_BUILDERS = (
    "build_morph_resnet_backbone",
    "build_morph_resnet_fpn_backbone",
    "build_retinanet_morph_resnet_fpn_backbone",
)


class MorphResNet(ResNet):
    """Detectron2's ResNet with the blocks of an :class:`Architecture`.

    State-dict keys are Detectron2's: for the encodings of R-18, R-50 and R-101 its weights load
    strictly and give the same output.

    Attributes:
        architecture: what it was made from; the ages of its blocks are part of it.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        norm: Norm = "BN",
        freeze_at: int = 0,
        out_features: Sequence[str] = ("res2", "res3", "res4", "res5"),
        in_channels: int = 3,
    ):
        """
        Args:
            architecture: widths of the stem and of all blocks.
            norm: batch norm after every conv, as in ``detectron2.layers.get_norm``. Pruning needs
                one with weights, hence not "FrozenBN".
            freeze_at: number of stages, the stem being the first, that are not trained.
            out_features: names of the maps it returns, among "stem" and "res2" to "res5".
            in_channels: channels of the image.

        Raises:
            ValueError: the last stage is not among ``out_features``; Detectron2 would leave it out.
        """
        if "res5" not in out_features:
            raise ValueError(
                f"MODEL.RESNETS.OUT_FEATURES is {list(out_features)}, must contain 'res5': a stage "
                "of MODEL.MORPH_RESNET.ENCODING would be left out"
            )
        stem = BasicStem(in_channels=in_channels, out_channels=architecture.stem, norm=norm)
        stages = [
            [
                MorphBlock(
                    block,
                    architecture.in_channels((stage, index)),
                    stride=architecture.stride((stage, index)),
                    norm=norm,
                )
                for index, block in enumerate(blocks)
            ]
            for stage, blocks in enumerate(architecture.stages)
        ]
        super().__init__(stem, stages, out_features=list(out_features), freeze_at=freeze_at)
        self.architecture = architecture
        # what it takes to build one like it
        self.options: Dict[str, Any] = {
            "norm": norm,
            "freeze_at": freeze_at,
            "out_features": tuple(out_features),
            "in_channels": in_channels,
        }

    def block_at(self, position) -> MorphBlock:
        """The block at (stage, index), both from 0."""
        stage, index = position
        return self.stages[stage][index]

    # ------------------------------------------------------ see kd_d2.checkpoint.architecture
    def architecture_entry(self, model: nn.Module) -> Dict[str, Any]:
        """The entry ``arch`` of the checkpoints of ``model``, of which this is a part."""
        return self.architecture.entry(_pyramid_channels(model))

    def check_architecture(self, model: nn.Module, entry: Optional[Mapping[str, Any]]) -> None:
        """Compare the entry of a checkpoint with this network and take over the ages of blocks.

        Raises:
            ValueError: encoding, stem or pyramid differ.
        """
        if entry is None:
            return
        stored = Architecture.from_entry(entry)
        difference = stored.first_difference(self.architecture)
        if difference:
            raise ValueError(
                f"its encoding is not that of MODEL.MORPH_RESNET.ENCODING: {difference}. Set it to "
                f"'auto', or to '{stored}' (and MODEL.RESNETS.STEM_OUT_CHANNELS to {stored.stem})"
            )
        channels = _pyramid_channels(model)
        # without a pyramid on one side there is nothing to compare
        if channels and entry["fpn"] and channels != entry["fpn"]:
            raise ValueError(
                f"its pyramid has {entry['fpn']} channels, MODEL.FPN.OUT_CHANNELS is {channels}"
            )
        self.architecture = stored


def find_pyramid(model: nn.Module) -> Optional[FPN]:
    """The pyramid above a MorphResNet inside ``model``; None if there is none."""
    for module in model.modules():
        if isinstance(module, FPN) and isinstance(module.bottom_up, MorphResNet):
            return module
    return None


def _pyramid_channels(model: nn.Module) -> int:
    pyramid = find_pyramid(model)
    return 0 if pyramid is None else next(iter(pyramid.output_shape().values())).channels


def config_architecture(cfg: CfgNode) -> Architecture:
    """The architecture that ``MODEL.MORPH_RESNET.ENCODING`` says.

    Raises:
        ValueError: malformed text, or "auto" with weights that have no entry ``arch`` or one with
            another stem.
        MissingFileError: "auto" and ``MODEL.WEIGHTS`` does not exist.
    """
    text, stem = cfg.MODEL.MORPH_RESNET.ENCODING, cfg.MODEL.RESNETS.STEM_OUT_CHANNELS
    try:
        return _stored_architecture(cfg) if text == "auto" else resolve(text, stem)
    except MissingFileError:
        raise
    except ValueError as error:
        raise ValueError(f"MODEL.MORPH_RESNET.ENCODING: {error}") from None


def _weights_file(cfg: CfgNode) -> str:
    return PathManager.get_local_path(cfg.MODEL.WEIGHTS) if cfg.MODEL.WEIGHTS else ""


def _stored_architecture(cfg: CfgNode) -> Architecture:
    path, file = cfg.MODEL.WEIGHTS, _weights_file(cfg)
    if not os.path.isfile(file):
        raise MissingFileError(
            f"MODEL.MORPH_RESNET.ENCODING is 'auto', but MODEL.WEIGHTS '{path}' does not exist"
        )
    data = load_checkpoint_file(file, cfg.KD.ALLOW_UNSAFE_LOAD)
    if not isinstance(data, dict) or "arch" not in data:
        raise ValueError(f"'auto', but {path} has no entry arch; give the encoding itself")
    stored = Architecture.from_entry(data["arch"])
    if stored.stem != cfg.MODEL.RESNETS.STEM_OUT_CHANNELS:
        raise ValueError(
            f"the stem of {path} has {stored.stem} channels, MODEL.RESNETS.STEM_OUT_CHANNELS is "
            f"{cfg.MODEL.RESNETS.STEM_OUT_CHANNELS}"
        )
    return stored


@CONFIG_RESOLVERS.register()
def resolve_encoding(cfg: CfgNode) -> None:
    """Write the encoding itself into a config that names a preset or says "auto".

    A file that does not exist yet is left to the construction of the model.
    """
    if cfg.MODEL.BACKBONE.NAME not in MORPH_BUILDERS:
        return
    node = cfg.MODEL.MORPH_RESNET
    if node.ENCODING != "auto" or os.path.isfile(_weights_file(cfg)):
        node.ENCODING = config_text(config_architecture(cfg))


@BACKBONE_REGISTRY.register()
def build_morph_resnet_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> MorphResNet:
    """The network of ``MODEL.MORPH_RESNET``, without a pyramid.

    Raises:
        ValueError: malformed encoding, or keys of ``MODEL.RESNETS`` that it cannot follow.
    """
    architecture = config_architecture(cfg)
    node = cfg.MODEL.RESNETS
    bottleneck = architecture.block((0, 0)).is_bottleneck
    for key, value, wanted, concerned in (
        ("STRIDE_IN_1X1", node.STRIDE_IN_1X1, False, bottleneck),
        ("RES5_DILATION", node.RES5_DILATION, 1, True),
        ("DEFORM_ON_PER_STAGE", any(node.DEFORM_ON_PER_STAGE), False, True),
    ):
        if concerned and value != wanted:
            raise ValueError(f"MODEL.RESNETS.{key} must be {wanted} for a MorphResNet, got {value}")
    return MorphResNet(
        architecture,
        norm=node.NORM,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        out_features=node.OUT_FEATURES,
        in_channels=input_shape.channels,
    )


@BACKBONE_REGISTRY.register()
def build_morph_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same below Detectron2's pyramid for two-stage detectors, P2 to P6.

    Raises:
        ValueError: as :func:`build_morph_resnet_backbone`.
    """
    return FPN(
        bottom_up=build_morph_resnet_backbone(cfg, input_shape),
        in_features=cfg.MODEL.FPN.IN_FEATURES,
        out_channels=cfg.MODEL.FPN.OUT_CHANNELS,
        norm=cfg.MODEL.FPN.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=cfg.MODEL.FPN.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
def build_retinanet_morph_resnet_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """The same below the pyramid of one-stage detectors, P3 to P7; P6 as ``FPN.P6_SOURCE`` says.

    Raises:
        ValueError: as :func:`build_morph_resnet_backbone`.
    """
    return build_fpn_from_config(cfg, build_morph_resnet_backbone(cfg, input_shape))
