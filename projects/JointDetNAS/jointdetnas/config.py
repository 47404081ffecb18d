"""Configuration of the students and of what changes them.

"Ours" below: the paper is silent or ambiguous, and no code is public.
"""

from detectron2.config import CfgNode as CN

from kd_d2.config import CONFIG_NODES

__all__ = ["add_morph_resnet_config", "add_search_config"]


@CONFIG_NODES.register()
def add_morph_resnet_config(cfg: CN) -> None:
    """Add ``MODEL.MORPH_RESNET``, read by the ``build_morph_resnet_*`` backbones.

    They also read ``MODEL.RESNETS.STEM_OUT_CHANNELS``, ``NORM`` and ``OUT_FEATURES``,
    ``MODEL.BACKBONE.FREEZE_AT`` and ``MODEL.FPN``.
    """
    cfg.MODEL.MORPH_RESNET = CN()
    # The architecture: a preset (r18, r50, r101, x101_32x4d, searched_r18, searched_r50,
    # searched_r101), an encoding as in appendix B of the paper, e.g.
    # "[(64,64)],[(128,128)-(128,128)],[(256,256)],[(512,512)]", or "auto": that of the entry arch
    # of the checkpoint MODEL.WEIGHTS. An encoding in which all stages have one block needs a second
    # pair of quotes, '"[...],[...],[...],[...]"', or it is read as a list.
    cfg.MODEL.MORPH_RESNET.ENCODING = "r50"


@CONFIG_NODES.register()
def add_search_config(cfg: CN) -> None:
    """Add ``SEARCH``: score and student actions of the search."""
    cfg.SEARCH = node = CN()
    # Kinds of actions that may change a student; names in STUDENT_ACTIONS. The paper's four; () for
    # a student that only the teachers change around.
    node.STUDENT_ACTIONS = ("ChannelPruning", "LayerPruning", "AddLayer", "Rearrange")
    # Batches of training images on which actions measure features where they must. Ours.
    node.CALIBRATION_BATCHES = 4
    _add_actions(node)
    _add_score(node)


def _add_actions(node: CN) -> None:
    node.CHANNEL_PRUNING = CN()
    # Part of the rankable channels that one action removes, in (0, 1). Ours; the paper: "small".
    # Around grouped convs a whole group counts as one.
    node.CHANNEL_PRUNING.PERCENT = 0.05
    # Least width of a conv or stream, as part of that in the base detector. Ours: the searched R101
    # has convs with 32 of 256 channels, and none below.
    node.CHANNEL_PRUNING.FLOOR = 0.125
    # Least width in channels. Ours.
    node.CHANNEL_PRUNING.MIN_CHANNELS = 8

    node.LAYER_PRUNING = CN()
    # Which reduction of the absolute parameters of a block is its importance: "sum" (the paper's L1
    # norm; favours the small blocks of the first stage, where the searched R18 lost one) or "mean".
    node.LAYER_PRUNING.IMPORTANCE = "sum"
    # Fast evaluations that an added block cannot be removed for. Ours: its norm is small at first.
    node.LAYER_PRUNING.PROTECT = 3

    node.ADD_LAYER = CN()
    # Blocks that a stage may have beyond those of the base detector. Ours.
    node.ADD_LAYER.EXTRA_DEPTH = 3

    node.REARRANGE = CN()
    # Shortcut of a block that is moved to the next stage, where it halves the map: "subsample" (no
    # parameters, as in the published encodings) or "projection" (a 1x1 conv that starts as the
    # same; the published FLOPs leave room for it). Ours.
    node.REARRANGE.SHORTCUT = "subsample"
    # Lateral conv of a level that gets other channels: "ridge" (fitted to its old output) or
    # "xavier" (drawn afresh). Ours.
    node.REARRANGE.LATERAL_INIT = "ridge"


def _add_score(node: CN) -> None:
    node.SCORE = CN()
    # Weight of complexity against AP; alpha of Sec. 3.1.4. Paper: 0.4, and 0.1 for X101.
    node.SCORE.ALPHA = 0.4
    # Weight of the resolution inside of the complexity; beta of Sec. 3.1.4. Paper: 0.8.
    node.SCORE.BETA = 0.8
    # Complexity C: multiply-adds of the "backbone" (without the pyramid) or of the whole
    # "detector", at BASE_SIZE for all. Ours.
    node.SCORE.COST = "backbone"
    # Base resolution, (long, short) side in pixels. Paper.
    node.SCORE.BASE_SIZE = (1333, 800)
    # Resolutions that a student is evaluated at, (long, short) sides in pixels. Paper.
    node.SCORE.SIZES = ((512, 512), (800, 600), (1080, 720), (1333, 800))
