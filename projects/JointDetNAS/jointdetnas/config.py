"""Configuration of the students: ``MODEL.MORPH_RESNET``."""

from detectron2.config import CfgNode as CN

from kd_d2.config import CONFIG_NODES

__all__ = ["add_morph_resnet_config"]


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
