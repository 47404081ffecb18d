"""The two-tower head of dense detectors with one predictor per output."""

import logging
import math
from typing import Dict, List, Optional, Tuple

from detectron2.config import configurable
from detectron2.layers import ShapeSpec, get_norm
from torch import Tensor, nn

from ..layers import Scale

__all__ = ["DenseHead"]

logger = logging.getLogger(__name__)

# Branch whose tower feeds the centerness predictor, by the value of ``centerness_on``.
_CENTERNESS_BRANCH = {"none": None, "reg": "box", "cls": "cls"}


class DenseHead(nn.Module):
    """Head with a classification and a box tower whose weights all pyramid levels share.

    A tower is a sequence of ``num_stages`` stages, each a 3x3 conv, optionally a normalisation,
    and a ReLU that is not in place; 3x3 predictors follow. Only the optional factors of the box
    predictor differ between levels. The modules are named as in Detectron2's RetinaNet and FCOS
    heads: ``cls_subnet``, ``bbox_subnet``, ``cls_score``, ``bbox_pred``, ``ctrness``; and
    ``scales``, one per level. Absent ones are None.

    The parts can be run separately: ``predict(b, tower(b)(x), level)`` gives the predictions of
    branch b that :meth:`forward` gives for x.
    """

    @configurable
    def __init__(
        self,
        *,
        input_shape: List[ShapeSpec],
        num_classes: int,
        num_anchors: int = 1,
        box_dim: int = 4,
        num_convs: int = 4,
        conv_dim: int = 0,
        norm: str = "GN",
        conv_bias: Optional[bool] = None,
        prior_prob: float = 0.01,
        centerness_on: str = "none",
        use_scale: bool = True,
    ):
        """
        Args:
            input_shape: of the levels, in the order in which they will be given.
            num_classes: K.
            num_anchors: A, anchors per cell.
            box_dim: numbers that describe a box.
            num_convs: stages per tower, may be 0.
            conv_dim: width of the stages; 0: the channels of the levels.
            norm: a name of :func:`detectron2.layers.get_norm`, "" for none.
            conv_bias: bias in the tower convs; None: only without norm. Without norm always.
            prior_prob: initial score of every class, in (0, 1).
            centerness_on: "none", or the tower that feeds the centerness: "reg" or "cls".
            use_scale: multiply the box predictions by one learnable factor per level.

        Raises:
            ValueError: levels differ in channels, or an argument is none of the above.
        """
        super().__init__()
        channels = {shape.channels for shape in input_shape}
        if len(channels) != 1:
            raise ValueError(
                f"The levels of a shared head must have the same channels, got {input_shape}"
            )
        if not 0 < prior_prob < 1:
            raise ValueError(f"PRIOR_PROB must be between 0 and 1, got {prior_prob}")
        if num_convs < 0:
            raise ValueError(f"NUM_CONVS must not be negative, got {num_convs}")
        if centerness_on not in _CENTERNESS_BRANCH:
            raise ValueError(
                f"centerness_on must be one of {list(_CENTERNESS_BRANCH)}, got {centerness_on!r}"
            )
        in_dim = channels.pop()
        conv_dim = conv_dim or in_dim
        last_dim = conv_dim if num_convs else in_dim

        self.num_stages = num_convs
        self.num_levels = len(input_shape)
        self.num_classes = num_classes
        self.box_dim = box_dim
        self.centerness_on = centerness_on
        self._centerness_branch = _CENTERNESS_BRANCH[centerness_on]

        self.cls_subnet = _tower(in_dim, conv_dim, num_convs, norm, conv_bias)
        self.bbox_subnet = _tower(in_dim, conv_dim, num_convs, norm, conv_bias)
        self.cls_score = nn.Conv2d(last_dim, num_anchors * num_classes, 3, padding=1)
        self.bbox_pred = nn.Conv2d(last_dim, num_anchors * box_dim, 3, padding=1)
        has_centerness = self._centerness_branch is not None
        self.ctrness = nn.Conv2d(last_dim, num_anchors, 3, padding=1) if has_centerness else None
        self.scales = nn.ModuleList(Scale() for _ in input_shape) if use_scale else None

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, mean=0, std=0.01)
                if module.bias is not None:
                    nn.init.constant_(module.bias, 0)
        nn.init.constant_(self.cls_score.bias, -math.log((1 - prior_prob) / prior_prob))

    @classmethod
    def from_config(
        cls,
        cfg,
        *,
        input_shape: List[ShapeSpec],
        box_dim: int = 4,
        centerness_on: str = "none",
        use_scale: bool = True,
    ):
        """Args are those of the constructor; ``cfg`` is a detector's node, e.g. MODEL.GFL."""
        return {
            "input_shape": input_shape,
            "num_classes": cfg.NUM_CLASSES,
            "box_dim": box_dim,
            "num_convs": cfg.NUM_CONVS,
            "conv_dim": cfg.CONV_DIM,
            "norm": cfg.NORM,
            "prior_prob": cfg.PRIOR_PROB,
            "centerness_on": centerness_on,
            "use_scale": use_scale,
        }

    @property
    def branches(self) -> Tuple[str, str]:
        """Names of the towers."""
        return ("cls", "box")

    def tower(self, branch: str) -> nn.Sequential:
        """The stages of a branch.

        Args:
            branch: one of :attr:`branches`.

        Raises:
            ValueError: there is no such branch.
        """
        towers = dict(zip(self.branches, (self.cls_subnet, self.bbox_subnet)))
        if branch not in towers:
            raise ValueError(f"A dense head has the branches {self.branches}, got {branch!r}")
        return towers[branch]

    def predict(self, branch: str, feature: Tensor, level: int) -> Dict[str, Tensor]:
        """Raw predictions of one branch on one level.

        Args:
            branch: one of :attr:`branches`.
            feature: (N, C, H, W), output of the branch's tower.
            level: index of the level, selects the factor of the box predictions.

        Returns:
            "cls": (N, A * K, H, W) logits, of branch "cls";
            "box": (N, A * box_dim, H, W) fp32, factor included, of branch "box";
            "ctr": (N, A, H, W) logits, of the branch whose tower feeds the centerness, if any.

        Raises:
            ValueError: there is no such branch.
        """
        if branch not in self.branches:
            raise ValueError(f"A dense head has the branches {self.branches}, got {branch!r}")
        predictions = {}
        if branch == "cls":
            predictions["cls"] = self.cls_score(feature)
        else:
            # Boxes are decoded in fp32 also when the convs run in half precision.
            boxes = self.bbox_pred(feature).float()
            predictions["box"] = boxes if self.scales is None else self.scales[level](boxes)
        if branch == self._centerness_branch:
            predictions["ctr"] = self.ctrness(feature)
        return predictions

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], ...]:
        """Raw predictions of all levels.

        Args:
            features: per level (N, C, Hi, Wi).

        Returns:
            Lists with one entry per level: logits, boxes and, if there is one, centerness, in
            the shapes of :meth:`predict`.
        """
        assert len(features) == self.num_levels, (len(features), self.num_levels)
        names = ("cls", "box") if self.ctrness is None else ("cls", "box", "ctr")
        outputs: Tuple[List[Tensor], ...] = tuple([] for _ in names)
        for level, feature in enumerate(features):
            predictions: Dict[str, Tensor] = {}
            for branch in self.branches:
                predictions.update(self.predict(branch, self.tower(branch)(feature), level))
            for name, output in zip(names, outputs):
                output.append(predictions[name])
        return outputs


def _tower(
    in_dim: int, conv_dim: int, num_convs: int, norm: str, conv_bias: Optional[bool]
) -> nn.Sequential:
    modules: List[nn.Module] = []
    for stage in range(num_convs):
        dim = conv_dim if stage else in_dim
        modules.append(nn.Conv2d(dim, conv_dim, 3, padding=1, bias=bool(conv_bias) or not norm))
        if norm:
            modules.append(_norm(norm, conv_dim))
        modules.append(nn.ReLU())
    return nn.Sequential(*modules)


def _norm(norm: str, dim: int) -> nn.Module:
    try:
        module = get_norm(norm, dim)
    except KeyError:
        raise ValueError(f"NORM of a head must be a name of get_norm, got {norm!r}") from None
    except ValueError as error:
        raise ValueError(
            f"NORM {norm!r} does not fit CONV_DIM {dim} of the head: {error}"
        ) from None
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        logger.warning(f"Statistics of {norm} in the head are shared by all pyramid levels.")
    return module
