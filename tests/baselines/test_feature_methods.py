"""What every feature-imitation baseline must do, with each detector it works for.

All methods distil the same student at once: they share its forward pass, and the teacher's. Values
that belong to one method are in its own file.
"""

import copy
import functools

import pytest
import torch
from detectron2.utils.events import EventStorage

from kd_d2.baselines import CWD, FGD, SKD, FitNets
from kd_d2.distillation import DISTILLER_REGISTRY, KDModel
from tests.baselines.feature_cases import ToyContext, kd_model, level_keys, networks, run_step
from tests.fixtures import DENSE, teacher_of, tiny_batch, tiny_model

DETECTORS = (*DENSE, "GeneralizedRCNN")
# label -> (method, options, terms)
METHODS = {
    "fitnets": ("FitNets", {}, {"feat"}),
    "inside_gt": ("InsideGT", {}, {"feat"}),
    "main_region": ("MainRegion", {}, {"feat"}),
    "fine_grained": ("FineGrained", {}, {"feat"}),
    "fgfi": ("FGFI", {}, {"feat"}),
    "fgfi_fpn": ("FGFI", {"VARIANT": "fpn"}, {"feat"}),
    "tadf": ("TADF", {}, {"feat"}),
    "defeat": ("DeFeat", {}, {"fg", "bg"}),
    "fgd": ("FGD", {}, {"fg", "bg", "attention", "relation"}),
    "pkd": ("PKD", {}, {"feat"}),
    "cwd": ("CWD", {}, {"cls"}),
    "cwd_neck": ("CWD", {"LOCATION": "neck"}, {"neck"}),
    "mgd": ("MGD", {}, {"feat"}),
    "skd": ("SKD", {}, {"feat"}),
    "frs": ("FRS", {}, {"feat", "cls"}),
    "pfi": ("PFI", {}, {"feat"}),
}
# CWD on class logits is not defined for two-stage detectors
DENSE_ONLY = {"cwd"}
# no loss on a batch without ground truth; the others look elsewhere, too
NEEDS_GROUND_TRUTH = {"inside_gt", "main_region", "fine_grained", "fgfi", "fgfi_fpn", "tadf"}
LEARNS = {"fitnets", "fgfi", "fgfi_fpn", "tadf", "defeat", "fgd", "mgd", "frs"}
# a width of the teacher that is not the student's
ADAPTS = LEARNS | {"skd", "pfi"}
# terms that are 0 when the teacher is the student, with identity adapters
VANISHING = {
    "fitnets": ({"ADAPTER": "none"}, {"feat"}),
    "inside_gt": ({}, {"feat"}),
    "main_region": ({}, {"feat"}),
    "fine_grained": ({}, {"feat"}),
    "fgd": ({}, {"fg", "bg", "attention", "relation"}),
    "pkd": ({}, {"feat"}),
    "cwd": ({}, {"cls"}),
    "cwd_neck": ({}, {"neck"}),
    "skd": ({}, {"feat"}),
    "frs": ({"ADAPTER": "none"}, {"feat"}),
    "pfi": ({}, {"feat"}),
}


def _distiller(label, student, teacher, arch, **options):
    name, own, _ = METHODS[label]
    return kd_model(name, student, teacher, arch, **{**own, **options}).distillers[name.lower()]


def _labels(arch, labels=METHODS):
    return [label for label in labels if arch in DENSE or label not in DENSE_ONLY]


def _model(student, teacher, arch, labels=METHODS, options=None) -> KDModel:
    """Return a model that distils by all methods of ``labels`` that are defined for ``arch``."""
    distillers = {}
    for label in _labels(arch, labels):
        own = (options or {}).get(label, {})
        distillers[label] = _distiller(label, student, teacher, arch, **own)
        distillers[label]._label = label
    return KDModel(student=student, distillers=distillers, teacher=teacher)


def _terms(losses):
    """label -> term -> value."""
    result = {}
    for name, value in losses.items():
        if name.startswith("loss_kd/"):
            _, label, term = name.split("/")
            result.setdefault(label, {})[term] = value
    return result


def _state(module):
    return {k: v.clone() for k, v in module.state_dict().items()}


@pytest.mark.parametrize("arch", DETECTORS)
def test_two_steps(arch):
    """Losses are finite and positive, adapters and student learn, the teacher stays as it is."""
    student, teacher = networks(arch)
    model = _model(student, teacher, arch)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    frozen, student_before = _state(teacher.model), _state(student)
    before = copy.deepcopy(dict(model.distillers.named_parameters()))
    for iteration in range(2):
        with EventStorage(iteration):
            losses = model(tiny_batch(seed=iteration))
        found = _terms(losses)
        assert set(found) == set(_labels(arch))
        for label, terms in found.items():
            assert set(terms) == METHODS[label][2]
            for term, value in terms.items():
                assert torch.isfinite(value) and value.dtype == torch.float32, (label, term)
                assert value > 0, (label, term)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    assert all(torch.equal(frozen[k], v) for k, v in teacher.model.state_dict().items())
    assert all(p.grad is None for p in teacher.model.parameters())
    changed = {n for n, p in model.distillers.named_parameters() if not torch.equal(p, before[n])}
    assert {name.split(".")[0] for name in changed} == LEARNS
    assert any(not torch.equal(student_before[k], v) for k, v in student.state_dict().items())


def test_gradient_support():
    """The student up to its pyramid, and every adapter; heads only where they are compared."""
    model = _model(*networks(), "GFL")
    found = _terms(run_step(model, tiny_batch()))
    names, parameters = zip(*[(n, p) for n, p in model.named_parameters() if p.requires_grad])
    for label, terms in found.items():
        grads = torch.autograd.grad(
            sum(terms.values()), parameters, retain_graph=True, allow_unused=True
        )
        reached = {n for n, g in zip(names, grads) if g is not None and g.abs().max() > 0}
        own = {n for n in names if n.startswith(f"distillers.{label}.")}
        assert bool(own) == (label in LEARNS), label
        connected = {n for n, g in zip(names, grads) if g is not None}
        assert own <= connected, label
        assert not own or own & reached, label
        assert "student.backbone.bottom_up.stem.conv1.weight" in reached, label
        assert not any(n.startswith("distillers.") for n in reached - own), label
        head = {n for n in reached if n.startswith("student.head.")}
        if label in ("cwd", "frs"):
            assert head and not any("bbox" in n for n in head), label
        else:
            assert not head, label


@pytest.mark.parametrize("arch", ["GFL", "GeneralizedRCNN"])
def test_equal_networks_cost_nothing(arch):
    student, teacher = tiny_model(arch, 0), teacher_of(tiny_model(arch, 0))
    options = {label: own for label, (own, _) in VANISHING.items()}
    found = _terms(run_step(_model(student, teacher, arch, VANISHING, options), tiny_batch()))
    for label, terms in found.items():
        for term in VANISHING[label][1]:
            # KL of equal logits and SSIM of equal maps are 0 up to rounding
            assert abs(terms[term].item()) < 1e-4, (label, term)
    assert (
        _terms(run_step(_model(student, teacher, arch, ["mgd"]), tiny_batch()))["mgd"]["feat"] > 0
    )


@pytest.mark.parametrize("arch", ["GFL", "GeneralizedRCNN"])
def test_no_ground_truth(arch):
    """Finite values, the same terms, gradients that DDP can wait for."""
    model = _model(*networks(arch), arch)
    losses = run_step(model, tiny_batch(num_gt=0))
    for label, terms in _terms(losses).items():
        assert set(terms) == METHODS[label][2]
        assert all(torch.isfinite(v) for v in terms.values()), label
        if label in NEEDS_GROUND_TRUTH:
            assert all(v == 0 for v in terms.values()), label
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.distillers.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad is None or torch.isfinite(parameter.grad).all(), name


@functools.lru_cache(maxsize=1)
def _full_precision():
    model = _model(*networks(), "GFL")
    return model, {
        label: {term: value.detach() for term, value in terms.items()}
        for label, terms in _terms(run_step(model, tiny_batch())).items()
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype):
    """Autocast: fp32 losses near those in full precision, and finite gradients."""
    model, full = _full_precision()
    with torch.autocast("cpu", dtype=dtype):
        half = _terms(run_step(model, tiny_batch()))
    for label, terms in half.items():
        for term, value in terms.items():
            assert value.dtype == torch.float32 and torch.isfinite(value), (label, term)
            if label != "mgd":  # another mask
                torch.testing.assert_close(value, full[label][term], rtol=0.2, atol=1e-3)


def test_heterogeneous_strides():
    """A two-stage teacher (P2-P6) teaches RetinaNet (P3-P7) on what they share, or it is said."""
    student, teacher = networks("RetinaNet", "GeneralizedRCNN")
    for label in ("cwd", "frs", "pfi"):
        message = f"{METHODS[label][0]} .*'pred.cls'.*the teacher has none"
        with pytest.raises(ValueError, match=message):
            _distiller(label, student, teacher, "RetinaNet")
    labels = [label for label in METHODS if label not in ("cwd", "frs", "pfi")]
    options = {"pkd": {"LEVELS": (0, 1, 2, 3)}}
    model = _model(student, teacher, "RetinaNet", labels, options)
    for label, terms in _terms(run_step(model, tiny_batch())).items():
        assert set(terms) == METHODS[label][2]
        assert all(torch.isfinite(v) and v > 0 for v in terms.values()), label


def test_widths_that_differ():
    """Adapters make them equal; without one the message says which widths, before any step."""
    student, teacher = networks(**{"MODEL.FPN.OUT_CHANNELS": 48})
    for label in set(METHODS) - ADAPTS - {"cwd"}:
        with pytest.raises(ValueError, match="student 32, teacher 48|32 channels in the student a"):
            _distiller(label, student, teacher, "GFL")
    labels = sorted(ADAPTS | {"cwd"})  # CWD compares predictions, whatever the pyramid's width
    for label, terms in _terms(
        run_step(_model(student, teacher, "GFL", labels), tiny_batch())
    ).items():
        assert all(torch.isfinite(v) and v > 0 for v in terms.values()), label


@pytest.mark.parametrize("label", METHODS)
def test_facts_are_given(label):
    info = DISTILLER_REGISTRY.get(METHODS[label][0]).info
    assert info.title and info.paper and info.compares and info.requires and info.gains


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_maps_without_autocast(dtype):
    """Large half-precision features: squares beyond 65504 stay finite in fp32."""
    torch.manual_seed(0)
    maps = [300 * torch.randn(2, 2, 4, 4), 300 * torch.randn(2, 2, 4, 4)]
    keys = level_keys()
    cases = {
        FitNets: {"adapter": "none"},
        SKD: {},
        FGD: {},
        CWD: {"location": "neck"},
    }
    for cls, options in cases.items():
        distiller = cls(student_keys=keys, teacher_keys=keys, **options)
        values = {}
        for precision in (torch.float32, dtype):
            # both runs see the rounded values
            student, teacher = (x.to(dtype).to(precision).requires_grad_() for x in maps)
            ctx = ToyContext({"neck": [student]}, {"neck": [teacher]}, [[(0, 0, 16, 16)], ()])
            values[precision] = distiller(ctx)
            sum(values[precision].values()).backward()
            assert torch.isfinite(student.grad).all() and teacher.grad is None, cls
        for term, value in values[dtype].items():
            torch.testing.assert_close(value, values[torch.float32][term])
