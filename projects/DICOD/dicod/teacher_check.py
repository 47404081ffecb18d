"""A classifier that knows nothing of the student's crops is noticed early."""

import logging

__all__ = ["TeacherCheck"]

logger = logging.getLogger(__name__)


class TeacherCheck:
    """Warns once if the classifier is right about the first steps' crops no more than by chance.

    Wrong normalisation, order of channels or order of classes are the usual reasons. Nothing is
    stored: a resumed run looks at its own first steps.
    """

    def __init__(self, num_classes: int, steps: int = 50):
        """
        Args:
            num_classes: C; of one class there is no chance to speak of, nor a warning.
            steps: number of steps with ground truth that are looked at.
        """
        self._num_classes = num_classes
        self._steps = steps
        self._seen_steps = self._right = self._total = 0

    def __call__(self, right: int, total: int) -> None:
        """
        Args:
            right: crops of ground-truth boxes whose largest logit is that of their class.
            total: crops of this step, at least 1.
        """
        if self._num_classes == 1 or self._seen_steps == self._steps:
            return
        self._seen_steps += 1
        self._right, self._total = self._right + right, self._total + total
        if self._seen_steps < self._steps:
            return
        chance = 1 / self._num_classes
        # two standard deviations of that many guesses
        bound = chance + 2 * (chance * (1 - chance) / self._total) ** 0.5
        if self._right <= bound * self._total:
            logger.warning(
                f"DICOD: in {self._steps} steps the classifier was right about "
                f"{100 * self._right / self._total:.1f}% of {self._total} crops of ground-truth "
                f"boxes, no better than chance ({100 * chance:.1f}%); check the normalisation, the "
                "order of channels and the order of classes of KD.TEACHER.WEIGHTS, and whether it "
                "was trained on such objects"
            )
