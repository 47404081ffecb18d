"""Configuration keys of the backbones and of the feature pyramid."""

from detectron2.config import CfgNode as CN

__all__ = ["add_backbone_config"]


def add_backbone_config(cfg: CN) -> None:
    """Add the keys of the backbones and of the feature pyramid to ``cfg``."""
