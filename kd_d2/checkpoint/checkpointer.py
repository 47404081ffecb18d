"""Checkpointer of training runs: written completely or not at all, read without running code."""

import glob
import logging
import os
import re
from collections import Counter, OrderedDict, defaultdict
from typing import Any, Dict, List, Optional
from urllib.parse import urlparse

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.utils import comm
from fvcore.common.checkpoint import _filter_reused_missing_keys
from torch import nn

from kd_d2.checkpoint.architecture import ENTRY, architecture_entry, check_entry, check_fit
from kd_d2.checkpoint.atomic import atomic_save, atomic_write, remove_stale
from kd_d2.checkpoint.report import KeyReport, is_exempt
from kd_d2.checkpoint.safe_load import MissingFileError, is_intact, load_checkpoint_file

__all__ = ["KDCheckpointer"]

_TAG = "last_checkpoint"
# What torch.load(weights_only=True) gives back unchanged.
_PLAIN_TYPES = (type(None), bool, float, str, torch.dtype, torch.device, torch.Size)


class KDCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with four differences.

    - A file is written beside its final place, synced, renamed; then ``last_checkpoint`` is
      written in the same way. A kill at any moment leaves the previous pair usable, and when
      ``last_checkpoint`` names a file that is missing or damaged nevertheless, resuming goes on
      from the newest intact one.
    - Files are read without running code from them (:mod:`kd_d2.checkpoint.safe_load`), and only
      what can be read again in this way is written.
    - ``last_report`` says which keys of the model the last :meth:`load` filled, and which not.
    - A model that describes its architecture has it in the entry ``arch``, and refuses files of
      another one (:mod:`kd_d2.checkpoint.architecture`).

    Everything that Detectron2 reads is read: zoo ``.pkl`` of Detectron2 and Caffe2, ``.pyth`` of
    pycls, ``?matching_heuristics=True`` in the path; in addition ``.safetensors``.

    Args:
        model: the bare model; its state is the entry "model" of the file.
        save_dir: folder of the checkpoints.
        save_to_disk: write files; None: on the main process only.
        allow_unsafe: read files with full pickle, ``KD.ALLOW_UNSAFE_LOAD``.
        checkpointables: further objects with ``state_dict`` and ``load_state_dict``, one entry of
            the file each. Their states consist of tensors, numbers, strings and containers.

    Attributes:
        last_report: differences between the keys of the model and those of the checkpoint loaded
            last, without Detectron2's exemptions; None before the first load.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        save_to_disk: Optional[bool] = None,
        allow_unsafe: bool = False,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.logger = logging.getLogger(__name__)
        self.allow_unsafe = allow_unsafe
        self.last_report: Optional[KeyReport] = None
        self._absent: List[str] = []  # checkpointables without an entry in the file loaded last

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``<save_dir>/<name>.pth`` and then tag it as the last checkpoint.

        Args:
            name: file name without ending.
            kwargs: further entries of the file, e.g. ``iteration``.

        Raises:
            ValueError: an entry could not be read again; the message names it.
            OSError: the file could not be written; the previous checkpoint and tag are untouched.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        for key, checkpointable in self.checkpointables.items():
            data[key] = checkpointable.state_dict()
        data.update(architecture_entry(self.model))
        data.update(kwargs)
        data = {key: _storable(value, key) for key, value in data.items()}

        file_name = f"{name}.pth"
        path = os.path.join(self.save_dir, file_name)
        self.logger.info("Saving checkpoint to %s", path)
        os.makedirs(self.save_dir, exist_ok=True)
        atomic_save(data, path)
        self.tag_last_checkpoint(file_name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Name a file of ``save_dir`` as the one to resume from, atomically."""
        with atomic_write(os.path.join(self.save_dir, _TAG)) as file:
            file.write(last_filename_basename.encode())

    def load(self, path: str, checkpointables: Optional[List[str]] = None) -> Dict[str, Any]:
        """Load the model and the named checkpointables (None: all) from ``path``.

        An empty path loads nothing, as in Detectron2, and leaves ``last_report`` None.

        Returns:
            what the file holds beyond those.

        Raises:
            MissingFileError: there is no such file.
            ValueError: the file is damaged or holds no state dict, or needs code to be run, or
                belongs to another architecture.
        """
        self.last_report = None
        if path:
            file = self.path_manager.get_local_path(urlparse(path)._replace(query="").geturl())
            if not os.path.isfile(file):
                raise MissingFileError(f"Checkpoint {path} does not exist: check MODEL.WEIGHTS.")
        try:
            rest = super().load(path, checkpointables)
        finally:
            self._parsed_url_during_load = None  # or the next load of this object would fail
        if self.last_report is not None:
            check_fit(self.model, self.last_report, ENTRY in rest, path)
        return rest

    def has_checkpoint(self) -> bool:
        """True if there is something to resume from: a tag, or a checkpoint that a kill left
        without one."""
        return super().has_checkpoint() or bool(self._numbered_files())

    def resume_or_load(self, path: str, *, resume: bool = True) -> Dict[str, Any]:
        """Resume from the newest intact checkpoint of ``save_dir``, or load only the model.

        On several processes all load the file that the main process chose.

        Args:
            path: weights to start from when not resuming, or when there is nothing to resume.
            resume: go on with the run in ``save_dir``, all checkpointables included.

        Returns:
            as :meth:`load`.

        Raises:
            ValueError: resuming, and every checkpoint of the folder is damaged.
        """
        if self.save_dir and self.save_to_disk:
            removed = remove_stale(self.save_dir)
            if removed:
                self.logger.warning(
                    "Removed what killed writers left in %s: %s", self.save_dir, ", ".join(removed)
                )
        if not resume:
            return self.load(path, checkpointables=[])
        choice, error = "", ""
        if comm.is_main_process():
            try:
                choice = self._choose() if self.has_checkpoint() else ""
            except (ValueError, OSError) as exception:
                error = str(exception)
        if comm.get_world_size() > 1:
            choice, error = comm.all_gather((choice, error))[0]
        if error:
            raise ValueError(error)
        if not choice:
            return self.load(path, checkpointables=[])
        return self._resume(choice)

    def _resume(self, path: str) -> Dict[str, Any]:
        extra = self.load(path)
        if self._absent:
            self.logger.warning(
                "%s has no entry %s: what belongs there starts afresh.",
                path,
                ", ".join(sorted(self._absent)),
            )
        return extra

    def _choose(self) -> str:
        tagged = self.get_checkpoint_file() if super().has_checkpoint() else ""
        if tagged and os.path.basename(tagged) and is_intact(tagged):
            return tagged
        tagged = tagged if os.path.basename(tagged) else ""
        others = [file for file in self._numbered_files() if file != tagged and is_intact(file)]
        if others:
            newest = max(others, key=self._iteration)
            self.logger.warning(
                "%s is missing or damaged, so the run goes on from %s.",
                f"Checkpoint {tagged}, named in {_TAG}," if tagged else f"The file {_TAG}",
                newest,
            )
            return newest
        raise ValueError(
            f"Cannot resume in {self.save_dir}: {tagged or _TAG} is missing or damaged and there "
            "is no other intact checkpoint model_<iteration>.pth; start without --resume, or copy "
            "a checkpoint there."
        )

    def _numbered_files(self) -> List[str]:
        """model_<iteration>.pth and model_final.pth of the folder; no best or exported models."""
        if not self.save_dir:
            return []
        pattern = os.path.join(glob.escape(self.save_dir), "model_*.pth")
        return [p for p in glob.glob(pattern) if re.search(r"model_(\d+|final)\.pth$", p)]

    def _iteration(self, path: str) -> int:
        number = re.search(r"model_(\d+)\.pth$", path)
        if number:
            return int(number.group(1))
        stored = load_checkpoint_file(path, self.allow_unsafe).get("iteration", -1)
        return stored if isinstance(stored, int) else -1

    def _load_file(self, filename: str) -> Dict[str, Any]:
        if filename.endswith(".pkl"):
            data = self._zoo_format(filename)
        elif filename.endswith(".pyth"):
            data = self._pycls_format(filename)
        else:
            data = super()._load_file(filename)  # reads through _torch_load
        self._check_model_entry(data["model"], filename)
        check_entry(self.model, data, filename)
        self._absent = [key for key in self.checkpointables if key not in data]
        return data

    def _torch_load(self, f: str) -> Dict[str, Any]:
        data = load_checkpoint_file(f, self.allow_unsafe)
        if not isinstance(data, dict):
            raise ValueError(f"{f} holds a {type(data).__name__} instead of a dict of tensors.")
        return data

    def _zoo_format(self, filename: str) -> Dict[str, Any]:
        data = self._torch_load(filename)
        if "model" in data and "__author__" in data:
            self.logger.info("Reading a file from '%s'", data["__author__"])
            return data
        # Caffe2: detectors keep their weights in "blobs", classifiers at the top; momenta are
        # state of its optimizer.
        blobs = data.get("blobs", data)
        model = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
        return {"model": model, "__author__": "Caffe2", "matching_heuristics": True}

    def _pycls_format(self, filename: str) -> Dict[str, Any]:
        data = self._torch_load(filename)
        if "model_state" not in data:
            raise ValueError(
                f"{filename} has no entry model_state, which a pycls checkpoint (.pyth) must have; "
                "rename the file if it is another kind of checkpoint."
            )
        model = {
            key: value
            for key, value in data["model_state"].items()
            if not key.endswith("num_batches_tracked")
        }
        return {"model": model, "__author__": "pycls", "matching_heuristics": True}

    @staticmethod
    def _check_model_entry(model: Any, filename: str) -> None:
        if not isinstance(model, dict):
            raise ValueError(
                f"The entry model of {filename} is a {type(model).__name__}, not a state dict."
            )
        for key, value in model.items():
            if not isinstance(value, (torch.Tensor, np.ndarray)):
                raise ValueError(
                    f"{filename} is no Detectron2 checkpoint: {key} is a {type(value).__name__} "
                    "where a tensor is expected; tools/convert_weights.py converts checkpoints of "
                    "torchvision and mmdetection."
                )

    def _load_model(self, checkpoint: Dict[str, Any]) -> Any:
        statistics = {
            key: checkpoint["model"][key]
            for key in ("pixel_mean", "pixel_std")
            if key in checkpoint["model"]
        }
        incompatible = super()._load_model(checkpoint)
        mismatched = [tuple(entry) for entry in incompatible.incorrect_shapes]
        names = {name for name, _, _ in mismatched}
        missing = _filter_reused_missing_keys(self.model, incompatible.missing_keys)
        self.last_report = KeyReport(
            sorted(k for k in missing if k not in names and not is_exempt(k, self.model)),
            sorted(k for k in incompatible.unexpected_keys if not is_exempt(k, self.model)),
            sorted(mismatched),
        )
        self._compare_statistics(statistics)
        return incompatible

    def _compare_statistics(self, stored: Dict[str, Any]) -> None:
        # Old checkpoints hold the statistics they were trained with. The config decides, but a
        # difference usually means a config of another origin than the weights.
        for key, value in stored.items():
            ours = dict(self.model.named_buffers(recurse=False)).get(key)
            theirs = torch.as_tensor(value).detach().float().cpu().flatten()
            if ours is None or key in self.model.state_dict():
                continue
            ours = ours.detach().float().cpu().flatten()
            if ours.shape != theirs.shape or not torch.allclose(ours, theirs, atol=1e-2):
                self.logger.warning(
                    "The checkpoint was trained with %s %s, the config says %s: check "
                    "MODEL.PIXEL_MEAN, MODEL.PIXEL_STD and INPUT.FORMAT.",
                    key,
                    theirs.tolist(),
                    ours.tolist(),
                )


def _storable(value: Any, name: str) -> Any:
    """``value`` with numpy scalars as Python numbers and other odd types refused by name.

    ``torch.load(weights_only=True)`` reads a fixed set of types. What it would refuse at
    ``--resume`` must be refused when it is written, while the run can still be mended.
    """
    if isinstance(value, torch.Tensor):
        if type(value) not in (torch.Tensor, nn.Parameter):
            raise ValueError(_not_storable(value, name))
        return value
    if isinstance(value, (np.bool_, np.number, np.str_)) and not isinstance(value, np.longdouble):
        return value.item()
    if type(value) in (dict, defaultdict, OrderedDict, Counter):
        return _storable_dict(value, name)
    if type(value) in (list, tuple):
        return type(value)(_storable(entry, f"{name}[{i}]") for i, entry in enumerate(value))
    if type(value) is int and value.bit_length() < 2000:
        return value
    if type(value) in _PLAIN_TYPES:
        return value
    raise ValueError(_not_storable(value, name))


def _storable_dict(value: Dict[Any, Any], name: str) -> Dict[Any, Any]:
    plain = {
        _storable(key, f"a key of {name}"): _storable(entry, f"{name}[{key!r}]")
        for key, entry in value.items()
    }
    # A defaultdict holds a function; as a dict it has the same content.
    result = plain if type(value) in (dict, defaultdict) else type(value)(plain)
    if hasattr(value, "_metadata"):  # versions of the modules, an attribute of state dicts
        result._metadata = value._metadata
    return result


def _not_storable(value: Any, name: str) -> str:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    return (
        f"The checkpoint entry {name} is a {kind}, which cannot be read again without running code "
        "from the file: let the state_dict return tensors, numbers, strings and lists, tuples or "
        "dicts of them (a numpy array: torch.from_numpy, and back in load_state_dict)."
    )
