import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

from kd_d2.visualization import draw_curves, draw_detections, html_page, markdown_table
from kd_d2.visualization.curves import detection_loss, read_metrics


def write_metrics(path, records, tail=""):
    path.write_text("".join(json.dumps(r) + "\n" for r in records) + tail)
    return str(path)


class TestMetrics:
    def test_a_resumed_run_counts_its_later_entries(self, tmp_path):
        records = [
            {"iteration": 19, "loss_a": 3.0},
            {"iteration": 39, "loss_a": 2.0},
            {"iteration": 39, "loss_a": 2.5, "bbox/AP": 7.0},
        ]
        series = read_metrics(write_metrics(tmp_path / "m.json", records, tail='{"iteration": 5'))
        assert series == {"loss_a": [(19, 3.0), (39, 2.5)], "bbox/AP": [(39, 7.0)]}

    def test_detection_loss_leaves_distillation_out(self, tmp_path):
        records = [
            {"iteration": 19, "loss_a": 3.0, "loss_b": 1.0, "loss_kd/x/y": 100.0, "lr": 0.1},
        ]
        series = read_metrics(write_metrics(tmp_path / "m.json", records))
        assert detection_loss(series) == [(19, 4.0)]

    def test_curves_are_drawn(self, tmp_path):
        records = [{"iteration": i, "loss_a": 1.0 / (i + 1)} for i in range(5)]
        path = tmp_path / "curves.png"
        draw_curves([("run", write_metrics(tmp_path / "m.json", records))], str(path))
        # three panels side by side, and something is drawn
        image = Image.open(path).convert("L")
        assert image.width > 2 * image.height and len(image.getcolors(maxcolors=256)) > 2


class TestTable:
    def test_numbers_are_right_aligned(self):
        text = markdown_table(["name", "AP"], [["a", "1.50"], ["longer", "12.25"]])
        assert text.splitlines() == [
            "| name   |    AP |",
            "| ------ | ----: |",
            "| a      |  1.50 |",
            "| longer | 12.25 |",
        ]

    def test_page_escapes_text_and_shows_everything(self):
        table = markdown_table(["name", "AP"], [["<b>", "1.50"]])
        page = html_page("t", "5 < 6", table, ["x.png"])
        assert "&lt;b&gt;" in page and "<td>1.50</td>" in page and "5 &lt; 6" in page
        assert '<img src="x.png"' in page and "----" not in page


@pytest.mark.parametrize("score,drawn", [(0.9, True), (0.1, False)])
def test_detections_above_the_threshold_are_drawn(tmp_path, score, drawn):
    found = Instances((40, 60))
    found.pred_boxes = Boxes(torch.tensor([[5.0, 5.0, 55.0, 35.0]]))
    found.scores = torch.tensor([score])
    found.pred_classes = torch.tensor([1])
    record = {
        "image": torch.zeros((3, 40, 60), dtype=torch.uint8),
        "height": 40,
        "width": 60,
        "annotations": [
            {"bbox": [10, 10, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        ],
    }
    path = tmp_path / "detections.png"
    draw_detections([record], [("model", [found])], str(path))
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3).tolist()
    assert any(p == [0, 255, 0] for p in pixels)  # the ground truth is lime
    assert any(p == [255, 255, 0] for p in pixels) == drawn  # detections are yellow


@pytest.mark.parametrize("truth_last", [False, True])
def test_side_of_the_ground_truth(tmp_path, truth_last):
    found = Instances((40, 60))
    found.pred_boxes = Boxes(torch.tensor([[5.0, 5.0, 55.0, 35.0]]))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([1])
    annotation = {"bbox": [10, 10, 20, 20], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    record = {
        "image": torch.zeros((3, 40, 60), dtype=torch.uint8),
        "height": 40,
        "width": 60,
        "annotations": [annotation],
    }
    path = tmp_path / "detections.png"
    columns = [("a", [found]), ("b", [found])]
    draw_detections([record], columns, str(path), truth_last=truth_last)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    lime, yellow = (
        np.nonzero((pixels == colour).all(axis=2))[1] for colour in ([0, 255, 0], [255, 255, 0])
    )
    assert len(lime) and len(yellow)
    assert (lime.min() > yellow.max()) if truth_last else (lime.max() < yellow.min())
