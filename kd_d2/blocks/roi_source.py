"""Features of boxes, pooled from both pyramids."""

from typing import List, Optional, Sequence, Tuple, Union

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes

from kd_d2.losses.precision import full_precision

from .adapters import Adapter
from .pair import Pair
from .registry import KD_SOURCES
from .roi_sets import ROI_SETS, RoISet
from .sources import Source
from .term import bind_adapter

__all__ = ["RoISource", "pyramid_pooler"]


def pyramid_pooler(strides: Sequence[int], size: int, sampling_ratio: int = 0) -> ROIPooler:
    """Return Detectron2's RoIAlign over a pyramid; boxes go to the level of their size.

    A box of 224x224 pixels goes to stride 16, of twice the side to the next coarser level.
    """
    return ROIPooler(
        output_size=size,
        scales=[1.0 / stride for stride in strides],
        sampling_ratio=sampling_ratio,
        pooler_type="ROIAlignV2",
    )


@KD_SOURCES.register()
class RoISource(Source):
    """RoIAlign features of the same boxes in both networks: one pair of (M, C, h, w).

    M counts the boxes of all images. The maps are the pyramids ("neck"): of a two-stage detector
    those that its RoI head reads. Both sides pool every box from the level that its size belongs
    to among the strides that both have.
    """

    def __init__(
        self,
        rois: Union[str, RoISet] = "gt",
        size: int = 7,
        sampling_ratio: int = 0,
        adapter: Optional[Adapter] = None,
    ):
        """
        Args:
            rois: "gt": annotated boxes; "student": what the student proposes; "general": what both
                disagree about most (GID); or any :class:`RoISet`.
            size: side of the pooled features, cells.
            sampling_ratio: points per cell and direction; 0: as many as the box has pixels there.
            adapter: applied to the student's maps before they are pooled. Its parameters must be
                registered by the distiller.

        Raises:
            ValueError: an unknown name.
        """
        if isinstance(rois, str):
            if rois not in ROI_SETS:
                raise ValueError(f"RoISource: rois must be one of {sorted(ROI_SETS)}, got '{rois}'")
            rois = ROI_SETS[rois]()
        self.rois, self.adapter = rois, adapter
        self._size, self._sampling_ratio = size, sampling_ratio

    def bind(self, student_keys, teacher_keys):
        for side, keys in (("student", student_keys), ("teacher", teacher_keys)):
            if "neck" not in keys:
                raise ValueError(f"RoISource pools from 'neck', which the {side} does not have")
        self.rois.bind(student_keys, teacher_keys)
        ours, theirs = student_keys["neck"], teacher_keys["neck"]
        strides = [stride for stride in ours.strides if stride in theirs.strides]
        if not strides:
            raise ValueError(
                f"RoISource: the student's pyramid has strides {ours.strides}, the teacher's "
                f"{theirs.strides}: no level in common"
            )
        self._indices = tuple((ours.strides.index(s), theirs.strides.index(s)) for s in strides)
        self._pooler = pyramid_pooler(strides, self._size, self._sampling_ratio)
        self.widths = ((ours.channels, theirs.channels),)
        if self.adapter is not None:
            bind_adapter(self.adapter, self.widths * len(strides))
            self.widths = ((theirs.channels, theirs.channels),)
        self.student_needs = ("neck", *self.rois.student_needs)
        self.teacher_needs = ("neck", *self.rois.teacher_needs)

    def __call__(self, ctx) -> List[Pair]:
        student, teacher, boxes = ctx.memo((self, "pooled"), lambda: self._pooled(ctx))
        return [Pair(student, teacher, True, (), None, "neck", boxes)]

    def _pooled(self, ctx) -> Tuple[torch.Tensor, torch.Tensor, List[Boxes]]:
        boxes = [Boxes(b.tensor.detach()) for b in self.rois(ctx)]
        ours = [ctx.student["neck"][i] for i, _ in self._indices]
        theirs = [ctx.teacher["neck"][j] for _, j in self._indices]
        if self.adapter is not None:
            ours = [self.adapter(x, i) for i, x in enumerate(ours)]
        with torch.autocast(ours[0].device.type, enabled=False):
            student = self._pool(ours, boxes)
            with torch.no_grad():
                teacher = self._pool(theirs, boxes)
        return student, teacher, boxes

    def _pool(self, maps, boxes):
        pooled = self._pooler([full_precision(x) for x in maps], boxes)
        # without a box the pooler's result has no graph
        return pooled + maps[0].flatten()[:0].sum()
