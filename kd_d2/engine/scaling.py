"""Automatic scaling of a config to the number of processes, distillation schedules included."""

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer

__all__ = ["auto_scale_workers"]


def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
    """Detectron2's ``auto_scale_workers``, which also scales every ``KD.<node>.SCHEDULE``.

    Iterations of a schedule are scaled like SOLVER.MAX_ITER, so that they keep their place in the
    run.

    Args:
        cfg: whole config; not modified.
        num_workers: number of processes of this run.

    Returns:
        the same config if SOLVER.REFERENCE_WORLD_SIZE is 0 or ``num_workers``, else a new one.
    """
    reference = cfg.SOLVER.REFERENCE_WORLD_SIZE
    scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
    if scaled is cfg:
        return cfg
    frozen = scaled.is_frozen()
    scaled.defrost()
    for node in scaled.KD.values():
        schedule = node.get("SCHEDULE") if isinstance(node, CfgNode) else None
        for key in ("START_ITER", "END_ITER", "WARMUP_ITERS") if schedule else ():
            if schedule[key] > 0:  # END_ITER -1: the whole run
                schedule[key] = int(round(schedule[key] * reference / num_workers))
    if frozen:
        scaled.freeze()
    return scaled
