"""What a search is: its config and its weights, fixed when its folder is made."""

import json
import os
import uuid
from typing import Any, Dict, Iterator, Sequence, Tuple

from detectron2.config import CfgNode

from kd_d2.checkpoint import atomic_write, file_sha256, load_yaml_config
from kd_d2.config import get_cfg

__all__ = ["CONFIG", "open_folder", "read_config"]

CONFIG, INPUTS = "search.yaml", "inputs.json"
# Keys that later workers may give otherwise: where files are, how much is done and how fast.
_FREE = (
    *("OUTPUT_DIR", "MODEL.WEIGHTS", "KD.TEACHER.CONFIG_FILE", "KD.TEACHER.WEIGHTS", "KD.IMPORTS"),
    *("SEARCH.MAX_TRIALS", "SEARCH.PATIENCE", "SEARCH.ATTEMPTS", "SEARCH.RESUME"),
    *("SEARCH.KEEP_ALL_WEIGHTS", "SEARCH.FINETUNE"),
    *("DATALOADER.NUM_WORKERS", "SOLVER.CHECKPOINT_PERIOD"),
)
# Files that stand for themselves by their content.
_FILES = ("MODEL.WEIGHTS", "KD.TEACHER.CONFIG_FILE", "KD.TEACHER.WEIGHTS")


def open_folder(cfg: CfgNode) -> None:
    """Make the folder of the search that ``cfg`` describes, or check that it is that of this one.

    Any number of workers may do this at the same time; the first one decides.

    Raises:
        ValueError: another search lives in OUTPUT_DIR; names the first key that differs.
    """
    folder = cfg.OUTPUT_DIR
    os.makedirs(folder, exist_ok=True)
    config = os.path.join(folder, CONFIG)
    _create(config, cfg.dump())
    stored = read_config(folder)
    ours, theirs = dict(_flat(cfg)), dict(_flat(stored))
    _compare(folder, ours, theirs, _FREE)
    _create(os.path.join(folder, INPUTS), json.dumps(_inputs(cfg), indent=1))
    with open(os.path.join(folder, INPUTS)) as file:
        _compare(folder, _inputs(cfg), json.load(file))
    if ours != theirs:
        # what may differ: other commands go by the latest
        with atomic_write(config) as file:
            file.write(cfg.dump().encode())


def read_config(folder: str) -> CfgNode:
    """The config of a search that has begun, with ``folder`` as OUTPUT_DIR.

    Raises:
        ValueError: there is none.
    """
    path = os.path.join(folder, CONFIG)
    if not os.path.isfile(path):
        raise ValueError(f"OUTPUT_DIR {folder} is not the folder of a search: it has no {CONFIG}")
    cfg = get_cfg()
    load_yaml_config(cfg, path)
    cfg.OUTPUT_DIR = folder
    return cfg


def _create(path: str, text: str) -> None:
    """Write a file that is not there yet; of several writers one wins."""
    temporary = f"{path}.{uuid.uuid4().hex}"
    with open(temporary, "x") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    finally:
        os.remove(temporary)


def _flat(node: CfgNode, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, CfgNode):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, _lists(value)


def _lists(value: Any) -> Any:
    """A YAML file knows no tuples."""
    return [_lists(v) for v in value] if isinstance(value, (list, tuple)) else value


def _inputs(cfg: CfgNode) -> Dict[str, str]:
    """Hashes of the files that the search starts from."""
    paths = dict(_flat(cfg))
    return {key: file_sha256(paths[key]) for key in _FILES if os.path.isfile(paths[key])}


def _compare(
    folder: str, ours: Dict[str, Any], theirs: Dict[str, Any], free: Sequence[str] = ()
) -> None:
    for key in sorted({*ours, *theirs}):
        if any(key == name or key.startswith(f"{name}.") for name in free):
            continue
        if ours.get(key) != theirs.get(key):
            raise ValueError(
                f"OUTPUT_DIR {folder} belongs to another search: {key} is {theirs.get(key)!r} "
                f"there and {ours.get(key)!r} here; give another folder, or the config it began "
                "with"
            )
