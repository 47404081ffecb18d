"""What cannot work is said when the distiller is built: keys, values of both sides, the mend."""

from typing import Collection, Mapping, Sequence, Tuple

from kd_d2 import config
from kd_d2.distillation import KeyInfo

__all__ = [
    "check_head_transfer",
    "check_modes",
    "check_queue",
    "check_same_classes",
    "check_softmax",
    "check_teacher",
    "check_train_on_pred_boxes",
    "check_weight",
    "choice",
    "is_agnostic",
    "paired_stages",
    "preset_weight",
]

Keys = Mapping[str, KeyInfo]

_MODES = {
    "FEAT.LEVEL_ASSIGN": ("all", "fpn"),
    "SGFI.ROIS": ("positive", "all"),
    "CKD.QUEUE_DTYPE": ("float32", "float16"),
    "CKD.PROJ": ("linear", "mlp"),
    "CKD.ROIS": ("positive", "all"),
    "CKD.DENSE_BRANCH": ("cls", "loc", "sum"),
    "HETERO_PRED.CLS": ("off", "max_norm", "bce"),
    "HETERO_PRED.REG": ("off", "l1"),
}
# family of the student -> key that bounds its RoIs of an image
_ROIS_PER_IMAGE = {
    "two_stage": "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE",
    "dense": "KD.GDETKD.DENSE.NUM_SAMPLES",
}


# ------------------------------------------------------------------------------ single values
def choice(key: str, value: str, known: Collection[str]) -> str:
    """Return ``value``, one of ``known``.

    Raises:
        ValueError: it is none of them.
    """
    return config.choice(f"KD.GDETKD.{key}", value, known)


def check_weight(key: str, value: float) -> None:
    """Raise ``ValueError`` for a negative weight, or NaN."""
    if not value >= 0:
        raise ValueError(f"KD.GDETKD.{key} must be at least 0, got {value}")


def preset_weight(key: str, value: float, preset: float) -> float:
    """Return ``value``, or ``preset`` for -1.0.

    Raises:
        ValueError: another negative number.
    """
    if value == -1:
        return preset
    if not value >= 0:
        raise ValueError(f"KD.GDETKD.{key} must be -1.0 (preset) or at least 0, got {value}")
    return value


def check_modes(node) -> None:
    """Raise ``ValueError`` for an unknown name in ``KD.GDETKD``, used or not."""
    for key, known in _MODES.items():
        group, name = key.split(".")
        choice(key, node[group][name], known)


# ------------------------------------------------------------------------------- the networks
def check_teacher(teacher_keys: Keys) -> None:
    """Raise ``ValueError`` unless the teacher has two stages."""
    if "roi.cls" not in teacher_keys:
        raise ValueError(
            "GDetKD needs a two-stage teacher, whose RoI head sees the student's boxes; that of "
            "KD.TEACHER.CONFIG_FILE has no 'roi.cls': use Faster R-CNN, Cascade R-CNN or a C4 model"
        )


def check_train_on_pred_boxes(cfg) -> None:
    """Raise ``ValueError`` if the student overwrites the boxes that it sampled."""
    if cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES:
        raise ValueError(
            "MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES is True for the student: its sampled boxes are "
            "then overwritten, and the teacher would see others than the student's head did; set "
            "it to False"
        )


def is_agnostic(keys: Keys) -> bool:
    """Whether the RoI head predicts one box for all classes."""
    return keys["roi.box"].channels == 4


def check_same_classes(what: str, student_keys: Keys, teacher_keys: Keys) -> None:
    """Raise ``ValueError`` if the numbers of classes differ.

    The trainer compares the names and their order.
    """
    ours, theirs = (keys["roi.cls"].channels - 1 for keys in (student_keys, teacher_keys))
    if ours != theirs:
        raise ValueError(
            f"KD.GDETKD.{what} compare predictions of classes, but MODEL.ROI_HEADS.NUM_CLASSES is "
            f"{ours} in the student and {theirs} in the teacher; train both on the same classes, "
            'or set CLS.WEIGHT to 0.0 and REG.MODE to "off"'
        )


def check_softmax(what: str, student_keys: Keys, teacher_keys: Keys) -> None:
    """Raise ``ValueError`` if the logits of a side are not those of a softmax with background."""
    for side, keys in (("student", student_keys), ("teacher", teacher_keys)):
        if "roi.cls" in keys and "use_sigmoid_ce" in keys["roi.cls"].signature:
            raise ValueError(
                f"KD.GDETKD.{what} read a softmax over classes and background, but "
                f"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE is True for the {side}; use a model trained "
                'with False, or set CLS.WEIGHT to 0.0 and REG.MODE to "off"'
            )


def paired_stages(student_stages: int, teacher_keys: Keys, teacher_stage: int) -> Tuple[int, ...]:
    """Return the teacher's stage for each of the student's.

    Raises:
        ValueError: two cascades of different length, or a stage that the teacher does not have.
    """
    theirs = sum(1 for key in teacher_keys if key.startswith("roi.embed["))
    if not 0 <= teacher_stage < theirs:
        raise ValueError(
            f"KD.GDETKD.TEACHER_STAGE must lie in 0..{theirs - 1}, the stages of the teacher's RoI "
            f"head, got {teacher_stage}"
        )
    if student_stages == theirs > 1:
        return tuple(range(theirs))
    if student_stages > 1 and theirs > 1:
        raise ValueError(
            f"stages of cascades are compared one by one, but the student has {student_stages} "
            f"and the teacher {theirs} (MODEL.ROI_BOX_CASCADE_HEAD.IOUS); give both as many, or "
            "take a student or teacher without cascade"
        )
    return (teacher_stage,) * student_stages


# -------------------------------------------------------------------------------------- terms
def check_queue(cfg, family: str, rois_per_image: int) -> None:
    """Raise ``ValueError`` if a batch of all ranks does not fit into the queue."""
    size, images = cfg.KD.GDETKD.CKD.QUEUE_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if size < images * rois_per_image:
        raise ValueError(
            f"KD.GDETKD.CKD.QUEUE_SIZE is {size}, less than the RoIs of one batch, "
            f"SOLVER.IMS_PER_BATCH * {_ROIS_PER_IMAGE[family]} = {images} * {rois_per_image} = "
            f"{images * rois_per_image}; make it at least that"
        )


def check_head_transfer(prefixes: Sequence[str], family: str) -> None:
    """Raise ``ValueError`` if parts of an RPN or a RoI head shall be copied to a dense student.

    Whether the heads of two-stage detectors fit is checked where the weights are copied.

    Args:
        prefixes: KD.INIT_STUDENT.PREFIXES.
    """
    heads = tuple(p for p in prefixes if p.startswith(("proposal_generator", "roi_heads")))
    if heads and family == "dense":
        raise ValueError(
            f"KD.INIT_STUDENT.PREFIXES {heads} copy the teacher's RPN and RoI head, which a dense "
            "student does not have; set PREFIXES to ()"
        )
