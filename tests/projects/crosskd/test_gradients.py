"""Where the gradient of CrossKD arrives and where it does not; taken of the KD terms alone."""

import pytest
import torch

from tests.fixtures import tiny_batch, tiny_model
from tests.projects.crosskd import reference
from tests.projects.crosskd.cases import (
    NUM_STAGES,
    gradients,
    kd_model,
    kd_terms,
    pair,
    run,
)

_PREDICTORS = {"cls": ["cls_score"], "box": ["bbox_pred", "scales"]}


def _stage_of(model):
    """Parameter name -> (branch, stage), stage 0 the backbone, n + 1 a predictor."""
    result = {}
    for branch, subnet in (("cls", "cls_subnet"), ("box", "bbox_subnet")):
        stage = 1
        for index, module in enumerate(getattr(model.head, subnet)):
            for name, _ in module.named_parameters(f"head.{subnet}.{index}"):
                result[name] = (branch, stage)
            stage += isinstance(module, torch.nn.ReLU)
    for name, _ in model.named_parameters():
        if name.startswith("backbone."):
            result[name] = ("both", 0)
        for branch, modules in _PREDICTORS.items():
            if name.startswith(tuple(f"head.{m}" for m in modules)):
                result[name] = (branch, NUM_STAGES + 1)
        if name.startswith("head.ctrness"):
            where = reference.centerness_branch(model)
            result[name] = ({"cls": "cls", "reg": "box"}[where], "ctr")
    assert set(result) == {name for name, _ in model.named_parameters()}
    return result


def _expected(stage, strategy, position, has_ctr_loss):
    """Whether the parameters of a stage get a gradient: crosskd.md 1.2 and 5.1."""
    if stage == "ctr":
        stage = NUM_STAGES + 1
        if not has_ctr_loss:
            return False
    if position == NUM_STAGES + 1 or strategy in "bc":
        return True
    return stage <= position if strategy == "a" else stage > position


def _check_support(name, strategy, position):
    student, teacher = pair(name)
    model = kd_model(name, STRATEGY=strategy, POSITION=position)
    terms = kd_terms(run(model, tiny_batch()))
    found = gradients(sum(terms.values()), student)
    for parameter, (_, stage) in _stage_of(student).items():
        gradient, wanted = found[parameter], _expected(stage, strategy, position, "ctr" in terms)
        assert (gradient is not None) == wanted, (parameter, stage)
        # biases may get a zero: the gradient behind the alignment sums to 0 per channel
        if wanted and gradient.dim() > 1:
            assert gradient.abs().max() > 0, parameter
    assert not any(p.requires_grad for p in teacher.model.parameters())
    sum(terms.values()).backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    student.zero_grad(set_to_none=True)


@pytest.mark.parametrize("strategy", "abcd")
@pytest.mark.parametrize("position", range(NUM_STAGES + 2))
def test_support_gfl(strategy, position):
    _check_support("GFL", strategy, position)


@pytest.mark.parametrize("name", ["RetinaNet", "ATSS", "FCOS", "FCOS-d2"])
@pytest.mark.parametrize("strategy, position", [("a", 0), ("a", 1), ("a", 2), ("d", 1), ("b", 1)])
def test_support_of_other_detectors(name, strategy, position):
    _check_support(name, strategy, position)


@pytest.mark.parametrize("branch, untouched", [("cls", "bbox_subnet"), ("reg", "cls_subnet")])
def test_one_branch_leaves_the_other_tower_alone(branch, untouched):
    student, _ = pair("GFL")
    terms = kd_terms(run(kd_model("GFL", BRANCHES=(branch,)), tiny_batch()))
    found = gradients(terms[branch], student)
    for name, gradient in found.items():
        if untouched in name:
            assert gradient is None, name
    assert found["backbone.fpn_output3.weight"].abs().max() > 0


def test_each_term_has_its_own_position():
    student, _ = pair("GFL")
    model = kd_model("GFL", POSITION_CLS=0, POSITION_REG=2)
    found = gradients(sum(kd_terms(run(model, tiny_batch())).values()), student)
    assert all(found[n] is None for n in found if "cls_subnet" in n or "cls_score" in n)
    assert all(found[n] is not None for n in found if "bbox_subnet" in n)


@pytest.mark.parametrize("strategy, target_stages", [("b", "late"), ("c", "early")])
def test_gradients_into_the_target_on_request(strategy, target_stages):
    """The target of b is made by the student's stages > i, that of c by those <= i."""
    student, _ = pair("GFL")
    batch = tiny_batch()
    constant, free = (
        gradients(
            sum(kd_terms(run(kd_model("GFL", STRATEGY=strategy, DETACH_TARGET=d), batch)).values()),
            student,
        )
        for d in (True, False)
    )
    for name, (_, stage) in _stage_of(student).items():
        late = stage > 1
        if late == (target_stages == "late"):
            assert not torch.allclose(constant[name], free[name], rtol=1e-3), name
        else:
            torch.testing.assert_close(constant[name], free[name], rtol=1e-4, atol=1e-6, msg=name)


def test_values_do_not_depend_on_the_gradient_of_the_target():
    batch = tiny_batch()
    for strategy in "bc":
        constant, free = (
            kd_terms(run(kd_model("GFL", STRATEGY=strategy, DETACH_TARGET=d), batch))
            for d in (True, False)
        )
        assert constant == free


def test_alignment_centres_the_gradient_at_the_pyramid():
    """At i = 0 the gradient of the KD loss sums to 0 per channel and is orthogonal to the map."""
    student, _ = pair("GFL")
    levels = {}
    handle = student.backbone.register_forward_hook(lambda m, i, out: levels.update(out))
    terms = kd_terms(run(kd_model("GFL", POSITION=0), tiny_batch()))
    handle.remove()
    for level in levels.values():
        (gradient,) = torch.autograd.grad(sum(terms.values()), level, retain_graph=True)
        assert gradient.abs().sum() > 0
        scale = gradient.abs().sum(dim=(0, 2, 3))
        assert (gradient.sum(dim=(0, 2, 3)).abs() <= 1e-4 * scale + 1e-9).all()
        centred = level - level.mean(dim=(0, 2, 3), keepdim=True)
        product = (gradient * centred).sum(dim=(0, 2, 3)).abs()
        assert (product <= 1e-3 * (gradient * centred).abs().sum(dim=(0, 2, 3)) + 1e-9).all()


def test_dead_channel_stays_finite():
    """A channel that is 0 behind its ReLU everywhere has a finite gradient, 0 before the ReLU."""
    student = tiny_model("RetinaNet", 0)  # no norm in the towers
    with torch.no_grad():
        student.head.cls_subnet[0].bias[5] = -1e4
    model = kd_model("RetinaNet", student, pair("RetinaNet")[1])
    found = gradients(kd_terms(run(model, tiny_batch()))["cls"], student)
    assert all(g is None or torch.isfinite(g).all() for g in found.values())
    assert found["head.cls_subnet.0.weight"][5].abs().max() == 0
    assert found["head.cls_subnet.0.weight"].abs().max() > 0


# ------------------------------------------------------------------- positions that do not count


def _gradients_at_predictions(name, batch):
    """Output -> (N, R) largest gradient, of prediction mimicking; with the student's targets."""
    student, teacher = pair(name)
    outputs = []
    handle = student.head.register_forward_hook(lambda m, i, out: outputs.extend(out))
    terms = kd_terms(run(kd_model(name, POSITION=NUM_STAGES + 1), batch))
    handle.remove()
    ref = reference.Batch(student, teacher.model, batch)
    a = ref.anchors_per_cell
    result = {}
    for output, levels in zip(("cls", "box", "ctr"), outputs):
        found = torch.autograd.grad(
            sum(terms.values()), levels, retain_graph=True, allow_unused=True
        )
        if all(g is not None for g in found):
            dim = levels[0].shape[1] // a
            result[output] = reference.flat(found, a, dim).abs().amax(dim=-1)
    return result, ref


@pytest.mark.parametrize("name", ["GFL", "RetinaNet", "ATSS"])
def test_padding_and_ignored_anchors_do_not_count(name):
    found, ref = _gradients_at_predictions(name, tiny_batch(sizes=((128, 96), (64, 128))))
    assert not ref.inside.all() and ref.counted.any()
    for output in ("cls", "box"):
        assert found[output][~ref.counted].max() == 0, output
        assert (found[output][ref.counted] > 0).float().mean() > 0.95
    if name == "RetinaNet":
        ignored = ref.inside & (ref.labels == -1)
        assert ignored.any() and found["cls"][ignored].max() == 0
    if name == "ATSS":
        assert torch.equal(found["ctr"] > 0, ref.positive)


@pytest.mark.parametrize("name", ["FCOS", "FCOS-d2"])
def test_padding_counts_for_fcos(name):
    found, ref = _gradients_at_predictions(name, tiny_batch(sizes=((128, 96), (64, 128))))
    assert (found["cls"][~ref.inside] > 0).all()
    assert found["box"][~ref.inside].max() > 0 and "ctr" not in found
