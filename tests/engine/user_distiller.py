"""A distiller of a user's own, named in KD.IMPORTS: an adapter, a queue and random numbers."""

import torch
from detectron2.config import CfgNode as CN
from detectron2.config import configurable
from torch import nn

from kd_d2.config import CONFIG_NODES, add_schedule_config
from kd_d2.distillation import DISTILLER_REGISTRY, Distiller
from kd_d2.modeling.layers import reduce_mean


@CONFIG_NODES.register()
def add_queue_config(cfg):
    cfg.KD.QUEUE = CN()
    cfg.KD.QUEUE.WEIGHT = 1.0
    add_schedule_config(cfg.KD.QUEUE)


@DISTILLER_REGISTRY.register()
class Queue(Distiller):
    """Pulls the adapted mean feature towards the teacher's and to a queue of those seen before."""

    @configurable
    def __init__(self, *, channels, weight):
        super().__init__(
            weights={"mean": weight, "queue": weight},
            student_needs=["neck.p4"],
            teacher_needs=["neck.p4"],
        )
        self.adapter = nn.Conv2d(*channels, 1)
        self.register_buffer("queue", torch.zeros(4, channels[1]))

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        channels = student_keys["neck.p4"].channels, teacher_keys["neck.p4"].channels
        return {"channels": channels, "weight": cls.config_node(cfg).WEIGHT}

    def compute(self, ctx):
        ours = self.adapter(ctx.student["neck.p4"]).mean(dim=(0, 2, 3))
        theirs = ctx.teacher["neck.p4"].mean(dim=(0, 2, 3))
        noise = torch.rand_like(ours)
        losses = {
            "mean": ((ours - theirs) ** 2 * noise).mean(),
            "queue": ((ours - self.queue.clone()) ** 2).mean(),
        }
        # a checkpoint holds one queue for all ranks
        self.queue = torch.cat([self.queue[1:], reduce_mean(theirs)[None]])
        return losses
