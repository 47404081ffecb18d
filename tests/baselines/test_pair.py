"""Losses composed in the config: YAML to loss, what is refused, and the way back to YAML."""

import pytest
import torch
from detectron2.utils.events import EventStorage

from kd_d2.baselines import Pair
from kd_d2.blocks import Valid
from kd_d2.checkpoint import load_yaml_config, merge_opts
from kd_d2.distillation import KDModel, build_distillers, build_tap
from tests.fixtures import teacher_of, tiny_batch, tiny_cfg, tiny_model

YAML = """
KD:
  DISTILLERS: ("Pair",)
  PAIR:
    TERMS:
      near:
        SOURCE: "MapSource('neck', levels=(0, 1))"
        REGION: "NearAnchor(0.5, scope='each')"
        ADAPTER: "ConvAdapter(3, relu=True)"
        NORMALISER: "Weights(2.0)"
        WEIGHT: 0.01
      logits:
        SOURCE: DenseSource('cls')
        REGION: "Product(Assigned('pos'), Valid)"
        DISTANCE: "QFL(gamma=2.0)"
        NORMALISER: Positives
        LEVELS: mean
      plain:
        SOURCE: MapSource
        WEIGHT: 3
"""


def _cfg(tmp_path, text=YAML, arch="GFL"):
    path = tmp_path / "pair.yaml"
    path.write_text(text)
    cfg = tiny_cfg(arch)
    load_yaml_config(cfg, str(path))
    return cfg


def _build(cfg, arch="GFL"):
    student, teacher = tiny_model(arch, 0), teacher_of(tiny_model(arch, 1))
    torch.manual_seed(0)
    distillers, schedules = build_distillers(cfg, build_tap(student).keys(student), teacher.keys)
    return KDModel(student=student, distillers=distillers, teacher=teacher, schedules=schedules)


def test_a_yaml_becomes_the_losses_it_describes(tmp_path):
    model = _build(_cfg(tmp_path))
    distiller = model.distillers["pair"]
    assert isinstance(distiller, Pair) and distiller.weights == {
        "near": 0.01,
        "logits": 1.0,
        "plain": 3.0,
    }
    batch = tiny_batch()
    with EventStorage(0):
        losses = model(batch)
    names = [f"loss_kd/pair/{term}" for term in ("near", "logits", "plain")]
    assert all(losses[name] > 0 for name in names)

    with torch.no_grad():
        ours, theirs = (
            m.backbone(m.preprocess_image(batch).tensor)
            for m in (model.student, model.teacher.model)
        )
    levels = model.student.head_in_features
    plain = sum((ours[f] - theirs[f]).square().mean() for f in levels)
    torch.testing.assert_close(losses[names[2]].detach(), 3 * plain, rtol=1e-4, atol=1e-5)
    convs = [layer[0] for layer in distiller.pair_terms["near"].adapter.layers]
    assert len(convs) == 2 and tuple(convs[0].weight.shape) == (32, 32, 3, 3)

    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.any() for conv in convs for p in conv.parameters())
    assert all(p.grad is None for p in model.teacher.model.parameters())


def test_the_config_survives_its_dump_and_can_be_overridden(tmp_path):
    cfg = _cfg(tmp_path)
    again = tmp_path / "config.yaml"
    again.write_text(cfg.dump())
    loaded = tiny_cfg("GFL")
    load_yaml_config(loaded, str(again))
    assert loaded.KD.PAIR == cfg.KD.PAIR and loaded.KD.PAIR.TERMS.near.WEIGHT == 0.01
    assert loaded.KD.PAIR.TERMS.near.SOURCE == "MapSource('neck', levels=(0, 1))"
    frozen = loaded.clone()
    frozen.freeze()
    first, second = _build(cfg), _build(frozen)
    batch = tiny_batch()
    with EventStorage(0):
        a, b = first(batch), second(batch)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    state = first.distillers.state_dict()
    assert state and second.distillers.load_state_dict(state, strict=True)

    merge_opts(loaded, ["KD.PAIR.TERMS.near.WEIGHT", "0.5", "KD.PAIR.TERMS.near.REGION", "Valid"])
    changed = _build(loaded).distillers["pair"]
    assert changed.weights["near"] == 0.5
    assert isinstance(changed.pair_terms["near"].region, Valid)
    with pytest.raises(ValueError, match="KD.PAIR.TERMS.plain.REGION"):  # only what the file has
        merge_opts(loaded, ["KD.PAIR.TERMS.plain.REGION", "Valid"])


def test_a_child_config_changes_one_field(tmp_path):
    (tmp_path / "base.yaml").write_text(YAML)
    text = '_BASE_: "base.yaml"\nKD:\n  PAIR:\n    TERMS:\n      plain: {REGION: "Valid"}\n'
    terms = _cfg(tmp_path, text).KD.PAIR.TERMS
    assert terms.plain == {"SOURCE": "MapSource", "WEIGHT": 3, "REGION": "Valid"}
    assert terms.near.WEIGHT == 0.01 and set(terms) == {"near", "logits", "plain"}


def test_a_term_with_schedule(tmp_path):
    cfg = _cfg(tmp_path)
    cfg.KD.PAIR.SCHEDULE.START_ITER = 5
    model = _build(cfg)
    with EventStorage(0):
        losses = model(tiny_batch())
    assert all(losses[k] == 0 and losses[k].requires_grad for k in losses if "kd" in k)


@pytest.mark.parametrize(
    "fields, message",
    [
        ("{SOURCE: MapSource, REGOIN: Valid}", r"TERMS\.feat has no field REGOIN; fields: ADAPTER"),
        ("{REGION: Valid}", r"TERMS\.feat\.SOURCE is missing"),
        ("{SOURCE: MapSource, WEIGHT: high}", r"TERMS\.feat\.WEIGHT must be a number, got 'high'"),
        ("{SOURCE: MapSource, WEIGHT: True}", r"TERMS\.feat\.WEIGHT must be a number, got 'True'"),
        ("{SOURCE: MapSource, LEVELS: max}", r"TERMS\.feat\.LEVELS must be one of sum, mean"),
        ("{SOURCE: MapSorce}", r"TERMS\.feat\.SOURCE: 'MapSorce' is not registered in KD_SOURCES"),
        ("{SOURCE: MapSource, REGION: 'GTCells(fpn=1)'}", r"TERMS\.feat\.REGION: .*'fpn'"),
        ("{SOURCE: MapSource('nack')}", r"Pair, term 'feat': MapSource compares 'nack'"),
        ("{SOURCE: DenseSource('ctr')}", r"Pair, term 'feat': DenseSource compares 'pred.ctr'"),
        ("MapSource", r"TERMS\.feat must be a node with SOURCE"),
    ],
)
def test_mistakes_stop_before_the_first_step(tmp_path, fields, message):
    text = f'KD:\n  DISTILLERS: ("Pair",)\n  PAIR:\n    TERMS:\n      feat: {fields}\n'
    with pytest.raises(ValueError, match=message):
        _build(_cfg(tmp_path, text))


def test_no_terms_at_all(tmp_path):
    with pytest.raises(ValueError, match="KD.PAIR.TERMS is empty"):
        _build(_cfg(tmp_path, 'KD:\n  DISTILLERS: ("Pair",)\n'))


def test_fields_beside_the_terms_are_refused(tmp_path):
    text = "KD: {PAIR: {TERM: {feat: {SOURCE: MapSource}}}}"
    with pytest.raises(ValueError, match="KD.PAIR.TERM .did you mean KD.PAIR.TERMS"):
        _cfg(tmp_path, text)


@pytest.mark.parametrize("arch", ["RetinaNet", "FCOS", "ATSS", "GeneralizedRCNN"])
def test_two_steps_of_every_family(tmp_path, arch):
    scores = "TeacherConf" if arch == "GeneralizedRCNN" else "GISelect(5)"
    text = f"""
KD:
  DISTILLERS: ("Pair",)
  PAIR:
    TERMS:
      fg: {{SOURCE: MapSource, REGION: "GTCells('fpn')", NORMALISER: "Weights(floor=1.0)"}}
      bg: {{SOURCE: MapSource, REGION: "Complement(GTCells('fpn'))"}}
      vlr: {{SOURCE: MapSource, REGION: VLR}}
      differ: {{SOURCE: MapSource, REGION: PredDiff, ADAPTER: "ConvAdapter(1, shared=True)"}}
      scores: {{SOURCE: MapSource, REGION: "{scores}"}}
"""
    model = _build(_cfg(tmp_path, text, arch), arch)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for step, num_gt in enumerate(((3, 2), 0)):
        with EventStorage(step):
            losses = model(tiny_batch(num_gt=num_gt))
        kd = {k: v for k, v in losses.items() if "loss_kd" in k}
        assert len(kd) == 5 and all(torch.isfinite(v) for v in kd.values())
        assert kd["loss_kd/pair/bg"] > 0 and kd["loss_kd/pair/differ"] > 0
        assert (kd["loss_kd/pair/fg"] > 0) == bool(num_gt) == (kd["loss_kd/pair/vlr"] > 0)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
