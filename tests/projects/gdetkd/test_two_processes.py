"""GDetKD in two gloo processes: equal to one with both batches, and equal to each other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]

# Everything that is labelled is sampled, so that no random choice differs, and every rank has the
# same number of boxes, so that the mean of the ranks' means is the mean of all.
WHOLE = {
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 8,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 100000,
    "MODEL.RPN.POSITIVE_FRACTION": 1.0,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
    "KD.GDETKD.SGFI.ROIS": "all",
    "KD.GDETKD.CKD.CHUNK": 5,
    "SOLVER.IMS_PER_BATCH": 4,
}


def batch(case, rank):
    """Two images of a rank. "whole": 2 boxes each; "empty": the second rank has none."""
    from tests.fixtures import tiny_batch

    counts = {"whole": (2, 2), "empty": (3, 0) if rank == 0 else (0, 0)}[case]
    return tiny_batch(num_gt=counts, seed=rank)


def result_of(student, inputs, distributed, **keys):
    """Losses, gradients and rows of the queue of one step."""
    from detectron2.engine import create_ddp_model

    from tests.projects.gdetkd.pairs import pair, step

    model = pair(student, **keys)
    wrapped = model
    if distributed:
        wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    losses, _ = step(wrapped, inputs)
    sum(losses.values()).backward()
    return {
        "losses": {name: value.item() for name, value in losses.items()},
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "queue": model.distillers["gdetkd"].ckd["0"].queue.valid.clone(),
    }


def _on_rank(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'init'}", rank=rank, world_size=2
    )
    # an RPN that proposes nothing: the second rank has no box at all
    nothing = {"MODEL.RPN.POST_NMS_TOPK_TRAIN": 0}
    result = {
        "whole": result_of("GeneralizedRCNN", batch("whole", rank), True, **WHOLE),
        "empty": result_of("Cascade", batch("empty", rank), True),
        "dense": result_of("RetinaNet", batch("empty", rank), True),
        "no boxes": result_of("GeneralizedRCNN", batch("empty", rank), True, **nothing),
    }
    torch.save(result, folder / f"rank{rank}.pth")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gdetkd")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, __file__, str(rank), folder], env=environment)
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=500) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    return [torch.load(folder / f"rank{rank}.pth") for rank in range(2)]


@pytest.mark.distributed
def test_two_processes_equal_one_with_both_batches(ranks):
    inputs = batch("whole", 0) + batch("whole", 1)
    together = result_of("GeneralizedRCNN", inputs, False, **WHOLE)
    assert len(together["queue"]) == 40
    for name, value in together["losses"].items():
        found = [rank["whole"]["losses"][name] for rank in ranks]
        assert sum(found) / 2 == pytest.approx(value, rel=1e-4), name
        assert found[0] != found[1]
    for rank in ranks:
        torch.testing.assert_close(rank["whole"]["queue"].sort(0)[0], together["queue"].sort(0)[0])
        for name, expected in together["gradients"].items():
            scale = expected.abs().max().item()
            torch.testing.assert_close(
                rank["whole"]["gradients"][name],
                expected,
                rtol=1e-4,
                atol=1e-4 * scale + 1e-7,
                msg=name,
            )


@pytest.mark.distributed
@pytest.mark.parametrize("case", ["whole", "empty", "dense", "no boxes"])
def test_both_ranks_agree(ranks, case):
    first, second = (rank[case] for rank in ranks)
    assert list(first["losses"]) == list(second["losses"])
    terms = {name for name in first["losses"] if name.startswith("loss_kd/gdetkd/")}
    assert len(terms) == (2 if case == "dense" else 4)
    assert first["gradients"].keys() == second["gradients"].keys()
    for name, gradient in first["gradients"].items():
        assert torch.equal(gradient, second["gradients"][name]), name
        assert torch.isfinite(gradient).all(), name
    assert torch.equal(first["queue"], second["queue"]) and len(first["queue"]) > 0


@pytest.mark.distributed
def test_a_rank_without_ground_truth_or_boxes(ranks):
    for case in ("empty", "dense"):
        losses = ranks[1][case]["losses"]
        assert losses["loss_kd/gdetkd/feat"] == 0 < losses["loss_kd/gdetkd/ckd"]
    nothing = ranks[1]["no boxes"]["losses"]
    assert all(v == 0 for k, v in nothing.items() if k.startswith("loss_kd/"))
    assert ranks[0]["no boxes"]["losses"]["loss_kd/gdetkd/cls"] > 0
    # the three annotated boxes of the first rank
    assert len(ranks[0]["no boxes"]["queue"]) == 3


if __name__ == "__main__":
    _on_rank(int(sys.argv[1]), Path(sys.argv[2]))
