"""References and helpers for the tests of G-DetKD's losses. Not a test itself."""

import math
from typing import Callable

import torch
from torch.autograd.graph import saved_tensors_hooks

__all__ = ["iou", "naive_info_nce", "naive_rows", "saved_bytes", "unit"]


def unit(*shape, seed=0, dtype=torch.float64):
    """Random unit vectors along the last dimension."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return x / x.norm(dim=-1, keepdim=True)


def naive_info_nce(queries, positives, negatives, allowed, temperature):
    """Loss of each row, written as eq. 2 reads."""
    result = []
    for i, query in enumerate(queries):
        positive = torch.exp(query @ positives[i] / temperature)
        total = positive
        for j, negative in enumerate(negatives):
            if allowed[i][j]:
                total = total + torch.exp(query @ negative / temperature)
        result.append(-torch.log(positive / total))
    return torch.stack(result) if result else queries.sum(dim=1)


def iou(a, b):
    """IoU of two boxes (x1, y1, x2, y2), lists of numbers."""
    sides = [max(min(a[k + 2], b[k + 2]) - max(a[k], b[k]), 0) for k in (0, 1)]
    shared = sides[0] * sides[1]
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return shared / (sum(areas) - shared)


def naive_rows(student, teacher, boxes, others, project, gamma, iou_thr):
    """CKD's loss of each row of one rank, by loops.

    Args:
        student, teacher: (N, D).
        boxes: lists of boxes, one list an image.
        others: (M, D) teacher rows of other steps and ranks.
        project: (n, D) -> (n, d).
    """
    images = [k for k, image in enumerate(boxes) for _ in image]
    flat = [box for image in boxes for box in image]

    def normalised(rows):
        z = project(rows)
        return z / z.norm(dim=1, keepdim=True).clamp(min=1e-6)

    negatives = normalised(torch.cat([teacher, others]))
    allowed = [
        [
            j >= len(flat)
            or (i != j and (images[i] != images[j] or iou(flat[i], flat[j]) <= iou_thr))
            for j in range(len(negatives))
        ]
        for i in range(len(flat))
    ]
    return naive_info_nce(normalised(student), normalised(teacher), negatives, allowed, gamma)


def saved_bytes(compute: Callable[[], torch.Tensor]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of ``compute``."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        result = compute()
    assert result.requires_grad and math.isfinite(result.item())
    return sum(storages.values())
