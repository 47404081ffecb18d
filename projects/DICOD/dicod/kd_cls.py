"""Distillation of the classification: the student's classes against the classifier's (Sec. 3.1)."""

import math

from detectron2.utils.registry import Registry
from torch import Tensor
from torch.nn import functional as F

from kd_d2.losses.precision import full_precision

__all__ = ["CLS_MODES", "BinaryKL", "ClsMode", "ForegroundSoftmaxKL", "SigmoidL1KL", "SoftmaxKL"]

CLS_MODES = Registry("DICOD_CLS_MODES")
CLS_MODES.__doc__ = """
Losses between class logits of a student and a classifier, names for KD.DICOD.CLS.MODE.
"""


class ClsMode:
    """Interface of the losses: fp32 (fp64 stays), one value a positive, targets are constants.

    Attributes:
        scores: the student's scores that it is for, "softmax" (over K + 1 classes, the background
            last) or "sigmoid" (K classes).
        temperature: T.
    """

    scores: str

    def __init__(self, temperature: float = 2.0):
        """
        Args:
            temperature: T > 0, of both sides; T^2 keeps the gradient's size as it grows.

        Raises:
            ValueError: it is not.
        """
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"KD.DICOD.CLS.T must be positive and finite, got {temperature}; the paper's is 2"
            )
        self.temperature = temperature

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """
        Args:
            student_logits: (P, K + 1) or (P, K), see ``scores``.
            teacher_logits: (P, K), of the crop of each positive's ground-truth box.

        Returns:
            (P,)
        """
        student = full_precision(student_logits) / self.temperature
        teacher = full_precision(teacher_logits.detach()) / self.temperature
        return self.temperature**2 * self.divergence(student, teacher)

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return (P,) for logits that are divided by T already."""
        raise NotImplementedError


@CLS_MODES.register()
class SoftmaxKL(ClsMode):
    """T^2 KL(p_t || p_s), softmaxes over K and over K + 1 classes (eqs. 2 to 4).

    The teacher knows no background: a positive has background probability 0, and the student's
    background enters through its normaliser only. With equal K logits -T^2 ln(1 - p_background)
    remains. z_t = (3, 1, 0), z_s = (2, 0, -1 | 1): 1.2918794 at T = 2.
    """

    scores = "softmax"

    def divergence(self, student, teacher):
        ours, theirs = student.log_softmax(dim=1)[:, :-1], teacher.log_softmax(dim=1)
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)


@CLS_MODES.register()
class ForegroundSoftmaxKL(ClsMode):
    """T^2 KL(p_t || p_s), softmaxes over the K classes of both sides. Ours, not in the paper.

    Says nothing of the background, where :class:`SoftmaxKL` pushes it to probability 0 on every
    positive, however badly its box lies. z_t = (3, 1, 0), z_s = (1, 2, 0 | 1): 0.9152826 at T = 2.
    """

    scores = "softmax"

    def divergence(self, student, teacher):
        ours, theirs = student[:, :-1].log_softmax(dim=1), teacher.log_softmax(dim=1)
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)


@CLS_MODES.register()
class BinaryKL(ClsMode):
    """T^2 / K times the sum over the classes of KL(Bernoulli(p_t) || Bernoulli(p_s)), sigmoids
    (eqs. 5 to 7).

    z_t = (3, 1, 0), z_s = (2, 0, -1): 0.1091538 at T = 2.
    """

    scores = "sigmoid"

    def divergence(self, student, teacher):
        pairs = (
            (F.logsigmoid(sign * student), F.logsigmoid(sign * teacher)) for sign in (1.0, -1.0)
        )
        terms = sum(F.kl_div(a, b, reduction="none", log_target=True) for a, b in pairs)
        return terms.mean(dim=1)


@CLS_MODES.register()
class SigmoidL1KL(ClsMode):
    """T^2 KL between the sigmoids divided by their sum; published code, not in the paper.

    Blind to a common factor of a side's probabilities. z_t = (3, 1, 0), z_s = (2, 0, -1):
    0.0099431 at T = 2.
    """

    scores = "sigmoid"

    def divergence(self, student, teacher):
        # the softmax of log p is p over its sum
        ours, theirs = (F.logsigmoid(x).log_softmax(dim=1) for x in (student, teacher))
        return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=1)
