"""Reading and writing of checkpoints and configs: complete files only, no code from files."""

from kd_d2.checkpoint.architecture import architecture_entry
from kd_d2.checkpoint.atomic import atomic_save, atomic_write, remove_stale
from kd_d2.checkpoint.checkpointer import KDCheckpointer
from kd_d2.checkpoint.fitting import load_weights
from kd_d2.checkpoint.report import KeyReport, compare
from kd_d2.checkpoint.safe_config import (
    load_yaml_config,
    merge_opts,
    read_config_file,
    unsafe_load_requested,
)
from kd_d2.checkpoint.safe_load import (
    UNSAFE_KEY,
    MissingFileError,
    file_sha256,
    load_checkpoint_file,
)

__all__ = [
    "KDCheckpointer",
    "KeyReport",
    "MissingFileError",
    "UNSAFE_KEY",
    "architecture_entry",
    "atomic_save",
    "atomic_write",
    "compare",
    "file_sha256",
    "load_checkpoint_file",
    "load_weights",
    "load_yaml_config",
    "merge_opts",
    "read_config_file",
    "remove_stale",
    "unsafe_load_requested",
]
