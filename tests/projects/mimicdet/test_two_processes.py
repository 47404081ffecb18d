"""The detector in two gloo processes equals one process with both batches."""

import pytest
import torch

from tests.distributed.test_two_processes import assert_close
from tests.engine.support import ROOT, run_program
from tests.projects.mimicdet import two_processes

pytestmark = pytest.mark.distributed

SCRIPT = ROOT / "tests" / "projects" / "mimicdet" / "two_processes.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mimicdet")
    code, output = run_program([SCRIPT, folder], timeout=400)
    assert code == 0, output[-4000:]
    return [torch.load(folder / f"rank{rank}.pth") for rank in range(2)]


@pytest.mark.parametrize("case", two_processes.CASES)
def test_gradients_are_those_of_the_joined_batch(case, ranks):
    """All images have as many boxes, so that means over boxes can be averaged over ranks; the
    refinement's positives differ, and their number is reduced."""
    inputs = two_processes.batch(case, 0) + two_processes.batch(case, 1)
    together = two_processes.step(case, inputs, distributed=False)
    first, second = (rank[case] for rank in ranks)

    for name, gradient in first["gradients"].items():
        assert torch.equal(gradient, second["gradients"][name]), name
    assert_close(first["gradients"], together["gradients"])
    assert set(first["losses"]) == {
        f"loss_{part}_{branch}"
        for part in ("refine", "s", "t", "mimic")
        for branch in ("cls", "reg")
    }
    for name, loss in together["losses"].items():
        mean = (first["losses"][name] + second["losses"][name]) / 2
        assert mean == pytest.approx(loss, rel=1e-4) and loss > 0, name

    positives = [x["scalars"]["mimicdet/num_refine_positives"] for x in (first, second)]
    assert positives[0] != positives[1]
    for one in (first, second, together):
        scalars = one["scalars"]
        assert scalars["mimicdet/num_fg_samples"] + scalars["mimicdet/num_bg_samples"] == 24
    if case != "objects":
        assert positives[1] == second["scalars"]["mimicdet/num_fg_samples"] == 0
        for name in ("refine", "s", "t"):
            assert second["losses"][f"loss_{name}_reg"] == 0 < first["losses"][f"loss_{name}_reg"]
