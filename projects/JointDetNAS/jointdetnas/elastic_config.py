"""Configuration of the elastic teacher pool: ``MODEL.ELASTIC_RESNET``, ``KD.TEACHER.ELASTIC``."""

from typing import Tuple

from detectron2.config import CfgNode as CN

from kd_d2.config import CONFIG_NODES

from .subnet import Geometry, SubnetSpace

__all__ = ["add_elastic_resnet_config", "pool_of"]


@CONFIG_NODES.register()
def add_elastic_resnet_config(cfg: CN) -> None:
    """Add ``MODEL.ELASTIC_RESNET``, read by ``build_elastic_resnet_fpn_backbone``, and
    ``KD.TEACHER.ELASTIC``.

    The standard widths are Detectron2's own keys: ``MODEL.RESNETS.STEM_OUT_CHANNELS``,
    ``WIDTH_PER_GROUP``, ``RES2_OUT_CHANNELS`` and ``MODEL.FPN.OUT_CHANNELS``.
    """
    cfg.MODEL.ELASTIC_RESNET = node = CN()
    # Blocks of the four stages of the supernet. Paper (A.1.3): those of ResNet-101.
    node.DEPTHS = (3, 4, 23, 3)
    # Width of the supernet, in quarters of the standard ResNet; 6 is the paper's 1.5.
    node.MAX_WIDTH = 6
    # The subnets that are drawn, in training and by ElasticTeacher.sample: fewest blocks of the
    # stages, the most being DEPTHS, and the widths of stages, neck and stem in quarters. The
    # default is the last phase of the paper (A.1.3); that the stem has a width of its own is ours.
    node.MIN_DEPTHS = (2, 2, 2, 2)
    node.WIDTHS = (4, 5, 6)
    # Before the first iteration of a phase, order the channels by the L1 norm of the weights that
    # read them, so that subnets keep the important ones (as in Once-for-All). Ours.
    node.SORT_CHANNELS = False
    # Widths in quarters whose sets of channels survive the sort: those that an earlier phase has
    # trained, without the largest. Ours.
    node.SORT_KEEP_WIDTHS = ()
    # Subnets that train_pool.py evaluates: codes, "largest" and "smallest" of the phase.
    node.EVAL_SUBNETS = ("largest", "smallest")
    node.RECALIBRATION = CN()
    # Batch norm statistics of a subnet are estimated anew on so many batches of training images,
    # one of INPUT.RESOLUTIONS a batch, in turn. Ours: the paper says "a batch of images".
    node.RECALIBRATION.BATCHES = 8
    # Images of such a batch. Ours.
    node.RECALIBRATION.IMAGES = 8
    # Seed of the choice of these images.
    node.RECALIBRATION.SEED = 0

    # Of KD.TEACHER.TYPE "ElasticTeacher"; KD.TEACHER.CONFIG_FILE and WEIGHTS are the supernet's.
    cfg.KD.TEACHER.ELASTIC = teacher = CN()
    # The subnet that teaches: a code, "largest" or "smallest" of the pool's config.
    teacher.SUBNET = "largest"
    # Folder in which recalibrated subnets are kept as <code>/config.yaml and model.pth, so that
    # each is made once; empty: none are kept.
    teacher.STORE = ""


def pool_of(cfg: CN) -> Tuple[Geometry, SubnetSpace]:
    """Return the supernet's numbers of channels and the subnets that are drawn.

    Raises:
        ValueError: a key has an impossible value.
    """
    node = cfg.MODEL.ELASTIC_RESNET
    geometry = Geometry(
        depths=tuple(node.DEPTHS),
        stem=cfg.MODEL.RESNETS.STEM_OUT_CHANNELS,
        inner=cfg.MODEL.RESNETS.WIDTH_PER_GROUP,
        outer=cfg.MODEL.RESNETS.RES2_OUT_CHANNELS,
        neck=cfg.MODEL.FPN.OUT_CHANNELS,
        max_width=node.MAX_WIDTH,
    )
    return geometry, SubnetSpace.of(geometry, node.MIN_DEPTHS, node.WIDTHS)
