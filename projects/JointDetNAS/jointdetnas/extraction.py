"""A subnet of the pool as a detector of its own, and its batch norm statistics."""

from typing import Any, Dict, Iterable, Iterator, List, Mapping, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts
from detectron2.modeling import build_model
from fvcore.nn import update_bn_stats
from torch import Tensor, nn

from kd_d2.config import get_cfg
from kd_d2.data import NamingMapper, at_resolution

from .elastic_config import pool_of
from .presets import config_text
from .subnet import Subnet

__all__ = [
    "CalibrationBatches",
    "as_subnet",
    "copy_leading",
    "extract",
    "recalibrate",
    "subnet_config",
]

Batch = List[Dict[str, Any]]


def as_subnet(name: str, cfg: CfgNode) -> Subnet:
    """Return the subnet of a code, or "largest" or "smallest" of the space of ``cfg``.

    Raises:
        ValueError: malformed, or no part of the supernet of ``cfg``.
    """
    geometry, space = pool_of(cfg)
    corners = {"largest": space.largest, "smallest": space.smallest}
    return geometry.check(corners[name] if name in corners else Subnet.parse(name))


def subnet_config(cfg: CfgNode, subnet: Subnet) -> CfgNode:
    """Return the config of the stand-alone detector that ``subnet`` is.

    Its backbone is a ``MorphResNet``, its heads are Detectron2's. Its batch norm is "BN", that of a
    process by itself, so that a single process can estimate its statistics anew.

    Args:
        cfg: config of the supernet; not modified.
    """
    geometry, _ = pool_of(cfg)
    defaults, cfg = get_cfg(), cfg.clone()
    cfg.defrost()
    cfg.KD = defaults.KD
    model = cfg.MODEL
    model.WEIGHTS = ""
    model.ELASTIC_RESNET = defaults.MODEL.ELASTIC_RESNET
    model.BACKBONE.NAME = "build_morph_resnet_fpn_backbone"
    model.MORPH_RESNET.ENCODING = config_text(geometry.architecture(subnet))
    model.RESNETS.STEM_OUT_CHANNELS = geometry.stem_channels(subnet.stem)
    model.RESNETS.NORM = "BN"
    model.FPN.OUT_CHANNELS = geometry.neck_channels(subnet.neck)
    model.FPN.NORM = model.FPN.NORM and "BN"
    model.RPN.HEAD_NAME = "StandardRPNHead"
    model.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    return cfg


@torch.no_grad()
def copy_leading(source: Mapping[str, Tensor], target: nn.Module) -> None:
    """Copy into every entry of the target's state dict the leading part, in all dimensions, of the
    entry of that name in ``source``."""
    for name, value in target.state_dict().items():
        value.copy_(source[name][tuple(slice(size) for size in value.shape)])


def extract(cfg: CfgNode, supernet: nn.Module, subnet: Subnet) -> Tuple[CfgNode, nn.Module]:
    """Return config and model of ``subnet``, in eval mode on the device of ``cfg``.

    Its outputs are those of the supernet with this subnet active, in eval mode; its tensors are
    copies. Batch norm statistics are the supernet's, too, and fit no subnet: see
    :func:`recalibrate`. Random generators are left as they are.

    Args:
        cfg: config of the supernet.
        supernet: the elastic detector.
    """
    result = subnet_config(cfg, subnet)
    with torch.random.fork_rng(devices=[]):
        model = build_model(result)
    copy_leading(supernet.state_dict(), model)
    return result, model.eval()


class CalibrationBatches:
    """The images of which batch norm statistics are estimated, always the same ones.

    ``MODEL.ELASTIC_RESNET.RECALIBRATION.BATCHES`` lists of ``IMAGES`` mapped training images, drawn
    with ``SEED`` and neither cropped nor flipped; each batch has one of ``INPUT.RESOLUTIONS``, in
    turn. They can be iterated over again and again.
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises:
            ValueError: there are no training images, or fewer than one batch or image is wanted.
        """
        node = cfg.MODEL.ELASTIC_RESNET.RECALIBRATION
        for key in ("BATCHES", "IMAGES"):
            if node[key] < 1:
                raise ValueError(
                    f"MODEL.ELASTIC_RESNET.RECALIBRATION.{key} must be at least 1, got {node[key]}"
                )
        if not cfg.DATASETS.TRAIN:
            raise ValueError(
                "batch norm statistics are estimated on training images, but DATASETS.TRAIN is ()"
            )
        records = get_detection_dataset_dicts(list(cfg.DATASETS.TRAIN), filter_empty=False)
        order = torch.randperm(len(records), generator=torch.Generator().manual_seed(node.SEED))
        wanted = [order[i % len(order)].item() for i in range(node.BATCHES * node.IMAGES)]
        self._records = [records[i] for i in wanted]
        self._images = node.IMAGES
        self._mappers = [
            NamingMapper(at_resolution(cfg, size, False)) for size in cfg.INPUT.RESOLUTIONS
        ]

    def __len__(self) -> int:
        return len(self._records) // self._images

    def __iter__(self) -> Iterator[Batch]:
        for number in range(len(self)):
            mapper = self._mappers[number % len(self._mappers)]
            first = number * self._images
            yield [mapper(record) for record in self._records[first : first + self._images]]


def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> int:
    """Estimate the batch norm statistics of the detector's backbone anew; all else stays.

    The heads, which have no norms, are not run. With one batch, the outputs in eval mode on that
    batch are then those in training mode.

    Args:
        model: a stand-alone subnet, never a supernet. Its mode is what it was before.
        batches: lists of mapped images.

    Returns:
        number of batches.

    Raises:
        ValueError: there is none.
    """
    batches = batches if isinstance(batches, (list, CalibrationBatches)) else list(batches)
    if not len(batches):
        raise ValueError("batch norm statistics need at least one batch of images")
    modes = {module: module.training for module in model.backbone.modules()}
    model.backbone.train()
    try:
        images = (model.preprocess_image(batch).tensor for batch in batches)
        update_bn_stats(model.backbone, images, len(batches))
    finally:
        for module, training in modes.items():
            module.training = training
    return len(batches)
