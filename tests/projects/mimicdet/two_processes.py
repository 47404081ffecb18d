"""What the two processes of ``test_two_processes.py`` do. Not a test itself.

``python two_processes.py FOLDER`` starts two gloo processes; results are left in FOLDER.
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist

# every box of every image is learnt from, so that no random choice differs between the two ways
ALL_BOXES = {
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 24,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 24,
    "MODEL.ROI_HEADS.POSITIVE_FRACTION": 1.0,
    # random boxes of a small model overlap objects by less than 0.6
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.4],
}
CASES = {
    # images of both ranks with objects; (objects per image of the first rank, of the second)
    "objects": ({}, ((3, 2), (1, 2))),
    "none on one rank": ({}, ((3, 2), 0)),
    "by positives": ({"MODEL.MIMICDET.REFINE.CLS_NORM": "num_pos"}, ((3, 2), 0)),
}


def batch(case, rank):
    from tests.fixtures import tiny_batch

    return tiny_batch(num_gt=CASES[case][1][rank], seed=rank)


def step(case, inputs, distributed):
    """Losses, gradients and scalars of one step."""
    from detectron2.engine import create_ddp_model
    from detectron2.utils.events import EventStorage

    from tests.projects.mimicdet.whole import mimicdet_model

    model = mimicdet_model(**ALL_BOXES, **CASES[case][0])
    wrapped = model
    if distributed:
        wrapped = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    with EventStorage() as events:
        losses = wrapped(inputs)
        sum(losses.values()).backward()
    return {
        "losses": {name: loss.item() for name, loss in losses.items()},
        "scalars": {name: value for name, (value, _) in events.latest().items()},
        "gradients": {n: p.grad for n, p in model.named_parameters() if p.requires_grad},
    }


def compare(folder):
    rank = dist.get_rank()
    torch.set_num_threads(1)
    results = {case: step(case, batch(case, rank), distributed=True) for case in CASES}
    torch.save(results, folder / f"rank{rank}.pth")


if __name__ == "__main__":
    # the processes started below import this file by its name in the package
    from kd_d2.engine.launch import launch
    from tests.distributed.workers import options
    from tests.projects.mimicdet import two_processes

    launch(two_processes.compare, options(), (Path(sys.argv[1]),), device="cpu")
