"""The crop classifier: a torchvision ResNet with one layer of class logits."""

from typing import Any, Dict, Iterable, Sequence, Tuple

from detectron2.config import configurable
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from kd_d2.config import choice

from .image_classifier import ImageClassifier

__all__ = ["ARCHITECTURES", "STAGES", "CropClassifier"]

# Arguments of torchvision's ResNet.
ARCHITECTURES: Dict[str, Dict[str, Any]] = {
    "resnet18": {"block": BasicBlock, "layers": [2, 2, 2, 2]},
    "resnet34": {"block": BasicBlock, "layers": [3, 4, 6, 3]},
    "resnet50": {"block": Bottleneck, "layers": [3, 4, 6, 3]},
    "resnext101_32x8d": {
        "block": Bottleneck,
        "layers": [3, 4, 23, 3],
        "groups": 32,
        "width_per_group": 8,
    },
}
# What `features` can return, in the order of the forward pass; "stem" is after the max-pooling
# (DICOD's l0), "layer<i>" its l<i>.
STAGES = ("stem", "layer1", "layer2", "layer3", "layer4")


class CropClassifier(ImageClassifier, ResNet):
    """A torchvision ResNet, and its state dict, that normalises and has losses of its own."""

    first_weight, last_layer = "conv1.weight", "fc"

    @configurable
    def __init__(self, *, arch: str, classes: Sequence[str], **facts: Any):
        """
        Args:
            arch: a key of :data:`ARCHITECTURES`.
            classes: class names.
            facts: the other arguments of :meth:`ImageClassifier.set_facts`.

        Raises:
            ValueError: an unknown architecture.
        """
        choice("CROP_CLASSIFIER.ARCH", arch, ARCHITECTURES)
        super().__init__(num_classes=len(classes), **ARCHITECTURES[arch])
        self.set_facts(arch=arch, classes=classes, **facts)

    @classmethod
    def from_config(cls, cfg, classes: Sequence[str]):
        return {
            "arch": cfg.CROP_CLASSIFIER.ARCH,
            "classes": classes,
            **cls.facts_from_config(cfg),
        }

    def stages(self) -> Dict[str, Tuple[int, Tuple[int, ...]]]:
        """Return stage -> (channels, (stride,)) of what :meth:`features` gives."""
        widths = [self.conv1.out_channels]
        for stage in STAGES[1:]:
            block = getattr(self, stage)[-1]
            widths.append([m for m in block.modules() if isinstance(m, nn.Conv2d)][-1].out_channels)
        return {s: (c, (k,)) for s, c, k in zip(STAGES, widths, (4, 4, 8, 16, 32), strict=True)}

    def logits(self, crops: Tensor) -> Tensor:
        """Return (N, C) for normalised crops (N, 3, S, S)."""
        deepest = STAGES[-1]
        return self.fc(self.avgpool(self.features(crops, [deepest])[deepest]).flatten(1))

    def features(self, crops: Tensor, stages: Iterable[str]) -> Dict[str, Tensor]:
        """Return the named outputs for normalised crops; nothing behind the deepest is computed.

        Args:
            crops: (N, 3, S, S).
            stages: any of :data:`STAGES`.

        Returns:
            stage -> (N, C, H, W), of stride 4, 4, 8, 16, 32, in the given order.

        Raises:
            ValueError: an unknown stage.
        """
        wanted = list(stages)
        unknown = sorted(set(wanted) - set(STAGES))
        if unknown:
            raise ValueError(f"unknown stages {unknown}; a classifier has {list(STAGES)}")
        found: Dict[str, Tensor] = {}
        x = crops
        for stage in STAGES[: max((STAGES.index(name) for name in wanted), default=-1) + 1]:
            x = self._stem(x) if stage == "stem" else getattr(self, stage)(x)
            found[stage] = x
        return {stage: found[stage] for stage in wanted}

    def _stem(self, x: Tensor) -> Tensor:
        return self.maxpool(self.relu(self.bn1(self.conv1(x))))
