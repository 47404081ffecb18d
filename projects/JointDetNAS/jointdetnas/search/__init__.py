"""The search of Joint-DetNAS: hill climbing by any number of workers that share a folder."""

from .config import add_hill_climbing_config

__all__ = ["add_hill_climbing_config"]
