import torch
from torch import nn

from kd_d2.checkpoint.report import KeyReport, compare


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)
        self.head2 = nn.Linear(2, 2)
        self.register_buffer("pixel_mean", torch.zeros(3), persistent=False)


def test_equal():
    model = _Model()
    report = compare(model.state_dict(), model)
    assert report == KeyReport() and report.ok
    assert report.format() == "All keys match."


def test_all_kinds():
    model = _Model()
    state = model.state_dict()
    del state["head.bias"], state["head2.bias"], state["head2.weight"]
    state["head.weight"] = torch.zeros(8, 3, 1, 1).numpy()
    state["extra"] = state["neck.conv.weight"] = torch.zeros(1)
    report = compare(state, model)
    assert report.missing == ["head.bias", "head2.bias", "head2.weight"]
    assert report.unexpected == ["extra", "neck.conv.weight"]
    assert report.mismatched == [("head.weight", (8, 3, 1, 1), (4, 3, 1, 1))]
    assert not report.ok
    assert report.format().split("\n") == [
        "3 keys of the model are not in the checkpoint:",
        "  head: bias",
        "  head2: bias, weight",
        "2 keys of the checkpoint are not in the model:",
        "  extra",
        "  neck.conv: weight",
        "1 keys have another shape:",
        "  head.weight: (8, 3, 1, 1) in the checkpoint, (4, 3, 1, 1) in the model",
    ]


def test_without_module_prefixes():
    report = KeyReport(["head.bias", "head2.bias"], ["head"], [("head.weight", (1,), (2,))])
    assert report.without(["head"]) == KeyReport(["head2.bias"])
    assert report.without(["head."]) == KeyReport(["head2.bias"])
    assert report.without([]) == report


def test_detectron2_exemptions():
    model = _Model()
    state = model.state_dict()
    state["pixel_mean"] = torch.zeros(3)
    state["anchor_generator.cell_anchors.0"] = torch.zeros(9, 4)
    assert compare(state, model).ok
    state["pixel_std"] = torch.ones(3)  # the model has no such buffer
    assert compare(state, model).unexpected == ["pixel_std"]
