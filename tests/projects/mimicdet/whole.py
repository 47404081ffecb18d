"""A small MimicDet: 3 classes, ResNet-18, pyramid of 32 channels, heads of 48."""

import contextlib

import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from tests.fixtures import tiny_cfg

__all__ = ["losses_of", "mimicdet_cfg", "mimicdet_model"]

LEVELS = ["res2", "res3", "res4", "res5"]

_SMALL = {
    "MODEL.META_ARCHITECTURE": "MimicDet",
    "MODEL.BACKBONE.NAME": "build_mimicdet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": LEVELS,
    "MODEL.FPN.IN_FEATURES": LEVELS,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [[1.0]],
    "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
    "MODEL.PROPOSAL_GENERATOR.NAME": "RefinementModule",
    "MODEL.RPN.IN_FEATURES": ["p3", "p4", "p5", "p6", "p7"],
    "MODEL.RPN.NMS_THRESH": 0.8,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 0,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 0,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 100,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 60,
    "MODEL.ROI_HEADS.NAME": "MimicTHead",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.IOU_THRESHOLDS": [0.6],
    "MODEL.ROI_HEADS.PROPOSAL_APPEND_GT": False,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.005,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.6,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 5,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 48,
    "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
    "MODEL.MIMICDET.S_HEAD.FEAT_DIM": 48,
    "MODEL.MIMICDET.S_HEAD.CLS_TOPK": 16,
    "MODEL.MIMICDET.LOG_PERIOD": 1,
}
WITHOUT_P2 = {
    "MODEL.RESNETS.OUT_FEATURES": LEVELS[1:],
    "MODEL.FPN.IN_FEATURES": LEVELS[1:],
}


def mimicdet_cfg(**overrides):
    """Config of the detector; ``overrides`` are dotted keys of the whole config."""
    return tiny_cfg("GeneralizedRCNN", **{**_SMALL, **overrides})


def mimicdet_model(seed=0, lively=True, **overrides):
    """The detector in training mode.

    Args:
        seed: of its weights.
        lively: draw the S-head and the refinement with deviations at which predictions and offsets
            depend visibly on every layer; the refinement's regression stays small, so that some
            adjusted boxes overlap objects.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_model(mimicdet_cfg(**overrides)).train()
        if lively:
            _make_lively(model)
    return model


@torch.no_grad()
def _make_lively(model):
    for part in (model.s_head, model.t_head, model.refinement):
        for name, layer in part.named_modules() if part is not None else ():
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                layer.weight.normal_(std=layer.weight[0].numel() ** -0.5)
                if name.endswith("anchor_deltas"):
                    layer.weight.mul_(0.1)


@contextlib.contextmanager
def storage(iteration=0):
    with EventStorage(iteration) as events:
        yield events


def losses_of(model, batch, seed=0, iteration=0):
    """Training losses of one step and the scalars that were logged."""
    torch.manual_seed(seed)
    with storage(iteration) as events:
        losses = model(batch)
    return losses, {name: value for name, (value, _) in events.latest().items()}
