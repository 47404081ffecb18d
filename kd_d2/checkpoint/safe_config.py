"""Config files and command-line overrides, merged with errors that name the place and the mend."""

import difflib
import logging
import os
import re
from typing import Any, Dict, Iterator, List, NoReturn, Optional, Sequence, Tuple

import yaml
from detectron2.config import CfgNode, downgrade_config, upgrade_config
from detectron2.config.compat import guess_version
from detectron2.utils.file_io import PathManager

from kd_d2.checkpoint.safe_load import UNSAFE_KEY, MissingFileError

__all__ = ["load_yaml_config", "merge_opts", "read_config_file", "unsafe_load_requested"]

_BASE_KEY = "_BASE_"
# The same loader in C, where PyYAML was built with it: ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_logger = logging.getLogger(__name__)


def read_config_file(path: str, allow_unsafe: bool = False) -> Dict[str, Any]:
    """The content of a YAML config with its ``_BASE_`` files merged below it.

    ``_BASE_`` is one path or a list of paths (later ones win), absolute, starting with ``~``, a
    http(s) address, or relative to the file that names it, as in Detectron2.

    Args:
        path: file, or any address that Detectron2's PathManager knows.
        allow_unsafe: also construct arbitrary Python objects (``!!python/...``), which can run any
            program. ``KD.ALLOW_UNSAFE_LOAD``.

    Returns:
        nested dict, without ``_BASE_``.

    Raises:
        MissingFileError: the file, or one of its bases, does not exist.
        ValueError: no valid YAML, not a mapping, a Python tag, a base that includes itself, or a
            key that is a node in one file and a value in the other.
    """
    return _read(path, allow_unsafe, ())


def load_yaml_config(cfg: CfgNode, path: str, allow_unsafe: bool = False) -> None:
    """``cfg.merge_from_file(path)`` with safe YAML and errors that help.

    Detectron2 silently runs Python tags; this refuses them (see :func:`read_config_file`). Files
    of an older ``VERSION`` are upgraded as Detectron2 does. On an error ``cfg`` is unchanged.

    Args:
        cfg: config that is changed in place.
        path: YAML file.
        allow_unsafe: see :func:`read_config_file`.

    Raises:
        MissingFileError: see :func:`read_config_file`.
        ValueError: as there; or a key that ``cfg`` lacks (all are listed, with the closest ones
            it has), a value of another type than the present one, or a VERSION from the future.
    """
    loaded = CfgNode(read_config_file(path, allow_unsafe))
    version = loaded.get("VERSION", None)
    if version is None:
        version = guess_version(loaded, path)
    if not isinstance(version, int) or not 1 <= version <= cfg.VERSION:
        raise ValueError(
            f"{path}: VERSION {version!r} is not supported, this Detectron2 reads versions 1 to "
            f"{cfg.VERSION}."
        )
    if version < cfg.VERSION:
        _logger.warning("%s has VERSION %d, upgraded to %d.", path, version, cfg.VERSION)
        merged = downgrade_config(cfg, to_version=version)
        _merge(merged, loaded, path)
        merged = upgrade_config(merged)
        cfg.clear()
        cfg.update(merged)
        return
    _merge(cfg.clone(), loaded, path)  # first on a copy: an error leaves cfg as it was
    cfg.merge_from_other_cfg(loaded)


def merge_opts(cfg: CfgNode, opts: Optional[Sequence[Any]]) -> None:
    """``cfg.merge_from_list(opts)`` with errors that help. On an error ``cfg`` is unchanged.

    Args:
        cfg: config that is changed in place.
        opts: KEY VALUE KEY VALUE ...; strings are read as Python literals where they are some.

    Raises:
        ValueError: a key without a value, an unknown key (with the closest ones there are), or a
            value of another type than the present one.
    """
    opts = list(opts or ())
    for entry in opts[0::2]:
        if not isinstance(entry, str) or "=" in entry:
            raise ValueError(
                f"Override {entry!r} is not the name of a config key: write KEY VALUE pairs "
                "separated by spaces, e.g. SOLVER.BASE_LR 0.01."
            )
    if len(opts) % 2:
        raise ValueError(
            f"Overrides are KEY VALUE pairs, but {opts[-1]!r} at their end has no value: "
            f"{' '.join(map(str, opts))}"
        )
    known = dict(_flatten(cfg))
    unknown = [key for key in opts[0::2] if not _has(cfg, key) and not _has_moved(cfg, key)]
    if unknown:
        _raise_unknown("the command line", unknown, list(known))
    merged = cfg.clone()
    merged.defrost()
    for key, value in zip(opts[0::2], opts[1::2]):
        try:
            merged.merge_from_list([key, value])
        except (ValueError, KeyError, AssertionError) as error:
            _raise_type("the command line", error, key)
    cfg.merge_from_list(opts)


def unsafe_load_requested(opts: Optional[Sequence[Any]]) -> bool:
    """True if the overrides set ``KD.ALLOW_UNSAFE_LOAD True``.

    Needed before the config file is read; a file cannot permit itself.

    Args:
        opts: KEY VALUE KEY VALUE ..., as for :func:`merge_opts`.
    """
    opts = list(opts or ())
    values = [value for key, value in zip(opts[0::2], opts[1::2]) if key == UNSAFE_KEY]
    return bool(values) and str(values[-1]) == "True"


def _read(path: str, allow_unsafe: bool, above: Tuple[str, ...]) -> Dict[str, Any]:
    if os.path.realpath(path) in map(os.path.realpath, above):
        raise ValueError(f"{path} includes itself through {_BASE_KEY}: {' -> '.join(above)}.")
    if not PathManager.isfile(path):
        by = f", named as {_BASE_KEY} in {above[-1]}," if above else ""
        raise MissingFileError(f"Config file {path}{by} does not exist.")
    config = _read_one(path, allow_unsafe)
    bases = config.pop(_BASE_KEY, [])
    merged: Dict[str, Any] = {}
    for base in bases if isinstance(bases, list) else [bases]:
        _overlay(merged, _read(_resolve(base, path), allow_unsafe, (*above, path)), path, "")
    _overlay(merged, config, path, "")
    return merged


def _read_one(path: str, allow_unsafe: bool) -> Dict[str, Any]:
    with PathManager.open(path, "r") as file:
        text = file.read()
    try:
        config = yaml.load(text, _LOADER)  # safe either way
    except yaml.constructor.ConstructorError as error:
        if not allow_unsafe:
            raise ValueError(_unsafe_tag(path, error)) from error
        _logger.warning("Loading %s with Python tags, because %s is True.", path, UNSAFE_KEY)
        config = yaml.unsafe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if config is None:
        return {}
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__} instead of KEY: VALUE lines.")
    return config


def _unsafe_tag(path: str, error: yaml.constructor.ConstructorError) -> str:
    found = re.search(r"tag '([^']+)'", str(error.problem))
    if found is None:
        return f"{path} is not valid YAML: {' '.join(str(error).split())}."
    tag = found.group(1).replace("tag:yaml.org,2002:", "!!")
    line = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
    return (
        f"{path} was not loaded because its tag {tag}{line} runs Python code: write the value out, "
        f"or, if you trust the file as much as a program you run, set {UNSAFE_KEY} True."
    )


def _resolve(base: str, path: str) -> str:
    if not isinstance(base, str):
        raise ValueError(f"{path}: {_BASE_KEY} must be a path or a list of paths, got {base!r}.")
    base = os.path.expanduser(base) if base.startswith("~") else base
    if base.startswith(("/", "http://", "https://")):
        return base
    return os.path.join(os.path.dirname(path), base)


def _overlay(below: Dict[str, Any], above: Dict[str, Any], path: str, prefix: str) -> None:
    for key, value in above.items():
        if isinstance(value, dict) and key in below:
            if not isinstance(below[key], dict):
                raise ValueError(
                    f"{path}: {prefix}{key} is a node, but {below[key]!r} in its {_BASE_KEY}."
                )
            _overlay(below[key], value, path, f"{prefix}{key}.")
        else:
            below[key] = value


def _merge(cfg: CfgNode, loaded: CfgNode, path: str) -> None:
    cfg.defrost()
    unknown = list(_unknown_keys(loaded, cfg, cfg, ""))
    if unknown:
        _raise_unknown(path, unknown, [key for key, _ in _flatten(cfg)])
    try:
        cfg.merge_from_other_cfg(loaded)
    except (ValueError, KeyError, AssertionError) as error:
        _raise_type(path, error)


def _unknown_keys(loaded: CfgNode, cfg: CfgNode, root: CfgNode, prefix: str) -> Iterator[str]:
    for key, value in loaded.items():
        name = f"{prefix}{key}"
        if key not in cfg:
            if not cfg.is_new_allowed() and not _has_moved(root, name):
                yield name
        elif isinstance(value, CfgNode) and isinstance(cfg[key], CfgNode):
            yield from _unknown_keys(value, cfg[key], root, f"{name}.")


def _has_moved(root: CfgNode, name: str) -> bool:
    # Deprecated and renamed keys have messages of their own in yacs.
    return name in root.__dict__[CfgNode.DEPRECATED_KEYS] or root.key_is_renamed(name)


def _has(cfg: CfgNode, name: str) -> bool:
    node: Any = cfg
    for part in name.split("."):
        if not isinstance(node, CfgNode) or part not in node:
            return False
        node = node[part]
    return True


def _flatten(cfg: CfgNode, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    for key, value in cfg.items():
        yield f"{prefix}{key}", value
        if isinstance(value, CfgNode):
            yield from _flatten(value, f"{prefix}{key}.")


def _raise_unknown(place: str, unknown: List[str], known: List[str]) -> NoReturn:
    lines = []
    for key in unknown:
        upper = key.upper()
        close = [name for name in known if name.split(".")[-1] == upper.split(".")[-1]]
        close = difflib.get_close_matches(upper, close, n=2, cutoff=0.3)
        close += difflib.get_close_matches(upper, known, n=3, cutoff=0.7)
        close = list(dict.fromkeys(close))[:3]
        lines.append(f"{key} (did you mean {' or '.join(close)}?)" if close else key)
    raise ValueError(
        f"Config keys in {place} that do not exist: {'; '.join(lines)}. A node that belongs to a "
        "project exists only after the project's add_config function was called."
    )


def _raise_type(place: str, error: BaseException, key: str = "") -> NoReturn:
    found = re.fullmatch(
        r"Type mismatch \(<class '(.+?)'> vs\. <class '(.+?)'>\) with values \((.*) vs\. (.*)\) "
        r"for config key: (.+)",
        str(error),
        flags=re.DOTALL,
    )
    if found is None:
        text = error.args[0] if error.args else error
        raise ValueError(f"{place}: {key + ': ' if key else ''}{text}") from error
    expected, got, old, new, key = found.groups()
    expected, got = (name.split(".")[-1].replace("CfgNode", "node") for name in (expected, got))
    if expected == "node":
        mend = "give the keys of the node"
    elif (expected, got) == ("float", "int"):
        mend = f"write {new}.0"
    elif expected == "str":
        mend = f"write it in quotes, \"'{new}'\" on a command line"
    else:
        mend = f"the default is {old}"
    raise ValueError(
        f"{place}: {key} must be of type {expected}, but {new} is of type {got} ({mend})."
    ) from error
