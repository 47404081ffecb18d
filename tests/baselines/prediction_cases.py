"""What the tests of the prediction baselines share: raw predictions as rows, labels of anchors."""

from typing import Dict, List

import torch
from torch import nn

from tests.baselines.feature_cases import run_step, terms_of

__all__ = ["check_two_steps", "gradients_reach", "predictions", "rows", "state_of"]


def rows(levels: List[torch.Tensor], dim: int) -> List[torch.Tensor]:
    """Per level (N, A*dim, H, W) -> (N, H*W*A, dim), cell by cell."""
    result = []
    for x in levels:
        n, c, h, w = x.shape
        x = x.reshape(n, c // dim, dim, h, w)
        result.append(x.permute(0, 3, 4, 1, 2).reshape(n, -1, dim))
    return result


@torch.no_grad()
def predictions(model: nn.Module, batch) -> Dict[str, torch.Tensor]:
    """What a dense detector says of a batch, all levels together.

    Returns:
        "cls" (N, R, K), "box" (N, R, D) and maybe "ctr" (N, R, 1), raw; "anchors" (R, 4); "labels"
        (N, R); "matched" (N, R, 4); "positive" (N, R); "maps", the pyramid.
    """
    maps = model.backbone(model.preprocess_image(batch).tensor)
    maps = [maps[f] for f in model.head_in_features]
    output = model.head(maps)
    box_dim = getattr(model.box2box_transform, "box_dim", 4)
    dims = {"cls": model.num_classes, "box": box_dim, "ctr": 1}
    result = {k: torch.cat(rows(x, dims[k]), 1) for k, x in zip(dims, output)}
    anchors = model.anchor_generator(maps)
    labels, boxes = model.label_anchors(anchors, [x["instances"] for x in batch])
    result["labels"], result["matched"] = torch.stack(labels), torch.stack(boxes)
    result["positive"] = (result["labels"] >= 0) & (result["labels"] < model.num_classes)
    result["anchors"] = torch.cat([x.tensor for x in anchors])
    result["sizes"] = [len(x) for x in anchors]
    result["maps"] = maps
    return result


def state_of(model: nn.Module) -> Dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def gradients_reach(loss: torch.Tensor, module: nn.Module) -> set:
    """Names of the parameters of ``module`` that ``loss`` has a gradient for."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    return {n for (n, _), g in zip(named, grads) if g is not None and g.abs().sum() > 0}


def check_two_steps(model, teacher, batch) -> None:
    """Two steps of training: finite, the same keys, the teacher bitwise what it was."""
    before, keys = state_of(teacher.model), None
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, 1e-4)
    for _ in range(2):
        losses = run_step(model, batch)
        assert all(value.isfinite() for value in losses.values()), losses
        assert terms_of(losses) and (keys is None or set(losses) == keys)
        keys = set(losses)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
        optimizer.step()
    assert all(torch.equal(before[k], v) for k, v in teacher.model.state_dict().items())
    assert not teacher.model.training and all(p.grad is None for p in teacher.model.parameters())
