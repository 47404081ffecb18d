"""Checkpoint files of any origin, read without running what is in them."""

import hashlib
import logging
import pickle
import re
import zipfile
from typing import Any

import torch
from detectron2.utils.file_io import PathManager

from kd_d2.checkpoint.restricted_pickle import ForbiddenGlobal, restricted_load

__all__ = ["MissingFileError", "UNSAFE_KEY", "file_sha256", "is_intact", "load_checkpoint_file"]

# The override that every refusal names.
UNSAFE_KEY = "KD.ALLOW_UNSAFE_LOAD"

_logger = logging.getLogger(__name__)


class MissingFileError(FileNotFoundError, ValueError):
    """A file named by the user does not exist: wrong input like any other ``ValueError``."""


class _Refused(ValueError):
    """The file is undamaged but needs more than is permitted."""


def load_checkpoint_file(path: str, allow_unsafe: bool = False) -> Any:
    """The object stored in a checkpoint file, on the CPU.

    - ``.pkl`` (Detectron2 and Caffe2 model zoo): arrays, strings, numbers and containers, see
      :mod:`kd_d2.checkpoint.restricted_pickle`;
    - ``.safetensors``: a dict of tensors; needs the package safetensors;
    - anything else (``.pth``, ``.pt``, ``.pyth``): ``torch.load(weights_only=True)``, after the
      checksums of the archive have been verified (torch itself does not look at them).

    Args:
        path: file, or any address that Detectron2's PathManager knows.
        allow_unsafe: read ``.pkl`` and torch files with the full pickle, which runs whatever
            program the file contains. ``KD.ALLOW_UNSAFE_LOAD``.

    Returns:
        what was saved, usually a dict; not checked further.

    Raises:
        MissingFileError: there is no such file.
        ValueError: the file is truncated or damaged, or it needs more than the above; the message
            names the file, the offending global and the key that goes on.
        ImportError: the file is ``.safetensors`` and the package is not installed.
    """
    if not PathManager.isfile(path):
        raise MissingFileError(
            f"Checkpoint {path} does not exist: check the path given as MODEL.WEIGHTS, "
            "KD.TEACHER.WEIGHTS or on the command line."
        )
    path = PathManager.get_local_path(path)
    if path.endswith(".safetensors"):
        return _load_safetensors(path)
    if allow_unsafe:
        _logger.warning("Loading %s with full pickle, because %s is True.", path, UNSAFE_KEY)
    if path.endswith(".pkl"):
        return _load_pickle(path, allow_unsafe)
    return _load_torch(path, allow_unsafe)


def is_intact(path: str) -> bool:
    """True if ``path`` is a complete, undamaged checkpoint of this library or Detectron2.

    Reads the whole file and verifies its checksums, without building tensors where it can.

    Args:
        path: local file; a missing one is not intact.
    """
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        load_checkpoint_file(path)  # the format before torch 1.6 has no checksums
    except _Refused:
        return True
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return False
    return True


def file_sha256(path: str) -> str:
    """Hexadecimal SHA-256 of a file's content, read in blocks of 1 MiB.

    Args:
        path: file, or any address that Detectron2's PathManager knows.
    """
    digest = hashlib.sha256()
    with open(PathManager.get_local_path(path), "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def _load_pickle(path: str, allow_unsafe: bool) -> Any:
    with open(path, "rb") as file:
        try:
            if allow_unsafe:
                return pickle.load(file, encoding="latin1")
            return restricted_load(file)
        except ForbiddenGlobal as error:
            raise _refusal(path, error.name) from error
        except (OSError, MemoryError):
            raise
        except Exception as error:  # a damaged pickle may ask for anything
            raise _damaged(path, error) from error


def _load_torch(path: str, allow_unsafe: bool) -> Any:
    archive = zipfile.is_zipfile(path)
    if archive and not is_intact(path):
        raise _damaged(path, "its checksums do not match")
    try:
        return torch.load(path, map_location="cpu", weights_only=not allow_unsafe)
    except pickle.UnpicklingError as error:
        needs = _what_it_needs(str(error))
        # The reader of weights knows part of pickle only: what it cannot read in an undamaged
        # archive needs more; in an unprotected file it may as well be damage.
        if not allow_unsafe and (archive or needs):
            raise _refusal(path, needs or "an instruction of pickle beyond tensors") from error
        raise _damaged(path, error) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise _damaged(path, error) from error


def _load_safetensors(path: str) -> Any:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"Reading {path} needs the package safetensors: run `pip install safetensors`, or "
            "convert the file to .pth."
        ) from error
    try:
        return load_file(path, device="cpu")
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _what_it_needs(message: str) -> str:
    found = re.search(
        r"(?:GLOBAL|class|instantiate|function)\s+`?([A-Za-z_]\w*(?:\.\w+)+)", message
    )
    return found.group(1) if found else ""


def _refusal(path: str, needs: str) -> ValueError:
    return _Refused(
        f"{path} was not loaded because it needs {needs}, which is neither a tensor, an array, a "
        f"number, a string nor a container of these; if you trust its origin as much as a program "
        f"you run, set {UNSAFE_KEY} True."
    )


def _damaged(path: str, cause: Any) -> ValueError:
    # The advice of torch to switch its protection off must not be passed on.
    reason = str(cause).strip().split("\n")[0][:200] or type(cause).__name__
    if reason.startswith("Weights only load failed"):
        reason = "its content is no saved data"
    return ValueError(
        f"{path} is truncated, damaged or not a checkpoint ({reason}); copy or download it again."
    )
