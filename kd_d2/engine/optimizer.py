"""Optimizer of a KDModel: learning rates of distillers, clipping over the whole model."""

import itertools
from typing import Dict

import torch
from detectron2.config import CfgNode
from detectron2.solver.build import (
    get_default_optimizer_params,
    maybe_add_gradient_clipping,
    reduce_param_groups,
)
from torch import nn

from kd_d2.distillation import KDModel

__all__ = ["FullModelClippedSGD", "build_optimizer"]


class FullModelClippedSGD(torch.optim.SGD):
    """SGD that clips the gradient norm over all its parameters together before each step."""

    def __init__(self, params, *, max_norm: float, norm_type: float = 2.0, **kwargs):
        super().__init__(params, **kwargs)
        self.max_norm = max_norm
        self.norm_type = norm_type

    def step(self, closure=None):
        parameters = itertools.chain(*(group["params"] for group in self.param_groups))
        torch.nn.utils.clip_grad_norm_(parameters, self.max_norm, self.norm_type)
        return super().step(closure)


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """Return Detectron2's SGD for ``model``, with the keys of this library applied.

    Parameters of distillers get ``SOLVER.BASE_LR * KD.ADAPTER_LR_FACTOR`` and whatever their
    :meth:`Distiller.optimizer_overrides` say.

    Raises:
        ValueError: FULL_MODEL clipping with a CLIP_TYPE other than "norm", or an override for a
            parameter that does not exist.
    """
    solver = cfg.SOLVER
    overrides = _overrides(model)

    def lr_factor(name: str) -> float:
        if not name.startswith("distillers."):
            return 1.0
        return cfg.KD.ADAPTER_LR_FACTOR * overrides.get(name, {}).get("lr_factor", 1.0)

    groups = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        lr_factor_func=lr_factor,
    )
    parameters = dict(model.named_parameters())
    for name, values in overrides.items():
        if "weight_decay" in values:
            groups.append({"params": [parameters[name]], "weight_decay": values["weight_decay"]})
    # later items win: the overriding entries above follow the defaults
    arguments = {
        "params": reduce_param_groups(groups),
        "lr": solver.BASE_LR,
        "momentum": solver.MOMENTUM,
        "nesterov": solver.NESTEROV,
        "weight_decay": solver.WEIGHT_DECAY,
        "foreach": True,
    }
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and clip.FULL_MODEL:
        if clip.CLIP_TYPE != "norm":
            raise ValueError(
                "SOLVER.CLIP_GRADIENTS.FULL_MODEL needs CLIP_TYPE 'norm', "
                f"got '{clip.CLIP_TYPE}'"
            )
        return FullModelClippedSGD(max_norm=clip.CLIP_VALUE, norm_type=clip.NORM_TYPE, **arguments)
    return maybe_add_gradient_clipping(cfg, torch.optim.SGD(**arguments))


def _overrides(model: nn.Module) -> Dict[str, Dict[str, float]]:
    if not isinstance(model, KDModel):
        return {}
    parameters = dict(model.named_parameters())
    result = {}
    for label, distiller in model.distillers.items():
        for name, values in distiller.optimizer_overrides().items():
            full_name = f"distillers.{label}.{name}"
            if full_name not in parameters:
                raise ValueError(
                    f"distiller '{label}' overrides the optimizer for '{name}', which is none of "
                    "its parameters"
                )
            result[full_name] = values
    return result
