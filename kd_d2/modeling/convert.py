"""Foreign checkpoints in the names of this library and Detectron2.

Pure functions on state dicts. Known are torchvision's classifiers (ResNet, MobileNetV2, Swin
Transformer, VGG16), a bare ResNet of Detectron2, and mmdetection's RetinaNet, FCOS, GFL and ATSS
with a ResNet or Swin Transformer.
Nothing is dropped silently: every key of the source ends up in :attr:`Conversion.used`,
:attr:`Conversion.dropped` (with the reason) or :attr:`Conversion.unused`.
"""

import re
from dataclasses import dataclass, field, replace
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor

__all__ = [
    "VGG_VARIANTS",
    "Comparison",
    "Conversion",
    "RETINANET_ANCHOR_ORDER",
    "compare_with_model",
    "convert_detectron2",
    "convert_mmdetection",
    "convert_torchvision",
    "fill_from_model",
    "permute_anchors",
    "unwrap_state_dict",
]

# How a torchvision VGG16 was trained, see convert_torchvision.
VGG_VARIANTS = ("auto", "features", "v1")

# Anchor j of Detectron2 (sizes outer, ratios inner loop) is this anchor of mmdetection (ratios
# outer, sizes inner loop), for 3 sizes and 3 ratios.
RETINANET_ANCHOR_ORDER = (0, 3, 6, 1, 4, 7, 2, 5, 8)

_CLASSIFIER = "the source's classification layer, which a backbone does not have"
_COUNTER = "counts batches and is not used; a model that has it starts from 0"


@dataclass(frozen=True)
class Conversion:
    """A converted state dict and what became of each key.

    Attributes:
        source: what the input was recognised as, e.g. "torchvision ResNet".
        state_dict: target key -> tensor.
        used: source key -> target key.
        dropped: source key -> why it is not needed.
        unused: source keys that nothing is known about.
        filled: target keys that the source lacks and that were set to 0.
        absent: regular expressions of target keys that such a source never has.
    """

    source: str
    state_dict: Dict[str, Tensor]
    used: Dict[str, str] = field(default_factory=dict)
    dropped: Dict[str, str] = field(default_factory=dict)
    unused: Tuple[str, ...] = ()
    filled: Tuple[str, ...] = ()
    absent: Tuple[str, ...] = ()

    def report(self) -> List[str]:
        """One line per key: used, dropped (with the reason), filled, unused."""
        lines = [f"used     {old} -> {new}" for old, new in self.used.items()]
        lines += [f"dropped  {old}: {why}" for old, why in self.dropped.items()]
        lines += [f"filled   {new} with 0" for new in self.filled]
        lines += [f"unused   {old}" for old in self.unused]
        return lines


@dataclass(frozen=True)
class Comparison:
    """How a converted state dict fits a model.

    Attributes:
        missing: keys of the model that are not there although such a source should have them.
        initial: keys of the model that such a source never has; they stay as initialised.
        unexpected: converted keys that the model does not have.
        mismatched: key -> (converted shape, shape in the model).
    """

    missing: Tuple[str, ...]
    initial: Tuple[str, ...]
    unexpected: Tuple[str, ...]
    mismatched: Dict[str, Tuple[Tuple[int, ...], Tuple[int, ...]]]

    @property
    def fits(self) -> bool:
        """Nothing is missing, unexpected or of another shape."""
        return not (self.missing or self.unexpected or self.mismatched)

    def report(self) -> List[str]:
        """One line per key that is not simply loaded."""
        lines = [f"initial     {key}: stays as initialised" for key in self.initial]
        lines += [f"missing     {key}" for key in self.missing]
        lines += [f"unexpected  {key}" for key in self.unexpected]
        lines += [
            f"mismatched  {key}: {got} converted, {want} in the model"
            for key, (got, want) in self.mismatched.items()
        ]
        return lines


@dataclass(frozen=True)
class _Rule:
    """Source keys that match ``pattern`` as a whole become ``target`` (a template, or a function
    of the match), their tensors ``transform(tensor)``."""

    pattern: str
    target: object
    transform: Optional[Callable[[Tensor], Tensor]] = None


def _stage(match, template: str, stage: int) -> str:
    return match.expand(template).replace("{stage}", str(stage))


def _resnet_rules(source: str, target: str, last: str) -> List[_Rule]:
    # torchvision and mmdetection share these names. ``last`` stands before the blocks of res5.
    source = re.escape(source)
    prefixes = {stage: f"{target}res{stage}." for stage in (2, 3, 4)} | {5: last}

    def stage(template):
        return lambda m: prefixes[int(m.group(1)) + 1] + m.expand(template)

    block = source + r"layer([1-4])\.(\d+)\."
    return [
        _Rule(source + r"conv1\.(weight)", target + r"stem.conv1.\1"),
        _Rule(source + r"bn1\.(\w+)", target + r"stem.conv1.norm.\1"),
        _Rule(block + r"conv(\d)\.(weight)", stage(r"\2.conv\3.\4")),
        _Rule(block + r"bn(\d)\.(\w+)", stage(r"\2.conv\3.norm.\4")),
        _Rule(block + r"downsample\.0\.(weight)", stage(r"\2.shortcut.\3")),
        _Rule(block + r"downsample\.1\.(\w+)", stage(r"\2.shortcut.norm.\3")),
    ]


# Layers of torchvision's VGG16 that have parameters, and its standard deviations, RGB of 0..255.
_VGG16_CONVS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_IMAGENET_STD = (58.395, 57.12, 57.375)


def _vgg16_rules(target: str, from_classifier: bool) -> List[_Rule]:
    same = _Rule(r"(features\.\d+\.(?:weight|bias))", target + r"\1")
    if not from_classifier:
        return [same]

    def divided(weight):
        return weight / weight.new_tensor(_IMAGENET_STD).view(1, 3, 1, 1)

    # Every third row and column of fc6's 7x7 taps, every fourth of its 4096 outputs; fc7 likewise.
    return [
        _Rule(r"features\.0\.weight", target + "features.0.weight", divided),
        same,
        _Rule(
            r"classifier\.0\.weight",
            target + "features.31.weight",
            lambda fc6: fc6.view(4096, 512, 7, 7)[::4, :, ::3, ::3],
        ),
        _Rule(
            r"classifier\.3\.weight",
            target + "features.33.weight",
            lambda fc7: fc7.view(4096, 4096, 1, 1)[::4, ::4],
        ),
        _Rule(
            r"classifier\.([03])\.bias",
            lambda m: target + f"features.{31 if m.group(1) == '0' else 33}.bias",
            lambda bias: bias[::4],
        ),
    ]


def _convert_vgg16(state_dict: Mapping[str, Tensor], prefix: str, variant: str) -> Conversion:
    if variant not in VGG_VARIANTS:
        raise ValueError(f"The variant of VGG16 must be one of {VGG_VARIANTS}, got {variant!r}")
    classifier = state_dict.get("classifier.0.weight")
    if variant == "auto":
        usable = classifier is not None and bool(classifier.isfinite().all())
        variant = "v1" if usable else "features"
    if variant == "v1" and classifier is None:
        raise ValueError("Variant 'v1' of VGG16 needs the classifier, which the source lacks")
    drops = [(r"classifier\.6\.\w+", _CLASSIFIER)]
    prefix_pattern = re.escape(prefix)
    absent = [prefix_pattern + r"(l2norm|extras)\..*", f"(?!{prefix_pattern}).*"]
    if variant == "features":
        drops.append((r"classifier\.[03]\.\w+", "not valid in Caffe's weights"))
        absent.append(prefix_pattern + r"features\.3[13]\.(weight|bias)")
    return _apply(
        f"torchvision VGG16 ({variant})",
        state_dict,
        _vgg16_rules(prefix, variant == "v1"),
        drops,
        absent=tuple(absent),
    )


def _mobilenet_v2_rules(target: str) -> List[_Rule]:
    return [_Rule(r"(features\..*)", target + r"\1")]


def _square(index: Tensor) -> Tensor:
    # torchvision stores the (N*N,) constant relative_position_index flat.
    side = round(index.numel() ** 0.5)
    return index.reshape(side, side)


def _torchvision_swin_rules(target: str) -> List[_Rule]:
    # features.0 embeds patches; 1, 3, 5, 7 are the stages, 2, 4, 6 merge patches in between. Both
    # libraries concatenate the four patches in the same order, so no weight changes.
    def stage(template):
        return lambda m: target + _stage(m, template, (int(m.group(1)) - 1) // 2)

    def merge(template):
        return lambda m: target + _stage(m, template, int(m.group(1)) // 2 - 1)

    block = r"features\.([1357])\.(\d+)\."
    same = r"(norm[12]\.\w+|attn\.(?:qkv|proj)\.\w+|attn\.relative_position_bias_table)"
    return [
        _Rule(r"features\.0\.0\.(\w+)", target + r"patch_embed.proj.\1"),
        _Rule(r"features\.0\.2\.(\w+)", target + r"patch_embed.norm.\1"),
        _Rule(block + same, stage(r"layers.{stage}.blocks.\2.\3")),
        _Rule(
            block + r"attn\.relative_position_index",
            stage(r"layers.{stage}.blocks.\2.attn.relative_position_index"),
            _square,
        ),
        _Rule(block + r"mlp\.0\.(\w+)", stage(r"layers.{stage}.blocks.\2.mlp.fc1.\3")),
        _Rule(block + r"mlp\.3\.(\w+)", stage(r"layers.{stage}.blocks.\2.mlp.fc2.\3")),
        _Rule(
            r"features\.([246])\.(reduction|norm)\.(\w+)", merge(r"layers.{stage}.downsample.\2.\3")
        ),
        _Rule(r"norm\.(\w+)", target + r"norm3.\1"),
    ]


def _unfold_to_concat(channels_outer: Tensor) -> Tensor:
    """Reorder the inputs (last dimension, 4*C) of a patch merging layer.

    mmdetection gathers the 2x2 patches by ``unfold``: for each channel (0,0), (0,1), (1,0),
    (1,1). Detectron2 concatenates whole patches in the order (0,0), (1,0), (0,1), (1,1).
    """
    shape = channels_outer.shape
    by_patch = channels_outer.reshape(*shape[:-1], -1, 4)[..., [0, 2, 1, 3]]
    return by_patch.transpose(-1, -2).reshape(shape)


def _mmdetection_swin_rules(target: str) -> List[_Rule]:
    block = r"backbone\.stages\.(\d)\.blocks\.(\d+)\."
    to = target + r"layers.\1.blocks.\2."
    return [
        _Rule(r"backbone\.patch_embed\.projection\.(\w+)", target + r"patch_embed.proj.\1"),
        _Rule(r"backbone\.patch_embed\.norm\.(\w+)", target + r"patch_embed.norm.\1"),
        _Rule(block + r"(norm[12]\.\w+)", to + r"\3"),
        _Rule(block + r"attn\.w_msa\.(.+)", to + r"attn.\3"),
        _Rule(block + r"ffn\.layers\.0\.0\.(\w+)", to + r"mlp.fc1.\3"),
        _Rule(block + r"ffn\.layers\.1\.(\w+)", to + r"mlp.fc2.\3"),
        _Rule(
            r"backbone\.stages\.(\d)\.downsample\.((?:reduction|norm)\.\w+)",
            target + r"layers.\1.downsample.\2",
            _unfold_to_concat,
        ),
        _Rule(r"backbone\.norm(\d)\.(\w+)", target + r"norm\1.\2"),
    ]


def permute_anchors(tensor: Tensor, order: Sequence[int] = RETINANET_ANCHOR_ORDER) -> Tensor:
    """Reorder the anchors that the output channels of a predictor belong to.

    Args:
        tensor: (A*D, ...), weight or bias, D numbers per anchor.
        order: for each new anchor its index before.

    Returns:
        Tensor of the same shape.

    Raises:
        ValueError: the channels are no multiple of the number of anchors.
    """
    if tensor.shape[0] % len(order):
        raise ValueError(
            f"A predictor with {tensor.shape[0]} channels does not have {len(order)} anchors"
        )
    by_anchor = tensor.reshape(len(order), -1, *tensor.shape[1:])
    return by_anchor[list(order)].reshape(tensor.shape)


def _mmdetection_head_rules(kind: str, tower_norm: bool) -> List[_Rule]:
    # A stage of a tower is conv, (norm,) ReLU; the sequential numbers them through.
    step = 3 if tower_norm else 2
    towers = {"cls": "cls_subnet", "reg": "bbox_subnet"}
    predictors = {"cls": "cls_score", "reg": "bbox_pred", "centerness": "ctrness"}

    def tower(m):
        index = step * int(m.group(2)) + (m.group(3) == "gn")
        return f"head.{towers[m.group(1)]}.{index}.{m.group(4)}"

    return [
        _Rule(r"bbox_head\.(cls|reg)_convs\.(\d+)\.(conv|gn)\.(weight|bias)", tower),
        # The first half of the name changed between versions: fcos_cls, conv_cls.
        _Rule(
            r"bbox_head\.[a-z]+_(cls|reg|centerness)\.(weight|bias)",
            lambda m: f"head.{predictors[m.group(1)]}.{m.group(2)}",
            permute_anchors if kind == "RetinaNet" else None,
        ),
        _Rule(r"bbox_head\.scales\.(\d+)\.scale", r"head.scales.\1.scale"),
    ]


def _neck_rules() -> List[_Rule]:
    return [
        _Rule(
            r"neck\.lateral_convs\.(\d)\.conv\.(weight|bias)",
            lambda m: f"backbone.fpn_lateral{int(m.group(1)) + 3}.{m.group(2)}",
        ),
        _Rule(
            r"neck\.fpn_convs\.([012])\.conv\.(weight|bias)",
            lambda m: f"backbone.fpn_output{int(m.group(1)) + 3}.{m.group(2)}",
        ),
        _Rule(
            r"neck\.fpn_convs\.([34])\.conv\.(weight|bias)",
            lambda m: f"backbone.top_block.p{int(m.group(1)) + 3}.{m.group(2)}",
        ),
    ]


def _apply(
    source: str,
    state_dict: Mapping[str, Tensor],
    rules: Sequence[_Rule],
    drops: Sequence[Tuple[str, str]],
    absent: Tuple[str, ...] = (),
) -> Conversion:
    result: Dict[str, Tensor] = {}
    used: Dict[str, str] = {}
    dropped: Dict[str, str] = {}
    unused: List[str] = []
    drops = [*drops, (r".*\.num_batches_tracked", _COUNTER)]
    for key, tensor in state_dict.items():
        reason = next((why for pattern, why in drops if re.fullmatch(pattern, key)), None)
        if reason is not None:
            dropped[key] = reason
            continue
        for rule in rules:
            match = re.fullmatch(rule.pattern, key)
            if match:
                target = rule.target(match) if callable(rule.target) else match.expand(rule.target)
                if target in result:
                    other = next(old for old, new in used.items() if new == target)
                    raise ValueError(f"Both {other} and {key} would become {target}")
                result[target] = rule.transform(tensor) if rule.transform else tensor
                # Own memory, so that a view does not save its whole base.
                result[target] = result[target].detach().clone().contiguous()
                used[key] = target
                break
        else:
            unused.append(key)
    return Conversion(source, result, used, dropped, tuple(unused), absent=absent)


def unwrap_state_dict(checkpoint: Mapping) -> Dict[str, Tensor]:
    """The state dict in a loaded checkpoint.

    Args:
        checkpoint: a state dict, or a mapping that holds one as "state_dict" (mmdetection) or
            "model". The prefix "module." of data-parallel training is removed.

    Raises:
        ValueError: there is none.
    """
    for name in ("state_dict", "model"):
        if isinstance(checkpoint.get(name), Mapping):
            checkpoint = checkpoint[name]
            break
    if not checkpoint or not all(isinstance(value, Tensor) for value in checkpoint.values()):
        raise ValueError(
            "The checkpoint is neither a state dict nor does it hold one as 'state_dict' or "
            f"'model'; it has {sorted(map(str, checkpoint))[:10]}"
        )
    if all(key.startswith("module.") for key in checkpoint):
        return {key[len("module.") :]: value for key, value in checkpoint.items()}
    return dict(checkpoint)


def convert_torchvision(
    state_dict: Mapping[str, Tensor],
    prefix: Optional[str] = None,
    res5: str = "",
    vgg_variant: str = "auto",
) -> Conversion:
    """Convert a torchvision classifier to the names of a backbone.

    ResNet of any depth becomes Detectron2's ResNet (set ``MODEL.RESNETS.STRIDE_IN_1X1 False``),
    MobileNetV2 and Swin Transformer (version 1) become those of
    :mod:`kd_d2.modeling.backbone`. The family is recognised by its keys. All of them expect RGB
    images normalised with mean (123.675, 116.28, 103.53) and std (58.395, 57.12, 57.375).

    VGG16 becomes SSD's, which expects RGB images minus that mean and std 1. Of its two forms
    "features" (``VGG16_Weights.IMAGENET1K_FEATURES``) has Caffe's weights, which are of that
    convention; its classifier is not valid, so conv6 and conv7 stay as initialised. "v1"
    (``IMAGENET1K_V1``) was trained with the std, which goes into the first weights, exactly; conv6
    and conv7 are every third tap and every fourth channel of its classifier (Chen et al., DeepLab).

    Args:
        state_dict: torchvision's.
        prefix: of the target keys; "" for a bare backbone, None for that of a detector:
            "backbone.", and "backbone.bottom_up." for backbones below a pyramid.
        res5: of the target keys of a ResNet's last stage if that is elsewhere: for detectors with a
            C4 head "roi_heads.res5." (and ``prefix`` "backbone.").
        vgg_variant: "features", "v1", or "auto": "v1" if there is a classifier of finite values.

    Raises:
        ValueError: the keys are of no known family, ``res5`` is given for another than ResNet, or
            the variant of VGG16 is unknown.
    """
    if res5 and "layer1.0.conv1.weight" not in state_dict:
        raise ValueError(f"only a ResNet has a last stage that could become '{res5}'")
    convs = {f"features.{i}.{name}" for i in _VGG16_CONVS for name in ("weight", "bias")}
    if {key for key in state_dict if key.startswith("features.")} == convs:
        return _convert_vgg16(state_dict, "backbone." if prefix is None else prefix, vgg_variant)
    prefix = "backbone.bottom_up." if prefix is None else prefix
    # A classifier says nothing about the rest of a detector.
    own = "|".join(re.escape(p) for p in (prefix, res5) if p)
    outside = (f"(?!{own}).*",) if prefix else ()
    head = [(r"(fc|head|classifier\.\d+)\.\w+", _CLASSIFIER)]
    if "layer1.0.conv1.weight" in state_dict:
        rules = _resnet_rules("", prefix, res5 or prefix + "res5.")
        return _apply("torchvision ResNet", state_dict, rules, head, absent=outside)
    if "features.1.0.attn.relative_position_bias_table" in state_dict:
        # Maps of the earlier stages are not normalised in a classifier.
        norms = (re.escape(prefix) + r"norm[012]\.(weight|bias)",)
        return _apply(
            "torchvision Swin Transformer",
            state_dict,
            _torchvision_swin_rules(prefix),
            head,
            absent=norms + outside,
        )
    if "features.1.conv.0.0.weight" in state_dict and "features.18.0.weight" in state_dict:
        return _apply(
            "torchvision MobileNetV2", state_dict, _mobilenet_v2_rules(prefix), head, absent=outside
        )
    raise ValueError(
        "Not a torchvision ResNet, MobileNetV2, Swin Transformer or VGG16; the first keys are "
        f"{list(state_dict)[:5]}"
    )


def convert_detectron2(
    state_dict: Mapping[str, Tensor], prefix: Optional[str] = None, res5: str = ""
) -> Conversion:
    """Convert Detectron2's ResNet alone, with or without a classifier, to a detector's backbone.

    The detector needs the same MODEL.RESNETS, and the images that the classifier was trained on.

    Args:
        state_dict: of ``detectron2.modeling.backbone.resnet.ResNet``.
        prefix, res5: see :func:`convert_torchvision`.

    Raises:
        ValueError: the keys are not those of such a network.
    """
    if "stem.conv1.weight" not in state_dict or "res2.0.conv1.weight" not in state_dict:
        raise ValueError(f"Not a bare ResNet of Detectron2; the keys are {list(state_dict)[:5]}")
    prefix = "backbone.bottom_up." if prefix is None else prefix
    last = res5 or prefix + "res5."
    rules = [
        _Rule(r"((?:stem|res[234])\..*)", prefix + r"\1"),
        _Rule(r"res5\.(.*)", last + r"\1"),
    ]
    drops = [(r"linear\.\w+", _CLASSIFIER)]
    own = "|".join(re.escape(p) for p in (prefix, res5) if p)
    absent = (f"(?!{own}).*",) if prefix else ()
    return _apply("Detectron2 ResNet", state_dict, rules, drops, absent=absent)


def convert_mmdetection(state_dict: Mapping[str, Tensor]) -> Conversion:
    """Convert an mmdetection RetinaNet, FCOS, GFL or ATSS to the names of this library.

    The detector is recognised by the names of its predictors. RetinaNet's predictors are
    reordered from mmdetection's anchors to Detectron2's, see ``RETINANET_ANCHOR_ORDER``. Set
    ``MODEL.FPN.P6_SOURCE`` and ``P7_RELU`` as in the source: the names do not tell.

    Args:
        state_dict: mmdetection's, of version 1 to 3.

    Raises:
        ValueError: detector or backbone are none of these, or RetinaNet has not 9 anchors.
    """
    kinds = {
        "retina_cls": "RetinaNet",
        "gfl_cls": "GFL",
        "atss_cls": "ATSS",
        "conv_cls": "FCOS",
        "fcos_cls": "FCOS",
    }
    found = [k for name, k in kinds.items() if f"bbox_head.{name}.weight" in state_dict]
    if len(found) != 1:
        raise ValueError(
            "Not an mmdetection RetinaNet, FCOS, GFL or ATSS: expected bbox_head.X.weight with "
            f"one X of {list(kinds)}, got "
            f"{[key for key in state_dict if key.startswith('bbox_head.')][:10]}"
        )
    kind = found[0]
    if kind == "RetinaNet":
        boxes = state_dict["bbox_head.retina_reg.weight"].shape[0]
        if boxes != 4 * len(RETINANET_ANCHOR_ORDER):
            raise ValueError(
                f"bbox_head.retina_reg.weight has {boxes} channels; only RetinaNet with 3 sizes "
                f"times 3 ratios can be converted, which has {4 * len(RETINANET_ANCHOR_ORDER)}"
            )
    target = "backbone.bottom_up."
    if "backbone.layer1.0.conv1.weight" in state_dict:
        family, backbone = "ResNet", _resnet_rules("backbone.", target, target + "res5.")
    elif "backbone.patch_embed.projection.weight" in state_dict:
        family, backbone = "Swin Transformer", _mmdetection_swin_rules(target)
    else:
        raise ValueError(
            "The backbone is neither mmdetection's ResNet nor its Swin Transformer; it has "
            f"{[key for key in state_dict if key.startswith('backbone.')][:5]}"
        )
    tower_norm = any(re.match(r"bbox_head\.cls_convs\.\d+\.gn\.", key) for key in state_dict)
    rules = backbone + _neck_rules() + _mmdetection_head_rules(kind, tower_norm)
    drops = [(r"bbox_head\.integral\.project", "the constants 0, 1, 2, ... of the bins")]
    return _apply(f"mmdetection {kind} with {family}", state_dict, rules, drops)


def fill_from_model(conversion: Conversion, model_state: Mapping[str, Tensor]) -> Conversion:
    """Add what the model has, the source lacks and is known to be 0.

    These are biases of convs whose source has none, and the batch counters of batch norms.

    Args:
        conversion: result of a conversion.
        model_state: state dict of the model to be loaded.

    Returns:
        The conversion with more keys; the argument is not changed.
    """
    result = dict(conversion.state_dict)
    filled = []
    for key, value in model_state.items():
        owner, _, name = key.rpartition(".")
        weight = result.get(f"{owner}.weight")
        if key in result or weight is None:
            continue
        if (name == "bias" and weight.dim() == 4) or name == "num_batches_tracked":
            result[key] = torch.zeros_like(value, device="cpu")
            filled.append(key)
    return replace(conversion, state_dict=result, filled=conversion.filled + tuple(filled))


def compare_with_model(conversion: Conversion, model_state: Mapping[str, Tensor]) -> Comparison:
    """Compare keys and shapes of a conversion with those of the model to be loaded.

    Args:
        conversion: result of a conversion, after :func:`fill_from_model`.
        model_state: state dict of the model.
    """
    lacking = [key for key in model_state if key not in conversion.state_dict]
    initial = [key for key in lacking if any(re.fullmatch(p, key) for p in conversion.absent)]
    shapes = {
        key: (tuple(value.shape), tuple(model_state[key].shape))
        for key, value in conversion.state_dict.items()
        if key in model_state
    }
    return Comparison(
        missing=tuple(key for key in lacking if key not in set(initial)),
        initial=tuple(initial),
        unexpected=tuple(key for key in conversion.state_dict if key not in model_state),
        mismatched={key: pair for key, pair in shapes.items() if pair[0] != pair[1]},
    )
