"""Base class of distillers and how KD.DISTILLERS becomes modules; no detector is needed here."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.config import CfgNode, configurable
from torch import nn

from kd_d2.config import add_schedule_config, get_cfg
from kd_d2.distillation import (
    DISTILLER_REGISTRY,
    Distiller,
    KeyInfo,
    LossSchedule,
    build_distillers,
    require_equal,
    teacher_wanted,
)

STUDENT = {"neck": KeyInfo(32, (8, 16)), "pred.cls": KeyInfo(12, (8, 16), (3,))}
TEACHER = {"neck": KeyInfo(64, (8, 16)), "pred.cls": KeyInfo(12, (8, 16), (3,))}


class _Toy(Distiller):
    """Terms "feat" = (a x)^2 and "aux" = 5, with one used and one unused parameter."""

    node = "TOY"

    @configurable
    def __init__(self, *, feat=2.0, aux=0.5, needs=("neck",)):
        super().__init__(
            weights={"feat": feat, "aux": aux}, student_needs=needs, teacher_needs=("neck",)
        )
        self.scale = nn.Parameter(torch.tensor(3.0))
        self.idle = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.tensor(1.0), requires_grad=False)

    @classmethod
    def from_config(cls, cfg, student_keys, teacher_keys):
        node = cls.config_node(cfg)
        return {"feat": node.FEAT_WEIGHT, "needs": tuple(node.NEEDS)}

    def compute(self, ctx):
        return {"feat": (self.scale * ctx.x) ** 2, "aux": torch.tensor(5.0)}


def _ctx(x=2.0, **kwargs):
    return SimpleNamespace(x=torch.tensor(x, requires_grad=True), raw={}, **kwargs)


def test_terms_are_weighted_and_raw_values_are_kept():
    toy, ctx = _Toy(), _ctx()
    losses = toy(ctx)
    assert toy.terms == ("feat", "aux") and set(losses) == {"feat", "aux"}
    # (3 * 2)^2 = 36, times 2; 5 times 0.5
    assert losses["feat"].item() == 72.0 and losses["aux"].item() == 2.5
    assert {k: v.item() for k, v in ctx.raw.items()} == {"_toy/feat": 36.0, "_toy/aux": 5.0}
    assert not any(v.requires_grad for v in ctx.raw.values())
    sum(losses.values()).backward()
    assert toy.scale.grad.item() == 2 * 2 * 6 * 2  # weight * d(ax)^2/da = 2 * 2 (ax) x
    assert ctx.x.grad.item() == 2 * 2 * 6 * 3


@pytest.mark.parametrize("term", ["feat", "aux"])
def test_every_term_alone_is_connected_to_every_trainable_parameter(term):
    toy = _Toy()
    toy(_ctx())[term].backward()
    assert (toy.idle.weight.grad == 0).all() and (toy.idle.bias.grad == 0).all()
    assert toy.scale.grad.item() == (48.0 if term == "feat" else 0.0)
    assert toy.frozen.grad is None


def test_inactive_terms_are_zero_and_connected():
    toy = _Toy()
    like = torch.tensor(1.5, dtype=torch.bfloat16)
    losses = toy.inactive(like)
    assert set(losses) == {"feat", "aux"}
    assert all(v.item() == 0.0 and v.dtype == torch.float32 for v in losses.values())
    losses["aux"].backward()
    trainable = [toy.scale, toy.idle.weight, toy.idle.bias]
    assert all((p.grad == 0).all() for p in trainable) and toy.frozen.grad is None


def test_zero_of_a_distiller_without_parameters():
    class Plain(Distiller):
        def compute(self, ctx):
            return {"a": ctx.x * 1.0}

    plain = Plain(weights={"a": 4.0}, student_needs=())
    assert plain.inactive(torch.tensor(1.0))["a"].item() == 0.0
    losses = plain(_ctx(0.25))
    assert losses["a"].item() == 1.0 and losses["a"].requires_grad


def test_weight_zero_gives_exactly_zero_gradients():
    toy, ctx = _Toy(feat=0.0), _ctx()
    losses = toy(ctx)
    losses["feat"].backward()
    assert losses["feat"].item() == 0.0 and ctx.x.grad.item() == 0.0
    assert ctx.raw["_toy/feat"].item() == 36.0


def test_terms_are_fp32_whatever_compute_returns():
    class Half(Distiller):
        def compute(self, ctx):
            return {"a": torch.tensor(1.5, dtype=torch.bfloat16)}

    loss = Half(weights={"a": 0.1}, student_needs=())(_ctx())["a"]
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.15, rel=1e-6)


@pytest.mark.parametrize("returned", [{"feat": 1.0}, {"feat": 1.0, "aux": 1.0, "more": 1.0}])
def test_other_terms_than_declared_are_an_error_naming_both(returned):
    class Sloppy(_Toy):
        def compute(self, ctx):
            return {k: torch.tensor(v) for k, v in returned.items()}

    message = rf"Sloppy.compute returned .*{sorted(returned)[-1]}.*its terms are \['aux', 'feat'\]"
    with pytest.raises(RuntimeError, match=message):
        Sloppy()(_ctx())


def test_needs_are_checked_on_each_side():
    toy = _Toy(needs=("neck", "pred.cls"))
    toy.validate(STUDENT, TEACHER)
    with pytest.raises(ValueError, match="_Toy needs 'pred.cls' of the student.*similar: neck"):
        toy.validate({"neck": KeyInfo(1)}, TEACHER)
    with pytest.raises(ValueError, match="_Toy needs 'neck' of the teacher"):
        toy.validate(STUDENT, {})
    _Toy(needs=("path:anything",)).validate(STUDENT, TEACHER)


def test_require_equal_names_key_and_both_values():
    require_equal("M", "pred.cls", STUDENT, TEACHER)
    require_equal("M", "neck", STUDENT, TEACHER, attributes=("strides",))
    with pytest.raises(ValueError, match="M compares 'neck'.*channels differ: student 32.*64"):
        require_equal("M", "neck", STUDENT, TEACHER)
    other = {"pred.cls": KeyInfo(12, (8, 16), (4,))}
    with pytest.raises(ValueError, match=r"signature differ: student \(3,\), teacher \(4,\)"):
        require_equal("M", "pred.cls", STUDENT, other)


# ----------------------------------------------------------------------------- from the config
@pytest.fixture
def registered():
    DISTILLER_REGISTRY.register(_Toy)
    yield
    DISTILLER_REGISTRY._obj_map.pop("_Toy")


def _cfg(*entries, labels=()):
    cfg = get_cfg()
    for name, weight in (("TOY", 2.0), *labels):
        cfg.KD[name] = CfgNode({"FEAT_WEIGHT": weight, "NEEDS": ["neck"]})
        add_schedule_config(cfg.KD[name])
    cfg.KD.DISTILLERS = entries
    cfg.SOLVER.MAX_ITER = 50
    return cfg


def test_an_entry_reads_its_own_node(registered):
    cfg = _cfg("_Toy")
    cfg.KD.TOY.FEAT_WEIGHT = 7.0
    cfg.KD.TOY.SCHEDULE.START_ITER = 10
    distillers, schedules = build_distillers(cfg, STUDENT, TEACHER)
    assert isinstance(distillers, nn.ModuleDict) and list(distillers) == ["_toy"]
    assert distillers["_toy"].weights == {"feat": 7.0, "aux": 0.5}
    assert distillers["_toy"].label == "_toy"
    assert schedules == {"_toy": LossSchedule(10, 50)}


def test_whether_a_teacher_is_wanted_is_asked_with_the_entrys_own_node(registered, monkeypatch):
    cfg = _cfg("_Toy", "_Toy/Coarse", labels=[("COARSE", 9.0)])
    assert teacher_wanted(cfg)
    monkeypatch.setattr(_Toy, "needs_teacher", False)
    assert not teacher_wanted(cfg)
    only_coarse = classmethod(lambda cls, cfg: cls.config_node(cfg).FEAT_WEIGHT > 5)
    monkeypatch.setattr(_Toy, "wants_teacher", only_coarse)
    assert teacher_wanted(cfg)
    cfg.KD.DISTILLERS = ("_Toy",)
    assert not teacher_wanted(cfg)
    cfg.KD.DISTILLERS = ()
    assert not teacher_wanted(cfg)
    cfg.KD.DISTILLERS = ("Toy",)
    with pytest.raises(ValueError, match="KD.DISTILLERS names 'Toy', which is not registered"):
        teacher_wanted(cfg)


def test_labels_have_nodes_and_schedules_of_their_own(registered):
    cfg = _cfg("_Toy", "_Toy/Coarse", labels=[("COARSE", 9.0)])
    cfg.KD.COARSE.SCHEDULE.WARMUP_ITERS = 4
    before = cfg.dump()
    cfg.freeze()
    distillers, schedules = build_distillers(cfg, STUDENT, TEACHER)
    assert list(distillers) == ["_toy", "coarse"]
    assert [d.weights["feat"] for d in distillers.values()] == [2.0, 9.0]
    assert [d.label for d in distillers.values()] == ["_toy", "coarse"]
    assert [s.warmup_iters for s in schedules.values()] == [0, 4]
    assert cfg.dump() == before and cfg.is_frozen()
    ctx = _ctx()
    distillers["coarse"](ctx)
    assert set(ctx.raw) == {"coarse/feat", "coarse/aux"}


def test_the_default_node_is_the_name_in_upper_case():
    class Simple(Distiller):
        pass

    cfg = get_cfg()
    cfg.KD.SIMPLE = CfgNode({"X": 1})
    assert Simple.config_node(cfg).X == 1


@pytest.mark.parametrize(
    "entries, message",
    [
        ((), "KD.DISTILLERS is empty"),
        (("_Toi",), "names '_Toi', which is not registered; known: .*PKD.*_Toy.*KD.IMPORTS"),
        (("_Toy", "_Toy"), "lists '_toy' twice"),
        (("_Toy/coarse", "_Toy/COARSE"), "lists 'coarse' twice"),
        (("_Toy/fine",), "'_Toy/fine' reads KD.FINE, which is not declared.*CONFIG_NODES"),
    ],
)
def test_wrong_entries_say_what_to_do(registered, entries, message):
    import kd_d2.baselines  # noqa: F401  (registers PKD)

    with pytest.raises(ValueError, match=message):
        build_distillers(_cfg(*entries, labels=[("COARSE", 1.0)]), STUDENT, TEACHER)


def test_a_pair_that_cannot_be_distilled_is_refused_when_built(registered):
    cfg = _cfg("_Toy")
    cfg.KD.TOY.NEEDS = ["head.cls[7]"]
    with pytest.raises(ValueError, match=r"_Toy needs 'head.cls\[7\]' of the student"):
        build_distillers(cfg, STUDENT, TEACHER)


def test_an_impossible_schedule_is_refused_when_built(registered):
    cfg = _cfg("_Toy")
    cfg.KD.TOY.SCHEDULE.DECAY = "sometimes"
    with pytest.raises(ValueError, match="SCHEDULE.DECAY.*'sometimes'"):
        build_distillers(cfg, STUDENT, TEACHER)
