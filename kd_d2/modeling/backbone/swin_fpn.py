"""Swin Transformer below a feature pyramid."""

from typing import Dict, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import BACKBONE_REGISTRY, FPN, SwinTransformer
from torchvision.ops import StochasticDepth

from .fpn import build_fpn_from_config

__all__ = ["Swin", "build_swin_fpn_backbone"]

_NAMES = ("res2", "res3", "res4", "res5")


class Swin(SwinTransformer):
    """Detectron2's ``SwinTransformer`` with maps called res2..res5 and torchvision's drop path.

    Parameter names are Detectron2's. Detectron2 takes its drop path from timm, an extra
    dependency; torchvision's row-wise ``StochasticDepth`` computes the same. Frozen stages stay
    in evaluation mode.

    Args:
        embed_dim: channels of the first stage.
        depths: blocks per stage.
        num_heads: attention heads per stage.
        window_size: side of an attention window in tokens.
        mlp_ratio: hidden width of the MLPs relative to the stage's.
        drop_path_rate: drop probability of the last block, in [0, 1), linear from 0.
        freeze_at: 0 nothing, 1 the patch embedding, 1+s also the first s stages.
        in_channels: channels of the image.
        out_features: names among "res2" (stride 4) ... "res5" (stride 32).

    Raises:
        ValueError: unknown or no output names, or numbers outside their range.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.2,
        freeze_at: int = 0,
        in_channels: int = 3,
        out_features: Sequence[str] = ("res3", "res4", "res5"),
    ):
        if not out_features or any(name not in _NAMES for name in out_features):
            raise ValueError(
                f"MODEL.SWIN.OUT_FEATURES is {list(out_features)}, must be among {list(_NAMES)}"
            )
        if len(depths) != 4 or len(num_heads) != 4:
            raise ValueError(
                f"MODEL.SWIN.DEPTHS {tuple(depths)} and NUM_HEADS {tuple(num_heads)} "
                "must have 4 entries"
            )
        if any((embed_dim * 2**i) % heads for i, heads in enumerate(num_heads)):
            raise ValueError(
                f"MODEL.SWIN.NUM_HEADS {tuple(num_heads)} do not divide the widths "
                f"{[embed_dim * 2**i for i in range(4)]} that follow from EMBED_DIM"
            )
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f"MODEL.SWIN.DROP_PATH_RATE is {drop_path_rate}, must be in [0, 1)")
        if not 0 <= freeze_at <= 5:
            raise ValueError(f"MODEL.SWIN.FREEZE_AT is {freeze_at}, must be in 0..5")
        indices = tuple(i for i, name in enumerate(_NAMES) if name in out_features)
        num_stages = indices[-1] + 1  # stages beyond the last output would be trained by nothing
        super().__init__(
            in_chans=in_channels,
            embed_dim=embed_dim,
            depths=tuple(depths[:num_stages]),
            num_heads=tuple(num_heads[:num_stages]),
            window_size=window_size,
            mlp_ratio=mlp_ratio,
            drop_path_rate=0.0,
            out_indices=indices,
            # Detectron2: 0 and 1 freeze the patch embedding, 1+s the first s stages.
            frozen_stages=min(freeze_at, num_stages + 1) if freeze_at > 0 else -1,
        )
        self._out_features = [_NAMES[i] for i in indices]
        self._out_feature_channels = {_NAMES[i]: embed_dim * 2**i for i in indices}
        self._out_feature_strides = {_NAMES[i]: 2 ** (i + 2) for i in indices}
        blocks = [block for layer in self.layers for block in layer.blocks]
        rates = torch.linspace(0, drop_path_rate, sum(depths)).tolist()
        for block, rate in zip(blocks, rates):
            if rate > 0:
                block.drop_path = StochasticDepth(rate, mode="row")
        self.train(self.training)

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def train(self, mode: bool = True):
        """Set training mode, except for what ``freeze_at`` froze."""
        super().train(mode)
        if self.frozen_stages >= 1:
            self.patch_embed.eval()
            for layer in self.layers[: self.frozen_stages - 1]:
                layer.eval()
        return self

    def forward(self, x: torch.Tensor) -> Dict[str, torch.Tensor]:
        """Return the maps ``out_features`` of the images ``x`` (N,in_channels,H,W)."""
        features = super().forward(x)
        return dict(zip(self._out_features, features.values()))


@BACKBONE_REGISTRY.register()
def build_swin_fpn_backbone(cfg, input_shape: ShapeSpec) -> FPN:
    """Return a Swin Transformer below a pyramid P3..P7."""
    node = cfg.MODEL.SWIN
    bottom_up = Swin(
        embed_dim=node.EMBED_DIM,
        depths=node.DEPTHS,
        num_heads=node.NUM_HEADS,
        window_size=node.WINDOW_SIZE,
        mlp_ratio=node.MLP_RATIO,
        drop_path_rate=node.DROP_PATH_RATE,
        freeze_at=node.FREEZE_AT,
        in_channels=input_shape.channels,
        out_features=node.OUT_FEATURES,
    )
    return build_fpn_from_config(cfg, bottom_up)
