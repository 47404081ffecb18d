"""Peak memory of a fresh process, against the sizes of what it must hold."""

import functools

import pytest

from kd_d2.analysis import peak_memory
from kd_d2.engine.main import build_config
from tests.engine.support import write_yaml
from tests.fixtures import tiny_cfg, tiny_model

MIB = 2**20


def test_peak_of_a_detection(tmp_path):
    path = write_yaml(tmp_path / "a.yaml", tiny_cfg("RetinaNet"))
    build = functools.partial(build_config, path, ["MODEL.DEVICE", "cpu"])
    memory = peak_memory(build, (1024, 1024), threads=1)
    tensors = tiny_model("RetinaNet").state_dict().values()
    assert memory.model == pytest.approx(
        sum(x.numel() * x.element_size() for x in tensors), rel=0.01
    )
    assert sum(memory.groups.values()) == pytest.approx(memory.peak)
    # the stem's output, (64, 512, 512), before and after its norm, are there at the same time
    stem = 64 * 512 * 512 * 4
    assert memory.groups["backbone.bottom_up"] > 1.5 * stem
    assert memory.peak > memory.model + 1.5 * stem
    assert memory.peak < memory.model + 10 * stem
    # a pyramid of 32 channels and strides of 8 and more fits into what the stem gave back
    assert memory.groups["backbone.fpn"] < stem
