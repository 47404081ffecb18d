"""The DICOD distiller."""

from typing import Dict, Mapping, Optional

import torch
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage
from torch import Tensor

from kd_d2.distillation import DISTILLER_REGISTRY, DistillationContext, Distiller, MethodInfo
from kd_d2.modeling.layers.box_crop import crop_boxes
from kd_d2.modeling.layers.paired_iou import paired_iou

from .image_classifier import correct_in_top
from .kd_cls import ClsMode
from .kd_loc import OBJ, localisation_loss, target_views
from .positives import Positives, StudentPositives, build_student_positives
from .teacher_check import TeacherCheck
from .validation import (
    check_at_least_1,
    check_numbers,
    check_teacher,
    check_train_on_pred_boxes,
    check_weight,
    cls_mode,
    feature_pools,
    pixel_pool,
    terms_of,
)

__all__ = ["DICOD"]


@DISTILLER_REGISTRY.register()
class DICOD(Distiller):
    """Distils a classifier of crops into a detector, on the detector's positives.

    Terms, as far as they are on: ``cls`` (KDcls), the student's classes against the classifier's on
    the crop of the ground-truth box; ``loc_obj`` and ``loc_feat`` (KDloc), pixels and early
    features of the classifier under the predicted box against those under the ground-truth box.
    Without ``cls`` and ``loc_feat`` there is no teacher.

    Attributes:
        mode: loss of the term ``cls``, or None.
        pools: view (pixels or layer of the classifier) -> cells a side.
        layers: the classifier's among these.

    ``cls`` is a sum over the positives, divided by the sum of max(positives, 1) over the images of
    this process (published code; the paper's 1 / K if every image has positives). The others are
    means over the positives of this process.
    """

    info = MethodInfo(
        title="DICOD: distilling image classifiers in object detectors",
        paper="Guo et al., Distilling Image Classifiers in Object Detectors, NeurIPS 2021, "
        "arXiv 2106.05209",
        compares="classes of positives with a classifier's on the objects' crops; the image, and "
        "the classifier's early features, under predicted and annotated boxes",
        requires=(
            "classifier of the same classes as teacher",
            "SSD, RetinaNet, Faster R-CNN, or a detector with such keys",
            "ground truth",
        ),
        gains=(
            "SSD300: 25.6 -> 27.9 (Table 1)",
            "SSD512: 29.4 -> 32.1 (Table 1)",
            "Faster R-CNN QR50: 23.3 -> 27.2 (Table 1)",
            "Faster R-CNN MobileNetV2: 31.9 -> 32.7 (Table 1)",
            "Faster R-CNN R-50 2x: 38.4 -> 38.8 (Table 1)",
            "RetinaNet R-50 2x: 37.4 -> 37.9 (Table 1)",
        ),
        unverified="weights for students with normalised standard deviation are SSD's; cascades, "
        "C4, FCOS, ATSS and GFL are ours",
    )

    @configurable
    def __init__(
        self,
        *,
        weights: Mapping[str, float],
        positives: StudentPositives,
        mode: Optional[ClsMode] = None,
        logits_size: int = 112,
        sample_size: int = 112,
        pools: Optional[Mapping[str, int]] = None,
        chunk: int = 256,
    ):
        """
        Args:
            weights: of the terms that are on, "cls", "loc_obj", "loc_feat".
            positives: source of the student's positives.
            mode: of the term "cls"; None: no such term.
            logits_size: side of the crops that the classifier takes for it.
            sample_size: side of the crops that are compared.
            pools: of the terms "loc_obj" (view ``OBJ``) and "loc_feat" (layers of the classifier):
                view -> cells a side.
            chunk: most crops at once.
        """
        pools = dict(pools or {})
        layers = [view for view in pools if view != OBJ]
        on = {"cls": mode is not None, "loc_obj": OBJ in pools, "loc_feat": bool(layers)}
        assert set(weights) == {name for name, yes in on.items() if yes}
        teacher_needs = [f"crops.{layer}" for layer in layers]
        super().__init__(
            weights=weights,
            student_needs=positives.student_needs,
            teacher_needs=teacher_needs + (["crops.logits"] if on["cls"] else []),
        )
        self.needs_teacher = bool(self.teacher_needs)
        self.positives = positives
        self.mode = mode
        self.pools = pools
        self.layers = layers
        self._logits_size, self._sample_size = logits_size, sample_size
        self._chunk = chunk
        self._check = TeacherCheck(positives.num_classes)

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        node = cls.config_node(cfg)
        terms = terms_of(node)
        if not terms:
            raise ValueError(
                "every term of DICOD is off: KD.DICOD.CLS.ENABLED, LOC.ENABLED, LOC.OBJ_WEIGHT and "
                "LOC.FEAT_WEIGHT; switch one on, or set KD.ENABLED to False"
            )
        for key, value in terms.values():
            check_weight(key, value)
        for key in ("CHUNK", "SAMPLE_SIZE"):
            check_at_least_1(f"LOC.{key}", node.LOC[key])
        positives = build_student_positives(student_keys)
        check_train_on_pred_boxes(cfg, student_keys)
        if "cls" in terms or "loc_feat" in terms:
            check_teacher(cfg.KD.TEACHER.TYPE, teacher_keys)
        mode, logits_size, pools = None, 0, {}
        if "cls" in terms:
            mode = cls_mode(node.CLS, positives.scores)
            check_numbers(positives.num_classes, teacher_keys)
            (logits_size,) = teacher_keys["crops.logits"].signature
        if "loc_obj" in terms:
            pools[OBJ] = pixel_pool(node.LOC)
        if "loc_feat" in terms:
            pools.update(feature_pools(node.LOC, teacher_keys))
        return {
            "weights": {term: value for term, (_, value) in terms.items()},
            "positives": positives,
            "mode": mode,
            "logits_size": logits_size,
            "sample_size": node.LOC.SAMPLE_SIZE,
            "pools": pools,
            "chunk": node.LOC.CHUNK,
        }

    @classmethod
    def wants_teacher(cls, cfg):
        return bool({"cls", "loc_feat"} & set(terms_of(cls.config_node(cfg))))

    @property
    def crop_options(self) -> Dict[str, int]:
        """Side of the crops that are compared, and most of them at once: "size" and "chunk"."""
        return {"size": self._sample_size, "chunk": self._chunk}

    # ----------------------------------------------------------------------------- compute
    def compute(self, ctx: DistillationContext) -> Dict[str, Tensor]:
        positives = self.positives(ctx)
        # an image
        scalars = {"num_pos": positives.boxes.new_tensor(len(positives) / len(positives.counts))}
        if len(positives):
            crops = _GroundTruthCrops(ctx)
            losses = self._localisation(ctx, positives, crops)
            if self.mode is not None:
                losses["cls"], right = self._classification(ctx, positives, crops)
                scalars["teacher_top1_on_gt"] = 100 * right / crops.number
            ious = paired_iou(positives.boxes.detach(), positives.gt_boxes)
            scalars["mean_iou_pred_gt"] = ious.mean()
        else:
            # sums of nothing: 0, connected to the student's outputs, which all ranks wait for
            sums = {"cls": positives.logits.float().sum()}
            losses = {term: sums.get(term, positives.boxes.sum()) for term in self.weights}
        values = self._log(scalars)
        if "teacher_top1_on_gt" in values:
            number = crops.number
            self._check(round(values["teacher_top1_on_gt"] * number / 100), number)
        return losses

    def _classification(self, ctx, positives: Positives, crops: "_GroundTruthCrops"):
        """Return the loss, and how many ground-truth boxes the classifier is right about."""
        parts = crops.of_size(self._logits_size).split(self._chunk)
        logits = torch.cat([ctx.teacher.logits(part) for part in parts])
        with torch.autocast(logits.device.type, enabled=False):
            losses = self.mode(positives.logits, logits[positives.gt_index])
        divisor = sum(max(count, 1) for count in positives.counts)
        classes = torch.cat([x.gt_classes for x in ctx.gt_instances])
        return losses.sum() / divisor, correct_in_top(logits, classes, 1)

    def _localisation(self, ctx, positives: Positives, crops: "_GroundTruthCrops"):
        """Return the terms that are on."""
        if not self.pools:
            return {}
        options = {"pools": self.pools, "chunk": self._chunk}
        options["features"] = ctx.teacher.features if self.layers else None
        views = localisation_loss(
            ctx.images,
            list(positives.boxes.split(positives.counts)),
            ctx.image_sizes,
            target_views(crops.of_size(self._sample_size), **options),
            positives.gt_index,
            size=self._sample_size,
            **options,
        )
        losses = {"loc_obj": views.pop(OBJ)} if OBJ in views else {}
        if views:
            losses["loc_feat"] = torch.stack(list(views.values())).mean()
        return losses

    def _log(self, scalars: Mapping[str, Tensor]) -> Dict[str, float]:
        # one transfer for all of them
        values = torch.stack([value.detach().float() for value in scalars.values()]).tolist()
        for name, value in zip(scalars, values):
            get_event_storage().put_scalar(f"{self.label}/{name}", value)
        return dict(zip(scalars, values))


class _GroundTruthCrops:
    """Crops of all ground-truth boxes of a step, made once a size."""

    def __init__(self, ctx: DistillationContext):
        self._ctx = ctx
        self._boxes = [x.gt_boxes.tensor for x in ctx.gt_instances]
        self._crops: Dict[int, Tensor] = {}
        self.number = sum(map(len, self._boxes))

    @torch.no_grad()
    def of_size(self, size: int) -> Tensor:
        """Return (M, 3, size, size) without a graph."""
        if size not in self._crops:
            ctx = self._ctx
            self._crops[size] = crop_boxes(ctx.images, self._boxes, size, ctx.image_sizes)
        return self._crops[size]
