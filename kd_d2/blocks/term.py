"""A loss term made of blocks, and the distiller that is a set of such terms."""

from typing import Any, Dict, List, Mapping, Optional

import torch
from torch import nn

from kd_d2.distillation import Distiller
from kd_d2.losses.precision import full_precision

from .adapters import Adapter
from .distances import Distance, SquaredL2
from .normalisers import Elements, Normaliser
from .pair import Pair
from .regions import All, Region
from .sources import Source
from .transforms import Transform

__all__ = ["LEVELS", "PairDistiller", "PairTerm", "bind_adapter"]

# how the values of the pairs (levels) become one
LEVELS = {"sum": lambda values: sum(values), "mean": lambda values: sum(values) / len(values)}


def bind_adapter(adapter: Adapter, widths) -> None:
    """Create the parameters of ``adapter``, unless another user of it has done so.

    Raises:
        ValueError: that other user's pairs have other widths.
    """
    widths = tuple(tuple(pair) for pair in widths)
    if adapter.built_for is None:
        adapter.build(widths)
        adapter.built_for = widths
    elif adapter.built_for != widths:
        raise ValueError(
            f"an adapter is shared by pairs of the widths (student, teacher) {adapter.built_for} "
            f"and {widths}; give each source its own, or compare the same levels"
        )


class PairTerm(nn.Module):
    """One loss: Red_pairs { 1/Z * sum_r w_r D(phi(a(s)), phi(t))_r }.

    Seven independent choices: source of the pairs, region w, adapter a, transform phi, distance
    D, normaliser Z, reduction over the pairs. The weight and the schedule belong to the distiller.
    """

    def __init__(
        self,
        source: Source,
        *,
        region: Optional[Region] = None,
        adapter: Optional[Adapter] = None,
        transform: Optional[Transform] = None,
        distance: Optional[Distance] = None,
        normaliser: Optional[Normaliser] = None,
        levels: str = "sum",
    ):
        """
        Args:
            source: what is compared.
            region: where; None: everywhere.
            adapter: student's width to teacher's; None: the widths must agree.
            transform: what both sides pass before; None: nothing.
            distance: None: squared difference.
            normaliser: None: the number of compared elements, i.e. a mean.
            levels: "sum" or "mean" over the pairs of the source.

        Raises:
            ValueError: ``levels`` is neither.
        """
        super().__init__()
        if levels not in LEVELS:
            raise ValueError(f"levels must be one of {sorted(LEVELS)}, got {levels!r}")
        self.source = source
        self.region = region or All()
        self.adapter = adapter
        self.transform = transform
        self.distance = distance or SquaredL2()
        self.normaliser = normaliser or Elements()
        self._reduce = LEVELS[levels]

    @property
    def blocks(self) -> List[Any]:
        """Those that read keys."""
        return [self.source, self.region, self.distance, self.normaliser]

    def bind(self, student_keys, teacher_keys) -> None:
        """Look at both networks once; create the adapter's parameters.

        Raises:
            ValueError: a block cannot work with them, or widths differ and there is no adapter.
        """
        for block in self.blocks:
            block.bind(student_keys, teacher_keys)
        self._check_strides()
        if self.adapter is not None:
            bind_adapter(self.adapter, self.source.widths)
            return
        for student, teacher in self.source.widths:
            if student != teacher:
                raise ValueError(
                    f"'{self.source.student_needs[0]}' has {student} channels in the student and "
                    f"{teacher} in the teacher; use a method with an adapter, or networks of the "
                    "same width"
                )

    def _check_strides(self) -> None:
        known, compared = self.region.strides, self.source.strides
        missing = set(compared) - set(compared if known is None else known)
        if missing:
            raise ValueError(
                f"region {type(self.region).__name__} is defined at strides {tuple(known)}, but "
                f"{type(self.source).__name__} compares {tuple(compared)}; leave out level(s) of "
                f"stride {sorted(missing)} (levels= of the source) or use another region"
            )

    def forward(self, ctx) -> torch.Tensor:
        """Return the unweighted fp32 scalar."""
        values = [self._value(ctx, pair, index) for index, pair in enumerate(self.source(ctx))]
        return self._reduce(values)

    def _value(self, ctx, pair: Pair, index: int) -> torch.Tensor:
        if self.adapter is not None:
            # the tensor itself is part of the key: sources may read other levels of one key
            pair.student = ctx.memo(
                (self.adapter, index, pair.student), lambda: self.adapter(pair.student, index)
            )
        pair.teacher = pair.teacher.detach()
        with torch.autocast(pair.student.device.type, enabled=False):
            pair = pair.map(full_precision)
            if self.transform is not None:
                pair = self.transform(pair)
            values = self.distance(ctx, pair)
            with torch.no_grad():
                weights = self.region(ctx, pair)
                weights = weights.reshape(
                    *weights.shape, *[1] * (values.dim() - weights.dim())
                ).expand_as(values)
                divisor = self.normaliser(ctx, pair, weights)
            # where: a loss that is not finite must not come in through a weight of 0
            return torch.where(weights > 0, weights * values, 0.0).sum() / divisor


class PairDistiller(Distiller):
    """A distiller all of whose terms are made of blocks.

    A method derives from it and wires its terms in its constructor; see ``kd_d2.baselines``.
    """

    def __init__(
        self,
        *,
        terms: Mapping[str, PairTerm],
        weights: Mapping[str, float],
        student_keys: Mapping[str, Any],
        teacher_keys: Mapping[str, Any],
    ):
        """
        Args:
            terms: name -> term.
            weights: name -> factor, with the same names.
            student_keys, teacher_keys: what the taps know of both networks.

        Raises:
            ValueError: a term cannot work with these networks.
        """
        needs: Dict[str, set] = {"student": set(), "teacher": set()}
        for name, term in terms.items():
            try:
                term.bind(student_keys, teacher_keys)
            except ValueError as error:
                raise ValueError(f"{type(self).__name__}, term '{name}': {error}") from None
            for block in term.blocks:
                needs["student"].update(block.student_needs)
                needs["teacher"].update(block.teacher_needs)
        super().__init__(
            weights=weights, student_needs=needs["student"], teacher_needs=needs["teacher"]
        )
        self.pair_terms = nn.ModuleDict(terms)

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        return {
            "student_keys": student_keys,
            "teacher_keys": teacher_keys,
            **cls.arguments(cfg),
        }

    @classmethod
    def arguments(cls, cfg) -> Dict[str, Any]:
        """Return the constructor's arguments besides the keys: the node's fields in lower case.

        A method whose values depend on more than its node overrides this.
        """
        node = cls.config_node(cfg)
        return {field.lower(): node[field] for field in node if field != "SCHEDULE"}

    def compute(self, ctx):
        return {name: term(ctx) for name, term in self.pair_terms.items()}
