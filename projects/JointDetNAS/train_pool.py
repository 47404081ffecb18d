#!/usr/bin/env python
"""Train the elastic teacher pool, one phase after the other, or take a subnet out of it.

The options of training are those of train_net.py, also with several GPUs and machines, torchrun,
--resume and --eval-only, which evaluates MODEL.ELASTIC_RESNET.EVAL_SUBNETS. With --extract CODE,
the subnet of the pool in MODEL.WEIGHTS is written to the folder --output as a detector of its own,
with recalibrated batch norm: config.yaml and model.pth, for train_net.py --eval-only or as a
teacher.
"""

import logging
import os
from collections import OrderedDict
from typing import Any, Callable, Dict

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from torch import nn

from kd_d2.checkpoint import KDCheckpointer, file_sha256
from kd_d2.engine import KDTrainer, launch
from kd_d2.engine.main import check, setup, short_errors
from kd_d2.engine.random_state import preserve_random_state
from kd_d2.projects.jointdetnas.elastic_config import pool_of
from kd_d2.projects.jointdetnas.extraction import (
    CalibrationBatches,
    as_subnet,
    extract,
    recalibrate,
)
from kd_d2.projects.jointdetnas.pool_training import SubnetSampling, check_phase
from kd_d2.projects.jointdetnas.sorting import sort_channels
from kd_d2.projects.jointdetnas.subnet_store import WEIGHTS, write_subnet
from kd_d2.projects.jointdetnas.supernet import Supernet

logger = logging.getLogger("kd_d2.train_pool")


class PoolTrainer(KDTrainer):
    """KDTrainer for an elastic student, of which every step trains another subnet.

    Attributes:
        supernet: the student as a supernet.
    """

    def __init__(self, cfg: CfgNode):
        check_phase(cfg)
        super().__init__(cfg)

    def build_hooks(self):
        self.supernet = Supernet.from_config(self.cfg, self.student)
        hooks = super().build_hooks()
        if len(self.supernet.space) == 1:
            return hooks
        return [SubnetSampling(self.supernet, self.cfg.SEED), *hooks]

    def resume_or_load(self, resume: bool = True):
        """Resume, or load MODEL.WEIGHTS and then sort the channels if the phase begins so."""
        super().resume_or_load(resume=resume)
        node = self.cfg.MODEL.ELASTIC_RESNET
        if node.SORT_CHANNELS and self.start_iter == 0:
            moved = sort_channels(self.supernet, node.SORT_KEEP_WIDTHS)
            logger.info(f"Sorted the channels of the supernet: {moved} moved")

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators=None) -> Dict[str, Any]:
        """Return ``{subnet: results}`` of recalibrated subnets; of a phase that trains but the
        supernet, the results of the supernet as it is."""
        if len(pool_of(cfg)[1]) == 1:
            return super().test(cfg, model, evaluators)
        results: Dict[str, Any] = OrderedDict()
        for name in cfg.MODEL.ELASTIC_RESNET.EVAL_SUBNETS:
            with preserve_random_state():
                subnet_cfg, subnet = _recalibrated(cfg, model, name)
                logger.info(f"Evaluating the subnet {as_subnet(name, cfg)} ({name})")
                results[name] = super().test(subnet_cfg, subnet)
        return results


def _recalibrated(cfg: CfgNode, model: nn.Module, name: str):
    """Config and model of a subnet, on every rank the same."""
    subnet_cfg, subnet = extract(cfg, model, as_subnet(name, cfg))
    recalibrate(subnet, CalibrationBatches(cfg))
    return subnet_cfg, subnet


def _load(cfg: CfgNode, resume: bool = False):
    model = PoolTrainer.build_student(cfg)
    Supernet.from_config(cfg, model)
    checkpointer = KDCheckpointer(model, cfg.OUTPUT_DIR, allow_unsafe=cfg.KD.ALLOW_UNSAFE_LOAD)
    return model, checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)


def _extract(cfg: CfgNode, code: str, output: str) -> str:
    """Write the subnet to the folder ``output`` and return the path of its checkpoint."""
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("--extract takes a subnet out of a pool: give its file as MODEL.WEIGHTS")
    subnet = as_subnet(code, cfg)
    model, rest = _load(cfg)
    subnet_cfg, own = _recalibrated(cfg, model, str(subnet))
    subnet_cfg.OUTPUT_DIR = output
    path = os.path.join(output, WEIGHTS)
    if comm.is_main_process():
        classes = (rest.get("run_info") or {}).get("classes")
        source = {"weights": file_sha256(cfg.MODEL.WEIGHTS), "subnet": str(subnet)}
        write_subnet(output, subnet_cfg, own, source=source, classes=classes)
        logger.info(f"Wrote the subnet {subnet} to {path}")
    return path


def prepare(args) -> Callable[[], Any]:
    """Build everything, so that the user's mistakes are found here; return the job.

    Raises:
        ValueError, FileNotFoundError: config, data, weights or teacher do not fit together.
    """
    cfg = setup(args)
    for name in cfg.MODEL.ELASTIC_RESNET.EVAL_SUBNETS:
        as_subnet(name, cfg)
    if args.extract:
        return lambda: _extract(cfg, args.extract, args.output)
    if args.eval_only:
        model, _ = _load(cfg, args.resume)
        return lambda: PoolTrainer.test(cfg, model)
    trainer = PoolTrainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train


def run(args):
    with short_errors():
        job = prepare(args)
    return job()


def parser():
    result = default_argument_parser()
    result.add_argument("--extract", metavar="CODE", default="", help="subnet to take out")
    result.add_argument("--output", metavar="FOLDER", default="", help="where it is written")
    return result


def cli() -> None:
    args = parser().parse_args()
    with short_errors():
        if bool(args.extract) != bool(args.output):
            raise ValueError("--extract and --output belong together: give both or none")
        cfg = check(args)
    launch(run, args, main_args=(args,), device=cfg.MODEL.DEVICE)


if __name__ == "__main__":
    cli()
