"""Maps of the backbone as a pair source, level by level from their own keys."""

from typing import Dict, Sequence, Tuple

from .registry import KD_SOURCES
from .sources import MapSource

__all__ = ["TrunkSource"]


@KD_SOURCES.register()
class TrunkSource(MapSource):
    """Outputs of the backbone by stride: the whole pyramid, or the bottom-up stages.

    "neck" is every pyramid level that has anchors: P3-P7 of a dense detector, P2-P6 of a two-stage
    one, whose RoI head (``MapSource("neck")``) reads P2-P5 only. "backbone" is the stages of the
    bottom-up network (C2-C5, as far as the config lists them), whose widths may differ.
    """

    def __init__(self, group: str = "neck", pair: str = "stride", levels: Sequence[int] = ()):
        """
        Args:
            group: "neck" or "backbone".
            pair, levels: see :class:`MapSource`.

        Raises:
            ValueError: another group.
        """
        if group not in ("neck", "backbone"):
            raise ValueError(f'TrunkSource: group must be "neck" or "backbone", got {group!r}')
        super().__init__(group, pair=pair, levels=levels)
        self.student_needs = self.teacher_needs = ()
        self._names: Dict[str, Tuple[str, ...]] = {}

    def _levels_of(self, side, keys):
        found = sorted(
            (info.strides[0], name)
            for name, info in keys.items()
            if name.startswith(f"{self.key}.")
            and (self.key == "backbone" or info.strides[0] in keys["anchors"].strides)
        )
        if not found:
            raise ValueError(f"TrunkSource compares '{self.key}.*', which the {side} does not have")
        self._names[side] = tuple(name for _, name in found)
        return [(stride, keys[name].channels) for stride, name in found]

    def _read(self, side, view):
        return [view[name] for name in self._names[side]]

    def bind(self, student_keys, teacher_keys):
        super().bind(student_keys, teacher_keys)
        self.student_needs = tuple(self._names["student"][i] for i, _ in self.indices)
        self.teacher_needs = tuple(self._names["teacher"][j] for _, j in self.indices)
        self._names = {"student": self.student_needs, "teacher": self.teacher_needs}
        self.indices = tuple((i, i) for i in range(len(self.indices)))
