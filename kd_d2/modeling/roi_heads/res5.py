"""C4 head whose last stage is that of the backbone's ResNet, of whatever depth."""

from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.backbone.resnet import BasicBlock, ResNet
from detectron2.modeling.roi_heads import Res5ROIHeads
from torch import nn

__all__ = ["KDRes5ROIHeads"]

# depth -> blocks of the last stage of ResNets made of two 3x3 convolutions a block
_BASIC_BLOCKS = {18: 2, 34: 3}


@ROI_HEADS_REGISTRY.register()
class KDRes5ROIHeads(Res5ROIHeads):
    """Detectron2's ``Res5ROIHeads`` with the stage that ``MODEL.RESNETS.DEPTH`` stands for.

    Detectron2 always builds three bottleneck blocks. For R-18 and R-34 these have 512 channels as
    well but are not the network's own stage, so that its ImageNet weights do not fit; here they
    get their 2 or 3 basic blocks. Other depths are as in Detectron2.
    """

    @classmethod
    def _build_res5_block(cls, cfg):
        node = cfg.MODEL.RESNETS
        if node.DEPTH not in _BASIC_BLOCKS:
            return super()._build_res5_block(cfg)
        out_channels = 8 * node.RES2_OUT_CHANNELS  # doubles from stage to stage
        blocks = ResNet.make_stage(
            BasicBlock,
            _BASIC_BLOCKS[node.DEPTH],
            stride_per_block=[2] + [1] * (_BASIC_BLOCKS[node.DEPTH] - 1),
            in_channels=out_channels // 2,
            out_channels=out_channels,
            norm=node.NORM,
        )
        return nn.Sequential(*blocks), out_channels
