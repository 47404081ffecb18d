"""GDetKD on whole detectors: values of a naive loop, gradients, empty batches, both networks."""

import copy

import pytest
import torch
from detectron2.config import get_cfg as get_d2_cfg
from detectron2.modeling import build_model
from detectron2.structures import Boxes

from kd_d2.engine.optimizer import build_optimizer
from kd_d2.engine.resume import settle_scripted_losses
from tests.engine.support import StopAt, teacher_keys, train
from tests.fixtures import registered_toy_dataset, tiny_batch, tiny_cfg, tiny_model
from tests.projects.gdetkd.pairs import (
    ALL_TERMS,
    KEYS,
    PAIRS,
    SEVEN,
    gradients,
    only,
    pair,
    prefix,
    step,
)

TWO_STAGE_PAIRS = PAIRS[:9]
EVERY_PAIR = [p for p in PAIRS if p[0] != "FCOS" or p[1] == "GeneralizedRCNN"]


def kd(losses):
    return {k: v for k, v in losses.items() if k.startswith("loss_kd/")}


# ----------------------------------------------------------------------------------- every pair
@pytest.mark.parametrize("student, teacher", EVERY_PAIR)
def test_every_pair(student, teacher):
    model = pair(student, teacher)
    before = copy.deepcopy(model.teacher.model.state_dict())
    losses, storage = step(model)
    terms = ("feat", "ckd") if student in ("RetinaNet", "FCOS") else ALL_TERMS
    assert tuple(kd(losses)) == tuple(prefix(name) for name in terms)
    # FCOS starts with boxes that overlap nothing, by the specification
    positive = [n for n in terms if (n, student) != ("feat", "FCOS")]
    assert all(losses[prefix(name)] > 0 for name in positive)
    assert all(torch.isfinite(value) for value in losses.values())
    assert all(value.dtype == torch.float32 for value in kd(losses).values())

    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    theirs = model.teacher.model
    assert not theirs.training and all(p.grad is None for p in theirs.parameters())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, before[name]), name
    inside = {id(t) for t in (*model.parameters(), *model.buffers())}
    assert not inside & {id(t) for t in theirs.state_dict(keep_vars=True).values()}
    assert {"gdetkd/ckd_accuracy", "gdetkd/ckd_accuracy_stage0"} & set(storage.latest())


# -------------------------------------------------------------------------------- a naive loop
class Seen:
    """Boxes, labels and outputs of every stage of a student, caught by plain hooks."""

    def __init__(self, model):
        self.boxes, self.embed, self.cls, self.box, self.sampled = [], [], [], [], []
        heads = model.roi_heads
        pooler = heads.pooler if hasattr(heads, "pooler") else heads.box_pooler
        predictors = heads.box_predictor
        predictors = predictors if hasattr(predictors, "__len__") else [predictors]
        pooler.register_forward_hook(lambda m, x, y: self.boxes.append(x[1]))
        for predictor in predictors:
            predictor.register_forward_hook(self._predicted)

    def _predicted(self, module, inputs, outputs):
        self.embed.append(inputs[0])
        self.cls.append(outputs[0])
        self.box.append(outputs[1])


@torch.no_grad()
def teacher_outputs(model, boxes, stage, batch=None):
    """Representation, logits and deltas of Detectron2's own head, fed with these boxes."""
    images = model.preprocess_image(batch or tiny_batch())
    features = model.backbone(images.tensor)
    heads = model.roi_heads
    if hasattr(heads, "res5"):
        embed = heads.res5(heads.pooler([features["res4"]], boxes)).mean(dim=(2, 3))
        return (embed, *heads.box_predictor(embed))
    pooled = heads.box_pooler([features[f] for f in ("p2", "p3", "p4", "p5")], boxes)
    if hasattr(heads, "num_cascade_stages"):
        embed = heads.box_head[stage](pooled)
        return (embed, *heads.box_predictor[stage](embed))
    embed = heads.box_head(pooled)
    return (embed, *heads.box_predictor(embed))


def weights_of(model, stage):
    predictor = model.roi_heads.box_predictor
    predictor = predictor[stage] if hasattr(predictor, "__len__") else predictor
    return torch.tensor(predictor.box2box_transform.weights)


@pytest.mark.parametrize(
    "student, teacher, teacher_stage",
    [(s, t, 0) for s, t in TWO_STAGE_PAIRS]
    + [("GeneralizedRCNN", "Cascade", 2), ("C4", "Cascade", 1)],
)
def test_values_of_a_naive_loop(student, teacher, teacher_stage):
    model = pair(student, teacher, **{"KD.GDETKD.TEACHER_STAGE": teacher_stage})
    seen, ckd = Seen(model.student), copy.deepcopy(model.distillers["gdetkd"].ckd)
    losses, _ = step(model)
    stages = len(seen.cls)
    assert stages == (3 if student == "Cascade" else 1)
    expected = dict.fromkeys(("ckd", "cls", "reg"), 0.0)
    for k in range(stages):
        theirs = k if student == teacher == "Cascade" else teacher_stage
        embed, logits, deltas = teacher_outputs(model.teacher.model, seen.boxes[k], theirs)
        p, rows = logits.softmax(1), len(logits)
        expected["cls"] += -(p * seen.cls[k].log_softmax(1)).sum() / rows / stages
        factor = weights_of(model.student, k) / weights_of(model.teacher.model, theirs)
        deltas, own = deltas.view(rows, -1, 4) * factor, seen.box[k].view(rows, -1, 4)
        pull = 0
        for c in range(3):  # an agnostic head has one box for all classes
            pull += p[:, c, None] * (deltas[:, c % deltas.shape[1]] - own[:, c % own.shape[1]])
        expected["reg"] += pull.abs().sum() / rows / stages
        boxes = [Boxes(b.tensor) for b in seen.boxes[k]]
        expected["ckd"] += ckd[str(k)](seen.embed[k], embed, boxes).loss / stages
    for name, value in expected.items():
        torch.testing.assert_close(losses[prefix(name)], value, rtol=1e-4, atol=1e-5, msg=name)


def test_cascade_stages_of_ckd():
    every, one = pair("Cascade", "Cascade"), pair(
        "Cascade", "Cascade", **{"KD.GDETKD.CASCADE.CKD_STAGES": (1,)}
    )
    assert list(every.distillers["gdetkd"].ckd) == ["0", "1", "2"]
    assert list(one.distillers["gdetkd"].ckd) == ["1"]
    ours, theirs = (m.distillers["gdetkd"].ckd for m in (one, every))
    ours["1"].load_state_dict(theirs["1"].state_dict())
    parts = []
    for k in "012":
        module = theirs[k]
        module.register_forward_hook(lambda m, x, y: parts.append(y.loss))
    whole, single = step(every)[0][prefix("ckd")], step(one)[0][prefix("ckd")]
    torch.testing.assert_close(whole, sum(parts) / 3)
    torch.testing.assert_close(single, parts[1] / 3)
    # each has a queue and a projection of its own
    assert len({id(p) for k in "012" for p in theirs[k].parameters()}) == 6


@pytest.mark.parametrize("student", ["GeneralizedRCNN", "Cascade", "RetinaNet"])
def test_the_teacher_passes_once_a_stage(student):
    model = pair(student, "GeneralizedRCNN")
    calls = {"backbone": 0, "roi_heads.box_pooler": 0, "roi_heads.box_head": 0}
    calls.update({"proposal_generator": 0, "roi_heads.box_predictor": 0})

    def count(name):
        def hook(*_):
            calls[name] += 1

        return hook

    for name in calls:
        model.teacher.model.get_submodule(name).register_forward_hook(count(name))
    step(model)
    stages = 3 if student == "Cascade" else 1
    predictions = 0 if student == "RetinaNet" else stages
    assert calls == {
        "backbone": 1,
        "proposal_generator": 0,
        "roi_heads.box_pooler": stages,
        "roi_heads.box_head": stages,
        # the logits are not needed for a dense student without HETERO_PRED
        "roi_heads.box_predictor": calls["roi_heads.box_predictor"],
    }
    assert calls["roi_heads.box_predictor"] == predictions


def test_a_later_stage_of_the_teacher_passes_once_too():
    """SGFI's pooled features, which belong to no stage, are asked for together with the rest."""
    model, calls = pair("C4", "Cascade", **{"KD.GDETKD.TEACHER_STAGE": 2}), []
    for k, head in enumerate(model.teacher.model.roi_heads.box_head):
        head.register_forward_hook(lambda *_, k=k: calls.append(k))
    step(model)
    assert calls == [2]


@pytest.mark.parametrize("student", ["GeneralizedRCNN", "RetinaNet"])
def test_a_mask_alone_needs_no_rois(student):
    model = pair(student, **{**only("feat"), "KD.GDETKD.FEAT.MODE": "gt_mask"})
    distiller = model.distillers["gdetkd"]
    distiller.rois.collect = None
    assert not {"proposals[0]", "pred.box"} & distiller.student_needs
    losses, _ = step(model)
    assert set(kd(losses)) == {prefix("feat")} and losses[prefix("feat")] > 0
    sum(losses.values()).backward()
    assert distiller.weights == {"feat": 0.01}


def test_what_is_logged():
    model = pair("Cascade", **{"KD.GDETKD.CASCADE.CKD_STAGES": (1,)})
    _, storage = step(model)
    latest = {k: v for k, (v, _) in storage.latest().items() if k.startswith("gdetkd/")}
    ckd = {f"gdetkd/ckd_{x}_stage1" for x in ("accuracy", "positive_cosine", "num_negatives")}
    assert ckd | {f"gdetkd/num_positive_stage{k}" for k in range(3)} < set(latest)
    assert "gdetkd/sgfi_tau" in latest and "gdetkd/ckd_accuracy_stage0" not in latest
    # of 48 rows without a RoI's own and those that overlap it
    assert 30 < latest["gdetkd/ckd_num_negatives_stage1"] < 48
    assert latest["gdetkd/sgfi_rois"] == 2 * latest["gdetkd/num_positive_stage0"]


def test_accuracy_on_the_foreground():
    model, sampled = pair(), []
    every_third = torch.arange(48) % 3 == 0
    module = model.distillers["gdetkd"].ckd["0"]
    module.register_forward_hook(lambda m, x, y: y._replace(correct=every_third))
    model.student.roi_heads.register_forward_hook(lambda m, x, y: sampled.extend(y[0]))
    _, storage = step(model)
    foreground = torch.cat([p.gt_classes for p in sampled]) < 3
    numbers = foreground.nonzero().flatten().tolist()
    expected = sum(i % 3 == 0 for i in numbers) / len(numbers)
    assert storage.latest()["gdetkd/ckd_accuracy_foreground"][0] == pytest.approx(expected)
    assert 0 < expected < 1


def test_rois_of_ckd():
    """CKD.ROIS "positive": the rows that are foreground, on both sides."""
    model = pair(**{"KD.GDETKD.CKD.ROIS": "positive"})
    given, sampled = [], []
    module = model.distillers["gdetkd"].ckd["0"]
    module.register_forward_pre_hook(lambda m, x: given.append(x))
    model.student.roi_heads.register_forward_hook(lambda m, x, y: sampled.extend(y[0]))
    step(model)
    student, teacher, boxes, anchor = given[0]
    foreground = [p[p.gt_classes < 3] for p in sampled]
    assert anchor is None and 0 < len(student) == len(teacher) == sum(map(len, foreground)) < 20
    for found, expected in zip(boxes, foreground):
        assert torch.equal(found.tensor, expected.proposal_boxes.tensor)
    expected = teacher_outputs(
        model.teacher.model, [p.proposal_boxes for p in foreground], stage=0
    )[0]
    torch.testing.assert_close(teacher, expected, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------- gradients
@pytest.mark.parametrize("term", ALL_TERMS)
def test_where_the_gradient_of_a_term_arrives(term):
    model = pair(**only(term))
    losses, _ = step(model)
    assert tuple(kd(losses)) == (prefix(term),)
    losses[prefix(term)].backward()
    reached = {
        name
        for name, p in model.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }
    predictor = "student.roi_heads.box_predictor."

    def any_below(start):
        return any(name.startswith(start) for name in reached)

    assert any_below("student.backbone.bottom_up.res2") and any_below("student.backbone.fpn")
    assert not any_below("student.proposal_generator")
    assert any_below("student.roi_heads.box_head") == (term != "feat")
    assert any_below(predictor + "cls_score") == (term == "cls")
    assert any_below(predictor + "bbox_pred") == (term == "reg")
    distiller = {name.split(".")[2] for name in reached if name.startswith("distillers.")}
    assert distiller == {"feat": {"feature"}, "ckd": {"ckd"}}.get(term, set())


@pytest.mark.parametrize(
    "student, how",
    [
        *((s, "weights") for s in ("GeneralizedRCNN", "Cascade", "C4", "RetinaNet")),
        ("GeneralizedRCNN", "schedule"),
    ],
)
def test_without_weight_the_student_trains_plainly(student, how):
    keys = {"KD.GDETKD.SCHEDULE.START_ITER": 5, "SOLVER.MAX_ITER": 9} if how == "schedule" else {}
    model = pair(student, **keys)
    distiller = model.distillers["gdetkd"]
    if how == "weights":
        distiller.weights = dict.fromkeys(distiller.weights, 0.0)
    plain = tiny_model(student, seed=1, **SEVEN)
    settle_scripted_losses(plain)
    expected, _ = step(plain)
    sum(expected.values()).backward()
    losses, _ = step(model)
    sum(losses.values()).backward()
    assert list(kd(losses).values()) == [0.0] * len(distiller.weights)
    for name, value in expected.items():
        assert torch.equal(losses[name], value), name
    found = gradients(model.student)
    for name, gradient in gradients(plain).items():
        assert torch.equal(found[name], gradient), name
    # but no parameter is left out, which DDP would not forgive
    assert all(p.grad is not None for p in distiller.parameters())


def test_weights():
    """Each term is its unweighted value times its weight; FEAT.WEIGHT -1.0 is the term's own."""
    keys = {
        "KD.GDETKD.FEAT.WEIGHT": 0.5,
        "KD.GDETKD.CKD.WEIGHT": 0.25,
        "KD.GDETKD.CLS.WEIGHT": 4.0,
        "KD.GDETKD.REG.WEIGHT": 8.0,
    }
    one, other = step(pair())[0], step(pair(**keys))[0]
    for name, factor in zip(ALL_TERMS, (0.5, 0.25, 4.0, 8.0)):
        torch.testing.assert_close(other[prefix(name)], factor * one[prefix(name)])


# --------------------------------------------------------------------------------- odd batches
@pytest.mark.parametrize("student", ["GeneralizedRCNN", "Cascade", "C4", "RetinaNet", "FCOS"])
def test_images_without_ground_truth(student):
    model = pair(student)
    keys = set(step(model)[0])
    losses, _ = step(model, tiny_batch(num_gt=0))
    assert set(losses) == keys and all(torch.isfinite(x) for x in losses.values())
    assert losses[prefix("feat")] == 0 and losses[prefix("ckd")] > 0
    sum(losses.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    half, _ = step(model, tiny_batch(num_gt=(0, 3)))
    assert set(half) == keys and all(torch.isfinite(x) for x in half.values())


@pytest.mark.parametrize("student", ["GeneralizedRCNN", "Cascade", "C4"])
@pytest.mark.parametrize("num_gt", [(3, 0), (0, 0)], ids=["one image", "no image"])
def test_without_proposals(student, num_gt):
    """An RPN that proposes nothing: only ground-truth boxes are sampled, here of one image."""
    model = pair(student, **{"MODEL.RPN.POST_NMS_TOPK_TRAIN": 0})
    losses, _ = step(model, tiny_batch(num_gt=num_gt))
    assert set(kd(losses)) == {prefix(name) for name in ALL_TERMS}
    if not any(num_gt):
        assert all(value == 0 for value in kd(losses).values())
    else:
        assert all(losses[prefix(name)] > 0 for name in ("feat", "cls", "reg"))
    # Detectron2's own box losses have no value without a box in some versions
    sum(kd(losses).values()).backward()
    for name, p in model.named_parameters():
        assert p.grad is None or torch.isfinite(p.grad).all(), name
    assert all(p.grad is not None for p in model.distillers.parameters())


@pytest.mark.parametrize("student", ["GeneralizedRCNN", "C4", "RetinaNet"])
def test_odd_sizes(student):
    """C4 students do not pad to multiples of 32, their teacher with a pyramid must."""
    model, batch = pair(student), tiny_batch(sizes=((97, 131), (65, 33)), num_gt=(2, 1))
    seen = Seen(model.student) if student != "RetinaNet" else None
    losses, _ = step(model, batch)
    assert all(torch.isfinite(value) for value in losses.values())
    if seen is not None:
        _, logits, _ = teacher_outputs(model.teacher.model, seen.boxes[0], 0, batch)
        expected = -(logits.softmax(1) * seen.cls[0].log_softmax(1)).sum() / len(logits)
        torch.testing.assert_close(losses[prefix("cls")], expected)
    sum(losses.values()).backward()


@pytest.mark.parametrize("student", ["GeneralizedRCNN", "Cascade", "C4", "RetinaNet"])
def test_autocast(student):
    """Losses are fp32 and finite, and near those in full precision."""
    full, _ = step(pair(student))
    model = pair(student)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = step(model)
    sum(losses.values()).backward()
    for name, value in kd(losses).items():
        assert value.dtype == torch.float32 and torch.isfinite(value)
        assert value.item() == pytest.approx(full[name].item(), rel=0.5)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


# ------------------------------------------------------------------------------------ training
def test_the_temperature_has_no_weight_decay():
    model = pair()
    optimizer = build_optimizer(tiny_cfg("GeneralizedRCNN", **KEYS), model)
    names = {id(p): name for name, p in model.named_parameters()}
    decay = {
        names[id(p)]: group["weight_decay"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert set(decay) == set(names.values())
    assert {n for n, value in decay.items() if value == 0 and "distillers" in n} == {
        "distillers.gdetkd.feature.sgfi.log_tau"
    }


@pytest.fixture
def runs(tmp_path):
    """A function (folder, student's family, keys) -> config of a short run."""
    teacher = teacher_keys(tmp_path, "GeneralizedRCNN", **SEVEN)
    with registered_toy_dataset(tmp_path, 4, size=(64, 64)) as data:

        def make(folder, family="GeneralizedRCNN", **keys):
            return tiny_cfg(
                family,
                **{
                    **KEYS,
                    **teacher,
                    "KD.ENABLED": True,
                    "DATASETS.TRAIN": (data,),
                    "INPUT.MIN_SIZE_TRAIN": (64,),
                    "SOLVER.MAX_ITER": 4,
                    "SOLVER.CHECKPOINT_PERIOD": 2,
                    "OUTPUT_DIR": str(tmp_path / folder),
                    **keys,
                },
            )

        yield make


def test_resume(runs):
    """With a queue of one batch, which is what a resumed run has, both are equal bit by bit."""
    queue = {"KD.GDETKD.CKD.QUEUE_SIZE": 48}
    whole = train(runs("whole", **queue))
    train(runs("parts", **queue), hooks=[StopAt(2)])
    resumed = train(runs("parts", **queue), resume=True)
    assert sorted(resumed.curve) == [2, 3]
    for i in (2, 3):
        assert resumed.curve[i] == whole.curve[i]
    for name, value in whole.kd_model.named_parameters():
        assert torch.equal(value, dict(resumed.kd_model.named_parameters())[name]), name
    # adapters, projection and temperature are saved, the rows of the queue are not
    saved = torch.load(whole.cfg.OUTPUT_DIR + "/model_final.pth", weights_only=True)["distillers"]
    assert set(saved) == {n for n, _ in whole.kd_model.distillers.named_parameters()}


@pytest.mark.parametrize("family", ["GeneralizedRCNN", "RetinaNet"])
def test_student_is_plain_detectron2s(runs, family):
    trainer = train(runs("out", family, **{"SOLVER.MAX_ITER": 2}))
    state = torch.load(trainer.cfg.OUTPUT_DIR + "/model_final.pth", weights_only=True)["model"]
    cfg, plain_cfg = tiny_cfg(family, **SEVEN), get_d2_cfg()
    plain_cfg.MODEL = type(plain_cfg)({k: cfg.MODEL[k] for k in plain_cfg.MODEL})
    plain = build_model(plain_cfg).eval()
    plain.load_state_dict(state, strict=True)
    trained = trainer.student.eval()
    for model in (plain, trained):
        getattr(getattr(model, "roi_heads", model), "box_predictor", model).test_score_thresh = 0.0
    with torch.no_grad():
        expected, found = plain(tiny_batch()), trained(tiny_batch())
    for a, b in zip(expected, found):
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)


def test_head_transfer_alone():
    """No term, Table 2 "HT": the student's own losses, and nothing of the teacher runs."""
    keys = {**only(), "KD.INIT_STUDENT.PREFIXES": ("roi_heads",)}
    model = pair(**keys)
    model.teacher.start = None
    losses, _ = step(model)
    assert set(losses) == {"loss_cls", "loss_box_reg", "loss_rpn_cls", "loss_rpn_loc"}
    assert list(model.distillers.parameters()) == []
