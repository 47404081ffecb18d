"""JointDetNAS on whole detectors: values of a naive loop, gradients, widths, empty batches."""

import copy

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch.nn import functional as F

from kd_d2.distillation import KDModel, build_distillers, build_tap
from kd_d2.projects.jointdetnas.distiller import JointDetNAS, SlicedAdapter
from kd_d2.projects.jointdetnas.subnet import Subnet
from tests.fixtures import teacher_of, tiny_batch, tiny_cfg, tiny_model
from tests.projects.jointdetnas.elastic_cases import elastic_cfg, supernet

KEYS = {"KD.DISTILLERS": ("JointDetNAS",), "KD.JOINTDETNAS.FEAT.ADAPTER_CHANNELS": 48}
TERMS = ("feat", "cls", "reg")
RCNN = "GeneralizedRCNN"


def prefix(name):
    return f"loss_kd/jointdetnas/{name}"


def kd_model(student, cfg, teacher):
    torch.manual_seed(3)
    distillers, schedules = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    return KDModel(
        student=student, distillers=distillers, teacher=teacher, schedules=schedules
    ).train()


def pair(teacher_keys=None, **keys):
    """A student with 32 channels and a teacher with 40."""
    student = tiny_model(RCNN, seed=1, **{k: v for k, v in keys.items() if k.startswith("MODEL.")})
    theirs = {"MODEL.FPN.OUT_CHANNELS": 40, **(teacher_keys or {})}
    teacher = teacher_of(tiny_model(RCNN, seed=2, **theirs))
    return kd_model(student, tiny_cfg(RCNN, **{**KEYS, **keys}), teacher)


def step(model, batch=None):
    seed_all_rng(0)
    with EventStorage() as storage:
        losses = model(tiny_batch() if batch is None else batch)
    return losses, storage


class Seen:
    """What the student's head saw and made, caught by plain hooks."""

    def __init__(self, model):
        heads = model.roi_heads
        heads.box_pooler.register_forward_hook(self._pooled)
        heads.box_predictor.register_forward_hook(self._predicted)
        heads.register_forward_hook(self._sampled)

    def _pooled(self, module, inputs, output):
        self.boxes, self.feat = inputs[1], output

    def _predicted(self, module, inputs, outputs):
        self.cls, self.box = outputs

    def _sampled(self, module, inputs, outputs):
        self.classes = torch.cat([p.gt_classes for p in outputs[0]])


@torch.no_grad()
def teacher_values(model, boxes):
    """Features, logits and deltas of Detectron2's own head, fed with these boxes."""
    features = model.backbone(model.preprocess_image(tiny_batch()).tensor)
    heads = model.roi_heads
    pooled = heads.box_pooler([features[f] for f in ("p2", "p3", "p4", "p5")], boxes)
    return (pooled, *heads.box_predictor(heads.box_head(pooled)))


@pytest.mark.parametrize("rois, mode", [("positive", "class_aware"), ("all", "gt_class")])
def test_values_of_a_naive_loop(rois, mode):
    weights = (20.0, 20.0, 10.0, 10.0)
    model = pair(
        teacher_keys={"MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": weights},
        **{"KD.JOINTDETNAS.FEAT.ROIS": rois, "KD.JOINTDETNAS.REG.MODE": mode},
    )
    seen = Seen(model.student)
    losses, storage = step(model)
    feat, logits, deltas = teacher_values(model.teacher.model, seen.boxes)
    conv = model.distillers["jointdetnas"].adapter
    assert conv.weight.shape == (48, 32, 3, 3)
    expected, compared = dict.fromkeys(TERMS, 0.0), 0
    number, ratio = len(logits), torch.tensor([0.5] * 4)
    for row in range(number):
        label = int(seen.classes[row])
        if rois == "all" or label < 3:
            adapted = F.conv2d(seen.feat[row], conv.weight[:40], conv.bias[:40], padding=1)
            expected["feat"] += (adapted - feat[row]).square().mean().item()
            compared += 1
        p = logits[row].softmax(0)
        expected["cls"] -= (p * seen.cls[row].log_softmax(0)).sum().item() / number
        difference = ratio * deltas[row].view(3, 4) - seen.box[row].view(3, 4)
        if mode == "class_aware":
            value = (p[:3, None] * difference).sum(0).abs().sum()
        else:
            value = difference[label].abs().sum() if label < 3 else torch.zeros(())
        expected["reg"] += value.item() / number
    expected["feat"] /= compared
    assert 0 < compared <= number and (compared == number) == (rois == "all")
    for name, value in expected.items():
        assert losses[prefix(name)].item() == pytest.approx(value, rel=1e-4), name
    positive = storage.latest()["jointdetnas/num_positive"][0]
    assert positive == (seen.classes < 3).sum().item()


def test_every_parameter_learns_and_the_teacher_does_not():
    model = pair()
    before = copy.deepcopy(model.teacher.model.state_dict())
    losses, _ = step(model)
    assert {k for k in losses if k.startswith("loss_kd/")} == {prefix(name) for name in TERMS}
    sum(losses[prefix(name)] for name in TERMS).backward()
    adapter = model.distillers["jointdetnas"].adapter.weight.grad
    assert adapter[:40].abs().sum() > 0 and adapter[40:].abs().sum() == 0
    heads = model.student.roi_heads
    assert heads.box_predictor.bbox_pred.weight.grad.abs().sum() > 0
    assert heads.box_predictor.cls_score.weight.grad.abs().sum() > 0
    assert model.student.backbone.fpn_output2.weight.grad.abs().sum() > 0
    # the boxes are given: nothing of the RPN is taught
    assert all(p.grad is None for p in model.student.proposal_generator.parameters())
    theirs = model.teacher.model
    assert not theirs.training and all(p.grad is None for p in theirs.parameters())
    assert all(torch.equal(before[k], v) for k, v in theirs.state_dict().items())


@pytest.mark.parametrize("term", TERMS)
def test_single_terms(term):
    off = {f"KD.JOINTDETNAS.{n.upper()}.WEIGHT": 0.0 for n in TERMS if n != term}
    model = pair(**off, **{f"KD.JOINTDETNAS.{term.upper()}.WEIGHT": 0.5})
    losses, _ = step(model)
    assert [k for k in losses if k.startswith("loss_kd/")] == [prefix(term)]
    torch.testing.assert_close(losses[prefix(term)], 0.5 * step(pair())[0][prefix(term)])
    assert (model.distillers["jointdetnas"].adapter is not None) == (term == "feat")


def test_identical_pair_with_the_identity_as_adapter():
    model = tiny_model(RCNN, seed=1)
    model = kd_model(model, tiny_cfg(RCNN, **KEYS), teacher_of(copy.deepcopy(model)))
    adapter = model.distillers["jointdetnas"].adapter
    with torch.no_grad():
        adapter.weight.zero_()[:32, :, 1, 1] = torch.eye(32)
        adapter.weight[32:].normal_()  # not compared
        adapter.bias[:32].zero_()
    seen = Seen(model.student)
    losses, _ = step(model)
    assert losses[prefix("feat")].item() == pytest.approx(0, abs=1e-8)
    assert losses[prefix("reg")].item() == pytest.approx(0, abs=1e-5)
    entropy = torch.distributions.Categorical(logits=seen.cls).entropy().mean()
    assert losses[prefix("cls")].item() == pytest.approx(entropy.item(), rel=1e-4)


def test_adapter_by_hand():
    adapter = SlicedAdapter(2, 3)
    with torch.no_grad():
        adapter.weight.zero_()
        adapter.weight[0, 0, 1, 1], adapter.weight[1, 1, 1, 0], adapter.bias[1] = 2.0, 1.0, 5.0
    x = torch.arange(1.0, 9).view(1, 2, 2, 2)
    y = adapter(x, 2)
    assert y[0].tolist() == [[[2, 4], [6, 8]], [[5, 10], [5, 12]]]
    assert torch.equal(adapter(x[:, :1], 1), y[:, :1])
    assert sum(p.numel() for p in SlicedAdapter(256, 384).parameters()) == 885120


def test_weights_survive_another_teacher():
    """One adapter for teachers of all widths; a wider one than it is refused."""
    model = pair()
    weight = model.distillers["jointdetnas"].adapter.weight.clone()
    values = []
    for width in (32, 48):
        other = tiny_model(RCNN, seed=2, **{"MODEL.FPN.OUT_CHANNELS": width})
        model.teacher._hold(other)
        values.append(step(model)[0][prefix("feat")].item())
    assert values[0] != values[1] and all(v > 0 for v in values)
    assert torch.equal(model.distillers["jointdetnas"].adapter.weight, weight)
    model.teacher._hold(tiny_model(RCNN, seed=2, **{"MODEL.FPN.OUT_CHANNELS": 56}))
    with pytest.raises(ValueError, match="56 channels, more than .* 48"):
        step(model)


@pytest.mark.parametrize("rois", ["positive", "all"])
def test_without_ground_truth(rois):
    model = pair(**{"KD.JOINTDETNAS.FEAT.ROIS": rois})
    losses, _ = step(model, tiny_batch(num_gt=0))
    feat = losses[prefix("feat")].item()
    assert (feat == 0) == (rois == "positive")
    assert all(torch.isfinite(value) for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_odd_sizes_and_autocast():
    model = pair()
    batch = tiny_batch(sizes=((97, 131), (64, 70)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses, _ = step(model, batch)
    kd = [losses[prefix(name)] for name in TERMS]
    assert all(torch.isfinite(v) and v.dtype == torch.float32 for v in kd)


def test_elastic_student_and_supernet_as_teacher():
    """A phase of the pool: the student's and the teacher's widths differ, the student's change."""
    cfg, net = supernet(**KEYS)
    teacher = teacher_of(supernet()[1].model)
    model = kd_model(net.model, cfg, teacher)
    assert model.distillers["jointdetnas"].adapter.weight.shape == (48, 48, 3, 3)
    for neck in (4, 5, 6):
        net.set_active(Subnet((1, 2, 2, 1), (4, 5, 6, 4), neck, 4))
        model.zero_grad()
        losses, _ = step(model)
        sum(losses.values()).backward()
        gradient = model.distillers["jointdetnas"].adapter.weight.grad
        assert gradient[:, : 8 * neck].abs().sum() > 0
        assert gradient[:, 8 * neck :].abs().sum() == 0
        assert all(torch.isfinite(v) and v > 0 for v in losses.values())
    # in eval mode it is the active subnet
    model.eval()
    with torch.no_grad():
        assert len(model(tiny_batch())) == 2


# ------------------------------------------------------------------------------------- errors
def keys_of(**overrides):
    model = tiny_model(RCNN, **overrides)
    return build_tap(model).keys(model)


@pytest.mark.parametrize(
    "keys, teacher_keys, message",
    [
        ({"KD.JOINTDETNAS.FEAT.WEIGHT": -1.0}, {}, "FEAT.WEIGHT must be at least 0"),
        ({"KD.JOINTDETNAS.REG.WEIGHT": float("nan")}, {}, "REG.WEIGHT must be at least 0"),
        ({f"KD.JOINTDETNAS.{n.upper()}.WEIGHT": 0.0 for n in TERMS}, {}, "are all 0"),
        ({"KD.JOINTDETNAS.FEAT.ROIS": "some"}, {}, "FEAT.ROIS must be one of"),
        ({"KD.JOINTDETNAS.REG.MODE": "l1"}, {}, "REG.MODE must be one of"),
        ({"KD.JOINTDETNAS.FEAT.ADAPTER_CHANNELS": 31}, {}, "ADAPTER_CHANNELS is 31"),
        ({"MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES": True}, {}, "TRAIN_ON_PRED_BOXES is True"),
        ({}, {"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7}, "5 for the student and 7"),
        ({}, {"MODEL.ROI_HEADS.NUM_CLASSES": 4}, "3 for the student and 4"),
        ({}, {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True}, "True for the teacher"),
    ],
)
def test_what_cannot_work_is_named(keys, teacher_keys, message):
    with pytest.raises(ValueError, match=message):
        JointDetNAS(tiny_cfg(RCNN, **{**KEYS, **keys}), keys_of(), keys_of(**teacher_keys))


@pytest.mark.parametrize("family", ["RetinaNet", "Cascade"])
@pytest.mark.parametrize("side", ["student", "teacher"])
def test_other_detectors_are_refused(family, side):
    other = tiny_model(family)
    other = build_tap(other).keys(other)
    sides = (other, keys_of()) if side == "student" else (keys_of(), other)
    with pytest.raises(ValueError, match=f"the {side} is no two-stage detector or a cascade"):
        JointDetNAS(tiny_cfg(RCNN, **KEYS), *sides)


def test_sigmoid_heads_are_refused():
    keys = keys_of(**{"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True})
    with pytest.raises(ValueError, match="USE_SIGMOID_CE is True for the student"):
        JointDetNAS(tiny_cfg(RCNN, **KEYS), keys, keys_of())


def test_default_width_of_the_adapter_is_the_widest_neck_of_the_paper():
    cfg = elastic_cfg()
    assert cfg.KD.JOINTDETNAS.FEAT.ADAPTER_CHANNELS == 256 * 6 // 4
    distiller = JointDetNAS(
        tiny_cfg(RCNN, **{**KEYS, "KD.JOINTDETNAS.FEAT.ADAPTER_CHANNELS": 0}), keys_of(), keys_of()
    )
    assert distiller.adapter.out_channels == 32
    assert build_model(cfg).backbone.output_shape()["p2"].channels == 48
