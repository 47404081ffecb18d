"""KDloc: the specification's numbers, a naive loop, finite differences, boxes that find objects."""

import pytest
import torch
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, pairwise_iou
from torch.nn import functional as F

from kd_d2.modeling.layers import crop_boxes
from kd_d2.projects.dicod import kd_loc
from kd_d2.projects.dicod.kd_loc import localisation_loss, target_views
from tests.projects.dicod.crop_cases import small_classifier


def no_features(crops, layers):
    raise AssertionError("no layer is compared")


def losses_of(images, boxes, gt_boxes, index=None, *, size=32, pools=None, **changes):
    """Losses with ground truth given as lists per image; targets are made as the distiller does."""
    pools = {"obj": 4} if pools is None else pools
    image_sizes = changes.pop("image_sizes", None) or [tuple(images.shape[2:])] * len(images)
    features = changes.pop("features", no_features)
    crops = crop_boxes(images, gt_boxes, size, image_sizes)
    chunk = changes.get("chunk", 256)
    targets = target_views(crops, pools, chunk, features) if len(crops) else {}
    if index is None:
        index = torch.arange(sum(map(len, boxes)))
    arguments = {"pools": pools, "size": size, "chunk": 256, "features": features, **changes}
    return localisation_loss(images, boxes, image_sizes, targets, index, **arguments)


# ------------------------------------------------------------------------------------- a ramp
def ramp(width=64, dtype=torch.float32):
    """I(x, y) = x."""
    return (torch.arange(width, dtype=dtype) + 0.5).expand(1, 3, 64, width)


def on_the_ramp(box, gt=(16.0, 16, 48, 48), **changes):
    predicted = torch.tensor([box], dtype=torch.float32, requires_grad=True)
    loss = losses_of(ramp(), [predicted], [torch.tensor([gt])], **changes)["obj"]
    (gradient,) = torch.autograd.grad(loss, predicted)
    return loss.item(), gradient[0].tolist()


RAMP = [
    ((20, 16, 52, 48), 4.0, [0.5, 0, 0.5, 0]),
    ((16, 16, 52, 48), 2.0, [0.5, 0, 0.5, 0]),
    ((14, 16, 50, 48), 1.0, [-0.25, 0, 0.25, 0]),
    ((20, 12, 60, 40), 8.0, [0.5, 0, 0.5, 0]),
    ((16, 20, 48, 52), 0.0, [0, 0, 0, 0]),
]


@pytest.mark.parametrize("box, loss, gradient", RAMP)
def test_values_and_gradients_on_a_ramp(box, loss, gradient):
    found = on_the_ramp(box)
    assert found[0] == pytest.approx(loss, abs=1e-4)
    assert found[1] == pytest.approx(gradient, abs=1e-4)


@pytest.mark.parametrize("size", [14, 28, 56, 112])
@pytest.mark.parametrize("pool", [4, 8])
def test_the_value_depends_on_neither_size_nor_pool(size, pool):
    found, gradient = on_the_ramp((20, 16, 52, 48), size=size, pools={"obj": pool})
    assert found == pytest.approx(4.0, abs=1e-4)
    assert gradient == pytest.approx([0.5, 0, 0.5, 0], abs=1e-4)


def test_mean_over_the_boxes():
    boxes = torch.tensor([[20.0, 16, 52, 48], [16, 16, 48, 48]])
    gt = torch.tensor([[16.0, 16, 48, 48]])
    found = losses_of(ramp(), [boxes], [gt], torch.tensor([0, 0]))
    assert found["obj"].item() == pytest.approx(2.0, abs=1e-4)
    # of the whole batch, not of each image
    images = ramp().repeat(2, 1, 1, 1)
    three = [boxes, boxes[:1]]
    found = losses_of(images, three, [gt, gt], torch.tensor([0, 0, 1]))
    assert found["obj"].item() == pytest.approx(8 / 3, abs=1e-4)


def test_clamped_sides():
    assert on_the_ramp((40, 16, 80, 48), (40.0, 16, 64, 48)) == (0, [0, 0, 0, 0])
    loss, gradient = on_the_ramp((70, 16, 80, 48))
    # a line on the border, half of which is the zeros outside: 32 against cells of 20 to 44
    assert loss == pytest.approx(8.0, abs=1e-3) and gradient == [0, 0, 0, 0]
    # with the image's own width, not the tensor's
    image_sizes = [(64, 50)]
    found = on_the_ramp((30, 16, 90, 48), (30.0, 16, 50, 48), image_sizes=image_sizes)
    assert found == (0, [0, 0, 0, 0])


# ------------------------------------------------------------------------------------- features
@pytest.fixture(scope="module")
def stem():
    torch.manual_seed(0)
    model = small_classifier(arch="resnet50").eval().requires_grad_(False)
    return model


def smooth(height, width, images=1, seed=0):
    """Noise whose waves are a few pixels long, std about 50."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(images, 3, height // 8, width // 8, generator=generator) * 80
    return F.interpolate(coarse, (height, width), mode="bilinear", align_corners=False)


def naive(images, boxes, gt_boxes, index, size, pools, model):
    """Equations 8, 10 and 11, box by box, with torch's affine_grid."""

    def crop(image, box):
        height, width = image.shape[1:]
        x1, y1, x2, y2 = box
        zero = torch.zeros_like(x1)
        theta = torch.stack(
            [(x2 - x1) / width, zero, (x1 + x2) / width - 1]
            + [zero, (y2 - y1) / height, (y1 + y2) / height - 1]
        )
        grid = F.affine_grid(theta.view(1, 2, 3), [1, 3, size, size], align_corners=False)
        return F.grid_sample(image[None], grid, align_corners=False)

    def views(crop):
        stem = model.maxpool(model.relu(model.bn1(model.conv1(crop))))
        return {"obj": crop, "stem": stem, "layer1": model.layer1(stem)}

    targets = [
        views(crop(image, box)) for image, gt in zip(images, gt_boxes, strict=True) for box in gt
    ]
    sums, k = dict.fromkeys(pools, 0.0), 0
    for image, predicted in zip(images, boxes, strict=True):
        for box in predicted:
            ours, theirs = views(crop(image, box)), targets[index[k]]
            for view, pool in pools.items():
                a, b = (F.adaptive_avg_pool2d(x[view], pool) for x in (ours, theirs))
                sums[view] = sums[view] + F.l1_loss(a, b)
            k += 1
    return {view: value / k for view, value in sums.items()}


SCENE = {
    # three images, one without positives, one box across the border
    "boxes": [
        torch.tensor([[10.3, 8.2, 50.9, 70.1], [30.0, 20.5, 88.0, 60.0], [2.0, 3.0, 40.0, 90.0]]),
        torch.zeros(0, 4),
        torch.tensor([[5.5, 60.0, 70.2, 88.8]]),
    ],
    "gt_boxes": [
        torch.tensor([[12.0, 10.0, 55.0, 66.0], [28.0, 24.0, 80.0, 64.0]]),
        torch.tensor([[1.0, 1.0, 20.0, 20.0]]),
        torch.tensor([[3.0, 55.0, 60.0, 90.0]]),
    ],
    "index": torch.tensor([0, 1, 0, 3]),
}
POOLS = {"obj": 4, "stem": 8, "layer1": 4}


@pytest.mark.parametrize("chunk", [256, 4, 3, 1])
def test_a_naive_loop(stem, chunk):
    images = smooth(96, 96, 3)
    boxes = [b.clone().requires_grad_() for b in SCENE["boxes"]]
    gt_boxes, index = SCENE["gt_boxes"], SCENE["index"]
    expected = naive(images, boxes, gt_boxes, index, 56, POOLS, stem)
    weights = {"obj": 0.15, "stem": 0.5, "layer1": 1.5}
    theirs = torch.autograd.grad(sum(weights[v] * expected[v] for v in POOLS), boxes[::2])
    found = losses_of(
        images, boxes, gt_boxes, index, size=56, pools=POOLS, chunk=chunk, features=stem.features
    )
    ours = torch.autograd.grad(sum(weights[v] * found[v] for v in POOLS), boxes[::2])
    assert list(found) == list(POOLS) and expected["obj"] > 5 and expected["stem"] > 0.1
    for view in POOLS:
        torch.testing.assert_close(found[view], expected[view], rtol=1e-4, atol=1e-5, msg=view)
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().min() > 0
        torch.testing.assert_close(a, b, rtol=5e-3, atol=2e-4)


def test_the_whole_loss_as_published(stem):
    """SSD300's setting: 0.15, pixels and stem, cells of 4 and 8, crops of 112; the loop in double.

    The specification's figures of this comparison, 0.772826 against 0.772827 and box gradients that
    agree to 2.1e-5 where the largest is 8.7e-3, are of images that are not recorded.
    """
    exact = small_classifier(arch="resnet50").double().eval()
    exact.load_state_dict(stem.state_dict())
    images, pools = smooth(96, 96, 3), {"obj": 4, "stem": 8}
    gt_boxes, index = SCENE["gt_boxes"], SCENE["index"]
    boxes = [b.clone().requires_grad_() for b in SCENE["boxes"]]
    found = losses_of(images, boxes, gt_boxes, index, size=112, pools=pools, features=stem.features)
    ours = 0.15 * sum(found.values())
    doubles = [b.double().detach().requires_grad_() for b in boxes]
    expected = naive(
        *(images.double(), doubles, [b.double() for b in gt_boxes], index, 112, pools, exact)
    )
    theirs = 0.15 * sum(expected.values())
    assert expected["obj"] > 5 and expected["stem"] > 0.1
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-6)
    ours = torch.cat(torch.autograd.grad(ours, boxes[::2])).double()
    theirs = torch.cat(torch.autograd.grad(theirs, doubles[::2]))
    assert theirs.abs().min() > 0
    assert (ours - theirs).abs().max() < 2.4e-3 * theirs.abs().max()


def test_chunks_are_recomputed_one_by_one(stem):
    images, calls = smooth(96, 96, 3), []

    def features(crops, layers):
        calls.append(len(crops))
        return stem.features(crops, layers)

    boxes = [b.clone().requires_grad_() for b in SCENE["boxes"]]
    case = (images, boxes, SCENE["gt_boxes"], SCENE["index"])
    found = losses_of(*case, size=32, pools={"stem": 2}, chunk=3, features=features)
    # targets first, then boxes
    assert calls == [3, 1, 3, 1]
    found["stem"].backward()
    assert sorted(calls[4:]) == [1, 3]
    del calls[:]
    losses_of(*case, size=32, pools={"stem": 2}, features=features)["stem"].backward()
    assert calls == [4, 4]


def test_equal_boxes_are_exactly_0(stem):
    images, gt = smooth(96, 96), torch.tensor([[12.3, 10.1, 55.7, 66.2], [28.0, 24.0, 80.0, 64.0]])
    for chunk in (256, 1):
        predicted = gt.clone().requires_grad_()
        found = losses_of(
            images, [predicted], [gt], size=56, pools=POOLS, chunk=chunk, features=stem.features
        )
        if chunk == 256:
            assert all(value.item() == 0 for value in found.values())
        assert all(value.item() == pytest.approx(0, abs=1e-4) for value in found.values())
        sum(found.values()).backward()
        assert torch.isfinite(predicted.grad).all()


def test_gradient_is_that_of_finite_differences(stem):
    model = small_classifier(arch="resnet50").double().eval().requires_grad_(False)
    model.load_state_dict(stem.state_dict())
    images = smooth(96, 96, 3).double()
    sizes = [len(b) for b in SCENE["boxes"]]
    gt_boxes = [b.double() for b in SCENE["gt_boxes"]]

    def value(boxes):
        found = losses_of(
            images,
            list(boxes.split(sizes)),
            gt_boxes,
            SCENE["index"],
            pools={"obj": 4, "stem": 8},
            features=model.features,
        )
        return found["obj"] + 10 * found["stem"]

    boxes = torch.cat(SCENE["boxes"]).double().requires_grad_()
    (gradient,) = torch.autograd.grad(value(boxes), boxes)
    assert gradient.abs().min() > 1e-3
    # every coordinate of the first box, and a direction in which all move
    directions = [*torch.eye(boxes.numel(), dtype=torch.float64)[:4], torch.linspace(-1, 1, 16)]
    for direction in directions:
        step = 1e-6 * direction.double().view_as(boxes)
        with torch.no_grad():
            numeric = (value(boxes + step) - value(boxes - step)) / 2e-6
        expected = (gradient * step).sum().item() / 1e-6
        assert expected == pytest.approx(numeric.item(), rel=1e-4, abs=1e-6)


def test_no_boxes():
    boxes = [torch.zeros(0, 4, requires_grad=True) for _ in range(2)]
    found = losses_of(smooth(32, 32, 2), boxes, [torch.zeros(0, 4)] * 2, size=8, pools={"obj": 2})[
        "obj"
    ]
    assert found.item() == 0 and found.requires_grad
    found.backward()
    assert all(b.grad is not None for b in boxes)


def test_autocast_changes_nothing(stem):
    images = smooth(96, 96, 3)
    case = (images, SCENE["boxes"], SCENE["gt_boxes"], SCENE["index"])

    def features(crops, layers):
        assert not torch.is_autocast_enabled("cpu") and crops.dtype == torch.float32
        return stem.features(crops, layers)

    options = {"size": 32, "pools": {"obj": 4, "stem": 4}, "features": features}
    exact = losses_of(*case, **options)
    crops = crop_boxes(images, SCENE["gt_boxes"], 32, [(96, 96)] * 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        targets = target_views(crops, options["pools"], 256, features)
    for chunk in (256, 2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = localisation_loss(
                *(images, SCENE["boxes"], [(96, 96)] * 3, targets, SCENE["index"]),
                chunk=chunk,
                **options,
            )
        for view, value in found.items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, exact[view], rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- boxes that find objects
def blob():
    """One object: a Gaussian, with colours that say where one is."""
    y, x = torch.meshgrid(*[torch.arange(128) + 0.5] * 2, indexing="ij")
    b = torch.exp(-((x - 64) ** 2) / (2 * 24**2) - (y - 64) ** 2 / (2 * 28**2))
    return torch.stack([100 * b, 60 * b + 0.2 * x, -80 * b + 0.2 * y])[None]


OBJECT = torch.tensor([[40.0, 36.0, 88.0, 92.0]])


def descend(parameters, decode, lr, steps, pools, features):
    optimizer = torch.optim.Adam([parameters], lr=lr)
    image = blob()
    crops = crop_boxes(image, [OBJECT], 28, [(128, 128)])
    targets = target_views(crops, pools, 256, features)
    before = pairwise_iou(Boxes(decode(parameters).detach()), Boxes(OBJECT)).item()
    for _ in range(steps):
        losses = localisation_loss(
            *(image, [decode(parameters)], [(128, 128)], targets, torch.tensor([0])),
            **{"pools": pools, "size": 28, "chunk": 256, "features": features},
        )
        optimizer.zero_grad()
        (0.15 * sum(losses.values())).backward()
        optimizer.step()
    return before, pairwise_iou(Boxes(decode(parameters).detach()), Boxes(OBJECT)).item()


@pytest.mark.parametrize("pools", [{"obj": 4}, {"obj": 4, "stem": 7}], ids=["obj", "obj and stem"])
@pytest.mark.parametrize("start, iou", [((46, 44, 96, 100), 0.581), ((48, 48, 80, 80), 0.381)])
def test_boxes_move_to_the_object(stem, start, iou, pools):
    box = torch.tensor([start], dtype=torch.float32, requires_grad=True)
    before, after = descend(box, lambda x: x, 0.5, 80, pools, stem.features)
    assert before == pytest.approx(iou, abs=1e-3) and after > 0.95


def test_deltas_of_an_ssd_move_to_the_object():
    codec = Box2BoxTransform(weights=(10.0, 10.0, 5.0, 5.0))
    anchor = torch.tensor([[36.0, 36.0, 84.0, 84.0]])
    deltas = torch.zeros(1, 4, requires_grad=True)
    before, after = descend(
        deltas, lambda d: codec.apply_deltas(d, anchor), 0.05, 200, {"obj": 4}, no_features
    )
    assert before == pytest.approx(0.733, abs=1e-3) and after > 0.99
    expected = codec.get_deltas(anchor, OBJECT)
    torch.testing.assert_close(deltas.detach(), expected, rtol=0, atol=0.03)
    torch.testing.assert_close(
        expected, torch.tensor([[0.8333, 0.8333, 0.0, 0.7708]]), atol=1e-4, rtol=0
    )


def test_the_pixels_have_a_name_of_their_own():
    from kd_d2.projects.dicod.classifier import STAGES

    assert kd_loc.OBJ not in STAGES
