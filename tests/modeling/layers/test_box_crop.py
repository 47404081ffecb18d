"""The differentiable crop against RoIAlign, torch's affine_grid, pixels and finite differences."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import roi_align

from kd_d2.modeling.layers import crop_boxes


def noise(height, width, images=1, seed=0, std=50.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, 3, height, width, generator=generator) * std


def crop(image, box, size, image_size=None, **kwargs):
    return crop_boxes(image, [torch.tensor([box], **kwargs)], size, [image_size or image.shape[2:]])


def by_affine_grid(image, box, size):
    """Equation 8, as written, with a copy of the image for the box."""
    height, width = image.shape[1:]
    x1, y1, x2, y2 = box
    theta = [
        [(x2 - x1) / width, 0, (x1 + x2) / width - 1],
        [0, (y2 - y1) / height, (y1 + y2) / height - 1],
    ]
    grid = F.affine_grid(torch.tensor([theta]), [1, 3, size, size], align_corners=False)
    return F.grid_sample(image[None], grid, align_corners=False)


def test_a_box_of_the_size_of_the_crop_is_a_copy():
    image = noise(160, 200)
    found = crop(image, [10.0, 20.0, 122.0, 132.0], 112)
    torch.testing.assert_close(found, image[:, :, 20:132, 10:122], rtol=0, atol=3e-3)


def test_inside_it_is_roi_align():
    image = noise(157, 203, images=2)
    generator = torch.Generator().manual_seed(1)
    corners = torch.rand(2, 5, 2, generator=generator) * 60 + 5
    boxes = torch.cat([corners, corners + 8 + 60 * torch.rand(2, 5, 2, generator=generator)], 2)
    found = crop_boxes(image, list(boxes), 56, [(157, 203)] * 2)
    expected = roi_align(image, list(boxes), 56, 1.0, sampling_ratio=1, aligned=True)
    assert found.shape == (10, 3, 56, 56) and found.std() > 10
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)


def test_equation_8_across_the_border_and_sizes_that_are_no_squares():
    image = noise(61, 97)
    # the second touches the border: half of its last samples is the zeros outside
    for box in [[3.3, 7.7, 50.5, 20.25], [0.0, 0.0, 97.0, 61.0], [90.0, 1.5, 97.0, 60.0]]:
        expected = by_affine_grid(image[0], box, 28)
        torch.testing.assert_close(crop(image, box, 28), expected, rtol=0, atol=1.3e-2)
    # at a border it is not RoIAlign, which repeats the last pixel
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    ours = crop_boxes(image, [box], 112, [(61, 97)])
    theirs = roi_align(image, [box], 112, 1.0, sampling_ratio=1, aligned=True)
    assert (ours - theirs)[0, :, 0].abs().max() > 1
    torch.testing.assert_close(ours[0, :, 0, 50] * 2, theirs[0, :, 0, 50], rtol=0.15, atol=1)


def test_order_and_empty_images():
    image = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 2, 20, 24) + 1
    boxes = [torch.tensor([[2.0, 2, 9, 9], [3, 3, 12, 12]]), torch.zeros(0, 4), torch.ones(1, 4)]
    boxes[2] = torch.tensor([[5.0, 6.0, 17.0, 18.0]])
    found = crop_boxes(image, boxes, 4, [(20, 24)] * 3)
    assert found.shape == (3, 2, 4, 4)
    assert found.flatten(1).mean(1).tolist() == pytest.approx([1, 1, 3])
    ramp = torch.arange(24.0).expand(1, 1, 20, 24) + 0.5
    two = torch.tensor([[2.0, 2, 10, 10], [4, 2, 12, 18]])
    found = crop_boxes(ramp, [two], 4, [(20, 24)])
    # columns are x, rows are y; each box is its own
    expected = torch.tensor([[3.0, 5, 7, 9], [5, 7, 9, 11]])[:, None, None].expand(2, 1, 4, 4)
    torch.testing.assert_close(found, expected)


def test_no_boxes_at_all_stay_connected():
    empty = torch.zeros(0, 4, requires_grad=True)
    found = crop_boxes(noise(20, 20, images=2), [empty, empty], 8, [(20, 20), (16, 16)])
    assert found.shape == (0, 3, 8, 8) and found.requires_grad
    found.sum().backward()
    assert empty.grad.shape == (0, 4)


def test_boxes_end_with_the_image_not_with_the_padding():
    image = noise(64, 96)
    image[:, :, 40:] = 0
    image[:, :, :, 60:] = 0
    wide = torch.tensor([[20.0, 10.0, 90.0, 64.0]], requires_grad=True)
    found = crop_boxes(image, [wide], 32, [(40, 60)])
    torch.testing.assert_close(found, crop(image, [20.0, 10.0, 60.0, 40.0], 32))
    found.square().sum().backward()
    assert (wide.grad[0, :2].abs() > 0).all() and wide.grad[0, 2:].tolist() == [0, 0]


@pytest.mark.parametrize(
    "box",
    [[70.0, 16, 80, 48], [-30, 16, -10, 48], [10, -9, 20, -1], [10, 70, 20, 90], [70, 70, 90, 90]],
)
def test_a_box_outside_is_finite_and_without_gradient(box):
    outside = torch.tensor([box], dtype=torch.float32, requires_grad=True)
    found = crop_boxes(noise(64, 64), [outside], 16, [(64, 64)])
    assert torch.isfinite(found).all()
    found.square().sum().backward()
    beyond = (outside < 0) | (outside > 64)
    assert beyond.any() and outside.grad[beyond].abs().max() == 0
    degenerate = crop_boxes(noise(64, 64), [torch.tensor([[5.0, 5, 5, 5]])], 4, [(64, 64)])
    assert torch.isfinite(degenerate).all() and degenerate.flatten(2).std(2).max() < 1e-4


def test_gradient_is_that_of_finite_differences():
    image = noise(41, 53, std=1.0).double()
    box = torch.tensor([[7.31, 5.17, 40.43, 33.71], [1.2, 2.3, 9.4, 30.9]], dtype=torch.float64)

    def value(boxes):
        weights = torch.linspace(-1, 1, 2 * 3 * 9 * 9, dtype=torch.float64).view(2, 3, 9, 9)
        return (crop_boxes(image, [boxes], 9, [(41, 53)]) * weights).sum()

    assert torch.autograd.gradcheck(value, (box.requires_grad_(),), eps=1e-7, atol=1e-5)


def test_half_precision_and_autocast_change_nothing():
    image, box = noise(64, 1333), [1200.3, 10.1, 1329.7, 50.2]
    plain = crop(image, box, 28)
    with torch.autocast("cpu", torch.bfloat16):
        inside = crop(image, box, 28)
    assert inside.dtype == torch.float32 and torch.equal(inside, plain)
    assert crop(image.bfloat16(), box, 28).dtype == torch.float32
    assert crop(image.double(), box, 28, dtype=torch.float64).dtype == torch.float64


def test_as_many_images_as_lists_of_boxes():
    with pytest.raises(ValueError):
        crop_boxes(noise(8, 8, images=2), [torch.zeros(1, 4)], 4, [(8, 8)])
