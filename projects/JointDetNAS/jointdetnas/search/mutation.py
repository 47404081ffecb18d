"""Mutation of the teacher: another subnet of the pool that is near the last one."""

import random
from dataclasses import replace
from typing import List, Tuple

from ..subnet import Subnet, SubnetSpace

__all__ = ["TeacherMutation"]

# A gene of a subnet and the values that it may change to.
Gene = Tuple[str, int, List[int]]


class TeacherMutation:
    """Changes depths and widths of stages, neck and stem (line 10 of algorithm 1).

    Every gene changes with the same probability, and one at least. A depth becomes another one of
    the space that is near enough, a width any other one. How many genes change is ours; the paper
    mutates "by modifying the depth or width in each backbone stage".
    """

    def __init__(self, space: SubnetSpace, *, probability: float, depth_step: int):
        """
        Args:
            space: of which the result is a member, if what it is made from is.
            probability: in [0, 1].
            depth_step: largest change of a depth.

        Raises:
            ValueError: a number out of range.
        """
        if not 0 <= probability <= 1:
            raise ValueError(f"SEARCH.MUTATION.PROBABILITY must be in [0, 1], got {probability}")
        if depth_step < 1:
            raise ValueError(f"SEARCH.MUTATION.DEPTH_STEP must be at least 1, got {depth_step}")
        self.space, self.probability, self.depth_step = space, probability, depth_step

    def genes(self, subnet: Subnet) -> List[Gene]:
        """Genes that can change: d1 to d4, w1 to w4, neck, stem; those with a choice."""
        result: List[Gene] = []
        for stage, (low, high) in enumerate(self.space.depths):
            depth = subnet.depths[stage]
            near = range(max(low, depth - self.depth_step), min(high, depth + self.depth_step) + 1)
            result.append(("depths", stage, [d for d in near if d != depth]))
        for stage, width in enumerate(subnet.widths):
            result.append(("widths", stage, self._others(width)))
        result.append(("neck", 0, self._others(subnet.neck)))
        result.append(("stem", 0, self._others(subnet.stem)))
        return [gene for gene in result if gene[2]]

    def _others(self, width: int) -> List[int]:
        return [w for w in self.space.widths if w != width]

    def __call__(self, subnet: Subnet, generator: random.Random) -> Subnet:
        """Return a subnet that differs in one gene or more.

        Raises:
            ValueError: no gene has a choice; see :meth:`genes`.
        """
        genes = self.genes(subnet)
        if not genes:
            raise ValueError(f"the pool has no subnet but {subnet}: there is nothing to mutate")
        chosen = [gene for gene in genes if generator.random() < self.probability]
        for name, stage, values in chosen or [generator.choice(genes)]:
            subnet = _with(subnet, name, stage, generator.choice(values))
        return subnet


def _with(subnet: Subnet, name: str, stage: int, value: int) -> Subnet:
    current = getattr(subnet, name)
    if isinstance(current, tuple):
        value = (*current[:stage], value, *current[stage + 1 :])
    return replace(subnet, **{name: value})
