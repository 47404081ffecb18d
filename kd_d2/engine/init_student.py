"""``KD.INIT_STUDENT``: parts of the student that are copied from the teacher, maybe for good.

Copying a whole head and freezing it is G-DetKD's "head transfer". The prefixes are then
("proposal_generator.rpn_head", "roi_heads").
"""

from typing import Dict, Iterable, List, Mapping, Sequence, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from kd_d2.distillation import KeyInfo

__all__ = [
    "FrozenStatistics",
    "check_inheritance",
    "check_unchanged",
    "copy_from_teacher",
    "freeze_prefixes",
    "inherited_names",
]

# Heads that "roi_heads" does not mean: teachers often have them, students of boxes seldom.
_OTHER_HEADS = ("roi_heads.mask_", "roi_heads.keypoint_")

# The same weights mean something else unless both networks agree on this: beginning of names ->
# {key of the tap: (what it says, config keys)}. Of keys with stages, e.g. "roi.box[2]", all count.
_AGREEMENTS: Dict[str, Dict[str, Tuple[str, str]]] = {
    "proposal_generator.rpn_head.": {
        "anchors": ("anchor cells (RPN)", "MODEL.ANCHOR_GENERATOR, MODEL.RPN.IN_FEATURES"),
        "rpn.box": ("box weights of the RPN", "MODEL.RPN.BBOX_REG_WEIGHTS"),
    },
    "roi_heads.": {
        "roi.feat": (
            "resolution and type of the RoI pooler",
            "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION, POOLER_TYPE",
        ),
        "roi.box": (
            "box weights of the RoI head",
            "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS, MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS",
        ),
        "roi.cls": ("number of classes, with background", "MODEL.ROI_HEADS.NUM_CLASSES"),
    },
    "head.bbox_pred.": {
        "anchors": ("anchor cells", "MODEL.ANCHOR_GENERATOR"),
        "codec": ("box codec", "BBOX_REG_WEIGHTS of the head"),
    },
}


def inherited_names(names: Iterable[str], prefixes: Sequence[str]) -> List[str]:
    """Return those of ``names`` that start with a prefix.

    Mask and keypoint heads are meant only by a prefix of their own, e.g. "roi_heads.mask_head".
    """
    result = []
    for name in names:
        head = next((h for h in _OTHER_HEADS if name.startswith(h)), "")
        if any(name.startswith(prefix) and prefix.startswith(head) for prefix in prefixes):
            result.append(name)
    return result


def freeze_prefixes(cfg: CfgNode, student: nn.Module) -> None:
    """Exclude what ``KD.INIT_STUDENT.FREEZE`` names from training; before the optimizer exists."""
    node = cfg.KD.INIT_STUDENT
    if cfg.KD.ENABLED and node.FREEZE:
        parameters = dict(student.named_parameters())
        for name in inherited_names(parameters, node.PREFIXES):
            parameters[name].requires_grad_(False)


def check_inheritance(
    prefixes: Sequence[str],
    student: Mapping[str, torch.Tensor],
    teacher: Mapping[str, torch.Tensor],
    student_keys: Mapping[str, KeyInfo],
    teacher_keys: Mapping[str, KeyInfo],
    networks: Tuple[nn.Module, nn.Module] = (nn.Module(), nn.Module()),
) -> None:
    """Raise unless the teacher's parts fit the student and mean the same there.

    Args:
        prefixes: KD.INIT_STUDENT.PREFIXES.
        student, teacher: state dicts.
        student_keys, teacher_keys: what the taps know of both.
        networks: student and teacher, whose convolutions are compared.

    Raises:
        ValueError: names, shapes, strides of convolutions, anchors, box weights, pooling or
            classes differ; the message lists every difference.
    """
    names = inherited_names(student, prefixes)
    problems = _differences(prefixes, student, teacher)
    problems += _geometry(names, *networks)
    problems += _disagreements(names, student_keys, teacher_keys)
    _raise(problems, prefixes)


@torch.no_grad()
def copy_from_teacher(
    student: nn.Module, state: Mapping[str, torch.Tensor], prefixes: Sequence[str]
) -> None:
    """Copy the entries of a teacher's state dict that start with one of ``prefixes``.

    Raises:
        ValueError: names or shapes differ; the message lists every difference.
    """
    own = student.state_dict()
    _raise(_differences(prefixes, own, state), prefixes)
    for name in inherited_names(own, prefixes):
        own[name].copy_(state[name])


def check_unchanged(
    student: nn.Module, state: Mapping[str, torch.Tensor], prefixes: Sequence[str]
) -> None:
    """Raise unless the frozen parts of a resumed student are the teacher's, bit by bit.

    Raises:
        ValueError: they are not; the message lists the entries.
    """
    own = student.state_dict()
    _raise(_differences(prefixes, own, state), prefixes)
    changed = [n for n in inherited_names(own, prefixes) if not torch.equal(own[n], state[n])]
    if changed:
        raise ValueError(
            "KD.INIT_STUDENT.FREEZE: these entries of the resumed student are not the teacher's: "
            f"{', '.join(changed)}. The checkpoint was written with another KD.TEACHER.WEIGHTS or "
            "without FREEZE; resume with the same keys, or start a new run in another OUTPUT_DIR"
        )


class FrozenStatistics(HookBase):
    """Keeps BatchNorm below the given prefixes in eval mode: its statistics are frozen as well.

    Before each step, because training starts, and evaluation ends, with ``model.train()``.
    """

    def __init__(self, student: nn.Module, prefixes: Sequence[str]):
        """
        Args:
            prefixes: as KD.INIT_STUDENT.PREFIXES.
        """
        self._modules = [
            module
            for path, module in student.named_modules()
            if isinstance(module, _BatchNorm)
            and inherited_names([f"{path}.running_mean"], prefixes)
        ]

    def before_step(self):
        for module in self._modules:
            module.eval()


def _differences(prefixes, student, teacher) -> List[str]:
    """Return one line for every prefix without a match and every name or shape that differs."""
    lines = []
    for side, state in (("student", student), ("teacher", teacher)):
        lines += [
            f"no parameter or buffer of the {side} starts with '{prefix}'"
            for prefix in prefixes
            if not inherited_names(state, [prefix])
        ]
    for name in inherited_names(dict.fromkeys([*student, *teacher]), prefixes):
        if name not in teacher:
            lines.append(f"the teacher has no '{name}'")
        elif name not in student:
            lines.append(f"the student has no '{name}'")
        elif student[name].shape != teacher[name].shape:
            ours, theirs = tuple(student[name].shape), tuple(teacher[name].shape)
            lines.append(f"'{name}' has shape {ours} in the student and {theirs} in the teacher")
    return lines


def _geometry(names: Sequence[str], student: nn.Module, teacher: nn.Module) -> List[str]:
    """Return one line for every convolution that runs in another way, though its shape fits."""
    ours, theirs = dict(student.named_modules()), dict(teacher.named_modules())
    lines = []
    for path in dict.fromkeys(name.rpartition(".")[0] for name in names):
        if not isinstance(ours.get(path), nn.Conv2d) or path not in theirs:
            continue
        for fact in ("stride", "padding", "dilation", "groups"):
            here, there = (getattr(side[path], fact, None) for side in (ours, theirs))
            if here != there:
                lines.append(
                    f"'{path}' has {fact} {here} in the student and {there} in the teacher (e.g. "
                    "MODEL.RESNETS.STRIDE_IN_1X1, RES5_DILATION)"
                )
    return lines


def _disagreements(names: Sequence[str], student_keys, teacher_keys) -> List[str]:
    lines = []
    for beginning, facts in _AGREEMENTS.items():
        if not any(name.startswith(beginning) for name in names):
            continue
        for key in student_keys:
            stem, _, stage = key.partition("[")
            # a key without a stage repeats stage 0
            if stem not in facts or key not in teacher_keys or (stem + "[0]" == key):
                continue
            ours, theirs = (_facts(keys[key]) for keys in (student_keys, teacher_keys))
            if ours != theirs:
                what, mend = facts[stem]
                where = f" of stage {stage[:-1]}" if stage else ""
                lines.append(f"{what}{where} ({mend}): student {ours}, teacher {theirs}")
    return lines


def _facts(info: KeyInfo) -> tuple:
    # widths of feature maps are part of the shapes; those of predictions tell classes
    return tuple(x for x in (info.channels, info.strides, info.signature) if x)


def _raise(problems: Sequence[str], prefixes: Sequence[str]) -> None:
    if problems:
        raise ValueError(
            f"KD.INIT_STUDENT.PREFIXES {tuple(prefixes)} cannot be copied from this teacher to "
            "this student:\n- " + "\n- ".join(problems) + "\nBuild the student's part like the "
            "teacher's, or drop the prefixes at fault: a dense student has no two-stage head, and "
            "heads of other widths (C4 of R-18 and R-50) do not fit"
        )
