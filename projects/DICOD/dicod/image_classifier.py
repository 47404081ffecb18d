"""What all classifiers of images share: losses, normalisation, and what a checkpoint says."""

import functools
import math
from typing import Any, Callable, Dict, List, Mapping, Sequence

import torch
import torch.nn.functional as F
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn

from kd_d2.checkpoint import compare, load_checkpoint_file
from kd_d2.config import choice
from kd_d2.losses.precision import full_precision
from kd_d2.modeling.convert import unwrap_state_dict

__all__ = [
    "ClassLosses",
    "ImageClassifier",
    "correct_in_top",
    "cross_entropy_loss",
    "focal_loss",
    "load_start_weights",
]


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


class ClassLosses:
    """The sum of losses that a classifier is trained with, and its accuracy.

    "Joint" classifiers have one layer of logits with two losses, so that a softmax and sigmoids can
    both be applied to it.
    """

    @configurable
    def __init__(
        self,
        *,
        names: Sequence[str],
        focal_alpha: float = 0.25,
        focal_gamma: float = 2.0,
        focal_weight: float = 1.0,
        prior_prob: float = 0.01,
    ):
        """
        Args:
            names: any of "cross_entropy" and "focal".
            focal_alpha, focal_gamma: see :func:`focal_loss`.
            focal_weight: its factor.
            prior_prob: initial probability of every class if there is a focal loss. (A constant
                shift of all logits leaves the cross-entropy as it is.)

        Raises:
            ValueError: an unknown loss, or none.
        """
        known: Dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "cross_entropy": cross_entropy_loss,
            "focal": functools.partial(focal_loss, alpha=focal_alpha, gamma=focal_gamma),
        }
        for name in names:
            choice("CROP_CLASSIFIER.LOSSES", name, known)
        if not names:
            raise ValueError(f"CROP_CLASSIFIER.LOSSES is empty; give some of {sorted(known)}")
        self.names = list(names)
        self._losses = {name: known[name] for name in names}
        self._weights = {"cross_entropy": 1.0, "focal": focal_weight}
        self._prior_prob = prior_prob

    @classmethod
    def from_config(cls, cfg):
        node = cfg.CROP_CLASSIFIER
        return {
            "names": node.LOSSES,
            "focal_alpha": node.FOCAL_ALPHA,
            "focal_gamma": node.FOCAL_GAMMA,
            "focal_weight": node.FOCAL_WEIGHT,
            "prior_prob": node.PRIOR_PROB,
        }

    def initialise(self, last: nn.Linear) -> None:
        """Give the focal loss, if there is one, its level: the bias of the layer of logits."""
        if "focal" in self._losses:
            nn.init.constant_(last.bias, -math.log((1 - self._prior_prob) / self._prior_prob))

    def __call__(self, logits: Tensor, labels: Tensor) -> Dict[str, Tensor]:
        """Return the losses of logits (N, C) and labels (N,), each a mean over the images."""
        with torch.autocast(logits.device.type, enabled=False):
            logits = full_precision(logits)
            losses = {
                f"loss_{name}": self._weights[name] * loss(logits, labels)
                for name, loss in self._losses.items()
            }
            right = correct_in_top(logits.detach(), labels, 1)
        get_event_storage().put_scalar("classifier/top1", 100 * right / max(len(labels), 1))
        return losses


class ImageClassifier:
    """A base beside that of a network, which comes second and brings :meth:`logits`' layers.

    Attributes:
        classes: class names in the order of the logits.
        num_classes: their number.
        input_size: side of the images that it is trained on.
        image_format: "RGB" or "BGR".
    """

    # names in the state dict: the first weight, and the module that makes the logits
    first_weight: str
    last_layer: str

    def set_facts(
        self,
        *,
        arch: str,
        classes: Sequence[str],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        image_format: str,
        input_size: int,
        losses: ClassLosses,
    ) -> None:
        """Set everything but the network up; for the end of the constructor of subclasses.

        Args:
            arch: name of the architecture, for the checkpoint.
            classes: class names.
            pixel_mean, pixel_std: of 0..255, in the order of ``image_format``.
            image_format: order of the channels.
            input_size: side of the images, pixels.
            losses: what it is trained with.
        """
        self.arch = arch
        self.classes = list(classes)
        self.num_classes = len(self.classes)
        self.image_format = image_format
        self.input_size = input_size
        self._losses = losses
        # not in the state dict, which stays the network's; see `metadata`
        self._statistics = {
            "pixel_mean": [float(value) for value in pixel_mean],
            "pixel_std": [float(value) for value in pixel_std],
        }
        for name, values in self._statistics.items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)
        losses.initialise(self.get_submodule(self.last_layer))

    @staticmethod
    def facts_from_config(cfg) -> Dict[str, Any]:
        """The arguments of :meth:`set_facts` but for the architecture and the classes."""
        return {
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "image_format": cfg.INPUT.FORMAT,
            "input_size": cfg.CROP_CLASSIFIER.INPUT_SIZE,
            "losses": ClassLosses(cfg),
        }

    def metadata(self) -> Dict[str, Any]:
        """What a checkpoint must say besides the weights, as plain numbers and strings."""
        return {
            "arch": self.arch,
            "classes": list(self.classes),
            **{name: list(values) for name, values in self._statistics.items()},
            "format": self.image_format,
            "input_size": self.input_size,
            "losses": list(self._losses.names),
        }

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

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
        return self._losses(logits, batch["labels"].to(self.device, non_blocking=True))

    def logits(self, crops: Tensor) -> Tensor:
        """Return (N, C) for normalised crops (N, 3, S, S)."""
        raise NotImplementedError


def load_start_weights(model: ImageClassifier, path: str, allow_unsafe: bool = False) -> List[str]:
    """Load ImageNet weights from ``path`` into everything but the last layer.

    Read are state dicts with the network's own names (torchvision's; of a backbone Detectron2's)
    and files in the layout of PyTorch's ImageNet example ("state_dict", prefix "module."). They are
    for RGB; for "BGR" the first layer is turned around. Their standard deviations are not folded
    in: batch norm makes the network indifferent to them.

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
    last = f"{model.last_layer}."
    state = {key: value for key, value in state.items() if not key.startswith(last)}
    report = compare(state, model).without([model.last_layer])
    if not report.ok:
        raise ValueError(
            f"CROP_CLASSIFIER.WEIGHTS {path} do not fit CROP_CLASSIFIER.ARCH '{model.arch}':\n"
            f"{report.format()}"
        )
    if model.image_format == "BGR":
        state[model.first_weight] = state[model.first_weight].flip(1)
    return sorted(model.load_state_dict(state, strict=False).missing_keys)
