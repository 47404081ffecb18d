"""Files that are either complete or not there: write beside the target, sync, rename."""

import contextlib
import os
import uuid
from typing import Any, BinaryIO, Iterator, List

import torch

__all__ = ["atomic_save", "atomic_write", "remove_stale"]

# Ending of the temporary files; nothing else in an output folder is called like this.
_SUFFIX = ".kdtmp"


@contextlib.contextmanager
def atomic_write(path: str) -> Iterator[BinaryIO]:
    """A binary file that takes the place of ``path`` when the block ends without an exception.

    What is written goes to a temporary file in the same directory (a rename is atomic within one
    file system only). At the end of the block it is flushed and synced, renamed over ``path``, and
    the directory is synced, so that neither a kill nor a power cut leaves a partial ``path``: it
    is the old file or the new one. On an exception the temporary file is removed and ``path`` is
    what it was. A kill leaves the temporary file behind; see :func:`remove_stale`.

    Args:
        path: file to write. A symbolic link is followed, not replaced. Its directory must exist.

    Yields:
        binary file object, opened for writing.

    Raises:
        OSError: the directory is missing or not writable, or the disk is full.
    """
    path = os.path.realpath(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex[:12]}{_SUFFIX}")
    try:
        with open(temporary, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
    _sync_directory(folder)


def atomic_save(obj: Any, path: str) -> None:
    """``torch.save(obj, path)`` through :func:`atomic_write`.

    Args:
        obj: whatever ``torch.save`` takes.
        path: file to write.

    Raises:
        OSError: the file could not be written; ``path`` is what it was before.
    """
    try:
        with atomic_write(path) as file:
            torch.save(obj, file)
    except OSError as error:
        raise OSError(error.errno, _failed(path, error)) from error
    except RuntimeError as error:
        # A full disk reaches the archive writer of torch, which reports it in its own words.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise OSError(getattr(cause, "errno", None), _failed(path, cause)) from error


def remove_stale(directory: str) -> List[str]:
    """Remove the temporary files that killed writers left in ``directory``.

    Only call this where nobody else is writing: a live temporary file would go too.

    Args:
        directory: folder to clean; not searched recursively, may be missing.

    Returns:
        names of the removed files.
    """
    removed = []
    if not os.path.isdir(directory):
        return removed
    for name in sorted(os.listdir(directory)):
        if name.startswith(".") and name.endswith(_SUFFIX):
            with contextlib.suppress(OSError):
                os.remove(os.path.join(directory, name))
                removed.append(name)
    return removed


def _sync_directory(folder: str) -> None:
    # The rename itself is durable only once the directory is. Not every system or file system
    # can sync a directory; the file's content is safe without.
    flags = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _failed(path: str, cause: BaseException) -> str:
    return (
        f"Could not write {path} ({cause}): check the free space and the permissions of its "
        "folder; the previous version of the file, if any, is untouched."
    )
