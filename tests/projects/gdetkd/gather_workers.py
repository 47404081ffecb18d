"""What the two gloo processes of ``test_gather.py`` do. Not a test itself.

``python gather_workers.py RANK FOLDER``; the result is left in FOLDER.
"""

import copy
import sys
from pathlib import Path

import torch
from detectron2.structures import Boxes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

# rows that each rank sends per step
SENT = (([1, 2], [3, 4]), ([5], [6, 7]), ([], [8]), ([9, 10, 11], []), ([], []))
# RoIs per image of each rank and step of CKD and SGFI
STEPS = (((3, 1), (2, 0)), ((2, 0), (0, 0)), ((0, 0), (1, 2)), ((0, 0), (0, 0)))
SIZE = 7


class Losses(nn.Module):
    """CKD and SGFI as a training step calls them."""

    def __init__(self):
        from kd_d2.projects.gdetkd.ckd import ContrastiveKD
        from kd_d2.projects.gdetkd.sgfi import SGFI

        super().__init__()
        torch.manual_seed(0)
        self.ckd = ContrastiveKD(student_dim=5, teacher_dim=4, dim=3, gamma=0.4, queue_size=SIZE)
        self.sgfi = SGFI(student_channels=2, teacher_channels=3, num_levels=2, key_dim=2)

    def forward(self, inputs):
        ckd = self.ckd(inputs["student"], inputs["teacher"], [Boxes(b) for b in inputs["boxes"]])
        return ckd.loss + self.sgfi(inputs["student_rois"], inputs["teacher_rois"]).loss


def inputs(step, rank):
    """Random rows of a rank."""
    generator = torch.Generator().manual_seed(10 * step + rank)
    counts = STEPS[step][rank]
    number = sum(counts)

    def normal(*shape):
        return torch.randn(number, *shape, generator=generator)

    corners = torch.randint(0, 6, (number, 2), generator=generator).float()
    return {
        "student": normal(5),
        "teacher": normal(4),
        "boxes": torch.cat([corners, corners + 10], dim=1).split(counts),
        "student_rois": normal(2, 2, 7, 7),
        "teacher_rois": normal(3, 7, 7),
    }


def run(rank):
    from kd_d2.projects.gdetkd.gather import gather_rows
    from kd_d2.projects.gdetkd.teacher_queue import TeacherQueue

    queue = TeacherQueue(6, 1)
    result = {"queues": [], "columns": [], "counts": [], "losses": [], "gradients": []}
    for sent in SENT:
        rows = torch.tensor(sent[rank], dtype=torch.float32).reshape(-1, 1).requires_grad_()
        gathered = gather_rows(rows)
        assert gathered.rank == rank and not gathered.rows.requires_grad
        result["columns"].append(queue.push(*gathered).tolist())
        result["counts"].append(gathered.counts)
        result["queues"].append(queue.valid.flatten().tolist())
    result["half"] = gather_rows(torch.full((rank + 1, 2), rank + 0.5, dtype=torch.float16)).rows

    model = Losses()
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    for step in range(len(STEPS)):
        model.zero_grad()
        loss = wrapped(inputs(step, rank))
        loss.backward()
        result["losses"].append(loss.item())
        gradients = {name: p.grad for name, p in model.named_parameters()}
        result["gradients"].append(copy.deepcopy(gradients))
    return result


def main(rank, folder):
    torch.set_num_threads(1)
    init = f"file://{folder / 'init'}"
    torch.distributed.init_process_group("gloo", init_method=init, rank=rank, world_size=2)
    torch.save(run(rank), folder / f"rank{rank}.pth")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
