"""The encoding of a backbone: its text form, its derived structure and its residual streams.

Nothing here needs torch. The text is the grammar of appendix B of the paper (arXiv 2105.12971)::

    [block-block-...],[...],[...],[...]      four stages, Detectron2's res2 to res5
    block = (c1,c2)      two 3x3 convs       basic block
            (c1,c2,c3)   1x1, 3x3, 1x1       bottleneck

The numbers are output channels. Two suffixes of a block are ours: ``p``, a projection shortcut
although the block has as many output as input channels (pruning can make the two numbers equal),
and ``gN``, N groups in the 3x3 conv.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

__all__ = ["FULL_AGE", "Architecture", "Block", "Position", "Stream", "parse"]

NUM_STAGES = 4
# Version of the checkpoint entry "arch".
VERSION = 1
# Age of a base detector's blocks and the largest one that is counted. Ours.
FULL_AGE = 100

# (stage, block), both from 0: (1, 0) is the first block of res3.
Position = Tuple[int, int]

_BLOCK = re.compile(r"\((\d+(?:,\d+)*)\)(p?)(?:g(\d+))?")


@dataclass(frozen=True)
class Block:
    """One residual block.

    Args:
        channels: output channels of its convs: two numbers (3x3, 3x3) or three (1x1, 3x3, 1x1).
        projection: the shortcut is a 1x1 conv with batch norm; otherwise it is the identity, which
            at stride 2 keeps every second row and column.
        groups: groups of the 3x3 conv of a bottleneck.
        age: fast evaluations that the block has been trained in since it was inserted, at most
            ``FULL_AGE``; says nothing about the architecture and is not compared.
    """

    channels: Tuple[int, ...]
    projection: bool
    groups: int = 1
    age: int = field(default=FULL_AGE, compare=False)

    @property
    def out_channels(self) -> int:
        return self.channels[-1]

    @property
    def is_bottleneck(self) -> bool:
        return len(self.channels) == 3


@dataclass(frozen=True)
class Stream:
    """Consecutive blocks that add to the same map: all have the same number of output channels.

    A stream starts at a projection block, or at the stem, and ends before the next projection. It
    may cross the border of a stage.

    Args:
        source: the projection block that starts it; None: the stem.
        blocks: the blocks whose last conv adds to it, ``source`` included.
        width: its number of channels.
    """

    source: Optional[Position]
    blocks: Tuple[Position, ...]
    width: int


@dataclass(frozen=True)
class Architecture:
    """The backbone of a student. Equal architectures have equal texts and stem widths.

    Args:
        stages: blocks of the four stages.
        stem: output channels of the stem; no part of the paper's encoding.

    Raises:
        ValueError: it cannot be built; the message names the block.
    """

    stages: Tuple[Tuple[Block, ...], ...]
    stem: int = 64

    def __post_init__(self) -> None:
        if len(self.stages) != NUM_STAGES:
            raise ValueError(f"an encoding has {NUM_STAGES} stages, this one {len(self.stages)}")
        if self.stem < 1:
            raise ValueError(f"the stem has {self.stem} channels, must be > 0")
        for stage, blocks in enumerate(self.stages):
            if not blocks:
                raise ValueError(f"stage {stage + 1} of the encoding has no block")
        length = len(self.stages[0][0].channels)
        for position in self.positions:
            _check_block(self.block(position), length, self.in_channels(position), position)

    def __str__(self) -> str:
        stages = (
            "-".join(self._block_text((s, b)) for b in range(len(blocks)))
            for s, blocks in enumerate(self.stages)
        )
        return ",".join(f"[{stage}]" for stage in stages)

    def _block_text(self, position: Position) -> str:
        block = self.block(position)
        forced = block.projection and self.in_channels(position) == block.out_channels
        return (
            f"({','.join(map(str, block.channels))})"
            f"{'p' if forced else ''}{f'g{block.groups}' if block.groups > 1 else ''}"
        )

    # -------------------------------------------------------------------------- structure
    @property
    def depths(self) -> Tuple[int, ...]:
        """Blocks per stage."""
        return tuple(len(blocks) for blocks in self.stages)

    @property
    def positions(self) -> List[Position]:
        """All blocks in network order."""
        return [(s, b) for s, blocks in enumerate(self.stages) for b in range(len(blocks))]

    def block(self, position: Position) -> Block:
        stage, index = position
        return self.stages[stage][index]

    def in_channels(self, position: Position) -> int:
        """Channels of the map that enters the block."""
        stage, index = position
        if index:
            return self.stages[stage][index - 1].out_channels
        return self.stages[stage - 1][-1].out_channels if stage else self.stem

    def stride(self, position: Position) -> int:
        """2 for the first block of the second to fourth stage, otherwise 1."""
        stage, index = position
        return 2 if stage and not index else 1

    def is_removable_shortcut(self, position: Position) -> bool:
        """True for a shortcut that changes nothing: the identity at stride 1."""
        return not self.block(position).projection and self.stride(position) == 1

    @property
    def streams(self) -> Tuple[Stream, ...]:
        """The residual streams in network order; the first starts at the stem.

        Where the first block is a projection, as in all bottleneck ResNets, no block adds to the
        first stream.
        """
        runs: List[Tuple[Optional[Position], List[Position]]] = [(None, [])]
        for position in self.positions:
            if self.block(position).projection:
                runs.append((position, []))
            runs[-1][1].append(position)
        return tuple(
            Stream(source, tuple(run), self.block(source).out_channels if source else self.stem)
            for source, run in runs
        )

    def stream_of(self, position: Position) -> int:
        """Index in :attr:`streams` of the stream that the block adds to."""
        projections = [p for p in self.positions if self.block(p).projection and p <= position]
        return len(projections)

    def input_stream_of(self, position: Position) -> int:
        """Index in :attr:`streams` of the stream that the block reads."""
        return self.stream_of(position) - int(self.block(position).projection)

    @property
    def num_rankable_channels(self) -> int:
        """Channels that pruning chooses among: of all convs in the blocks but the last one of
        each, and of every stream that starts at a projection."""
        inner = sum(sum(self.block(p).channels[:-1]) for p in self.positions)
        return inner + sum(s.width for s in self.streams if s.source is not None)

    # --------------------------------------------------------------------------- changing
    def with_blocks(self, blocks: Mapping[Position, Block]) -> "Architecture":
        """Copy with some blocks replaced."""
        stages = [list(stage) for stage in self.stages]
        for (stage, index), block in blocks.items():
            stages[stage][index] = block
        return replace(self, stages=tuple(map(tuple, stages)))

    def older(self, evaluations: int = 1) -> "Architecture":
        """Copy after so many further fast evaluations: ages grow, up to ``FULL_AGE``."""
        return self.with_blocks(
            {
                p: replace(self.block(p), age=min(self.block(p).age + evaluations, FULL_AGE))
                for p in self.positions
            }
        )

    # ---------------------------------------------------------------------- serialisation
    def entry(self, fpn: int = 0) -> Dict[str, Any]:
        """The entry ``arch`` of checkpoints: numbers, texts and lists only.

        Args:
            fpn: channels of the pyramid; 0: there is none.
        """
        return {
            "version": VERSION,
            "encoding": str(self),
            "stem": self.stem,
            "fpn": fpn,
            "age": [self.block(p).age for p in self.positions],
        }

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> "Architecture":
        """The inverse of :meth:`entry`.

        Raises:
            ValueError: the entry is of another version, incomplete or malformed.
        """
        if not isinstance(entry, Mapping) or entry.get("version") != VERSION:
            raise ValueError(f"the entry arch is not of version {VERSION}: {entry}")
        missing = {"encoding", "stem", "fpn", "age"} - set(entry)
        if missing:
            raise ValueError(f"the entry arch lacks {sorted(missing)}")
        architecture = parse(entry["encoding"], entry["stem"])
        positions, ages = architecture.positions, entry["age"]
        if len(positions) != len(ages):
            raise ValueError(
                f"the entry arch has {len(ages)} ages for {len(positions)} blocks of "
                f"{entry['encoding']}"
            )
        return architecture.with_blocks(
            {p: replace(architecture.block(p), age=int(a)) for p, a in zip(positions, ages)}
        )

    def first_difference(self, other: "Architecture") -> str:
        """One sentence about where two architectures first differ; empty if they are equal."""
        if self.stem != other.stem:
            return f"the stem has {self.stem} channels against {other.stem}"
        for stage, (ours, theirs) in enumerate(zip(self.stages, other.stages)):
            for index, pair in enumerate(zip(ours, theirs)):
                if pair[0] != pair[1]:
                    return (
                        f"stage {stage + 1} block {index + 1} is "
                        f"{self._described((stage, index))} against "
                        f"{other._described((stage, index))}"
                    )
            if len(ours) != len(theirs):
                return f"stage {stage + 1} has {len(ours)} blocks against {len(theirs)}"
        return ""

    def _described(self, position: Position) -> str:
        shortcut = "a projection" if self.block(position).projection else "an identity"
        return f"{self._block_text(position)} with {shortcut}"


def _check_block(block: Block, length: int, in_channels: int, position: Position) -> None:
    where = f"stage {position[0] + 1} block {position[1] + 1} {block.channels}"
    if len(block.channels) not in (2, 3):
        raise ValueError(f"{where} has {len(block.channels)} numbers, must have 2 or 3")
    if len(block.channels) != length:
        raise ValueError(
            f"{where} has {len(block.channels)} numbers, the first block has {length}: all blocks "
            "are basic blocks (2 numbers) or all are bottlenecks (3)"
        )
    if min(block.channels) < 1:
        raise ValueError(f"{where} has a conv without channels")
    if not block.projection and in_channels != block.out_channels:
        raise ValueError(
            f"{where} adds to a map of {in_channels} channels, which takes a projection"
        )
    if block.groups < 1 or (block.groups > 1 and not block.is_bottleneck):
        raise ValueError(f"{where} has {block.groups} groups; only bottlenecks have some")
    if block.groups > 1 and (
        block.channels[0] != block.channels[1] or block.channels[0] % block.groups
    ):
        raise ValueError(
            f"{where} has {block.groups} groups, which takes two equal first numbers that are "
            "multiples of it"
        )


def parse(text: str, stem: int = 64) -> Architecture:
    """The architecture that a text describes; ``str()`` of it is the text without spaces.

    Args:
        text: encoding in the grammar of this module; white space is ignored.
        stem: output channels of the stem, the input of the first block.

    Raises:
        ValueError: malformed text; the message names the block.
    """
    compact = "".join(text.split())
    if not re.fullmatch(r"\[[^\[\]]*\](,\[[^\[\]]*\])*", compact):
        raise ValueError(f"'{text}' is no encoding [...],[...],[...],[...] and no preset")
    stages: List[List[Block]] = []
    width = stem
    for stage, content in enumerate(compact[1:-1].split("],[")):
        stages.append([])
        for index, block_text in enumerate(content.split("-")):
            where = f"stage {stage + 1} block {index + 1} '{block_text}'"
            block = _parse_block(block_text, width, where)
            stages[-1].append(block)
            width = block.out_channels
    return Architecture(_frozen(stages), stem)


def _frozen(stages: Sequence[Sequence[Block]]) -> Tuple[Tuple[Block, ...], ...]:
    return tuple(tuple(blocks) for blocks in stages)


def _parse_block(text: str, in_channels: int, where: str) -> Block:
    match = _BLOCK.fullmatch(text)
    if not match:
        raise ValueError(f"{where} is no block (c1,c2) or (c1,c2,c3) with suffixes p and gN")
    channels = tuple(int(number) for number in match.group(1).split(","))
    changes_width = channels[-1] != in_channels
    if match.group(2) and changes_width:
        raise ValueError(
            f"{where} has a projection in any case, as its input has {in_channels} channels: leave "
            "out the p"
        )
    if match.group(3) and int(match.group(3)) < 2:
        raise ValueError(f"{where}: leave out g{match.group(3)}, groups are 2 or more")
    return Block(channels, bool(match.group(2)) or changes_width, int(match.group(3) or 1))
