"""The distillation mechanism: recorder, taps, teachers, distillers and the model around them."""

from . import dense_tap, rcnn_tap, ssd_tap  # noqa: F401  (register their taps)
from .context import DistillationContext, StudentView
from .distiller import (
    DISTILLER_REGISTRY,
    Distiller,
    build_distillers,
    require_equal,
    sigmoid_classes,
    teacher_wanted,
)
from .gradients import Gradient, compare_gradients, gradient_norms
from .method_info import MethodInfo
from .model import KDModel
from .recorder import ModuleRecorder, RecordedCall
from .schedule import LossSchedule
from .taps import KD_TAPS, Assignment, Key, KeyInfo, Tap, TapStore, build_tap
from .teacher import TEACHER_REGISTRY, DetectorTeacher, Teacher, TeacherRun, build_teacher, freeze

__all__ = [
    "DISTILLER_REGISTRY",
    "KD_TAPS",
    "TEACHER_REGISTRY",
    "Assignment",
    "DetectorTeacher",
    "DistillationContext",
    "Distiller",
    "Gradient",
    "KDModel",
    "Key",
    "KeyInfo",
    "LossSchedule",
    "MethodInfo",
    "ModuleRecorder",
    "RecordedCall",
    "StudentView",
    "Tap",
    "TapStore",
    "Teacher",
    "TeacherRun",
    "build_distillers",
    "build_tap",
    "build_teacher",
    "compare_gradients",
    "freeze",
    "gradient_norms",
    "require_equal",
    "sigmoid_classes",
    "teacher_wanted",
]
