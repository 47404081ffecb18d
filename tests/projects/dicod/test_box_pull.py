"""Pull of the localisation terms: the specification's ramp, SSD's box loss by hand, the command."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch

from kd_d2.projects.dicod.box_pull import BOX_LOSS, displaced, pull_of_boxes
from kd_d2.projects.dicod.kd_loc import OBJ
from tests.fixtures import registered_toy_dataset, tiny_cfg
from tests.projects.dicod.detectors import KEYS, classifier

SCRIPT = Path(__file__).resolve().parents[3] / "projects/DICOD/tools/box_pull.py"
GT = [16.0, 16.0, 48.0, 48.0]


def pull(*boxes):
    """On I(x, y) = x, a box per image of the batch."""
    ramp = (torch.arange(64) + 0.5).expand(len(boxes), 3, 64, 64)
    lists = [[torch.tensor([box]) for box in side] for side in ([GT] * len(boxes), boxes)]
    sizes = [(64, 64)] * len(boxes)
    return pull_of_boxes(ramp, sizes, *lists, pools={OBJ: 4}, size=32, chunk=1)


def test_pixels_of_a_ramp():
    """Oracle 2: gradients (.5, 0, .5, 0), (.5, 0, .5, 0) and (-.25, 0, .25, 0), sides of 32."""
    found = pull([20, 16, 52, 48.0], [16, 16, 52, 48.0], [14, 16, 50, 48.0])[OBJ]
    assert found.value.tolist() == pytest.approx([4, 2, 1], abs=1e-4)
    expected = [32 * math.sqrt(0.5), 32 * math.sqrt(0.5), 32 * math.sqrt(0.125)]
    assert found.gradient.tolist() == pytest.approx(expected, abs=1e-3)
    # ways (-4, 0, -4, 0), (0, 0, -4, 0) and (2, 0, -2, 0)
    assert found.cosine.tolist() == pytest.approx([1, math.sqrt(0.5), 1], abs=1e-4)


def test_no_gradient_has_no_direction():
    found = pull([16, 20, 48, 52.0])[OBJ]
    assert found.value.item() == found.gradient.item() == found.cosine.item() == 0


def test_box_loss():
    """A shift by 2 of 32 along x: dx 0.625, 0.625^2 / 2; by 8 linear, 2.5 - 0.5. The gradient of
    the deltas, 0.625 and 1, times 10 for a shift by a width, which moves two coordinates by half.
    """
    found = pull([18, 16, 50, 48.0], [24, 16, 56, 48.0])[BOX_LOSS]
    assert found.value.tolist() == pytest.approx([0.625**2 / 2, 2.0], abs=1e-5)
    assert found.cosine.tolist() == pytest.approx([1, 1], abs=1e-5)
    # dw's own derivative is 0 here, dw = 0
    expected = [10 * 0.625 * math.sqrt(0.5), 10 * math.sqrt(0.5)]
    assert found.gradient.tolist() == pytest.approx(expected, abs=1e-4)


def test_displaced():
    torch.manual_seed(0)
    boxes = torch.tensor([[0.0, 0, 10, 40]]).repeat(500, 1)
    ways = (displaced(boxes, 0.2) - boxes) / torch.tensor([10.0, 40, 10, 40])
    torch.testing.assert_close(ways.norm(dim=1), torch.full((500,), 0.2))
    assert ways.mean(dim=0).abs().max() < 0.02  # all directions
    assert ways.std(dim=0).tolist() == pytest.approx([0.1] * 4, rel=0.1)


def test_command(tmp_path, capsys):
    spec = importlib.util.spec_from_file_location("box_pull_tool", SCRIPT)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    model = classifier()
    weights = tmp_path / "classifier.pth"
    torch.save({"model": model.state_dict(), "run_info": model.metadata()}, weights)
    keys = {
        **KEYS,
        "KD.TEACHER.WEIGHTS": str(weights),
        "KD.TEACHER.CLASSIFIER.ARCH": "resnet18",
        "KD.TEACHER.CLASSIFIER.INPUT_SIZE": 32,
        "KD.DICOD.LOC.OBJ_WEIGHT": 0.5,
        "SEED": 1,
    }
    config = tmp_path / "config.yaml"
    with registered_toy_dataset(tmp_path, 4, size=(128, 128)) as data:
        config.write_text(tiny_cfg("SSD", **keys, **{"DATASETS.TRAIN": (data,)}).dump())
        options = ["--config-file", str(config), "--batches", "2"]
        tool.main(options)
        header, _, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
        with pytest.raises(SystemExit, match="no localisation term: KD.DISTILLERS"):
            tool.main([*options, "KD.DICOD.LOC.ENABLED", "False"])
    names = [name.strip() for name in header.strip("|").split("|")]
    values = [[float(x) for x in row.strip("|").split("|")] for row in rows]
    assert names[2] == "obj x 0.5: gradient" and names[4] == "stem x 0.15: gradient"
    assert names[6] == "box loss x 1: gradient" and len(values) == 5
    # distances 0.02 and 0.1: the box loss is quadratic there
    assert values[2][6] == pytest.approx(5 * values[0][6], rel=0.1)
    assert values[0][1] > 0.95 and values[0][7] > 0.98
