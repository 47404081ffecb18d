"""Heads of the supernet: as wide as the pyramid that they are given."""

from detectron2.modeling.proposal_generator.rpn import RPN_HEAD_REGISTRY, StandardRPNHead
from detectron2.modeling.roi_heads.box_head import ROI_BOX_HEAD_REGISTRY, FastRCNNConvFCHead

from .elastic_layers import ElasticConv2d, ElasticLinear, make_convs_elastic

__all__ = ["ElasticBoxHead", "ElasticRPNHead"]


@RPN_HEAD_REGISTRY.register()
class ElasticRPNHead(StandardRPNHead):
    """Detectron2's RPN head with one hidden conv, which has as many outputs as inputs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        make_convs_elastic(self)
        conv = self.conv
        if not isinstance(conv, ElasticConv2d) or conv.in_channels != conv.out_channels:
            raise ValueError(
                "ElasticRPNHead has one hidden conv as wide as the pyramid: set "
                "MODEL.RPN.CONV_DIMS to [-1]"
            )

    def set_active(self, channels: int) -> None:
        """Let the hidden conv have so many outputs from now on."""
        self.conv.active_out = channels


@ROI_BOX_HEAD_REGISTRY.register()
class ElasticBoxHead(FastRCNNConvFCHead):
    """Detectron2's box head without convs; its first layer reads the channels that it is given.

    Features are flattened channel by channel, so those of the leading channels are a prefix.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.conv_norm_relus or not self.fcs:
            raise ValueError(
                "ElasticBoxHead has linear layers only: set MODEL.ROI_BOX_HEAD.NUM_CONV to 0 and "
                "NUM_FC to 1 or more"
            )
        self.fc1 = self.fcs[0] = ElasticLinear.of(self.fc1)
