"""What the two processes of ``test_predictions.py`` do. Not a test itself.

``python prediction_workers.py FOLDER`` starts two gloo processes; results are left in FOLDER.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

# terms whose divisors count what all ranks have, or the images of a rank
REDUCED = {
    "KD.DISTILLERS": ("Mimic", "LD"),
    "KD.MIMIC.BOX_LOSS": "giou",
    "KD.LD.TERMS": ("main", "vlr"),
    "KD.LD.NORM": "per_image",
}
# whose results depend on the rank's own batch: only equal batches can be compared
LOCAL = {"KD.DISTILLERS": ("LD", "RankMimic", "RoIImitation", "GID")}


def compare(folder):
    from tests.distributed.workers import batch, gradients

    rank = dist.get_rank()
    torch.set_num_threads(1)
    results = {
        case: gradients(REDUCED, batch(case, rank), distributed=True)
        for case in ("different", "empty")
    }
    results["same"] = gradients(LOCAL, batch("same", rank), distributed=True)
    torch.save(results, folder / f"rank{rank}.pth")


if __name__ == "__main__":
    # the processes started below import this file by its name in the package
    from kd_d2.engine.launch import launch
    from tests.distributed import prediction_workers, workers

    launch(prediction_workers.compare, workers.options(), (Path(sys.argv[1]),), device="cpu")
