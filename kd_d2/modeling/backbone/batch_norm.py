"""Batch normalisation with fixed statistics and a trained affine part."""

from torch import nn

__all__ = ["EvalStatsBatchNorm2d", "use_eval_statistics"]


class EvalStatsBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` that normalises with its running statistics in training, too.

    The statistics are never updated; weight and bias are ordinary parameters. This is what
    mmdetection calls ``norm_eval=True``. State-dict keys are those of ``BatchNorm2d``.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.train(False)

    def train(self, mode: bool = True):
        """Stay in evaluation mode whatever ``mode`` is."""
        return super().train(False)


def use_eval_statistics(module: nn.Module) -> nn.Module:
    """Return ``module`` with each ``BatchNorm2d`` in it exchanged by the class above.

    Parameters and buffers are carried over as they are, so names, values and
    ``requires_grad`` do not change. Other normalisations (FrozenBN, GN) are left alone.

    Args:
        module: any module; it is changed in place unless it is a ``BatchNorm2d`` itself.
    """
    if isinstance(module, nn.BatchNorm2d):
        result = EvalStatsBatchNorm2d(
            module.num_features, module.eps, module.momentum, module.affine
        )
        result.weight, result.bias = module.weight, module.bias
        for name, value in module.named_buffers(recurse=False):
            setattr(result, name, value)
        return result
    for name, child in module.named_children():
        module.add_module(name, use_eval_statistics(child))
    return module
