"""A detector as it is deployed."""

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from kd_d2.checkpoint import load_weights

__all__ = ["deployed"]


def deployed(cfg: CfgNode, weights: str = "") -> nn.Module:
    """Return the detector of a config in eval mode, without what only training needs.

    A meta-architecture names such parts in ``training_only_modules``; with a method
    ``deploy(cfg)`` it is built again without them.

    Args:
        cfg: config of the detector.
        weights: checkpoint that has to fit it; parts for training only may be missing there.
            Empty: random weights.

    Raises:
        ValueError, FileNotFoundError: see :func:`kd_d2.checkpoint.load_weights`.
    """
    model = build_model(cfg)
    training_only = tuple(getattr(model, "training_only_modules", ()))
    if weights:
        load_weights(model, weights, cfg.KD.ALLOW_UNSAFE_LOAD, optional=training_only)
    if hasattr(model, "deploy"):
        small = cfg.clone()
        small.defrost()
        model.deploy(small)
        state, model = model.state_dict(), build_model(small)
        model.load_state_dict({name: state[name] for name in model.state_dict()})
    else:
        for path in training_only:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, None)
    return model.eval()
