"""Non-maximum suppression over a batch."""

import io
import warnings

import pytest
import torch
from torchvision.ops import nms

from kd_d2.export.onnx_format import OPSET
from kd_d2.export.suppression import suppress, suppress_onnx

BOTH = pytest.mark.parametrize("function", [suppress, suppress_onnx])


@BOTH
def test_worked_out_by_hand(function):
    # IoU of 0 and 1: 8 / 12; of 1 and 2: 4 / 16; 3 is far away.
    row = [[0.0, 0, 5, 2], [1, 0, 6, 2], [4, 0, 9, 2], [20, 0, 25, 2]]
    boxes = torch.tensor([row, row])
    scores = torch.tensor([[[0.8, 0.9, 0.7, 0.1]], [[0.8, 0.9, -5.0, 0.1]]])
    candidates = torch.tensor([[[True, True, True, True]], [[True, False, True, True]]])
    keep = function(boxes, scores, candidates, 0.5, 10)
    # In the second set the box that suppresses 0 is no candidate, and scores may be negative.
    expected = torch.tensor([[[False, True, True, True]], [[True, False, True, True]]])
    assert torch.equal(keep, expected)
    assert function(boxes, scores, candidates, 0.2, 10)[0].tolist() == [[False, True, False, True]]
    assert function(boxes, scores, candidates, 0.5, 1)[0].tolist() == [[False, True, False, False]]
    assert not function(boxes, scores, torch.zeros_like(candidates), 0.5, 10).any()


def random_case(seed, sets=2, groups=3, rows=40):
    torch.manual_seed(seed)
    corners = torch.rand(sets, rows, 2) * 60
    boxes = torch.cat((corners, corners + 5 + torch.rand(sets, rows, 2) * 40), dim=2)
    scores = torch.randn(sets, groups, rows)
    return boxes, scores, torch.rand(sets, groups, rows) < 0.7


def naive(boxes, scores, candidates, threshold, limit):
    keep = torch.zeros_like(candidates)
    for b in range(len(scores)):
        for g in range(scores.shape[1]):
            index = [r for r in range(scores.shape[2]) if candidates[b, g, r]]
            for r in nms(boxes[b, index], scores[b, g, index], threshold)[:limit]:
                keep[b, g, index[r]] = True
    return keep


@BOTH
def test_groups_and_sets_do_not_touch_each_other(function):
    case = random_case(0)
    keep = function(*case, 0.4, 6)
    assert torch.equal(keep, naive(*case, 0.4, 6))
    assert 10 < keep.sum() < case[2].sum()


def test_as_an_operator_of_onnx():
    onnxruntime = pytest.importorskip("onnxruntime")

    class Module(torch.nn.Module):
        def forward(self, boxes, scores, candidates):
            return suppress_onnx(boxes, scores, candidates, 0.4, 6)

    names, free = ["boxes", "scores", "candidates"], {0: "b", 1: "g", 2: "r"}
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            Module(),
            random_case(0),
            file,
            dynamo=False,
            opset_version=OPSET,
            input_names=names,
            dynamic_axes={"boxes": {0: "b", 1: "r"}, "scores": free, "candidates": free},
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    for case in (random_case(1, sets=3, groups=2, rows=25), random_case(2, sets=1)):
        (keep,) = session.run(None, dict(zip(names, (x.numpy() for x in case))))
        assert torch.equal(torch.as_tensor(keep), naive(*case, 0.4, 6))
    none = (case[0], case[1], torch.zeros_like(case[2]))
    (keep,) = session.run(None, dict(zip(names, (x.numpy() for x in none))))
    assert not keep.any()
