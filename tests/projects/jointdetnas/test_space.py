"""The encoding: text, structure, streams, the published numbers that follow from it."""

import pytest

from kd_d2.projects.jointdetnas import PRESETS, Block, parse, resolve
from kd_d2.projects.jointdetnas.space import FULL_AGE, Architecture

SMALL = "[(8,8,32)-(8,4,32)],[(6,6,12)-(5,5,12)],[(7,7,12)],[(9,9,20)-(4,4,20)p-(2,2,20)]"


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_text_of_the_parsed_text_is_the_text(name):
    assert str(parse(PRESETS[name])) == PRESETS[name]
    assert resolve(f" {name} ") == parse(PRESETS[name])
    spread = PRESETS[name].replace(",", " ,\n ").replace("-", " - ")
    assert str(parse(spread)) == PRESETS[name] and parse(spread) == parse(PRESETS[name])


@pytest.mark.parametrize(
    "text",
    [
        SMALL,
        "[(64,64,64)p-(64,64,64)],[(4,4,64)],[(4,4,64)],[(4,4,64)p]",
        "[(64,64)p],[(64,64)],[(64,64)-(3,64)p],[(64,64)]",
        "[(8,8,16)g4-(8,8,16)pg2],[(8,8,16)],[(8,8,16)],[(6,6,24)g3]",
    ],
)
def test_suffixes_survive(text):
    assert str(parse(text)) == text


def test_forced_projection_and_identity_at_a_border():
    forced = parse("[(64,64,64)p],[(4,4,64)],[(4,4,64)],[(4,4,64)]")
    plain = parse("[(64,64,64)],[(4,4,64)],[(4,4,64)],[(4,4,64)]")
    assert forced.block((0, 0)).projection and not plain.block((0, 0)).projection
    assert forced != plain
    # a narrower stem makes the projection implied, and another architecture
    assert parse(str(plain), stem=32).block((0, 0)).projection
    assert parse(str(plain), stem=32) != plain
    # the first block of a stage halves the map, with or without a projection
    assert [plain.stride(p) for p in plain.positions] == [1, 2, 2, 2]
    assert not plain.block((1, 0)).projection and not plain.is_removable_shortcut((1, 0))
    assert plain.is_removable_shortcut((0, 0)) and not forced.is_removable_shortcut((0, 0))


# depths, rankable channels, blocks per stream (the stem's first)
STRUCTURE = {
    "r18": ((2, 2, 2, 2), 2816, [2, 2, 2, 2]),
    "r50": ((3, 4, 6, 3), 11392, [0, 3, 4, 6, 3]),
    "r101": ((3, 4, 23, 3), 20096, [0, 3, 4, 23, 3]),
    "searched_r18": ((1, 2, 2, 2), 2816 - 64, [1, 2, 2, 2]),
    "searched_r50": ((3, 4, 6, 3), None, [0, 3, 4, 6, 3]),
    # two blocks of the last stage stand before its projection and belong to the third stream
    "searched_r101": ((3, 4, 20, 5), None, [0, 3, 4, 22, 3]),
}


@pytest.mark.parametrize("name", sorted(STRUCTURE))
def test_structure(name):
    depths, rankable, runs = STRUCTURE[name]
    arch = resolve(name)
    assert arch.depths == depths
    assert rankable is None or arch.num_rankable_channels == rankable
    assert [len(stream.blocks) for stream in arch.streams] == runs
    assert [p for stream in arch.streams for p in stream.blocks] == arch.positions


@pytest.mark.parametrize("name, base, removed", [("r50", 11392, 9.3), ("r101", 20096, 23.5)])
def test_share_of_the_channels_that_the_published_results_removed(name, base, removed):
    left = resolve(f"searched_{name}").num_rankable_channels
    # of R101 one block and its channels are gone as well
    assert 100 * (1 - left / base) == pytest.approx(removed, abs=0.05)


def test_streams_of_the_searched_r101():
    arch = resolve("searched_r101")
    assert [s.width for s in arch.streams] == [64, 202, 300, 321, 2031]
    assert [s.source for s in arch.streams] == [None, (0, 0), (1, 0), (2, 0), (3, 2)]
    assert arch.streams[3].blocks[-2:] == ((3, 0), (3, 1))
    assert arch.stride((3, 0)) == 2 and not arch.block((3, 0)).projection
    assert [arch.stream_of(p) for p in [(0, 0), (2, 19), (3, 1), (3, 2), (3, 4)]] == [1, 3, 3, 4, 4]
    assert [arch.input_stream_of(p) for p in [(0, 0), (3, 0), (3, 2), (3, 3)]] == [0, 3, 3, 4]


def test_streams_of_basic_blocks_begin_at_the_stem():
    streams = resolve("r18").streams
    assert streams[0].source is None and streams[0].blocks == ((0, 0), (0, 1))
    assert [s.source for s in streams[1:]] == [(1, 0), (2, 0), (3, 0)]
    assert [s.width for s in streams] == [64, 128, 256, 512]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[(8,8)],[(8,8)],[(8,8)]", "4 stages, this one 3"),
        ("[(8,8)],[(8,8)],[(8,8)],[(8,8)],[(8,8)]", "4 stages, this one 5"),
        ("[(8,8)],[],[(8,8)],[(8,8)]", "stage 2 block 1 ''"),
        ("[(8,8)],[(8,8)],[(8,8)-(8,8,8)],[(8,8)]", r"stage 3 block 2 \(8, 8, 8\) has 3 numbers"),
        ("[(8)],[(8)],[(8)],[(8)]", r"stage 1 block 1 \(8,\) has 1 numbers, must have 2 or 3"),
        ("[(8,8,8,8)],[(8,8,8)],[(8,8,8)],[(8,8,8)]", "stage 1 block 1 .* must have 2 or 3"),
        ("[(8,8,64)],[(8,8,64)-(9,9,64)g4],[(8,8,8)],[(8,8,8)]", "stage 2 block 2 .* 4 groups"),
        ("[(8,8,64)],[(8,4,64)g4],[(8,8,8)],[(8,8,8)]", "stage 2 block 1 .* 4 groups"),
        ("[(8,64)],[(8,8)g4],[(8,8)],[(8,8)]", "stage 2 block 1 .* only bottlenecks"),
        ("[(8,8,64)g1],[(8,8,8)],[(8,8,8)],[(8,8,8)]", "leave out g1"),
        ("[(8,8,8)p],[(8,8,8)],[(8,8,8)],[(8,8,8)]", "stage 1 block 1 .* leave out the p"),
        ("[(8,0)],[(8,8)],[(8,8)],[(8,8)]", "stage 1 block 1 .* without channels"),
        ("[(8,8)],[(8,x)],[(8,8)],[(8,8)]", "stage 2 block 1 .*is no block"),
        ("[(8,8)-],[(8,8)],[(8,8)],[(8,8)]", "stage 1 block 2 ''"),
        ("(8,8),(8,8)", "no encoding"),
        ("[(8,8)][(8,8)],[(8,8)],[(8,8)]", "no encoding"),
        ("", "no encoding"),
    ],
)
def test_malformed_text_names_the_place(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(
        ValueError, match="'r34' is neither .*'r101', 'r18', 'r50', 'searched_r101'"
    ):
        resolve("r34")


def test_constructed_architectures_are_checked_too():
    block = Block((4, 4), projection=False)
    with pytest.raises(ValueError, match="stage 1 block 1 .*adds to a map of 64 channels"):
        Architecture(((block,),) * 4)
    with pytest.raises(ValueError, match="stem has 0"):
        parse(SMALL, stem=0)


def test_entry_and_ages():
    arch = parse(SMALL, stem=16)
    young = arch.with_blocks({(1, 1): Block((5, 5, 12), False, age=1)})
    entry = young.entry(fpn=24)
    assert entry == {
        "version": 1,
        "encoding": SMALL,
        "stem": 16,
        "fpn": 24,
        "age": [FULL_AGE] * 3 + [1] + [FULL_AGE] * 4,
    }
    read = Architecture.from_entry(entry)
    assert read == young == arch  # ages are not compared
    assert read.block((1, 1)).age == 1 and read.block((1, 0)).age == FULL_AGE
    assert read.older().block((1, 1)).age == 2
    assert read.older(500).entry(24)["age"] == [FULL_AGE] * 8
    for broken in [
        {**entry, "version": 2},
        {**entry, "age": [1]},
        {k: v for k, v in entry.items() if k != "stem"},
        "text",
    ]:
        with pytest.raises(ValueError, match="entry arch"):
            Architecture.from_entry(broken)


@pytest.mark.parametrize(
    "other, stem, message",
    [
        (SMALL, 16, ""),
        (SMALL, 8, "stem has 16 channels against 8"),
        (SMALL.replace("(5,5,12)", "(5,6,12)"), 16, r"stage 2 block 2 is \(5,5,12\) .*\(5,6,12\)"),
        (SMALL.replace("-(2,2,20)", ""), 16, "stage 4 has 3 blocks against 2"),
        (SMALL.replace(")p", ")"), 16, r"\(4,4,20\)p with a projection against \(4,4,20\) with an"),
    ],
)
def test_first_difference(other, stem, message):
    import re

    found = parse(SMALL, 16).first_difference(parse(other, stem))
    assert re.search(message, found) and bool(found) == bool(message)
