"""KDModel: the student's losses are untouched, the teacher stays what it was, terms add up."""

import copy
import logging

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from kd_d2.distillation import Distiller, KDModel, LossSchedule
from kd_d2.engine.resume import settle_scripted_losses
from kd_d2.losses.imitation import pkd_loss
from tests.fixtures import teacher_of, tiny_batch, tiny_model


def _batch(**kwargs):
    return tiny_batch(**{"sizes": [(64, 90), (48, 60)], **kwargs})


class Imitation(Distiller):
    """Mean squared difference of the finest two levels, the student's through an adapter."""

    def __init__(self, weight=0.7):
        super().__init__(
            weights={"p3": weight, "p4": 2 * weight},
            student_needs=("neck.p3", "neck.p4"),
            teacher_needs=("neck.p3", "neck.p4"),
        )
        self.adapter = nn.Conv2d(32, 32, 1)
        generator = torch.Generator().manual_seed(8)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)

    def compute(self, ctx):
        return {
            name: ((self.adapter(ctx.student[f"neck.{name}"]) - ctx.teacher[f"neck.{name}"]) ** 2)
            .float()
            .mean()
            for name in ("p3", "p4")
        }


class Mimic(Distiller):
    """Mean absolute difference of the raw logits; no parameters."""

    def __init__(self, weight=0.3):
        super().__init__(
            weights={"cls": weight}, student_needs=("pred.cls",), teacher_needs=("pred.cls",)
        )

    def compute(self, ctx):
        pairs = zip(ctx.student["pred.cls"], ctx.teacher["pred.cls"])
        return {"cls": sum((a - b).float().abs().mean() for a, b in pairs)}


class Spy(Distiller):
    """Keeps the context; needs no teacher."""

    needs_teacher = False

    def __init__(self):
        super().__init__(weights={"none": 1.0}, student_needs=("pred.cls", "assign"))

    def compute(self, ctx):
        self.ctx = ctx
        return {"none": ctx.student["pred.cls"][0].float().mean() * 0}


def _teacher(**overrides):
    return teacher_of(tiny_model("RetinaNet", seed=5, **overrides))


def _kd_model(distillers=None, family="RetinaNet", teacher=None, **kwargs):
    distillers = {"imitation": Imitation(), "mimic": Mimic()} if distillers is None else distillers
    model = KDModel(
        student=tiny_model(family), distillers=distillers, teacher=teacher or _teacher(), **kwargs
    )
    for label, distiller in model.distillers.items():
        distiller._label = label
    return model.train()


def _losses(model, batch=None, iteration=0):
    with EventStorage(iteration) as storage:
        torch.manual_seed(0)  # of the sampling in two-stage detectors
        losses = model(batch or _batch())
    return losses, storage


def _plain(family="RetinaNet", batch=None):
    student = tiny_model(family)
    losses, _ = _losses(student, batch)
    sum(losses.values()).backward()
    return losses, {name: p.grad for name, p in student.named_parameters()}


def _kd_part(losses):
    return {k: v for k, v in losses.items() if k.startswith("loss_kd/")}


def _same_gradients(module, expected, prefix=""):
    for name, parameter in module.named_parameters():
        want = expected[prefix + name]
        if want is None:
            assert parameter.grad is None, name
        else:
            assert torch.equal(parameter.grad, want), name


# ------------------------------------------------------------------------------------- the losses
def test_terms_join_the_students_own_losses():
    model = _kd_model()
    losses, _ = _losses(model)
    plain, _ = _plain()
    names = ["loss_kd/imitation/p3", "loss_kd/imitation/p4", "loss_kd/mimic/cls"]
    assert sorted(losses) == sorted([*plain, *names])
    assert all(torch.equal(losses[k], v) for k, v in plain.items())
    # independent values, from separate passes of both networks
    with torch.no_grad():
        student = tiny_model("RetinaNet")
        images = student.preprocess_image(_batch()).tensor
        ours, theirs = student.backbone(images), model.teacher.model.backbone(images)
        adapter = model.distillers["imitation"].adapter
        for name, weight in (("p3", 0.7), ("p4", 1.4)):
            adapted = torch.einsum("oc,nchw->nohw", adapter.weight[..., 0, 0], ours[name])
            adapted = adapted + adapter.bias.view(1, -1, 1, 1)
            expected = weight * ((adapted - theirs[name]) ** 2).mean()
            torch.testing.assert_close(losses[f"loss_kd/imitation/{name}"], expected)
        predictions = [
            m.head([f[n] for n in m.head_in_features])[0]
            for m, f in ((student, ours), (model.teacher.model, theirs))
        ]
        expected = 0.3 * sum((a - b).abs().mean() for a, b in zip(*predictions))
        torch.testing.assert_close(losses["loss_kd/mimic/cls"], expected)


@pytest.mark.parametrize("family", ["RetinaNet", "GeneralizedRCNN", "SSD"])
def test_the_context_has_the_students_normalised_images(family):
    """The very tensor that the network read, padded; a distiller without teacher gets it, too."""
    distiller = Spy()
    distiller.student_needs = frozenset()
    distiller.compute = lambda ctx: {"none": ctx.images.mean()}
    model = KDModel(student=tiny_model(family), distillers={"none": distiller}, teacher=None)
    batch = tiny_batch(sizes=((128, 128),)) if family == "SSD" else _batch()
    read = []
    model.student.backbone.register_forward_hook(lambda m, inputs, output: read.append(inputs[0]))
    losses, _ = _losses(model.train(), batch)
    expected = model.student.preprocess_image(batch).tensor
    torch.testing.assert_close(losses["loss_kd/none/none"], expected.mean())
    with EventStorage(), model.tap.observe(model.student, ["path:backbone"]) as observation:
        model.student(batch)
    ctx = model._context(batch, observation, 0)
    assert ctx.images is read[-1] and torch.equal(ctx.images, expected)
    assert tuple(ctx.images.shape[-2:]) == ctx.padded_size


def test_two_distillers_together_are_the_sum_of_each_alone():
    makers = {"imitation": Imitation, "mimic": Mimic}
    gradients, values = {}, {}
    for labels in (("imitation",), ("mimic",), ("imitation", "mimic")):
        model = _kd_model({label: makers[label]() for label in labels})
        losses = _kd_part(_losses(model)[0])
        sum(losses.values()).backward()
        values[labels] = losses
        gradients[labels] = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    both = ("imitation", "mimic")
    assert set(values[both]) == set(values[both[:1]]) | set(values[both[1:]])
    for labels in (both[:1], both[1:]):
        assert all(torch.equal(values[both][k], v) for k, v in values[labels].items())
    assert set(gradients[both]) == set(gradients[both[:1]]) | set(gradients[both[1:]])
    for name, gradient in gradients[both].items():
        parts = [gradients[labels].get(name) for labels in (both[:1], both[1:])]
        expected = sum(part for part in parts if part is not None)
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_distillers_share_one_pass_of_the_teacher():
    calls = []
    teacher = _teacher()
    for name in ("backbone", "head"):
        getattr(teacher.model, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    _losses(_kd_model({"a": Imitation(), "b": Mimic(), "c": Imitation()}, teacher=teacher))
    assert calls == ["backbone", "head"]


def test_stages_that_nobody_needs_do_not_run():
    teacher = _teacher()
    teacher.model.head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    losses, _ = _losses(_kd_model({"imitation": Imitation()}, teacher=teacher))
    assert losses["loss_kd/imitation/p3"] > 0


@pytest.mark.parametrize("family", ["RetinaNet", "GFL", "GeneralizedRCNN"])
def test_weights_zero_leave_the_students_gradients_bit_identical(family):
    # Detectron2's scripted focal loss rounds differently the first time that a process calls it
    settle_scripted_losses(tiny_model(family))
    distillers = {"imitation": Imitation(0.0)}
    if family == "RetinaNet":
        distillers["mimic"] = Mimic(0.0)
    model = _kd_model(distillers, family)
    losses, _ = _losses(model)
    sum(losses.values()).backward()
    plain, gradients = _plain(family)
    assert all(torch.equal(losses[k], v) for k, v in plain.items())
    assert all(v.item() == 0.0 for v in _kd_part(losses).values())
    _same_gradients(model.student, gradients)
    assert all((p.grad == 0).all() for p in model.distillers.parameters())


# ---------------------------------------------------------------------------------------- schedule
class _CountingTeacher:
    """Stands before a teacher and counts how often a batch is started."""

    def __init__(self, teacher):
        self._teacher, self.starts = teacher, 0

    def start(self, *args):
        self.starts += 1
        return self._teacher.start(*args)

    def __getattr__(self, name):
        return getattr(self._teacher, name)


@pytest.mark.parametrize("iteration", [0, 4, 8])
def test_before_and_after_its_schedule_a_distiller_is_a_connected_zero(iteration):
    teacher = _CountingTeacher(_teacher())
    schedules = {label: LossSchedule(5, 8) for label in ("imitation", "mimic")}
    model = _kd_model(teacher=teacher, schedules=schedules)
    losses, storage = _losses(model, iteration=iteration)
    assert teacher.starts == 0
    kd = _kd_part(losses)
    assert len(kd) == 3 and all(v.item() == 0.0 for v in kd.values())
    sum(losses.values()).backward()
    assert all((p.grad == 0).all() for p in model.distillers.parameters())
    assert len(list(model.distillers.parameters())) == 2
    _same_gradients(model.student, _plain()[1])
    assert storage.latest()["kd_factor/imitation"][0] == 0.0
    assert not any(name.startswith("kd_raw") for name in storage.latest())


def test_keys_are_the_same_in_every_step_and_values_follow_the_factor():
    teacher = _CountingTeacher(_teacher())
    schedules = {"imitation": LossSchedule(1, 5, warmup_iters=1), "mimic": LossSchedule(4, 9)}
    model = _kd_model(teacher=teacher, schedules=schedules)
    seen = [_losses(model, iteration=i)[0] for i in range(6)]
    assert all(list(losses) == list(seen[0]) for losses in seen)
    imitation = [losses["loss_kd/imitation/p3"].item() for losses in seen]
    full = imitation[2]
    assert full > 0
    assert imitation == pytest.approx([0.0, 0.5 * full, full, full, full, 0.0])
    mimic = [losses["loss_kd/mimic/cls"].item() > 0 for losses in seen]
    assert mimic == [False, False, False, False, True, True]
    assert teacher.starts == 5  # once a step, not in step 0


# -------------------------------------------------------------------- modes, state, the teacher
def test_in_eval_mode_it_is_the_student():
    teacher = _CountingTeacher(_teacher())
    model = _kd_model(teacher=teacher).eval()
    student = tiny_model("RetinaNet").eval()
    batch = [{k: v for k, v in x.items() if k != "instances"} for x in _batch()]
    with torch.no_grad():
        ours, theirs = model(batch), student(batch)
    assert len(ours) == 2 and len(ours[0]["instances"]) > 0
    for a, b in zip(ours, theirs):
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)
    assert set(ours[0]) == set(theirs[0])
    model(batch)  # also with gradients enabled
    assert teacher.starts == 0


def test_without_gradients_it_is_the_student_also_in_training_mode():
    teacher = _CountingTeacher(_teacher())
    model = _kd_model(teacher=teacher)
    with torch.no_grad():
        losses, storage = _losses(model)
    plain, _ = _plain()
    assert set(losses) == set(plain)
    assert all(torch.equal(losses[k], v) for k, v in plain.items())
    assert teacher.starts == 0 and not any("kd" in name for name in storage.latest())


def test_state_and_parameters_are_those_of_student_and_distillers():
    model = _kd_model()
    student = tiny_model("RetinaNet")
    own = {f"student.{k}" for k in student.state_dict()}
    adapter = {f"distillers.imitation.adapter.{k}" for k in ("weight", "bias")}
    assert set(model.state_dict()) == own | adapter
    assert {n.split(".")[0] for n, _ in model.named_modules() if n} == {"student", "distillers"}
    numbers = [sum(p.numel() for p in m.parameters()) for m in (model, student)]
    assert numbers[0] - numbers[1] == 32 * 32 + 32
    teachers = {id(p) for p in model.teacher.model.parameters()}
    assert not teachers & {id(p) for p in model.parameters()}
    assert model.device == torch.device("cpu")


def test_the_teacher_is_bit_identical_after_training():
    teacher = _teacher(**{"MODEL.RESNETS.NORM": "BN", "MODEL.RETINANET.NORM": "BN"})
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    assert any("running_mean" in k for k in before)
    model = _kd_model(teacher=teacher)
    start = {k: v.clone() for k, v in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    for iteration in range(3):
        model.train()
        optimizer.zero_grad()
        sum(_losses(model, iteration=iteration)[0].values()).backward()
        optimizer.step()
    after = teacher.model.state_dict()
    assert set(after) == set(before) and all(torch.equal(after[k], v) for k, v in before.items())
    assert not any(m.training for m in teacher.model.modules())
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert not any(m._forward_hooks for m in teacher.model.modules())
    moved = [not torch.equal(p, start[name]) for name, p in model.named_parameters()]
    assert all(moved)


def test_nothing_stays_on_the_student_after_the_step():
    model = _kd_model()
    keys = list(model.student.state_dict())
    _losses(model)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert list(model.student.state_dict()) == keys


@pytest.mark.parametrize("where", ["student", "distiller"])
def test_nothing_stays_on_the_student_after_a_failure(where, monkeypatch):
    model = _kd_model()

    def fail(*_):
        raise KeyError("on purpose")

    if where == "student":
        monkeypatch.setattr(model.student, "forward_training", fail)
    else:
        monkeypatch.setattr(model.distillers["mimic"], "compute", fail)
    with pytest.raises(KeyError, match="on purpose"):
        _losses(model)
    assert not any(m._forward_hooks for m in model.modules())
    monkeypatch.undo()
    assert len(_kd_part(_losses(model)[0])) == 3


# ---------------------------------------------------------------------------------- what is refused
def test_a_module_is_no_teacher():
    with pytest.raises(ValueError, match="must not be a nn.Module"):
        _kd_model(teacher=tiny_model("RetinaNet"))


def test_a_missing_teacher_is_named_by_the_distiller_that_needs_it():
    with pytest.raises(ValueError, match="distiller 'mimic' needs a teacher"):
        KDModel(student=tiny_model("GFL"), distillers={"mimic": Mimic()}, teacher=None)


def test_a_key_that_the_student_lacks_is_an_error_at_construction():
    with pytest.raises(ValueError, match="GeneralizedRCNN has no key 'pred.cls'"):
        _kd_model({"mimic": Mimic()}, "GeneralizedRCNN")


# ------------------------------------------------------------------------------ what distillers see
def test_the_context_describes_the_batch():
    spy = Spy()
    model = KDModel(student=tiny_model("RetinaNet"), distillers={"spy": spy}, teacher=None).train()
    batch = _batch(sizes=[(33, 70), (64, 41)], num_gt=(2, 0))
    losses, _ = _losses(model, batch, iteration=17)
    ctx = spy.ctx
    assert losses["loss_kd/spy/none"].item() == 0.0 and ctx.teacher is None
    assert ctx.iteration == 17
    assert ctx.batched_inputs is batch
    assert ctx.image_sizes == [(33, 70), (64, 41)]
    assert ctx.padded_size == (64, 96)  # the maxima 64 and 70, in multiples of 32
    for ours, given in zip(ctx.gt_instances, batch):
        assert torch.equal(ours.gt_boxes.tensor, given["instances"].gt_boxes.tensor)
    assert ctx.student.model is model.student and ctx.student.tap is model.tap
    rest = ctx.student.rest_of_head("cls", 0, [x.detach() for x in ctx.student["head.cls[0]"]])
    assert all(torch.equal(a, b) for a, b in zip(rest["cls"], ctx.student["pred.cls"]))
    anchors = model.student.anchor_generator(ctx.student["neck"])
    labels, _ = model.student.label_anchors(anchors, ctx.gt_instances)
    assert torch.equal(ctx.student["assign"].labels, torch.stack(labels))


@pytest.mark.parametrize("num_gt", [(2, 0), (0, 0)])
def test_images_without_ground_truth(num_gt):
    model = _kd_model()
    losses, _ = _losses(model, _batch(num_gt=num_gt))
    plain, _ = _plain(batch=_batch(num_gt=num_gt))
    assert all(torch.equal(losses[k], v) for k, v in plain.items())
    # distillation does not depend on the ground truth here
    expected = _kd_part(_losses(model, _batch(num_gt=num_gt))[0])
    assert all(v.item() > 0 and torch.isfinite(v) for v in expected.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


# ------------------------------------------------------------------------------------------ logging
def test_raw_values_and_factors_are_logged():
    model = _kd_model(schedules={"imitation": LossSchedule(0, 9, warmup_iters=3)})
    losses, storage = _losses(model, iteration=1)
    latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest["kd_factor/imitation"] == 0.5 and latest["kd_factor/mimic"] == 1.0
    for term, weight, factor in (
        ("imitation/p3", 0.7, 0.5),
        ("imitation/p4", 1.4, 0.5),
        ("mimic/cls", 0.3, 1.0),
    ):
        raw = losses[f"loss_kd/{term}"].item() / weight / factor
        assert latest[f"kd_raw/{term}"] == pytest.approx(raw, rel=1e-5)
    assert not any(name.startswith("kd_grad_ratio") for name in latest)


class _Fading(Mimic):
    """Exactly zero while ``active`` is False."""

    active = False

    def compute(self, ctx):
        return {"cls": super().compute(ctx)["cls"] * float(self.active)}


def test_a_term_that_stays_zero_is_warned_about_once(caplog):
    fading = _Fading()
    model = _kd_model({"fading": fading, "mimic": Mimic()}, zero_warning_iters=3)
    counts = []
    with caplog.at_level(logging.WARNING, logger="kd_d2"):
        for iteration in range(7):
            fading.active = iteration == 2
            _losses(model, iteration=iteration)
            counts.append(len(caplog.messages))
    assert counts == [0, 0, 0, 0, 0, 1, 1]  # three in a row, not three in all
    assert "loss_kd/fading/cls has been exactly 0 for 3 active iterations" in caplog.messages[0]


def test_no_warning_while_a_distiller_is_inactive_or_the_check_is_off(caplog):
    inactive = {"mimic": LossSchedule(100, 200)}
    with caplog.at_level(logging.WARNING, logger="kd_d2"):
        model = _kd_model({"mimic": Mimic()}, schedules=inactive, zero_warning_iters=1)
        _losses(model)
        off = _kd_model({"fading": _Fading()})
        for _ in range(3):
            _losses(off)
    assert caplog.messages == []


def test_logged_gradient_ratio_equals_an_independent_computation():
    model = _kd_model(grad_ratio_period=2)
    losses, storage = _losses(model, iteration=4)
    logged = {
        name[len("kd_grad_ratio/") :]: value
        for name, (value, _) in storage.latest().items()
        if name.startswith("kd_grad_ratio/")
    }
    # terms only where there are several
    assert set(logged) == {"imitation", "imitation/p3", "imitation/p4", "mimic"}
    # a second model whose pyramid is a leaf: plain backward instead of autograd.grad. Only p7 is
    # made from another level, p6, whose gradient therefore includes what comes through p7.
    student = tiny_model("RetinaNet")
    batch = _batch()
    images = student.preprocess_image(batch)
    with torch.no_grad():
        pyramid = student.backbone(images.tensor)
        theirs = model.teacher.model.backbone(images.tensor)
        theirs_logits = model.teacher.model.head([theirs[n] for n in student.head_in_features])[0]
    leaves = {name: x.clone().requires_grad_() for name, x in pyramid.items()}
    leaves["p7"] = student.backbone.top_block.p7(leaves["p6"].relu())
    leaves["p7"].retain_grad()
    features = [leaves[name] for name in student.head_in_features]
    predictions = student.head(features)
    with EventStorage(4):
        detection = student.forward_training(
            images, features, predictions, [x["instances"] for x in batch]
        )
    adapter = copy.deepcopy(model.distillers["imitation"].adapter)
    terms = {
        f"imitation/{name}": weight * ((adapter(leaves[name]) - theirs[name]) ** 2).mean()
        for name, weight in (("p3", 0.7), ("p4", 1.4))
    }
    totals = {
        "detection": sum(detection.values()),
        **terms,
        "imitation": sum(terms.values()),
        "mimic": 0.3 * sum((a - b).abs().mean() for a, b in zip(predictions[0], theirs_logits)),
    }
    cosines = {
        name[len("kd_grad_cosine/") :]: value
        for name, (value, _) in storage.latest().items()
        if name.startswith("kd_grad_cosine/")
    }
    assert set(cosines) == set(logged)
    norms, directions = {}, {}
    for name, total in totals.items():
        for leaf in leaves.values():
            leaf.grad = None
        total.backward(retain_graph=True)
        gradients = [
            (torch.zeros_like(x) if x.grad is None else x.grad).double().flatten()
            for x in leaves.values()
        ]
        directions[name] = torch.cat(gradients)
        norms[name] = directions[name].norm().item()
    for label, ratio in logged.items():
        assert ratio > 0
        assert ratio == pytest.approx(norms[label] / norms["detection"], rel=1e-4)
        product = directions[label] @ directions["detection"]
        assert cosines[label] == pytest.approx(
            product.item() / norms[label] / norms["detection"], abs=1e-5
        )
    # no trace on parameters, and the step itself still works
    assert all(p.grad is None for p in model.parameters())
    sum(losses.values()).backward()


def test_gradient_ratio_is_logged_every_so_many_iterations_and_zero_when_inactive():
    model = _kd_model(
        {"mimic": Mimic()}, schedules={"mimic": LossSchedule(3, 9)}, grad_ratio_period=2
    )
    logged = []
    for iteration in range(5):
        latest = _losses(model, iteration=iteration)[1].latest()
        logged.append(latest.get("kd_grad_ratio/mimic", (None, 0))[0])
    assert logged[:4] == [0.0, None, 0.0, None] and logged[4] > 0


# ---------------------------------------------------------------------------------- mixed precision
class _LibraryLoss(Distiller):
    """A loss of the library on whatever dtype the ambient mode gives."""

    def __init__(self):
        super().__init__(
            weights={"feat": 1.0}, student_needs=("neck", "pred.cls"), teacher_needs=("neck",)
        )
        self.adapter = nn.Conv2d(32, 32, 1)

    def compute(self, ctx):
        self.pair = self.adapter(ctx.student["neck"][0]), ctx.teacher["neck"][0]
        self.logits = ctx.student["pred.cls"][0]
        return {"feat": pkd_loss(*self.pair)}


def test_terms_are_fp32_under_autocast():
    distiller = _LibraryLoss()
    model = _kd_model({"lib": distiller, "mimic": Mimic()}, schedules={"mimic": LossSchedule(5, 9)})
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = _losses(model)
    ours, theirs = distiller.pair
    assert ours.dtype == theirs.dtype == distiller.logits.dtype == torch.bfloat16  # ambient mode
    kd = _kd_part(losses)
    assert {k: v.dtype for k, v in kd.items()} == dict.fromkeys(kd, torch.float32)
    expected = pkd_loss(ours.detach().float(), theirs.float())
    assert kd["loss_kd/lib/feat"].item() == pytest.approx(expected.item(), rel=1e-6)
    total = sum(losses.values())
    assert torch.isfinite(total)
    total.backward()
    gradients = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g is not None and torch.isfinite(g).all() for g in gradients)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_step_on_the_gpu_under_autocast(dtype):
    teacher = teacher_of(tiny_model("RetinaNet", seed=5).cuda())
    model = _kd_model({"lib": _LibraryLoss(), "mimic": Mimic()}, teacher=teacher).cuda()
    with torch.autocast("cuda", dtype):
        losses, _ = _losses(model)
    kd = _kd_part(losses)
    assert len(kd) == 2 and all(v.dtype == torch.float32 and v.is_cuda for v in kd.values())
    reference, _ = _losses(_kd_model({"lib": _LibraryLoss(), "mimic": Mimic()}))
    mimic = "loss_kd/mimic/cls"
    assert losses[mimic].item() == pytest.approx(reference[mimic].item(), rel=0.05)
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert next(model.teacher.model.parameters()).is_cuda
