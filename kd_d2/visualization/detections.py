"""Detections of several detectors side by side."""

from typing import List, Sequence, Tuple

from detectron2.structures import BoxMode, Instances

__all__ = ["draw_detections"]


def draw_detections(
    images: Sequence[dict],
    columns: Sequence[Tuple[str, List[Instances]]],
    path: str,
    score_threshold: float = 0.3,
    class_names: Sequence[str] = (),
    truth_last: bool = False,
) -> None:
    """Draw one row an image: ground truth, then each detector's boxes with class and score.

    Args:
        images: test records with ``image`` (C, H, W) RGB and ``annotations``.
        columns: (title, detections of every image) of each detector, boxes in the image's
            original pixels.
        path: PNG to write.
        score_threshold: detections below are not drawn.
        class_names: names by class index; empty: the index itself.
        truth_last: the ground truth is the last column instead of the first.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows, cols = len(images), len(columns) + 1
    figure, axes = plt.subplots(rows, cols, figsize=(2.6 * cols, 2.7 * rows), squeeze=False)
    first = 0 if truth_last else 1  # column of the first detector
    truth = cols - 1 if truth_last else 0
    for i, record in enumerate(images):
        picture = record["image"].permute(1, 2, 0).numpy()
        for axis in axes[i]:
            height, width = record["height"], record["width"]
            axis.imshow(picture, extent=(0, width, height, 0))
            axis.set_axis_off()
        for annotation in record.get("annotations", []):
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            _box(axes[i][truth], box, _name(annotation["category_id"], class_names), "lime")
        for axis, (_, outputs) in zip(axes[i][first:], columns):
            kept = outputs[i][outputs[i].scores >= score_threshold]
            for box, label, score in zip(
                kept.pred_boxes.tensor.tolist(), kept.pred_classes.tolist(), kept.scores.tolist()
            ):
                _box(axis, box, f"{_name(label, class_names)} {score:.2f}", "yellow")
    for axis, (title, _) in zip(axes[0][first:], columns):
        axis.set_title(title, fontsize=9)
    axes[0][truth].set_title("ground truth", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _name(label: int, class_names: Sequence[str]) -> str:
    return class_names[label] if class_names else str(label)


def _box(axis, box, text: str, colour: str) -> None:
    from matplotlib.patches import Rectangle

    x0, y0, x1, y1 = box
    axis.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color=colour, linewidth=1.2))
    axis.text(x0, y0 - 1, text, color=colour, fontsize=7, va="bottom", clip_on=True)
