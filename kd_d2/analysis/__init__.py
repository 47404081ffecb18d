"""What a detector costs: parameters, multiply-adds, time and memory."""

from .inputs import random_batch

__all__ = ["random_batch"]
