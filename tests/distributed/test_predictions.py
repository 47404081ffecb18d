"""Prediction baselines in two gloo processes equal one process with both batches."""

import pytest
import torch

from tests.distributed import workers
from tests.distributed.prediction_workers import LOCAL, REDUCED
from tests.distributed.test_two_processes import assert_close
from tests.engine.support import ROOT, run_program

pytestmark = pytest.mark.distributed

SCRIPT = ROOT / "tests" / "distributed" / "prediction_workers.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("predictions")
    code, output = run_program([SCRIPT, folder], timeout=400)
    assert code == 0, output[-4000:]
    return [torch.load(folder / f"rank{rank}.pth") for rank in range(2)]


@pytest.mark.parametrize("case", ["different", "empty"])
def test_divisors_of_all_ranks(case, ranks):
    inputs = workers.batch(case, 0) + workers.batch(case, 1)
    together = workers.gradients(REDUCED, inputs, distributed=False)
    for rank in ranks:
        assert_close(rank[case]["gradients"], together["gradients"])
    names = {f"loss_kd/{term}" for term in ("mimic/cls", "mimic/box", "ld/main", "ld/vlr")}
    assert names < set(together["losses"])
    for name in names:
        mean = sum(rank[case]["losses"][name] for rank in ranks) / 2
        assert mean == pytest.approx(together["losses"][name], rel=1e-4), name
        assert together["losses"][name] > 0
        assert ranks[0][case]["losses"][name] != ranks[1][case]["losses"][name]


def test_same_images_on_both_ranks(ranks):
    alone = workers.gradients(LOCAL, workers.batch("same", 0), distributed=False)
    for rank in ranks:
        assert rank["same"]["losses"] == pytest.approx(alone["losses"], rel=1e-4)
        assert_close(rank["same"]["gradients"], alone["gradients"])
    assert alone["gradients"]["distillers.gid.adapter.layers.0.weight"].abs().sum() > 0
