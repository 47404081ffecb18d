"""Teachers: frozen networks that live outside the module tree.

A teacher is a plain Python object, so assigning it to a module registers nothing: it is absent
from ``parameters()``, ``state_dict()``, DDP and the optimizer, and ``train()`` does not reach it.
"""

import logging
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.registry import Registry
from torch import nn

from kd_d2.checkpoint import (
    KDCheckpointer,
    MissingFileError,
    file_sha256,
    load_yaml_config,
    merge_opts,
)
from kd_d2.config import get_cfg

from .compilation import check_uncompiled, compile_trunk
from .fuse import fuse_norms
from .precision import Precision
from .recorder import near_matches
from .taps import Key, KeyInfo, StagedRun, build_tap

__all__ = ["TEACHER_REGISTRY", "DetectorTeacher", "Teacher", "build_teacher", "freeze"]

logger = logging.getLogger(__name__)

TEACHER_REGISTRY = Registry("TEACHER")
TEACHER_REGISTRY.__doc__ = """
Teacher types, looked up by KD.TEACHER.TYPE and called with the student's config.
"""


def build_teacher(cfg: CfgNode) -> "Teacher":
    """Build, load and freeze the teacher that ``cfg.KD.TEACHER`` describes.

    Raises:
        ValueError: unknown type; or whatever makes this teacher unfit (see its class).
    """
    name = cfg.KD.TEACHER.TYPE
    if name not in TEACHER_REGISTRY:
        known = [n for n, _ in TEACHER_REGISTRY]
        raise ValueError(
            f"KD.TEACHER.TYPE '{name}' is unknown; known: {', '.join(sorted(known))}; "
            f"similar: {near_matches(name, known)}"
        )
    return TEACHER_REGISTRY.get(name)(cfg)


def freeze(model: nn.Module) -> nn.Module:
    """Put ``model`` into eval mode without gradients; both halves are needed.

    Without ``eval()``, BatchNorm statistics drift even under ``no_grad``.
    """
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


class Teacher:
    """Interface of all teachers.

    Attributes:
        keys: what the teacher can provide, with widths, strides and signatures; the vocabulary is
            that of :mod:`kd_d2.distillation.taps`. Empty for teachers without taps.
        classes: its class names in order, or None if unknown.
    """

    keys: Dict[str, KeyInfo] = {}
    classes: Optional[List[str]] = None

    def start(
        self,
        batched_inputs: List[Dict[str, Any]],
        padded_size: Tuple[int, int],
        needs: Iterable[str],
        gt_instances: Optional[List[Instances]] = None,
    ) -> "TeacherRun":
        """Return a lazy view of the teacher on one batch; nothing runs until a key is read."""
        raise NotImplementedError

    def state_to_copy(self) -> Dict[str, torch.Tensor]:
        """Parameters and buffers that ``KD.INIT_STUDENT`` may copy."""
        raise ValueError(f"{type(self).__name__} has no weights that KD.INIT_STUDENT could copy")

    def describe(self) -> str:
        """One paragraph for the log: what this teacher is and where it came from."""
        return type(self).__name__


class TeacherRun:
    """A detector teacher on one batch: values by key, RoI passes, rest of its head.

    Args:
        store: the stages of the teacher.
        precision: in which they run.
    """

    def __init__(self, store: StagedRun, precision: Optional[Precision] = None):
        self._store = store
        self._precision = precision or Precision()
        self._values: Dict[str, Any] = {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            self._values[key] = self._run(lambda: self._store[key])
        return self._values[key]

    def _run(self, stage: Callable[[], Any]) -> Any:
        device = self._store.images.device
        with self._precision(device):
            value = stage()
        return self._precision.returned(value, device)

    @property
    def model(self) -> nn.Module:
        return self._store.model

    @property
    def tap(self):
        return self._store.tap

    def run(self, keys: Iterable[str], boxes: List[Boxes]) -> Dict[str, Any]:
        """Return ``roi.*`` values for given boxes (absolute pixels of the padded input)."""
        return self._run(lambda: self._store.run_rois(keys, boxes))

    def rest_of_head(self, branch: str, start: int, level_features: List[torch.Tensor]):
        """See :meth:`DenseTap.rest_of_head`; gradients cross the frozen layers."""
        return self._run(lambda: self.tap.rest_of_head(self.model, branch, start, level_features))


@TEACHER_REGISTRY.register()
class DetectorTeacher(Teacher):
    """A frozen detector with a config and a checkpoint of its own.

    It sees the student's un-normalised images with its own pixel statistics and channel order,
    padded to the student's padded size; where only ``roi.*`` keys are needed, further to a multiple
    of its own size divisibility.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        input_format: str,
        student_format: str,
        classes: Optional[List[str]] = None,
        description: str = "",
        cfg: Optional[CfgNode] = None,
        fuse_bn: bool = False,
        channels_last: bool = False,
        dtype: str = "",
        compiler: str = "",
    ):
        """
        Args:
            model: the loaded detector; is frozen here.
            input_format, student_format: INPUT.FORMAT of both sides, e.g. "RGB" and "BGR".
            classes: class names in order.
            description: for the log.
            cfg: the teacher's config, needed only to evaluate it.
            fuse_bn: multiply batch norms into the convs before them, see :mod:`.fuse`.
            channels_last: keep the weights in that memory format; feature maps follow.
            dtype: precision of its own, see :mod:`.precision`; "": that of the student's step.
            compiler: backend of ``torch.compile`` for its bottom-up network; "": none.

        Raises:
            ValueError: the formats differ by more than the order of R and B; unknown ``dtype`` or
                ``compiler``.
        """
        if sorted(input_format) != sorted(student_format):
            raise ValueError(
                f"the teacher's INPUT.FORMAT '{input_format}' cannot be made from the student's "
                f"'{student_format}'"
            )
        self._fuse_bn, self._channels_last = fuse_bn, channels_last
        self._precision, self._compiler = Precision(dtype), compiler
        self._hold(model)
        self.cfg = cfg
        self._classes = classes
        self._flip_channels = input_format != student_format
        self._description = description

    def _hold(self, model: nn.Module) -> None:
        """Let ``model`` be the teacher's network from now on; it is frozen."""
        self.model = freeze(model)
        if self._fuse_bn:
            logger.info(f"Teacher: {fuse_norms(model)} batch norms are part of their convs")
        if self._channels_last:
            model.to(memory_format=torch.channels_last)
        if self._compiler:
            compile_trunk(model, self._compiler)
        self.tap = build_tap(model)
        self.keys = self.tap.keys(model)

    @classmethod
    def from_config(cls, cfg):
        node = cfg.KD.TEACHER
        teacher_cfg = cls.load_config(cfg)
        if not node.WEIGHTS and not node.ALLOW_UNTRAINED:
            raise ValueError(
                "KD.TEACHER.WEIGHTS is empty, so the teacher would be randomly initialised; give "
                "a checkpoint, or set KD.TEACHER.ALLOW_UNTRAINED True if that is intended"
            )
        model = build_model(teacher_cfg)
        classes, digest = None, "none, random initialisation"
        if node.WEIGHTS:
            checkpointer = KDCheckpointer(model, allow_unsafe=cfg.KD.ALLOW_UNSAFE_LOAD)
            try:
                extra = checkpointer.load(node.WEIGHTS)
            except MissingFileError as error:
                raise MissingFileError(
                    f"The teacher's checkpoint {node.WEIGHTS} does not exist: check "
                    "KD.TEACHER.WEIGHTS (relative to the folder where the program is started)."
                ) from error
            _check_report(checkpointer.last_report, node)
            classes = (extra.get("run_info") or {}).get("classes")
            digest = file_sha256(checkpointer.path_manager.get_local_path(node.WEIGHTS))
        num_parameters = sum(p.numel() for p in model.parameters())
        description = (
            f"{type(model).__name__} from {node.CONFIG_FILE or '(default config)'}, "
            f"weights {node.WEIGHTS or '(none)'} (sha256 {digest}), "
            f"{num_parameters / 1e6:.2f} M parameters"
        )
        return {
            "model": model,
            "input_format": teacher_cfg.INPUT.FORMAT,
            "student_format": cfg.INPUT.FORMAT,
            "classes": classes,
            "description": description,
            "cfg": teacher_cfg,
            "fuse_bn": node.FUSE_BN,
            "channels_last": node.CHANNELS_LAST,
            "dtype": node.DTYPE,
            "compiler": node.COMPILE,
        }

    @staticmethod
    def load_config(cfg: CfgNode) -> CfgNode:
        """Return the teacher's config: fresh defaults, then its file, then ``OPTS``."""
        node = cfg.KD.TEACHER
        teacher_cfg = get_cfg()
        if not node.CONFIG_FILE:
            raise ValueError(
                "KD.TEACHER.CONFIG_FILE is empty; give the teacher's config, relative to the "
                "file of --config-file"
            )
        load_yaml_config(teacher_cfg, node.CONFIG_FILE, allow_unsafe=cfg.KD.ALLOW_UNSAFE_LOAD)
        merge_opts(teacher_cfg, list(node.OPTS))
        teacher_cfg.MODEL.DEVICE = cfg.MODEL.DEVICE
        teacher_cfg.MODEL.WEIGHTS = ""
        teacher_cfg.KD.ENABLED = False
        teacher_cfg.freeze()
        return teacher_cfg

    def start(self, batched_inputs, padded_size, needs, gt_instances=None):
        needs = list(needs)
        if self._compiler:
            check_uncompiled(self.model, needs)
        if all(Key.parse(key).group == "roi" for key in needs):
            # nothing is compared cell by cell, and boxes are the same in a larger image
            step = max(self.model.backbone.size_divisibility, 1)
            padded_size = tuple(-(-side // step) * step for side in padded_size)
        images = self.preprocess(batched_inputs, padded_size)
        store = self.tap.run(self.model, images, needs, gt_instances, check=False)
        return TeacherRun(store, self._precision)

    @torch.no_grad()
    def preprocess(self, batched_inputs, padded_size: Tuple[int, int]) -> torch.Tensor:
        """Return (N, C, H, W) images in the teacher's normalisation, zero-padded.

        Raises:
            ValueError: ``padded_size`` (H, W) is no multiple of the teacher's size divisibility;
                resized features would silently corrupt every dense loss.
        """
        divisibility = self.model.backbone.size_divisibility
        if divisibility > 1 and any(side % divisibility for side in padded_size):
            raise ValueError(
                f"the student pads images to {padded_size[0]}x{padded_size[1]}, which is no "
                f"multiple of the teacher's size divisibility {divisibility}; choose a student "
                "backbone of the same divisibility"
            )
        mean, std = self.model.pixel_mean, self.model.pixel_std
        channels = batched_inputs[0]["image"].shape[0]
        result = mean.new_zeros((len(batched_inputs), channels, *padded_size))
        for row, inputs in zip(result, batched_inputs):
            image = inputs["image"].to(mean.device)
            image = image.flip(0) if self._flip_channels else image
            row[:, : image.shape[1], : image.shape[2]] = (image - mean) / std
        return result

    def state_to_copy(self):
        return self.model.state_dict()

    @property
    def classes(self) -> Optional[List[str]]:
        """Class names stored in the checkpoint, else those of its config's training data."""
        if self._classes is None and self.cfg is not None:
            return _registered_classes(self.cfg)
        return self._classes

    def describe(self):
        classes = ", ".join(self.classes) if self.classes else "unknown"
        return f"{self._description}; classes: {classes}"


def _registered_classes(cfg: CfgNode) -> Optional[List[str]]:
    for name in cfg.DATASETS.TRAIN:
        classes = MetadataCatalog.get(name).get("thing_classes", None)
        if classes:
            return list(classes)
    return None


def _check_report(report, node) -> None:
    if report.ok:
        return
    message = (
        f"teacher weights {node.WEIGHTS} do not fit the model of {node.CONFIG_FILE}:\n"
        f"{report.format()}"
    )
    if not node.ALLOW_KEY_MISMATCH:
        raise ValueError(
            message + "\nUse the config this checkpoint was trained with, or set "
            "KD.TEACHER.ALLOW_KEY_MISMATCH True to go on."
        )
    logger.warning(message + "\nGoing on because KD.TEACHER.ALLOW_KEY_MISMATCH is True.")
