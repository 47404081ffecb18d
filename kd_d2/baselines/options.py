"""Values of the baselines' config nodes: choices, presets of a detector, adapters."""

from typing import Mapping, Optional

from kd_d2.blocks import ConvAdapter
from kd_d2.config import choice

__all__ = ["ADAPTERS", "choice", "conv_adapter", "preset"]

ADAPTERS = ("auto", "conv", "none")


def preset(key: str, value: float, presets: Mapping[str, float], meta_arch: str) -> float:
    """Return ``value``, or, if it is -1.0, the value of the student's family.

    Args:
        key: config key, for the message.
        presets: MODEL.META_ARCHITECTURE -> value.

    Raises:
        ValueError: -1.0 for a family without a value, or another negative number.
    """
    if value == -1:
        if meta_arch not in presets:
            raise ValueError(
                f"{key} is -1.0 (preset), but there is no preset for MODEL.META_ARCHITECTURE "
                f"'{meta_arch}', only for {', '.join(sorted(presets))}; set {key}"
            )
        return presets[meta_arch]
    if not value >= 0:
        raise ValueError(f"{key} must be -1.0 (preset) or at least 0, got {value}")
    return value


def conv_adapter(key: str, value: str, kernel_size: int = 1) -> Optional[ConvAdapter]:
    """Return the adapter of a choice: "conv", "auto" (where the widths differ) or "none".

    Raises:
        ValueError: ``value`` is neither.
    """
    if choice(key, value, ADAPTERS) == "none":
        return None
    return ConvAdapter(kernel_size, only_if_needed=value == "auto")
