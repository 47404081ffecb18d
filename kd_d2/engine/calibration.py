"""How strongly each distillation term pulls at the student, and the weights for a given pull.

Values of losses say little about their influence: PKD's 0.3 can move a pyramid more than a
detection loss of 2. Compared are therefore the norms of gradients, as ``kd_grad_ratio/...`` does
during training.
"""

import itertools
import math
import statistics
from dataclasses import dataclass
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from detectron2.config import CfgNode
from detectron2.utils.events import EventStorage
from torch import nn

from kd_d2.checkpoint import KDCheckpointer
from kd_d2.distillation import Gradient, KDModel, ModuleRecorder, compare_gradients

from .init_student import FrozenStatistics, copy_from_teacher
from .trainer import KDTrainer, check_classes

__all__ = [
    "Pull",
    "Run",
    "Spread",
    "build_run",
    "measure",
    "step_gradients",
    "train",
    "train_distillers",
    "training_update",
    "warnings_of",
]

GROUPS = ("pyramid", "parameters")
DETECTION, EVERYTHING = "detection", "all distillers"
# a term whose largest ratio exceeds its median by this factor is warned about
EXPLODING = 10.0


@dataclass(frozen=True)
class Spread:
    """Mean, standard deviation (of the sample), median, least and largest of the finite values.

    Attributes:
        broken: indices of the values that are NaN or infinite.
    """

    mean: float
    std: float
    median: float
    min: float
    max: float
    broken: Tuple[int, ...] = ()

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the facts of ``values``; all NaN if none is finite."""
        finite = [v for v in values if math.isfinite(v)]
        broken = tuple(i for i, v in enumerate(values) if not math.isfinite(v))
        if not finite:
            return cls(*[math.nan] * 5, broken)
        std = statistics.stdev(finite) if len(finite) > 1 else 0.0
        return cls(
            statistics.fmean(finite),
            std,
            statistics.median(finite),
            min(finite),
            max(finite),
            broken,
        )


@dataclass(frozen=True)
class Pull:
    """What was measured of one loss over the iterations.

    Attributes:
        name: "<label>/<term>", "<label>" (all terms of a distiller), "all distillers" or
            "detection" (all losses of the detector itself).
        raw: unweighted value; None for sums.
        weight: factor of the term in the total loss; None for sums.
        norms: group ("pyramid", "parameters") -> norm of the gradient.
        ratios: the same divided by that of "detection", iteration by iteration.
        cosines: group -> cosine of the gradients of this loss and of "detection"; below 0 they
            pull against each other.
    """

    name: str
    raw: Optional[Spread]
    weight: Optional[float]
    norms: Dict[str, Spread]
    ratios: Dict[str, Spread]
    cosines: Dict[str, Spread]


class Run(NamedTuple):
    """A training run of one process before its first step.

    Attributes:
        cfg, model: as they are trained.
        batches: endless training data.
        random_head: most of what the student has behind its backbone was not loaded. Last layers
            start near 0, so the detector's own gradient at the pyramid is far below what it is
            after some iterations, and ratios are far too large.
    """

    cfg: CfgNode
    model: KDModel
    batches: Iterator[List[Dict[str, Any]]]
    random_head: bool


def build_run(cfg: CfgNode) -> Run:
    """Build and load what ``cfg`` trains; nothing is written.

    Raises:
        ValueError: KD is off, or whatever stops training: see :class:`KDTrainer`.
    """
    if not cfg.KD.ENABLED:
        raise ValueError("KD.ENABLED is False: there is no distillation to calibrate")
    cfg = KDTrainer.auto_scale_workers(cfg, 1)
    model = KDTrainer.build_model(cfg)
    loader = KDTrainer.build_train_loader(cfg)
    check_classes(cfg, model.student, model.teacher)
    head = {
        name: parameter
        for name, parameter in model.student.named_parameters()
        if not name.startswith("backbone.")
    }
    before = {name: parameter.detach().clone() for name, parameter in head.items()}
    checkpointer = KDCheckpointer(model.student, allow_unsafe=cfg.KD.ALLOW_UNSAFE_LOAD)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=False)
    inherited = cfg.KD.INIT_STUDENT
    if inherited.PREFIXES and model.teacher is not None:
        copy_from_teacher(model.student, model.teacher.state_to_copy(), inherited.PREFIXES)
    untouched = sum(p.numel() for name, p in head.items() if torch.equal(p, before[name]))
    model.train()
    if inherited.FREEZE:
        FrozenStatistics(model.student, inherited.PREFIXES).before_step()
    random_head = untouched > sum(p.numel() for p in head.values()) / 2
    return Run(cfg, model, iter(loader), random_head)


def train(
    model: nn.Module,
    batches: Iterator[List[Dict[str, Any]]],
    iterations: int,
    update: Callable[[torch.Tensor], None],
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Train for ``iterations`` steps as the config says, without measuring anything.

    Args:
        model: a :class:`KDModel`, or its student alone for detection losses only.
        batches: training data, endless.
        iterations: number of steps.
        update: called with the total loss of each.
        progress: wraps the steps, e.g. in a progress bar.
    """
    for i, batch in enumerate(progress(itertools.islice(batches, iterations))):
        with EventStorage(i):
            total = sum(model(batch).values())
        update(total)


def train_distillers(
    cfg: CfgNode,
    model: KDModel,
    batches: Iterator[List[Dict[str, Any]]],
    iterations: int,
    *,
    progress: Callable[[Iterable], Iterable] = iter,
) -> None:
    """Train adapters and fill queues for ``iterations`` steps while the student stands still.

    Otherwise the first gradients measured are those of random adapters. Optimizer and learning
    rates are the config's; schedules of the distillers are left out.
    """
    trained = [p for p in model.student.parameters() if p.requires_grad]
    schedules, model.schedules = model.schedules, {}
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        if any(p.requires_grad for p in model.distillers.parameters()):
            update = training_update(cfg, model)
        else:
            update = _nothing
        train(model, batches, iterations, update, progress=progress)
    finally:
        model.schedules = schedules
        for parameter in trained:
            parameter.requires_grad_(True)


def _nothing(total: torch.Tensor) -> None:
    """An update where there is nothing to train."""


def training_update(cfg: CfgNode, model: KDModel) -> Callable[[torch.Tensor], None]:
    """Return a function that takes the total loss and does the run's next optimizer step."""
    optimizer = KDTrainer.build_optimizer(cfg, model)
    scheduler = KDTrainer.build_lr_scheduler(cfg, optimizer)

    def update(total: torch.Tensor) -> None:
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        scheduler.step()

    return update


def step_gradients(
    model: KDModel, batched_inputs: List[Dict[str, Any]], iteration: int = 0
) -> Tuple[Dict[str, Dict[str, Gradient]], Dict[str, float], torch.Tensor]:
    """Return gradients of every loss, unweighted values of the terms, and the total loss.

    Norms, and cosines with the detection losses, are by the names of :class:`Pull` and by group;
    schedules count as in training.
    """
    recorder = ModuleRecorder(model.student, ["backbone"])
    with EventStorage(iteration) as storage, recorder:
        losses = model(batched_inputs)
    pyramid = recorder.single("backbone").output.values()
    inputs = {
        "pyramid": [x for x in pyramid if x.requires_grad],
        "parameters": [p for p in model.student.parameters() if p.requires_grad],
    }
    pulls = {
        f"{label}/{term}": losses.pop(f"loss_kd/{label}/{term}")
        for label, distiller in model.distillers.items()
        for term in distiller.terms
    }
    sums = {
        label: sum(pulls[f"{label}/{term}"] for term in distiller.terms)
        for label, distiller in model.distillers.items()
    }
    detection, everything = sum(losses.values()), sum(pulls.values())
    pulls.update(sums)
    pulls.update({EVERYTHING: everything, DETECTION: detection})
    raw = {
        name[len("kd_raw/") :]: value
        for name, (value, _) in storage.latest().items()
        if name.startswith("kd_raw/")
    }
    return compare_gradients(pulls, inputs, DETECTION), raw, detection + everything


def measure(
    model: KDModel,
    batches: Iterable[List[Dict[str, Any]]],
    iterations: int,
    *,
    update: Optional[Callable[[torch.Tensor], None]] = None,
    progress: Callable[[Iterable], Iterable] = iter,
) -> List[Pull]:
    """Return what ``iterations`` training iterations show, the sums behind their terms.

    Schedules are left out: a term is measured at its full strength.

    Args:
        model: in training mode; its weights change only through ``update``.
        batches: training data, endless.
        update: called with the total loss after each iteration, e.g. to train on.
        progress: wraps the iterations, e.g. in a progress bar.

    Raises:
        ValueError: no iteration, or nothing of the student can be trained.
    """
    if iterations < 1:
        raise ValueError(f"the number of iterations must be at least 1, got {iterations}")
    if not any(p.requires_grad for p in model.student.parameters()):
        raise ValueError(
            "no parameter of the student is trained: MODEL.BACKBONE.FREEZE_AT and "
            "KD.INIT_STUDENT.FREEZE leave nothing that distillation could change"
        )
    schedules, model.schedules = model.schedules, {}
    gradients, raws = [], []
    try:
        for i, batch in enumerate(progress(itertools.islice(batches, iterations))):
            gradient, raw, total = step_gradients(model, batch, i)
            gradients.append(gradient)
            raws.append(raw)
            if update is not None:
                update(total)
    finally:
        model.schedules = schedules
    return _pulls(model, gradients, raws)


def _pulls(model: KDModel, steps: List[Dict], raws: List[Dict]) -> List[Pull]:
    weights = {
        f"{label}/{term}": weight
        for label, distiller in model.distillers.items()
        for term, weight in distiller.weights.items()
    }
    order = []
    for label, distiller in model.distillers.items():
        order += [f"{label}/{term}" for term in distiller.terms]
        order += [label] if len(distiller.terms) > 1 else []
    order += ([EVERYTHING] if len(model.distillers) > 1 else []) + [DETECTION]
    return [
        Pull(
            name=name,
            raw=Spread.of([raw[name] for raw in raws]) if name in weights else None,
            weight=weights.get(name),
            norms={g: Spread.of([step[name][g].norm for step in steps]) for g in GROUPS},
            ratios={
                g: Spread.of(
                    [_ratio(step[name][g].norm, step[DETECTION][g].norm) for step in steps]
                )
                for g in GROUPS
            },
            cosines={g: Spread.of([step[name][g].cosine for step in steps]) for g in GROUPS},
        )
        for name in order
    ]


def _ratio(norm: float, detection: float) -> float:
    return norm / detection if detection else math.nan


def warnings_of(pulls: Sequence[Pull]) -> List[str]:
    """Return a sentence for every loss that cannot be calibrated as it is, or hardly."""
    result = []
    for pull in pulls:
        broken = sorted({i for s in (*pull.norms.values(), pull.raw) if s for i in s.broken})
        if broken:
            shown = ", ".join(map(str, broken[:5])) + (", ..." if len(broken) > 5 else "")
            result.append(
                f"{pull.name}: NaN or infinite in {len(broken)} iterations ({shown}); they are "
                "left out here, and would end training"
            )
        norm = pull.norms["pyramid"] if pull.norms["pyramid"].max else pull.norms["parameters"]
        if pull.weight == 0:
            result.append(
                f"{pull.name}: its weight is 0, so nothing can be measured; give it any other one"
            )
        elif pull.raw is not None and pull.raw.min == pull.raw.max == 0:
            result.append(
                f"{pull.name}: exactly 0 in every iteration: it teaches nothing; check its "
                "region, position and taps"
            )
        elif norm.max == 0:
            result.append(f"{pull.name}: no gradient reaches the student")
        elif pull.name != DETECTION:
            result += _spread_warning(pull)
    return result


def _spread_warning(pull: Pull) -> List[str]:
    ratio = pull.ratios["pyramid"]
    if not ratio.max > EXPLODING * ratio.median:
        return []
    if ratio.median == 0:
        return [f"{pull.name}: it pulls in less than half of the iterations; the mean says little"]
    times = ratio.max / ratio.median
    return [f"{pull.name}: its pull varies a lot, up to {times:.3g} times the median"]
