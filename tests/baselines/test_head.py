"""HEAD against a separate computation with Detectron2's modules."""

import pytest
import torch
from detectron2.layers import cross_entropy
from torch import nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from kd_d2.blocks import at_anchors
from kd_d2.distillation import KDModel, build_distillers, build_tap
from tests.baselines.feature_cases import run_step, terms_of
from tests.baselines.prediction_cases import check_two_steps, gradients_reach, rows, state_of
from tests.engine.support import StopAt, teacher_keys, train
from tests.fixtures import (
    DENSE,
    registered_toy_dataset,
    teacher_of,
    tiny_batch,
    tiny_cfg,
    tiny_model,
)

TERMS = {"det_cls", "det_box", "fc1", "fc2", "ckd"}


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("head") / "teacher.yaml"
    path.write_text(tiny_cfg("GeneralizedRCNN").dump())
    return str(path)


def _model(teacher_file, arch="RetinaNet", student=None, teacher=None, **options):
    student = student or tiny_model(arch, 0)
    teacher = teacher or teacher_of(tiny_model("GeneralizedRCNN", 1))
    dotted = {f"KD.HEAD.{k}": v for k, v in {"WARMUP_ITERS": 0, **options}.items()}
    cfg = tiny_cfg(
        arch, **{"KD.DISTILLERS": ("HEAD",), "KD.TEACHER.CONFIG_FILE": teacher_file, **dotted}
    )
    distillers, _ = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    return KDModel(student=student, distillers=distillers, teacher=teacher), teacher


def test_assistant_starts_with_the_teachers_weights(teacher_file):
    model, teacher = _model(teacher_file)
    assistant = model.distillers["head"].assistant
    theirs = teacher.model.roi_heads.state_dict()
    assert set(assistant.state_dict()) == set(theirs)
    for name, value in assistant.state_dict().items():
        assert torch.equal(value, theirs[name])
        assert value.data_ptr() != theirs[name].data_ptr()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert {"distillers.head.assistant.box_head.fc1.weight"} < trained
    assert not any(n.startswith("student.assistant") for n in trained)
    assert {n.split(".")[0] for n in model.student.state_dict()} == {"backbone", "head"}


def test_a_checkpoint_wins_over_the_copy(teacher_file):
    """As on --resume: the state of the distillers is loaded into a model that was just built."""
    model, _ = _model(teacher_file)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    sum(run_step(model, tiny_batch()).values()).backward()
    optimizer.step()
    state = state_of(model.distillers)
    again, teacher = _model(teacher_file)
    name = "head.assistant.box_head.fc1.weight"
    assert not torch.equal(again.distillers.state_dict()[name], state[name])
    again.distillers.load_state_dict(state)
    assert all(torch.equal(v, state[k]) for k, v in again.distillers.state_dict().items())
    assert not torch.equal(state[name], teacher.model.roi_heads.box_head.fc1.weight)


def test_a_run_that_is_stopped_and_resumed(tmp_path):
    """The real trainer: the assistant goes on from the checkpoint, not from the teacher."""
    teacher = teacher_keys(tmp_path, "GeneralizedRCNN")
    with registered_toy_dataset(tmp_path, 4) as name:

        def config(folder):
            changes = {
                **teacher,
                "KD.ENABLED": True,
                "KD.DISTILLERS": ("HEAD",),
                "DATASETS.TRAIN": (name,),
                "SOLVER.MAX_ITER": 4,
                "SOLVER.CHECKPOINT_PERIOD": 2,
                "OUTPUT_DIR": str(tmp_path / folder),
            }
            cfg = tiny_cfg("GFL", **changes)
            cfg.freeze()
            return cfg

        whole = train(config("whole"))
        train(config("parts"), hooks=[StopAt(2)])
        resumed = train(config("parts"), resume=True)
    ours = dict(resumed.kd_model.named_parameters())
    for name, value in whole.kd_model.named_parameters():
        assert torch.equal(ours[name], value), name
    start = whole.teacher.state_to_copy()["roi_heads.box_head.fc1.weight"]
    assert not torch.equal(ours["distillers.head.assistant.box_head.fc1.weight"], start)
    state = torch.load(tmp_path / "whole" / "model_final.pth", weights_only=True)
    assert not any("assistant" in name for name in state["model"])
    assert any("assistant" in name for name in state["distillers"])


def _boxes(student, batch, classes=3):
    """Decoded boxes, scores and anchors of every image, best first after suppression."""
    with torch.no_grad():
        maps = student.backbone(student.preprocess_image(batch).tensor)
        maps = [maps[f] for f in student.head_in_features]
        logits, deltas = student.head(maps)
    logits, deltas = (torch.cat(rows(x, k), 1) for x, k in ((logits, classes), (deltas, 4)))
    anchors = torch.cat([a.tensor for a in student.anchor_generator(maps)])
    result = []
    for n, x in enumerate(batch):
        height, width = x["image"].shape[-2:]
        score, index = logits[n].max(1).values.sort(descending=True)
        score, index = score[:2000], index[:2000]
        boxes = student.box2box_transform.apply_deltas(deltas[n][index], anchors[index])
        boxes[:, 0::2] = boxes[:, 0::2].clamp(0, width)
        boxes[:, 1::2] = boxes[:, 1::2].clamp(0, height)
        large = ((boxes[:, 2:] - boxes[:, :2]) > 1).all(1)
        boxes, score, index = boxes[large], score[large], index[large]
        keep = nms(boxes, score, 0.7)[:8]
        result.append((boxes[keep], index[keep]))
    return maps, result


def test_follows_the_definition(teacher_file, monkeypatch):
    """All boxes are sampled, in order, so that a plain computation can follow."""
    # few, so that every one of them counts
    model, teacher = _model(teacher_file, NUM_BOXES=8)
    head, student = model.distillers["head"], model.student
    assistant = head.assistant

    def take_all(matched, labels, classes):
        rows = torch.arange(len(matched))
        if not len(classes):
            return rows, torch.full_like(matched, 3)
        return rows, torch.where(labels == 1, classes[matched], 3)

    monkeypatch.setattr(assistant, "_sample_proposals", take_all)
    batch = tiny_batch()
    terms = terms_of(run_step(model, batch))
    assert set(terms) == TERMS

    maps, found = _boxes(student, batch)
    theirs = teacher.model.backbone(teacher.preprocess(batch, (128, 128)))
    pooled = {"ours": [], "theirs": []}
    features, labels, origins = [], [], []
    with torch.no_grad():
        tower = [student.head.cls_subnet(m) for m in maps]
    cells = torch.cat([t.flatten(2).transpose(1, 2) for t in tower], 1)
    for n, (x, (boxes, anchors)) in enumerate(zip(batch, found)):
        gt = x["instances"]
        boxes = torch.cat([boxes, gt.gt_boxes.tensor])
        origins += anchors.tolist() + [-1] * len(gt)
        for box in boxes.tolist():
            area = (box[2] - box[0]) * (box[3] - box[1])
            octave = int(torch.tensor(area**0.5 / 224 + 1e-8).log2().floor()) + 4
            row = torch.tensor([[n, *box]])
            level = min(max(octave, 3), 6)  # the student's P3-P6
            pooled["ours"].append(roi_align(maps[level - 3], row, 5, 1 / 2**level, aligned=True))
            level = min(max(octave, 2), 5)  # the teacher's P2-P5
            pooled["theirs"].append(
                roi_align(theirs[f"p{level}"], row, 5, 1 / 2**level, aligned=True)
            )
            ious = []
            for g in gt.gt_boxes.tensor.tolist():
                w, h = (max(0.0, min(box[k + 2], g[k + 2]) - max(box[k], g[k])) for k in (0, 1))
                ious.append(w * h / (area + (g[2] - g[0]) * (g[3] - g[1]) - w * h))
            best = max(ious)
            labels.append(gt.gt_classes[ious.index(best)].item() if best >= 0.5 else 3)
        per_cell = 4 if len(anchors) else 1
        features += [cells[n, a // per_cell] for a in anchors.tolist()]
    hidden = {}
    for side, network in (("ours", assistant), ("theirs", teacher.model.roi_heads)):
        x = torch.cat(pooled[side]).flatten(1)
        fc1 = F.relu(network.box_head.fc1(x))
        hidden[side] = fc1, F.relu(network.box_head.fc2(fc1))
    for i in (0, 1):
        ours = head.adapters[f"fc{i + 1}"](hidden["ours"][i])
        expected = 2 * (ours - hidden["theirs"][i]).square().mean()
        assert terms[f"fc{i + 1}"].item() == pytest.approx(expected.item(), rel=1e-3)
    mine = torch.tensor(origins) >= 0
    assert mine.sum() == len(features) and (~mine).sum() == 5
    ours = head.adapters["ckd"](torch.stack(features))
    expected = 2 * (ours - hidden["theirs"][1][mine]).square().mean()
    assert terms["ckd"].item() == pytest.approx(expected.item(), rel=1e-3)
    scores = assistant.box_predictor.cls_score(hidden["ours"][1])
    expected = cross_entropy(scores, torch.tensor(labels))
    assert terms["det_cls"].item() == pytest.approx(expected.item(), rel=1e-3)
    assert terms["det_box"].item() > 0


def test_locations():
    levels = [torch.rand(2, 3, 2, 4), torch.rand(2, 3, 1, 2)]
    images, anchors = torch.tensor([1, 0]), torch.tensor([2 * 6 + 1, 2 * 8 + 2])
    found = at_anchors(levels, 2, images, anchors)
    assert torch.equal(found[0], levels[0][1, :, 1, 2])  # cell 6: row 1, column 2
    assert torch.equal(found[1], levels[1][0, :, 0, 1])


def test_warm_up(teacher_file):
    model, _ = _model(teacher_file, WARMUP_ITERS=3)
    head = model.distillers["head"]
    values = {}

    class Context:
        raw = {}
        iteration = 0

    head.compute = lambda ctx: {name: torch.ones(()) for name in head.weights}
    for Context.iteration in (0, 2, 3, 9):
        values[Context.iteration] = {k: v.item() for k, v in head(Context).items()}
    assert [values[i]["fc1"] for i in (0, 2, 3, 9)] == [0.5, 1.5, 2.0, 2.0]
    assert all(v["det_cls"] == 1.0 for v in values.values())
    assert Context.raw["head/ckd"] == 1.0  # logged without weight and factor


def test_gradients(teacher_file):
    model, _ = _model(teacher_file)
    terms = terms_of(run_step(model, tiny_batch()))
    for name in ("det_cls", "fc1", "fc2"):
        found = gradients_reach(terms[name], model)
        assert "distillers.head.assistant.box_head.fc1.weight" in found
        assert any("fpn_output" in n for n in found)
        assert not any(n.startswith("student.head.") for n in found)
    found = gradients_reach(terms["ckd"], model)
    assert "distillers.head.adapters.ckd.weight" in found
    assert "student.head.cls_subnet.0.weight" in found
    assert not any("bbox" in n or "cls_score" in n or "assistant" in n for n in found)


@pytest.mark.parametrize("arch", DENSE)
@pytest.mark.parametrize("num_gt", [(3, 0), 0])
def test_two_steps(teacher_file, arch, num_gt):
    model, teacher = _model(teacher_file, arch)
    check_two_steps(model, teacher, tiny_batch(num_gt=num_gt))


@pytest.mark.parametrize("terms, expected", [(("assist",), 2), (("assist", "akd"), 4)])
def test_published_stages(teacher_file, terms, expected):
    model, _ = _model(teacher_file, TERMS=terms)
    assert len(terms_of(run_step(model, tiny_batch()))) == expected
    assert sum(isinstance(m, nn.Linear) for m in model.distillers["head"].adapters.values()) == (
        expected - 2
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(teacher_file, dtype):
    model, _ = _model(teacher_file)
    with torch.autocast("cpu", dtype):
        terms = terms_of(run_step(model, tiny_batch()))
    assert all(v.dtype == torch.float32 and v.isfinite() for v in terms.values())


def test_errors(teacher_file):
    for options, message in (
        ({"TERMS": ("fgd",)}, "KD.HEAD.TERMS"),
        ({"TERMS": ()}, "KD.HEAD.TERMS is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            _model(teacher_file, **options)
    with pytest.raises(ValueError, match="one-stage student"):
        _model(teacher_file, "GeneralizedRCNN")
    with pytest.raises(ValueError, match="one RoI head"):
        _model(teacher_file, teacher=teacher_of(tiny_model("RetinaNet", 1)))
    with pytest.raises(ValueError, match="reads 64 channels.*has 32"):
        wide = {"MODEL.FPN.OUT_CHANNELS": 64}
        _model(teacher_file, teacher=teacher_of(tiny_model("GeneralizedRCNN", 1, **wide)))
    with pytest.raises(ValueError, match="3 classes.*5"):
        more = {"MODEL.ROI_HEADS.NUM_CLASSES": 5}
        _model(teacher_file, teacher=teacher_of(tiny_model("GeneralizedRCNN", 1, **more)))
    with pytest.raises(ValueError, match="CONFIG_FILE must be the teacher's"):
        other = {"MODEL.ROI_BOX_HEAD.FC_DIM": 24}
        _model(teacher_file, teacher=teacher_of(tiny_model("GeneralizedRCNN", 1, **other)))
