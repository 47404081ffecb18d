"""Codes of subnets, numbers of channels, sizes of the spaces and what is drawn from them."""

import random
from collections import Counter

import pytest

from kd_d2.projects.jointdetnas.cost import backbone_cost, total
from kd_d2.projects.jointdetnas.elastic_config import pool_of
from kd_d2.projects.jointdetnas.presets import PRESETS
from kd_d2.projects.jointdetnas.space import parse
from kd_d2.projects.jointdetnas.subnet import Geometry, Subnet, SubnetSpace, iteration_generator
from tests.fixtures import tiny_cfg

PAPER = {
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.FPN.OUT_CHANNELS": 256,
}
PHASES = [((3, 4, 23, 3), (6,)), ((3, 4, 12, 3), (5, 6)), ((2, 2, 2, 2), (4, 5, 6))]


def space(phase):
    return SubnetSpace.of(Geometry(), *PHASES[phase])


def test_codes_round_trip():
    subnet = Subnet((3, 4, 23, 3), (6, 5, 4, 6), 5, 4)
    assert str(subnet) == "d3-4-23-3_w6-5-4-6_n5_s4"
    assert Subnet.parse(str(subnet)) == subnet
    assert Subnet.parse(" d3-4-23-3_w6-5-4-6_n5_s4\n") == subnet
    generator = random.Random(0)
    for _ in range(50):
        drawn = space(2).sample(generator)
        assert Subnet.parse(str(drawn)) == drawn


@pytest.mark.parametrize(
    "code",
    ["", "d3-4-23_w6-6-6-6_n6_s6", "d3-4-23-3_w6-6-6-6_n6", "d3-4-23-3_w6-6-6-6.5_n6_s6", "max"],
)
def test_malformed_codes_are_named(code):
    with pytest.raises(ValueError, match=f"'{code}' is no code"):
        Subnet.parse(code)


@pytest.mark.parametrize("phase, size", enumerate([1, 768, 192456]))
def test_number_of_subnets(phase, size):
    assert len(space(phase)) == size
    resolutions = tiny_cfg("GeneralizedRCNN").INPUT.RESOLUTIONS
    assert len(resolutions) == 4 and (phase < 2 or size * len(resolutions) == 769824)


def test_default_config_is_the_last_phase():
    geometry, default = pool_of(tiny_cfg("GeneralizedRCNN", **PAPER))
    assert (geometry, default) == (Geometry(), space(2))
    assert str(geometry.largest) == str(default.largest) == "d3-4-23-3_w6-6-6-6_n6_s6"
    assert str(default.smallest) == "d2-2-2-2_w4-4-4-4_n4_s4"


def test_channels_by_hand():
    geometry = Geometry()
    assert [geometry.inner_channels(s, 6) for s in range(4)] == [96, 192, 384, 768]
    assert [geometry.outer_channels(s, 6) for s in range(4)] == [384, 768, 1536, 3072]
    assert [geometry.outer_channels(1, w) for w in (4, 5, 6)] == [512, 640, 768]
    assert [geometry.stem_channels(w) for w in (4, 5, 6)] == [64, 80, 96]
    assert [geometry.neck_channels(w) for w in (4, 5, 6)] == [256, 320, 384]


def test_standard_subnets_are_the_standard_networks():
    geometry = Geometry()
    for code, preset in (("d3-4-6-3", "r50"), ("d3-4-23-3", "r101")):
        subnet = Subnet.parse(f"{code}_w4-4-4-4_n4_s4")
        assert str(geometry.architecture(subnet)) == PRESETS[preset]
    mixed = geometry.architecture(Subnet.parse("d2-2-2-2_w6-5-4-6_n5_s5"))
    assert str(mixed) == (
        "[(96,96,384)-(96,96,384)],[(160,160,640)-(160,160,640)],"
        "[(256,256,1024)-(256,256,1024)],[(768,768,3072)-(768,768,3072)]"
    )
    assert mixed.stem == 80


def test_projection_stays_where_the_numbers_coincide():
    geometry = Geometry((1, 1, 1, 1), stem=32, inner=8, outer=32, neck=32)
    text = str(geometry.architecture(geometry.largest))
    assert text.startswith("[(12,12,48)p],")
    assert parse(text, 48).block((0, 0)).projection


def test_draws_are_uniform_by_gene_and_inside():
    generator, pool = random.Random(1), space(2)
    drawn = [pool.sample(generator) for _ in range(3000)]
    assert all(subnet in pool for subnet in drawn)
    for stage, (low, high) in enumerate(pool.depths):
        counts = Counter(subnet.depths[stage] for subnet in drawn)
        assert set(counts) == set(range(low, high + 1))
        expected = 3000 / (high - low + 1)
        assert all(abs(n - expected) < 5 * expected**0.5 for n in counts.values())
    genes = [
        *([s.widths[k] for s in drawn] for k in range(4)),
        [s.neck for s in drawn],
        [s.stem for s in drawn],
    ]
    for values in genes:
        assert all(900 < n < 1100 for n in Counter(values).values())
    # genes are drawn by themselves
    assert abs(sum(s.neck == s.stem for s in drawn) - 1000) < 130
    assert Subnet.parse("d2-2-2-2_w4-4-4-4_n4_s4") not in space(1)


def test_draws_depend_on_seed_and_iteration_only():
    first = [str(space(2).sample(iteration_generator(7, i))) for i in range(20)]
    random.seed(3)
    again = [str(space(2).sample(iteration_generator(7, i))) for i in range(20)]
    assert first == again and len(set(first)) == 20
    assert first != [str(space(2).sample(iteration_generator(8, i))) for i in range(20)]


@pytest.mark.parametrize(
    "key, value",
    [
        ("DEPTHS", (3, 4, 23)),
        ("DEPTHS", (3, 4, 0, 3)),
        ("MAX_WIDTH", 0),
        ("MIN_DEPTHS", (2, 2, 24, 2)),
        ("MIN_DEPTHS", (0, 2, 2, 2)),
        ("MIN_DEPTHS", (2, 2, 2)),
        ("WIDTHS", ()),
        ("WIDTHS", (5, 4)),
        ("WIDTHS", (4, 4)),
        ("WIDTHS", (4, 7)),
        ("WIDTHS", (0, 4)),
    ],
)
def test_impossible_spaces_name_their_key(key, value):
    cfg = tiny_cfg("GeneralizedRCNN", **PAPER, **{f"MODEL.ELASTIC_RESNET.{key}": value})
    with pytest.raises(ValueError, match=f"MODEL.ELASTIC_RESNET.{key}"):
        pool_of(cfg)


@pytest.mark.parametrize("key", list(PAPER))
def test_standard_widths_must_have_quarters(key):
    with pytest.raises(ValueError, match=key):
        pool_of(tiny_cfg("GeneralizedRCNN", **{**PAPER, key: 62}))


@pytest.mark.parametrize(
    "code", ["d4-4-23-3_w6-6-6-6_n6_s6", "d3-4-23-3_w7-6-6-6_n6_s6", "d3-4-23-3_w6-6-6-6_n0_s6"]
)
def test_subnets_outside_the_supernet_are_refused(code):
    with pytest.raises(ValueError, match=code):
        Geometry().architecture(Subnet.parse(code))


@pytest.mark.parametrize(
    "corner, parameters, gmacs", [("largest", 95.5, 373.6), ("smallest", 13.95, 50.0)]
)
def test_capacity_of_the_pool(corner, parameters, gmacs):
    """Bottom-up network at 1333x800; the axis of Fig. 5 ends there, too."""
    architecture = Geometry().architecture(getattr(space(2), corner))
    cost = total(backbone_cost(architecture, (1333, 800)))
    assert cost.parameters / 1e6 == pytest.approx(parameters, abs=0.05)
    assert cost.macs / 1e9 == pytest.approx(gmacs, abs=0.05)
