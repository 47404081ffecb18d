"""Base class and registry of distillation methods."""

from types import MappingProxyType
from typing import Dict, FrozenSet, Iterable, List, Mapping, Optional, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.utils.registry import Registry
from torch import nn

from .context import DistillationContext
from .method_info import MethodInfo
from .recorder import near_matches
from .schedule import LossSchedule
from .taps import KeyInfo

__all__ = [
    "DISTILLER_REGISTRY",
    "Distiller",
    "build_distillers",
    "require_equal",
    "teacher_wanted",
]

DISTILLER_REGISTRY = Registry("DISTILLER")
DISTILLER_REGISTRY.__doc__ = """
Distillation methods, listed in KD.DISTILLERS and called as
``Name(cfg, student_keys, teacher_keys)``, where the keys are dicts name -> KeyInfo.
"""


class Distiller(nn.Module):
    """A distillation method: named loss terms over the values of student and teacher.

    Subclasses set ``student_needs`` and ``teacher_needs``, give one weight per term, and implement
    :meth:`compute`. They never hold the teacher. Parameters (adapters, temperatures) and buffers
    (queues) live here: the optimizer finds them, DDP reduces them, and the student's state dict
    stays clean.
    """

    # Name of the config node below KD; empty: the class name in upper case.
    node: str = ""
    # False for methods that need no teacher at all. Instances may differ where it depends on their
    # terms; wants_teacher says so before they exist.
    needs_teacher: bool = True
    # True: load_teacher_state is called when the networks are put together.
    copies_teacher: bool = False
    # term -> gradient norm at the pyramid, relative to that of the detection losses, that its
    # weight should give it: for tools/calibrate_kd.py --by-term. Empty: no such wish.
    target_ratios: Mapping[str, float] = MappingProxyType({})
    # Paper, demands on the pair and published gains, for people who choose a method.
    info: Optional[MethodInfo] = None

    def __init__(
        self,
        *,
        weights: Mapping[str, float],
        student_needs: Iterable[str],
        teacher_needs: Iterable[str] = (),
    ):
        """
        Args:
            weights: term name -> factor of the unweighted loss. The set of terms is fixed for
                the run and the same on every rank.
            student_needs, teacher_needs: keys that :meth:`compute` reads.
        """
        super().__init__()
        self.weights = dict(weights)
        self.student_needs: FrozenSet[str] = frozenset(student_needs)
        self.teacher_needs: FrozenSet[str] = frozenset(teacher_needs)

    @property
    def terms(self) -> Tuple[str, ...]:
        """Names of the loss terms."""
        return tuple(self.weights)

    def compute(self, ctx: DistillationContext) -> Dict[str, torch.Tensor]:
        """Return the unweighted scalar of every term, computed in fp32."""
        raise NotImplementedError

    def forward(self, ctx: DistillationContext) -> Dict[str, torch.Tensor]:
        """Return the weighted fp32 scalars of exactly ``terms``, connected to all parameters.

        Unweighted values are left in ``ctx.raw`` for logging.
        """
        raw = self.compute(ctx)
        if set(raw) != set(self.weights):
            raise RuntimeError(
                f"{type(self).__name__}.compute returned {sorted(raw)}, "
                f"its terms are {sorted(self.weights)}"
            )
        anchor = self.zero()
        result = {}
        for term, weight in self.weights.items():
            ctx.raw[f"{self.label}/{term}"] = raw[term].detach()
            result[term] = weight * raw[term].float() + anchor
        return result

    def zero(self) -> torch.Tensor:
        """A zero that depends on every trainable parameter.

        DDP waits for the gradients of all of them in every step, also when a batch has no RoI or
        the distiller is not active.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        return sum((0.0 * p.float().sum() for p in parameters), 0.0)

    def inactive(self, like: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Terms of a step in which the distiller is not run; ``like`` gives the device."""
        zero = like.new_zeros((), dtype=torch.float32) + self.zero()
        return {term: zero for term in self.weights}

    def load_teacher_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Copy initial values of own parameters from the teacher's state dict.

        Called once, before the optimizer exists and before a checkpoint is loaded, which therefore
        wins on --resume.
        """
        raise NotImplementedError

    def validate(
        self, student_keys: Mapping[str, KeyInfo], teacher_keys: Mapping[str, KeyInfo]
    ) -> None:
        """Raise ``ValueError`` if this pair of networks cannot be distilled.

        Called once before the first step. The base class checks that every needed key exists.
        """
        for side, needs, known in (
            ("student", self.student_needs, student_keys),
            ("teacher", self.teacher_needs, teacher_keys),
        ):
            for key in sorted(needs):
                if key not in known and not key.startswith("path:"):
                    raise ValueError(
                        f"{type(self).__name__} needs '{key}' of the {side}, which it does not "
                        f"have; similar: {near_matches(key, known, 8)}"
                    )

    def optimizer_overrides(self) -> Dict[str, Dict[str, float]]:
        """Return parameter name (relative to this module) -> {"lr_factor", "weight_decay"}."""
        return {}

    @classmethod
    def wants_teacher(cls, cfg: CfgNode) -> bool:
        """Return whether a distiller built from ``cfg`` needs a teacher, which is built before."""
        return cls.needs_teacher

    @property
    def label(self) -> str:
        """Name under which losses and scalars are logged; set by :func:`build_distillers`."""
        return getattr(self, "_label", type(self).__name__.lower())

    @classmethod
    def node_name(cls) -> str:
        """Return the name of this method's node below KD."""
        return cls.node or cls.__name__.upper()

    @classmethod
    def config_node(cls, cfg: CfgNode) -> CfgNode:
        """Return this method's node ``cfg.KD.<NODE>``."""
        return cfg.KD[cls.node_name()]


_MENDS = {
    "channels": "Give both the same width (e.g. MODEL.FPN.OUT_CHANNELS, CONV_DIM of the head), or "
    "use a method with an adapter",
    "strides": "Give both the same levels (e.g. IN_FEATURES of the head)",
    "signature": "Build both alike: give the student the teacher's value",
}


def require_equal(
    method: str,
    key: str,
    student_keys: Mapping[str, KeyInfo],
    teacher_keys: Mapping[str, KeyInfo],
    attributes: Iterable[str] = ("channels", "strides", "signature"),
) -> None:
    """Raise ``ValueError`` with key, both values and a mend unless the two sides agree on it."""
    for attribute in attributes:
        ours, theirs = (getattr(keys[key], attribute) for keys in (student_keys, teacher_keys))
        if ours != theirs:
            raise ValueError(
                f"{method} compares '{key}' of student and teacher, but their {attribute} differ: "
                f"student {ours}, teacher {theirs}. {_MENDS[attribute]}"
            )


def sigmoid_classes(method: str, side: str, keys: Mapping[str, KeyInfo]) -> int:
    """Return the number K of class scores that ``pred.cls`` of ``side`` has for an anchor.

    Raises:
        ValueError: they are no independent sigmoids but a softmax with background, as SSD's.
    """
    classes, *facts = keys["pred.cls"].signature
    if "softmax" in facts:
        raise ValueError(
            f"{method} takes class scores for sigmoids, but 'pred.cls' of the {side} is a softmax "
            f"over {classes} classes, the background included (SSD); use a method that compares "
            "feature maps, e.g. FitNets or PKD"
        )
    return classes


def build_distillers(
    cfg: CfgNode,
    student_keys: Mapping[str, KeyInfo],
    teacher_keys: Mapping[str, KeyInfo],
) -> Tuple[nn.ModuleDict, Dict[str, LossSchedule]]:
    """Build what ``KD.DISTILLERS`` lists.

    An entry is a registry name, which reads its own node ``KD.<NAME>``, or ``Name/label``, which
    reads ``KD.<LABEL>`` instead: several entries of one type. Labels are declared like any node.

    Returns:
        the distillers and their schedules, both by label.

    Raises:
        ValueError: empty list, unknown name, missing node, or an entry that occurs twice.
    """
    if not cfg.KD.DISTILLERS:
        raise ValueError(
            'KD.ENABLED is True but KD.DISTILLERS is empty; name at least one, e.g. ("CrossKD",)'
        )
    distillers: Dict[str, Distiller] = {}
    schedules: Dict[str, LossSchedule] = {}
    for entry in cfg.KD.DISTILLERS:
        cls, label, entry_cfg = _resolve(cfg, entry)
        if label in distillers:
            raise ValueError(f"KD.DISTILLERS lists '{label}' twice; give one a label: Name/label")
        distiller = cls(entry_cfg, student_keys, teacher_keys)
        distiller._label = label
        distiller.validate(student_keys, teacher_keys)
        distillers[label] = distiller
        node = cls.config_node(entry_cfg)
        schedules[label] = LossSchedule.from_node(node.SCHEDULE, cfg.SOLVER.MAX_ITER)
    return nn.ModuleDict(distillers), schedules


def teacher_wanted(cfg: CfgNode) -> bool:
    """Return whether anything that ``KD.DISTILLERS`` lists needs a teacher.

    Raises:
        ValueError: an unknown name or a missing node, as :func:`build_distillers`.
    """
    entries = [_resolve(cfg, entry) for entry in cfg.KD.DISTILLERS]
    return any(cls.wants_teacher(entry_cfg) for cls, _, entry_cfg in entries)


def _resolve(cfg: CfgNode, entry: str):
    name, _, label = entry.partition("/")
    known: List[str] = [n for n, _ in DISTILLER_REGISTRY]
    if name not in known:
        raise ValueError(
            f"KD.DISTILLERS names '{name}', which is not registered; known: "
            f"{', '.join(sorted(known))}; modules with your own are listed in KD.IMPORTS"
        )
    cls = DISTILLER_REGISTRY.get(name)
    node = cls.node_name()
    source = (label or node).upper()
    if source not in cfg.KD:
        raise ValueError(
            f"KD.DISTILLERS entry '{entry}' reads KD.{source}, which is not declared; add it with "
            "a function registered in kd_d2.config.CONFIG_NODES, in a module listed in KD.IMPORTS"
        )
    if source != node:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.KD[node] = cfg.KD[source].clone()
        cfg.freeze()
    return cls, (label or name).lower(), cfg
