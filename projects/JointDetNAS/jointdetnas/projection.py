"""A projection shortcut that starts as the identity at stride 2."""

from typing import Dict, List, Sequence

import torch
from torch import Tensor

from .morph_resnet import MorphResNet
from .space import Position
from .surgery import evaluating

__all__ = ["identity_projection"]


@torch.no_grad()
def identity_projection(
    body: MorphResNet, position: Position, images: Sequence[Tensor]
) -> Dict[str, Tensor]:
    """State of a shortcut conv with batch norm that keeps every second pixel as it is. Ours.

    A Dirac 1x1 conv; the batch norm's running statistics are those of the block's input at these
    pixels, and weight and bias undo the normalisation: exact in eval mode, and in training mode as
    far as a batch has the same statistics.

    Args:
        body: network before the block is moved; run in eval mode.
        position: the block.
        images: normalised and padded batches (N,3,H,W) to measure on.

    Returns:
        tensors by their names in a block: "shortcut.weight", "shortcut.norm.weight", ...
    """
    block = body.block_at(position)
    inputs: List[Tensor] = []
    handle = block.register_forward_pre_hook(
        lambda _, args: inputs.append(args[0][:, :, ::2, ::2].double().movedim(1, 0).flatten(1))
    )
    try:
        with evaluating(body):
            for batch in images:
                body(batch.to(block.convs[0].weight.device))
    finally:
        handle.remove()
    like = block.convs[0].weight
    values = torch.cat(inputs, dim=1)
    mean, variance = values.mean(1).to(like), values.var(1, unbiased=False).to(like)
    norm = block.convs[-1].norm
    channels = len(mean)
    weight = torch.eye(channels, dtype=like.dtype, device=like.device)[:, :, None, None]
    state = {
        "weight": (variance + norm.eps).sqrt(),
        "bias": mean,
        "running_mean": mean,
        "running_var": variance,
    }
    if "num_batches_tracked" in norm.state_dict():
        state["num_batches_tracked"] = torch.zeros_like(norm.num_batches_tracked)
    return {
        "shortcut.weight": weight,
        **{f"shortcut.norm.{name}": tensor.clone() for name, tensor in state.items()},
    }
