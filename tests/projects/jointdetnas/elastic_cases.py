"""A small supernet that the tests of the teacher pool share: the specification's micro setting."""

import functools
import random

import torch
from detectron2.modeling import build_model

from kd_d2.projects.jointdetnas.elastic_config import pool_of
from kd_d2.projects.jointdetnas.supernet import Supernet
from tests.fixtures import tiny_cfg

ELASTIC = {
    "MODEL.BACKBONE.NAME": "build_elastic_resnet_fpn_backbone",
    "MODEL.ELASTIC_RESNET.DEPTHS": (2, 2, 3, 2),
    "MODEL.ELASTIC_RESNET.MIN_DEPTHS": (1, 1, 1, 1),
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 8,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 32,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": 32,
    "MODEL.FPN.NORM": "BN",
    "MODEL.RPN.HEAD_NAME": "ElasticRPNHead",
    "MODEL.ROI_BOX_HEAD.NAME": "ElasticBoxHead",
    "INPUT.RESOLUTIONS": ((96, 64), (128, 96)),
}


def elastic_cfg(**overrides):
    return tiny_cfg("GeneralizedRCNN", **{**ELASTIC, **overrides})


@functools.lru_cache(maxsize=None)
def _prototype(norm):
    """Random weights and statistics: every channel of every layer is seen in the outputs."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = build_model(elastic_cfg(**{"MODEL.FPN.NORM": norm}))
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.3)
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
            elif isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)):
                module.weight.normal_(std=module.weight[0].numel() ** -0.5)
                if module.bias is not None:
                    module.bias.normal_(std=0.1)
    return model.state_dict()


def supernet(norm="BN", **overrides):
    """Return (cfg, supernet in eval mode); equal arguments, equal weights."""
    cfg = elastic_cfg(**{"MODEL.FPN.NORM": norm, **overrides})
    model = build_model(cfg)
    model.load_state_dict(_prototype(norm))
    return cfg, Supernet.from_config(cfg, model.eval())


def codes(cfg, count, seed=0):
    """Smallest, largest and random subnets."""
    space = pool_of(cfg)[1]
    generator = random.Random(seed)
    return [space.smallest, space.largest] + [space.sample(generator) for _ in range(count)]


def image(seed=0, size=(64, 96), num=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 3, *size, generator=generator)


@torch.no_grad()
def outputs(model, x):
    """Values of all parts on one batch: stages, pyramid, RPN, box head and predictor."""
    stages = model.backbone.bottom_up(x)
    features = model.backbone(x)
    logits, deltas = model.proposal_generator.rpn_head([features[f"p{k}"] for k in range(2, 7)])
    pooled = features["p3"][:, :, :5, :5]
    embed = model.roi_heads.box_head(pooled)
    predictions = model.roi_heads.box_predictor(embed)
    return [*stages.values(), *features.values(), *logits, *deltas, embed, *predictions]


def assert_same_outputs(ours, theirs, rtol=1e-4):
    assert len(ours) == len(theirs)
    for number, (a, b) in enumerate(zip(ours, theirs)):
        assert a.shape == b.shape, number
        scale = b.abs().max().item()
        torch.testing.assert_close(a, b, atol=rtol * scale, rtol=0, msg=f"output {number}")
