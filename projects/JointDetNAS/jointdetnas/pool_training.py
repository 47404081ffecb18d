"""Integrated progressive shrinking: one subnet of the phase's space in every iteration (A.1.3)."""

from detectron2.config import CfgNode
from detectron2.engine import HookBase

from .elastic_config import pool_of
from .subnet import QUARTERS, iteration_generator
from .supernet import Supernet

__all__ = ["SubnetSampling", "check_phase"]


class SubnetSampling(HookBase):
    """Makes a subnet active before every step; the same one on all ranks, and after a restart.

    It is drawn with the run's seed and the number of the iteration, without communication. Logs
    ``pool/blocks`` and ``pool/width``, the mean of the stages' widths relative to the standard.
    """

    def __init__(self, supernet: Supernet, seed: int):
        """
        Args:
            supernet: of the model that is trained.
            seed: SEED of the config; a negative one counts as any other number here.
        """
        self._supernet, self._seed = supernet, seed

    def before_step(self):
        subnet = self._supernet.sample(iteration_generator(self._seed, self.trainer.iter))
        self._supernet.set_active(subnet)
        widths = sum(subnet.widths) / len(subnet.widths) / QUARTERS
        self.trainer.storage.put_scalar("pool/blocks", sum(subnet.depths))
        self.trainer.storage.put_scalar("pool/width", widths)

    def after_train(self):
        self._supernet.set_max()


def check_phase(cfg: CfgNode) -> None:
    """Raise ``ValueError`` where a phase of the pool's training cannot go on as configured."""
    geometry, space = pool_of(cfg)
    if space.largest != geometry.largest:
        raise ValueError(
            "MODEL.ELASTIC_RESNET.WIDTHS must contain MAX_WIDTH "
            f"({geometry.max_width}): every phase trains the supernet, too; got {space.widths}"
        )
    if len(space) > 1 and not cfg.KD.DDP_FIND_UNUSED:
        raise ValueError(
            "KD.DDP_FIND_UNUSED must be True where subnets are drawn: the blocks that they leave "
            "out get no gradient"
        )
    if cfg.TEST.PRECISE_BN.ENABLED:
        raise ValueError(
            "TEST.PRECISE_BN.ENABLED must be False: a supernet has no statistics of its own, those "
            "of subnets are estimated when they are evaluated"
        )
