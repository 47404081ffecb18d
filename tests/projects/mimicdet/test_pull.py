"""Pull of the mimic loss against gradients from ``backward`` of the whole losses."""

import copy
import importlib.util
import math
from pathlib import Path

import pytest
import torch

from kd_d2.projects.mimicdet.pull import PLACES, mimic_pull
from tests.fixtures import CLASSES, registered_toy_dataset, save_weights, tiny_batch
from tests.projects.mimicdet.whole import losses_of, mimicdet_cfg, mimicdet_model

SCRIPT = Path(__file__).resolve().parents[3] / "projects/MimicDet/tools/mimic_pull.py"

WEIGHTS = {"MODEL.MIMICDET.MIMIC.WEIGHT": 2.0, "MODEL.MIMICDET.MIMIC.REG_WEIGHT": 0.5}


@pytest.fixture(scope="module")
def model():
    return mimicdet_model(**WEIGHTS)


@pytest.fixture(scope="module")
def pulls(model):
    torch.manual_seed(0)
    return {(x.term, x.boxes): x for x in mimic_pull(model, tiny_batch())}


def _gradients(model, names):
    """Gradients of the sum of the losses ``names`` at the alignment and the 1x1 layers."""
    model = copy.deepcopy(model)
    losses, _ = losses_of(model, tiny_batch())
    sum(losses[name] for name in names).backward()
    head = model.s_head
    groups = ([head.align], [head.projections, head.cls_score, head.bbox_pred])
    return [
        torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for part in group
                for p in part.parameters()
            ]
        )
        for group in groups
    ]


@pytest.mark.parametrize("term", ["loss_mimic_cls", "loss_mimic_reg"])
def test_all_boxes(model, pulls, term):
    found = pulls[term, "all"]
    reference = _gradients(model, ["loss_s_cls", "loss_s_reg"])
    for place, of_term, of_heads in zip(PLACES[1:], _gradients(model, [term]), reference):
        ratio = of_term.norm() / of_heads.norm()
        assert found.ratios[place] == pytest.approx(ratio.item(), rel=1e-3)
        cosine = torch.cosine_similarity(of_term, of_heads, dim=0)
        assert found.agreement[place] == pytest.approx(cosine.item(), abs=1e-3)
    losses, _ = losses_of(copy.deepcopy(model), tiny_batch())
    weight = {"loss_mimic_cls": 2.0, "loss_mimic_reg": 1.0}[term]
    assert found.distance == pytest.approx(losses[term].item() / weight, rel=1e-4)
    assert found.ratios["pyramid"] > 0


def test_objects_and_background_are_all_boxes(model, pulls):
    for term in ("loss_mimic_cls", "loss_mimic_reg"):
        parts = [pulls[term, boxes] for boxes in ("objects", "background")]
        whole = pulls[term, "all"]
        assert sum(x.count for x in parts) == whole.count and all(x.count for x in parts)
        mean = sum(x.count * x.distance for x in parts) / whole.count
        assert whole.distance == pytest.approx(mean, rel=1e-5)
        for place in PLACES:
            # projections on the reference add up, as gradients do
            along = [x.ratios[place] * x.agreement[place] for x in (*parts, whole)]
            assert along[0] + along[1] == pytest.approx(along[2], abs=1e-4)


def test_nothing_changes():
    model = mimicdet_model()
    before, loss = copy.deepcopy(model.state_dict()), model.mimic_loss
    mimic_pull(model, tiny_batch())
    assert model.mimic_loss is loss and not model.backbone._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_without_objects(model):
    batch = tiny_batch()
    for record in batch:
        record["instances"] = record["instances"][:0]
    found = {(x.term, x.boxes): x for x in mimic_pull(model, batch)}
    objects = found["loss_mimic_reg", "objects"]
    assert objects.count == 0 and math.isnan(objects.distance)
    assert objects.ratios["pyramid"] == 0


@pytest.mark.parametrize("key, value", [("WEIGHT", 0.0), ("NUM_SAMPLES", 3), ("BOXES", "objects")])
def test_what_cannot_be_measured(key, value):
    other = mimicdet_model(**{f"MODEL.MIMICDET.MIMIC.{key}": value})
    with pytest.raises(ValueError, match="MIMIC.WEIGHT above 0"):
        mimic_pull(other, tiny_batch())


def test_command(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("mimic_pull_tool", SCRIPT)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    with registered_toy_dataset(tmp_path, 3) as name:
        config = tmp_path / "config.yaml"
        config.write_text(mimicdet_cfg(**{"DATASETS.TRAIN": (name,), "SEED": 1}).dump())
        weights = save_weights(mimicdet_model(), tmp_path / "a.pth", CLASSES)
        tool.main(["--config-file", str(config), "--batches", "2", "MODEL.WEIGHTS", weights])
    rows = [
        line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if "loss_" in line
    ]
    names = [(term.strip(), boxes.strip()) for term, boxes in rows]
    assert ("loss_mimic_cls", "objects") in names and ("loss_mimic_reg", "all") in names
    assert len(names) == 6
