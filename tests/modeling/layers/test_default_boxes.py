"""Default boxes against the specification's numbers and torchvision's generator."""

import math

import pytest
import torch
from detectron2.structures import Boxes
from torchvision.models.detection.anchor_utils import DefaultBoxGenerator as TorchvisionBoxes
from torchvision.models.detection.image_list import ImageList

from kd_d2.modeling.layers import DefaultBoxGenerator

SSD300 = {
    "sizes": (21, 45, 99, 153, 207, 261, 315),
    "aspect_ratios": ((2,), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    "strides": (8, 16, 32, 64, 100, 300),
}
SSD512 = {
    "sizes": (20, 51, 133, 215, 296, 378, 460, 542),
    "aspect_ratios": ((2,), (2, 3), (2, 3), (2, 3), (2, 3), (2,), (2,)),
    "strides": (8, 16, 32, 64, 128, 256, 512),
}
SIDES = {300: (38, 19, 10, 5, 3, 1), 512: (64, 32, 16, 8, 4, 2, 1)}


def _boxes(arguments, sides):
    generator = DefaultBoxGenerator(**arguments)
    return Boxes.cat(generator([torch.zeros(1, 1, side, side) for side in sides])).tensor


@pytest.mark.parametrize(
    "size, arguments, count", [(300, SSD300, 8732), (512, SSD512, 24564)], ids=["300", "512"]
)
def test_all_boxes_equal_torchvision(size, arguments, count):
    ours = _boxes(arguments, SIDES[size])
    assert len(ours) == count
    generator = TorchvisionBoxes(
        [list(level) for level in arguments["aspect_ratios"]],
        scales=[side / size for side in arguments["sizes"]],
        steps=list(arguments["strides"]),
        clip=False,
    )
    images = ImageList(torch.zeros(1, 3, size, size), [(size, size)])
    (theirs,) = generator(images, [torch.zeros(1, 1, side, side) for side in SIDES[size]])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=6.2e-5)


def test_first_and_last_boxes():
    boxes = _boxes(SSD300, SIDES[300])
    expected = [
        [-6.5, -6.5, 14.5, 14.5],
        [-11.3704, -11.3704, 19.3704, 19.3704],
        [-10.8492, -3.4246, 18.8492, 11.4246],
        [-3.4246, -10.8492, 11.4246, 18.8492],
        [57.7226, -34.5549, 242.2774, 334.5549],
    ]
    torch.testing.assert_close(boxes[[0, 1, 2, 3, -1]], torch.tensor(expected), rtol=0, atol=1e-4)


def test_order_is_that_of_the_predictions():
    """Rows of a level: image row, image column, box of the cell."""
    generator = DefaultBoxGenerator(sizes=(10, 40), aspect_ratios=((2, 3),), strides=(8,))
    assert generator.num_anchors == [6]
    (boxes,) = generator([torch.zeros(1, 1, 2, 3)])
    assert boxes.tensor.shape == (2 * 3 * 6, 4)
    centres, sides = boxes.get_centers(), boxes.tensor[:, 2:] - boxes.tensor[:, :2]
    for row in range(2):
        for column in range(3):
            for box in range(6):
                index = (row * 3 + column) * 6 + box
                assert centres[index].tolist() == pytest.approx(
                    [(column + 0.5) * 8, (row + 0.5) * 8], abs=1e-5
                )
                width, height = [
                    (10, 10),
                    (20, 20),
                    (10 * math.sqrt(2), 10 / math.sqrt(2)),
                    (10 / math.sqrt(2), 10 * math.sqrt(2)),
                    (10 * math.sqrt(3), 10 / math.sqrt(3)),
                    (10 / math.sqrt(3), 10 * math.sqrt(3)),
                ][box]
                assert sides[index].tolist() == pytest.approx([width, height], abs=1e-4)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"sizes": (10, 20)}, "STRIDES has 2 levels, so SIZES needs 3 entries"),
        ({"aspect_ratios": ((2,),)}, "ASPECT_RATIOS 2; they have 3 and 1"),
        ({"sizes": (10, 30, 20)}, r"increase, got \[10, 30, 20\]"),
        ({"sizes": (0, 30, 40)}, "must be positive"),
        ({"aspect_ratios": ((2,), (0.5,))}, r"above 1 .* got \[\[2\], \[0.5\]\]"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    arguments = {"sizes": (10, 20, 40), "aspect_ratios": ((2,), (2,)), "strides": (8, 16)}
    with pytest.raises(ValueError, match=message):
        DefaultBoxGenerator(**{**arguments, **change})
