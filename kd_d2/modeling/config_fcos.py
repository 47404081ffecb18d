"""Configuration keys of FCOS."""

from detectron2.config import CfgNode as CN

__all__ = ["add_fcos_config"]


def add_fcos_config(cfg: CN) -> None:
    """Add the node ``MODEL.FCOS`` to ``cfg``."""
