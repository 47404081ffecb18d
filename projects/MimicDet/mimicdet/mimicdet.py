"""The meta-architecture: a one-stage detector that learns from a two-stage head (Fig. 1)."""

from typing import Any, Dict, List, Optional, Sequence, Tuple

from detectron2.config import CfgNode, configurable
from detectron2.modeling import (
    META_ARCH_REGISTRY,
    Backbone,
    build_backbone,
    build_proposal_generator,
    build_roi_heads,
)
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from .diagnostics import Diagnostics
from .labels import ProposalLabeler
from .mimic_loss import MimicLoss
from .options import choice
from .s_head import MimicSHead
from .sampler import BoxSampler
from .staggered_fpn import StaggeredFPN
from .t_head import MimicTHead
from .validation import check_heads, check_levels

__all__ = ["MimicDet"]

_EVAL_HEADS = {"student": False, "teacher": True}  # whether the T-head is evaluated


@META_ARCH_REGISTRY.register()
class MimicDet(DenseDetector):
    """Backbone, refinement module, S-head and, for training, T-head.

    All losses are added up with weight 1 but the mimic loss, which has its own weights and a
    schedule. In eval mode the finest level is not computed unless the T-head is evaluated.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        refinement: nn.Module,
        s_head: Optional[MimicSHead],
        t_head: Optional[MimicTHead],
        s_in_features: Sequence[str],
        labeler: ProposalLabeler,
        sampler: BoxSampler,
        mimic_loss: Optional[MimicLoss],
        diagnostics: Diagnostics,
        evaluate_t_head: bool = False,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
        input_format: str = "BGR",
        vis_period: int = 0,
    ):
        """
        Args:
            backbone: a ``StaggeredFPN`` if it has levels that are finer than ``s_in_features``.
            refinement: ``RefinementModule``, of the levels ``s_in_features``.
            s_head: of the same levels; None: only the two-stage detector is trained.
            t_head: of its own levels, as many; None: only the one-stage detector is trained.
            s_in_features: names of levels, finest first.
            labeler: gives adjusted boxes their class and ground-truth box.
            sampler: takes the boxes of the T-head among them.
            mimic_loss: between S-head and T-head of this model; None: no such loss.
            diagnostics: what is logged about training.
            evaluate_t_head: whether detections come from the T-head.
            pixel_mean, pixel_std: per channel, in the order of ``input_format``.
            input_format: channel order of the images, "BGR" or "RGB".
            vis_period: iterations between two pictures of training, 0: none.

        Raises:
            ValueError: a head is missing that something needs, or levels that nothing needs or
                that cannot be left out.
        """
        super().__init__(
            backbone, s_head, list(s_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        check_heads(s_head, t_head, mimic_loss, evaluate_t_head)
        self.refinement = refinement
        self.t_head = t_head
        self.labeler = labeler
        self.sampler = sampler
        self.mimic_loss = mimic_loss
        self.diagnostics = diagnostics
        self.evaluate_t_head = evaluate_t_head
        self.input_format = input_format
        self.vis_period = vis_period
        self._training_levels = self._finer_levels()
        check_levels(
            self._training_levels,
            t_head.in_features if t_head is not None else (),
            skippable=isinstance(backbone, StaggeredFPN),
        )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        node = cfg.MODEL.MIMICDET
        backbone = build_backbone(cfg)
        shapes = backbone.output_shape()
        in_features = cfg.MODEL.RPN.IN_FEATURES
        s_shapes = [shapes[name] for name in in_features]
        labeler = ProposalLabeler(cfg)
        shared = choice("TEACHER.MODE", node.TEACHER.MODE, {"shared": True, "separate": False})
        return {
            "backbone": backbone,
            "refinement": build_proposal_generator(cfg, shapes),
            "s_head": MimicSHead(cfg, s_shapes) if node.S_HEAD.ENABLED else None,
            "t_head": build_roi_heads(cfg, shapes) if node.T_HEAD.ENABLED else None,
            "s_in_features": in_features,
            "labeler": labeler,
            "sampler": BoxSampler(cfg, labeler),
            "mimic_loss": MimicLoss(cfg) if shared and node.MIMIC.WEIGHT > 0 else None,
            "diagnostics": Diagnostics(cfg),
            "evaluate_t_head": choice("EVAL_HEAD", node.EVAL_HEAD, _EVAL_HEADS),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
            "input_format": cfg.INPUT.FORMAT,
            "vis_period": cfg.VIS_PERIOD,
        }

    @property
    def s_head(self) -> Optional[MimicSHead]:
        """The one-stage head, ``head`` in the state dict as in every dense detector."""
        return self.head

    @property
    def num_classes(self) -> int:
        """K."""
        return self.labeler.num_classes

    @property
    def training_only_modules(self) -> Tuple[str, ...]:
        """Paths of the modules that detection does not use: T-head and finest level."""
        if self.evaluate_t_head or self.t_head is None:
            return ()
        suffixes = [name[1:] for name in self._training_levels]
        return (
            "t_head",
            *(f"backbone.fpn_lateral{suffix}" for suffix in suffixes),
            *(f"backbone.fpn_output{suffix}" for suffix in suffixes),
        )

    def deploy(self, cfg: CfgNode) -> None:
        """Change ``cfg``, the config of this model, to that of its one-stage part alone.

        The detector built from it has exactly the weights that are not in
        :attr:`training_only_modules`. Nothing changes where the T-head is evaluated.
        """
        if self.evaluate_t_head or self.t_head is None:
            return
        num_skip = len(self._training_levels)
        cfg.MODEL.MIMICDET.T_HEAD.ENABLED = False
        cfg.MODEL.MIMICDET.MIMIC.WEIGHT = 0.0
        cfg.MODEL.FPN.IN_FEATURES = list(cfg.MODEL.FPN.IN_FEATURES)[num_skip:]

    def forward(self, batched_inputs: List[Dict[str, Any]]):
        """Return losses in training, else ``[{"instances": detections}]`` at the input's size."""
        images = self.preprocess_image(batched_inputs)
        if self.training:
            gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
            return self.losses(images, gt_instances, batched_inputs)
        detections = self.inference(images)
        sizes = [
            (x.get("height", size[0]), x.get("width", size[1]))
            for x, size in zip(batched_inputs, images.image_sizes)
        ]
        return [{"instances": detector_postprocess(x, *s)} for x, s in zip(detections, sizes)]

    def losses(
        self,
        images: ImageList,
        gt_instances: List[Instances],
        batched_inputs: Optional[List[Dict[str, Any]]] = None,
    ) -> Dict[str, Tensor]:
        """Return ``loss_refine_*``, ``loss_s_*``, ``loss_t_*`` and ``loss_mimic_*``.

        Both heads see the labels of one assignment; S-head features of the T-head's boxes come
        from the cells in which these boxes were born.

        Args:
            images: normalised and padded.
            gt_instances: on the model's device, in pixels of the network's input.
            batched_inputs: for pictures of training (``VIS_PERIOD``); None: there are none.
        """
        features = self.pyramid(images.tensor, self.t_head is not None)
        refined = self.refinement(images, features, gt_instances)
        labelled = self.labeler(refined.proposals, gt_instances)
        losses = dict(refined.losses)
        sampled = self.sampler(labelled)
        with self.diagnostics.step() as record:
            if self.t_head is not None:
                teacher = self.t_head.features(self._of_t_head(features), sampled)
                losses.update(self.t_head.losses(teacher, sampled))
            if self.s_head is not None:
                aligned = self.s_head(self._of_s_head(features), refined.deltas)
                student = self.s_head.predict(aligned, labelled)
                losses.update(self.s_head.losses(student, labelled))
                record.offsets(self.s_head, self._of_s_head(features), refined.deltas)
                self._visualize(batched_inputs, student, labelled)
            if self.mimic_loss is not None:
                pair = self.s_head.predict(aligned, sampled), teacher
                mimic = self.mimic_loss.distances(*pair, [x.gt_classes for x in sampled])
                losses.update(self.mimic_loss.weighted(mimic, get_event_storage().iter))
                record.cosines(mimic)
        return losses

    def inference(self, images: ImageList) -> List[Instances]:
        """Return detections in pixels of the network's input.

        The best adjusted boxes by the refinement's score go through the S-head, or through the
        T-head if that is evaluated.
        """
        features = self.pyramid(images.tensor, self.evaluate_t_head)
        refined = self.refinement(images, features)
        if self.evaluate_t_head:
            return self.t_head.inference(self._of_t_head(features), refined.proposals)
        aligned = self.s_head(self._of_s_head(features), refined.deltas)
        output = self.s_head.predict(aligned, refined.proposals)
        return self.s_head.inference(output, refined.proposals)

    def pyramid(self, images: Tensor, with_t_head: bool) -> Dict[str, Tensor]:
        """Return the levels by name, without those that only the T-head reads if it does not run.

        Args:
            images: (N, 3, H, W), normalised and padded.
            with_t_head: whether the T-head runs.
        """
        if with_t_head or not self._training_levels:
            return self.backbone(images)
        return self.backbone(images, num_skip=len(self._training_levels))

    def _finer_levels(self) -> List[str]:
        """Names of the levels that are finer than the S-head's, finest first."""
        shapes = self.backbone.output_shape()
        stride = shapes[self.head_in_features[0]].stride
        names = [name for name, shape in shapes.items() if shape.stride < stride]
        return sorted(names, key=lambda name: shapes[name].stride)

    def _of_s_head(self, features: Dict[str, Tensor]) -> List[Tensor]:
        return [features[name] for name in self.head_in_features]

    def _of_t_head(self, features: Dict[str, Tensor]) -> List[Tensor]:
        return [features[name] for name in self.t_head.in_features]

    def _visualize(self, batched_inputs, output, proposals) -> None:
        if batched_inputs and self.diagnostics.is_due(self.vis_period):
            detections = self.s_head.inference(output.detach(), proposals)
            self.visualize_training(batched_inputs, detections)
