"""Files of stand-alone subnets: a config and a checkpoint that train_net.py and DetectorTeacher
read."""

import os
from typing import Any, Dict, Mapping, Optional, Sequence

from detectron2.config import CfgNode
from torch import Tensor, nn

from kd_d2.checkpoint import atomic_save, atomic_write, load_checkpoint_file
from kd_d2.checkpoint.architecture import architecture_entry

from .subnet import Subnet

__all__ = ["CONFIG", "WEIGHTS", "SubnetStore", "write_subnet"]

CONFIG, WEIGHTS = "config.yaml", "model.pth"


def write_subnet(
    folder: str,
    cfg: CfgNode,
    model: nn.Module,
    *,
    source: Mapping[str, Any],
    classes: Optional[Sequence[str]] = None,
) -> str:
    """Write a detector into ``folder``, which is made, and return the path of its checkpoint.

    Each file is complete or not there. The checkpoint is written last.

    Args:
        cfg: config of the detector.
        model: not fused.
        source: numbers and strings: what the subnet was made of. Kept as "pool".
        classes: class names.
    """
    os.makedirs(folder, exist_ok=True)
    with atomic_write(os.path.join(folder, CONFIG)) as file:
        file.write(cfg.dump().encode())
    path = os.path.join(folder, WEIGHTS)
    data = {"model": model.state_dict(), **architecture_entry(model), "pool": dict(source)}
    if classes:
        data["run_info"] = {"classes": list(classes)}
    atomic_save(data, path)
    return path


class SubnetStore:
    """A folder with a sub-folder for each subnet that was made of one pool."""

    def __init__(self, folder: str, source: Mapping[str, Any]):
        """
        Args:
            folder: made when the first subnet is written.
            source: numbers and strings: pool and way of recalibration. Files of another source are
                taken for missing, and replaced.
        """
        self.folder, self.source = folder, dict(source)

    def path(self, subnet: Subnet) -> str:
        """Return the path of the subnet's checkpoint, there or not."""
        return os.path.join(self.folder, str(subnet), WEIGHTS)

    def read(self, subnet: Subnet) -> Optional[Dict[str, Tensor]]:
        """Return the state dict of the subnet; None if it has to be made.

        Raises:
            ValueError: the file is damaged.
        """
        path = self.path(subnet)
        if not os.path.isfile(path):
            return None
        data = load_checkpoint_file(path)
        return data["model"] if data.get("pool") == self.source else None

    def write(self, subnet: Subnet, cfg: CfgNode, model: nn.Module, classes=None) -> str:
        """See :func:`write_subnet`."""
        folder = os.path.join(self.folder, str(subnet))
        return write_subnet(folder, cfg, model, source=self.source, classes=classes)
