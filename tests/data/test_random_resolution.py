"""Dynamic resolution: sizes by hand, batches of one size, the stream can be resumed."""

from collections import Counter

import pytest
import torch
from detectron2.data.datasets import register_coco_instances
from detectron2.utils.env import seed_all_rng

from kd_d2.data import RandomResolutionMapper, build_mapper, build_test_loader, build_train_loader
from kd_d2.data.random_resolution import GroupedBatches, at_resolution

# wide, upright, square
SHAPES = [(60, 40), (40, 60), (50, 50)] * 4


@pytest.fixture
def toy(cfg, coco_folder):
    images = [(*shape, [(1, 4.0, 2.0, 20.0, 10.0)]) for shape in SHAPES]
    register_coco_instances("toy", {}, *coco_folder(images))
    cfg.DATASETS.TRAIN = ("toy",)
    cfg.INPUT.MAPPER = "RandomResolutionMapper"
    cfg.INPUT.RESOLUTIONS = ((24, 32), (60, 90))
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 20, 100
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.SOLVER.IMS_PER_BATCH = 3
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def take(loader, number):
    iterator = iter(loader)
    return [next(iterator) for _ in range(number)]


@pytest.mark.parametrize(
    "size, image, expected",
    [
        ((32, 24), (60, 40), (32, 21)),  # 36 x 24 would be longer than 32
        ((24, 32), (40, 60), (21, 32)),
        ((24, 32), (50, 50), (24, 24)),
        ((60, 90), (60, 40), (90, 60)),
    ],
)
@pytest.mark.parametrize("is_train", [True, False])
def test_sizes_by_hand(toy, size, image, expected, is_train):
    mapper = at_resolution(toy, size, is_train)
    loader = build_test_loader(toy, "toy", mapper)
    item = next(x for (x,) in loader if (x["width"], x["height"]) == image)
    assert tuple(item["image"].shape[1:]) == expected[::-1]
    if is_train:
        scale = item["image"].shape[2] / image[0], item["image"].shape[1] / image[1]
        box = torch.tensor([4 * scale[0], 2 * scale[1], 24 * scale[0], 12 * scale[1]])
        boxes = item["instances"].gt_boxes.tensor
        torch.testing.assert_close(boxes, box[None])


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_one_resolution_and_all_occur(toy, workers):
    toy.DATALOADER.NUM_WORKERS = workers
    seed_all_rng(3)
    batches = take(build_train_loader(toy), 40)
    counts = Counter()
    for batch in batches:
        assert len(batch) == 3
        assert len({x["resolution"] for x in batch}) == 1
        assert len({x["width"] > x["height"] for x in batch}) == 1
        for item in batch:
            low, high = item["resolution"]
            short, long = sorted(item["image"].shape[1:])
            assert short == low or long == high
        counts[batch[0]["resolution"]] += 1
    assert set(counts) == {(24, 32), (60, 90)} and min(counts.values()) > 10
    # and the same image occurs at both
    seen = {(x["file_name"], x["resolution"]) for batch in batches for x in batch}
    assert len(seen) == 2 * len(SHAPES)


def test_without_grouping_by_shape(toy):
    toy.DATALOADER.ASPECT_RATIO_GROUPING = False
    seed_all_rng(3)
    batches = take(build_train_loader(toy), 20)
    assert all(len({x["resolution"] for x in batch}) == 1 for batch in batches)
    assert any(len({x["width"] > x["height"] for x in batch}) == 2 for batch in batches)


def test_two_runs_that_rewind_to_the_same_batch_are_equal(toy):
    streams = []
    for _ in range(2):
        seed_all_rng(1)
        loader = build_train_loader(toy)
        take(loader, 2)
        loader.rewind(2)
        seed_all_rng(7)
        streams.append(take(loader, 5))
    for a, b in zip(*streams):
        assert [x["file_name"] for x in a] == [x["file_name"] for x in b]
        assert all(torch.equal(x["image"], y["image"]) for x, y in zip(a, b))


def test_evaluation_has_the_sizes_of_the_config(toy):
    items = [x for (x,) in build_test_loader(toy, "toy")]
    assert {min(x["image"].shape[1:]) for x in items} == {20}
    assert all("resolution" not in x and "instances" not in x for x in items)


def test_groups_by_hand():
    stream = [[{"n": n}] for n in (1, 2, 4, 3, 6, 5, 7)]
    batches = GroupedBatches(stream, 2, lambda x: x["n"] % 2)
    assert [[x["n"] for x in b] for b in batches] == [[2, 4], [1, 3], [5, 7]]


@pytest.mark.parametrize("sizes", [(), ((32,),), ((0, 32),)])
def test_malformed_resolutions_name_their_key(toy, sizes):
    toy.INPUT.RESOLUTIONS = sizes
    with pytest.raises(ValueError, match="INPUT.RESOLUTIONS"):
        build_mapper(toy, True)
    assert isinstance(build_mapper(toy, False), RandomResolutionMapper)
