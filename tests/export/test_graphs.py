"""What graphs detect, in PyTorch and in the runtimes, is what the detectors detect."""

import pytest
import torch
from detectron2.modeling.meta_arch import RetinaNet

from kd_d2.export import build_graph
from kd_d2.export.graph_files import GRAPH_FORMATS
from kd_d2.export.operators import ONNX
from tests.export.graph_cases import (
    BATCHES,
    THRESHOLDS,
    assert_detects_the_same,
    photograph,
    sharpen,
)
from tests.fixtures import tiny_model
from tests.projects.mimicdet.whole import mimicdet_model

EXAMPLE = torch.stack([photograph(0, 165, 230), photograph(1, 165, 230)])
# Those whose towers have no group norm find nothing in an image of one colour.
DETECTORS = {
    "RetinaNet": range(1),
    "FCOS": range(1, 101),
    "GFL": range(1),
    "ATSS": range(1, 101),
    "GeneralizedRCNN": range(1),
    "MimicDet": range(1),
}


def detector(name, **overrides):
    values = {**THRESHOLDS, **overrides}
    if name == "MimicDet":
        return sharpen(mimicdet_model(**values))
    return sharpen(tiny_model(name, **values))


def run_eagerly(model, operators=ONNX):
    graph = build_graph(model, operators)
    return torch.no_grad()(graph)


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_files_detect_the_same_for_other_numbers_and_sizes_of_images(name):
    """Recorded once, with another batch, and loaded from the bytes of the file."""
    model = detector(name)
    for graph_format in GRAPH_FORMATS.values():
        graph = build_graph(model, graph_format.operators)
        run = graph_format.load(graph_format.write(graph, EXAMPLE, {}))
        for case, images in BATCHES.items():
            expected = DETECTORS[name] if case == "none" else range(1, 301)
            assert_detects_the_same(run, model, images, expected)


# Settings that change how boxes are chosen or decoded, on the graph as a module.
VARIANTS = {
    "FCOS of Detectron2": ("FCOS", {"MODEL.FCOS.PRESET": "d2"}),
    "FCOS with distributions": ("FCOS", {"MODEL.FCOS.REG_MAX": 8}),
    "FCOS without centerness": ("FCOS", {"MODEL.FCOS.CENTERNESS_ON": "none"}),
    "ATSS with distributions": ("ATSS", {"MODEL.ATSS.REG_MAX": 8}),
    "few candidates": ("GFL", {"MODEL.GFL.TOPK_CANDIDATES_TEST": 7}),
    "few detections": ("RetinaNet", {"TEST.DETECTIONS_PER_IMAGE": 3}),
    "class-agnostic boxes": (
        "GeneralizedRCNN",
        {"MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True},
    ),
    "sigmoid scores": ("GeneralizedRCNN", {"MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE": True}),
    "C4": ("C4", {}),
    "C4 of an R-18": ("C4", {"MODEL.ROI_HEADS.NAME": "KDRes5ROIHeads"}),
    "Cascade": ("Cascade", {}),
    "adaptive pooling": ("Cascade", {"MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": 2}),
    "MimicDet by formula": ("MimicDet", {"MODEL.MIMICDET.S_HEAD.ALIGN": "roiconv"}),
    "MimicDet, 5 x 5": (
        "MimicDet",
        {"MODEL.MIMICDET.S_HEAD.KERNELS": [5] * 5, "MODEL.MIMICDET.S_HEAD.GATHER_FIRST": False},
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(variant):
    name, overrides = VARIANTS[variant]
    model = detector(name, **overrides)
    images = [photograph(0, 130, 171), photograph(1, 130, 171)]
    assert_detects_the_same(run_eagerly(model), model, images, range(1, 201))


def test_no_proposals_are_no_detections():
    model = detector("GeneralizedRCNN", **{"MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 1000})
    assert_detects_the_same(run_eagerly(model), model, BATCHES["three"], range(1))


def test_the_model_is_left_as_it_is():
    model = detector("MimicDet")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    operator = next(iter(model.s_head.align.values())).deform_conv
    build_graph(model, ONNX)
    assert next(iter(model.s_head.align.values())).deform_conv is operator is not ONNX.deform_conv
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_subclass_has_the_graph_of_its_base():
    class Own(RetinaNet):
        pass

    model = detector("RetinaNet")
    model.__class__ = Own
    assert type(build_graph(model)).__name__ == "RetinaNetGraph"


@pytest.mark.parametrize(
    "name, overrides, message",
    [
        ("SSD", {}, "SSD cannot be exported as a graph, only ATSS, FCOS, GFL, .*MimicDet"),
        ("GFL", {"TEST.DETECTIONS_PER_IMAGE": 0}, "DETECTIONS_PER_IMAGE is 0"),
        ("GeneralizedRCNN", {"TEST.DETECTIONS_PER_IMAGE": -1}, "DETECTIONS_PER_IMAGE is -1"),
        ("GeneralizedRCNN", {"MODEL.MASK_ON": True}, "MODEL.MASK_ON is True"),
        (
            "GeneralizedRCNN",
            {"MODEL.PROPOSAL_GENERATOR.NAME": "RRPN", "MODEL.ROI_HEADS.NAME": "RROIHeads"},
            "RPN",
        ),
        ("MimicDet", {"MODEL.MIMICDET.EVAL_HEAD": "teacher"}, "can only be made of the S-head"),
    ],
)
def test_what_has_no_graph(name, overrides, message):
    if "RRPN" in overrides.values():
        overrides = {
            **overrides,
            "MODEL.ANCHOR_GENERATOR.NAME": "RotatedAnchorGenerator",
            "MODEL.ANCHOR_GENERATOR.ANGLES": [[0.0]],
            "MODEL.RPN.BBOX_REG_WEIGHTS": (1, 1, 1, 1, 1),
            "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": (10, 10, 5, 5, 1),
            "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIAlignRotated",
        }
    make = mimicdet_model if name == "MimicDet" else lambda **keys: tiny_model(name, **keys)
    with pytest.raises(ValueError, match=message):
        build_graph(make(**overrides).eval())
