"""Training of the pool: subnets by iteration, resume, evaluation, extraction, two processes."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from kd_d2.engine import main as engine_main
from kd_d2.projects.jointdetnas.elastic_config import pool_of
from kd_d2.projects.jointdetnas.extraction import CalibrationBatches, extract, recalibrate
from kd_d2.projects.jointdetnas.subnet import Subnet, iteration_generator
from tests.distributed.test_two_processes import assert_close
from tests.engine import support
from tests.fixtures import CLASSES, registered_toy_dataset
from tests.projects.jointdetnas import pool_workers
from tests.projects.jointdetnas.elastic_cases import elastic_cfg, supernet

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / "projects/JointDetNAS/train_pool.py"
SMALLEST = "d1-1-1-1_w4-4-4-4_n4_s4"
ONE = {
    "MODEL.ELASTIC_RESNET.MIN_DEPTHS": (2, 2, 3, 2),
    "MODEL.ELASTIC_RESNET.WIDTHS": (6,),
}


def script():
    spec = importlib.util.spec_from_file_location("train_pool", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Subnets(HookBase):
    """The active subnet of every step, and the parameters that got no gradient in it."""

    def __init__(self):
        self.codes, self.without_gradient = {}, {}

    def after_step(self):
        self.codes[self.trainer.iter] = str(self.trainer.supernet.active)
        self.without_gradient[self.trainer.iter] = [
            name for name, p in self.trainer.student.named_parameters() if p.grad is None
        ]


def pool_cfg(folder, name, output="output", evaluate=False, **changes):
    """The second or third phase: the supernet of the phase before as start and as teacher."""
    values = {
        "DATASETS.TRAIN": (name,),
        "DATASETS.TEST": (name,) if evaluate else (),
        "INPUT.MAPPER": "RandomResolutionMapper",
        "MODEL.WEIGHTS": str(folder / "phase0.pth"),
        "MODEL.ELASTIC_RESNET.RECALIBRATION.BATCHES": 2,
        "MODEL.ELASTIC_RESNET.RECALIBRATION.IMAGES": 2,
        "KD.ENABLED": True,
        "KD.DISTILLERS": ("JointDetNAS",),
        "KD.JOINTDETNAS.FEAT.ADAPTER_CHANNELS": 48,
        "KD.TEACHER.CONFIG_FILE": str(folder / "phase0.yaml"),
        "KD.TEACHER.WEIGHTS": str(folder / "phase0.pth"),
        "KD.DDP_FIND_UNUSED": True,
        "SOLVER.MAX_ITER": 6,
        "SOLVER.CHECKPOINT_PERIOD": 3,
        "OUTPUT_DIR": str(folder / output),
        **changes,
    }
    return elastic_cfg(**values)


def write_phase0(folder, name):
    """The phase before: config and weights of a supernet."""
    _, net = supernet()
    state = {"model": net.model.state_dict(), "run_info": {"classes": list(CLASSES)}}
    torch.save(state, folder / "phase0.pth")
    (folder / "phase0.yaml").write_text(elastic_cfg(**ONE, **{"DATASETS.TRAIN": (name,)}).dump())


def train(folder, name, output="output", stop_at=None, resume=False, hooks=(), **changes):
    cfg = pool_cfg(folder, name, output, **changes)
    stop = [support.StopAt(stop_at)] if stop_at else []
    return support.train(cfg, script().PoolTrainer, resume, [*hooks, *stop])


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    with registered_toy_dataset(folder, 6, size=(60, 80)) as name:
        write_phase0(folder, name)
        yield folder, name


def expected_subnets(cfg, iterations):
    space = pool_of(cfg)[1]
    return {i: str(space.sample(iteration_generator(cfg.SEED, i))) for i in iterations}


def skipped(code):
    """Prefixes of the parameters that a subnet leaves out, by hand from its code."""
    depths = map(int, code.split("_")[0][1:].split("-"))
    blocks = zip(("res2", "res3", "res4", "res5"), (2, 2, 3, 2), depths)
    return tuple(
        f"backbone.bottom_up.{stage}.{index}."
        for stage, number, depth in blocks
        for index in range(depth, number)
    )


# ----------------------------------------------------------------------------------- training
def test_a_phase_trains_another_subnet_in_every_iteration(pool, tmp_path):
    seen = Subnets()
    trainer = train(*pool, hooks=[seen], **{"OUTPUT_DIR": str(tmp_path)})
    assert seen.codes == expected_subnets(trainer.cfg, range(6))
    assert len(set(seen.codes.values())) > 4
    for iteration, code in seen.codes.items():
        prefixes = skipped(code)
        for name in seen.without_gradient[iteration]:
            assert name.startswith(prefixes), (code, name)
        for name, _ in trainer.student.named_parameters():
            if prefixes and name.startswith(prefixes):
                assert name in seen.without_gradient[iteration]
    for values in trainer.curve.values():
        assert all(values[f"loss_kd/jointdetnas/{term}"] > 0 for term in ("feat", "cls", "reg"))
    assert trainer.supernet.active == trainer.supernet.geometry.largest
    lines = [json.loads(x) for x in (tmp_path / "metrics.json").open()]
    assert {"pool/blocks", "pool/width", "eta_seconds"} <= {key for line in lines for key in line}
    # the teacher is the frozen supernet, whole and as stored
    teacher = trainer.teacher.model
    stored = torch.load(pool[0] / "phase0.pth")["model"]
    assert all(torch.equal(stored[k], v) for k, v in teacher.state_dict().items())
    assert not teacher.training
    assert teacher.backbone(torch.zeros(1, 3, 64, 64))["p2"].shape[1] == 48


def test_resume_reproduces_the_loss_curve_and_the_subnets(pool, tmp_path):
    changes = {"MODEL.ELASTIC_RESNET.SORT_CHANNELS": True}
    runs = []
    for output, kwargs in (
        ("whole", {}),
        ("parts", {"stop_at": 4}),
        ("parts", {"resume": True}),
    ):
        seen = Subnets()
        target = {"OUTPUT_DIR": str(tmp_path / output)}
        trainer = train(*pool, hooks=[seen], **kwargs, **changes, **target)
        runs.append((trainer.curve, seen.codes))
    (whole, codes), _, (resumed, later) = runs
    assert sorted(whole) == list(range(6)) and sorted(resumed) == [3, 4, 5]
    assert resumed == {i: whole[i] for i in (3, 4, 5)}
    assert later == {i: codes[i] for i in (3, 4, 5)}
    states = [torch.load(tmp_path / n / "model_final.pth")["model"] for n in ("whole", "parts")]
    support.assert_same_state(*states)


def test_channels_are_sorted_once_at_the_start(pool, tmp_path, monkeypatch):
    module, calls = script(), []
    cfg = pool_cfg(*pool, **{"OUTPUT_DIR": str(tmp_path), "SOLVER.MAX_ITER": 1})
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.MODEL.ELASTIC_RESNET.SORT_CHANNELS = True
    cfg.MODEL.ELASTIC_RESNET.SORT_KEEP_WIDTHS = (5,)
    monkeypatch.setattr(module, "sort_channels", lambda net, keep: calls.append((net, keep)))
    trainer = support.train(cfg, module.PoolTrainer)
    assert calls == [(trainer.supernet, (5,))] and trainer.supernet.model is trainer.student
    cfg.SOLVER.MAX_ITER = 2
    support.train(cfg, module.PoolTrainer, resume=True)
    assert len(calls) == 1
    cfg.MODEL.ELASTIC_RESNET.SORT_CHANNELS = False
    support.train(cfg, module.PoolTrainer)
    assert len(calls) == 1


def test_first_phase_trains_the_supernet_alone(pool, tmp_path):
    seen = Subnets()
    changes = {**ONE, "KD.ENABLED": False, "KD.DDP_FIND_UNUSED": False, "SOLVER.MAX_ITER": 2}
    trainer = train(*pool, hooks=[seen], evaluate=True, **changes, **{"OUTPUT_DIR": str(tmp_path)})
    assert set(seen.codes.values()) == {"d2-2-3-2_w6-6-6-6_n6_s6"}
    assert not any(seen.without_gradient.values())
    assert "bbox" in trainer._last_eval_results
    stored = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert stored["arch"]["pool"]["depths"] == [2, 2, 3, 2]
    # plain training of Detectron2's kind gives the same weights
    plain = support.train(
        pool_cfg(*pool, evaluate=True, **changes, **{"OUTPUT_DIR": str(tmp_path / "plain")})
    )
    support.assert_same_state(dict(plain.student.state_dict()), dict(stored["model"]))


# --------------------------------------------------------------------- evaluation, extraction
def options(pool, tmp_path, *arguments, **changes):
    """Parsed command line with a config file."""
    folder, name = pool
    values = {"OUTPUT_DIR": str(tmp_path / "out"), **changes}
    cfg = pool_cfg(folder, name, evaluate=True, **values)
    file = tmp_path / "config.yaml"
    file.write_text(cfg.dump())
    return script().parser().parse_args(["--config-file", str(file), *arguments])


def test_extracted_subnet_is_what_evaluation_saw(pool, tmp_path):
    """The same APs from --eval-only, from the stand-alone files, and from train_net.py's code."""
    module = script()
    args = options(pool, tmp_path, "--eval-only")
    results = module.prepare(args)()
    assert set(results) == {"largest", "smallest"}
    output = tmp_path / "subnet"
    path = module.prepare(options(pool, tmp_path, "--extract", SMALLEST, "--output", str(output)))()
    assert Path(path) == output / "model.pth"
    data = torch.load(path, weights_only=True)
    assert data["run_info"]["classes"] == list(CLASSES) and data["pool"]["subnet"] == SMALLEST
    assert data["arch"]["encoding"] == "[(8,8,32)],[(16,16,64)],[(32,32,128)],[(64,64,256)]"
    cfg, net = supernet()
    cfg, reference = extract(pool_cfg(*pool), net.model, Subnet.parse(SMALLEST))
    recalibrate(reference, CalibrationBatches(pool_cfg(*pool)))
    support.assert_same_state(dict(data["model"]), dict(reference.state_dict()))
    ordinary = engine_main.prepare(
        script()
        .parser()
        .parse_args(
            ["--config-file", str(output / "config.yaml"), "--eval-only", "MODEL.WEIGHTS", path]
        )
    )()
    # an AP of sizes that do not occur is NaN
    assert repr(ordinary) == repr(results["smallest"]) and ordinary["bbox"]["AP"] >= 0


def test_evaluation_leaves_random_numbers_and_the_model_alone(pool, tmp_path):
    module = script()
    cfg = pool_cfg(*pool, evaluate=True, **{"OUTPUT_DIR": str(tmp_path)})
    _, net = supernet()
    net.set_active(SMALLEST)
    before = {k: v.clone() for k, v in net.model.state_dict().items()}
    state = torch.get_rng_state()
    module.PoolTrainer.test(cfg, net.model.train())
    assert torch.equal(torch.get_rng_state(), state) and net.model.training
    assert str(net.active) == SMALLEST
    assert all(torch.equal(before[k], v) for k, v in net.model.state_dict().items())


# ------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"KD.DDP_FIND_UNUSED": False}, "KD.DDP_FIND_UNUSED must be True"),
        ({"MODEL.ELASTIC_RESNET.WIDTHS": (4, 5)}, "must contain MAX_WIDTH"),
        ({"TEST.PRECISE_BN.ENABLED": True}, "PRECISE_BN.ENABLED must be False"),
        ({"MODEL.ELASTIC_RESNET.EVAL_SUBNETS": ("best",)}, "'best' is no code"),
        ({"MODEL.RPN.HEAD_NAME": "StandardRPNHead"}, "MODEL.RPN.HEAD_NAME of a supernet"),
    ],
)
def test_mistakes_are_found_before_the_first_step(pool, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        script().prepare(options(pool, tmp_path, **changes))


def test_extraction_needs_a_pool(pool, tmp_path, monkeypatch, capsys):
    args = options(pool, tmp_path, "--extract", SMALLEST, "--output", "x", **{"MODEL.WEIGHTS": ""})
    with pytest.raises(ValueError, match="--extract takes a subnet out of a pool"):
        script().prepare(args)()
    monkeypatch.setattr("sys.argv", ["train_pool.py", "--extract", SMALLEST])
    with pytest.raises(SystemExit, match="--extract and --output belong together"):
        script().cli()


# ------------------------------------------------------------------------------- two processes
@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    with registered_toy_dataset(folder, 6, size=(60, 80)) as name:
        write_phase0(folder, name)
        (folder / "name.txt").write_text(name)
        support.data_module(folder / "data.py", name)
        program = ROOT / "tests/projects/jointdetnas/pool_workers.py"
        code, output = support.run_program([program, folder], timeout=500)
        assert code == 0, output[-4000:]
    return [torch.load(folder / f"rank{rank}.pth") for rank in range(2)] + [folder]


@pytest.mark.distributed
def test_batch_norm_sees_the_batches_of_both(ranks):
    """Plain batch norm of one process on both batches together."""
    norm = nn.BatchNorm2d(5)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, 7)[:5])
        norm.bias.copy_(torch.linspace(-1, 1, 7)[:5])
    x = torch.cat([pool_workers.images(rank) for rank in range(2)]).requires_grad_()
    y = norm(x)
    (y.tanh() * torch.linspace(-1, 1, 5).view(1, 5, 1, 1)).sum().backward()
    ours = [rank["equal"] for rank in ranks[:2]]
    torch.testing.assert_close(torch.cat([r["output"] for r in ours]), y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.cat([r["input"] for r in ours]), x.grad, rtol=1e-4, atol=1e-5)
    weight = sum(r["weight"][:5] for r in ours)
    torch.testing.assert_close(weight, norm.weight.grad, rtol=1e-4, atol=1e-4)
    for rank in ours:
        torch.testing.assert_close(rank["mean"][:5], norm.running_mean, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(rank["variance"][:5], norm.running_var, rtol=1e-4, atol=1e-6)
        assert torch.equal(rank["mean"][5:], torch.zeros(2))


@pytest.mark.distributed
def test_every_pixel_counts_the_same_in_batches_of_other_sizes(ranks):
    """Ranks draw other resolutions."""
    parts = [pool_workers.images(r, (6, 8 - 3 * r)).transpose(0, 1).flatten(1) for r in range(2)]
    pixels = torch.cat(parts, dim=1).double()
    assert parts[0].shape != parts[1].shape
    for rank in ranks[:2]:
        mean = rank["unequal"]["mean"][:5].double() / 0.1
        torch.testing.assert_close(mean, pixels.mean(1), rtol=1e-4, atol=1e-5)
        variance = (rank["unequal"]["variance"][:5].double() - 0.9) / 0.1
        torch.testing.assert_close(variance, pixels.var(1), rtol=1e-4, atol=1e-4)


@pytest.mark.distributed
def test_ranks_draw_the_same_subnets_and_train_alike(ranks):
    first, second, folder = ranks
    cfg = pool_cfg(folder, "any")
    assert first["whole"]["subnets"] == second["whole"]["subnets"]
    assert first["whole"]["subnets"] == expected_subnets(cfg, range(6))
    for run in ("whole", "resumed"):
        for name, value in first["whole"]["parameters"].items():
            assert torch.equal(value, first[run]["parameters"][name]), name
            assert torch.equal(value, second[run]["parameters"][name]), name
    assert "module.distillers.jointdetnas.adapter.weight" in first["whole"]["parameters"]
    # statistics are those of both batches, hence the same, too
    assert_close(first["whole"]["buffers"], second["whole"]["buffers"])
    curves = first["resumed"]["curve"], first["whole"]["curve"]
    assert curves[0] == {i: curves[1][i] for i in (3, 4, 5)}
    for iteration, code in first["whole"]["subnets"].items():
        names = first["whole"]["without_gradient"][iteration]
        assert names == second["whole"]["without_gradient"][iteration]
        assert all(name.startswith(skipped(code)) for name in names) and (
            names or not skipped(code)
        )


@pytest.mark.distributed
def test_both_evaluate_the_same_subnets(ranks):
    first, second, _ = ranks
    assert set(first["whole"]["results"]) == {"largest", "smallest"}
    aps = first["whole"]["results"]["smallest"]["bbox"]
    assert "AP" in aps


@pytest.mark.distributed
def test_a_stored_teacher_is_made_once_for_both(ranks):
    (ours, made), (theirs, again) = (rank["taught"] for rank in ranks[:2])
    assert (made, again) == (1, 0) and torch.equal(ours, theirs)
    assert (ranks[2] / "teachers" / SMALLEST / "model.pth").is_file()
