"""Training and evaluation: trainer, hooks, optimizer, exact resume and the entry points."""

from .hooks import TeacherEvaluation
from .launch import launch
from .trainer import KDTrainer

__all__ = ["KDTrainer", "TeacherEvaluation", "launch"]
