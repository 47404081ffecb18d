"""Tap of one-stage detectors: Detectron2's ``DenseDetector`` and everything derived from it."""

import contextlib
from typing import Any, Dict, Iterable, Iterator, List, Set

import torch
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from torch import nn

from .taps import KD_TAPS, Assignment, Key, KeyInfo, Tap, TapStore

__all__ = ["DenseTap", "anchor_signature", "codec_signature", "stage_ends"]

_TOWERS = {"cls": "cls_subnet", "box": "bbox_subnet"}
_PREDICTIONS = ("cls", "box", "ctr")
_ACTIVATIONS = tuple(
    getattr(nn, name) for name in nn.modules.activation.__all__ if name != "MultiheadAttention"
)


def stage_ends(tower: nn.Sequential) -> List[int]:
    """Return the indices of the activations of ``tower``: a stage ends with its activation."""
    return [i for i, module in enumerate(tower) if isinstance(module, _ACTIVATIONS)]


@contextlib.contextmanager
def _kept_statistics(modules: nn.Module) -> Iterator[None]:
    """Batch norms of ``modules`` that are in training mode normalise as ever inside the block, but
    leave their running statistics alone."""
    norms = [
        m
        for m in modules.modules()
        if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
    ]
    before = [(m.track_running_stats, m.momentum) for m in norms]
    try:
        for norm in norms:
            # the momentum is for Detectron2's NaiveSyncBatchNorm, which does not ask for the other
            norm.track_running_stats, norm.momentum = False, 0.0
        yield
    finally:
        for norm, (tracked, momentum) in zip(norms, before):
            norm.track_running_stats, norm.momentum = tracked, momentum


def codec_signature(codec: Any) -> tuple:
    """Return the type and the plain attributes of a box codec, comparable between two models."""

    def plain(value):
        if isinstance(value, (list, tuple)):
            return tuple(plain(v) for v in value)
        return value if isinstance(value, (int, float, str, bool, type(None))) else str(type(value))

    facts = {k: plain(v) for k, v in vars(codec).items() if not k.startswith("_")}
    return (type(codec).__name__,) + tuple(sorted(facts.items()))


def anchor_signature(generator: Any) -> tuple:
    """Return the offset and the cell anchors of all levels, comparable between two models."""
    cells = tuple(
        tuple(tuple(round(v, 4) for v in anchor) for anchor in level.tolist())
        for level in generator.cell_anchors
    )
    return (("offset", getattr(generator, "offset", 0.0)), *cells)


@KD_TAPS.register_for(DenseDetector)
class DenseTap(Tap):
    """``DenseDetector`` with the standard head names: ``cls_subnet``, ``bbox_subnet``,
    ``cls_score``, ``bbox_pred`` and optionally ``ctrness``.

    A head may also offer ``predict(branch, feature, level) -> dict`` (as
    :class:`kd_d2.modeling.meta_arch.dense_head.DenseHead` does) when its predictors depend on
    the level or sit on another branch than in Detectron2.
    """

    def keys(self, model):
        head, shapes = model.head, model.backbone.output_shape()
        strides = tuple(shapes[f].stride for f in model.head_in_features)
        pyramid_channels = shapes[model.head_in_features[0]].channels
        result = self.trunk_keys(model)
        result["neck"] = KeyInfo(pyramid_channels, strides)
        for branch, name in _TOWERS.items():
            tower = getattr(head, name)
            result[f"head.{branch}[0]"] = KeyInfo(pyramid_channels, strides)
            convs = [m.out_channels for m in tower if isinstance(m, nn.Conv2d)]
            for stage, channels in enumerate(convs, start=1):
                result[f"head.{branch}[{stage}]"] = KeyInfo(channels, strides)
                result[f"head.{branch}[{stage}]:pre"] = KeyInfo(channels, strides)
        result["pred.cls"] = KeyInfo(head.cls_score.out_channels, strides, (model.num_classes,))
        result["pred.box"] = KeyInfo(head.bbox_pred.out_channels, strides)
        centerness = self.centerness_branch(model)
        if centerness != "none":
            result["pred.ctr"] = KeyInfo(head.ctrness.out_channels, strides, (centerness,))
        result["anchors"] = KeyInfo(None, strides, anchor_signature(model.anchor_generator))
        result["codec"] = KeyInfo(None, (), codec_signature(model.box2box_transform))
        result["assign"] = KeyInfo(None, strides)
        return result

    @staticmethod
    def centerness_branch(model) -> str:
        """Return the tower that feeds the centerness: "cls", "box" or "none"."""
        where = getattr(model.head, "centerness_on", None)
        if where is None:
            where = "box" if hasattr(model.head, "ctrness") else "none"
        return {"reg": "box"}.get(where, where)

    def anchor_strides(self, model) -> List[int]:
        return list(model.anchor_generator.strides)

    def num_stages(self, model, branch: str) -> int:
        """Return the number of tower stages of ``branch``."""
        return len(stage_ends(getattr(model.head, _TOWERS[branch])))

    def paths(self, model, keys: Iterable[Key]) -> Set[str]:
        result = set()
        for key in keys:
            if key.group == "path":
                result.add(key.name)
            elif key.group in ("backbone", "neck"):
                result |= self.trunk_paths(model, key)
            elif key.group == "head":
                result.add(self._tower_path(model, key) if key.index else "backbone")
            elif key.group == "pred":
                result.add("head")
            elif key.group in ("anchors", "assign"):
                result.add("backbone")
        return result

    def _tower_path(self, model, key: Key) -> str:
        name = _TOWERS[key.name]
        return f"head.{name}.{stage_ends(getattr(model.head, name))[key.index - 1]}"

    def read(self, store: TapStore, key: Key) -> Any:
        return getattr(self, f"_read_{key.group}")(store, key)

    def _read_backbone(self, store, key):
        return self.read_trunk(store, key)

    def _read_neck(self, store, key):
        return self.read_trunk(store, key) if key.name else self._pyramid(store)

    def _read_head(self, store, key):
        if not key.index:
            return self._pyramid(store)
        calls = store.per_level(
            self._tower_path(store.model, key), len(store.model.head_in_features)
        )
        return [call.inputs[0] if key.before_activation else call.output for call in calls]

    def _read_pred(self, store, key):
        return list(store.single("head").output[_PREDICTIONS.index(key.name)])

    def _read_path(self, store, key):
        return [call.output for call in store.calls(key.name)]

    def _read_codec(self, store, key):
        return store.model.box2box_transform

    def _read_anchors(self, store, key):
        return store.model.anchor_generator(self._pyramid(store))

    def _read_assign(self, store, key):
        model = store.model
        labels, boxes = model.label_anchors(store["anchors"], store.gt_instances)
        return Assignment(torch.stack(labels), torch.stack(boxes), model.num_classes)

    def _pyramid(self, store) -> List[torch.Tensor]:
        features = store.single("backbone").output
        return [features[f] for f in store.model.head_in_features]

    def stage(self, path: str) -> str:
        return "head" if path.split(".")[0] == "head" else "trunk"

    def run_stage(self, model, stage, features):
        model.head([features[f] for f in model.head_in_features])

    def rest_of_head(
        self, model, branch: str, start: int, level_features: List[torch.Tensor]
    ) -> Dict[str, List[torch.Tensor]]:
        """Run the head from behind stage ``start`` to its predictions, in the caller's grad mode.

        Gradients cross the layers (frozen ones, too) into ``level_features``; per-level scales of
        ``model`` are applied. Running statistics of batch norms stay as they are: ``model`` may be
        the student, and the features another network's.

        Args:
            branch: "cls" or "box".
            start: number of tower stages that ``level_features`` have already passed.
            level_features: (N, C, H, W) per level, post-activation, fine to coarse, all levels:
                normalisation layers that count levels would get out of step otherwise.

        Returns:
            dict: "cls", "box" and/or "ctr" -> per-level raw predictions, whichever this branch
            makes.

        Raises:
            ValueError: wrong number of levels, or ``start`` outside 0..number of stages.
        """
        num_levels = len(model.head_in_features)
        if len(level_features) != num_levels:
            raise ValueError(
                f"rest_of_head needs all {num_levels} levels of {type(model).__name__}, "
                f"got {len(level_features)}"
            )
        tower = getattr(model.head, _TOWERS[branch])
        ends = stage_ends(tower)
        if not 0 <= start <= len(ends):
            raise ValueError(f"start must lie in 0..{len(ends)}, got {start}")
        rest = tower[ends[start - 1] + 1 if start else 0 :]
        result: Dict[str, List[torch.Tensor]] = {}
        with _kept_statistics(rest):
            for level, feature in enumerate(level_features):
                predictions = self._predict(model, branch, rest(feature), level)
                for name, value in predictions.items():
                    result.setdefault(name, []).append(value)
        return result

    def _predict(self, model, branch, feature, level) -> Dict[str, torch.Tensor]:
        head = model.head
        if hasattr(head, "predict"):
            return head.predict(branch, feature, level)
        result = {branch: (head.cls_score if branch == "cls" else head.bbox_pred)(feature)}
        if self.centerness_branch(model) == branch:
            result["ctr"] = head.ctrness(feature)
        return result
