"""Classes of the adjusted boxes, common to both heads, and the T-head's random subset."""

from typing import List, Tuple

import torch
from detectron2.config import configurable
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor

__all__ = ["ProposalLabeler"]


class ProposalLabeler:
    """Gives adjusted boxes the class of the ground truth they overlap most, or background.

    Every box is labelled: there is no range of overlaps that is ignored, and no ground truth gets
    a box that overlaps it too little (Sec. 3.2).
    """

    @configurable
    def __init__(self, *, iou_threshold: float = 0.6, num_classes: int):
        """
        Args:
            iou_threshold: smallest IoU of a positive, which is one at exactly this value.
            num_classes: K; the background has index K.
        """
        self.matcher = Matcher([iou_threshold], [0, 1], allow_low_quality_matches=False)
        self.iou_threshold = iou_threshold
        self.num_classes = num_classes

    @classmethod
    def from_config(cls, cfg):
        """
        Raises:
            ValueError: ground truth is to be appended to the boxes, or there is not exactly one
                threshold.
        """
        node = cfg.MODEL.ROI_HEADS
        if node.PROPOSAL_APPEND_GT:
            raise ValueError(
                "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT is True, but a ground-truth box belongs to no "
                "cell and has no S-head feature to learn from; set it to False"
            )
        if len(node.IOU_THRESHOLDS) != 1 or list(node.IOU_LABELS) != [0, 1]:
            raise ValueError(
                "MimicDet labels adjusted boxes with one threshold and ignores none: "
                "MODEL.ROI_HEADS.IOU_THRESHOLDS must have one value and IOU_LABELS be [0, 1], got "
                f"{list(node.IOU_THRESHOLDS)} and {list(node.IOU_LABELS)}"
            )
        return {"iou_threshold": node.IOU_THRESHOLDS[0], "num_classes": node.NUM_CLASSES}

    @torch.no_grad()
    def __call__(
        self, proposals: List[Instances], gt_instances: List[Instances]
    ) -> List[Instances]:
        """Return copies of ``proposals`` with ``gt_classes``, (R,) int64, and ``gt_boxes``.

        ``gt_boxes`` of a background box means nothing. Logs the share of the ground truth that
        any box overlaps enough, ``mimicdet/proposal_recall``, if there is ground truth.

        Args:
            proposals: with ``proposal_boxes``, one per image.
            gt_instances: with ``gt_boxes`` and ``gt_classes``.
        """
        labelled, recalled = [], []
        for boxes, truth in zip(proposals, gt_instances):
            iou = pairwise_iou(truth.gt_boxes, boxes.proposal_boxes)
            gt_classes, gt_boxes = self._match(iou, truth)
            fields = {**boxes.get_fields(), "gt_classes": gt_classes, "gt_boxes": gt_boxes}
            labelled.append(Instances(boxes.image_size, **fields))
            recalled.append((iou >= self.iou_threshold).any(dim=1))
        found = torch.cat(recalled)
        if len(found):
            get_event_storage().put_scalar("mimicdet/proposal_recall", found.float().mean().item())
        return labelled

    def _match(self, iou: Tensor, truth: Instances) -> Tuple[Tensor, Boxes]:
        """Class and box of the ground truth of each column of ``iou``, (M, R)."""
        index, is_positive = self.matcher(iou)
        if len(truth) == 0:
            background = torch.full_like(index, self.num_classes)
            return background, Boxes(iou.new_zeros(len(index), 4))
        gt_classes = truth.gt_classes[index].masked_fill(is_positive == 0, self.num_classes)
        return gt_classes, truth.gt_boxes[index]

    def sample(
        self, labelled: List[Instances], batch_size: int, positive_fraction: float
    ) -> List[Instances]:
        """Return a random subset of each image: Bt, the boxes that the T-head learns from.

        Positives are taken up to their share, negatives fill the rest; an image with fewer boxes
        yields fewer. Logs the mean numbers per image, ``mimicdet/num_fg_samples`` and
        ``mimicdet/num_bg_samples``.

        Args:
            labelled: result of a call, one per image.
            batch_size: boxes per image (paper: 128).
            positive_fraction: largest share of positives (paper: 0.25).
        """
        sampled, num_fg, num_bg = [], 0, 0
        for boxes in labelled:
            fg, bg = subsample_labels(
                boxes.gt_classes, batch_size, positive_fraction, self.num_classes
            )
            sampled.append(boxes[torch.cat((fg, bg))])
            num_fg, num_bg = num_fg + len(fg), num_bg + len(bg)
        storage = get_event_storage()
        storage.put_scalar("mimicdet/num_fg_samples", num_fg / max(len(labelled), 1))
        storage.put_scalar("mimicdet/num_bg_samples", num_bg / max(len(labelled), 1))
        return sampled
