"""Base of the imitation methods of LD's table, which differ in the region only."""

from detectron2.config import CfgNode as CN
from detectron2.config import configurable

from kd_d2.blocks import MapSource, PairDistiller, PairTerm, Region
from kd_d2.config import add_schedule_config

from .options import conv_adapter

__all__ = ["RegionImitation", "add_region_imitation_config"]


def add_region_imitation_config(node: CN) -> None:
    """Add the keys that all of them have to ``node``."""
    # Weight of the mean squared difference over the region, summed over the levels (LD's official
    # code: 2.0 for all regions).
    node.WEIGHT = 2.0
    # "none": the widths must agree (official); "auto": a 1x1 convolution per level where they
    # differ; "conv": always.
    node.ADAPTER = "none"
    add_schedule_config(node)


class RegionImitation(PairDistiller):
    """Mean squared difference of the pyramids over a region, per level; sum over the levels.

    Subclasses say which region.
    """

    @configurable
    def __init__(
        self,
        *,
        student_keys,
        teacher_keys,
        region: Region,
        weight: float = 2.0,
        adapter: str = "none",
    ):
        """
        Args:
            student_keys, teacher_keys: what the taps know of both networks.
            region: where.
            weight, adapter: see :func:`add_region_imitation_config`.

        Raises:
            ValueError: an unknown ``adapter``, or networks that cannot be paired this way.
        """
        key = f"KD.{self.node_name()}.ADAPTER"
        term = PairTerm(MapSource("neck"), region=region, adapter=conv_adapter(key, adapter))
        super().__init__(
            terms={"feat": term},
            weights={"feat": weight},
            student_keys=student_keys,
            teacher_keys=teacher_keys,
        )

    @classmethod
    def make_region(cls, node: CN) -> Region:
        """Return the region of this method, from its config node."""
        raise NotImplementedError

    @classmethod
    def arguments(cls, cfg):
        node = cls.config_node(cfg)
        return {
            "region": cls.make_region(node),
            "weight": node.WEIGHT,
            "adapter": node.ADAPTER,
        }
