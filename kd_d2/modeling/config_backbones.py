"""Configuration keys of the backbones and pyramids that the library adds."""

from detectron2.config import CfgNode as CN

__all__ = ["add_backbone_config"]


def add_backbone_config(cfg: CN) -> None:
    """Add the keys of :mod:`kd_d2.modeling.backbone`; the defaults are Detectron2's behaviour."""
    # What P6 is computed from: "c5", the last map of the bottom-up network (Detectron2's and
    # mmdetection's RetinaNet), or "p5", the coarsest map of the pyramid (mmdetection's GFL, ATSS,
    # FCOS and all official CrossKD RetinaNet students). Read by the kd_d2 backbones only.
    cfg.MODEL.FPN.P6_SOURCE = "c5"
    # ReLU between P6 and P7. True: Detectron2, and mmdetection's FCOS. False: mmdetection's other
    # detectors, needed to reuse their weights.
    cfg.MODEL.FPN.P7_RELU = True

    # Batch normalisation of the ResNet of build_kd_resnet_fpn_backbone:
    # "": what MODEL.RESNETS.NORM says, as in Detectron2.
    # "eval_affine": running statistics are used and never updated, the affine parameters are
    # trained (mmdetection's norm_eval=True); needs NORM "BN". Stages frozen by
    # MODEL.BACKBONE.FREEZE_AT become FrozenBN in both cases.
    cfg.MODEL.RESNETS.BN_MODE = ""

    # torchvision's MobileNetV2; defaults are mmdetection's (trained BN, nothing frozen).
    cfg.MODEL.MOBILENET_V2 = CN()
    # Multiplies the number of channels of all layers, > 0; torchvision's weights exist for 1.0.
    cfg.MODEL.MOBILENET_V2.WIDTH_MULT = 1.0
    # "BN", "SyncBN", "FrozenBN" or any other name that detectron2.layers.get_norm knows.
    cfg.MODEL.MOBILENET_V2.NORM = "BN"
    # Number of stages that are not trained, their BN becomes FrozenBN: 0 none, 1 the layers of
    # stride 2, 2 also those of stride 4, and so on up to 5.
    cfg.MODEL.MOBILENET_V2.FREEZE_AT = 0
    # Maps that the network returns, a subset of "res2" (stride 4, 24 channels), "res3" (8, 32),
    # "res4" (16, 96), "res5" (32, 1280); the channels are those of WIDTH_MULT 1.0.
    cfg.MODEL.MOBILENET_V2.OUT_FEATURES = ("res3", "res4", "res5")
    # Index in torchvision's `features` of the layer that is "res5": 18, the 1x1 conv to 1280
    # channels (mmdetection's), or 17, the inverted residual before it with 320 channels; layer 18
    # is not built then.
    cfg.MODEL.MOBILENET_V2.LAST_LAYER = 18

    # Detectron2's SwinTransformer; the defaults are Swin-T as in Liu et al., ICCV 2021.
    cfg.MODEL.SWIN = CN()
    # Channels of the first stage; doubled by each further stage.
    cfg.MODEL.SWIN.EMBED_DIM = 96
    # Blocks per stage.
    cfg.MODEL.SWIN.DEPTHS = (2, 2, 6, 2)
    # Attention heads per stage; each must divide the channels of its stage.
    cfg.MODEL.SWIN.NUM_HEADS = (3, 6, 12, 24)
    # Side of an attention window, in tokens.
    cfg.MODEL.SWIN.WINDOW_SIZE = 7
    # Hidden width of the MLPs divided by the width of their stage.
    cfg.MODEL.SWIN.MLP_RATIO = 4.0
    # Probability of skipping the residual branches of the last block, growing linearly from 0 at
    # the first block; in [0, 1). 0.2: Swin-T detectors of mmdetection and CrossKD.
    cfg.MODEL.SWIN.DROP_PATH_RATE = 0.2
    # 0: everything is trained; 1: the patch embedding is not; 2: nor is the first stage; up to 5.
    cfg.MODEL.SWIN.FREEZE_AT = 0
    # Maps that the network returns, a subset of "res2" (stride 4), "res3", "res4", "res5" (32).
    # Detectron2's own class calls them p0 .. p3.
    cfg.MODEL.SWIN.OUT_FEATURES = ("res3", "res4", "res5")
