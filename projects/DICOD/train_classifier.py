#!/usr/bin/env python
"""Train or evaluate a classifier of the objects of a detection data set, DICOD's teacher.

Its config is that of the student with the node CROP_CLASSIFIER; the options are those of
train_net.py, also with several GPUs, torchrun, --resume and --eval-only. The classifier's
checkpoint goes to KD.TEACHER.WEIGHTS, with KD.TEACHER.TYPE "ClassifierTeacher".

With CROP_CLASSIFIER.MODE "folder" and ARCH "backbone" it trains a detector's backbone on ImageNet
instead, or on any folder that has a folder of images for each class.
"""

import logging
import math
from collections import OrderedDict
from typing import Any, Callable, Dict, Sequence

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser
from detectron2.evaluation.testing import print_csv_format
from detectron2.utils import comm
from torch import nn

from kd_d2.checkpoint import load_checkpoint_file
from kd_d2.config import choice
from kd_d2.engine import KDTrainer, launch
from kd_d2.engine.main import check, setup, short_errors
from kd_d2.engine.random_state import preserve_random_state
from kd_d2.projects.dicod.backbone_classifier import build_classifier
from kd_d2.projects.dicod.classifier_data import classifier_data
from kd_d2.projects.dicod.image_classifier import (
    ImageClassifier,
    correct_in_top,
    load_start_weights,
)
from kd_d2.projects.dicod.teacher import fill_classifier, read_metadata

logger = logging.getLogger("kd_d2.train_classifier")

OPTIMIZERS: Dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": lambda parameters, node: torch.optim.Adam(
        parameters, lr=node.BASE_LR, weight_decay=node.WEIGHT_DECAY
    ),
    "sgd": lambda parameters, node: torch.optim.SGD(
        parameters, lr=node.BASE_LR, momentum=node.MOMENTUM, weight_decay=node.WEIGHT_DECAY
    ),
}


def with_schedule(cfg: CfgNode) -> CfgNode:
    """Return ``cfg`` with the epochs of CROP_CLASSIFIER as iterations in SOLVER and TEST.

    What the student's config says there is not for the classifier. Reads or builds the index. The
    last batch of an epoch is filled up.
    """
    data = classifier_data(cfg)
    _check_test_classes(cfg, data.classes(cfg))
    node = cfg.CROP_CLASSIFIER
    epoch = math.ceil(data.num_images(cfg) / node.BATCH_SIZE)
    total = node.EPOCHS * epoch
    cfg = cfg.clone()
    cfg.defrost()
    cfg.KD.ENABLED = False
    cfg.MODEL.WEIGHTS = ""
    solver = cfg.SOLVER
    solver.REFERENCE_WORLD_SIZE = 0
    solver.LR_SCHEDULER_NAME = "WarmupMultiStepLR"
    solver.BASE_LR, solver.GAMMA = node.BASE_LR, node.DROP_FACTOR
    solver.MAX_ITER = total
    solver.STEPS = tuple(epoch * number for number in node.DROP_EPOCHS if number < node.EPOCHS)
    solver.WARMUP_ITERS = 0
    solver.CLIP_GRADIENTS.ENABLED = False
    solver.AMP.ENABLED = node.AMP
    solver.CHECKPOINT_PERIOD = epoch * node.CHECKPOINT_EPOCHS or total
    cfg.TEST.EVAL_PERIOD = epoch * node.EVAL_EPOCHS
    cfg.TEST.PRECISE_BN.ENABLED = False
    cfg.TEST.AUG.ENABLED = False
    cfg.freeze()
    logger.info(f"{epoch} iterations per epoch, {node.EPOCHS} epochs")
    return cfg


def _check_test_classes(cfg: CfgNode, classes: Sequence[str]) -> None:
    data = classifier_data(cfg)
    for name in data.test_names(cfg):
        found = data.test_classes(cfg, name)
        if found != list(classes):
            differing = [pair for pair in zip(found, classes) if pair[0] != pair[1]][:5]
            raise ValueError(
                f"the test data {name} have {len(found)} classes, the classifier {len(classes)}; "
                f"first differences: {differing or 'the count only'}; evaluate on data with the "
                "same classes in the same order"
            )


class ClassifierTrainer(KDTrainer):
    """KDTrainer for a classifier in place of a student, without distillation."""

    def __init__(self, cfg: CfgNode):
        super().__init__(with_schedule(cfg))

    def _facts(self) -> Dict[str, Any]:
        return {**super()._facts(), **self.student.metadata()}

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = build_classifier(cfg, classifier_data(cfg).classes(cfg))
        weights = cfg.CROP_CLASSIFIER.WEIGHTS
        if weights:
            initial = load_start_weights(model, weights, cfg.KD.ALLOW_UNSAFE_LOAD)
            logger.info(f"Loaded {weights}; as initialised: {', '.join(initial)}")
        return model.to(torch.device(cfg.MODEL.DEVICE))

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        node = cfg.CROP_CLASSIFIER
        name = choice("CROP_CLASSIFIER.OPTIMIZER", node.OPTIMIZER, OPTIMIZERS)
        return OPTIMIZERS[name](model.parameters(), node)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        return classifier_data(cfg).train_loader(cfg)

    @classmethod
    def test(cls, cfg: CfgNode, model: ImageClassifier, evaluators=None) -> Dict[str, Any]:
        """Return ``{data set: {"top1", "top5", "crops"}}``, percent and a number, on all ranks."""
        return evaluate(cfg, model)

    def state_dict(self):
        return {**super().state_dict(), "classifier": self.student.metadata()}

    def load_state_dict(self, state):
        ours = self.student.metadata()
        for key, value in state.get("classifier", {}).items():
            if value != ours[key]:
                raise ValueError(
                    f"the interrupted run in {self.cfg.OUTPUT_DIR} trained with {key} {value}, the "
                    f"config says {ours[key]}; resume with the same config"
                )
        super().load_state_dict(state)


@torch.no_grad()
def evaluate(cfg: CfgNode, model: ImageClassifier) -> Dict[str, Any]:
    """Evaluate on all test data; leaves mode and random state as they are."""
    mode = model.training
    model.eval()
    if comm.get_world_size() > 1:
        # running statistics are those of each rank's own batches; the checkpoint has rank 0's
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    results: Dict[str, Any] = OrderedDict()
    data = classifier_data(cfg)
    try:
        with preserve_random_state():
            for name in data.test_names(cfg):
                results[name] = _accuracy(model, data.test_loader(cfg, name))
    finally:
        model.train(mode)
    if comm.is_main_process():
        for name, result in results.items():
            logger.info(f"accuracy on {int(result['crops'])} crops of {name}:")
            print_csv_format({name: {key: result[key] for key in ("top1", "top5")}})
    return results


def _accuracy(model: ImageClassifier, loader) -> Dict[str, float]:
    counts = torch.zeros(3, dtype=torch.float64)
    for batch in loader:
        logits, labels = model(batch).cpu(), batch["labels"]
        hits = [correct_in_top(logits, labels, k) for k in (1, 5)]
        counts += torch.tensor([*hits, len(labels)], dtype=torch.float64)
    top1, top5, crops = torch.stack(comm.all_gather(counts)).sum(dim=0).tolist()
    return {"top1": 100 * top1 / crops, "top5": 100 * top5 / crops, "crops": crops}


def prepare(args) -> Callable[[], Any]:
    """Build everything, so that the user's mistakes are found here; return the job.

    Raises:
        ValueError, FileNotFoundError: config, data and weights do not fit together.
    """
    cfg = setup(args)
    if not args.eval_only:
        trainer = ClassifierTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train
    if not cfg.MODEL.WEIGHTS:
        raise ValueError("--eval-only needs a classifier: give its checkpoint as MODEL.WEIGHTS")
    path = cfg.MODEL.WEIGHTS
    checkpoint = load_checkpoint_file(path, cfg.KD.ALLOW_UNSAFE_LOAD)
    facts = read_metadata(checkpoint, path)
    _check_test_classes(cfg, facts["classes"])
    model = build_classifier(cfg, facts["classes"])
    for key, value in model.metadata().items():
        if key != "losses" and value != facts[key]:
            raise ValueError(
                f"MODEL.WEIGHTS {path} is a classifier with {key} {facts[key]}, the config says "
                f"{value}"
            )
    fill_classifier(model, checkpoint, path, cfg.KD.TEACHER.ALLOW_KEY_MISMATCH)
    model.to(torch.device(cfg.MODEL.DEVICE))
    return lambda: evaluate(cfg, model)


def run(args):
    with short_errors():
        job = prepare(args)
    return job()


def cli() -> None:
    args = default_argument_parser().parse_args()
    with short_errors():
        cfg = check(args)
    launch(run, args, main_args=(args,), device=cfg.MODEL.DEVICE)


if __name__ == "__main__":
    cli()
