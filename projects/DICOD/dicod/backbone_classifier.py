"""A detector's backbone as a classifier of images, to give it the weights that it starts from."""

from typing import Any, Sequence

from detectron2.config import configurable
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling.backbone.resnet import ResNet, build_resnet_backbone
from torch import Tensor, nn

from kd_d2.config import choice

from .classifier import ARCHITECTURES, CropClassifier
from .image_classifier import ImageClassifier

__all__ = ["BACKBONE", "BackboneClassifier", "build_classifier"]

# CROP_CLASSIFIER.ARCH of this class.
BACKBONE = "backbone"


class BackboneClassifier(ImageClassifier, ResNet):
    """Detectron2's ResNet of any MODEL.RESNETS with a layer of class logits, "linear".

    For networks that have no public weights, such as ResNet-50 of quarter width. The other layers
    have the names of a bare backbone's: ``tools/convert_weights.py --source detectron2`` makes
    MODEL.WEIGHTS of a checkpoint.
    """

    first_weight, last_layer = "stem.conv1.weight", "linear"

    @configurable
    def __init__(self, *, backbone: ResNet, classes: Sequence[str], **facts: Any):
        """
        Args:
            backbone: with all stages; its layers become those of the classifier.
            classes: class names.
            facts: the other arguments of :meth:`ImageClassifier.set_facts`.

        Raises:
            ValueError: it has batch norms that do not normalise.
        """
        if any(isinstance(module, FrozenBatchNorm2d) for module in backbone.modules()):
            raise ValueError(
                "MODEL.RESNETS.NORM is 'FrozenBN', whose statistics are not those of the data: a "
                "backbone is trained with BN (or SyncBN), and the detector freezes it"
            )
        stages = [list(stage) for stage in backbone.stages]
        super().__init__(backbone.stem, stages, num_classes=len(classes))
        nn.init.zeros_(self.linear.bias)
        self.set_facts(arch=BACKBONE, classes=classes, **facts)

    @classmethod
    def from_config(cls, cfg, classes: Sequence[str]):
        whole = cfg.clone()
        whole.defrost()
        whole.MODEL.RESNETS.OUT_FEATURES = ["res5"]  # stages behind the last output are left out
        whole.MODEL.BACKBONE.FREEZE_AT = 0
        return {
            "backbone": build_resnet_backbone(whole, ShapeSpec(channels=3)),
            "classes": classes,
            **cls.facts_from_config(cfg),
        }

    def logits(self, crops: Tensor) -> Tensor:
        """Return (N, C) for normalised images (N, 3, S, S)."""
        return ResNet.forward(self, crops)["linear"]


_CLASSIFIERS = {**dict.fromkeys(ARCHITECTURES, CropClassifier), BACKBONE: BackboneClassifier}


def build_classifier(cfg, classes: Sequence[str]) -> ImageClassifier:
    """Return the classifier that ``CROP_CLASSIFIER`` describes, on the CPU.

    Raises:
        ValueError: unknown architecture or loss.
    """
    name = cfg.CROP_CLASSIFIER.ARCH
    return _CLASSIFIERS[choice("CROP_CLASSIFIER.ARCH", name, _CLASSIFIERS)](cfg, classes)
