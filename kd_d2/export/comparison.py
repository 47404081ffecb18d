"""Whether a graph in another runtime detects what the model detects."""

from dataclasses import dataclass, field
from typing import Callable, Iterable, List, NamedTuple, Sequence, Tuple

import torch
from detectron2.structures import Instances
from torch import Tensor, nn

from .graph import Detections

__all__ = ["Comparison", "Tolerance", "compare_detections", "compare_with_model"]


class Tolerance(NamedTuple):
    """How far detections may differ."""

    box: float = 0.1
    """pixels, of any of the four coordinates"""
    score: float = 1e-4


@dataclass
class Comparison:
    """What was compared and how large the differences were.

    Attributes:
        num_batches: batches that both ran on.
        num_detections: detections of the model in all of them.
        box_difference: largest of any coordinate of a pair, in pixels.
        score_difference: largest of a pair.
        failures: one sentence for each image where the difference is above the tolerance, or the
            number of detections or a class is another.
    """

    num_batches: int = 0
    num_detections: int = 0
    box_difference: float = 0.0
    score_difference: float = 0.0
    failures: List[str] = field(default_factory=list)

    def describe(self) -> str:
        """One line."""
        return (
            f"{self.num_detections} detections in {self.num_batches} batches, largest difference "
            f"{self.box_difference:.2g} px of boxes and {self.score_difference:.2g} of scores"
        )


def compare_detections(
    expected: Instances, found: Detections, index: int, tolerance: Tolerance
) -> Tuple[float, float, str]:
    """Compare the detections of one image.

    Each expected detection is paired with that one of its class that differs least in units of the
    tolerance, best scores first, so that the order of equal scores does not matter. A full list may
    end differently: up to a tenth of it may have no partner, if their scores are within the
    tolerance of the worst one.

    Args:
        expected: ``pred_boxes``, ``scores`` and ``pred_classes``, best first.
        found: of a batch.
        index: of the image in the batch.
        tolerance: largest differences.

    Returns:
        largest differences of boxes and of scores among the pairs, and what is wrong, "" if
        nothing is.
    """
    count, room = int(found.num_detections[index]), found.scores.shape[1]
    boxes, scores, classes = (x[index, :count] for x in found[1:])
    if len(expected) != count:
        return 0.0, 0.0, f"{count} detections instead of {len(expected)}"
    if count == 0:
        return 0.0, 0.0, ""
    unpaired, worst = 0, 0.0
    if count == room:
        unpaired = room // 10
        worst = max(expected.scores[-1].item(), scores[-1].item()) + tolerance.score
    left = torch.ones(count, dtype=torch.bool)
    pairs = [torch.zeros(2)]
    for box, score, label in zip(
        expected.pred_boxes.tensor, expected.scores, expected.pred_classes
    ):
        differences = torch.stack(((boxes - box).abs().amax(dim=1), (scores - score).abs()), dim=1)
        costs = (differences / torch.tensor(tolerance)).amax(dim=1)
        costs[~left | (classes != label)] = float("inf")
        best = int(costs.argmin())
        if not costs[best] <= 1 and unpaired > 0 and score <= worst:
            unpaired -= 1
            continue
        if costs[best] == float("inf"):
            return (*_largest(pairs), f"no detection of class {int(label)} is left")
        left[best] = False
        pairs.append(differences[best])
    box_difference, score_difference = _largest(pairs)
    wrong = ""
    # Written so that NaN is wrong.
    if not (box_difference <= tolerance.box and score_difference <= tolerance.score):
        wrong = (
            f"boxes differ by {box_difference:.3g} px (allowed: {tolerance.box:g}), scores by "
            f"{score_difference:.3g} (allowed: {tolerance.score:g})"
        )
    return box_difference, score_difference, wrong


def _largest(pairs: List[Tensor]) -> Tuple[float, float]:
    box, score = torch.stack(pairs).amax(dim=0).tolist()  # NaN if there is one
    return box, score


def compare_with_model(
    run: Callable[[Tensor], Detections],
    model: nn.Module,
    images: Sequence[Tensor],
    tolerance: Tolerance = Tolerance(),
) -> Comparison:
    """Run both on each image alone and on a batch of another size.

    The batch has a part of the first image and its mirror image, so that a graph that only fits the
    size or the number of images it was made with is noticed.

    Args:
        run: the graph in its runtime, takes (N, 3, H, W) uint8.
        model: the detector in eval mode.
        images: (3, H, W) uint8 in ``INPUT.FORMAT``, at least one.
        tolerance: largest differences.
    """
    result = Comparison()
    for name, batch in _batches(images):
        result.num_batches += 1
        try:
            found = run(torch.stack(batch))
        except RuntimeError as error:
            result.failures.append(f"{name}: the graph does not run: {error}")
            continue
        for index, image in enumerate(batch):
            with torch.no_grad():
                expected = model([{"image": image}])[0]["instances"].to("cpu")
            box, score, wrong = compare_detections(expected, found, index, tolerance)
            result.num_detections += len(expected)
            result.box_difference = max(result.box_difference, box)
            result.score_difference = max(result.score_difference, score)
            if wrong:
                result.failures.append(f"{name}, image {index + 1} of {len(batch)}: {wrong}")
    return result


def _batches(images: Sequence[Tensor]) -> Iterable[Tuple[str, List[Tensor]]]:
    for number, image in enumerate(images, start=1):
        yield f"image {number} ({_size(image)})", [image]
    height, width = images[0].shape[-2:]
    part = images[0][:, : max(height * 3 // 4, 1), : max(width * 2 // 3, 1)]
    yield f"batch of a part of image 1 ({_size(part)})", [part, part.flip(-1)]


def _size(image: Tensor) -> str:
    return f"{image.shape[-2]}x{image.shape[-1]} px"
