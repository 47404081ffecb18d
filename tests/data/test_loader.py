"""The training stream equals Detectron2's, resumes exactly, and explains its failures."""

import io
import itertools
import random

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.data.samplers import TrainingSampler
from detectron2.utils.env import seed_all_rng

from kd_d2.data import build_sample_loader, build_test_loader, build_train_loader
from kd_d2.data.loader import OffsetSampler, ResumableTrainLoader, evenly_spaced

SAMPLERS = [
    "TrainingSampler",
    "RepeatFactorTrainingSampler",
    "RandomSubsetTrainingSampler",
    "WeightedTrainingSampler",
]


@pytest.fixture
def toy(coco_folder, cfg):
    """The config of a registered data set of 11 images, wide and high, two of them empty."""
    images = []
    for i in range(11):
        width, height = (40, 30) if i % 3 else (24, 36)
        boxes = [] if i in (4, 8) else [(1 + i % 2, 2, 3, 10, 12), (1, 5, 5, 9, 9)]
        images.append((width, height, boxes))
    json_file, folder = coco_folder(images)
    register_coco_instances("toy", {}, json_file, folder)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("toy",)
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = 0.7
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [("toy", 1.5)]  # Detectron2 reads it, but has no default
    cfg.INPUT.CROP.ENABLED = True
    return cfg


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others):
        assert len(batch) == len(other)
        for item, expected in zip(batch, other):
            assert list(item) == list(expected)
            assert item["file_name"] == expected["file_name"]
            assert torch.equal(item["image"], expected["image"])
            boxes, expected_boxes = item["instances"].gt_boxes, expected["instances"].gt_boxes
            assert torch.equal(boxes.tensor, expected_boxes.tensor)
            classes = item["instances"].gt_classes
            assert torch.equal(classes, expected["instances"].gt_classes)


def files(batches):
    return [[item["file_name"] for item in batch] for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouping", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stream_is_that_of_detectron2(toy, sampler, grouping, workers):
    if workers and sampler != "TrainingSampler":
        toy.DATALOADER.NUM_WORKERS = 1  # a second one adds nothing here
    else:
        toy.DATALOADER.NUM_WORKERS = workers
    toy.DATALOADER.SAMPLER_TRAIN = sampler
    toy.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    streams = []
    for build in (build_detection_train_loader, build_train_loader):
        seed_all_rng(11)
        iterator = iter(build(toy))
        streams.append(take(iterator, 7))
        # The process's own random numbers were used alike too.
        streams.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert_same(streams[0], streams[2])
    assert streams[1] == streams[3]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("grouping", [True, False])
def test_two_runs_that_rewind_to_the_same_batch_are_equal(toy, grouping, workers):
    toy.DATALOADER.NUM_WORKERS = workers
    toy.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    seed_all_rng(1)
    running = build_train_loader(toy)
    take(iter(running), 5)
    buffer = io.BytesIO()
    torch.save(running.state_dict(), buffer)

    seed_all_rng(2)
    resuming = build_train_loader(toy)
    resuming.sampler._seed += 1  # a new process draws another seed for its sampler ...
    buffer.seek(0)
    resuming.load_state_dict(torch.load(buffer, weights_only=True))  # ... and gets the old one
    assert resuming.state_dict() == running.state_dict()

    streams = []
    for loader in (running, resuming):
        loader.rewind(5)
        seed_all_rng(77)  # stands for the random states that the trainer restores
        streams.append(take(iter(loader), 6))
    assert_same(*streams)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_rewound_stream_is_the_rest_of_the_uninterrupted_one(toy, sampler, workers):
    toy.DATALOADER.ASPECT_RATIO_GROUPING = False
    toy.DATALOADER.SAMPLER_TRAIN = sampler
    toy.DATALOADER.NUM_WORKERS = workers
    loader = build_train_loader(toy)
    uninterrupted = files(take(iter(loader), 8))
    other = build_train_loader(toy)
    other.load_state_dict(loader.state_dict())
    other.rewind(3)
    assert files(take(iter(other), 5)) == uninterrupted[3:]
    other.rewind(0)
    assert files(take(iter(other), 8)) == uninterrupted


def test_state_is_plain_and_names_the_stream(toy):
    toy.DATALOADER.SAMPLER_TRAIN = "RandomSubsetTrainingSampler"
    state = build_train_loader(toy).state_dict()
    assert set(state) == {"sampler_seed", "subset_seed", "num_images"}
    assert all(type(value) is int for value in state.values())
    assert state["num_images"] == 9


def test_changed_data_set_is_noticed(toy, caplog):
    loader = build_train_loader(toy)
    with caplog.at_level("WARNING"):
        loader.load_state_dict({"sampler_seed": 3, "num_images": 10})
    assert "9 images now and had 10" in caplog.text


def test_offset_sampler_of_one_of_two_ranks():
    sampler = TrainingSampler(5, seed=4)
    sampler._rank, sampler._world_size = 1, 2
    stream = take(iter(sampler), 20)
    assert take(iter(OffsetSampler(sampler, 7)), 13) == stream[7:]
    whole = TrainingSampler(5, seed=4)
    assert stream == take(iter(whole), 40)[1::2]


def test_negative_position_and_seedless_sampler(toy):
    with pytest.raises(ValueError, match="-1"):
        build_train_loader(toy).rewind(-1)
    with pytest.raises(ValueError, match="DATALOADER.SAMPLER_TRAIN"):
        ResumableTrainLoader(iter, torch.utils.data.Sampler(), images_per_batch=1, num_images=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_do_not_end_a_run(toy, workers, caplog):
    dicts = DatasetCatalog.get("toy")
    with open(dicts[3]["file_name"], "wb") as file:
        file.write(b"broken")
    toy.DATALOADER.NUM_WORKERS = workers
    toy.DATALOADER.MAX_BAD_FRACTION = 0.5
    with caplog.at_level("WARNING"):
        batches = take(iter(build_train_loader(toy)), 20)
    assert all(len(batch) == 4 for batch in batches)
    names = {name for batch in files(batches) for name in batch}
    assert len(names) == 8 and dicts[3]["file_name"] not in names
    toy.DATALOADER.BAD_IMAGE = "stop"
    with pytest.raises(ValueError, match="3.png.*DATALOADER.BAD_IMAGE"):
        take(iter(build_train_loader(toy)), 20)


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run(toy, workers):
    for record in DatasetCatalog.get("toy")[::2]:
        with open(record["file_name"], "wb") as file:
            file.write(b"broken")
    toy.DATALOADER.NUM_WORKERS = workers
    with pytest.raises(ValueError, match="DATALOADER.MAX_BAD_FRACTION allows; the last is .*png"):
        take(iter(build_train_loader(toy)), 100)


def test_unusable_boxes_do_not_reach_the_model(cfg, coco_folder, caplog):
    images = [
        (40, 30, [(1, 5, 5, 8, 8), (2, 5, 5, -4, 8), (1, 90, 5, 8, 8)]),
        (40, 30, [(1, 1, 1, 0, 2)]),
    ]
    json_file, folder = coco_folder(images)
    register_coco_instances("toy", {}, json_file, folder)
    cfg.DATASETS.TRAIN = ("toy",)
    with caplog.at_level("WARNING"):
        batches = take(iter(build_train_loader(cfg)), 4)
    assert "1 outside the image, 2 without area" in caplog.text
    counts = {item["image_id"]: len(item["instances"]) for batch in batches for item in batch}
    assert counts == {1: 1, 2: 0}


def register(name, records, classes=("a", "b")):
    DatasetCatalog.register(name, lambda: [dict(record) for record in records])
    MetadataCatalog.get(name).set(thing_classes=list(classes))


def annotated(category, crowd=0):
    annotation = {"bbox": [0, 0, 5, 5], "bbox_mode": 0, "category_id": category, "iscrowd": crowd}
    return {"file_name": "x.png", "width": 9, "height": 9, "annotations": [annotation]}


def test_data_that_cannot_be_trained_on(cfg):
    register("empty", [])
    register("unannotated", [dict(annotated(0), annotations=[])])
    register("crowd", [annotated(0, crowd=1)])
    register("beyond", [annotated(0), annotated(2)])
    register("fine", [annotated(1)])
    register("others", [annotated(1)], classes=("b", "a"))
    for names, words in [
        ((), "DATASETS.TRAIN is empty"),
        (("empty",), "The data set empty has no images"),
        (("unannotated",), "No image of the data set unannotated has a usable annotation"),
        (("crowd",), "No image of the data set crowd"),
        (("beyond",), "data set beyond has an annotation of the category 2 in x.png"),
        (("fine", "others"), "fine and others have different classes"),
    ]:
        cfg.DATASETS.TRAIN = names
        with pytest.raises(ValueError, match=words):
            build_train_loader(cfg)
    cfg.DATASETS.TRAIN = ("unannotated",)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert build_train_loader(cfg).num_images == 1
    with pytest.raises(ValueError, match="The data set empty has no images"):
        build_test_loader(cfg, "empty")


def test_unknown_values_name_their_key(toy):
    toy.DATALOADER.SAMPLER_TRAIN = "NoSampler"
    with pytest.raises(ValueError, match="DATALOADER.SAMPLER_TRAIN is 'NoSampler'"):
        build_train_loader(toy)
    del toy.DATASETS["TRAIN_REPEAT_FACTOR"]
    toy.DATALOADER.SAMPLER_TRAIN = "WeightedTrainingSampler"
    with pytest.raises(ValueError, match="WeightedTrainingSampler.*TRAIN_REPEAT_FACTOR"):
        build_train_loader(toy)
    toy.DATALOADER.SAMPLER_TRAIN = "TrainingSampler"
    toy.DATALOADER.BAD_IMAGE = "ignore"
    with pytest.raises(ValueError, match="DATALOADER.BAD_IMAGE is 'ignore'"):
        build_train_loader(toy)
    toy.DATALOADER.BAD_IMAGE = "skip"
    toy.SOLVER.IMS_PER_BATCH = 0
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is 0"):
        build_train_loader(toy)


class Stream(torch.utils.data.IterableDataset):
    """A data set without an order that could be resumed."""

    def __iter__(self):
        return iter([annotated(0)])


def test_stream_data_sets_are_refused_and_map_style_ones_are_not(toy):
    records = DatasetCatalog.get("toy")
    DatasetCatalog.register("stream", Stream)
    toy.DATASETS.TRAIN = ("stream",)
    with pytest.raises(ValueError, match="stream .* IterableDataset"):
        build_train_loader(toy)

    class MapStyle(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return records[index]

    DatasetCatalog.register("mapped", MapStyle)
    toy.DATASETS.TRAIN = ("mapped",)
    batches = files(take(iter(build_train_loader(toy)), 6))
    assert {name for batch in batches for name in batch} == {r["file_name"] for r in records[:3]}


def test_own_mapper(toy):
    loader = build_train_loader(toy, mapper=lambda record: {**record, "mapped": True})
    assert all(item["mapped"] for item in next(iter(loader)))


def test_test_loader_yields_every_image_in_order_and_names_a_bad_one(toy):
    records = DatasetCatalog.get("toy")
    batches = list(build_test_loader(toy, "toy"))
    assert files(batches) == [[record["file_name"]] for record in records]
    assert "annotations" not in batches[0][0] and min(batches[0][0]["image"].shape[1:]) == 32
    with open(records[6]["file_name"], "wb") as file:
        file.write(b"broken")
    with pytest.raises(ValueError, match="6.png cannot be used for evaluation"):
        list(build_test_loader(toy, "toy"))


def test_sample_is_evenly_spaced():
    assert evenly_spaced(10, 3) == [1, 5, 8]
    assert evenly_spaced(5, 9) == [0, 1, 2, 3, 4]
    for size, count in itertools.product(range(1, 30), range(1, 30)):
        picked = evenly_spaced(size, count)
        assert len(picked) == len(set(picked)) == min(size, count)
        assert picked == sorted(picked) and 0 <= picked[0] and picked[-1] < size
        gaps = np.diff(picked)
        assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_sample_loader(toy):
    records = DatasetCatalog.get("toy")
    loader = build_sample_loader(toy, "toy", 4)
    assert files(loader) == [[records[i]["file_name"]] for i in (1, 4, 6, 9)]
    assert len(build_sample_loader(toy, "toy", 100)) == 11
    with pytest.raises(ValueError, match="sample of 0 images of toy"):
        build_sample_loader(toy, "toy", 0)
