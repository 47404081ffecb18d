"""Recorder: every call in order, checked for later modification, and no trace left behind."""

import copy
import pickle

import pytest
import torch
from torch import nn

from kd_d2.distillation import ModuleRecorder
from kd_d2.distillation.recorder import near_matches
from tests.fixtures import tiny_batch, tiny_model


class SharedHead(nn.Module):
    """A layer for the whole input and a tower that all levels share."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(2, 2, bias=False)
        self.tower = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
        self.idle = nn.Linear(2, 2)

    def forward(self, levels, fail=False):
        levels = [self.stem(levels[0])] + levels[1:]
        outputs = [self.tower(level) for level in levels]
        if fail:
            raise KeyError("inside the model")
        return outputs


def _model():
    model = SharedHead()
    with torch.no_grad():
        model.stem.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
        model.tower[0].weight.copy_(torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
    return model


def _levels():
    return [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, -4.0]]), torch.tensor([[5.0, 6.0]])]


def _num_hooks(model):
    kinds = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_forward_hooks_with_kwargs",
    )
    return sum(len(getattr(m, kind)) for m in model.modules() for kind in kinds)


def test_all_calls_in_order_with_inputs_and_outputs():
    model = _model()
    with ModuleRecorder(model, ["stem", "tower", "tower.0", "tower.1", "idle"]) as recorder:
        outputs = model(_levels())
    # worked out by hand: the stem maps (1, 2) to (3, 2), the conv doubles x and negates y
    linear = [[[6.0, -2.0]], [[6.0, 4.0]], [[10.0, -6.0]]]
    positive = [[[6.0, 0.0]], [[6.0, 4.0]], [[10.0, 0.0]]]
    inputs = [[[3.0, 2.0]], [[3.0, -4.0]], [[5.0, 6.0]]]
    assert [c.output.tolist() for c in recorder.calls("tower.0")] == linear
    assert [c.inputs[0].tolist() for c in recorder.calls("tower.1")] == linear
    assert [c.output.tolist() for c in recorder.per_level("tower", 3)] == positive
    assert [c.inputs[0].tolist() for c in recorder.calls("tower")] == inputs
    assert recorder.single("stem").output.tolist() == [[3.0, 2.0]]
    assert recorder.calls("idle") == []
    # the very tensors with their graph, not copies
    assert all(c.output is out for c, out in zip(recorder.calls("tower"), outputs))
    assert recorder.calls("tower.1")[0].inputs[0].grad_fn is not None


def test_recorded_tensors_carry_gradients():
    model, levels = _model(), _levels()
    with ModuleRecorder(model, ["tower"]) as recorder:
        model(levels)
    recorder.calls("tower")[1].output.sum().backward()
    # level 1 is (3, -4) and both ReLUs are open: d/dW[r, c] = x[c]; the stem took no part
    assert model.tower[0].weight.grad.tolist() == [[3.0, -4.0], [3.0, -4.0]]
    assert model.stem.weight.grad is None


def test_wrong_number_of_calls_names_path_and_counts():
    model = _model()
    with ModuleRecorder(model, ["stem", "tower", "idle"]) as recorder:
        model(_levels())
    with pytest.raises(RuntimeError, match="'tower' was called 3 times, expected 1"):
        recorder.single("tower")
    with pytest.raises(RuntimeError, match="'tower' was called 3 times, expected 5"):
        recorder.per_level("tower", 5)
    with pytest.raises(RuntimeError, match="'idle' was called 0 times, expected 1"):
        recorder.single("idle")
    with pytest.raises(ValueError, match="'tower.0' is not recorded; recorded: idle, stem, tower"):
        recorder.calls("tower.0")


def test_unknown_path_is_an_error_at_construction_and_lists_similar_ones():
    with pytest.raises(ValueError, match=r"SharedHead has no module 'tower\.9'.*tower\.0"):
        ModuleRecorder(_model(), ["stem", "tower.9"])
    with pytest.raises(ValueError, match="no module 'steam'; similar: stem"):
        ModuleRecorder(_model(), ["steam"])


def test_near_matches_fall_back_to_the_first_names():
    assert near_matches("neck.p33", ["neck.p3", "codec", "neck.p4"]).split(", ")[0] == "neck.p3"
    assert near_matches("zzzzzz", ["b", "a", "c"], count=2) == "a, b"


class InPlace(nn.Module):
    """``first`` is followed by an in-place operation on its output, or its input, by choice."""

    def __init__(self, victim):
        super().__init__()
        self.first = nn.Linear(2, 2)
        self.second = nn.Identity()
        self.victim = victim

    def forward(self, x):
        x = x * 1.0
        y = self.first(x)
        result = self.second({"a": [y], "b": (y + 1,)})
        {"output": y, "input": x.detach(), "nested": result["b"][0]}[self.victim].add_(1)
        return result


@pytest.mark.parametrize(
    "victim, path, what, other",
    [
        ("output", "first", "the output of module 'first'", "inputs"),
        ("input", "first", "an input of module 'first'", "output"),
        ("nested", "second", "the output of module 'second'", None),
    ],
)
def test_tensor_modified_afterwards_is_refused_by_name(victim, path, what, other):
    model = InPlace(victim)
    with ModuleRecorder(model, [path]) as recorder:
        model(torch.ones(1, 2))
    call = recorder.single(path)
    attribute = "inputs" if victim == "input" else "output"
    with pytest.raises(RuntimeError, match=what + r" \(shape \(1, 2\)\) was modified in place"):
        getattr(call, attribute)
    if other:  # the other side is as it was, hence readable
        assert getattr(call, other) is not None


def test_modification_before_the_call_is_no_error():
    model = nn.Sequential(nn.ReLU())
    x = torch.tensor([1.0, -1.0])
    x.mul_(2)
    with ModuleRecorder(model, ["0"]) as recorder:
        model(x)
    assert recorder.single("0").inputs[0].tolist() == [2.0, -2.0]


def test_convs_inside_residual_blocks_are_caught_and_block_outputs_are_safe():
    model = tiny_model("RetinaNet")
    block = "backbone.bottom_up.res3.0"
    with ModuleRecorder(model, [block, f"{block}.conv1"]) as recorder:
        model.backbone(model.preprocess_image(tiny_batch()).tensor)
    with pytest.raises(RuntimeError, match=r"res3\.0\.conv1"):
        recorder.single(f"{block}.conv1").output
    assert recorder.single(block).output.min() >= 0


def test_hooks_exist_only_inside_the_block():
    model = _model()
    recorder = ModuleRecorder(model, ["stem", "tower"])
    assert _num_hooks(model) == 0
    with recorder:
        assert _num_hooks(model) == 2
        model(_levels())
    assert _num_hooks(model) == 0
    model(_levels())
    assert len(recorder.calls("tower")) == 3


def test_hooks_are_removed_after_an_exception_which_passes_through():
    model = _model()
    recorder = ModuleRecorder(model, ["stem", "tower"])
    with pytest.raises(KeyError, match="inside the model"):
        with recorder:
            model(_levels(), fail=True)
    assert _num_hooks(model) == 0
    assert len(recorder.calls("tower")) == 3  # what was seen before the failure


def test_entering_again_starts_afresh_but_not_while_recording():
    model = _model()
    recorder = ModuleRecorder(model, ["tower"])
    with recorder:
        model(_levels())
        with pytest.raises(RuntimeError, match="already recording"):
            recorder.__enter__()
        model(_levels())
    assert _num_hooks(model) == 0
    assert len(recorder.calls("tower")) == 6
    with recorder:
        model(_levels()[:2])
    assert len(recorder.calls("tower")) == 2


def test_two_recorders_at_once_do_not_disturb_each_other():
    model = _model()
    outer, inner = ModuleRecorder(model, ["tower"]), ModuleRecorder(model, ["tower"])
    with outer:
        with inner:
            model(_levels()[:1])
        model(_levels()[:2])
    assert (len(inner.calls("tower")), len(outer.calls("tower"))) == (1, 3)
    assert _num_hooks(model) == 0


def test_model_can_be_copied_pickled_and_used_as_before():
    model = _model()
    before = [out.tolist() for out in model(_levels())]
    pickled_before = pickle.dumps(model)
    with ModuleRecorder(model, ["stem", "tower"]) as recorder:
        model(_levels())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert _num_hooks(twin) == 0
        assert [out.tolist() for out in twin(_levels())] == before
    assert len(pickle.dumps(model)) == len(pickled_before)
    assert len(recorder.calls("tower")) == 3  # the copies' calls did not reach the record


def test_same_path_given_twice_is_recorded_once():
    model = _model()
    with ModuleRecorder(model, ["tower", "tower"]) as recorder:
        model(_levels())
    assert len(recorder.calls("tower")) == 3
