"""Taps: the only code that knows the module names of detectors.

A tap translates the vocabulary that distillers speak into the modules of one family of
detectors, both to observe a student during its own forward pass and to drive a teacher stage by
stage. Taps hold no state; the model is an argument everywhere.

Keys (per-level lists run from the finest to the coarsest level; boxes are absolute pixels of the
padded network input, XYXY):

=====================  ===========================================================================
``backbone.res4``      (N, C, H, W), a stage of the bottom-up network
``neck.p3``            (N, C, H, W), a pyramid level; ``neck`` alone is the list of the levels that
                       the dense head or the RoI head reads
``head.cls[i]``        list of (N, C, H, W) after ``i`` tower stages of the classification branch,
                       post-activation; ``i = 0`` is the pyramid. ``head.box[i]``: box branch.
                       Suffix ``:pre``: before the activation of stage ``i``
``pred.cls``           list of (N, A*K, H, W) raw logits, of SSD A*(K+1), the background last;
                       ``pred.box`` list of (N, A*D, H, W) raw; ``pred.ctr`` list of (N, A, H, W)
                       logits
``anchors``            list of ``Boxes``, one a level; ``codec``: object with
                       ``apply_deltas(raw (R, D), anchors (R, 4)) -> (R, 4)``
``assign``             :class:`Assignment` of the model's own matcher. Two-stage models: ``anchors``
                       and ``assign`` are the RPN's, one class, before it samples
``rpn.obj, rpn.box``   lists of (N, A, H, W) and (N, 4A, H, W)
``proposals``          list of ``Instances`` with ``proposal_boxes``, ``gt_classes``, ``gt_boxes``
``roi.feat``           (R, C, h, w) pooled; ``roi.embed`` (R, D) input of the predictor;
                       ``roi.cls`` (R, K+1) logits; ``roi.box`` (R, 4K or 4) deltas, from
                       ``proposal_boxes`` to boxes by ``roi.codec``. These and ``proposals`` take
                       a stage suffix for cascades: ``roi.cls[2]``
``path:<module>``      list over the calls of any module of its raw output
=====================  ===========================================================================
"""

import re
from dataclasses import dataclass
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Set, Tuple, Union

import torch
from detectron2.structures import Boxes, Instances
from torch import nn

from .precision import widened
from .recorder import CallReader, ModuleRecorder, near_matches
from .registry import FamilyRegistry

__all__ = ["KD_TAPS", "Assignment", "Key", "KeyInfo", "Tap", "TapStore", "build_tap"]


KD_TAPS = FamilyRegistry("KD_TAPS")
KD_TAPS.__doc__ = """
Taps by the name of the meta-architecture they serve; a model uses the tap of the nearest of its
base classes. Register with ``@KD_TAPS.register_for(MyMetaArch)``.
"""


def build_tap(model: nn.Module) -> "Tap":
    """Return the tap of ``model``'s family.

    Raises:
        ValueError: neither the class of the model nor a base class has a tap.
    """
    try:
        return KD_TAPS.find(model)()
    except KeyError as error:
        raise ValueError(
            f"no tap for meta-architecture {type(model).__name__}; known families: "
            f"{error.args[0]}. Register one with @KD_TAPS.register_for, or derive the model from "
            "one of these"
        ) from None


class Key(NamedTuple):
    """A parsed key, e.g. ``head.cls[3]:pre`` -> ("head", "cls", 3, True)."""

    group: str
    name: str
    index: Optional[int]
    before_activation: bool

    @classmethod
    def parse(cls, key: str) -> "Key":
        """Raise ``ValueError`` if ``key`` is not of the form group[.name][[index]][:pre]."""
        if key.startswith("path:"):
            return cls("path", key[len("path:") :], None, False)
        match = re.fullmatch(r"([a-z]+)(?:\.(\w+))?(?:\[(\d+)\])?(:pre)?", key)
        if match is None:
            raise ValueError(f"'{key}' is not a key; expected e.g. neck.p3, head.cls[3], roi.cls")
        group, name, index, pre = match.groups()
        return cls(group, name or "", int(index) if index else None, pre is not None)


@dataclass(frozen=True)
class KeyInfo:
    """What is known about a key before the first step.

    Attributes:
        channels: width of the tensor; a tuple, one entry a level, where levels differ (SSD); None
            where there is none.
        strides: input pixels per cell, one entry a level; empty for keys without a grid.
        signature: further facts that two models must share to be compared on this key (cell
            anchors, type and numbers of a box codec, branch of the centerness, ...).
    """

    channels: Union[None, int, Tuple[int, ...]] = None
    strides: Tuple[int, ...] = ()
    signature: Tuple = ()

    @property
    def levels(self) -> List[Tuple[int, int]]:
        """(stride, channels) of each level, fine to coarse."""
        widths = self.channels
        if not isinstance(widths, tuple):
            widths = (widths,) * len(self.strides)
        return list(zip(self.strides, widths))


@dataclass
class Assignment:
    """Result of a dense detector's matcher; R positions of all levels, fine to coarse.

    Attributes:
        labels: (N, R) in {-1 ignored or outside the image, 0..K-1, K background}.
        boxes: (N, R, 4) matched ground-truth boxes; undefined where the label is no class.
        num_classes: K.
    """

    labels: torch.Tensor
    boxes: torch.Tensor
    num_classes: int

    @property
    def positive(self) -> torch.Tensor:
        """(N, R) bool."""
        return (self.labels >= 0) & (self.labels != self.num_classes)

    @property
    def valid(self) -> torch.Tensor:
        """(N, R) bool: neither ignored nor outside the image."""
        return self.labels >= 0


class TapStore(CallReader):
    """Values of one model for one batch, read by key and cached.

    Subclasses provide the recorded calls; what a key means is decided by the tap.
    """

    def __init__(self, tap: "Tap", model: nn.Module, gt_instances: Optional[List[Instances]]):
        self.tap = tap
        self.model = model
        self.gt_instances = gt_instances
        self._values: Dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            self._values[key] = self.tap.read(self, Key.parse(key))
        return self._values[key]


class _Observation(TapStore):
    """Student side: a recorder that is open during the student's own forward."""

    def __init__(self, tap, model, keys):
        super().__init__(tap, model, None)
        parsed = [Key.parse(key) for key in keys]
        self._recorder = ModuleRecorder(model, tap.paths(model, parsed))

    def __enter__(self) -> "_Observation":
        self._values = {}
        self._recorder.__enter__()
        return self

    def __exit__(self, *exc_info) -> None:
        self._recorder.__exit__(*exc_info)

    def calls(self, path):
        return self._recorder.calls(path)


class StagedRun(TapStore):
    """Teacher side: stages run when a key first needs them, without autograd graph.

    The model's own ``forward`` is never called: it would compute losses, write scalars or run
    NMS. ``images`` is the normalised and padded batch, (N, C, H, W).
    """

    def __init__(self, tap, model, images, keys, gt_instances=None):
        super().__init__(tap, model, gt_instances)
        self.images = images
        parsed = [Key.parse(key) for key in keys]
        self._paths = tap.paths(model, parsed)
        self._stages: Dict[str, ModuleRecorder] = {}
        self._features: Optional[Dict[str, torch.Tensor]] = None
        self._rois: Tuple[Any, Dict[str, Any]] = (None, {})

    def calls(self, path):
        stage = self.tap.stage(path)
        if stage not in self._stages:
            paths = {p for p in self._paths if self.tap.stage(p) == stage} | {path}
            self._stages[stage] = self._run(stage, paths)
        return self._stages[stage].calls(path)

    @property
    def features(self) -> Dict[str, torch.Tensor]:
        """Output of the backbone; runs it on first use."""
        if self._features is None:
            self.calls("backbone")
        return self._features

    @torch.no_grad()
    def _run(self, stage: str, paths: Set[str]) -> ModuleRecorder:
        recorder = ModuleRecorder(self.model, paths)
        if stage == "trunk":
            with recorder:
                self._features = self.model.backbone(self.images)
        else:
            features = self.features
            with recorder:
                self.tap.run_stage(self.model, stage, features)
        return recorder

    @torch.no_grad()
    def run_rois(self, keys: Iterable[str], boxes: List[Boxes]) -> Dict[str, Any]:
        """Return the values of ``roi.*`` keys for given boxes, one ``Boxes`` an image.

        Repeated calls with the same list object share one pass.
        """
        keys = list(keys)
        cached_boxes, values = self._rois
        if cached_boxes is not boxes or any(key not in values for key in keys):
            known = set(values) if cached_boxes is boxes else set()
            parsed = [Key.parse(key) for key in sorted(known | set(keys))]
            # Detectron2's poolers cast boxes to the type of the maps, and a bfloat16 has 8 bits
            features = widened(self.features)
            values = self.tap.run_rois(self.model, features, boxes, parsed)
            self._rois = (boxes, values)
        return {key: values[key] for key in keys}


class Tap:
    """Interface of taps; subclasses serve one family of meta-architectures."""

    def keys(self, model: nn.Module) -> Dict[str, KeyInfo]:
        """Return every key that ``model`` has, with what is known of it before the first step."""
        raise NotImplementedError

    def paths(self, model: nn.Module, keys: Iterable[Key]) -> Set[str]:
        """Return the modules that must be recorded to read ``keys``."""
        raise NotImplementedError

    def read(self, store: TapStore, key: Key) -> Any:
        """Return the value of ``key`` from the calls recorded in ``store``."""
        raise NotImplementedError

    def stage(self, path: str) -> str:
        """Return the stage ("trunk" or another name) in which module ``path`` runs."""
        raise NotImplementedError

    def run_stage(self, model: nn.Module, stage: str, features: Dict[str, torch.Tensor]) -> None:
        """Run one stage after the trunk, for a teacher."""
        raise NotImplementedError

    def run_rois(self, model, features, boxes: List[Boxes], keys: List[Key]) -> Dict[str, Any]:
        raise ValueError(
            f"{type(model).__name__} has no RoI head: roi.* keys need a two-stage model"
        )

    def rest_of_head(
        self, model: nn.Module, branch: str, start: int, level_features: List[torch.Tensor]
    ) -> Dict[str, List[torch.Tensor]]:
        raise ValueError(f"{type(model).__name__} has no dense head with towers")

    def anchor_strides(self, model: nn.Module) -> List[int]:
        """Return the strides of the levels of ``anchors``, fine to coarse."""
        raise NotImplementedError

    # ------------------------------------------------------------------ shared by all families
    def observe(self, model: nn.Module, keys: Iterable[str], check: bool = True) -> _Observation:
        """Return a context manager that records ``keys`` while ``model`` runs its own forward.

        Args:
            check: look whether the model has the keys. Whoever did so at build time leaves it out
                in every step: describing a model reads its anchors, i.e. waits for the device.
        """
        return _Observation(self, model, self.checked(model, keys) if check else list(keys))

    def run(
        self,
        model: nn.Module,
        images: torch.Tensor,
        keys: Iterable[str],
        gt_instances: Optional[List[Instances]] = None,
        check: bool = True,
    ) -> StagedRun:
        """Return a store for a frozen model; its stages run when their keys are first read."""
        keys = self.checked(model, keys) if check else list(keys)
        return StagedRun(self, model, images, keys, gt_instances)

    def checked(self, model: nn.Module, keys: Iterable[str]) -> List[str]:
        """Return ``keys``, or raise ``ValueError`` naming the first one the model lacks."""
        known = self.keys(model)
        keys = list(keys)
        for key in keys:
            if key.startswith("path:"):
                ModuleRecorder(model, [key[len("path:") :]])
            elif key not in known:
                raise ValueError(
                    f"{type(model).__name__} has no key '{key}'; "
                    f"similar: {near_matches(key, known, 8)}"
                )
        return keys

    def trunk_keys(self, model: nn.Module) -> Dict[str, KeyInfo]:
        """``backbone.*`` and ``neck.*``, which every family has."""
        result = {}
        bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
        for name, shape in bottom_up.output_shape().items():
            result[f"backbone.{name}"] = KeyInfo(shape.channels, (shape.stride,))
        for name, shape in model.backbone.output_shape().items():
            result[f"neck.{name}"] = KeyInfo(shape.channels, (shape.stride,))
        return result

    def trunk_paths(self, model: nn.Module, key: Key) -> Set[str]:
        has_neck = hasattr(model.backbone, "bottom_up")
        return {"backbone.bottom_up" if key.group == "backbone" and has_neck else "backbone"}

    def read_trunk(self, store: TapStore, key: Key) -> torch.Tensor:
        (path,) = self.trunk_paths(store.model, key)
        return store.single(path).output[key.name]
