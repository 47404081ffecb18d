"""The pyramid without its finest level: equal maps, fewer operations."""

import pytest
import torch
from detectron2.modeling import FPN, build_backbone
from torch.utils.flop_counter import FlopCounterMode

from kd_d2.projects.mimicdet import StaggeredFPN

from .whole import WITHOUT_P2, mimicdet_cfg

FINER, COARSER = ["p2"], ["p3", "p4", "p5", "p6", "p7"]


def backbone(seed=0, **overrides):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_backbone(mimicdet_cfg(**overrides)).eval()


@pytest.fixture(scope="module")
def pyramid():
    return backbone()


@pytest.fixture(scope="module")
def images():
    return torch.randn(1, 3, 256, 320, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_skipping_changes_no_bit_of_the_other_levels(pyramid, images):
    full, fewer = pyramid(images), pyramid(images, num_skip=1)
    assert list(full) == FINER + COARSER and list(fewer) == COARSER
    assert all(torch.equal(full[name], fewer[name]) for name in COARSER)
    sizes = [(64, 80), (32, 40), (16, 20), (8, 10), (4, 5), (2, 3)]
    assert [tuple(x.shape[-2:]) for x in full.values()] == sizes
    two = pyramid(images, num_skip=2)
    assert list(two) == COARSER[1:]
    assert all(torch.equal(full[name], x) for name, x in two.items())


@torch.no_grad()
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
def test_without_skipping_it_is_detectron2s_pyramid(images, fuse_type):
    pyramid = backbone(**{"MODEL.FPN.FUSE_TYPE": fuse_type})
    expected, found = FPN.forward(pyramid, images), pyramid(images)
    assert list(expected) == list(found)
    assert all(torch.equal(expected[name], found[name]) for name in found)


def test_skipped_layers_do_not_run(pyramid, images):
    def fail(*_):
        raise AssertionError("layer of P2 has run")

    layers = (pyramid.fpn_lateral2, pyramid.fpn_output2)
    hooks = [layer.register_forward_hook(fail) for layer in layers]
    try:
        with torch.no_grad():
            pyramid(images, num_skip=1)
            with pytest.raises(AssertionError, match="P2 has run"):
                pyramid(images)
    finally:
        for hook in hooks:
            hook.remove()


def test_shapes_name_p2_and_the_divisor_is_that_of_c5(pyramid):
    assert isinstance(pyramid, StaggeredFPN)
    shapes = pyramid.output_shape()
    assert {name: shape.stride for name, shape in shapes.items()} == {
        f"p{level}": 2**level for level in range(2, 8)
    }
    assert pyramid.size_divisibility == 32
    assert pyramid.top_block.in_feature == "res5"


@torch.no_grad()
def test_p6_from_p5(images):
    pyramid = backbone(**{"MODEL.FPN.P6_SOURCE": "p5"})
    maps = pyramid(images, num_skip=1)
    assert torch.equal(maps["p6"], pyramid.top_block.p6(maps["p5"]))


def test_a_pyramid_without_p2_has_none_of_its_layers(pyramid, images):
    small = backbone(**WITHOUT_P2)
    extra = set(pyramid.state_dict()) - set(small.state_dict())
    assert extra == {
        f"fpn_{x}2.{kind}" for x in ("lateral", "output") for kind in ("weight", "bias")
    }
    small.load_state_dict({k: v for k, v in pyramid.state_dict().items() if k not in extra})
    with torch.no_grad():
        full, maps = pyramid(images), small(images)
    assert list(maps) == COARSER and all(torch.equal(full[name], maps[name]) for name in maps)


@pytest.mark.parametrize("num_skip", [-1, 4])
def test_bad_number(pyramid, images, num_skip):
    with pytest.raises(ValueError, match=f"num_skip {num_skip} must be"):
        pyramid(images, num_skip=num_skip)


def test_unknown_levels():
    with pytest.raises(ValueError, match="MODEL.FPN.IN_FEATURES"):
        backbone(**{"MODEL.FPN.IN_FEATURES": ["res3", "res6"]})


def giga_macs(pyramid, images, num_skip):
    """Multiply-accumulates of all convolutions, in units of 1e9."""
    with FlopCounterMode(display=False) as counter:
        pyramid(images, num_skip)
    # two operations each
    return counter.get_total_flops() / 2e9


@torch.no_grad()
def test_operations_of_a_resnet_50():
    # fvcore counts the same, and with normalisation and upsampling 145.336 and 101.279, but it
    # has to compute 800x1344 pixels; here shapes suffice
    pyramid = backbone(
        **{
            "MODEL.RESNETS.DEPTH": 50,
            "MODEL.RESNETS.STRIDE_IN_1X1": True,
            "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
            "MODEL.FPN.OUT_CHANNELS": 256,
        }
    ).to("meta")
    images = torch.zeros(1, 3, 800, 1344, device="meta")
    counts = [giga_macs(pyramid, images, num_skip) for num_skip in (0, 1)]
    assert counts == pytest.approx([144.860, 100.820], abs=1e-3)
    # lateral and output convolution of 200x336 cells
    assert counts[0] - counts[1] == pytest.approx(200 * 336 * 256 * (256 + 9 * 256) / 1e9)
