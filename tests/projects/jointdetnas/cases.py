"""Small students: Faster R-CNN with a pyramid above a MorphResNet whose batch norms differ."""

from typing import Any, Dict, List

import torch
from torch import nn

from kd_d2.projects.jointdetnas.morph_resnet import MorphResNet
from tests.fixtures import tiny_cfg, tiny_model

# four widths per stage, all different, so that a mix-up of channels is an error of shapes
BASIC = "[(8,8)-(6,8)],[(10,12)-(9,12)-(7,12)],[(14,16)-(13,16)],[(18,20)-(17,20)]"
BOTTLENECK = (
    "[(4,5,16)-(6,7,16)],[(6,5,24)-(7,8,24)-(5,6,24)],[(8,7,28)-(6,9,28)],[(9,8,36)-(7,6,36)]"
)
# an identity at the border of stage 3, and a projection further back: one stream over two stages
MOVED = "[(4,5,16)-(6,7,16)],[(6,5,24)-(7,8,24)],[(8,7,28)-(6,9,28)],[(5,4,28)-(9,8,36)-(7,6,36)]"
GROUPED = (
    "[(8,8,16)g4-(8,8,16)g2],[(12,12,24)g4-(6,6,24)g3],[(8,8,28)g2-(6,9,28)],[(9,8,36)-(7,6,36)]"
)
# the second block of stage 2 projects although its widths are equal
FORCED = "[(4,5,16)-(6,7,16)],[(6,5,24)-(7,8,24)p-(5,6,24)],[(8,7,28)-(6,9,28)],[(9,8,36)-(7,6,36)]"
ALL = {
    "basic": BASIC,
    "bottleneck": BOTTLENECK,
    "moved": MOVED,
    "grouped": GROUPED,
    "forced": FORCED,
}

STEM = 8
_MORPH = {
    "MODEL.BACKBONE.NAME": "build_morph_resnet_fpn_backbone",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": STEM,
    "MODEL.RESNETS.NORM": "BN",
    "MODEL.FPN.OUT_CHANNELS": 12,
}


def morph_options(encoding: str, **more: Any) -> Dict[str, Any]:
    return {**_MORPH, "MODEL.MORPH_RESNET.ENCODING": encoding, **more}


def student_cfg(encoding: str = BOTTLENECK, **more: Any):
    return tiny_cfg("GeneralizedRCNN", **morph_options(encoding, **more))


def student(encoding: str = BOTTLENECK, seed: int = 0, **more: Any) -> nn.Module:
    """The detector, in eval mode, with batch norms as after some training."""
    if encoding.startswith("[") and "-" not in encoding:
        encoding = f'"{encoding}"'  # or the config would read a tuple
    model = tiny_model("GeneralizedRCNN", seed, **morph_options(encoding, **more))
    randomise_norms(model, seed)
    return model.eval()


@torch.no_grad()
def randomise_norms(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)

    def uniform(like, low, high):
        return low + (high - low) * torch.rand(like.shape, generator=generator)

    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            sign = torch.where(uniform(module.weight, 0, 1) < 0.2, -1.0, 1.0)
            module.weight.copy_(sign * uniform(module.weight, 0.3, 1.2))
            module.bias.copy_(uniform(module.bias, -0.3, 0.3))
            module.running_mean.copy_(uniform(module.bias, -0.2, 0.2))
            module.running_var.copy_(uniform(module.bias, 0.5, 1.5))
        elif isinstance(module, nn.Conv2d) and module.bias is not None:
            module.bias.copy_(uniform(module.bias, -0.3, 0.3))  # zero when initialised


def bottom_up(model: nn.Module) -> MorphResNet:
    return model.backbone.bottom_up


def images(height: int = 96, width: int = 128, count: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, height, width, generator=generator)


@torch.no_grad()
def pyramid(model: nn.Module, x: torch.Tensor, training: bool = False) -> Dict[str, torch.Tensor]:
    """Outputs of the backbone; its mode and statistics are as before afterwards."""
    state = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    mode = model.backbone.training
    result = model.backbone.train(training)(x)
    model.backbone.train(mode)
    model.backbone.load_state_dict(state)
    return result


def relative_difference(a: Dict[str, torch.Tensor], b: Dict[str, torch.Tensor]) -> float:
    """Largest difference of two pyramids over the largest magnitude of the first."""
    assert a.keys() == b.keys()
    assert all(a[k].shape == b[k].shape for k in a)
    return max(((a[k] - b[k]).abs().max() / a[k].abs().max()).item() for k in a)


def detections(model: nn.Module, height: int = 97, width: int = 131) -> List[Any]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)
    with torch.no_grad():
        return model.eval()([{"image": image, "height": height, "width": width}])
