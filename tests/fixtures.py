"""Small detectors, batches and data sets that the tests share.

Everything runs on the CPU within fractions of a second and is the same in every run. The
detectors have 3 classes, a ResNet-18 and pyramids of 32 channels, random weights and FrozenBN
(the identity at random initialisation) unless a test overrides it.
"""

import contextlib
import copy
import json
import os
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple, Union
from uuid import uuid4

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from kd_d2.config import get_cfg
from kd_d2.data import register_all
from kd_d2.distillation import DetectorTeacher, KeyInfo, build_teacher
from kd_d2.engine.main import import_components

__all__ = [
    "CLASSES",
    "DENSE",
    "FAMILIES",
    "TWO_STAGE",
    "registered_toy_dataset",
    "save_weights",
    "teacher_of",
    "tiny_batch",
    "tiny_cfg",
    "tiny_model",
    "untrained_teacher_keys",
    "write_gfl_pair",
]

CLASSES = ("disc", "square", "cross")
DENSE = ("RetinaNet", "FCOS", "GFL", "ATSS")
TWO_STAGE = ("GeneralizedRCNN", "Cascade", "C4")
FAMILIES = DENSE + TWO_STAGE

_PYRAMID = {
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res3", "res4", "res5"],
}
# 64 channels in the towers: with 32 channels each of the 32 groups of "GN" is one channel, and
# torch refuses one image whose coarsest level is a single cell.
_TOWERS = {"NUM_CLASSES": len(CLASSES), "NUM_CONVS": 2, "CONV_DIM": 64}


def _own_detector(name: str) -> Dict[str, Any]:
    result = {"MODEL.META_ARCHITECTURE": name, **_PYRAMID}
    result["MODEL.BACKBONE.NAME"] = "build_kd_resnet_fpn_backbone"
    result.update({f"MODEL.{name}.{key}": value for key, value in _TOWERS.items()})
    return result


_RETINANET = {
    **_PYRAMID,
    # Detectron2's own classes only, so that checkpoints load without kd_d2.
    "MODEL.META_ARCHITECTURE": "RetinaNet",
    "MODEL.BACKBONE.NAME": "build_retinanet_resnet_fpn_backbone",
    "MODEL.RETINANET.NUM_CLASSES": len(CLASSES),
    "MODEL.RETINANET.NUM_CONVS": 2,
    # 4 anchors per cell
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 24], [32, 48], [64, 96], [128, 192], [256, 384]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[0.5, 1.0]],
}
_RCNN = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [96], [128]],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 48,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 5,
}
_C4 = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res4"],
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64]],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 6,
}
# Needs images of 128x128: tiny_batch(sizes=((128, 128),)).
_SSD = {
    "MODEL.META_ARCHITECTURE": "SSD",
    "MODEL.BACKBONE.NAME": "build_ssd_vgg_backbone",
    "MODEL.SSD.NUM_CLASSES": len(CLASSES),
    "MODEL.SSD.INPUT_SIZE": 128,
    "MODEL.SSD.STRIDES": (8, 16, 32, 64, 128),
    "MODEL.SSD.SIZES": (16, 28, 48, 76, 100, 125),
    "MODEL.SSD.ASPECT_RATIOS": ((2,), (2, 3), (2, 3), (2,), (2,)),
    "MODEL.SSD_VGG.CHANNELS": (8, 16, 24, 32, 32),
    "MODEL.SSD_VGG.DEPTHS": (1, 1, 1, 1, 1),
    "MODEL.SSD_VGG.CONV7_CHANNELS": 48,
    "MODEL.SSD_VGG.EXTRAS": ((16, 32, 3, 2, 1), (16, 24, 3, 2, 1), (16, 24, 3, 2, 1)),
    "INPUT.MAPPER": "SSDMapper",
    "INPUT.FORMAT": "RGB",
}
_ARCHITECTURES = {
    "RetinaNet": _RETINANET,
    "FCOS": _own_detector("FCOS"),
    "GFL": _own_detector("GFL"),
    "ATSS": _own_detector("ATSS"),
    "GeneralizedRCNN": _RCNN,
    "Cascade": {
        **_RCNN,
        "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    },
    "C4": _C4,
    "SSD": _SSD,
}
_COMMON = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.MASK_ON": False,
    "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NORM": "FrozenBN",
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 200,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 100,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 20,
    "MODEL.ROI_HEADS.NUM_CLASSES": len(CLASSES),
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 24,
    "INPUT.MIN_SIZE_TRAIN": (128,),
    "INPUT.MAX_SIZE_TRAIN": 128,
    "INPUT.MIN_SIZE_TEST": 128,
    "INPUT.MAX_SIZE_TEST": 128,
    "INPUT.RANDOM_FLIP": "none",
    "DATASETS.TRAIN": (),
    "DATASETS.TEST": (),
    "DATALOADER.NUM_WORKERS": 0,
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.001,
    "SOLVER.MAX_ITER": 3,
    "SOLVER.STEPS": (),
    "SOLVER.WARMUP_ITERS": 0,
    "SEED": 7,
    "VERSION": 2,
}


def tiny_cfg(meta_arch: str, **overrides: Any) -> CfgNode:
    """Return the (not frozen) config of a small detector, with the nodes of kd_d2 and projects.

    Args:
        meta_arch: an entry of :data:`FAMILIES` (a meta-architecture, "Cascade" or "C4"), or "SSD".
        overrides: dotted keys and values, merged last:
            ``tiny_cfg("RetinaNet", **{"MODEL.RETINANET.NORM": "GN"})``.
    """
    import_components()
    cfg = get_cfg()
    values = {**_COMMON, **_ARCHITECTURES[meta_arch], **overrides}
    cfg.merge_from_list([part for item in values.items() for part in item])
    return cfg


def tiny_model(meta_arch: str, seed: int = 0, **overrides: Any) -> nn.Module:
    """Return a freshly initialised detector in training mode; equal arguments, equal weights.

    The head's weights are drawn with a larger deviation than the usual 0.01 and per-level scales
    differ, so that predictions depend visibly on every layer.
    """
    key = repr((meta_arch, seed, sorted(overrides.items())))
    if key not in _PROTOTYPES:
        if len(_PROTOTYPES) >= 6:  # 50 MB each
            _PROTOTYPES.pop(next(iter(_PROTOTYPES)))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _PROTOTYPES[key] = build_model(tiny_cfg(meta_arch, **overrides)).train()
            _make_predictions_lively(_PROTOTYPES[key])
    return copy.deepcopy(_PROTOTYPES[key])


# Building and initialising takes ten times as long as copying.
_PROTOTYPES: Dict[str, nn.Module] = {}


@torch.no_grad()
def _make_predictions_lively(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)) and not name.startswith("backbone."):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
            if name.startswith("roi_heads.box_predictor") and name.endswith("bbox_pred"):
                # boxes of later cascade stages still overlap the ground truth
                module.weight.mul_(0.1)
    for level, scale in enumerate(getattr(getattr(model, "head", None), "scales", None) or ()):
        scale.scale.fill_(0.75 + 0.25 * level)


def tiny_batch(
    num_images: int = 2,
    sizes: Optional[Sequence[Tuple[int, int]]] = None,
    num_gt: Union[int, Sequence[int]] = (3, 2),
    seed: int = 0,
    num_classes: int = len(CLASSES),
) -> List[Dict[str, Any]]:
    """Return Detectron2's ``batched_inputs`` with random images, boxes and classes.

    Args:
        num_images: length of the batch.
        sizes: (height, width) per image, repeated cyclically; default 128x128 and 96x112, so that
            the second image is padded. Odd numbers are fine.
        num_gt: boxes per image, one number or a sequence repeated cyclically; 0 is an image
            without ground truth.
        seed: equal arguments, equal batch.
        num_classes: classes are drawn from 0..num_classes-1.
    """
    sizes = list(sizes or ((128, 128), (96, 112)))
    counts = [num_gt] if isinstance(num_gt, int) else list(num_gt)
    generator = torch.Generator().manual_seed(seed)
    return [
        _tiny_input(i, sizes[i % len(sizes)], counts[i % len(counts)], generator, num_classes)
        for i in range(num_images)
    ]


def _tiny_input(index, size, count, generator, num_classes) -> Dict[str, Any]:
    height, width = size
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    limits = torch.tensor([width, height], dtype=torch.float32)
    # sides between 12 pixels and two thirds of the image, wholly inside
    sides = 12 + torch.rand(count, 2, generator=generator) * (limits * 2 / 3 - 12)
    corners = torch.rand(count, 2, generator=generator) * (limits - sides)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.cat([corners, corners + sides], dim=1).reshape(-1, 4))
    instances.gt_classes = torch.randint(0, num_classes, (count,), generator=generator)
    return {
        "file_name": f"tiny_{index}.png",
        "image_id": index,
        "height": height,
        "width": width,
        "image": image,
        "instances": instances,
    }


def teacher_of(
    model_or_cfg: Union[nn.Module, CfgNode],
    *,
    student_format: str = "BGR",
    input_format: str = "",
    classes: Optional[Sequence[str]] = None,
    seed: int = 1,
    **options: Any,
) -> DetectorTeacher:
    """Return a :class:`DetectorTeacher` around a model (which it freezes), without any file.

    Args:
        model_or_cfg: the model, or the config of one to build with ``seed``.
        student_format: ``INPUT.FORMAT`` of the student.
        input_format: that of the teacher; empty: the model's, "BGR" if it has none.
        classes: class names of the teacher.
        options: further arguments of the teacher.
    """
    model = model_or_cfg
    if isinstance(model, CfgNode):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_model(model_or_cfg)
            _make_predictions_lively(model)
    return DetectorTeacher(
        model=model,
        input_format=input_format or getattr(model, "input_format", None) or "BGR",
        student_format=student_format,
        classes=list(classes) if classes is not None else None,
        description="teacher of a test",
        **options,
    )


def write_gfl_pair(tmp_path, distiller: str, **values: Any) -> str:
    """Write configs of a tiny GFL and of its untrained teacher; return the path of the student's.

    Args:
        distiller: what KD.DISTILLERS names.
        values: further keys of the student's config.
    """
    teacher, student = tmp_path / "teacher.yaml", tmp_path / "student.yaml"
    teacher.write_text(tiny_cfg("GFL").dump())
    values = {
        "KD.ENABLED": True,
        "KD.DISTILLERS": (distiller,),
        "KD.TEACHER.CONFIG_FILE": str(teacher),
        "KD.TEACHER.ALLOW_UNTRAINED": True,
        **values,
    }
    student.write_text(tiny_cfg("GFL", **values).dump())
    return str(student)


def untrained_teacher_keys(cfg: CfgNode) -> Dict[str, KeyInfo]:
    """Return what a teacher that is no detector can give, by its config alone: without weights."""
    node = cfg.KD.TEACHER
    facts = (cfg.DATASETS.TRAIN[0], node.TYPE, node.dump())
    if facts not in _TEACHER_KEYS:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.DEVICE, cfg.KD.TEACHER.WEIGHTS = "cpu", ""
        cfg.KD.TEACHER.ALLOW_UNTRAINED = True
        register_all(cfg)  # the classes; no file is read
        _TEACHER_KEYS[facts] = build_teacher(cfg).keys
    return _TEACHER_KEYS[facts]


_TEACHER_KEYS: Dict[Tuple, Dict[str, KeyInfo]] = {}


def save_weights(model: nn.Module, path, classes: Sequence[str] = (), **extra: Any) -> str:
    """Write a checkpoint as the trainer does: plain keys below ``model``; return its path.

    Args:
        classes: class names, stored as the trainer stores them; none: not stored.
        extra: further entries of the file.
    """
    if classes:
        extra["run_info"] = {**extra.get("run_info", {}), "classes": list(classes)}
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    torch.save({"model": model.state_dict(), **extra}, path)
    return str(path)


@contextlib.contextmanager
def registered_toy_dataset(
    tmp_path,
    num_images: int = 6,
    classes: Sequence[str] = CLASSES,
    *,
    size: Tuple[int, int] = (128, 128),
    boxes_per_image: int = 2,
    seed: int = 0,
) -> Iterator[str]:
    """Write PNG images with coloured rectangles and their COCO JSON, and register them.

    The classes differ in colour and occur in turn. Use as a context manager; the registration is
    removed at the end::

        with registered_toy_dataset(tmp_path, 6) as name:
            cfg = tiny_cfg("RetinaNet", **{"DATASETS.TRAIN": (name,)})

    Args:
        tmp_path: existing folder; gets a new folder with the files.
        num_images: number of images.
        classes: class names; ``NUM_CLASSES`` of the detector must be their number.
        size: (height, width) of the images.
        boxes_per_image: rectangles per image.

    Yields:
        a name that no other data set has.
    """
    name = f"toy_{uuid4().hex[:12]}"
    folder = os.path.join(str(tmp_path), name)
    os.makedirs(folder)
    generator = np.random.default_rng(seed)
    colours = generator.integers(96, 256, (len(classes), 3))
    images, annotations = [], []
    for image_id in range(1, num_images + 1):
        pixels = generator.integers(0, 64, (*size, 3))
        for _ in range(boxes_per_image):
            category = len(annotations) % len(classes)
            width, height = (int(generator.integers(20, side // 2)) for side in size[::-1])
            x = int(generator.integers(0, size[1] - width))
            y = int(generator.integers(0, size[0] - height))
            pixels[y : y + height, x : x + width] = colours[category]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category + 1,
                    "bbox": [x, y, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                }
            )
        file_name = f"{image_id:04d}.png"
        Image.fromarray(pixels.astype(np.uint8)).save(os.path.join(folder, file_name))
        facts = {"id": image_id, "file_name": file_name, "height": size[0], "width": size[1]}
        images.append(facts)
    categories = [{"id": i + 1, "name": label} for i, label in enumerate(classes)]
    json_file = os.path.join(folder, "instances.json")
    with open(json_file, "w") as file:
        json.dump(
            {
                "info": {},
                "licenses": [],
                "images": images,
                "annotations": annotations,
                "categories": categories,
            },
            file,
        )
    register_coco_instances(name, {}, json_file, folder)
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
