"""Properties of CrossKD on real detectors that hold whatever the weights are."""

import copy

import pytest
import torch

from tests.fixtures import teacher_of, tiny_batch, tiny_model
from tests.projects.crosskd.cases import (
    DETECTORS,
    NUM_STAGES,
    Side,
    detector,
    gradients,
    kd_model,
    kd_terms,
    pair,
    run,
)

every_detector = pytest.mark.parametrize("name", list(DETECTORS))


@every_detector
@pytest.mark.parametrize("strategy", ["a", "b"])
def test_cross_predictions_of_equal_networks_are_the_teachers(name, strategy):
    """Without alignment bit for bit, at every position and branch: f_i^s = f_i^t."""
    student = detector(name)
    teacher = teacher_of(copy.deepcopy(student))
    calls = []

    class Watched(type(kd_model(name).distillers["crosskd"])):
        def _cross(self, ctx, branch):
            cross = super()._cross(ctx, branch)
            for output, levels in cross.items():
                if f"pred.{output}" not in self.teacher_needs:
                    continue
                for ours, theirs in zip(levels, ctx.teacher[f"pred.{output}"]):
                    calls.append((branch, output))
                    assert torch.equal(ours, theirs), (branch, output)
            return cross

    for position in range(NUM_STAGES + 1):
        model = kd_model(name, student, teacher, ALIGN="none", STRATEGY=strategy, POSITION=position)
        model.distillers["crosskd"].__class__ = Watched
        run(model, tiny_batch())
    outputs = {("cls", "cls"), ("reg", "box")} | ({("reg", "ctr")} if name == "ATSS" else set())
    assert set(calls) == outputs and len(calls) == 5 * len(outputs) * (NUM_STAGES + 1)


@every_detector
def test_equal_networks_have_nothing_to_learn(name):
    student = detector(name)
    teacher = teacher_of(copy.deepcopy(student))
    batch = tiny_batch()
    exact = kd_terms(run(kd_model(name, student, teacher, ALIGN="none"), batch))
    assert exact["cls"] == 0
    if name != "FCOS-d2":  # boxes of relu(x) <= 0 have no area, hence no IoU, even with themselves
        assert abs(exact["reg"]) < 1e-6
    # the 1e-6 beside the deviation shifts the predictions in the fourth digit
    aligned = kd_terms(run(kd_model(name, student, teacher), batch))
    usual = kd_terms(run(kd_model(name), batch))
    assert aligned["cls"] < 1e-3 * usual["cls"]
    assert (aligned["reg"] - exact["reg"]).abs() < 1e-3 * usual["reg"]
    # no gradient either, compared with that of a teacher that differs
    found = gradients(exact["cls"] + exact["reg"], student)
    reached = [g for g in found.values() if g is not None]
    other = gradients(usual["cls"] + usual["reg"], pair(name)[0])
    size = max(g.abs().max() for g in other.values() if g is not None)
    limit = {"GFL": 1e-5}.get(name, 1e-3) * size
    assert reached and max(g.abs().max() for g in reached) < limit
    if "ctr" in exact:  # an entropy remains
        assert exact["ctr"] > 0
        centerness = gradients(exact["ctr"], student).values()
        assert max(g.abs().max() for g in centerness if g is not None) < 1e-5


@every_detector
def test_zero_weights_are_plain_training(name):
    student = detector(name)
    batch = tiny_batch()
    plain = run(student, batch)
    expected = gradients(sum(plain.values()), student)
    fresh = detector(name)  # Detectron2's RetinaNet keeps a moving average
    zeros = {"CLS_WEIGHT": 0.0, "REG_WEIGHT": 0.0, "CTR_WEIGHT": 0.0}
    losses = run(kd_model(name, fresh, pair(name)[1], **zeros), batch)
    assert {k: v for k, v in losses.items() if not k.startswith("loss_kd/")} == plain
    found = gradients(sum(losses.values()), fresh)
    for parameter, gradient in expected.items():
        assert torch.equal(found[parameter], gradient), parameter
    active = run(kd_model(name, detector(name), pair(name)[1]), batch)
    assert {k: v for k, v in active.items() if not k.startswith("loss_kd/")} == plain


@every_detector
def test_detections_and_state_are_those_of_the_plain_detector(name):
    student = detector(name)
    plain = copy.deepcopy(student)
    model = kd_model(name, student, pair(name)[1])
    assert set(model.student.state_dict()) == set(plain.state_dict())
    assert {k.replace("student.", "", 1) for k in model.state_dict()} == set(plain.state_dict())
    assert not list(model.distillers.parameters()) and not list(model.distillers.buffers())
    batch = tiny_batch()
    model.eval(), plain.eval()
    with torch.no_grad():
        ours, theirs = model(batch), plain(batch)
    for a, b in zip(ours, theirs):
        a, b = a["instances"], b["instances"]
        assert torch.equal(a.pred_boxes.tensor, b.pred_boxes.tensor)
        assert torch.equal(a.scores, b.scores) and torch.equal(a.pred_classes, b.pred_classes)


def test_the_teacher_stays_as_it_is():
    teacher = teacher_of(tiny_model("GFL", 1))
    before = copy.deepcopy(teacher.model.state_dict())
    model = kd_model("GFL", detector("GFL"), teacher)
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for seed in range(3):
        optimizer.zero_grad()
        sum(run(model, tiny_batch(seed=seed)).values()).backward()
        optimizer.step()
    assert not any(m.training for m in teacher.model.modules())
    assert all(p.grad is None for p in teacher.model.parameters())
    for key, value in teacher.model.state_dict().items():
        assert torch.equal(value, before[key]), key


@every_detector
@pytest.mark.parametrize("num_gt", [0, (0, 2)])
def test_images_without_ground_truth(name, num_gt):
    losses = run(kd_model(name), tiny_batch(num_gt=num_gt))
    assert all(torch.isfinite(v) for v in losses.values())
    terms = kd_terms(losses)
    assert terms["cls"] > 0 and terms["reg"] > 0
    if num_gt == 0 and "ctr" in terms:
        assert terms["ctr"] == 0


@pytest.mark.parametrize("name", ["GFL", "RetinaNet", "FCOS"])
@pytest.mark.parametrize("sizes", [((33, 65),), ((97, 131), (130, 1))])
def test_odd_sizes(name, sizes):
    """Images of one odd size, and one that is a single column of pixels."""
    batch = tiny_batch(num_images=len(sizes) + 1, sizes=sizes, num_gt=0)
    losses = run(kd_model(name), batch)
    assert all(torch.isfinite(v) for v in losses.values())


def test_levels_of_a_single_cell():
    """One image, P6 and P7 of one cell: there are no statistics, hence no alignment, no NaN."""
    student, _ = pair("RetinaNet")
    batch = tiny_batch(num_images=1, sizes=((64, 64),), num_gt=1)
    terms = kd_terms(run(kd_model("RetinaNet"), batch))
    assert all(torch.isfinite(v) for v in terms.values())
    found = gradients(sum(terms.values()), student).values()
    assert all(torch.isfinite(g).all() for g in found if g is not None)


@every_detector
def test_half_precision(name):
    """Losses in fp32 and close to full precision; the gradients are finite."""
    student, _ = pair(name)
    batch = tiny_batch()
    full = kd_terms(run(kd_model(name), batch))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = kd_terms(run(kd_model(name), batch))
    assert set(half) == set(full)
    for term, value in half.items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, full[term], rtol=0.1, atol=1e-3, msg=term)
    found = gradients(sum(half.values()), student).values()
    assert all(torch.isfinite(g).all() for g in found if g is not None)


def test_alignment_is_computed_in_full_precision():
    """Features far from 0: in bf16, 1000 + x has no digits left for x."""
    distiller = kd_model("GFL").distillers["crosskd"]
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 32, 6, 5, generator=generator)
    moved = []
    sides = [
        Side({"head.cls[1]": [x]}, None, lambda b, s, f: moved.extend(f) or {})
        for x in (3 * student + 1000, teacher)
    ]
    ctx = type("Context", (), {"student": sides[0], "teacher": sides[1]})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distiller._cross(ctx, "cls")
    std, mean = torch.std_mean(teacher, dim=(0, 2, 3), keepdim=True)
    own_std, own_mean = torch.std_mean(student, dim=(0, 2, 3), keepdim=True)
    expected = ((student - own_mean) / own_std * std + mean).relu()
    torch.testing.assert_close(moved[0], expected, rtol=1e-3, atol=1e-3)


def test_crosskd_and_pkd_add_up():
    student, teacher = pair("GFL")
    batch = tiny_batch()
    both = run(kd_model("GFL", distillers=("CrossKD", "PKD")), batch)
    alone = [run(kd_model("GFL", distillers=(d,)), batch) for d in ("CrossKD", "PKD")]
    for losses in alone:
        for key, value in losses.items():
            assert torch.equal(both[key], value), key
    assert set(both) == set(alone[0]) | set(alone[1])

    def of_distillers(losses):
        return sum(v for k, v in losses.items() if k.startswith("loss_kd/"))

    total = gradients(of_distillers(both), student)
    parts = [gradients(of_distillers(losses), student) for losses in alone]
    for name, gradient in total.items():
        pair_of_parts = [p[name] for p in parts if p[name] is not None]
        assert (gradient is None) == (not pair_of_parts), name
        if gradient is not None:
            torch.testing.assert_close(gradient, sum(pair_of_parts), rtol=1e-3, atol=1e-5, msg=name)


@every_detector
def test_terms_are_the_same_in_every_step(name):
    model = kd_model(name)
    for num_gt in (2, 0):
        terms = kd_terms(run(model, tiny_batch(num_gt=num_gt)))
        assert tuple(terms) == model.distillers["crosskd"].terms
