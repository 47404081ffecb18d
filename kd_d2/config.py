"""Every configuration key that the library adds to Detectron2's, with its meaning.

Defaults reproduce plain Detectron2: a config without any of these keys trains as it always did.
Projects add their own nodes below ``KD`` in their own ``config.py``.
"""

from typing import Collection

from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg as _get_d2_cfg
from detectron2.utils.registry import Registry

from kd_d2.modeling.config import add_modeling_config

__all__ = [
    "CONFIG_NODES",
    "CONFIG_RESOLVERS",
    "add_kd_config",
    "add_schedule_config",
    "choice",
    "get_cfg",
]

CONFIG_NODES = Registry("CONFIG_NODES")
CONFIG_NODES.__doc__ = """
Functions ``add_xyz_config(cfg)`` of projects and user modules, each adding its own nodes to the
default config. Importing the module registers the function; :func:`get_cfg` calls all of them.
"""

CONFIG_RESOLVERS = Registry("CONFIG_RESOLVERS")
CONFIG_RESOLVERS.__doc__ = """
Functions ``resolve_xyz(cfg)`` that write out what a finished config only refers to, so that the
copy of it beside the results stands for itself. ``kd_d2.engine.main.build_config`` calls all of
them; whoever builds a model from a config must not depend on that.
"""


def choice(key: str, value: str, known: Collection[str]) -> str:
    """Return ``value``, one of ``known``.

    Args:
        key: config key, for the message.

    Raises:
        ValueError: it is none of them.
    """
    if value not in known:
        raise ValueError(f"{key} must be one of {sorted(known)}, got '{value}'")
    return value


def add_schedule_config(node: CN) -> None:
    """Add ``SCHEDULE`` to a distiller's node; see :mod:`kd_d2.distillation.schedule`."""
    node.SCHEDULE = CN()
    # First iteration (0-based) at which the distiller is active.
    node.SCHEDULE.START_ITER = 0
    # First iteration at which it no longer is; -1: active until SOLVER.MAX_ITER.
    node.SCHEDULE.END_ITER = -1
    # The factor grows linearly from 0 to 1 over this many iterations after START_ITER.
    node.SCHEDULE.WARMUP_ITERS = 0
    # Decay of the factor between the end of the warm-up and END_ITER (or SOLVER.MAX_ITER):
    # "none" (1 throughout), "linear" (1 -> 0), "cosine" (1 -> 0, half a period) or "updown" (1 -> 2
    # over the first quarter, then linearly to 0; DeFeat's official code, by epochs there).
    node.SCHEDULE.DECAY = "none"


def add_kd_config(cfg: CN) -> None:
    """Add the nodes of the library (mechanism, detectors, baselines, data) to ``cfg``."""
    add_modeling_config(cfg)
    _add_solver_and_data(cfg)
    _add_evaluation(cfg)

    cfg.KD = CN()
    # False: plain Detectron2 training of the same YAML, no teacher is built or read.
    cfg.KD.ENABLED = False
    # Names in DISTILLER_REGISTRY, e.g. ("CrossKD", "PKD"). Each reads its own node KD.<NAME>.
    cfg.KD.DISTILLERS = ()
    # Python modules imported before the config is read, so that they can register classes and
    # their config nodes (CONFIG_NODES). Dotted names, or paths of .py files relative to the
    # config file.
    cfg.KD.IMPORTS = ()

    cfg.KD.TEACHER = CN()
    # Name in TEACHER_REGISTRY.
    cfg.KD.TEACHER.TYPE = "DetectorTeacher"
    # The teacher's own config, relative to the file given by --config-file; merged into a fresh
    # default config, so nothing of the student's leaks into the teacher.
    cfg.KD.TEACHER.CONFIG_FILE = ""
    # Checkpoint of the teacher. Empty is an error when a distiller needs a teacher.
    cfg.KD.TEACHER.WEIGHTS = ""
    # Key-value pairs merged last into the teacher's config.
    cfg.KD.TEACHER.OPTS = ()
    # Go on although keys of the teacher are missing from its checkpoint, unexpected or of
    # another shape. Whatever is missing stays at its random initialisation.
    cfg.KD.TEACHER.ALLOW_KEY_MISMATCH = False
    # Go on although the teacher's class names or their order differ from the student's.
    cfg.KD.TEACHER.ALLOW_CLASS_MISMATCH = False
    # Go on with an empty WEIGHTS, i.e. with a randomly initialised teacher.
    cfg.KD.TEACHER.ALLOW_UNTRAINED = False
    # Multiply the teacher's frozen batch norms into the convs before them: the same outputs up to
    # rounding, in less time. What INIT_STUDENT copies stays as in the file, bit by bit.
    cfg.KD.TEACHER.FUSE_BN = True
    # Keep the teacher's weights, hence its feature maps, in torch.channels_last: faster
    # convolutions, the same values up to rounding.
    cfg.KD.TEACHER.CHANNELS_LAST = True
    # Precision of the teacher's convolutions and matrix products: "float32", "bfloat16" or
    # "float16"; "": that of the student's step, i.e. float32, or SOLVER.AMP's.
    # What the distillers get is float32 again unless the step is under AMP.
    cfg.KD.TEACHER.DTYPE = ""
    # Backend of torch.compile for the teacher's bottom-up network, e.g. "inductor", which needs a
    # C++ compiler (CPU) or Triton (GPU) and a minute or two at the first step; "": not compiled.
    cfg.KD.TEACHER.COMPILE = ""

    cfg.KD.INIT_STUDENT = CN()
    # Parameters and buffers whose name starts with one of these prefixes are copied from the
    # teacher after MODEL.WEIGHTS was loaded ("inheriting"). Not on --resume. Both sides must have
    # the same names and shapes below them, and for heads the same anchors, box weights, RoI
    # pooling and classes. ("proposal_generator.rpn_head", "roi_heads") is G-DetKD's head
    # transfer; mask and keypoint heads only come along when a prefix names them.
    cfg.KD.INIT_STUDENT.PREFIXES = ()
    # The copied parameters are not trained. On --resume they must still be the teacher's.
    cfg.KD.INIT_STUDENT.FREEZE = False

    # Multiplies SOLVER.BASE_LR for the parameters of distillers (adapters, projections).
    cfg.KD.ADAPTER_LR_FACTOR = 1.0
    # find_unused_parameters of DistributedDataParallel; only elastic super-networks need True.
    cfg.KD.DDP_FIND_UNUSED = False
    # Evaluate the teacher on DATASETS.TEST before training: "never", "sample" or "full".
    cfg.KD.EVAL_TEACHER = "never"
    # Number of images of each data set that "sample" looks at.
    cfg.KD.EVAL_TEACHER_IMAGES = 100
    # Every so many iterations log |d L_kd / d pyramid| / |d L_det / d pyramid| and the cosine of
    # both gradients per distiller and term, at the cost of extra backward passes. 0: never. Before
    # training: tools/calibrate_kd.py.
    cfg.KD.GRAD_RATIO_PERIOD = 0
    # Stop on all ranks when a distillation term is NaN or infinite, naming it.
    cfg.KD.CHECK_FINITE = True
    # Warn once when an active term has been exactly 0 for this many iterations in a row. 0: never.
    cfg.KD.ZERO_WARNING_ITERS = 50
    # Load checkpoints with full pickle and YAML with arbitrary Python tags. Only for files whose
    # origin you trust as much as a program you run.
    cfg.KD.ALLOW_UNSAFE_LOAD = False


def _add_solver_and_data(cfg: CN) -> None:
    # Clip the gradient norm over all parameters together instead of each parameter by itself
    # (Detectron2's behaviour). Applies when SOLVER.CLIP_GRADIENTS.ENABLED and CLIP_TYPE "norm".
    cfg.SOLVER.CLIP_GRADIENTS.FULL_MODEL = False
    # Type of the autocast region when SOLVER.AMP.ENABLED: "float16" or "bfloat16".
    cfg.SOLVER.AMP.PRECISION = "float16"
    # What a training image that cannot be read or mapped does: "skip" takes another image,
    # counts and warns; "stop" raises.
    cfg.DATALOADER.BAD_IMAGE = "skip"
    # With "skip", stop all the same once this fraction of the requested images was bad.
    cfg.DATALOADER.MAX_BAD_FRACTION = 0.1
    # Name in MAPPER_REGISTRY: "DatasetMapper" (Detectron2's), "SSDMapper", which stretches every
    # image to MODEL.SSD.INPUT_SIZE in float32, or "RandomResolutionMapper".
    cfg.INPUT.MAPPER = "DatasetMapper"
    # Nominal sizes in pixels of which RandomResolutionMapper draws one for every training image,
    # the aspect ratio being kept; batches have one size. Joint-DetNAS' (A.1.3).
    cfg.INPUT.RESOLUTIONS = ((512, 512), (800, 600), (1080, 720), (1333, 800))
    # Augmentation of SSDMapper in training, besides INPUT.RANDOM_FLIP; ranges are those of
    # mmdetection's and DICOD's SSD, see kd_d2.data.photometric and kd_d2.data.ssd_augmentation.
    cfg.INPUT.SSD_AUG = CN()
    # Brightness, contrast, saturation, hue and order of channels, each with probability 1/2.
    cfg.INPUT.SSD_AUG.PHOTOMETRIC = True
    # Probability that the image is put on a larger canvas; DICOD's code: 0.5, its supplement
    # reads as 1.
    cfg.INPUT.SSD_AUG.EXPAND_PROB = 0.5
    # Largest ratio of the canvas' sides to the image's, at least 1. Published: 4.
    cfg.INPUT.SSD_AUG.EXPAND_RATIO = 4.0
    # Crop a patch with a random least IoU with all boxes.
    cfg.INPUT.SSD_AUG.CROP = True
    # Embedded data set "digit-scenes"; see kd_d2.data.digit_scenes.
    cfg.DATASETS.DIGIT_SCENES = CN()
    cfg.DATASETS.DIGIT_SCENES.NUM_TRAIN = 1500
    cfg.DATASETS.DIGIT_SCENES.NUM_VAL = 300
    # Side of the square scenes, pixels.
    cfg.DATASETS.DIGIT_SCENES.IMAGE_SIZE = 128
    # Smallest and largest side of a pasted digit, pixels.
    cfg.DATASETS.DIGIT_SCENES.DIGIT_SIZE = (20, 64)
    # Fewest and most digits of a scene.
    cfg.DATASETS.DIGIT_SCENES.DIGITS_PER_IMAGE = (1, 6)
    # Largest rotation of a digit to either side, degrees.
    cfg.DATASETS.DIGIT_SCENES.ROTATION = 20
    # Largest part of a digit that others or the border of the image hide, percent of its pixels.
    cfg.DATASETS.DIGIT_SCENES.MAX_OCCLUSION = 20
    # Range of the brightest channel of a digit's colour, 0 to 255.
    cfg.DATASETS.DIGIT_SCENES.BRIGHTNESS = (170, 255)
    # Range of the distance of the darkest channel from the brightest, percent of the latter.
    cfg.DATASETS.DIGIT_SCENES.SATURATION = (0, 60)
    # Range of the factor by which the photographs behind the digits are darkened, percent.
    cfg.DATASETS.DIGIT_SCENES.BACKGROUND = (15, 50)
    # Another seed gives other scenes of the same digits.
    cfg.DATASETS.DIGIT_SCENES.SEED = 0


def _add_evaluation(cfg: CN) -> None:
    # Error types (TIDE) beside AP, for data sets that are evaluated as COCO; see
    # kd_d2.evaluation.tide. Metrics: "tide/Cls" etc., AP points, means over the thresholds, and
    # "tide/Cls-50" etc. at each of them.
    cfg.TEST.TIDE = CN()
    cfg.TEST.TIDE.ENABLED = False
    # Ascending IoUs that make a true positive, above 0.1 (the background's) and below 1.
    cfg.TEST.TIDE.THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)


def get_cfg() -> CN:
    """Detectron2's default config with the nodes of this library and of imported projects."""
    cfg = _get_d2_cfg()
    add_kd_config(cfg)
    for _, add_nodes in CONFIG_NODES:
        add_nodes(cfg)
    return cfg
