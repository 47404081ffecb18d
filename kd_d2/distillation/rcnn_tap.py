"""Tap of two-stage detectors: ``GeneralizedRCNN`` with FPN, Cascade or C4 RoI heads."""

from typing import Any, Dict, Iterable, List, Set

import torch
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.roi_heads import CascadeROIHeads, Res5ROIHeads, StandardROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou

from .dense_tap import anchor_signature, codec_signature
from .registry import FamilyRegistry
from .taps import KD_TAPS, Assignment, Key, KeyInfo, Tap, TapStore

__all__ = ["BOX_BRANCHES", "RCNNTap", "label_boxes"]

_ROI = ("feat", "embed", "cls", "box", "codec")


@torch.no_grad()
def label_boxes(
    boxes: List[Boxes], targets: List[Instances], matcher, num_classes: int, image_sizes
) -> List[Instances]:
    """Match given boxes with ground truth as Detectron2's RoI heads do, without sampling.

    Returns:
        list[Instances]: ``proposal_boxes``, ``gt_classes`` (background is ``num_classes``) and
        ``gt_boxes`` (zeros for an image without ground truth).
    """
    result = []
    for boxes_i, targets_i, size in zip(boxes, targets, image_sizes):
        matched, labels = matcher(pairwise_iou(targets_i.gt_boxes, boxes_i))
        instances = Instances(size, proposal_boxes=boxes_i)
        if len(targets_i) > 0:
            gt_classes = targets_i.gt_classes[matched].clone()
            gt_classes[labels == 0] = num_classes
            gt_classes[labels == -1] = -1
            instances.gt_boxes = targets_i.gt_boxes[matched]
        else:
            gt_classes = torch.full_like(matched, num_classes)
            instances.gt_boxes = Boxes(boxes_i.tensor.new_zeros((len(boxes_i), 4)))
        instances.gt_classes = gt_classes
        result.append(instances)
    return result


def _with_gt_boxes(proposals: Instances) -> Instances:
    """Sampled proposals; Detectron2 sets no ``gt_boxes`` on images without ground truth."""
    if proposals.has("gt_boxes"):
        return proposals
    result = Instances(proposals.image_size, **proposals.get_fields())
    result.gt_boxes = Boxes(torch.zeros_like(proposals.proposal_boxes.tensor))
    return result


BOX_BRANCHES = FamilyRegistry("BOX_BRANCHES")
BOX_BRANCHES.__doc__ = "Module names of the box branch, by RoI-head class, searched along bases."


def _box_branch(model):
    try:
        return BOX_BRANCHES.find(model.roi_heads)()
    except KeyError as error:
        raise ValueError(
            f"no box branch for RoI heads {type(model.roi_heads).__name__}; known families: "
            f"{error.args[0]}"
        ) from None


@BOX_BRANCHES.register_for(StandardROIHeads)
class _StandardBranch:
    """One pooler, one box head, one predictor; the sampled proposals are returned."""

    pooler_path = "roi_heads.box_pooler"
    features_attribute = "box_in_features"

    def num_stages(self, model) -> int:
        return 1

    def modules(self, model, stage: int):
        """Return (pooler, box head, predictor) of ``stage``."""
        heads = model.roi_heads
        return heads.box_pooler, heads.box_head, heads.box_predictor

    def predictor_path(self, stage: int) -> str:
        return "roi_heads.box_predictor"

    def proposal_paths(self, stage: int) -> Set[str]:
        return {"roi_heads"}

    def read_proposals(self, store: TapStore, stage: int) -> List[Instances]:
        return [_with_gt_boxes(p) for p in store.single("roi_heads").output[0]]

    def pooled(self, store: TapStore, stage: int) -> torch.Tensor:
        return store.calls(self.pooler_path)[stage].output

    def embed(self, head, pooled: torch.Tensor) -> torch.Tensor:
        return head(pooled)


@BOX_BRANCHES.register_for(CascadeROIHeads)
class _CascadeBranch(_StandardBranch):
    """One pooler called once a stage; its inputs hold the boxes of every stage."""

    def num_stages(self, model):
        return model.roi_heads.num_cascade_stages

    def modules(self, model, stage):
        heads = model.roi_heads
        return heads.box_pooler, heads.box_head[stage], heads.box_predictor[stage]

    def predictor_path(self, stage):
        return f"roi_heads.box_predictor.{stage}"

    def proposal_paths(self, stage):
        return {"roi_heads"} if stage == 0 else {self.pooler_path, "roi_heads"}

    def read_proposals(self, store, stage):
        sampled = super().read_proposals(store, 0)
        if stage == 0:
            return sampled
        heads = store.model.roi_heads
        boxes = store.calls(self.pooler_path)[stage].inputs[1]
        sizes = [p.image_size for p in sampled]
        matcher = heads.proposal_matchers[stage]
        return label_boxes(boxes, store.gt_instances, matcher, heads.num_classes, sizes)


@BOX_BRANCHES.register_for(Res5ROIHeads)
class _C4Branch(_StandardBranch):
    """Pooler, then the res5 stage, averaged; sampled proposals are not returned."""

    pooler_path = "roi_heads.pooler"
    features_attribute = "in_features"

    def modules(self, model, stage):
        heads = model.roi_heads
        return heads.pooler, heads.res5, heads.box_predictor

    def proposal_paths(self, stage):
        return {self.pooler_path}

    def read_proposals(self, store, stage):
        heads = store.model.roi_heads
        boxes = store.single(self.pooler_path).inputs[1]
        sizes = [gt.image_size for gt in store.gt_instances]
        return label_boxes(
            boxes, store.gt_instances, heads.proposal_matcher, heads.num_classes, sizes
        )

    def embed(self, head, pooled):
        return head(pooled).mean(dim=[2, 3])


@torch.no_grad()
def _rpn_assignment(store: TapStore) -> Assignment:
    """Labels of the RPN's anchors by its own matcher, before it samples some of them."""
    rpn = store.model.proposal_generator
    anchors = Boxes.cat(store["anchors"])
    labels, boxes = [], []
    for targets in store.gt_instances:
        gt_boxes = targets.gt_boxes
        matched, found = rpn.anchor_matcher(pairwise_iou(gt_boxes, anchors))
        if rpn.anchor_boundary_thresh >= 0:
            inside = anchors.inside_box(targets.image_size, rpn.anchor_boundary_thresh)
            found = torch.where(inside, found, torch.full_like(found, -1))
        # Detectron2's matcher: 1 object, 0 background, -1 ignored
        labels.append(torch.where(found > 0, 0, torch.where(found == 0, 1, -1)))
        empty = not len(gt_boxes)
        boxes.append(torch.zeros_like(anchors.tensor) if empty else gt_boxes.tensor[matched])
    return Assignment(torch.stack(labels), torch.stack(boxes), num_classes=1)


def _codec_weights(owner) -> tuple:
    return (tuple(owner.box2box_transform.weights),)


def _pooler_type(pooler) -> str:
    """POOLER_TYPE of a pooler; ``aligned`` is what distinguishes Detectron2's two RoIAligns."""
    level = pooler.level_poolers[0]
    return type(level).__name__ + ("V2" if getattr(level, "aligned", False) else "")


@KD_TAPS.register_for(GeneralizedRCNN)
class RCNNTap(Tap):
    """``GeneralizedRCNN`` with ``StandardROIHeads``, ``CascadeROIHeads`` or ``Res5ROIHeads``.

    The RoI keys of an observed student belong to the proposals it sampled itself; for a teacher
    they are computed for given boxes by :meth:`run_rois`. All stages of a cascade teacher see the
    same given boxes; which of them to use is the distiller's decision.
    """

    def keys(self, model):
        result = self.trunk_keys(model)
        shapes = model.backbone.output_shape()
        rpn = model.proposal_generator
        strides = tuple(shapes[f].stride for f in rpn.in_features)
        result["rpn.obj"] = KeyInfo(rpn.rpn_head.objectness_logits.out_channels, strides)
        result["rpn.box"] = KeyInfo(
            rpn.rpn_head.anchor_deltas.out_channels, strides, _codec_weights(rpn)
        )
        result["anchors"] = KeyInfo(None, strides, anchor_signature(rpn.anchor_generator))
        result["assign"] = KeyInfo(None, strides)
        branch = _box_branch(model)
        levels = [shapes[f] for f in getattr(model.roi_heads, branch.features_attribute)]
        result["neck"] = KeyInfo(levels[0].channels, tuple(level.stride for level in levels))
        for stage in range(branch.num_stages(model)):
            pooler, _, predictor = branch.modules(model, stage)
            pooling = (*pooler.output_size, _pooler_type(pooler))
            # sigmoid scores of single classes instead of a softmax with background
            scores = ("use_sigmoid_ce",) if getattr(predictor, "use_sigmoid_ce", False) else ()
            infos = {
                "roi.feat": KeyInfo(levels[0].channels, (), pooling),
                "roi.embed": KeyInfo(predictor.cls_score.in_features),
                "roi.cls": KeyInfo(predictor.cls_score.out_features, (), scores),
                "roi.box": KeyInfo(predictor.bbox_pred.out_features, (), _codec_weights(predictor)),
                "roi.codec": KeyInfo(None, (), codec_signature(predictor.box2box_transform)),
                "proposals": KeyInfo(),
            }
            for name, info in infos.items():
                result[f"{name}[{stage}]"] = info
                if stage == 0:
                    result[name] = info
        return result

    def anchor_strides(self, model):
        return list(model.proposal_generator.anchor_generator.strides)

    def paths(self, model, keys: Iterable[Key]) -> Set[str]:
        branch, result = _box_branch(model), set()
        for key in keys:
            stage = key.index or 0
            if key.group == "path":
                result.add(key.name)
            elif key.group in ("backbone", "neck"):
                result |= self.trunk_paths(model, key)
            elif key.group in ("anchors", "assign"):
                result.add("backbone")
            elif key.group == "rpn":
                result.add("proposal_generator.rpn_head")
            elif key.group == "proposals":
                result |= branch.proposal_paths(stage)
            elif key.group == "roi" and key.name != "codec":
                feat = key.name == "feat"
                result.add(branch.pooler_path if feat else branch.predictor_path(stage))
        return result

    def read(self, store: TapStore, key: Key) -> Any:
        branch, stage = _box_branch(store.model), key.index or 0
        if key.group == "neck" and not key.name:
            features = store.single("backbone").output
            names = getattr(store.model.roi_heads, branch.features_attribute)
            return [features[name] for name in names]
        if key.group in ("backbone", "neck"):
            return self.read_trunk(store, key)
        if key.group == "path":
            return [call.output for call in store.calls(key.name)]
        if key.group == "anchors":
            rpn = store.model.proposal_generator
            features = store.single("backbone").output
            return rpn.anchor_generator([features[f] for f in rpn.in_features])
        if key.group == "assign":
            return _rpn_assignment(store)
        if key.group == "rpn":
            output = store.single("proposal_generator.rpn_head").output
            return list(output[("obj", "box").index(key.name)])
        if key.group == "proposals":
            return branch.read_proposals(store, stage)
        if key.name == "feat":
            return branch.pooled(store, stage)
        if key.name == "codec":
            return branch.modules(store.model, stage)[2].box2box_transform
        call = store.single(branch.predictor_path(stage))
        if key.name == "embed":
            return call.inputs[0]
        return call.output[("cls", "box").index(key.name)]

    def stage(self, path: str) -> str:
        first = path.split(".")[0]
        if first == "backbone":
            return "trunk"
        # The rest belongs to stages that cannot be run without boxes: run_stage says so, once
        # such a module is read. Needing it is fine, as its values come from run_rois.
        return "rpn" if first == "proposal_generator" else path

    def run_stage(self, model, stage, features):
        if stage != "rpn":
            raise ValueError(
                f"module '{stage}' of a two-stage teacher runs on given boxes only: use "
                "teacher.run(keys, boxes) with roi.* keys"
            )
        rpn = model.proposal_generator
        rpn.rpn_head([features[f] for f in rpn.in_features])

    def run_rois(self, model, features, boxes: List[Boxes], keys: List[Key]) -> Dict[str, Any]:
        """Return ``roi.*`` values of the given boxes (images in order, rows as in ``boxes``)."""
        branch = _box_branch(model)
        names = getattr(model.roi_heads, branch.features_attribute)
        levels = [features[name] for name in names]
        result: Dict[str, Any] = {}
        for stage in sorted({key.index or 0 for key in keys}):
            wanted = {key.name for key in keys if (key.index or 0) == stage}
            pooler, head, predictor = branch.modules(model, stage)
            values = {"feat": pooler(levels, boxes), "codec": predictor.box2box_transform}
            if wanted - {"feat", "codec"}:
                values["embed"] = branch.embed(head, values["feat"])
            if wanted & {"cls", "box"}:
                values["cls"], values["box"] = predictor(values["embed"])
            for name in _ROI:
                if name in values:
                    result[f"roi.{name}[{stage}]"] = values[name]
                    if stage == 0:
                        result[f"roi.{name}"] = values[name]
        return result
