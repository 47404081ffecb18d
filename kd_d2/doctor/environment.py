"""Facts about the environment, found also where half of it is missing.

Imports nothing but the standard library at the top: a broken installation is what it reports.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from typing import List, NamedTuple, Optional

__all__ = ["Fact", "describe_environment", "detectron2_origin"]

# module, distribution, what needs it
_OPTIONAL = (
    ("cv2", "opencv-python-headless", "drawing, videos"),
    ("matplotlib", "matplotlib", "figures"),
    ("sklearn", "scikit-learn", "digit-scenes"),
    ("safetensors", "safetensors", "export"),
    ("optuna", "optuna", "the search of Joint-DetNAS"),
)


class Fact(NamedTuple):
    """One line of the report.

    Attributes:
        name: what it is about.
        text: what was found.
        broken: nothing works without it.
    """

    name: str
    text: str
    broken: bool = False


def describe_environment() -> List[Fact]:
    """Python, PyTorch, torchvision, CUDA, Detectron2 and its origin, kd_d2, optional packages."""
    return [
        Fact("python", f"{platform.python_version()} ({sys.executable}), {platform.platform()}"),
        *_torch(),
        _module("torchvision", "install the torchvision that belongs to this torch"),
        _detectron2(),
        _kd_d2(),
        _optional(),
    ]


def _module(name: str, mend: str) -> Fact:
    try:
        module = importlib.import_module(name)
    except Exception as error:
        return Fact(name, _not_importable(error, mend), broken=True)
    return Fact(name, f"{module.__version__} ({os.path.dirname(module.__file__)})")


def _not_importable(error: Exception, mend: str) -> str:
    return f"CANNOT BE IMPORTED ({type(error).__name__}: {error}); {mend}"


def _torch() -> List[Fact]:
    fact = _module("torch", "install PyTorch, see https://pytorch.org/get-started/locally")
    if fact.broken:
        return [fact]
    import torch

    built = torch.version.cuda
    text = f"not used: this PyTorch is built without it; {os.cpu_count()} CPUs"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        text = f"{built}, cuDNN {torch.backends.cudnn.version()}, devices: {', '.join(names)}"
    elif built:
        text = f"not used: PyTorch is built with {built} but finds no device (driver?)"
    return [fact, Fact("CUDA", f"{text}; {torch.get_num_threads()} threads")]


def _detectron2() -> Fact:
    mend = "run `python tools/install_detectron2.py`, or build it from its own repository"
    fact = _module("detectron2", mend)
    if fact.broken:
        return fact
    return fact._replace(text=f"{fact.text}: {detectron2_origin()}; {_compiled()}")


def _compiled() -> str:
    if importlib.util.find_spec("detectron2._C") is None:
        return "no compiled operators (none are needed)"
    try:
        importlib.import_module("detectron2._C")
    except ImportError as error:
        return f"its compiled operators do not load ({error}): build it for this PyTorch"
    return "with compiled operators"


def detectron2_origin() -> str:
    """Say where the imported Detectron2 comes from, in a few words."""
    import detectron2

    distribution = _distribution_of(detectron2.__file__, "detectron2")
    if distribution is None:
        return "not installed, imported from this folder"
    if distribution.read_text("PROVENANCE.txt"):
        return "the repackaged copy that tools/install_detectron2.py installs"
    source = _direct_url(distribution)
    return f"a build of its own repository{f' ({source})' if source else ''}"


def _distribution_of(file: str, name: str) -> Optional[importlib.metadata.Distribution]:
    """The installed distribution that ``file`` belongs to; None if it belongs to none."""
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    installed = str(distribution.locate_file(f"{name}/__init__.py"))
    if os.path.exists(installed):
        return distribution if os.path.samefile(installed, file) else None
    source = _direct_url(distribution)  # editable: the files stay where they are
    return distribution if source and file.startswith(source.replace("file://", "")) else None


def _direct_url(distribution: importlib.metadata.Distribution) -> str:
    """Where pip took it from, if not from an index."""
    return json.loads(distribution.read_text("direct_url.json") or "{}").get("url", "")


def _kd_d2() -> Fact:
    import kd_d2
    import kd_d2.projects

    folder = os.path.dirname(os.path.abspath(kd_d2.__file__))
    checkout = os.path.isfile(os.path.join(os.path.dirname(folder), "setup.cfg"))
    kind = "a checkout" if checkout else "an installed copy, without configs and tools"
    return Fact("kd_d2", f"{kd_d2.__version__} ({folder}): {kind}")


def _optional() -> Fact:
    found, missing = [], []
    for module, package, purpose in _OPTIONAL:
        if importlib.util.find_spec(module) is None:
            missing.append(f"{package} MISSING ({purpose}; pip install {package})")
            continue
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:  # e.g. opencv-python in its place
            found.append(module)
    return Fact("optional", ", ".join([*found, *missing]))
