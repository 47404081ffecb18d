"""Fig. 3: points of taps, and the command that draws them."""

import csv
import importlib.util
from pathlib import Path

import pytest
import torch
from PIL import Image

from kd_d2.projects.mimicdet.offsets import box_offsets
from kd_d2.projects.mimicdet.sampling_points import image_points, sampling_points, share_inside
from tests.fixtures import CLASSES, registered_toy_dataset, save_weights, tiny_batch
from tests.projects.mimicdet.whole import mimicdet_cfg, mimicdet_model

SCRIPT = Path(__file__).resolve().parents[3] / "projects/MimicDet/tools/sampling_points.py"


def test_points_without_offsets_are_the_centres_of_the_neighbours():
    points = image_points(torch.zeros(18, 4, 5), 2, 3, 8)
    assert points.tolist() == [[8 * (x + 0.5), 8 * (y + 0.5)] for y in (1, 2, 3) for x in (2, 3, 4)]


def test_offsets_move_points_by_cells_in_x_and_y():
    offsets = torch.zeros(18, 4, 5)
    offsets[2 * 5, 2, 3] = 1.0  # dy of tap (1, 2)
    offsets[2 * 5 + 1, 2, 3] = -0.25  # dx
    points = image_points(offsets, 2, 3, 8)
    assert points[5].tolist() == [8 * (4.5 - 0.25), 8 * (2.5 + 1.0)]
    assert points[4].tolist() == [28.0, 20.0]


@pytest.mark.parametrize("kernel_size", [3, 5])
def test_analytic_offsets_lie_inside_of_the_box(kernel_size):
    """Anchor [36, 28, 68, 60] of stride 8, deltas (.25, -.125, ln 1.5, 0): [36, 24, 84, 56]."""
    deltas = torch.tensor([0.25, -0.125, 1.5, 0.0])
    deltas[2] = deltas[2].log()
    offsets = box_offsets(deltas.view(1, 4, 1, 1).expand(1, 4, 10, 10), kernel_size)
    points = image_points(offsets[0], 5, 6, 8)
    box = torch.tensor([36.0, 24.0, 84.0, 56.0])
    assert share_inside(points, box) == 1.0
    parts = (torch.arange(kernel_size) + 0.5) / kernel_size
    assert torch.allclose(points[:kernel_size, 0], 36 + 48 * parts, atol=1e-4)
    assert torch.allclose(points[::kernel_size, 1], 24 + 32 * parts, atol=1e-4)


def test_share_inside():
    points = torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 3.0], [0.5, 4.0]])
    assert share_inside(points, torch.tensor([0.0, 0.0, 2.0, 2.0])) == 0.5


def test_points_of_a_model_with_analytic_offsets():
    model = mimicdet_model(**{"MODEL.MIMICDET.S_HEAD.ALIGN": "roiconv"}).eval()
    found = sampling_points(model, tiny_batch(1)[0], 7)
    assert len(found.boxes) == len(found.points) == len(found.scores) == 7
    assert (found.scores.diff() <= 0).all()
    for box, level, points in zip(found.boxes, found.levels, found.points):
        assert len(points) == (9 if level == 0 else 25)
        assert share_inside(points, box) == 1.0


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("sampling_points_tool", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_command(tool, tmp_path, capsys):
    """Two models, one of them trained without a T-head, side by side."""
    with registered_toy_dataset(tmp_path, 3) as name:
        overrides = {"DATASETS.TEST": (name,), "MODEL.MIMICDET.S_HEAD.ALIGN": "roiconv"}
        config = tmp_path / "config.yaml"
        config.write_text(mimicdet_cfg(**overrides).dump())
        model = mimicdet_model(**{"MODEL.MIMICDET.S_HEAD.ALIGN": "roiconv"})
        full = save_weights(model, tmp_path / "a.pth", CLASSES)
        model.t_head = None
        small = save_weights(model, tmp_path / "b.pth", CLASSES)
        output = tmp_path / "out"
        arguments = ["--config-file", str(config), "--output", str(output)]
        arguments += ["--num-images", "2", "--boxes", "3"]
        tool.main([*arguments, "--model", f"with={full}", "--model", f"without={small}"])
    text = capsys.readouterr().out
    assert "with: 100.0 % of the points lie inside of their box (6 boxes)" in text
    assert "without: 100.0 %" in text
    with open(output / "points.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12 and {row["model"] for row in rows} == {"with", "without"}
    pictures = sorted(output.glob("points_*.png"))
    assert [x.name for x in pictures] == ["points_00000.png", "points_00002.png"]
    assert Image.open(pictures[0]).size[0] > 300


def test_command_refuses_weights_of_another_model(tool, tmp_path):
    weights = save_weights(mimicdet_model(), tmp_path / "a.pth", CLASSES)
    cfg = mimicdet_cfg(**{"MODEL.MIMICDET.S_HEAD.KERNELS": [3, 7, 7, 7, 7]})
    with pytest.raises(ValueError, match="does not fit the model"):
        tool.load(cfg, weights)
