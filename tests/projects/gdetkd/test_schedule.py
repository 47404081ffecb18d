"""Learning rates of the recipes, iteration by iteration."""

from pathlib import Path

import pytest
import torch

from kd_d2.engine import KDTrainer
from kd_d2.engine.main import build_config

CONFIGS = Path(__file__).parents[3] / "projects" / "GDetKD" / "configs"
ITERATIONS = {
    "COCO/faster_rcnn_r18_r50_1x.yaml": 90_000,
    "COCO/retinanet_r18_r50_1x.yaml": 90_000,
    "COCO/table4_fcos_r18_x101_2x.yaml": 180_000,
}


def rates(cfg, iterations):
    """Learning rate of each of ``iterations``."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=cfg.SOLVER.BASE_LR)
    scheduler = KDTrainer.build_lr_scheduler(cfg, optimizer)
    result = {}
    for iteration in iterations:
        scheduler.last_epoch = iteration
        (result[iteration],) = scheduler.get_lr()
    return result


@pytest.mark.parametrize("recipe", ITERATIONS)
def test_values_of_the_recipes(recipe):
    cfg, total = build_config(str(CONFIGS / recipe)), ITERATIONS[recipe]
    assert cfg.SOLVER.MAX_ITER == total
    found = rates(cfg, (0, 500, 1000, total // 2, total))
    expected = {0: 3e-5, total // 2: 0.015, total: 0}
    if total == 90_000:
        expected.update({500: 0.015010, 1000: 0.029991})
    for iteration, rate in expected.items():
        assert found[iteration] == pytest.approx(rate, abs=5e-7), iteration
    assert cfg.SOLVER.IMS_PER_BATCH == 16 and cfg.SOLVER.MOMENTUM == 0.9
    assert cfg.SOLVER.WEIGHT_DECAY == 1e-4


@pytest.mark.parametrize(
    "folder, name, total",
    [("VOC", "07", 5_400), ("VOC", "0712", 18_000), ("BDD100K", "r50", 52_500)],
)
def test_lengths_on_other_data(folder, name, total):
    found = [p for p in (CONFIGS / folder).glob("*.yaml") if name in p.stem.split("_")]
    assert found
    for path in found:
        cfg = build_config(str(path))
        assert cfg.SOLVER.MAX_ITER == total, path.name
        found_rates = rates(cfg, (0, total // 2, total))
        assert found_rates[0] == pytest.approx(3e-5)
        assert found_rates[total // 2] == pytest.approx(0.015)
        assert found_rates[total] == pytest.approx(0, abs=1e-9)
