"""Check of values of ``MODEL.MIMICDET`` that are names."""

from typing import Mapping, TypeVar

from kd_d2 import config

__all__ = ["choice"]

T = TypeVar("T")


def choice(key: str, value: str, known: Mapping[str, T]) -> T:
    """Return what ``value`` stands for.

    Args:
        key: below ``MODEL.MIMICDET``, for the message.
        value: a key of ``known``.
        known: name -> meaning.

    Raises:
        ValueError: ``value`` is not in ``known``.
    """
    return known[config.choice(f"MODEL.MIMICDET.{key}", value, known)]
