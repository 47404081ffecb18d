"""A supernet as a whole: which subnet of an elastic detector is active."""

import random
from typing import Optional, Union

from detectron2.config import CfgNode
from torch import nn

from .elastic_config import pool_of
from .elastic_heads import ElasticBoxHead, ElasticRPNHead
from .elastic_resnet import ElasticFPN
from .subnet import Geometry, Subnet, SubnetSpace

__all__ = ["Supernet"]


class Supernet:
    """Sets the active subnet of an elastic detector; the detector runs as it is.

    A plain object that refers to the detector. Also wrapped for training, the detector is the same
    module, hence its active subnet is, too.

    Attributes:
        model: the elastic detector.
        geometry: its numbers of channels.
        space: the subnets that are drawn.
        active: the active subnet.
    """

    def __init__(self, model: nn.Module, space: SubnetSpace):
        """
        Args:
            model: Faster R-CNN of :mod:`.elastic_resnet` and :mod:`.elastic_heads`.
            space: subnets that :meth:`sample` draws.

        Raises:
            ValueError: a part of the detector is not elastic; names its key.
        """
        head, roi_heads = (getattr(model, n, None) for n in ("proposal_generator", "roi_heads"))
        parts = (
            ("BACKBONE.NAME", "build_elastic_resnet_fpn_backbone", model.backbone, ElasticFPN),
            ("RPN.HEAD_NAME", None, getattr(head, "rpn_head", None), ElasticRPNHead),
            ("ROI_BOX_HEAD.NAME", None, getattr(roi_heads, "box_head", None), ElasticBoxHead),
        )
        for key, name, module, expected in parts:
            if not isinstance(module, expected):
                raise ValueError(
                    f"MODEL.{key} of a supernet must be '{name or expected.__name__}', got a "
                    f"{type(module).__name__}"
                )
        self.model, self.space = model, space
        self.geometry: Geometry = model.backbone.bottom_up.geometry
        self.active: Optional[Subnet] = None
        self.set_max()

    @classmethod
    def from_config(cls, cfg: CfgNode, model: nn.Module) -> "Supernet":
        """The supernet of ``model``, which was built from ``cfg``."""
        return cls(model, pool_of(cfg)[1])

    def set_active(self, subnet: Union[str, Subnet]) -> None:
        """Run ``subnet``, or the one of this code, from now on.

        Raises:
            ValueError: it is malformed or no part of the supernet.
        """
        subnet = Subnet.parse(subnet) if isinstance(subnet, str) else subnet
        self.geometry.check(subnet)
        self.model.backbone.set_active(subnet)
        channels = self.geometry.neck_channels(subnet.neck)
        self.model.proposal_generator.rpn_head.set_active(channels)
        self.active = subnet

    def set_max(self) -> None:
        """Run the whole supernet."""
        self.set_active(self.geometry.largest)

    def sample(self, generator: random.Random) -> Subnet:
        """Return a subnet of the space; it is not made active."""
        return self.space.sample(generator)
