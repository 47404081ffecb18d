"""A frozen crop classifier as teacher of detectors."""

import logging
from typing import Any, Dict, Iterable, List, Mapping, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor

from kd_d2.checkpoint import compare, file_sha256, load_checkpoint_file
from kd_d2.data import dataset_classes
from kd_d2.distillation import TEACHER_REGISTRY, KeyInfo, Teacher
from kd_d2.distillation.teacher import freeze
from kd_d2.modeling.convert import unwrap_state_dict

from .backbone_classifier import BACKBONE
from .classifier import STAGES, CropClassifier
from .image_classifier import ClassLosses, ImageClassifier

__all__ = ["ClassifierTeacher", "fill_classifier", "load_classifier", "read_metadata"]

logger = logging.getLogger(__name__)

_FACTS = ("arch", "classes", "pixel_mean", "pixel_std", "format", "input_size", "losses")


def read_metadata(checkpoint: Mapping[str, Any], path: str) -> Dict[str, Any]:
    """The facts about a classifier that stand in its checkpoint as ``run_info``.

    Raises:
        ValueError: some are missing.
    """
    facts = checkpoint.get("run_info") if isinstance(checkpoint, Mapping) else None
    missing = [name for name in _FACTS if name not in (facts or {})]
    if missing:
        raise ValueError(
            f"{path} does not say {', '.join(missing)} of its classifier, which distillation has "
            "to know; tools/convert_classifier.py writes them into files of other programs."
        )
    return {name: facts[name] for name in _FACTS}


def load_classifier(
    path: str, *, allow_unsafe: bool = False, allow_key_mismatch: bool = False
) -> CropClassifier:
    """Return the classifier that ``train_classifier.py`` stored in ``path``, on the CPU.

    Args:
        path: checkpoint.
        allow_unsafe: KD.ALLOW_UNSAFE_LOAD.
        allow_key_mismatch: go on although keys differ; KD.TEACHER.ALLOW_KEY_MISMATCH.

    Raises:
        ValueError: no such file, facts are missing, or keys are missing, unexpected or of another
            shape; the message lists all of them.
    """
    checkpoint = load_checkpoint_file(path, allow_unsafe)
    facts = read_metadata(checkpoint, path)
    if facts["arch"] == BACKBONE:
        raise ValueError(
            f"{path} holds a detector's backbone that was trained as a classifier, not a "
            "classifier that could teach; tools/convert_weights.py --source detectron2 makes "
            "MODEL.WEIGHTS of it"
        )
    model = CropClassifier(
        arch=facts["arch"],
        classes=facts["classes"],
        pixel_mean=facts["pixel_mean"],
        pixel_std=facts["pixel_std"],
        image_format=facts["format"],
        input_size=facts["input_size"],
        losses=ClassLosses(names=facts["losses"]),
    )
    fill_classifier(model, checkpoint, path, allow_key_mismatch)
    return model


def fill_classifier(
    model: ImageClassifier,
    checkpoint: Mapping[str, Any],
    path: str,
    allow_key_mismatch: bool = False,
) -> None:
    """Load the weights of a checkpoint into ``model``.

    Args:
        model: is changed in place.
        checkpoint: content of the file.
        path: its name, for messages.
        allow_key_mismatch: go on although keys differ.

    Raises:
        ValueError: keys are missing, unexpected or of another shape; the message lists all.
    """
    state = unwrap_state_dict(checkpoint)
    report = compare(state, model)
    if not report.ok:
        message = f"the classifier in {path} is no {model.arch}:\n{report.format()}"
        if not allow_key_mismatch:
            raise ValueError(
                f"{message}\nSet KD.TEACHER.ALLOW_KEY_MISMATCH True to go on all the same."
            )
        logger.warning(f"{message}\nGoing on because KD.TEACHER.ALLOW_KEY_MISMATCH is True.")
        misshaped = {key for key, _, _ in report.mismatched}
        state = {key: value for key, value in state.items() if key not in misshaped}
    model.load_state_dict(state, strict=False)


@TEACHER_REGISTRY.register()
class ClassifierTeacher(Teacher):
    """A frozen classifier of crops; it sees crops of the student's normalised images.

    Its keys say what it can make of crops: ``crops.logits`` (channels: C; signature: side of the
    crops) and one for each of its layers, ``crops.stem`` etc. Values come from :meth:`logits` and
    :meth:`features`.

    Attributes:
        model: the classifier.
        classes: its class names in order.
        input_size: side of the crops that :meth:`logits` takes.
    """

    @configurable
    def __init__(
        self,
        *,
        model: CropClassifier,
        student_mean: Sequence[float],
        student_std: Sequence[float],
        student_format: str,
        description: str = "",
        channels_last: bool = False,
    ):
        """
        Args:
            model: the loaded classifier; is frozen here.
            student_mean, student_std: normalisation of the student's images, in the order of
                ``student_format``.
            student_format: order of the student's channels.
            description: for the log.
            channels_last: keep the weights in that memory format.

        Raises:
            ValueError: the formats differ by more than the order of R and B.
        """
        if sorted(student_format) != sorted(model.image_format):
            raise ValueError(
                f"the classifier's format '{model.image_format}' cannot be made from the "
                f"student's INPUT.FORMAT '{student_format}'"
            )
        self.model = freeze(model)
        if channels_last:
            model.to(memory_format=torch.channels_last)
        self.classes: List[str] = list(model.classes)
        self.input_size = model.input_size
        self.keys = {
            "crops.logits": KeyInfo(model.num_classes, (), (model.input_size,)),
            **{f"crops.{stage}": KeyInfo(*facts) for stage, facts in model.stages().items()},
        }
        self._description = description
        self._flip_channels = student_format != model.image_format
        mean, std = (
            torch.tensor(values, dtype=torch.float32).view(-1, 1, 1).to(model.device)
            for values in (student_mean, student_std)
        )
        if self._flip_channels:
            mean, std = mean.flip(0), std.flip(0)
        self._scale = std / model.pixel_std
        self._shift = (mean - model.pixel_mean) / model.pixel_std
        self._same = torch.equal(mean, model.pixel_mean) and torch.equal(std, model.pixel_std)

    @classmethod
    def from_config(cls, cfg):
        node = cfg.KD.TEACHER
        if node.WEIGHTS:
            model = load_classifier(
                node.WEIGHTS,
                allow_unsafe=cfg.KD.ALLOW_UNSAFE_LOAD,
                allow_key_mismatch=node.ALLOW_KEY_MISMATCH,
            )
            digest = f"sha256 {file_sha256(node.WEIGHTS)}"
        elif node.ALLOW_UNTRAINED:
            model, digest = cls._untrained(cfg), "random initialisation"
        else:
            raise ValueError(
                "KD.TEACHER.WEIGHTS is empty, so the classifier would be randomly initialised; "
                "give a checkpoint of train_classifier.py, or set KD.TEACHER.ALLOW_UNTRAINED True "
                "if that is intended"
            )
        for key, found in (("ARCH", model.arch), ("INPUT_SIZE", model.input_size)):
            if node.CLASSIFIER[key] != found:
                raise ValueError(
                    f"KD.TEACHER.CLASSIFIER.{key} is {node.CLASSIFIER[key]}, but {node.WEIGHTS} "
                    f"holds a classifier with {found}; use another file or set the key to {found}"
                )
        facts = model.metadata()
        return {
            "model": model.to(torch.device(cfg.MODEL.DEVICE)),
            "student_mean": cfg.MODEL.PIXEL_MEAN,
            "student_std": cfg.MODEL.PIXEL_STD,
            "student_format": cfg.INPUT.FORMAT,
            "description": (
                f"{model.arch} of crops of {model.input_size} pixels, trained with "
                f"{' and '.join(facts['losses'])}, weights {node.WEIGHTS or '(none)'} ({digest})"
            ),
            "channels_last": node.CHANNELS_LAST,
        }

    @staticmethod
    def _untrained(cfg) -> CropClassifier:
        node = cfg.KD.TEACHER.CLASSIFIER
        return CropClassifier(
            arch=node.ARCH,
            classes=dataset_classes(cfg.DATASETS.TRAIN[0]),
            pixel_mean=cfg.MODEL.PIXEL_MEAN,
            pixel_std=cfg.MODEL.PIXEL_STD,
            image_format=cfg.INPUT.FORMAT,
            input_size=node.INPUT_SIZE,
            losses=ClassLosses(names=["cross_entropy"]),
        )

    def start(self, batched_inputs, padded_size, needs, gt_instances=None):
        """Return the teacher itself: it holds nothing of a batch, and runs on crops only."""
        return self

    def normalise(self, crops: Tensor) -> Tensor:
        """Return crops in the classifier's normalisation and order of channels.

        Differentiable; the very same tensor if both sides agree.

        Args:
            crops: (N, 3, S, S) in the student's.
        """
        if self._flip_channels:
            crops = crops.flip(1)
        return crops if self._same else crops * self._scale + self._shift

    @torch.no_grad()
    def logits(self, crops: Tensor) -> Tensor:
        """Return class logits (N, C) without a graph.

        Args:
            crops: (N, 3, S, S) in the student's normalisation, S = ``input_size``.

        Raises:
            ValueError: crops of another size.
        """
        size = (self.input_size, self.input_size)
        if tuple(crops.shape[-2:]) != size:
            raise ValueError(
                f"the classifier takes crops of {size[0]}x{size[1]} pixels, got "
                f"{crops.shape[-2]}x{crops.shape[-1]}; crop to KD.TEACHER.CLASSIFIER.INPUT_SIZE"
            )
        return self.model.logits(self.normalise(crops))

    def features(self, crops: Tensor, layers: Iterable[str] = STAGES[:1]) -> Dict[str, Tensor]:
        """Return early features of crops of any size, in the caller's gradient mode.

        Gradients reach the crops, through the frozen layers, but no weight. Nothing behind the
        deepest layer is computed.

        Args:
            crops: (N, 3, S, S) in the student's normalisation.
            layers: any of "stem" (after the max-pooling) and "layer1" to "layer4".

        Returns:
            layer -> (N, C, H, W), in the given order.

        Raises:
            ValueError: an unknown layer.
        """
        return self.model.features(self.normalise(crops), layers)

    def describe(self):
        return f"{self._description}; classes: {', '.join(self.classes)}"
