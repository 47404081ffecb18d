"""A subnet of the elastic pool as teacher (Sec. 3.1.3)."""

import logging
import random
from typing import Any, Dict, Iterable, List, Optional, Union

from detectron2.config import CfgNode, configurable
from detectron2.utils import comm
from torch import nn

from kd_d2.checkpoint import file_sha256
from kd_d2.distillation import TEACHER_REGISTRY, DetectorTeacher
from kd_d2.distillation.teacher import freeze

from .elastic_config import pool_of
from .extraction import CalibrationBatches, as_subnet, extract, recalibrate
from .subnet import Subnet
from .subnet_store import SubnetStore

__all__ = ["ElasticTeacher"]

logger = logging.getLogger(__name__)


@TEACHER_REGISTRY.register()
class ElasticTeacher(DetectorTeacher):
    """A frozen stand-alone subnet, which can be exchanged for another one of the same pool.

    Everything that :class:`DetectorTeacher` does, it does with the active subnet. ``keys`` are
    those of the active subnet; distillers read them when they are built, so one that shall outlive
    an exchange must go by the width of what it is given.

    Attributes:
        active: the subnet that teaches.
    """

    @configurable
    def __init__(
        self,
        *,
        model: nn.Module,
        pool_cfg: CfgNode,
        subnet: str = "largest",
        store: Optional[SubnetStore] = None,
        **options,
    ):
        """
        Args:
            model: the elastic supernet with its weights; is frozen here and moved to the CPU.
            pool_cfg: its config.
            subnet: code, "largest" or "smallest".
            store: where recalibrated subnets are kept; None: nowhere.
            options: further arguments of :class:`DetectorTeacher`.

        Raises:
            ValueError: the subnet is no part of the pool, or there are no images of which to
                estimate its statistics.
        """
        self._supernet, self._pool_cfg, self._store = freeze(model).cpu(), pool_cfg, store
        self._pool_classes = options.get("classes")
        self.active = as_subnet(subnet, pool_cfg)
        own_cfg, own = self._made(self.active)
        super().__init__(model=own, **options)
        self.cfg = own_cfg

    @classmethod
    def from_config(cls, cfg):
        arguments = super().from_config(cfg)
        node, pool_cfg = cfg.KD.TEACHER, arguments.pop("cfg")
        if node.ELASTIC.STORE and node.WEIGHTS:
            recalibration = pool_cfg.MODEL.ELASTIC_RESNET.RECALIBRATION
            source = {
                "weights": file_sha256(node.WEIGHTS),
                "data": list(pool_cfg.DATASETS.TRAIN),
                "resolutions": [list(size) for size in pool_cfg.INPUT.RESOLUTIONS],
                **{key.lower(): value for key, value in recalibration.items()},
            }
            arguments["store"] = SubnetStore(node.ELASTIC.STORE, source)
        return {**arguments, "pool_cfg": pool_cfg, "subnet": node.ELASTIC.SUBNET}

    def sample(self, generator: random.Random) -> Subnet:
        """Return a subnet of the pool's space; it is not made active."""
        return pool_of(self._pool_cfg)[1].sample(generator)

    def activate(self, subnet: Union[str, Subnet]) -> None:
        """Let ``subnet``, or the one of this code, teach from now on.

        It is taken from the store, or extracted, recalibrated and put there, by the main process
        if there are several: all of them have to call this.

        Raises:
            ValueError: it is no part of the pool.
        """
        subnet = as_subnet(str(subnet), self._pool_cfg)
        cfg, model = self._made(subnet)
        self.active, self.cfg = subnet, cfg
        self._hold(model)

    def recalibrate(self, loader: Iterable[List[Dict[str, Any]]]) -> None:
        """Estimate the statistics of the active subnet on other batches; they are not kept.

        Args:
            loader: lists of mapped images, a finite number.
        """
        _, model = extract(self._pool_cfg, self._supernet, self.active)
        recalibrate(model, loader)
        self._hold(model)

    def _made(self, subnet: Subnet):
        """Config and recalibrated model of a subnet."""
        cfg, model = extract(self._pool_cfg, self._supernet, subnet)
        if self._store is None:
            recalibrate(model, CalibrationBatches(self._pool_cfg))
            return cfg, model
        if comm.is_main_process() and self._store.read(subnet) is None:
            recalibrate(model, CalibrationBatches(self._pool_cfg))
            path = self._store.write(subnet, cfg, model, self._pool_classes)
            logger.info(f"Teacher: subnet {subnet} is kept in {path}")
        comm.synchronize()
        model.load_state_dict(self._store.read(subnet))
        return cfg, model

    def describe(self):
        parameters = sum(p.numel() for p in self.model.parameters()) / 1e6
        return f"{super().describe()}; subnet {self.active}, {parameters:.2f} M parameters"
