"""Configuration keys of SSD and its VGG.

"Published" is the SSD of mmdetection and DICOD (SSD300 and SSD512 on COCO), which differs from the
paper of 2016 in the order of the default boxes and in their sizes.
"""

from detectron2.config import CfgNode as CN

__all__ = ["add_ssd_config"]


def add_ssd_config(cfg: CN) -> None:
    """Add ``MODEL.SSD`` and ``MODEL.SSD_VGG``; the defaults are SSD300."""
    node = cfg.MODEL.SSD = CN()
    # Number of foreground classes K; the background has index K. 80: COCO.
    node.NUM_CLASSES = 80
    # Side S of the network's square input, pixels. Images of another size are stretched at
    # inference; in training INPUT.MAPPER "SSDMapper" does it. Published: 300, 512.
    node.INPUT_SIZE = 300
    # Per level: pixels between the centres of default boxes, finest first.
    # Published for 512: (8, 16, 32, 64, 128, 256, 512).
    node.STRIDES = (8, 16, 32, 64, 100, 300)
    # Sides of the default boxes, pixels of the input, one more than there are levels: the squares
    # of level i have the sides SIZES[i] and sqrt(SIZES[i] * SIZES[i + 1]).
    # Published for 512: (20, 51, 133, 215, 296, 378, 460, 542).
    node.SIZES = (21, 45, 99, 153, 207, 261, 315)
    # Per level: width to height of the other boxes, above 1; each is there with its reciprocal.
    node.ASPECT_RATIOS = ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,))
    # Factors of (dx, dy, dw, dh), i.e. one over their standard deviations. Published: stds
    # (0.1, 0.1, 0.2, 0.2).
    node.BBOX_REG_WEIGHTS = (10.0, 10.0, 5.0, 5.0)
    # Default boxes with this IoU or more are positive, in (0, 1]. Published: 0.5.
    node.IOU_THRESH = 0.5
    # Negatives per positive of an image that take part in the class loss. Published: 3.
    node.NEG_POS_RATIO = 3.0
    # Deltas whose error is below this are in the quadratic part of the smooth L1 loss; 0: L1.
    # Published: 1.
    node.SMOOTH_L1_BETA = 1.0
    # Weights of the class and the box loss. Published: 1, 1.
    node.CLS_LOSS_WEIGHT = 1.0
    node.BOX_LOSS_WEIGHT = 1.0
    # Detections need a class score above this; probability in [0, 1]. Published: 0.02.
    node.SCORE_THRESH_TEST = 0.02
    # Default boxes with the best foreground scores that are kept per level. Published: 1000.
    node.TOPK_CANDIDATES_TEST = 1000
    # Of two detections of one class whose IoU exceeds this the weaker is dropped. Published: 0.45.
    node.NMS_THRESH_TEST = 0.45

    node = cfg.MODEL.SSD_VGG = CN()
    # Widths of the five blocks. VGG16: as here; torchvision's weights fit these only.
    node.CHANNELS = (64, 128, 256, 512, 512)
    # 3x3 convs per block. VGG16: as here.
    node.DEPTHS = (2, 2, 3, 3, 3)
    # Width of conv6 and conv7, and the dilation of conv6. Published: 1024, 6.
    node.CONV7_CHANNELS = 1024
    node.DILATION = 6
    # Levels above conv7: (width of the 1x1 conv, width, kernel, stride, padding of the other
    # conv). Published for 512: (256, 512, 3, 2, 1), three times (128, 256, 3, 2, 1),
    # (128, 256, 4, 1, 1).
    node.EXTRAS = (
        (256, 512, 3, 2, 1),
        (128, 256, 3, 2, 1),
        (128, 256, 3, 1, 0),
        (128, 256, 3, 1, 0),
    )
    # Normalisation after every conv of backbone and extras: "" (none; convs then have a bias) or a
    # name of detectron2.layers.get_norm. Published: "". Training from scratch needs one.
    node.NORM = ""
    # First value of the learnable scales of conv4_3's L2 normalisation. Published: 20.
    node.L2NORM_INIT = 20.0
