"""Checks of single values of ``KD.CROSSKD``; their errors name the key and the value."""

from typing import Collection, Optional, Union

from kd_d2 import config

__all__ = ["choice", "option"]

Number = Union[int, float]


def choice(key: str, value: str, known: Collection[str]) -> str:
    """Return ``value``, one of ``known``.

    Raises:
        ValueError: it is none of them.
    """
    return config.choice(f"KD.CROSSKD.{key}", value, known)


def option(key: str, value: Number) -> Optional[Number]:
    """Return ``value``, or None if it is -1: not set.

    Raises:
        ValueError: another negative number.
    """
    if value == -1:
        return None
    if not value >= 0:
        raise ValueError(f"KD.CROSSKD.{key} must be -1 (not set) or at least 0, got {value}")
    return value
