"""A teacher's own precision: what runs in it, what comes out, and where gradients go."""

import pytest
import torch
from detectron2.structures import Boxes

from kd_d2.distillation.precision import PRECISIONS, Precision
from tests.fixtures import teacher_of, tiny_batch, tiny_model

CPU = torch.device("cpu")
SIZE = (64, 64)


def _batch():
    return tiny_batch(sizes=[SIZE, (37, 51)])


def _seen_dtypes(model, path="backbone.bottom_up"):
    seen = []
    model.get_submodule(path).register_forward_hook(
        lambda m, inputs, output: seen.append({v.dtype for v in output.values()})
    )
    return seen


def _error(values, exact):
    """Largest deviation, in units of the largest value."""
    error = max((a - b).abs().max().item() for a, b in zip(values, exact))
    return error / max(b.abs().max().item() for b in exact)


def test_unknown_precisions_list_the_known_ones():
    with pytest.raises(ValueError, match=r"KD.TEACHER.DTYPE is 'half'; .*'bfloat16', 'float16'"):
        Precision("half")


@pytest.mark.parametrize("name", ["", "float32"])
def test_full_precision_changes_nothing(name):
    model = tiny_model("RetinaNet")
    plain = teacher_of(model).start(_batch(), SIZE, ["neck", "pred.cls"])
    own = teacher_of(model, dtype=name).start(_batch(), SIZE, ["neck", "pred.cls"])
    for key in ("neck", "pred.cls"):
        assert all(torch.equal(a, b) for a, b in zip(plain[key], own[key]))


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_reduced_precision_inside_float32_outside(name):
    model = tiny_model("RetinaNet")
    exact = teacher_of(model).start(_batch(), SIZE, ["pred.cls"])["pred.cls"]
    seen = _seen_dtypes(model)
    run = teacher_of(model, dtype=name).start(_batch(), SIZE, ["neck", "pred.cls"])
    logits = run["pred.cls"]
    assert PRECISIONS[name] in seen[0]
    assert {v.dtype for v in [*logits, *run["neck"]]} == {torch.float32}
    assert run["neck"] is run["neck"]
    assert 0 < _error(logits, exact) < 0.02  # rounded, and no more than that


def test_in_a_step_under_autocast_the_teacher_follows_or_goes_its_own_way():
    model = tiny_model("RetinaNet")
    seen = _seen_dtypes(model)
    with torch.autocast("cpu", torch.bfloat16):
        followed = teacher_of(model).start(_batch(), SIZE, ["neck"])["neck"]
        exact = teacher_of(model, dtype="float32").start(_batch(), SIZE, ["neck"])["neck"]
        assert torch.is_autocast_enabled("cpu")
    assert torch.bfloat16 in seen[0] and seen[1] == {torch.float32}
    assert followed[0].dtype == torch.bfloat16 and exact[0].dtype == torch.float32


def test_regions_and_the_rest_of_the_head():
    batch, model = _batch(), tiny_model("GeneralizedRCNN")
    boxes = [x["instances"].gt_boxes for x in batch]
    keys = ["roi.feat", "roi.cls"]
    exact = teacher_of(model).start(batch, SIZE, keys).run(keys, boxes)
    rounded = teacher_of(model, dtype="bfloat16").start(batch, SIZE, keys).run(keys, boxes)
    for key in keys:
        assert rounded[key].dtype == torch.float32
        assert 0 < _error([rounded[key]], [exact[key]]) < 0.02

    dense = teacher_of(tiny_model("RetinaNet"), dtype="bfloat16")
    run = dense.start(batch, SIZE, ["head.cls[1]", "pred.cls"])
    features = [f.clone().requires_grad_() for f in run["head.cls[1]"]]
    logits = run.rest_of_head("cls", 1, features)["cls"]
    assert all(v.dtype == torch.float32 for v in logits)
    assert _error(logits, run["pred.cls"]) < 0.02
    sum(v.square().sum() for v in logits).backward()
    assert all(torch.isfinite(f.grad).all() and f.grad.abs().sum() > 0 for f in features)
    assert all(p.grad is None for p in dense.model.parameters())


def test_what_may_be_copied_is_that_of_before_bit_by_bit():
    model = tiny_model("GFL")
    stored = {key: value.clone() for key, value in model.state_dict().items()}
    teacher = teacher_of(model, dtype="bfloat16", fuse_bn=True, channels_last=True)
    teacher.start(_batch(), SIZE, ["pred.cls"])["pred.cls"]
    copied = teacher.state_to_copy()
    assert stored.keys() == copied.keys()
    assert all(torch.equal(copied[key], value) for key, value in stored.items())


def test_coordinates_of_regions_are_not_rounded():
    """The map is a ramp, exact in bfloat16, and says where it is read; 10.3 would be 10.3125."""
    model = tiny_model("GeneralizedRCNN")
    run = teacher_of(model, dtype="bfloat16").start(_batch(), SIZE, ["roi.feat"])
    channels = run["neck"][0].shape[1]
    ramp = (torch.arange(16) * 4.0).bfloat16().repeat(2, channels, 16, 1)
    run._store._features = {
        name: ramp[..., : max(16 >> i, 1), : max(16 >> i, 1)].contiguous()
        for i, name in enumerate(run._store.features)
    }
    boxes = [Boxes(torch.tensor([[10.3, 10.0, 24.8, 24.0]])) for _ in range(2)]
    pooled = run.run(["roi.feat"], boxes)["roi.feat"]
    size = pooled.shape[-1]
    # value at x pixels: cell centres lie at 4i + 2, where the map is 4i
    centres = 10.3 + (torch.arange(size) + 0.5) * (24.8 - 10.3) / size - 2
    torch.testing.assert_close(pooled[0, 0, 0], centres, rtol=0, atol=1e-4)
