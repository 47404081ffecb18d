"""Layer pruning: the block with the smallest parameters goes."""

from typing import Dict, List, Sequence

import torch
from detectron2.config import configurable
from torch import Tensor, nn

from kd_d2.config import choice

from .actions import STUDENT_ACTIONS, Action, StudentAction
from .space import FULL_AGE, Architecture, Position
from .surgery import STEM, bottom_up_of, layer_states, rebuild

__all__ = ["LayerPruning", "without_block"]

_REDUCTIONS = {"sum": torch.sum, "mean": torch.mean}


@STUDENT_ACTIONS.register()
class LayerPruning(StudentAction):
    """Removes the block with the least L1 norm of all its parameters (Sec. 3.3).

    Legal are blocks whose shortcut changes nothing, in a stage of two or more, that have been
    trained for a while since they were added: a fresh one is small by construction.
    """

    name = "LayerPruning"

    @configurable
    def __init__(self, *, importance: str, protect: int):
        """
        Args:
            importance: "sum" or "mean" of the absolute values.
            protect: fast evaluations that a new block cannot be removed for.

        Raises:
            ValueError: unknown importance, or an age that is not counted.
        """
        choice("SEARCH.LAYER_PRUNING.IMPORTANCE", importance, _REDUCTIONS)
        if not 0 <= protect <= FULL_AGE:
            raise ValueError(
                f"SEARCH.LAYER_PRUNING.PROTECT must be in 0..{FULL_AGE}, got {protect}"
            )
        self.reduction = _REDUCTIONS[importance]
        self.protect = protect

    @classmethod
    def from_config(cls, cfg, root: Architecture):
        node = cfg.SEARCH.LAYER_PRUNING
        return {"importance": node.IMPORTANCE, "protect": node.PROTECT}

    def choices(self, architecture: Architecture) -> List[Action]:
        return [Action(self.name)] if self.candidates(architecture) else []

    def candidates(self, architecture: Architecture) -> List[Position]:
        """Blocks that may be removed."""
        return [
            position
            for position in architecture.positions
            if architecture.is_removable_shortcut(position)
            and architecture.depths[position[0]] > 1
            and architecture.block(position).age >= self.protect
        ]

    def importance(self, model: nn.Module, position: Position) -> float:
        """L1 norm of the parameters of a block."""
        block = bottom_up_of(model).block_at(position)
        values = torch.cat([p.detach().flatten() for p in block.parameters()])
        return self.reduction(values.abs().double()).item()

    def apply(self, model: nn.Module, action: Action, images: Sequence[Tensor] = ()) -> nn.Module:
        candidates = self.candidates(bottom_up_of(model).architecture)
        if not candidates:
            raise ValueError("no block of the student may be removed")
        norms: Dict[Position, float] = {p: self.importance(model, p) for p in candidates}
        return without_block(model, min(candidates, key=lambda p: (norms[p], p)))


def without_block(model: nn.Module, position: Position) -> nn.Module:
    """Copy of a student without one block, whose shortcut must change nothing."""
    body = bottom_up_of(model)
    states = layer_states(body)
    stages = [list(blocks) for blocks in body.architecture.stages]
    stage, index = position
    del stages[stage][index]
    new = Architecture(tuple(map(tuple, stages)), body.architecture.stem)
    remaining = [p for p in body.architecture.positions if p != position]
    moved = {at: states[was] for at, was in zip(new.positions, remaining)}
    return rebuild(model, new, {STEM: states[STEM], **moved})
