"""Rearrange: a block moves across the border of two stages."""

from typing import Dict, List, Sequence

from detectron2.config import configurable
from torch import Tensor, nn

from kd_d2.config import choice

from .actions import STUDENT_ACTIONS, Action, StudentAction
from .laterals import LATERAL_INITS
from .projection import identity_projection
from .space import Architecture, Block
from .surgery import STEM, bottom_up_of, layer_states, pyramid_inputs, rebuild

__all__ = ["Rearrange"]

_SHORTCUTS = ("subsample", "projection")


@STUDENT_ACTIONS.register()
class Rearrange(StudentAction):
    """Moves the border between two neighbouring stages by one block (appendix A.1.2).

    The order of the blocks in the network stays, and so do all their weights: the block that
    becomes the first of the coarser stage gets stride 2, the one that no longer is gets stride 1.

    - "right": the last block of stage s becomes the first of stage s+1. It must not be a
      projection. Exact if the residual branches of both blocks concerned are zero.
    - "left": the first block of stage s+1 becomes the last of stage s. If it is a projection, level
      s of the pyramid reads a map of other channels, and its lateral conv is fitted anew.

    "right" then "left" gives back the same network (with ``shortcut`` "subsample").
    """

    name = "Rearrange"

    @configurable
    def __init__(self, *, shortcut: str, lateral_init: str):
        """
        Args:
            shortcut: what a block moved to the right gets at its stride of 2: "subsample", no
                parameters, or "projection", a 1x1 conv that starts as the same thing.
            lateral_init: key of ``LATERAL_INITS``.

        Raises:
            ValueError: unknown names.
        """
        self.shortcut = choice("SEARCH.REARRANGE.SHORTCUT", shortcut, _SHORTCUTS)
        choice("SEARCH.REARRANGE.LATERAL_INIT", lateral_init, LATERAL_INITS)
        self.lateral_init = lateral_init

    @classmethod
    def from_config(cls, cfg, root: Architecture):
        node = cfg.SEARCH.REARRANGE
        return {"shortcut": node.SHORTCUT, "lateral_init": node.LATERAL_INIT}

    def choices(self, architecture: Architecture) -> List[Action]:
        result = []
        depths = architecture.depths
        for stage in range(len(depths) - 1):
            last = architecture.block((stage, depths[stage] - 1))
            if depths[stage] > 1 and not last.projection:
                result.append(Action(self.name, stage, "right"))
            if depths[stage + 1] > 1:
                result.append(Action(self.name, stage, "left"))
        return result

    def needs_images(self, architecture: Architecture, action: Action) -> bool:
        if action.direction == "right":
            return self.shortcut == "projection"
        return architecture.block((action.stage + 1, 0)).projection

    def apply(self, model: nn.Module, action: Action, images: Sequence[Tensor] = ()) -> nn.Module:
        """See the base class.

        Raises:
            ValueError: it measures features, and there are no images.
        """
        body = bottom_up_of(model)
        if self.needs_images(body.architecture, action) and not len(images):
            raise ValueError(f"the action '{action}' needs images to measure features on")
        return {"right": self._right, "left": self._left}[action.direction](
            model, action.stage, images
        )

    def _right(self, model: nn.Module, stage: int, images: Sequence[Tensor]) -> nn.Module:
        body = bottom_up_of(model)
        stages = [list(blocks) for blocks in body.architecture.stages]
        moved = stages[stage].pop()
        states = layer_states(body)
        extra: Dict[str, Tensor] = {}
        if self.shortcut == "projection":
            position = (stage, len(stages[stage]))
            extra = identity_projection(body, position, images)
            moved = Block(moved.channels, True, moved.groups, moved.age)
        stages[stage + 1].insert(0, moved)
        new = Architecture(tuple(map(tuple, stages)), body.architecture.stem)
        # positions of both are in network order, which does not change
        blocks = {at: states[was] for at, was in zip(new.positions, body.architecture.positions)}
        blocks[(stage + 1, 0)] = {**blocks[(stage + 1, 0)], **extra}
        return rebuild(model, new, {STEM: states[STEM], **blocks})

    def _left(self, model: nn.Module, stage: int, images: Sequence[Tensor]) -> nn.Module:
        body = bottom_up_of(model)
        stages = [list(blocks) for blocks in body.architecture.stages]
        moved = stages[stage + 1].pop(0)
        stages[stage].append(moved)
        new = Architecture(tuple(map(tuple, stages)), body.architecture.stem)
        states = layer_states(body)
        blocks = {at: states[was] for at, was in zip(new.positions, body.architecture.positions)}
        new_states = {STEM: states[STEM], **blocks}
        if not moved.projection:
            return rebuild(model, new, new_states)
        new_body = rebuild(body, new, new_states)
        feature = f"res{stage + 2}"
        laterals = {
            name: LATERAL_INITS[self.lateral_init](model, name, feature, new_body, images)
            for name, source in pyramid_inputs(model).items()
            if source == feature
        }
        return rebuild(model, new, new_states, laterals)
