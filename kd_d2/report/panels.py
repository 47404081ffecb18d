"""Pictures with boxes as SVG: one image is stored once and shown in every panel."""

from typing import List, Optional, Sequence

from kd_d2.visualization.html import Html, element

from .detections import Picture
from .matching import Box, match

__all__ = ["image_store", "run_panel", "truth_panel"]


def image_store(pictures: Sequence[Picture], prefix: str) -> Html:
    """The images; ``prefix`` keeps those of several data sets apart."""
    images = [
        element(
            "image",
            id=f"{prefix}{i}",
            href=picture.data,
            width=picture.width,
            height=picture.height,
            preserveAspectRatio="none",
        )
        for i, picture in enumerate(pictures)
    ]
    return element(
        "svg", element("defs", images), width=0, height=0, class_="store", aria_hidden="true"
    )


def truth_panel(picture: Picture, image: str, classes: Sequence[str]) -> Html:
    """The annotated boxes."""
    boxes = [
        _box(picture, box, _name(box.label, classes) + (" (crowd)" if box.crowd else ""), "truth")
        for box in picture.truth
    ]
    return _panel(picture, image, "ground truth", boxes, "ground truth")


def run_panel(
    picture: Picture,
    image: str,
    classes: Sequence[str],
    title: str,
    boxes: Sequence[Box],
    threshold: float,
) -> Html:
    """Detections, right and wrong ones, and the objects that none of them found.

    Args:
        threshold: score below which boxes are hidden, until the reader changes it.
    """
    found = match(boxes, picture.truth)
    parts: List[Html] = []
    for box, by in zip(picture.truth, found.by):
        if not box.crowd:
            hidden = by is not None and by >= threshold
            label = _name(box.label, classes)
            parts.append(_box(picture, box, label, "missed", hidden, data_found=_score(by)))
    for box, verdict in reversed(list(zip(boxes, found.right))):
        label = f"{_name(box.label, classes)} {box.score:.2f}"
        hidden = box.score < threshold
        parts.append(_box(picture, box, label, verdict, hidden, data_score=_score(box.score)))
    shown = [v for box, v in zip(boxes, found.right) if box.score >= threshold]
    real = [by for box, by in zip(picture.truth, found.by) if not box.crowd]
    missed = sum(by is None or by < threshold for by in real)
    counts = f"{shown.count('right')} right, {shown.count('wrong')} wrong, {missed} missed"
    caption = [element("span", title), " ", element("span", counts, class_="small counts")]
    return _panel(picture, image, title, parts, caption)


def _score(value: Optional[float]) -> Optional[str]:
    return None if value is None else f"{value:.4f}"


def _name(label: int, classes: Sequence[str]) -> str:
    return classes[label] if 0 <= label < len(classes) else str(label)


def _box(picture: Picture, box: Box, text: str, kind: str, hidden: bool = False, **data) -> Html:
    x0, y0, x1, y1 = box.xyxy
    size = max(picture.width, picture.height) / 26
    # above the box, or inside of it at the upper edge
    y = y0 - 0.25 * size if y0 > 1.2 * size else y0 + size
    return element(
        "g",
        element("title", text),
        element(
            "rect",
            x=f"{x0:.1f}",
            y=f"{y0:.1f}",
            width=f"{max(x1 - x0, 0):.1f}",
            height=f"{max(y1 - y0, 0):.1f}",
        ),
        element("text", text, x=f"{x0:.1f}", y=f"{y:.1f}", font_size=f"{size:.1f}"),
        class_=f"box {kind}" + (" off" if hidden else ""),
        **data,
    )


def _panel(picture: Picture, image: str, title: str, boxes: Sequence[Html], caption) -> Html:
    svg = element(
        "svg",
        element("title", f"{picture.record['file_name'].rsplit('/', 1)[-1]}: {title}"),
        element("use", href=f"#{image}"),
        boxes,
        viewBox=f"0 0 {picture.width} {picture.height}",
        role="img",
        class_="panel",
    )
    return element("figure", svg, element("figcaption", caption), class_="panel-figure")
