"""CrossKD written a second time, straight from its formulas, without taps or recorders.

One level at a time, from coarse to fine: the levels must not influence each other.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss

_SUBNETS = {"cls": "cls_subnet", "box": "bbox_subnet"}


def pyramid(model, batch):
    images = model.preprocess_image(batch)
    features = model.backbone(images.tensor)
    return [features[name] for name in model.head_in_features]


def stages(model, branch):
    """Tower as a list of lists of modules, each ending with its ReLU."""
    result, current = [], []
    for module in getattr(model.head, _SUBNETS[branch]):
        current.append(module)
        if isinstance(module, nn.ReLU):
            result.append(current)
            current = []
    assert not current
    return result


def run_stages(groups, x):
    for module in (m for group in groups for m in group):
        x = module(x)
    return x


def centerness_branch(model):
    if getattr(model.head, "ctrness", None) is None:
        return None
    return {"FCOS": getattr(model.head, "centerness_on", None), "ATSS": "reg"}[type(model).__name__]


def predictors(model, branch, x, level):
    head = model.head
    if branch == "cls":
        result = {"cls": head.cls_score(x)}
    else:
        scales = getattr(head, "scales", None)
        factor = 1.0 if scales is None else scales[level].scale
        result = {"box": head.bbox_pred(x) * factor}
    if centerness_branch(model) == {"cls": "cls", "box": "reg"}[branch]:
        result["ctr"] = head.ctrness(x)
    return result


def align(s, t):
    """Per channel c: (s - mean) / (std + 1e-6) * std_t + mean_t, one channel after the other."""
    if s.shape[0] * s.shape[2] * s.shape[3] < 2:
        return s
    columns = []
    for c in range(s.shape[1]):
        a, b = s[:, c], t[:, c]
        columns.append((a - a.mean()) / (a.std() + 1e-6) * b.std() + b.mean())
    return torch.stack(columns, dim=1)


def own_predictions(model, features):
    """output -> per-level raw predictions of a network's own head."""
    result = {}
    for level in reversed(range(len(features))):
        for branch in ("cls", "box"):
            x = run_stages(stages(model, branch), features[level])
            for name, value in predictors(model, branch, x, level).items():
                result.setdefault(name, {})[level] = value
    return {name: [v[i] for i in range(len(features))] for name, v in result.items()}


def cross_predictions(moved, moved_features, host, host_features, branch, i, *, aligned, pre_act):
    """output -> per-level predictions of ``moved``'s feature after i stages in ``host``'s head."""
    result = {}
    for level in reversed(range(len(moved_features))):
        taps = []
        for model, features in ((moved, moved_features), (host, host_features)):
            done = [group[:] for group in stages(model, branch)[:i]]
            if pre_act and i:
                done[-1].pop()
            taps.append(run_stages(done, features[level]))
        x = align(*taps) if aligned else taps[0]
        x = run_stages(stages(host, branch)[i:], x.relu() if i else x)
        for name, value in predictors(host, branch, x, level).items():
            result.setdefault(name, {})[level] = value
    return {name: [v[k] for k in range(len(moved_features))] for name, v in result.items()}


def flat(levels, anchors, dim):
    """Per-level (N, A*dim, H, W) -> (N, R, dim): row, column, anchor."""
    parts = []
    for x in levels:
        n, _, h, w = x.shape
        parts.append(x.reshape(n, anchors, dim, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, dim))
    return torch.cat(parts, dim=1)


def inside(features, strides, batch, anchors):
    """(N, R): row and column below ceil(side / stride), sides rounded up to 32."""
    result = []
    for item in batch:
        height, width = (math.ceil(side / 32) * 32 for side in item["image"].shape[-2:])
        mask = []
        for feature, stride in zip(features, strides):
            rows, columns = torch.meshgrid(
                *(torch.arange(side) for side in feature.shape[-2:]), indexing="ij"
            )
            cell = (rows < math.ceil(height / stride)) & (columns < math.ceil(width / stride))
            mask.append(cell.reshape(-1, 1).expand(-1, anchors).reshape(-1))
        result.append(torch.cat(mask))
    return torch.stack(result)


class Batch:
    """Targets, weights and normalisers of a batch for a student and a teacher."""

    def __init__(self, student, teacher, batch):
        self.kind = type(student).__name__
        self.student, self.teacher = student, teacher
        self.student_features = pyramid(student, batch)
        with torch.no_grad():
            self.teacher_features = pyramid(teacher, batch)
            self.target = own_predictions(teacher, self.teacher_features)
        anchors = student.anchor_generator(self.student_features)
        self.anchors_per_cell = student.anchor_generator.num_anchors[0]
        labels, boxes = student.label_anchors(anchors, [x["instances"] for x in batch])
        self.labels, self.boxes = torch.stack(labels), torch.stack(boxes)
        self.anchors = torch.cat([a.tensor for a in anchors])
        strides = student.anchor_generator.strides
        self.inside = inside(self.student_features, strides, batch, self.anchors_per_cell)
        self.positive = (self.labels >= 0) & (self.labels < student.num_classes)
        self.counted = torch.ones_like(self.positive)
        if self.kind != "FCOS":
            self.positive &= self.inside
            self.counted = self.inside & (self.labels >= 0)

    def num_positive(self):
        return sum(max(int(row.sum()), 1) for row in self.positive)

    def centerness_sum(self):
        total = 0.0
        for image, position in self.positive.nonzero().tolist():
            x1, y1, x2, y2 = self.anchors[position].tolist()
            x, y = (x1 + x2) / 2, (y1 + y2) / 2
            bx1, by1, bx2, by2 = self.boxes[image, position].tolist()
            left, top, right, bottom = x - bx1, y - by1, bx2 - x, by2 - y
            ratio = min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)
            total += math.sqrt(ratio)
        return max(total, 1.0)

    def _flat(self, levels, dim):
        return flat(levels, self.anchors_per_cell, dim)

    def terms(self, predictions, target=None):
        """Weighted official losses of ``predictions`` (dict of lists) towards ``target``."""
        target = self.target if target is None else target
        num_classes = self.student.num_classes
        s, t = (self._flat(x["cls"], num_classes) for x in (predictions, target))
        probability = t.sigmoid()
        bce = -(probability * F.logsigmoid(s) + (1 - probability) * F.logsigmoid(-s))
        qfl = ((s.sigmoid() - probability).abs() * bce).sum(dim=-1)
        scores = self._flat(self.target["cls"], num_classes).sigmoid().amax(dim=-1)
        weights = scores * self.counted
        if self.kind == "FCOS":
            scale = self.centerness_sum()
            is_d2 = self.student.head.scales is None  # its own box loss is GIoU
            box_loss = self._giou if is_d2 else self._iou_log
            return {
                "cls": 0.4 * qfl.sum() / scale,
                "reg": 0.75 * (weights * box_loss(predictions, target)).sum() / scale,
            }
        count = self.num_positive()
        result = {"cls": (qfl * self.counted).sum() / count}
        if self.kind == "GFL":
            kl = self._kl(predictions, target)
            result["reg"] = 4.0 * (weights * kl).sum() / weights.sum()
            return result
        result["reg"] = (weights * self._giou(predictions, target)).sum() / count
        if self.kind == "ATSS":
            a, b = (self._flat(x["ctr"], 1)[..., 0] for x in (predictions, target))
            losses = F.binary_cross_entropy(a.sigmoid(), b.sigmoid(), reduction="none")
            result["ctr"] = losses[self.positive].sum() / count
        return result

    def _kl(self, predictions, target):
        bins = 17
        s, t = (self._flat(x["box"], 4 * bins) for x in (predictions, target))
        s, t = (x.reshape(*x.shape[:2], 4, bins).softmax(dim=-1) for x in (s, t))
        return (t * (t / s).log()).sum(dim=-1).sum(dim=-1) / 4

    def _decoded(self, levels):
        x = self._flat(levels, 4)
        if self.kind != "FCOS":
            priors = self.anchors.repeat(len(x), 1)
            return self.student.box2box_transform.apply_deltas(x.reshape(-1, 4), priors)
        sides = self.anchors[:, 2] - self.anchors[:, 0]
        if self.student.head.scales is None:  # preset d2
            distances = x.clamp(min=0) * sides[:, None]
        else:
            distances = x.exp()
        centers = (self.anchors[:, :2] + self.anchors[:, 2:]) / 2
        boxes = torch.cat([centers - distances[..., :2], centers + distances[..., 2:]], dim=-1)
        return boxes.reshape(-1, 4)

    def _giou(self, predictions, target):
        boxes = [self._decoded(x["box"]) for x in (predictions, target)]
        return generalized_box_iou_loss(*boxes).reshape(self.labels.shape)

    def _iou_log(self, predictions, target):
        boxes = [self._decoded(x["box"]) for x in (predictions, target)]
        iou = torch.cat([box_iou(a[None], b[None])[0] for a, b in zip(*boxes)])
        return -iou.nan_to_num(0.0).clamp(min=1e-6).log().reshape(self.labels.shape)
