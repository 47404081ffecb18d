"""PFI: the oracle of two cells, and its formula on real networks."""

import pytest
import torch

from kd_d2.baselines import PFI
from kd_d2.distillation import KeyInfo
from tests.baselines.feature_cases import (
    ToyContext,
    kd_model,
    level_keys,
    networks,
    run_step,
    terms_of,
)
from tests.baselines.test_frs import MAPS, P_S, P_T
from tests.fixtures import tiny_batch


def test_worked_out():
    """P = (.08, 0), squared differences (1, 25): .08 / 2 cells = 0.04."""
    keys = level_keys(**{"pred.cls": KeyInfo(2, (8,), (2,))})
    distiller = PFI(student_keys=keys, teacher_keys=keys)
    student = {"neck.p3": torch.zeros_like(MAPS), "pred.cls": [P_S.logit()]}
    ctx = ToyContext(student, {"neck.p3": MAPS, "pred.cls": [P_T.logit()]}, image_size=(8, 16))
    assert distiller(ctx)["feat"].item() == pytest.approx(1.5 * 0.04, rel=1e-5)


def test_on_real_networks():
    student, teacher = networks("RetinaNet")
    batch = tiny_batch()
    found = terms_of(run_step(kd_model("PFI", student, teacher, "RetinaNet"), batch))["feat"]
    values = []
    with torch.no_grad():
        sides = []
        for network in (student, teacher.model):
            features = network.backbone(network.preprocess_image(batch).tensor)
            levels = [features[f] for f in network.head_in_features]
            sides.append((levels, network.head(levels)[0]))
        for s, t, ours, theirs in zip(sides[0][0], sides[1][0], sides[0][1], sides[1][1]):
            p = (theirs.sigmoid() - ours.sigmoid()).square().mean(1)
            values.append((p * (s - t).square().mean(1)).mean())
    assert found.item() == pytest.approx(1.5 * torch.stack(values).mean().item(), rel=1e-3)


def test_classes_that_differ():
    with pytest.raises(ValueError, match="PFI compares 'pred.cls' .* student 3, teacher 4"):
        kd_model("PFI", *networks(**{"MODEL.GFL.NUM_CLASSES": 4}))
