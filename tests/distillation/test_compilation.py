"""A compiled teacher gives the values of the plain one."""

import pytest
import torch

from tests.fixtures import teacher_of, tiny_batch, tiny_model


@pytest.mark.parametrize("name", ["RetinaNet", "C4"])
def test_values_hooks_and_state_are_those_of_the_plain_teacher(name):
    model = tiny_model(name)
    keys = ["backbone.res4", "neck"] if name == "RetinaNet" else ["backbone.res4"]
    sizes = [(64, 64), (96, 64), (64, 128)]  # padded sizes change from step to step
    batches = [tiny_batch(sizes=[size, size]) for size in sizes]
    plain = teacher_of(model)
    expected = [plain.start(b, size, keys) for b, size in zip(batches, sizes)]
    expected = [[run[key] for key in keys] for run in expected]
    names = list(model.state_dict())

    # the backend without code generation: the capture is the same, a compiler is not needed
    compiled = teacher_of(model, compiler="eager")
    for batch, size, values in zip(batches, sizes, expected):
        run = compiled.start(batch, size, keys)
        for key, value in zip(keys, values):
            torch.testing.assert_close(run[key], value)
    assert list(model.state_dict()) == names


def test_what_cannot_be_compiled_or_recorded_is_refused():
    model = tiny_model("RetinaNet")
    with pytest.raises(ValueError, match="KD.TEACHER.COMPILE is 'gcc'; .*'inductor'"):
        teacher_of(model, compiler="gcc")
    teacher = teacher_of(model, compiler="eager")
    key = "path:backbone.bottom_up.res4"
    with pytest.raises(ValueError, match=f"'{key}' lies inside"):
        teacher.start(tiny_batch(), (128, 128), [key])
    teacher.start(tiny_batch(), (128, 128), ["path:backbone.bottom_up"])
