"""The crop classifier: a torchvision ResNet with one layer of class logits."""

import functools
import math
from typing import Any, Callable, Dict, Iterable, List, Mapping, Sequence, Tuple

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from kd_d2.checkpoint import compare, load_checkpoint_file
from kd_d2.config import choice
from kd_d2.losses.precision import full_precision
from kd_d2.modeling.convert import unwrap_state_dict

__all__ = [
    "ARCHITECTURES",
    "STAGES",
    "CropClassifier",
    "correct_in_top",
    "cross_entropy_loss",
    "focal_loss",
    "load_start_weights",
]

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


def cross_entropy_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the softmax cross-entropy, mean over the crops; 0 with a graph if there are none.

    Args:
        logits: (N, C).
        labels: (N,) classes.
    """
    return F.cross_entropy(logits, labels, reduction="sum") / max(len(labels), 1)


def focal_loss(logits: Tensor, labels: Tensor, *, alpha: float = 0.25, gamma: float = 2.0):
    """Return the focal loss of sigmoids (Lin et al., ICCV 2017), summed over the classes and
    averaged over the crops; 0 with a graph if there are none.

    Args:
        logits: (N, C).
        labels: (N,) classes.
        alpha: weight of the positives; that of the negatives is 1 - alpha.
        gamma: exponent.
    """
    targets = F.one_hot(labels, logits.shape[1]).to(logits)
    loss = sigmoid_focal_loss(logits, targets, alpha=alpha, gamma=gamma, reduction="sum")
    return loss / max(len(labels), 1)


def correct_in_top(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Return the number of crops whose class is among the ``k`` largest logits (all, if fewer)."""
    top = logits.topk(min(k, logits.shape[1]), dim=1).indices
    return (top == labels[:, None]).any(dim=1).sum()


class CropClassifier(ResNet):
    """A torchvision ResNet, and its state dict, that normalises and has losses of its own.

    "Joint" teachers have one layer of logits with two losses, so that a softmax and sigmoids can
    both be applied to it.

    Attributes:
        classes: class names in the order of the logits.
        num_classes: their number.
        input_size: side of the crops that it is trained on.
        image_format: "RGB" or "BGR".
    """

    @configurable
    def __init__(
        self,
        *,
        arch: str,
        classes: Sequence[str],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        image_format: str,
        input_size: int,
        losses: Sequence[str],
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        focal_weight: float = 1.0,
        prior_prob: float = 0.01,
    ):
        """
        Args:
            arch: a key of :data:`ARCHITECTURES`.
            classes: class names.
            pixel_mean, pixel_std: of 0..255, in the order of ``image_format``.
            image_format: order of the channels.
            input_size: side of the crops, pixels.
            losses: any of "cross_entropy" and "focal".
            focal_alpha, focal_gamma: see :func:`focal_loss`.
            focal_weight: its factor.
            prior_prob: initial probability of every class if there is a focal loss. (A constant
                shift of all logits leaves the cross-entropy as it is.)

        Raises:
            ValueError: an unknown architecture or loss, or no loss.
        """
        choice("CROP_CLASSIFIER.ARCH", arch, ARCHITECTURES)
        known: Dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "cross_entropy": cross_entropy_loss,
            "focal": functools.partial(focal_loss, alpha=focal_alpha, gamma=focal_gamma),
        }
        for name in losses:
            choice("CROP_CLASSIFIER.LOSSES", name, known)
        if not losses:
            raise ValueError(f"CROP_CLASSIFIER.LOSSES is empty; give some of {sorted(known)}")
        super().__init__(num_classes=len(classes), **ARCHITECTURES[arch])
        self.arch = arch
        self.classes = list(classes)
        self.num_classes = len(self.classes)
        self.image_format = image_format
        self.input_size = input_size
        self._losses = {name: known[name] for name in losses}
        self._loss_weights = {"cross_entropy": 1.0, "focal": focal_weight}
        # not in the state dict, which stays torchvision's; see `metadata`
        self._statistics = {
            "pixel_mean": [float(value) for value in pixel_mean],
            "pixel_std": [float(value) for value in pixel_std],
        }
        for name, values in self._statistics.items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        if "focal" in losses:
            nn.init.constant_(self.fc.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(cls, cfg, classes: Sequence[str]):
        node = cfg.CROP_CLASSIFIER
        return {
            "arch": node.ARCH,
            "classes": classes,
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "image_format": cfg.INPUT.FORMAT,
            "input_size": node.INPUT_SIZE,
            "losses": node.LOSSES,
            "focal_alpha": node.FOCAL_ALPHA,
            "focal_gamma": node.FOCAL_GAMMA,
            "focal_weight": node.FOCAL_WEIGHT,
            "prior_prob": node.PRIOR_PROB,
        }

    def metadata(self) -> Dict[str, Any]:
        """What a checkpoint must say besides the weights, as plain numbers and strings."""
        return {
            "arch": self.arch,
            "classes": list(self.classes),
            **{name: list(values) for name, values in self._statistics.items()},
            "format": self.image_format,
            "input_size": self.input_size,
            "losses": list(self._losses),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def stages(self) -> Dict[str, Tuple[int, Tuple[int, ...]]]:
        """Return stage -> (channels, (stride,)) of what :meth:`features` gives."""
        widths = [self.conv1.out_channels]
        for stage in STAGES[1:]:
            block = getattr(self, stage)[-1]
            widths.append([m for m in block.modules() if isinstance(m, nn.Conv2d)][-1].out_channels)
        return {s: (c, (k,)) for s, c, k in zip(STAGES, widths, (4, 4, 8, 16, 32), strict=True)}

    def forward(self, batch: Mapping[str, Tensor]):
        """
        Args:
            batch: "crops" (N, 3, S, S) of 0..255 in ``image_format`` and, in training, "labels"
                (N,).

        Returns:
            logits (N, C), or in training the losses, each a mean over the crops.
        """
        crops = batch["crops"].to(self.device, non_blocking=True)
        logits = self.logits((crops - self.pixel_mean) / self.pixel_std)
        if not self.training:
            return logits
        labels = batch["labels"].to(self.device, non_blocking=True)
        with torch.autocast(logits.device.type, enabled=False):
            logits = full_precision(logits)
            losses = {
                f"loss_{name}": self._loss_weights[name] * loss(logits, labels)
                for name, loss in self._losses.items()
            }
            right = correct_in_top(logits.detach(), labels, 1)
        get_event_storage().put_scalar("classifier/top1", 100 * right / max(len(labels), 1))
        return losses

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


def load_start_weights(model: CropClassifier, path: str, allow_unsafe: bool = False) -> List[str]:
    """Load ImageNet weights from ``path`` into everything but the last layer.

    Read are torchvision's state dicts and files in the layout of PyTorch's ImageNet example
    ("state_dict", prefix "module."). They are for RGB; for "BGR" the first layer is turned around.
    Their standard deviations are not folded in: batch norm makes the network indifferent to them.

    Args:
        model: is changed in place.
        path: of the file.
        allow_unsafe: KD.ALLOW_UNSAFE_LOAD.

    Returns:
        keys that stay as initialised: those of the last layer.

    Raises:
        ValueError: a key is missing, unknown or of another shape; nothing is loaded then.
    """
    state = unwrap_state_dict(load_checkpoint_file(path, allow_unsafe))
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    report = compare(state, model).without(["fc"])
    if not report.ok:
        raise ValueError(
            f"CROP_CLASSIFIER.WEIGHTS {path} do not fit CROP_CLASSIFIER.ARCH '{model.arch}':\n"
            f"{report.format()}"
        )
    if model.image_format == "BGR":
        state["conv1.weight"] = state["conv1.weight"].flip(1)
    return sorted(model.load_state_dict(state, strict=False).missing_keys)
