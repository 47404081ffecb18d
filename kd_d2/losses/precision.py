"""The precision in which losses are computed."""

import torch
from torch import Tensor

__all__ = ["full_precision"]


def full_precision(x: Tensor) -> Tensor:
    """``x`` in fp32 if it is fp16 or bf16, unchanged otherwise: fp64 stays, for gradient checks.

    Args:
        x: floating-point tensor of any shape.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
