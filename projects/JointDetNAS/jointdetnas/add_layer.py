"""Add-layer: a block that does nothing yet, at the end of a stage."""

from typing import Dict, List, Sequence, Tuple

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from .actions import STUDENT_ACTIONS, Action, StudentAction
from .morph_blocks import MorphBlock
from .space import Architecture, Block
from .surgery import bottom_up_of, layer_states, rebuild

__all__ = ["AddLayer"]


@STUDENT_ACTIONS.register()
class AddLayer(StudentAction):
    """Appends a block to a stage whose residual branch is exactly zero (appendix A.1.2).

    All its convs are Dirac-initialised and the last batch norm has weight and bias 0, so the
    detector's outputs are the same bit by bit; the first gradient reaches that batch norm only.
    The widths are those of the stage's last block without a projection, or of its last block.
    """

    name = "AddLayer"

    @configurable
    def __init__(self, *, max_depth: Sequence[int]):
        """
        Args:
            max_depth: blocks that each of the four stages may have.
        """
        self.max_depth: Tuple[int, ...] = tuple(max_depth)

    @classmethod
    def from_config(cls, cfg, root: Architecture):
        extra = cfg.SEARCH.ADD_LAYER.EXTRA_DEPTH
        if extra < 0:
            raise ValueError(f"SEARCH.ADD_LAYER.EXTRA_DEPTH must not be negative, got {extra}")
        return {"max_depth": [depth + extra for depth in root.depths]}

    def choices(self, architecture: Architecture) -> List[Action]:
        return [
            Action(self.name, stage)
            for stage, depth in enumerate(architecture.depths)
            if depth < self.max_depth[stage]
        ]

    def apply(self, model: nn.Module, action: Action, images: Sequence[Tensor] = ()) -> nn.Module:
        body = bottom_up_of(model)
        old, stage = body.architecture, action.stage
        blocks = old.stages[stage]
        template = next((b for b in reversed(blocks) if not b.projection), blocks[-1])
        added = Block(
            (*template.channels[:-1], blocks[-1].out_channels), False, template.groups, age=0
        )
        stages = list(old.stages)
        stages[stage] = (*blocks, added)
        new = Architecture(tuple(stages), old.stem)
        states = layer_states(body)
        reference = body.block_at((stage, len(blocks) - 1)).convs[-1].weight
        states[(stage, len(blocks))] = _zero_branch(added, body.options["norm"], reference)
        return rebuild(model, new, states)


def _zero_branch(block: Block, norm, like: Tensor) -> Dict[str, Tensor]:
    """State of a block whose residual branch is zero, with the type and device of ``like``."""
    # no random numbers are drawn: the weights are made without being initialised
    with torch.device("meta"):
        module = MorphBlock(block, block.out_channels, stride=1, norm=norm)
    module = module.to_empty(device=like.device).to(like.dtype)
    with torch.no_grad():
        for conv in module.convs:
            nn.init.dirac_(conv.weight, groups=conv.groups)
            for name, tensor in conv.norm.state_dict().items():
                tensor.fill_(1.0 if name in ("weight", "running_var") else 0.0)
        nn.init.zeros_(module.convs[-1].norm.weight)
    return module.state_dict()
