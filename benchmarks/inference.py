#!/usr/bin/env python
"""Latency, FLOPs and parameters of detectors at inference, and what a MimicDet's parts cost.

    python benchmarks/inference.py --image-size 800 1344 --rounds 15 --threads 2
    python benchmarks/inference.py --configs projects/MimicDet/configs/.../x.yaml MODEL.WEIGHTS ""

The detectors, MimicDet, RetinaNet and FCOS R-50 unless --configs names others, run one after the
other in every round: preprocessing, network, choice of boxes, decoding; NMS of detections only if
scores pass the config's threshold. Ratios are those to the first detector, computed per round;
medians over the rounds are reported with the quartiles, so that drift of the machine affects all
alike. A detector that has parts for training only is measured as it is deployed.

FLOPs are multiply-adds, as fvcore counts them: convolutions (with output positions * C_in * C_out *
k^2 for deformable ones, which fvcore does not know), linear maps, matrix products, and norms and
interpolation by number of elements. Pointwise operations, RoIAlign and NMS count nothing.

If the first detector has a T-head, a second table compares pairs of ways: training steps with and
without it, the backbone with and without the finest level, the S-head's 1x1 layers on all cells and
on the kept boxes only.
"""

import argparse
import json
import os
from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from step_time import (
    CLOCKS,
    environment,
    headline,
    interleaved,
    random_batch,
    set_up_cpu,
    span,
    spread,
)
from torch import nn

from kd_d2.analysis import deployed, flop_analysis
from kd_d2.checkpoint import KDCheckpointer
from kd_d2.engine.main import build_config, short_errors
from kd_d2.engine.optimizer import build_optimizer
from kd_d2.visualization import markdown_table

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "configs", "inference")
CONFIGS = [os.path.join(FOLDER, f"{n}_r50.yaml") for n in ("mimicdet", "retinanet", "fcos")]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configs", nargs="+", default=CONFIGS, metavar="YAML")
    parser.add_argument(
        "--image-size", type=int, nargs=2, default=(320, 320), metavar="PIXELS", help="H W"
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images of a training step too")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that are not counted")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0: all")
    parser.add_argument("--clock", choices=sorted(CLOCKS), default="wall", help="cpu: all threads")
    parser.add_argument("--output", default="", help="JSON file for the figures")
    parser.add_argument("--opts", nargs="+", default=[], help="KEY VALUE pairs for all detectors")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    set_up_cpu(args.threads)
    with short_errors():
        cfgs = {title(path): build_config(path, args.opts) for path in args.configs}
        models = {name: measured(cfg) for name, cfg in cfgs.items()}
    batch = random_batch(args.batch_size, *args.image_size, num_classes=1)
    detectors = compare_detectors(models, batch, args)
    first = next(iter(cfgs.values()))
    report = {"environment": environment(args, first), "detectors": detectors}
    print(f"{headline(report['environment'])}\n\n{detector_table(detectors)}", flush=True)
    if first.MODEL.META_ARCHITECTURE == "MimicDet" and first.MODEL.MIMICDET.T_HEAD.ENABLED:
        report["pairs"] = compare_pairs(first, args)
        print(f"\n{pair_table(report['pairs'])}")
    if args.output:
        with open(args.output, "w") as f:
            json.dump(report, f, indent=1)
            f.write("\n")


def title(path: str) -> str:
    return os.path.splitext(os.path.basename(path))[0]


# ------------------------------------------------------------------------------- whole detectors
def measured(cfg: CfgNode) -> nn.Module:
    """The detector of a config as it is deployed, with equal random weights every time."""
    torch.manual_seed(0)
    return _with_boxes(cfg, deployed(cfg, cfg.MODEL.WEIGHTS))


def trained(cfg: CfgNode) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(cfg)
    KDCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return _with_boxes(cfg, model)


def _with_boxes(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """With random weights a MimicDet's deltas move every box out of the image, and its heads have
    nothing to do: let the boxes be the anchors."""
    if not cfg.MODEL.WEIGHTS and hasattr(model, "refinement"):
        nn.init.zeros_(model.refinement.rpn_head.anchor_deltas.weight)
    return model


@torch.no_grad()
def compare_detectors(models: Dict[str, nn.Module], batch, args) -> List[Dict[str, Any]]:
    """One entry per detector: seconds, ratio to the first, GFLOPs of the batch, parameters."""

    def forward(model):
        return lambda: model(batch)

    times = interleaved({name: forward(model) for name, model in models.items()}, args)
    first = next(iter(times.values()))
    return [
        {
            "detector": name,
            "parameters": sum(p.numel() for p in model.parameters()),
            "GFLOPs": flops(model, batch) / 1e9,
            "detections": sum(len(x["instances"]) for x in model(batch)),
            "seconds": spread(times[name]),
            "ratio": spread([a / b for a, b in zip(times[name], first)]),
        }
        for name, model in models.items()
    ]


def flops(model: nn.Module, inputs: Any) -> float:
    """Multiply-adds of one forward pass, see the text above."""
    return flop_analysis(model, inputs).total()


def detector_table(detectors: List[Dict[str, Any]]) -> str:
    header = ["detector", "ms", "quartiles", "ratio", "quartiles", "GFLOPs", "parameters, M"]
    return markdown_table(
        header,
        [
            [
                entry["detector"],
                f"{1e3 * entry['seconds']['median']:.1f}",
                span({"quartiles": [1e3 * x for x in entry["seconds"]["quartiles"]]}, 1),
                f"{entry['ratio']['median']:.3f}",
                span(entry["ratio"], 3),
                f"{entry['GFLOPs']:.1f}",
                f"{entry['parameters'] / 1e6:.2f}",
            ]
            for entry in detectors
        ],
    )


# ------------------------------------------------------------------------------ parts of MimicDet
class Pair(NamedTuple):
    """Two ways; the figure is the second's time divided by the first's."""

    ways: Tuple[str, str]
    runs: Tuple[Callable[[], Any], Callable[[], Any]]
    gflops: Tuple[float, ...] = ()
    difference: float = 0.0
    """Largest difference between what both give, relative to the largest number."""


def compare_pairs(cfg: CfgNode, args) -> List[Dict[str, Any]]:
    """One entry per pair: names, seconds, ratio, FLOPs and difference of the outputs."""
    with EventStorage(0):
        pairs = [training_steps(cfg, args), *parts_of_inference(cfg, args)]
        runs = {w: run for pair in pairs for w, run in zip(pair.ways, pair.runs)}
        times = interleaved(runs, args)
    result = []
    for pair in pairs:
        first, second = (times[way] for way in pair.ways)
        result.append(
            {
                "ways": pair.ways,
                "seconds": [spread(first), spread(second)],
                "ratio": spread([b / a for a, b in zip(first, second)]),
                "GFLOPs": pair.gflops,
                "difference": pair.difference,
            }
        )
    return result


def training_steps(cfg: CfgNode, args) -> Pair:
    """Forward, backward and optimizer with the T-head and without it and the finest level."""
    full = trained(cfg)
    small = cfg.clone()
    small.defrost()
    full.deploy(small)
    steps = []
    for model, own in ((_with_boxes(cfg, build_model(small)), small), (full, cfg)):
        optimizer = build_optimizer(own, model.train())
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # random labels: keep the weights where they are
        batch = random_batch(args.batch_size, *args.image_size, model.num_classes)
        steps.append(_step(model, optimizer, batch))
    return Pair(("training step without T-head", "training step with T-head"), tuple(steps))


def _step(model: nn.Module, optimizer, batch) -> Callable[[], None]:
    def run():
        losses = model(batch)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()

    return run


@torch.no_grad()
def parts_of_inference(cfg: CfgNode, args) -> List[Pair]:
    """The finest level, and the 1x1 layers, each in both ways on the same maps."""
    model = trained(cfg).eval()
    images = model.preprocess_image(random_batch(args.batch_size, *args.image_size, 1))
    features = model.pyramid(images.tensor, False)
    refined = model.refinement(images, features)
    aligned = model.s_head([features[name] for name in model.head_in_features], refined.deltas)
    whole = model.pyramid(images.tensor, True)

    def pyramid(with_finest: bool):
        return torch.no_grad()(lambda: model.pyramid(images.tensor, with_finest))

    def predict(gather_first: bool):
        @torch.no_grad()
        def run():
            model.s_head.gather_first = gather_first
            return model.s_head.predict(aligned, refined.proposals)

        return run

    backbone, skip = model.backbone, len(whole) - len(features)
    pointwise = sum(p.weight.numel() for p in _pointwise_layers(model))
    boxes = sum(map(len, refined.proposals))
    cells = sum(x.shape[0] * x.shape[-2] * x.shape[-1] for x in aligned)
    return [
        Pair(
            ("backbone with the finest level", "backbone without it"),
            (pyramid(True), pyramid(False)),
            tuple(
                flops(backbone, inputs) / 1e9 for inputs in (images.tensor, (images.tensor, skip))
            ),
            max(_difference(whole[name], features[name]) for name in features),
        ),
        Pair(
            ("1x1 layers on all cells", "1x1 layers on the kept boxes"),
            (predict(False), predict(True)),
            (cells * pointwise / 1e9, boxes * pointwise / 1e9),
            max(_difference(a, b) for a, b in zip(predict(False)(), predict(True)())),
        ),
    ]


def _pointwise_layers(model: nn.Module) -> List[nn.Module]:
    head = model.s_head
    return [*head.projections, head.cls_score, head.bbox_pred]


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


def pair_table(pairs: List[Dict[str, Any]]) -> str:
    header = ["", "ms", "ratio", "quartiles", "GFLOPs", "difference"]
    rows = []
    for pair in pairs:
        for i, way in enumerate(pair["ways"]):
            milliseconds = f"{1e3 * pair['seconds'][i]['median']:.1f}"
            count = f"{pair['GFLOPs'][i]:.2f}" if pair["GFLOPs"] else ""
            ratio = (f"{pair['ratio']['median']:.3f}", span(pair["ratio"], 3)) if i else ("1", "")
            difference = f"{pair['difference']:.1e}" if i and pair["GFLOPs"] else ""
            rows.append([way, milliseconds, *ratio, count, difference])
    return markdown_table(header, rows)


if __name__ == "__main__":
    main()
