"""Detectors and their parts that Detectron2 lacks; importing it fills Detectron2's registries."""

from . import backbone, meta_arch, roi_heads

__all__ = ["backbone", "meta_arch", "roi_heads"]
