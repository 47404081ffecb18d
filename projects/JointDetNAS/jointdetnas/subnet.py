"""The elastic teacher pool as a set: codes of its subnets, their sizes, what is drawn from it.

Nothing here needs torch. A subnet has a depth and a width for each of the four stages, a width of
the neck (the pyramid) and one of the stem. Widths are counted in quarters of the standard ResNet:
4, 5 and 6 are the paper's 1.0, 1.25 and 1.5. The paper's text has no gene of the stem, but with it
the pool has the "roughly 765000" members (Sec. 3.1.3): 192 456 times 4 resolutions.
"""

import random
import re
from dataclasses import dataclass
from typing import Sequence, Tuple

from .space import NUM_STAGES, Architecture, parse

__all__ = ["Geometry", "Subnet", "SubnetSpace", "iteration_generator"]

QUARTERS = 4
_NUMBERS = "-".join([r"(\d+)"] * NUM_STAGES)
_CODE = re.compile(rf"d{_NUMBERS}_w{_NUMBERS}_n(\d+)_s(\d+)")


@dataclass(frozen=True)
class Subnet:
    """A member of the pool. ``str()`` is its code, e.g. ``d3-4-23-3_w6-6-6-6_n6_s6``.

    Args:
        depths: blocks of each stage.
        widths: width of each stage, quarters of the standard one.
        neck, stem: widths of pyramid and stem, quarters.
    """

    depths: Tuple[int, ...]
    widths: Tuple[int, ...]
    neck: int
    stem: int

    def __str__(self) -> str:
        depths, widths = ("-".join(map(str, numbers)) for numbers in (self.depths, self.widths))
        return f"d{depths}_w{widths}_n{self.neck}_s{self.stem}"

    @classmethod
    def parse(cls, code: str) -> "Subnet":
        """The inverse of ``str()``.

        Raises:
            ValueError: malformed code.
        """
        match = _CODE.fullmatch(code.strip())
        if match is None:
            raise ValueError(
                f"'{code}' is no code of a subnet, expected depths, widths in quarters, neck and "
                "stem as in d3-4-6-3_w4-4-4-4_n4_s4"
            )
        numbers = tuple(int(number) for number in match.groups())
        depths, widths = numbers[:NUM_STAGES], numbers[NUM_STAGES : 2 * NUM_STAGES]
        return cls(depths, widths, *numbers[2 * NUM_STAGES :])


@dataclass(frozen=True)
class Geometry:
    """Numbers of channels of the supernet and its subnets.

    Args:
        depths: blocks of each stage of the supernet.
        stem, inner, outer, neck: channels at the standard width (4 quarters); ``inner`` and
            ``outer`` are those of the first stage, and double from stage to stage.
        max_width: width of the supernet, quarters.

    Raises:
        ValueError: a number of channels that four quarters do not divide, or none at all.
    """

    depths: Tuple[int, ...] = (3, 4, 23, 3)
    stem: int = 64
    inner: int = 64
    outer: int = 256
    neck: int = 256
    max_width: int = 6

    def __post_init__(self) -> None:
        if len(self.depths) != NUM_STAGES or min(self.depths) < 1:
            raise ValueError(
                f"MODEL.ELASTIC_RESNET.DEPTHS must be {NUM_STAGES} numbers of blocks, got "
                f"{self.depths}"
            )
        if self.max_width < 1:
            raise ValueError(
                f"MODEL.ELASTIC_RESNET.MAX_WIDTH must be at least 1 quarter, got {self.max_width}"
            )
        keys = {
            "RESNETS.STEM_OUT_CHANNELS": self.stem,
            "RESNETS.WIDTH_PER_GROUP": self.inner,
            "RESNETS.RES2_OUT_CHANNELS": self.outer,
            "FPN.OUT_CHANNELS": self.neck,
        }
        for key, value in keys.items():
            if value < 1 or value % QUARTERS:
                raise ValueError(
                    f"MODEL.{key} of an elastic detector is its standard width and must be a "
                    f"multiple of {QUARTERS}, got {value}"
                )

    @property
    def largest(self) -> Subnet:
        """The supernet itself."""
        return Subnet(self.depths, (self.max_width,) * NUM_STAGES, self.max_width, self.max_width)

    def stem_channels(self, width: int) -> int:
        return self.stem * width // QUARTERS

    def neck_channels(self, width: int) -> int:
        return self.neck * width // QUARTERS

    def inner_channels(self, stage: int, width: int) -> int:
        """Of the first two convs of the blocks of ``stage`` (from 0)."""
        return (self.inner << stage) * width // QUARTERS

    def outer_channels(self, stage: int, width: int) -> int:
        """Of the last conv of the blocks of ``stage`` (from 0), and of its output."""
        return (self.outer << stage) * width // QUARTERS

    def check(self, subnet: Subnet) -> Subnet:
        """Return ``subnet``.

        Raises:
            ValueError: it is no part of this supernet.
        """
        largest = self.largest
        ours = (*largest.depths, *largest.widths, largest.neck, largest.stem)
        theirs = (*subnet.depths, *subnet.widths, subnet.neck, subnet.stem)
        if len(ours) != len(theirs) or not all(1 <= b <= a for a, b in zip(ours, theirs)):
            raise ValueError(f"subnet {subnet} is no part of the supernet {largest}")
        return subnet

    def architecture(self, subnet: Subnet) -> Architecture:
        """Return the encoding of the subnet's backbone, all blocks old."""
        self.check(subnet)
        width, stages = self.stem_channels(subnet.stem), []
        for stage, (depth, quarters) in enumerate(zip(subnet.depths, subnet.widths)):
            inner, outer = (f(stage, quarters) for f in (self.inner_channels, self.outer_channels))
            block = f"({inner},{inner},{outer})"
            # the supernet has a projection there in any case
            first = block + ("p" if outer == width else "")
            stages.append("-".join([first] + [block] * (depth - 1)))
            width = outer
        text = ",".join(f"[{blocks}]" for blocks in stages)
        return parse(text, self.stem_channels(subnet.stem))


@dataclass(frozen=True)
class SubnetSpace:
    """The subnets of one phase of training: independent choices for ten genes.

    Args:
        depths: (fewest, most) blocks of each stage.
        widths: widths of each of stages, neck and stem, quarters, ascending.
    """

    depths: Tuple[Tuple[int, int], ...]
    widths: Tuple[int, ...]

    @classmethod
    def of(cls, geometry: Geometry, min_depths: Sequence[int], widths: Sequence[int]):
        """The space up to the depths of ``geometry``.

        Raises:
            ValueError: it is empty or no part of the supernet; names the key.
        """
        prefix = "MODEL.ELASTIC_RESNET"
        if len(min_depths) != NUM_STAGES or not all(
            1 <= low <= high for low, high in zip(min_depths, geometry.depths)
        ):
            raise ValueError(
                f"{prefix}.MIN_DEPTHS must be {NUM_STAGES} numbers from 1 to {prefix}.DEPTHS "
                f"{geometry.depths}, got {tuple(min_depths)}"
            )
        widths = tuple(widths)
        if not widths or widths != tuple(sorted(set(widths))):
            raise ValueError(f"{prefix}.WIDTHS must be different and ascending, got {widths}")
        if widths[0] < 1 or widths[-1] > geometry.max_width:
            raise ValueError(
                f"{prefix}.WIDTHS must lie in 1..{prefix}.MAX_WIDTH ({geometry.max_width}), got "
                f"{widths}"
            )
        return cls(tuple(zip(map(int, min_depths), geometry.depths)), widths)

    def __len__(self) -> int:
        result = len(self.widths) ** (NUM_STAGES + 2)
        for low, high in self.depths:
            result *= high - low + 1
        return result

    def __contains__(self, subnet: Subnet) -> bool:
        depths = all(low <= d <= high for d, (low, high) in zip(subnet.depths, self.depths))
        return depths and {*subnet.widths, subnet.neck, subnet.stem} <= set(self.widths)

    @property
    def smallest(self) -> Subnet:
        return self._corner(0)

    @property
    def largest(self) -> Subnet:
        return self._corner(-1)

    def _corner(self, end: int) -> Subnet:
        width = self.widths[end]
        depths = tuple(bounds[end] for bounds in self.depths)
        return Subnet(depths, (width,) * NUM_STAGES, width, width)

    def sample(self, generator: random.Random) -> Subnet:
        """Return a subnet, every gene drawn uniformly by itself."""
        depths = tuple(generator.randint(low, high) for low, high in self.depths)
        *widths, neck, stem = (generator.choice(self.widths) for _ in range(NUM_STAGES + 2))
        return Subnet(depths, tuple(widths), neck, stem)


def iteration_generator(seed: int, iteration: int) -> random.Random:
    """Return the generator of one iteration: the same one on every rank and after a restart."""
    return random.Random(f"{seed}-{iteration}")
