"""Configuration of the crop classifier: its training, and its use as a teacher."""

from detectron2.config import CfgNode as CN

from kd_d2.config import CONFIG_NODES

__all__ = ["add_classifier_config"]


@CONFIG_NODES.register()
def add_classifier_config(cfg: CN) -> None:
    """Add ``CROP_CLASSIFIER`` (training) and ``KD.TEACHER.CLASSIFIER`` (use).

    Training reads these keys of the student's config besides: DATASETS.TRAIN and TEST,
    INPUT.FORMAT, INPUT.RANDOM_FLIP, MODEL.PIXEL_MEAN and PIXEL_STD (normalisation, in the order of
    INPUT.FORMAT), DATALOADER.*, and, in mode "online", all of INPUT.*. "Ours": DICOD does not say.
    """
    cfg.CROP_CLASSIFIER = node = CN()
    # Name in classifier.ARCHITECTURES. Paper: resnet50; also resnet18 and resnext101_32x8d. Or
    # "backbone": the ResNet of MODEL.RESNETS (with NORM "BN" or "SyncBN", nothing frozen), which no
    # detector learns from; it is for students whose backbone has no public weights.
    node.ARCH = "resnet50"
    # Start: torchvision's weights of this architecture, or a file in the layout of PyTorch's
    # ImageNet example; its last layer is not used. Empty: from scratch. Paper: ImageNet. Of
    # "backbone": an earlier checkpoint, or a bare backbone in Detectron2's names.
    node.WEIGHTS = ""
    # Side of the crops, pixels. Paper: 56, 112 or 224; 112 for all students.
    node.INPUT_SIZE = 112
    # Any of "cross_entropy" and "focal"; both: the joint teacher, one layer with two losses. Paper:
    # cross_entropy for SSD's teacher, both for that of the other detectors.
    node.LOSSES = ("cross_entropy",)
    # Focal loss (sum over the classes, mean over the crops): exponent, weight of the positives and
    # factor before the loss. Ours: RetinaNet's, and 1.
    node.FOCAL_GAMMA = 2.0
    node.FOCAL_ALPHA = 0.25
    node.FOCAL_WEIGHT = 1.0
    # Initial probability of every class, in (0, 1), when there is a focal loss. Ours.
    node.PRIOR_PROB = 0.01

    # "object" (every box once per epoch, cut from the original image), "online" (the student's
    # mapper, then all boxes that survived it), or "folder" (the images of FOLDER, e.g. ImageNet;
    # DATASETS is not read then). Ours.
    node.MODE = "object"
    # Of mode "folder": folders that have a folder of images for each class, whose name is the
    # class; relative to the folder of the data sets. TEST may be empty: no evaluation. Training
    # takes random parts of the images, evaluation their middle.
    node.FOLDER = CN()
    node.FOLDER.TRAIN = ""
    node.FOLDER.TEST = ""
    # Distort every crop of mode "object" as SSD does: for a teacher of SSD. The flip is that of
    # INPUT.RANDOM_FLIP.
    node.PHOTOMETRIC = False
    # Distort every crop of mode "object" geometrically, by torchvision: rotation and shear of up to
    # so many degrees to either side, factors between two, shift of up to a part of the side; and
    # smoothed noise of ALPHA pixels, SIGMA pixels wide (ElasticTransform). For data sets that a
    # classifier would know by heart. Ours; the paper has neither.
    node.AFFINE = CN()
    node.AFFINE.DEGREES = 0.0
    node.AFFINE.SHEAR = 0.0
    node.AFFINE.SCALE = (1.0, 1.0)
    node.AFFINE.TRANSLATE = 0.0
    node.ELASTIC = CN()
    node.ELASTIC.ALPHA = 0.0
    node.ELASTIC.SIGMA = 5.0
    # Mode "online": crops per process that wait to be drawn into a batch. 1024 crops of 112 x 112
    # are 154 MB. Ours.
    node.SHUFFLE_BUFFER = 1024
    # Folder of the indices of crops; empty: crop_index in the folder of the data sets.
    node.INDEX_DIR = ""
    # Folder with the crops as image files (tools/crop_index.py --write-crops); empty: whole images
    # are read.
    node.CROPS_DIR = ""

    # "adam" or "sgd" (Nesterov-free, with MOMENTUM). Ours.
    node.OPTIMIZER = "adam"
    node.MOMENTUM = 0.9
    # Of all weights. Ours.
    node.WEIGHT_DECAY = 1e-4
    # Learning rate; DROP_FACTOR is applied at the beginning of each of these epochs. Paper.
    node.BASE_LR = 1e-4
    node.EPOCHS = 90
    node.DROP_EPOCHS = (50,)
    node.DROP_FACTOR = 0.1
    # Crops per iteration, over all processes. Ours.
    node.BATCH_SIZE = 256
    # Mixed precision, GPU only; SOLVER.AMP.PRECISION says which.
    node.AMP = False
    # Epochs between checkpoints and between evaluations on DATASETS.TEST; both also happen at the
    # end. 0: only there.
    node.CHECKPOINT_EPOCHS = 1
    node.EVAL_EPOCHS = 1

    # Of KD.TEACHER.TYPE "ClassifierTeacher"; its file is KD.TEACHER.WEIGHTS, its classes and
    # normalisation are in there. What is said here must be what the file says.
    cfg.KD.TEACHER.CLASSIFIER = teacher = CN()
    teacher.ARCH = "resnet50"
    teacher.INPUT_SIZE = 112
