"""DeFeat: foreground and background worked out by hand, backbone terms, logits of RoIs."""

import pytest
import torch
from torch.nn import functional as F

from kd_d2.baselines import DeFeat
from kd_d2.baselines.defeat_head import proposal_terms
from tests.baselines.feature_cases import (
    ToyContext,
    kd_model,
    level_keys,
    networks,
    run_step,
    terms_of,
)
from tests.fixtures import tiny_batch


def _raw(student, boxes):
    keys = level_keys()
    distiller = DeFeat(student_keys=keys, teacher_keys=keys, weights={"fg": 3.0, "bg": 12.0})
    torch.nn.init.dirac_(distiller.pair_terms["fg"].adapter.layers[0].weight)
    ctx = ToyContext({"neck.p3": student}, {"neck.p3": torch.full((1, 2, 4, 4), 5.0)}, [boxes])
    weighted = distiller(ctx)
    assert weighted["bg"].item() == pytest.approx(12 * ctx.raw["defeat/bg"].item())
    return ctx.raw["defeat/fg"].item(), ctx.raw["defeat/bg"].item()


def test_worked_out():
    """0.1 apart everywhere: 0.005 a side, however many cells it has; box (8,8,20,20) is (1,1)."""
    student = torch.full((1, 2, 4, 4), 5.1)
    assert _raw(student, [(8, 8, 20, 20)]) == pytest.approx((0.005, 0.005), rel=1e-3)
    assert _raw(student, [(0, 0, 24, 24)]) == pytest.approx((0.005, 0.005), rel=1e-3)
    student[0, :, 1, 1] = 6.0
    fg, bg = _raw(student, [(8, 8, 20, 20)])
    assert fg == pytest.approx(0.5) and bg == pytest.approx(0.005, rel=1e-3)
    assert _raw(student, [])[0] == 0.0


def test_terms_share_their_convolutions():
    distiller = kd_model("DeFeat", *networks()).distillers["defeat"]
    fg, bg = (distiller.pair_terms[name].adapter for name in ("fg", "bg"))
    assert fg is bg and len(fg.layers) == 5
    assert distiller.weights == {"fg": 3.0, "bg": 12.0}
    keys = level_keys(256)
    wide = DeFeat(student_keys=keys, teacher_keys=keys, weights={"fg": 1.0, "bg": 1.0})
    assert sum(p.numel() for p in wide.parameters()) == 590_080


def test_backbone_terms():
    """Stages of other widths, behind convolutions; no such term at weight 0."""
    student, teacher = networks(
        **{"MODEL.RESNETS.DEPTH": 50, "MODEL.RESNETS.RES2_OUT_CHANNELS": 64}
    )
    own = {"BACKBONE_FG_WEIGHT": 1.0, "BACKBONE_BG_WEIGHT": 2.0, "FG_WEIGHT": 0.0}
    model = kd_model("DeFeat", student, teacher, **own)
    adapter = model.distillers["defeat"].pair_terms["backbone_fg"].adapter
    assert [layer.in_channels for layer in adapter.layers] == [128, 256, 512]
    assert len({layer.out_channels for layer in adapter.layers}) == 3
    terms = terms_of(run_step(model, tiny_batch()))
    assert set(terms) == {"bg", "backbone_fg", "backbone_bg"}
    assert all(torch.isfinite(v) and v > 0 for v in terms.values())


def _kl_rows(student, teacher, temperature):
    s, t = (F.log_softmax(x / temperature, dim=1) for x in (student, teacher))
    return temperature**2 * (t.exp() * (t - s)).sum(dim=1)


class _Rois:
    """A teacher or student that is only logits on proposals."""

    def __init__(self, logits):
        self.logits = logits

    def run(self, keys, boxes):
        return {"roi.cls": self.logits}


def test_kl_worked_out():
    """T = (2, 0, 0), one row of the foreground: 0.433040, and half of it beside an equal row."""

    def value(student, teacher, labels):
        proposals = [type("P", (), {"proposal_boxes": None, "gt_classes": torch.tensor(labels)})]
        ctx = ToyContext({"proposals": proposals, "roi.cls": student}, {})
        ctx.teacher = _Rois(teacher)
        terms = proposal_terms(1.0, 1.0, 1.0)
        return [terms[name][0](ctx).item() for name in ("head_fg", "head_bg")]

    student, teacher = torch.zeros(1, 3), torch.tensor([[2.0, 0.0, 0.0]])
    assert value(student, teacher, [1]) == pytest.approx([0.433040, 0.0], abs=1e-6)
    assert value(student, teacher, [2]) == pytest.approx([0.0, 0.433040], abs=1e-6)
    both = torch.cat([teacher, student])
    assert value(torch.zeros(2, 3), both, [0, 1])[0] == pytest.approx(0.216520, abs=1e-6)
    assert value(torch.zeros(0, 3), torch.zeros(0, 3), [])[0] == 0.0


def test_logits_of_rois():
    """On the student's own proposals, against a second pass of both heads."""
    student, teacher = networks("GeneralizedRCNN")
    own = {"HEAD_FG_WEIGHT": 2.0, "HEAD_BG_WEIGHT": 3.0, "HEAD_TEMPERATURE": 2.0}
    model = kd_model("DeFeat", student, teacher, "GeneralizedRCNN", **own)
    batch, seen = tiny_batch(), {}
    term = model.distillers["defeat"].pair_terms["head_fg"]
    hook = student.roi_heads.box_predictor.register_forward_hook(
        lambda module, inputs, output: seen.update(cls=output[0])
    )
    original = term.source.__class__.__call__

    def spy(self, ctx):
        seen["proposals"] = ctx.student["proposals"]
        return original(self, ctx)

    term.source.__class__.__call__ = spy
    try:
        terms = terms_of(run_step(model, batch))
    finally:
        term.source.__class__.__call__ = original
        hook.remove()
    with torch.no_grad():
        network = teacher.model
        features = network.backbone(network.preprocess_image(batch).tensor)
        levels = [features[f] for f in network.roi_heads.box_in_features]
        pooled = network.roi_heads.box_pooler(levels, [p.proposal_boxes for p in seen["proposals"]])
        logits = network.roi_heads.box_predictor(network.roi_heads.box_head(pooled))[0]
        rows = _kl_rows(seen["cls"], logits, 2.0)
        labels = torch.cat([p.gt_classes for p in seen["proposals"]])
    assert (labels < 3).any() and (labels == 3).any()
    assert terms["head_fg"].item() == pytest.approx(2 * rows[labels < 3].mean().item(), rel=1e-3)
    assert terms["head_bg"].item() == pytest.approx(3 * rows[labels == 3].mean().item(), rel=1e-3)
    predictor = student.roi_heads.box_predictor.cls_score.weight
    (gradient,) = torch.autograd.grad(terms["head_fg"], predictor)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize(
    "arch, options, message",
    [
        ("GFL", {"HEAD_FG_WEIGHT": 1.0}, "HEAD_FG_WEIGHT .*'roi.cls', but the student has no RoI"),
        ("GFL", {"FG_WEIGHT": -1.0}, "KD.DEFEAT.FG_WEIGHT must be at least 0, got -1.0"),
        ("GFL", {"FG_WEIGHT": 0.0, "BG_WEIGHT": 0.0}, "KD.DEFEAT: all weights are 0"),
        ("GFL", {"HEAD_TEMPERATURE": 0.0}, "KD.DEFEAT.HEAD_TEMPERATURE must be positive"),
    ],
)
def test_values_that_cannot_work(arch, options, message):
    with pytest.raises(ValueError, match=message):
        kd_model("DeFeat", *networks(arch), arch, **options)
