"""Error types of a detector over a range of IoU thresholds."""

from dataclasses import asdict, dataclass
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
from pycocotools.coco import COCO

from .errors import ERROR_TYPES, fixed_ap, judge
from .inputs import read_detections, read_ground_truth
from .overlaps import find_overlaps

__all__ = ["BACKGROUND_IOU", "COCO_THRESHOLDS", "TideResult", "check_thresholds", "tide_errors"]

# as COCOeval computes them, so that a box exactly at a threshold is judged alike
COCO_THRESHOLDS = tuple(np.linspace(0.5, 0.95, 10).tolist())
BACKGROUND_IOU = 0.1


@dataclass(frozen=True)
class TideResult:
    """AP and what each type of error costs, as functions of the threshold.

    Attributes:
        thresholds: foreground IoUs.
        ap: AP at each single threshold, percent.
        errors: type -> AP points that mending all errors of this type alone would gain. They do
            not add up to 100 - AP: errors hide each other.
        counts: type -> number of errors.
    """

    thresholds: Tuple[float, ...]
    ap: Tuple[float, ...]
    errors: Dict[str, Tuple[float, ...]]
    counts: Dict[str, Tuple[int, ...]]

    def metrics(self) -> Dict[str, float]:
        """ "Cls": mean over the thresholds, "Cls-50": at IoU 0.5, and so on for all types."""
        result = {name: float(np.mean(values)) for name, values in self.errors.items()}
        for name, values in self.errors.items():
            for threshold, value in zip(self.thresholds, values):
                result[f"{name}-{100 * threshold:g}"] = value
        return result

    def rows(self) -> List[Dict[str, float]]:
        """A table with one row per threshold: threshold, AP, errors, and their numbers."""
        return [
            {
                "threshold": round(threshold, 6),
                "AP": self.ap[i],
                **{name: values[i] for name, values in self.errors.items()},
                **{f"number of {name}": values[i] for name, values in self.counts.items()},
            }
            for i, threshold in enumerate(self.thresholds)
        ]

    def as_dict(self) -> Dict[str, Any]:
        """What JSON can hold."""
        return asdict(self)


def check_thresholds(thresholds: Sequence[float], name: str = "thresholds") -> Tuple[float, ...]:
    """The thresholds, ascending and in the right range.

    Args:
        name: for the message.

    Raises:
        ValueError: there are none, they do not ascend or one is not between the background's IoU
            and 1, both excluded.
    """
    values = tuple(float(t) for t in thresholds)
    ascending = all(a < b for a, b in zip(values, values[1:]))
    if not values or not ascending or not all(BACKGROUND_IOU < t < 1 for t in values):
        raise ValueError(
            f"{name} must be ascending IoUs between {BACKGROUND_IOU} and 1, both excluded, got "
            f"{list(thresholds)}"
        )
    return values


def tide_errors(
    gt: Union[COCO, Mapping[str, Any]],
    predictions: Sequence[Mapping[str, Any]],
    thresholds: Sequence[float] = COCO_THRESHOLDS,
    *,
    image_ids: Optional[Iterable[Any]] = None,
    max_per_image: int = 100,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> TideResult:
    """AP and the cost of each type of error for predictions in COCO's format.

    Classification ("Cls"), localisation ("Loc"), both at once, duplicates, background and missed
    objects, as TIDE defines them (arXiv 2008.08115); IoU 0.1 separates background. Nothing but
    boxes is used. The result does not depend on the order of anything.

    Args:
        gt: data set: pycocotools' ``COCO`` or the dictionary of the JSON file.
        predictions: image_id, category_id, bbox (XYWH, pixels) and score each.
        thresholds: foreground IoUs, ascending.
        image_ids: images that count; default: all. Those without detections count, too.
        max_per_image: so many of the highest scores of an image are judged.
        progress: wraps the loop over the images, e.g. in a bar.

    Raises:
        ValueError: there are no predictions, or thresholds, ground truth or predictions are
            wrong; the message says where.
    """
    thresholds = check_thresholds(thresholds)
    truth = read_ground_truth(gt, image_ids)
    detections = read_detections(predictions, gt, truth, max_per_image)
    overlaps = find_overlaps(detections, truth, thresholds[0], progress)
    ap: List[float] = []
    errors: Dict[str, List[float]] = {name: [] for name in ERROR_TYPES}
    counts: Dict[str, List[int]] = {name: [] for name in ERROR_TYPES}
    for threshold in thresholds:
        judgement = judge(overlaps, len(truth.objects.image), threshold, BACKGROUND_IOU)
        ap.append(fixed_ap(judgement, detections, truth))
        for name in ERROR_TYPES:
            gain = fixed_ap(judgement, detections, truth, name) - ap[-1]
            errors[name].append(max(0.0, gain))
            counts[name].append(judgement.count(name))
    return TideResult(
        thresholds,
        tuple(ap),
        {name: tuple(values) for name, values in errors.items()},
        {name: tuple(values) for name, values in counts.items()},
    )
