"""Detectors and images that graphs are tested with, and the comparison with the detector.

The detectors have random weights but rate like trained ones: few boxes have high scores, and an
image of one colour has none.
"""

from typing import Callable, List

import numpy as np
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from kd_d2.export.graph import Detections

__all__ = ["BATCHES", "THRESHOLDS", "assert_detects_the_same", "blank", "photograph", "sharpen"]

# Above what an image of one colour gets.
THRESHOLDS = {
    "MODEL.GFL.NORM": "",  # a group norm would make something of an image of one colour
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.5,
    "MODEL.FCOS.SCORE_THRESH_TEST": 0.3,
    "MODEL.GFL.SCORE_THRESH_TEST": 0.3,
    "MODEL.ATSS.SCORE_THRESH_TEST": 0.3,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.33,
}
_PHOTOGRAPHS = load_sample_images().images  # RGB, 427 x 640


def photograph(index: int, height: int, width: int, top: int = 50, left: int = 100) -> Tensor:
    """A part of one of scikit-learn's two photographs, (3, height, width) uint8 BGR."""
    part = _PHOTOGRAPHS[index][top : top + height, left : left + width, ::-1]
    return torch.as_tensor(np.ascontiguousarray(part.transpose(2, 0, 1)))


def blank(height: int, width: int) -> Tensor:
    """An image of the colour that the detectors subtract, (3, height, width) uint8."""
    return torch.tensor([104, 116, 124], dtype=torch.uint8)[:, None, None].repeat(1, height, width)


# Other sizes than that of the recording, odd ones, one smaller than the largest stride.
BATCHES = {
    "one": [photograph(0, 130, 171)],
    "three": [photograph(0, 200, 150), photograph(1, 200, 150), photograph(0, 200, 150, 200, 400)],
    "two, one without objects": [blank(64, 97), photograph(1, 64, 97)],
    "none": [blank(160, 96)],
}


@torch.no_grad()
def sharpen(model: nn.Module) -> nn.Module:
    """The detector in eval mode, with scores that are far apart and low for no object."""
    for name, module in model.named_modules():
        if "cls_score" in name.split("."):
            if module.bias.numel() == 4:  # a softmax, the last one is the background
                module.weight.mul_(3)
                module.bias[-1] = 0.0
            else:
                module.weight.mul_(1.5)
                module.bias.fill_(-2.0)
    return model.eval()


def assert_detects_the_same(
    run: Callable[[Tensor], Detections],
    model: nn.Module,
    images: List[Tensor],
    num_expected: range = range(0, 10**6),
) -> None:
    """Detections of every image are those that the model finds in it, in the same order."""
    found = Detections(*(torch.as_tensor(x) for x in run(torch.stack(images))))
    total = 0
    for index, image in enumerate(images):
        with torch.no_grad():
            expected = model([{"image": image}])[0]["instances"]
        count = int(found.num_detections[index])
        total += count
        assert count == len(expected)
        boxes, scores, classes = (x[index] for x in found[1:])
        assert torch.equal(classes[:count], expected.pred_classes)
        torch.testing.assert_close(scores[:count], expected.scores, atol=1e-4, rtol=0)
        torch.testing.assert_close(boxes[:count], expected.pred_boxes.tensor, atol=0.01, rtol=0)
        assert (boxes[count:] == 0).all() and (scores[count:] == 0).all()
        assert (classes[count:] == -1).all()
    assert total in num_expected
