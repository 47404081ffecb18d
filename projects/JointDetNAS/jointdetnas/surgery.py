"""A student with another backbone and inherited weights.

Nothing is changed in place: the MorphResNet is built anew from its new architecture, everything
else is copied, and no tensor is shared with the parent. ``FPN`` keeps its convs in lists besides
registering them, so the copy keeps its modules and gets new weights in them.
"""

import contextlib
import copy
from typing import Dict, Iterable, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from .morph_resnet import MorphResNet, find_pyramid
from .space import Architecture, Block, Position

__all__ = [
    "InnerKey",
    "bottom_up_of",
    "evaluating",
    "layer_states",
    "pyramid_inputs",
    "rebuild",
    "select_channels",
]

# (stage, block, conv), all from 0; conv is one of those before the last of its block.
InnerKey = Tuple[int, int, int]
Indices = Union[Sequence[int], Tensor]
# Name inside a block, or the stem -> tensor.
LayerState = Dict[str, Tensor]
STEM = "stem"


def bottom_up_of(model: nn.Module) -> MorphResNet:
    """The MorphResNet inside a detector, or the model itself.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, MorphResNet):
            return module
    raise ValueError(
        "the student has no MorphResNet: set MODEL.BACKBONE.NAME to "
        "'build_morph_resnet_fpn_backbone'"
    )


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Eval mode inside, each module's own mode afterwards."""
    modes = [module.training for module in modules]
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for module, mode in zip(modules, modes):
            module.train(mode)


def layer_states(body: MorphResNet) -> Dict[Union[str, Position], LayerState]:
    """State dicts of the stem (key "stem") and of every block, not copied."""
    states: Dict[Union[str, Position], LayerState] = {STEM: dict(body.stem.state_dict())}
    for position in body.architecture.positions:
        states[position] = dict(body.block_at(position).state_dict())
    return states


def rebuild(
    model: nn.Module,
    architecture: Architecture,
    states: Mapping[Union[str, Position], LayerState],
    laterals: Optional[Mapping[str, Tensor]] = None,
) -> nn.Module:
    """Copy of ``model`` with a MorphResNet of another architecture.

    Args:
        model: a detector with a MorphResNet in it, or a MorphResNet.
        architecture: the new one.
        states: as from :func:`layer_states`, by position in the new architecture. They are copied.
        laterals: conv of the pyramid as path from it, e.g. "fpn_lateral3" -> its new weight
            (C_out,C_in,1,1); the others are copied.

    Returns:
        the new model, in the same mode, on the same device.

    Raises:
        RuntimeError: tensors are missing or of another shape than the architecture says.
    """
    body = bottom_up_of(model)
    with torch.device("meta"):
        new_body = MorphResNet(architecture, **body.options)
    state = {}
    for key, layers in states.items():
        prefix = STEM if key == STEM else f"res{key[0] + 2}.{key[1]}"
        state.update({f"{prefix}.{name}": t.detach().clone() for name, t in layers.items()})
    new_body.load_state_dict(state, strict=True, assign=True)
    new_body.train(body.training)
    if model is body:
        return new_body
    # whatever refers to the old backbone refers to the new one in the copy
    result = copy.deepcopy(model, {id(body): new_body})
    pyramid = find_pyramid(result)
    for name, weight in (laterals or {}).items():
        conv = pyramid.get_submodule(name)
        conv.weight = nn.Parameter(weight.detach().clone(), conv.weight.requires_grad)
        conv.in_channels = weight.shape[1]
    return result


def pyramid_inputs(model: nn.Module) -> Dict[str, str]:
    """Convs of the pyramid that read a map of the backbone -> name of that map.

    Laterals, and the conv of P6 if it reads C5.
    """
    pyramid = find_pyramid(model)
    if pyramid is None:
        return {}
    strides = pyramid.bottom_up.output_shape()
    result = {}
    for name in pyramid.in_features:
        level = strides[name].stride.bit_length() - 1
        result[f"fpn_lateral{level}"] = name
    top = pyramid.top_block
    if getattr(top, "in_feature", None) in strides and hasattr(top, "p6"):
        result["top_block.p6"] = top.in_feature
    return result


def select_channels(
    model: nn.Module,
    inner: Optional[Mapping[InnerKey, Indices]] = None,
    streams: Optional[Mapping[int, Indices]] = None,
) -> nn.Module:
    """Copy of a student with some of its channels, in the given order.

    A subset prunes, a permutation sorts (the function stays the same), a prefix extracts. The list
    of a stream slices the outputs of its source and of the last conv of each of its blocks, and the
    inputs of whatever reads it: the first conv and the shortcut of blocks, and the pyramid.

    Args:
        model: a detector with a MorphResNet in it, or a MorphResNet.
        inner: channels to keep of convs inside blocks; all of those that are not mentioned. Around
            a grouped conv both lists must name the same whole groups.
        streams: channels to keep of streams, by their number in ``Architecture.streams``; stream 0
            is that of the stem.

    Returns:
        the new model; its architecture says the new widths.

    Raises:
        ValueError: an empty or repeated selection, channels or keys that do not exist, groups that
            are cut, or streams of a detector without a pyramid.
    """
    body = bottom_up_of(model)
    if streams and model is not body and find_pyramid(model) is None:
        raise ValueError("channels of streams can be selected only below a feature pyramid")
    selection = _Selection(body.architecture, inner or {}, streams or {}, _device(body))
    states = layer_states(body)
    new_states: Dict[Union[str, Position], LayerState] = {
        STEM: _slice_layer(states[STEM], "conv1", selection.streams[0], None)
    }
    for position in body.architecture.positions:
        new_states[position] = selection.slice_block(position, states[position])
    laterals = {}
    for name, feature in pyramid_inputs(model).items():
        stage = int(feature[3:]) - 2
        last = (stage, body.architecture.depths[stage] - 1)
        kept = selection.streams[body.architecture.stream_of(last)]
        laterals[name] = find_pyramid(model).get_submodule(name).weight.index_select(1, kept)
    return rebuild(model, selection.architecture(), new_states, laterals)


def _device(body: MorphResNet) -> torch.device:
    return next(iter(body.state_dict().values())).device


def _slice_layer(
    state: LayerState, conv: str, outputs: Tensor, inputs: Optional[Tensor]
) -> LayerState:
    """The conv of that name and its norm with some outputs, and some inputs (None: all)."""
    result = {}
    for name, tensor in state.items():
        if not name.startswith(f"{conv}."):
            continue
        if tensor.dim() > 0:  # all but the counter of a batch norm
            tensor = tensor.index_select(0, outputs)
        if inputs is not None and tensor.dim() == 4:
            tensor = tensor.index_select(1, inputs)
        result[name] = tensor
    return result


class _Selection:
    """Checked index lists of all convs and streams of an architecture."""

    def __init__(
        self,
        old: Architecture,
        inner: Mapping[InnerKey, Indices],
        streams: Mapping[int, Indices],
        device: torch.device,
    ):
        self.old = old
        widths = {i: stream.width for i, stream in enumerate(old.streams)}
        self.streams = _checked(streams, widths, device, "stream")
        inner_widths = {
            (*p, conv): width
            for p in old.positions
            for conv, width in enumerate(old.block(p).channels[:-1])
        }
        self.inner = _checked(inner, inner_widths, device, "conv")
        for position in old.positions:
            self._check_groups(position)

    def _check_groups(self, position: Position) -> None:
        block = self.old.block(position)
        if block.groups == 1:
            return
        first, second = self.inner[(*position, 0)], self.inner[(*position, 1)]
        size = block.channels[0] // block.groups
        whole = len(first) % size == 0 and bool(
            ((first - first[::size].repeat_interleave(size)) == _ramp(first, size)).all()
            and (first[::size] % size == 0).all()
        )
        if not whole or not torch.equal(first, second):
            raise ValueError(
                f"stage {position[0] + 1} block {position[1] + 1} has {block.groups} groups: the "
                "same whole groups must be selected before and after its grouped conv"
            )

    def architecture(self) -> Architecture:
        old = self.old
        stages: List[List[Block]] = [[] for _ in old.stages]
        for position in old.positions:
            block = old.block(position)
            inner = tuple(
                len(self.inner[(*position, conv)]) for conv in range(len(block.channels) - 1)
            )
            out = len(self.streams[old.stream_of(position)])
            stages[position[0]].append(
                Block(
                    (*inner, out),
                    block.projection,
                    groups=block.groups * inner[0] // block.channels[0] if block.groups > 1 else 1,
                    age=block.age,
                )
            )
        return Architecture(tuple(map(tuple, stages)), len(self.streams[0]))

    def slice_block(self, position: Position, state: LayerState) -> LayerState:
        block = self.old.block(position)
        inputs = self.streams[self.old.input_stream_of(position)]
        outputs = self.streams[self.old.stream_of(position)]
        num_convs = len(block.channels)
        lists = [inputs, *(self.inner[(*position, c)] for c in range(num_convs - 1)), outputs]
        result = {}
        for conv in range(num_convs):
            grouped = block.groups > 1 and conv == 1
            result.update(
                _slice_layer(
                    *(state, f"conv{conv + 1}", lists[conv + 1]),
                    # inside a group all inputs stay
                    None if grouped else lists[conv],
                )
            )
        if block.projection:
            result.update(_slice_layer(state, "shortcut", outputs, inputs))
        return result


def _ramp(like: Tensor, size: int) -> Tensor:
    return torch.arange(size, device=like.device).repeat(len(like) // size)


def _checked(given: Mapping, widths: Mapping, device: torch.device, kind: str) -> Dict:
    unknown = set(given) - set(widths)
    if unknown:
        raise ValueError(f"there is no {kind} {sorted(unknown)[0]}, but {sorted(widths)}")
    result = {}
    for key, width in widths.items():
        kept = torch.as_tensor(given.get(key, range(width)), dtype=torch.long, device=device)
        if kept.dim() != 1 or not len(kept):
            raise ValueError(f"{kind} {key} would have no channel")
        if kept.min() < 0 or kept.max() >= width or len(kept.unique()) != len(kept):
            raise ValueError(
                f"the channels of {kind} {key} must be different numbers in 0..{width - 1}"
            )
        result[key] = kept
    return result


def kept_indices(width: int, removed: Iterable[int]) -> List[int]:
    """0..width-1 without ``removed``, ascending."""
    gone = set(removed)
    return [i for i in range(width) if i not in gone]
