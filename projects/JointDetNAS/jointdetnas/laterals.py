"""Weights of a lateral conv of the pyramid whose stage has other channels than before."""

from typing import Callable, Dict, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .morph_resnet import MorphResNet, find_pyramid
from .surgery import bottom_up_of, evaluating

__all__ = ["LATERAL_INITS", "refit_lateral", "xavier_lateral"]

# Ridge, relative to the mean square of the inputs.
RIDGE = 1e-3


@torch.no_grad()
def refit_lateral(
    model: nn.Module, name: str, feature: str, body: MorphResNet, images: Sequence[Tensor]
) -> Tensor:
    """The 1x1 weights that come closest to the old output of the lateral. Ours.

    Ridge regression on the new map, Y (P,C) at all P pixels of all images, of the old conv's output
    without bias, T (P,D): W = T'Y (Y'Y + rho I)^-1, with rho = RIDGE tr(Y'Y) / C, in float64. The
    bias, or the norm, stays the old one.

    Args:
        model: the parent, whose pyramid has the lateral.
        name: path of the lateral from the pyramid.
        feature: the map it reads, e.g. "res3".
        body: the new backbone; its map has the same size.
        images: normalised and padded batches (N,3,H,W). Both networks are run in eval mode.

    Returns:
        weight (D,C,1,1).
    """
    old_body = bottom_up_of(model)
    old = find_pyramid(model).get_submodule(name).weight
    gram: Tensor = torch.zeros(())
    cross: Tensor = torch.zeros(())
    with evaluating(old_body, body):
        for batch in images:
            batch = batch.to(old.device)
            y = body(batch)[feature].double().movedim(1, -1).flatten(0, 2)
            t = F.conv2d(old_body(batch)[feature], old).double().movedim(1, -1).flatten(0, 2)
            gram = gram.to(y) + y.T @ y
            cross = cross.to(y) + t.T @ y
    channels = len(gram)
    # a map that is zero everywhere has no best weights; any finite ones will do
    rho = (RIDGE * gram.trace() / channels).clamp(min=torch.finfo(torch.float64).tiny)
    system = gram + rho * torch.eye(channels, dtype=gram.dtype, device=gram.device)
    weight = torch.linalg.solve(system, cross.T).T
    return weight.to(old.dtype)[:, :, None, None]


def xavier_lateral(
    model: nn.Module, name: str, feature: str, body: MorphResNet, images: Sequence[Tensor]
) -> Tensor:
    """Fresh weights as Detectron2 initialises a lateral, drawn from torch's generator."""
    old = find_pyramid(model).get_submodule(name).weight
    channels = body.output_shape()[feature].channels
    weight = old.new_empty(old.shape[0], channels, 1, 1)
    return nn.init.kaiming_uniform_(weight.detach(), a=1)


# Name in SEARCH.REARRANGE.LATERAL_INIT -> function with the arguments of refit_lateral.
LATERAL_INITS: Dict[str, Callable[..., Tensor]] = {
    "ridge": refit_lateral,
    "xavier": xavier_lateral,
}
