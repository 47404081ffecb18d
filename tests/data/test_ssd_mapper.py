"""SSD's mapper: what comes out, in training against a naive formulation, and in the loaders."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.structures import BoxMode
from detectron2.utils.env import seed_all_rng
from PIL import Image
from torch.nn import functional as F

from kd_d2.data import (
    MAPPER_REGISTRY,
    SSDMapper,
    build_mapper,
    build_sample_loader,
    build_test_loader,
    build_train_loader,
)
from kd_d2.data.photometric import PhotometricTransform

SIZE = 96


@pytest.fixture
def ssd_cfg(cfg):
    cfg.INPUT.MAPPER, cfg.INPUT.FORMAT = "SSDMapper", "RGB"
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.MODEL.SSD.INPUT_SIZE = SIZE
    cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD = [123.675, 116.28, 103.53], [1.0, 1.0, 1.0]
    return cfg


@pytest.fixture
def record(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 140, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    boxes = [(10, 8, 60, 50), (70, 20, 65, 55), (2, 40, 30, 38), (90, 5, 20, 16)]
    annotations = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": i, "iscrowd": int(i == 3)}
        for i, box in enumerate(boxes)
    ]
    return {
        "file_name": str(tmp_path / "image.png"),
        "height": 80,
        "width": 140,
        "image_id": 1,
        "annotations": annotations,
    }, pixels


def test_inference_is_a_plain_stretch_in_float(ssd_cfg, record):
    """Without antialiasing: noise keeps more of its deviation than with Detectron2's uint8."""
    ssd_cfg.MODEL.SSD.INPUT_SIZE = 32
    source, pixels = record
    result = SSDMapper(ssd_cfg, is_train=False)(source)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    expected = F.interpolate(image, size=(32, 32), mode="bilinear", align_corners=False)[0]
    assert result["image"].dtype == torch.float32
    torch.testing.assert_close(result["image"], expected)
    assert "instances" not in result and "annotations" not in result
    assert (result["height"], result["width"]) == (80, 140)
    assert "annotations" in source
    antialiased = T.ResizeTransform(80, 140, 32, 32).apply_image(pixels)
    assert result["image"].std() > 1.4 * antialiased.std()


def test_format(ssd_cfg, record):
    rgb = SSDMapper(ssd_cfg, is_train=False)(record[0])["image"]
    ssd_cfg.INPUT.FORMAT = "BGR"
    bgr = SSDMapper(ssd_cfg, is_train=False)(record[0])["image"]
    assert torch.equal(rgb, bgr.flip(0)) and not torch.equal(rgb, bgr)


def _naive(pixels, boxes, transforms, flip):
    """The image and the boxes that stay, from the transforms that were drawn, in loops."""
    image = pixels.astype(np.float32)
    boxes, size = [list(map(float, b)) for b in boxes], list(pixels.shape[:2])
    stays = [True] * len(boxes)
    for t in transforms:
        if isinstance(t, PhotometricTransform):
            image = t.apply_image(image)
        elif isinstance(t, T.CropTransform):
            image = image[t.y0 : t.y0 + t.h, t.x0 : t.x0 + t.w]
            size = [t.h, t.w]
            for i, (x1, y1, x2, y2) in enumerate(boxes):
                cx, cy = (x1 + x2) / 2 - t.x0, (y1 + y2) / 2 - t.y0
                stays[i] = 0 < cx < t.w and 0 < cy < t.h
                boxes[i] = [x1 - t.x0, y1 - t.y0, x2 - t.x0, y2 - t.y0]
        elif type(t).__name__ == "ExpandTransform":
            canvas = np.empty((t.height, t.width, 3), np.float32)
            canvas[:] = [123.675, 116.28, 103.53]
            canvas[t.top : t.top + size[0], t.left : t.left + size[1]] = image
            image, size = canvas, [t.height, t.width]
            boxes = [[x1 + t.left, y1 + t.top, x2 + t.left, y2 + t.top] for x1, y1, x2, y2 in boxes]
    image = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    image = F.interpolate(image, size=(SIZE, SIZE), mode="bilinear", align_corners=False)[0]
    result = []
    for box in boxes:
        limits = [size[1], size[0]] * 2
        scale = [SIZE / size[1], SIZE / size[0]] * 2
        box = [min(max(v, 0), limit) * s for v, limit, s in zip(box, limits, scale)]
        result.append([SIZE - box[2], box[1], SIZE - box[0], box[3]] if flip else box)
    return image.flip(2) if flip else image, result, stays


class _Recorded(T.AugmentationList):
    """Keeps the transforms it drew, one after the other."""

    def __call__(self, inputs):
        self.drawn = super().__call__(inputs)
        return self.drawn


def test_training_equals_a_naive_formulation(ssd_cfg, record):
    source, pixels = record
    ssd_cfg.INPUT.RANDOM_FLIP = "horizontal"
    mapper = SSDMapper(ssd_cfg, is_train=True)
    mapper.augmentations = _Recorded(mapper.augmentations.augs)
    mapper.final_augmentations = _Recorded(mapper.final_augmentations.augs)
    boxes = [BoxMode.convert(a["bbox"], 1, 0) for a in source["annotations"]]
    seed_all_rng(0)
    dropped = flipped = cropped = expanded = 0
    for _ in range(60):
        result = mapper(source)
        drawn = list(mapper.augmentations.drawn.transforms)
        flip = isinstance(mapper.final_augmentations.drawn.transforms[1], T.HFlipTransform)
        image, expected, stays = _naive(pixels, boxes, drawn, flip)
        torch.testing.assert_close(result["image"], image, rtol=1e-4, atol=1e-2)
        assert result["image"].shape == (3, SIZE, SIZE)
        kept = [i for i in range(3) if stays[i]]  # 3 is a crowd
        instances = result["instances"]
        assert instances.image_size == (SIZE, SIZE)
        assert instances.gt_classes.tolist() == kept
        torch.testing.assert_close(
            instances.gt_boxes.tensor,
            torch.tensor([expected[i] for i in kept], dtype=torch.float32).reshape(-1, 4),
            rtol=1e-4,
            atol=1e-3,
        )
        names = [type(t).__name__ for t in drawn]
        assert names[0] == "PhotometricTransform" and len(names) == 3
        dropped += len(kept) < 3
        flipped += flip
        cropped += names[2] == "CropTransform"
        expanded += names[1] == "ExpandTransform"
    assert min(dropped, flipped, cropped, expanded) > 8 and 15 < flipped < 45


def test_crowd_boxes_take_part_in_the_crop(ssd_cfg, record):
    seen = []

    class Watching(T.Augmentation):
        def get_transform(self, image, boxes):
            seen.append(boxes.copy())
            return T.NoOpTransform()

    mapper = SSDMapper(
        is_train=True, augmentations=[Watching()], final_augmentations=[], image_format="RGB"
    )
    result = mapper(record[0])
    assert seen[0].shape == (4, 4) and seen[0][3].tolist() == [90, 5, 110, 21]
    assert result["instances"].gt_classes.tolist() == [0, 1, 2]


def test_image_without_annotations(ssd_cfg, record):
    seed_all_rng(0)
    mapper = SSDMapper(ssd_cfg, is_train=True)
    for _ in range(10):
        result = mapper({**record[0], "annotations": []})
        assert len(result["instances"]) == 0
        assert result["instances"].gt_boxes.tensor.shape == (0, 4)
    assert "instances" not in mapper({k: v for k, v in record[0].items() if k != "annotations"})


def test_parts_can_be_switched_off(ssd_cfg, record):
    node = ssd_cfg.INPUT.SSD_AUG
    node.PHOTOMETRIC, node.EXPAND_PROB, node.CROP = False, 0.0, False
    train, test = SSDMapper(ssd_cfg, True), SSDMapper(ssd_cfg, False)
    result = train(record[0])
    assert torch.equal(result["image"], test(record[0])["image"])
    assert len(result["instances"]) == 3
    node.EXPAND_PROB, node.EXPAND_RATIO = 1.0, 2.0
    ssd_cfg.INPUT.RANDOM_FLIP = "vertical"
    mapper = SSDMapper(ssd_cfg, True)
    names = [type(a).__name__ for a in mapper.augmentations.augs]
    assert names == ["Expand"] and mapper.augmentations.augs[0].max_ratio == 2.0
    flip = mapper.final_augmentations.augs[1]
    assert flip.vertical and not flip.horizontal


def test_same_seed_same_images(ssd_cfg, record):
    mapper, results = SSDMapper(ssd_cfg, True), []
    for seed in (3, 3, 4):
        seed_all_rng(seed)
        results.append([mapper(record[0])["image"] for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))
    assert not torch.equal(results[0][0], results[2][0])


def test_image_of_another_size_is_an_error(ssd_cfg, record):
    with pytest.raises(Exception, match="Mismatched image shape"):
        SSDMapper(ssd_cfg, True)({**record[0], "height": 81})


# ------------------------------------------------------------------------ by name
def test_mapper_by_name(cfg, ssd_cfg):
    assert isinstance(build_mapper(ssd_cfg, True), SSDMapper)
    assert "SSDMapper" in MAPPER_REGISTRY
    cfg.INPUT.MAPPER = "DatasetMapper"
    assert type(build_mapper(cfg, False)) is DatasetMapper
    cfg.INPUT.MAPPER = "Mapper"
    known = r"\['DatasetMapper', 'RandomResolutionMapper', 'SSDMapper'\]"
    with pytest.raises(ValueError, match=f"one of {known}, got 'Mapper'"):
        build_mapper(cfg, True)


@pytest.mark.parametrize("mapper, shape", [("SSDMapper", (SIZE, SIZE)), ("DatasetMapper", None)])
def test_all_loaders_use_it(ssd_cfg, coco_folder, mapper, shape):
    images = [(64, 48, [(1, 5, 5, 30, 30)])] * 4
    json_file, root = coco_folder(images)
    register_coco_instances("ssd_toy", {}, json_file, root)
    assert len(load_coco_json(json_file, root)) == 4
    ssd_cfg.DATASETS.TRAIN = ssd_cfg.DATASETS.TEST = ("ssd_toy",)
    ssd_cfg.INPUT.MAPPER = mapper
    batches = [
        next(iter(build_train_loader(ssd_cfg)))[0],
        next(iter(build_test_loader(ssd_cfg, "ssd_toy")))[0],
        next(iter(build_sample_loader(ssd_cfg, "ssd_toy", 2)))[0],
    ]
    for x in batches:
        assert (tuple(x["image"].shape[1:]) == shape) == (shape is not None)
        assert x["image"].dtype == (torch.float32 if shape else torch.uint8)
    assert len(batches[0]["instances"]) <= 1
    assert MetadataCatalog.get("ssd_toy").thing_classes
