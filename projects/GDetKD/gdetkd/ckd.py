"""Contrastive distillation of RoI representations: CKD (Sec. 3.3 of the G-DetKD paper)."""

from typing import List, NamedTuple, Optional

import torch
from detectron2.structures import Boxes, pairwise_iou
from fvcore.nn.weight_init import c2_xavier_fill
from torch import Tensor, nn
from torch.nn import functional as F

from kd_d2.config import choice
from kd_d2.losses.precision import full_precision

from .gather import gather_rows
from .infonce import info_nce
from .teacher_queue import QUEUE_DTYPES, TeacherQueue

__all__ = ["CKDOutput", "ContrastiveKD", "PerAnchorLinear", "overlapping"]


class CKDOutput(NamedTuple):
    """Result of one batch, scalars but for ``correct``.

    Attributes:
        loss: unweighted, mean over this rank's RoIs.
        accuracy: share of the RoIs whose own teacher row is the closest of all.
        positive_cosine: mean cosine of the projections of both representations of a RoI.
        num_negatives: mean number of negatives of a RoI.
        correct: (N,) bool, the RoIs that ``accuracy`` counts.
    """

    loss: Tensor
    accuracy: Tensor
    positive_cosine: Tensor
    num_negatives: Tensor
    correct: Tensor


class PerAnchorLinear(nn.Module):
    """One linear map per anchor of a cell.

    The anchors of a cell share their input, so without maps of their own they would share their
    representation (Appendix of the paper, "decoupling"; separate maps are the specification's).
    """

    def __init__(self, in_features: int, out_features: int, num_anchors: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_anchors, out_features, in_features))
        self.bias = nn.Parameter(torch.zeros(num_anchors, out_features))
        for weight in self.weight:
            nn.init.kaiming_uniform_(weight, a=1)

    def forward(self, x: Tensor, anchor: Tensor) -> Tensor:
        """Return (N, out_features) for x (N, in_features) and anchor (N,) int64."""
        order = anchor.argsort()
        counts = anchor.bincount(minlength=len(self.weight)).tolist()
        groups = zip(x[order].split(counts), self.weight, self.bias, strict=True)
        return torch.cat([F.linear(*group) for group in groups])[order.argsort()]


@torch.no_grad()
def overlapping(boxes: List[Boxes], iou_thr: float) -> Tensor:
    """(N, N) bool: boxes of one image with IoU > ``iou_thr``; images in order."""
    return torch.block_diag(*[pairwise_iou(b, b) > iou_thr for b in boxes])


class ContrastiveKD(nn.Module):
    """InfoNCE between student's and teacher's representation of the same RoIs.

    Negatives of a RoI are the teacher's rows of other RoIs: those of this step on all ranks and of
    earlier steps from a queue, but not those of the same image in this step that overlap it. The
    queue holds what the teacher computed, before the projection, so it does not age while the
    projection is trained. A collective: every rank calls it in every step, also without RoIs.
    """

    def __init__(
        self,
        *,
        student_dim: int,
        teacher_dim: int,
        num_anchors: int = 0,
        dim: int = 128,
        proj: str = "linear",
        gamma: float = 0.07,
        queue_size: int = 81920,
        queue_dtype: str = "float32",
        iou_thr: float = 0.5,
        grad_through_queue: bool = True,
        chunk: int = 256,
    ):
        """
        Args:
            student_dim, teacher_dim: D_s and D_t, widths of the representations. Where they differ,
                a linear map takes the student's to D_t first.
            num_anchors: of a cell of a dense student: one such map each, whatever the widths. 0:
                no cells.
            dim: width of the projection f_theta, which both sides share.
            proj: "linear", or "mlp" with one hidden layer of D_t.
            gamma: temperature.
            queue_size: K.
            queue_dtype: "float32" or "float16".
            iou_thr: boxes of an image with a larger IoU are no negatives of each other; 1: all are.
            grad_through_queue: whether the negatives train f_theta.
            chunk: student's rows per chunk, see :func:`info_nce`.

        Raises:
            ValueError: an unknown name, or a number out of its range.
        """
        super().__init__()
        choice("KD.GDETKD.CKD.PROJ", proj, ("linear", "mlp"))
        choice("KD.GDETKD.CKD.QUEUE_DTYPE", queue_dtype, QUEUE_DTYPES)
        for key, value, fits in (
            ("GAMMA", gamma, gamma > 0),
            ("DIM", dim, dim > 0),
            ("QUEUE_SIZE", queue_size, queue_size > 0),
            ("CHUNK", chunk, chunk >= 0),
            ("IOU_THR", iou_thr, 0 <= iou_thr <= 1),
        ):
            if not fits:
                raise ValueError(f"KD.GDETKD.CKD.{key} is out of its range: {value}")
        self.adapter: Optional[nn.Module] = None
        if num_anchors > 0:
            self.adapter = PerAnchorLinear(student_dim, teacher_dim, num_anchors)
        elif student_dim != teacher_dim:
            self.adapter = nn.Linear(student_dim, teacher_dim)
        hidden = [nn.Linear(teacher_dim, teacher_dim), nn.ReLU()] if proj == "mlp" else []
        self.projection = nn.Sequential(*hidden, nn.Linear(teacher_dim, dim))
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                c2_xavier_fill(layer)
        self.queue = TeacherQueue(queue_size, teacher_dim, QUEUE_DTYPES[queue_dtype])
        self._decoupled = num_anchors > 0
        self._gamma, self._iou_thr, self._chunk = gamma, iou_thr, chunk
        self._grad_through_queue = grad_through_queue

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        boxes: List[Boxes],
        anchor: Optional[Tensor] = None,
    ) -> CKDOutput:
        """Store the teacher's rows of all ranks, then compare.

        Args:
            student: (N, D_s), with graph.
            teacher: (N, D_t), a constant.
            boxes: those of the N rows, one ``Boxes`` an image, images in order.
            anchor: (N,) int64, for dense students.

        Raises:
            ValueError: the arguments differ in N.
        """
        numbers = (len(student), len(teacher), sum(len(b) for b in boxes))
        if len(set(numbers)) > 1:
            raise ValueError(
                "CKD compares RoIs one by one, got {} of the student, {} of the teacher and {} "
                "boxes".format(*numbers)
            )
        with torch.autocast(student.device.type, enabled=False):
            teacher = full_precision(teacher.detach())
            columns = self.queue.push(*gather_rows(teacher.to(self.queue.rows.dtype)))
            excluded = overlapping(boxes, self._iou_thr)
            excluded.fill_diagonal_(True)
            result = info_nce(
                self._project(self._adapted(full_precision(student), anchor)),
                self._project(teacher),
                self._negatives(),
                temperature=self._gamma,
                allowed=~excluded,
                columns=columns,
                chunk=self._chunk,
            )
        return CKDOutput(*result)

    def _adapted(self, student: Tensor, anchor: Optional[Tensor]) -> Tensor:
        if self.adapter is None:
            return student
        return self.adapter(student, anchor) if self._decoupled else self.adapter(student)

    def _project(self, rows: Tensor) -> Tensor:
        return F.normalize(self.projection(rows), dim=1, eps=1e-6)

    def _negatives(self) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._grad_through_queue):
            result = self._project(full_precision(self.queue.valid))
        if result.requires_grad:
            self.queue.keep_for_backward(result)
        return result
