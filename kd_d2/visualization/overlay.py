"""Detections drawn onto an image of its own size, for pictures and frames of videos."""

from typing import Sequence, Tuple

import numpy as np
from detectron2.structures import Instances
from detectron2.utils.colormap import colormap

__all__ = ["draw_overlay", "overlay_size", "side_by_side"]


def overlay_size(height: int, width: int, max_size: int = 0, min_size: int = 0) -> Tuple[int, int]:
    """Height and width of a picture whose longer side lies between the two; 0: no limit."""
    factor = _factor(height, width, max_size, min_size)
    return max(1, int(height * factor)), max(1, int(width * factor))


def _factor(height: int, width: int, max_size: int, min_size: int) -> float:
    longer = max(height, width)
    return min(max(longer, min_size), max_size or float("inf")) / longer


def draw_overlay(
    image: np.ndarray,
    detections: Instances,
    class_names: Sequence[str] = (),
    score_threshold: float = 0.5,
    title: str = "",
    max_size: int = 0,
    min_size: int = 0,
) -> np.ndarray:
    """Return the image with boxes, classes and scores; a class has one colour in all images.

    Drawn by Detectron2's Visualizer, which needs opencv.

    Args:
        image: (H, W, 3) uint8 RGB; not changed.
        detections: on the CPU, boxes in pixels of the image.
        class_names: names by class index; empty: the index itself.
        score_threshold: detections below are not drawn.
        title: text in the upper left corner.
        max_size: longer side of the result in pixels, if the image is larger; 0: no limit.
        min_size: longer side of the result, if the image is smaller: labels keep their size.

    Returns:
        (H', W', 3) uint8 RGB of :func:`overlay_size`.
    """
    from detectron2.utils.visualizer import Visualizer

    height, width = image.shape[:2]
    size = overlay_size(height, width, max_size, min_size)
    kept = detections[detections.scores >= score_threshold]
    classes = kept.pred_classes.tolist()
    colours = colormap(rgb=True, maximum=1)
    visualizer = Visualizer(image, scale=_factor(height, width, max_size, min_size))
    visualizer.overlay_instances(
        boxes=kept.pred_boxes.tensor.numpy(),
        labels=[
            f"{class_names[label] if class_names else label} {score:.2f}"
            for label, score in zip(classes, kept.scores.tolist())
        ],
        assigned_colors=[colours[label % len(colours)] for label in classes],
    )
    if title:
        visualizer.draw_text(title, (2, 2), color="w", horizontal_alignment="left")
    return _fitted(visualizer.get_output().get_image(), size)


def _fitted(picture: np.ndarray, size: Tuple[int, int]) -> np.ndarray:
    """Without the row or column that rounding may have added, or with the last one twice."""
    picture = picture[: size[0], : size[1], :3]
    missing = [(0, wanted - found) for wanted, found in zip(size, picture.shape)]
    return np.pad(picture, [*missing, (0, 0)], mode="edge")


def side_by_side(pictures: Sequence[np.ndarray], gap: int = 4) -> np.ndarray:
    """Return pictures of equal size, (H, W, 3) each, beside each other with white between."""
    separator = np.full((len(pictures[0]), gap, 3), 255, dtype=np.uint8)
    parts = [part for picture in pictures for part in (separator, picture)]
    return np.concatenate(parts[1:], axis=1)
