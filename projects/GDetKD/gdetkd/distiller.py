"""The GDetKD distiller."""

from typing import Dict, List, Mapping, Optional, Sequence, Set

import torch
from detectron2.config import configurable
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from kd_d2.distillation import DISTILLER_REGISTRY, DistillationContext, Distiller, MethodInfo

from .ckd import ContrastiveKD
from .feature_terms import FeatureTerm, build_feature_term
from .prediction import PREDICTION_TERMS, PredictionTerm
from .records import RoIBatch, StudentRoIs, build_student_rois, student_family
from .validation import (
    check_head_transfer,
    check_modes,
    check_queue,
    check_teacher,
    check_train_on_pred_boxes,
    check_weight,
    paired_stages,
    preset_weight,
)

__all__ = ["GDetKD"]


@DISTILLER_REGISTRY.register()
class GDetKD(Distiller):
    """Distils a two-stage teacher on the boxes that the student sampled.

    The teacher's RoI head sees the very boxes of the student's, once a step for all terms. Terms,
    as far as they are on: ``feat`` (SGFI or another feature term), ``ckd`` (contrast of the RoIs'
    representations), ``cls`` and ``reg`` (outputs of the head). Of a cascade, ``feat`` sees the
    boxes of the first stage; the others are averaged over the stages.
    """

    # Ours: the paper has no weights. Together at most 1.5 times the detection gradient.
    target_ratios = {"feat": 0.5, "ckd": 0.5, "cls": 0.25, "reg": 0.25}
    info = MethodInfo(
        title="G-DetKD: general distillation for detectors",
        paper="Yao et al., G-DetKD: Towards General Distillation Framework for Object Detectors "
        "via Contrastive and Semantic-guided Feature Imitation, ICCV 2021, arXiv 2108.07482",
        compares="features, representations and predictions of the boxes that the student sampled",
        requires=(
            "two-stage teacher",
            "two-stage student, or a dense one with towers (RetinaNet, FCOS)",
            "equal classes for the terms on predictions",
            "ground truth",
        ),
        gains=(
            "Faster R-CNN R-50 -> R-18: 34.0 -> 37.9 (Tables 2 and 7)",
            "Faster R-CNN R-152 -> R-50: 37.4 -> 41.0 (Table 3)",
            "Faster R-CNN R-50 -> RetinaNet R-18: 32.6 -> 36.3 (Table 2)",
            "Faster R-CNN R-50 -> FCOS R-18: 30.3 -> 35.6 (Table 2)",
            "Faster R-CNN C4 R-50 -> R-18: 22.0 -> 29.1 (Table 14)",
            "Cascade R-CNN R-50 -> R-18: 36.5 -> 40.4 (Table 14)",
        ),
        unverified="no official code is public: f_adapt, f_embed, start of tau, gamma, widths, "
        "dense sampling, cascades and weights are ours (config.py marks each)",
    )

    @configurable
    def __init__(
        self,
        *,
        rois: StudentRoIs,
        teacher_stages: Sequence[int],
        weights: Mapping[str, float],
        feature: Optional[FeatureTerm] = None,
        ckd: Optional[Mapping[int, ContrastiveKD]] = None,
        ckd_rois: str = "all",
        predictions: Optional[Mapping[str, PredictionTerm]] = None,
    ):
        """
        Args:
            rois: source of the student's RoIs.
            teacher_stages: stage of the teacher's head that belongs to each of the student's.
            weights: of the terms that are on, "feat", "ckd", "cls", "reg".
            feature: the term "feat", or None.
            ckd: the term "ckd" by stage of the student; empty or None: no such term.
            ckd_rois: "all" or "positive".
            predictions: the terms "cls" and "reg".
        """
        predictions, ckd = dict(predictions or {}), dict(ckd or {})
        on = {"feat": feature is not None, "ckd": bool(ckd)}
        assert set(weights) == {*predictions, *(name for name, yes in on.items() if yes)}
        feature_needs = feature or FeatureTerm
        # values of the teacher's head by stage of the student
        outputs = {name for term in predictions.values() for name in term.teacher_outputs}
        teacher_keys: List[Set[str]] = []
        for stage, theirs in enumerate(teacher_stages):
            names = outputs | ({"embed"} if stage in ckd else set())
            keys = {f"roi.{name}[{theirs}]" for name in names}
            if stage == 0 and feature is not None:
                keys |= {key for key in feature.teacher_needs if key.startswith("roi.")}
            teacher_keys.append(keys)
        self._collects = bool(ckd or predictions or (feature is not None and feature.uses_rois))
        roi_needs = rois.student_needs if self._collects else ()
        super().__init__(
            weights=weights,
            student_needs={*roi_needs, *feature_needs.student_needs},
            teacher_needs={*feature_needs.teacher_needs}.union(*teacher_keys),
        )
        self.rois = rois
        self.feature = feature
        self.ckd = nn.ModuleDict({str(stage): module for stage, module in ckd.items()})
        self.predictions = predictions
        self._ckd_rois = ckd_rois
        self._teacher_stages = tuple(teacher_stages)
        self._teacher_keys = [sorted(keys) for keys in teacher_keys]

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        node = cls.config_node(cfg)
        family = student_family(student_keys)
        check_teacher(teacher_keys)
        check_modes(node)
        check_head_transfer(cfg.KD.INIT_STUDENT.PREFIXES, family)
        if family == "two_stage":
            check_train_on_pred_boxes(cfg)
        rois = build_student_rois(cfg, student_keys)
        stages = paired_stages(rois.num_stages, teacher_keys, node.TEACHER_STAGE)

        weights: Dict[str, float] = {}
        feature = build_feature_term(cfg, student_keys, teacher_keys)
        if feature is not None:
            weights["feat"] = preset_weight("FEAT.WEIGHT", node.FEAT.WEIGHT, feature.default_weight)
        ckd = _ckd(cfg, family, rois, stages, teacher_keys)
        if ckd:
            check_weight("CKD.WEIGHT", node.CKD.WEIGHT)
            weights["ckd"] = node.CKD.WEIGHT
        predictions = {}
        build = PREDICTION_TERMS.get(family)
        for name, (term, value) in build(cfg, student_keys, teacher_keys, stages).items():
            predictions[name], weights[name] = term, value
        if not weights and not cfg.KD.INIT_STUDENT.PREFIXES:
            raise ValueError(
                "every term of GDetKD is off: KD.GDETKD.FEAT.MODE, CKD.ENABLED, CLS.WEIGHT and "
                "REG.MODE, and nothing is copied by KD.INIT_STUDENT.PREFIXES; switch one on, or "
                "set KD.ENABLED to False"
            )
        return {
            "rois": rois,
            "teacher_stages": stages,
            "weights": weights,
            "feature": feature,
            "ckd": ckd,
            "ckd_rois": node.CKD.ROIS,
            "predictions": predictions,
        }

    def optimizer_overrides(self):
        own = {} if self.feature is None else self.feature.optimizer_overrides()
        return {f"feature.{name}": values for name, values in own.items()}

    # ----------------------------------------------------------------------------- compute
    def compute(self, ctx: DistillationContext) -> Dict[str, Tensor]:
        if not self._collects:
            # a mask at most, for which no box need be sampled from a dense student's predictions
            return {} if self.feature is None else {"feat": self.feature(ctx, None)}
        sums: Dict[str, List[Tensor]] = {name: [] for name in self.weights}
        scalars: Dict[str, Tensor] = {}
        batches = self.rois(ctx)
        for stage, rois in enumerate(batches):
            teacher = self._teacher(ctx, rois, stage)
            if stage == 0 and self.feature is not None:
                sums["feat"].append(self.feature(ctx, rois))
            suffix = f"_stage{stage}" if len(batches) > 1 else ""
            if str(stage) in self.ckd:
                output, positive = self._contrast(rois, teacher, stage)
                sums["ckd"].append(output.loss / len(batches))
                for name in ("accuracy", "positive_cosine", "num_negatives"):
                    scalars[f"ckd_{name}{suffix}"] = getattr(output, name)
                found = (output.correct & positive).sum() / positive.sum().clamp(min=1)
                scalars[f"ckd_accuracy_foreground{suffix}"] = found
            for name, term in self.predictions.items():
                sums[name].append(term(rois, teacher) / len(batches))
            # an image; FCOS students have hardly any at the start
            scalars[f"num_positive{suffix}"] = rois.positive.sum() / len(rois.boxes)
        self._log(scalars)
        return {name: torch.stack(values).sum() for name, values in sums.items()}

    def _teacher(self, ctx, rois: RoIBatch, stage: int) -> Dict[str, Tensor]:
        """What the teacher's head makes of the same boxes: "embed", "cls", "box" as needed."""
        keys = self._teacher_keys[stage]
        if not keys:
            return {}
        values = ctx.teacher.run(keys, rois.boxes)
        suffix = f"[{self._teacher_stages[stage]}]"
        names = ("embed", "cls", "box")
        return {n: values[f"roi.{n}{suffix}"] for n in names if f"roi.{n}{suffix}" in keys}

    def _contrast(self, rois: RoIBatch, teacher: Mapping[str, Tensor], stage: int):
        """The module's output, and which of its rows are foreground."""
        embed = teacher["embed"]
        if self._ckd_rois == "positive":
            rois, embed = rois.select(rois.positive), embed[rois.positive]
        return self.ckd[str(stage)](rois.embed, embed, rois.boxes, rois.anchor), rois.positive

    def _log(self, scalars: Mapping[str, Tensor]) -> None:
        # one transfer for all of them
        values = torch.stack([value.detach().float() for value in scalars.values()]).tolist()
        for name, value in zip(scalars, values):
            get_event_storage().put_scalar(f"{self.label}/{name}", value)


def _ckd(cfg, family: str, rois: StudentRoIs, stages, teacher_keys) -> Dict[int, ContrastiveKD]:
    """One module, with a queue of its own, for each stage of the student that takes part."""
    node = cfg.KD.GDETKD.CKD
    if not node.ENABLED:
        return {}
    check_queue(cfg, family, rois.rois_per_image)
    chosen = [k for k in range(rois.num_stages) if k in cfg.KD.GDETKD.CASCADE.CKD_STAGES]
    if rois.num_stages == 1:
        chosen = [0]
    if not chosen:
        raise ValueError(
            f"KD.GDETKD.CASCADE.CKD_STAGES is {tuple(cfg.KD.GDETKD.CASCADE.CKD_STAGES)}, but the "
            f"student's stages are 0..{rois.num_stages - 1}; name one, or set CKD.ENABLED to False"
        )
    return {
        stage: ContrastiveKD(
            student_dim=rois.embed_dims[stage],
            teacher_dim=teacher_keys[f"roi.embed[{stages[stage]}]"].channels,
            num_anchors=rois.num_anchors,
            dim=node.DIM,
            proj=node.PROJ,
            gamma=node.GAMMA,
            queue_size=node.QUEUE_SIZE,
            queue_dtype=node.QUEUE_DTYPE,
            iou_thr=node.IOU_THR,
            grad_through_queue=node.GRAD_THROUGH_QUEUE,
            chunk=node.CHUNK,
        )
        for stage in chosen
    }
