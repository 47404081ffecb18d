"""The trained student as a checkpoint and a config, checked to give the same detections."""

import os
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Dict, Iterable, Iterator, List, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_plain_cfg
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_KEYPOINT_HEAD_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    RPN_HEAD_REGISTRY,
    build_model,
)
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn

from kd_d2.checkpoint import (
    KDCheckpointer,
    KeyReport,
    MissingFileError,
    architecture_entry,
    atomic_save,
    atomic_write,
    load_yaml_config,
)
from kd_d2.checkpoint.report import below
from kd_d2.config import CONFIG_NODES, add_kd_config, get_cfg

__all__ = [
    "CONFIG_NAME",
    "Export",
    "SAFETENSORS_NAME",
    "WEIGHTS_NAME",
    "build_student",
    "export_student",
    "find_checkpoint",
    "needed_packages",
    "student_config",
]

WEIGHTS_NAME = "model_student.pth"
SAFETENSORS_NAME = "model_student.safetensors"
CONFIG_NAME = "config.yaml"

# Packages that every user of Detectron2 has.
_STOCK = ("detectron2", "fvcore", "torch", "torchvision")
# Config keys that name a component, and where it is looked up.
_COMPONENTS = (
    ("MODEL.META_ARCHITECTURE", META_ARCH_REGISTRY),
    ("MODEL.BACKBONE.NAME", BACKBONE_REGISTRY),
    ("MODEL.ANCHOR_GENERATOR.NAME", ANCHOR_GENERATOR_REGISTRY),
    ("MODEL.PROPOSAL_GENERATOR.NAME", PROPOSAL_GENERATOR_REGISTRY),
    ("MODEL.RPN.HEAD_NAME", RPN_HEAD_REGISTRY),
    ("MODEL.ROI_HEADS.NAME", ROI_HEADS_REGISTRY),
    ("MODEL.ROI_BOX_HEAD.NAME", ROI_BOX_HEAD_REGISTRY),
    ("MODEL.ROI_MASK_HEAD.NAME", ROI_MASK_HEAD_REGISTRY),
    ("MODEL.ROI_KEYPOINT_HEAD.NAME", ROI_KEYPOINT_HEAD_REGISTRY),
)
# Backbones of this library that equal one of Detectron2's under these settings.
_STOCK_BACKBONES = {
    "build_kd_resnet_fpn_backbone": (
        "build_retinanet_resnet_fpn_backbone",
        (
            ("MODEL.FPN.P6_SOURCE", "c5"),
            ("MODEL.FPN.P7_RELU", True),
            ("MODEL.RESNETS.BN_MODE", ""),
        ),
    ),
}


@dataclass
class Export:
    """What an export wrote and found.

    Args:
        files: paths of the written files; the first is the ``.pth``, the last the config.
        packages: modules to import before the config is read; empty for plain Detectron2.
        dropped: number of keys of modules that only training needs.
        num_parameters: parameters of the exported student.
        num_detections: detections on the test image, equal before and after; 0 says that the
            comparison of detections was empty (that of the weights never is).
        classes: their names, if the checkpoint has them.
    """

    files: List[str]
    packages: List[str]
    dropped: int
    num_parameters: int
    num_detections: int
    classes: List[str]


def export_student(cfg: CfgNode, weights: str, output: str, safetensors: bool = False) -> Export:
    """Write the student of a training checkpoint so that a plain detector can be built from it.

    ``model_student.pth`` holds ``{"model": state dict}``, and the architecture of a student that
    describes its own (:mod:`kd_d2.checkpoint.architecture`), without the modules that the
    meta-architecture lists in ``training_only_modules`` (module paths; default none). If it has a
    method ``deploy(cfg)``, that changes the written config to one without these modules.
    ``config.yaml`` holds no ``KD`` node, and, if all components are Detectron2's own, no key that
    plain Detectron2 does not know. Both are read back: the weights must be equal bit by bit and the
    detections of a random image the same as the checkpoint's.

    Args:
        cfg: config of the run.
        weights: its checkpoint, in any format that Detectron2 reads.
        output: folder to write to, not the one of the training run; created.
        safetensors: also write ``model_student.safetensors``.

    Returns:
        summary.

    Raises:
        MissingFileError: ``weights`` does not exist.
        ValueError: its keys do not fit the model, the folder is that of a training run, or what
            was read back differs.
        ImportError: ``safetensors`` without the package.
    """
    if os.path.exists(os.path.join(output, "last_checkpoint")):
        raise ValueError(
            f"{output} is the folder of a training run, whose {CONFIG_NAME} the export would "
            "overwrite; give another --output."
        )
    save_safetensors = _import_safetensors() if safetensors else None
    allow_unsafe = cfg.KD.ALLOW_UNSAFE_LOAD
    original = _build(cfg)
    training_only = _training_only(original)
    extra = _load(original, weights, training_only, allow_unsafe)
    state = _without(original.state_dict(), training_only)

    packages = needed_packages(cfg, original)
    exported_cfg = student_config(cfg, packages)
    paths = [os.path.join(output, WEIGHTS_NAME)]
    if hasattr(original, "deploy"):
        original.deploy(exported_cfg)
    exported_cfg.MODEL.WEIGHTS = paths[0]
    exported_cfg.OUTPUT_DIR = get_plain_cfg().OUTPUT_DIR

    os.makedirs(output, exist_ok=True)
    atomic_save({"model": state, **architecture_entry(original)}, paths[0])
    if save_safetensors is not None:
        paths.append(os.path.join(output, SAFETENSORS_NAME))
        # The format has no shared or strided storage.
        flat = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
        with atomic_write(paths[-1]) as file:
            file.write(save_safetensors(flat))
    paths.append(os.path.join(output, CONFIG_NAME))
    with atomic_write(paths[-1]) as file:
        file.write(exported_cfg.dump().encode())

    expected = _detect(original, cfg)
    written_cfg = get_cfg() if packages else get_plain_cfg()
    try:
        load_yaml_config(written_cfg, paths[-1])
        for path in paths[:-1]:
            written = _build(written_cfg, device=cfg.MODEL.DEVICE)
            _load(written, path, _training_only(written), allow_unsafe=False)
            _check_equal(state, written.state_dict(), path)
            if not _same(expected, _detect(written, written_cfg)):
                raise ValueError(
                    f"The model built from {paths[-1]} and {path} detects other objects in a "
                    f"random image than that of {weights}, so the files were removed: "
                    "training_only_modules of the meta-architecture names a module that inference "
                    "uses, or a component reads a config key that the export does not know."
                )
    except BaseException:
        for path in paths:
            os.remove(path)
        raise
    return Export(
        files=paths,
        packages=packages,
        dropped=len(original.state_dict()) - len(state),
        num_parameters=sum(
            p.numel() for name, p in original.named_parameters() if not below(name, training_only)
        ),
        num_detections=len(expected["instances"]) if "instances" in expected else 0,
        classes=list((extra.get("run_info") or {}).get("classes") or ()),
    )


def build_student(folder: str, packages: Sequence[str] = ()) -> Tuple[CfgNode, nn.Module]:
    """The detector in a folder that :func:`export_student` wrote, on the CPU, in eval mode.

    Args:
        folder: with config and weights.
        packages: ``Export.packages``; imported already.

    Returns:
        config, with its thresholds, and detector.
    """
    cfg = get_cfg() if packages else get_plain_cfg()
    load_yaml_config(cfg, os.path.join(folder, CONFIG_NAME))
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    weights = os.path.join(folder, WEIGHTS_NAME)
    _load(model, weights, _training_only(model), allow_unsafe=False)
    return cfg, model


def find_checkpoint(path: str) -> str:
    """``path``, or the last checkpoint of the training run if it is a folder.

    Raises:
        MissingFileError: the folder has no ``last_checkpoint``.
    """
    if not os.path.isdir(path):
        return path
    tag = os.path.join(path, "last_checkpoint")
    if not os.path.isfile(tag):
        raise MissingFileError(
            f"{path} has no file last_checkpoint: give the checkpoint itself as --weights."
        )
    with open(tag) as file:
        return os.path.join(path, file.read().strip())


def needed_packages(cfg: CfgNode, model: nn.Module) -> List[str]:
    """The modules that must be imported before ``cfg`` can be built, besides Detectron2.

    A component counts if its builder in Detectron2's registries or the class of one of its modules
    comes from elsewhere. A backbone of this library that equals one of Detectron2's does not.

    Args:
        cfg: config of the run.
        model: the model built from it.

    Returns:
        sorted names: "kd_d2.modeling", "kd_d2.projects.<pkg>", or a module of the user.
    """
    plain = _plain_components(cfg)
    if plain.MODEL.BACKBONE.NAME != cfg.MODEL.BACKBONE.NAME:
        model = _build(plain)
    origins = {
        registry.get(name).__module__
        for name, registry in ((_get(plain, key), registry) for key, registry in _COMPONENTS)
        if name in registry
    }
    origins |= {type(module).__module__ for module in model.modules()}
    return sorted({_package(origin) for origin in origins if origin.split(".")[0] not in _STOCK})


def student_config(cfg: CfgNode, packages: Sequence[str] = ()) -> CfgNode:
    """``cfg`` with only the keys that its reader knows.

    Args:
        cfg: config of the run.
        packages: what the reader imports, as from :func:`needed_packages`. Empty: the reader is
            plain Detectron2.

    Returns:
        new config, not frozen: the keys of Detectron2, and with packages those that the library
        and these packages add to Detectron2's nodes (``KD`` and other nodes of training never).
    """
    known = get_plain_cfg()
    nodes = set(known)
    if packages:
        add_kd_config(known)
        for _, add_nodes in CONFIG_NODES:
            if below(add_nodes.__module__, packages):
                add_nodes(known)
    else:
        cfg = _plain_components(cfg)
    for name in set(known) - nodes:
        del known[name]
    _copy_known(cfg, known)
    return known


def _copy_known(source: CfgNode, target: CfgNode) -> None:
    for key in list(target):
        if isinstance(target[key], CfgNode) and isinstance(source.get(key), CfgNode):
            _copy_known(source[key], target[key])
        elif key in source:
            target[key] = source[key]


def _plain_components(cfg: CfgNode) -> CfgNode:
    """``cfg`` with Detectron2's own backbone where ours is the same."""
    cfg = cfg.clone()
    cfg.defrost()
    stock, conditions = _STOCK_BACKBONES.get(cfg.MODEL.BACKBONE.NAME, ("", ()))
    if stock and all(_get(cfg, key) == value for key, value in conditions):
        cfg.MODEL.BACKBONE.NAME = stock
    return cfg


def _get(cfg: CfgNode, name: str) -> Any:
    node = cfg
    for part in name.split("."):
        node = node[part]
    return node


def _package(module: str) -> str:
    parts = module.split(".")
    if parts[:2] == ["kd_d2", "projects"]:
        return ".".join(parts[:3])
    return "kd_d2.modeling" if parts[0] == "kd_d2" else parts[0]


def _build(cfg: CfgNode, device: str = "") -> nn.Module:
    """The model in eval mode, with score thresholds of 0, so that there is something to compare."""
    cfg = cfg.clone()
    cfg.defrost()
    for node in _nodes(cfg.MODEL):
        if "SCORE_THRESH_TEST" in node:
            node.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
    return build_model(cfg).eval()


def _nodes(cfg: CfgNode) -> Iterator[CfgNode]:
    yield cfg
    for value in cfg.values():
        if isinstance(value, CfgNode):
            yield from _nodes(value)


def _load(
    model: nn.Module, weights: str, training_only: Iterable[str], allow_unsafe: bool
) -> Dict[str, Any]:
    checkpointer = KDCheckpointer(model, allow_unsafe=allow_unsafe)
    extra = checkpointer.load(weights)
    report = checkpointer.last_report or KeyReport(missing=list(model.state_dict()))
    report = report.without(training_only)
    if not report.ok:
        raise ValueError(
            f"{weights} does not fit the model of the config, give the --config-file it was "
            f"trained with.\n{report.format()}"
        )
    return extra


def _training_only(model: nn.Module) -> Tuple[str, ...]:
    return tuple(getattr(model, "training_only_modules", ()))


def _without(state: "OrderedDict[str, Tensor]", prefixes: Tuple[str, ...]) -> "OrderedDict":
    kept = OrderedDict((key, value) for key, value in state.items() if not below(key, prefixes))
    metadata = getattr(state, "_metadata", {})
    kept._metadata = OrderedDict(
        (key, value) for key, value in metadata.items() if not below(key, prefixes)
    )
    return kept


def _import_safetensors() -> Any:
    try:
        from safetensors.torch import save
    except ImportError as error:
        raise ImportError(
            "Writing .safetensors needs the package safetensors: run `pip install safetensors`."
        ) from error
    return save


def _check_equal(expected: Any, read: Any, path: str) -> None:
    for key, value in expected.items():
        if key not in read or not torch.equal(value.cpu(), read[key].cpu()):
            raise ValueError(f"{key} read back from {path} differs from what was written there.")


@torch.no_grad()
def _detect(model: nn.Module, cfg: CfgNode) -> dict:
    """Detections in a square image of noise, of the test size of the config up to 512 px."""
    side = min(cfg.INPUT.MIN_SIZE_TEST, 512) or 512
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, side, side), dtype=torch.uint8, generator=generator)
    return model([{"image": image, "height": side, "width": side}])[0]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Instances):
        return _same(a.get_fields(), b.get_fields())
    if isinstance(a, Boxes):
        return _same(a.tensor, b.tensor)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and a.is_floating_point():
        # Equal bit by bit on a CPU; some CUDA kernels sum in changing order.
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b
