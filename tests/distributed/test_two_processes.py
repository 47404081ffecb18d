"""Two gloo processes: equal to one with both batches, equal to each other, and never stuck."""

import json

import pytest
import torch

from tests.distributed import workers
from tests.engine.support import (
    ROOT,
    data_module,
    registered_user_module,
    run_program,
    teacher_keys,
)
from tests.fixtures import registered_toy_dataset

pytestmark = pytest.mark.distributed

SCRIPT = ROOT / "tests" / "distributed" / "workers.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of both processes."""
    folder = tmp_path_factory.mktemp("two")
    teacher_keys(folder, "RetinaNet")
    with registered_toy_dataset(folder, 6, size=(64, 96)) as name:
        (folder / "name.txt").write_text(name)
        data_module(folder / "data.py", name)
        code, output = run_program([SCRIPT, "compare", folder], timeout=550)
    assert code == 0, output[-4000:]
    return [torch.load(folder / f"rank{rank}.pth") for rank in range(2)] + [folder]


def assert_close(actual, expected):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(
            actual[name], gradient, rtol=1e-4, atol=1e-4 * scale + 1e-7, msg=name
        )


@pytest.mark.parametrize("case", ["different", "empty"])
def test_two_processes_equal_one_with_both_batches(case, ranks):
    first, second, _ = ranks
    inputs = workers.batch(case, 0) + workers.batch(case, 1)
    together = workers.gradients(workers.CLS_ONLY, inputs, distributed=False)
    for rank in (first, second):
        assert_close(rank[case]["gradients"], together["gradients"])
    for name, value in together["losses"].items():
        mean = (first[case]["losses"][name] + second[case]["losses"][name]) / 2
        assert mean == pytest.approx(value, rel=1e-4), name
    # the ranks see different things
    assert first[case]["losses"] != second[case]["losses"]
    assert together["losses"]["loss_kd/crosskd/cls"] > 0


def test_same_images_on_both_ranks_equal_one_process(ranks):
    """Statistics of a batch (alignment, PKD) are a rank's own: equal images, equal results."""
    with registered_user_module():
        inputs = workers.batch("same", 0)
        alone = workers.gradients(workers.EVERYTHING, inputs, distributed=False)
    for rank in ranks[:2]:
        assert rank["same"]["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        assert_close(rank["same"]["gradients"], alone["gradients"])
    terms = {"crosskd/cls", "crosskd/reg", "pkd/feat", "queue/mean", "queue/queue"}
    assert {f"loss_kd/{term}" for term in terms} < set(alone["losses"])
    assert alone["gradients"]["distillers.queue.adapter.weight"].abs().sum() > 0


def test_both_ranks_are_trained_alike(ranks):
    first, second = (rank["whole"] for rank in ranks[:2])
    assert first["parameters"].keys() == second["parameters"].keys()
    for name, value in first["parameters"].items():
        assert torch.equal(value, second["parameters"][name]), name
    assert "distillers.queue.adapter.weight" in first["parameters"]
    assert first["loss_keys"] == second["loss_keys"] and first["loss_keys"]
    # losses are averaged and written by rank 0
    assert {f"loss_kd/{k}" for k in ("crosskd/cls", "pkd/feat", "queue/mean")} < set(
        first["curve"][3]
    )
    saved = torch.load(ranks[2] / "teacher.pth")["model"]
    for rank in (first, second):
        assert not rank["teacher_training"]
        assert all(torch.equal(saved[key], value) for key, value in rank["teacher"].items())


def test_checkpoint_is_written_once_with_both_states(ranks):
    first, folder = ranks[0]["whole"], ranks[2] / "whole"
    assert {f.name for f in folder.glob("model_*")} == {
        "model_0000001.pth",
        "model_0000003.pth",
        "model_final.pth",
    }
    state = torch.load(folder / "model_final.pth", weights_only=True)
    for name, value in state["model"].items():
        if f"student.{name}" in first["parameters"]:
            assert torch.equal(value, first["parameters"][f"student.{name}"]), name
    random_states = [r["random"]["torch"] for r in state["trainer"]["rank_states"]["ranks"]]
    assert len(random_states) == 2 and not torch.equal(*random_states)
    assert state["run_info"]["world_size"] == 2
    iterations = [json.loads(x)["iteration"] for x in (folder / "metrics.json").open()]
    assert len(iterations) == len(set(iterations))


def test_two_processes_resume_exactly(ranks):
    for rank in ranks[:2]:
        whole, resumed = rank["whole"], rank["resumed"]
        assert sorted(resumed["curve"]) == [2, 3]
        for name, value in whole["parameters"].items():
            assert torch.equal(resumed["parameters"][name], value), name
    assert ranks[0]["resumed"]["curve"] == {i: ranks[0]["whole"]["curve"][i] for i in (2, 3)}


def test_untrained_teacher_is_the_same_on_both_ranks(ranks):
    first, second = (rank["untrained"] for rank in ranks[:2])
    assert all(torch.equal(first[key], value) for key, value in second.items())


def test_nan_on_one_rank_stops_both_with_its_name(ranks):
    for number, rank in enumerate(ranks[:2]):
        assert "at iteration 2: loss_kd/pkd/feat (here " in rank["broken"]
        assert f"rank {number} of 2" in rank["broken"]
        assert ("here nan" in rank["broken"]) == (number == 1)
    assert [f.name for f in (ranks[2] / "broken").glob("model_*")] == ["model_0000001.pth"]


def test_a_lost_rank_ends_all(tmp_path):
    code, output = run_program([SCRIPT, "failures", tmp_path], timeout=240)
    assert code == 0, output[-4000:]
    results = json.loads((tmp_path / "failures.json").read_text())
    # a process that waits for the lost one would take 600 s
    assert all(result["seconds"] < 120 for result in results.values()), results
    assert "the reason of rank 1" in results["raise"]["end"]
    assert results["exit"]["end"].startswith("SystemExit")
    assert "exit code" in results["exit"]["end"] or "closed" in results["exit"]["end"]
    assert "SIGKILL" in results["kill"]["end"] or "closed" in results["kill"]["end"]
