"""Head of SSD: two convolutions per level."""

from typing import List, Sequence, Tuple

from torch import Tensor, nn

__all__ = ["SSDHead"]


class SSDHead(nn.Module):
    """A 3x3 conv for the scores and one for the deltas on each level; nothing is shared.

    Attributes:
        cls_score, bbox_pred: the convs, per level.
    """

    def __init__(self, *, in_channels: Sequence[int], num_anchors: Sequence[int], num_classes: int):
        """
        Args:
            in_channels: of the levels, finest first.
            num_anchors: A of the levels, default boxes per cell.
            num_classes: K; the background is one more.
        """
        super().__init__()
        levels = list(zip(in_channels, num_anchors))
        self.num_classes = num_classes
        self.cls_score = nn.ModuleList(
            nn.Conv2d(channels, anchors * (num_classes + 1), 3, padding=1)
            for channels, anchors in levels
        )
        self.bbox_pred = nn.ModuleList(
            nn.Conv2d(channels, anchors * 4, 3, padding=1) for channels, anchors in levels
        )
        for conv in (*self.cls_score, *self.bbox_pred):
            nn.init.xavier_uniform_(conv.weight)
            nn.init.zeros_(conv.bias)

    def forward(self, features: List[Tensor]) -> Tuple[List[Tensor], List[Tensor]]:
        """Raw predictions.

        Args:
            features: per level (N, C, H, W).

        Returns:
            per level logits (N, A * (K + 1), H, W), the background last, and deltas
            (N, A * 4, H, W).
        """
        assert len(features) == len(self.cls_score), (len(features), len(self.cls_score))
        logits = [conv(x) for conv, x in zip(self.cls_score, features)]
        return logits, [conv(x) for conv, x in zip(self.bbox_pred, features)]
