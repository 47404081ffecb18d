"""The benchmark of a step: what it compares, and what it writes."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage

from kd_d2.distillation import DetectorTeacher
from kd_d2.engine.main import build_config
from tests.fixtures import tiny_cfg, write_gfl_pair

ROOT = Path(__file__).resolve().parents[2]
PARTS = (
    *("student step", "teacher forward", "teacher as used"),
    *("distillers", "mechanism", "KD step"),
)


@pytest.fixture(scope="module")
def step_time():
    path = ROOT / "benchmarks" / "step_time.py"
    spec = importlib.util.spec_from_file_location("step_time", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def stored_calls(step_time):
    return sys.modules["stored_calls"]


@pytest.fixture
def config_file(tmp_path):
    return write_gfl_pair(tmp_path, "CrossKD", **{"KD.CROSSKD.POSITION": 1})


def test_denormal_numbers_are_zero_while_time_is_measured(step_time):
    smallest = torch.tensor([1.2e-38])
    assert (smallest / 4).item() > 0
    step_time.set_up_cpu(threads=1)
    assert (smallest / 4).item() == 0 and torch.get_num_threads() == 1


def test_ratios_are_computed_per_round(step_time):
    """The second round ran at half the speed: its ratio is that of the first."""
    first = dict(zip(PARTS, (4.0, 2.0, 1.5, 0.5, 0.1, 6.6)))
    times = {name: [value, 2 * value, value] for name, value in first.items()}
    result = step_time.summary(times)
    assert result["ratio"]["median"] == pytest.approx(1.1)
    assert result["ratio"]["quartiles"] == pytest.approx([1.1, 1.1])
    # of the rounds, not of the medians; the plain teacher is no part of the step
    assert result["seconds"]["rest"]["median"] == pytest.approx(6.6 - 4 - 1.5 - 0.5 - 0.1)
    assert result["seconds"]["student step"]["quartiles"] == pytest.approx([4, 8])
    assert result["seconds"]["KD step"]["median"] == 6.6


def test_table(step_time):
    result = {"config": "a/gfl_r18_r50.yaml", **step_time.summary({name: [1.0] for name in PARTS})}
    with_memory = {**result, "config": "b.yaml", "memory": {"extra": 12.6}}
    lines = step_time.table([result, with_memory]).splitlines()
    assert len(lines) == 4 and {line.count("|") for line in lines} == {9}
    assert lines[2].startswith("| gfl_r18_r50 | 1.000 |")
    assert lines[2].endswith("| 0.500 (0.500 to 0.500) |  |") and lines[3].endswith("| +13 |")


def test_the_four_detectors(step_time):
    names = []
    for file in step_time.TABLE:
        cfg = build_config(file)
        teacher = DetectorTeacher.load_config(cfg)
        names.append(cfg.MODEL.META_ARCHITECTURE)
        assert teacher.MODEL.META_ARCHITECTURE == names[-1]
        assert (cfg.MODEL.RESNETS.DEPTH, teacher.MODEL.RESNETS.DEPTH) == (18, 50)
        assert cfg.KD.DISTILLERS == ("CrossKD",) and cfg.KD.TEACHER.ALLOW_UNTRAINED
        assert not cfg.MODEL.WEIGHTS and not cfg.KD.TEACHER.WEIGHTS
    assert sorted(names) == ["ATSS", "FCOS", "GFL", "RetinaNet"]


def test_the_plain_teacher_computes_what_the_teacher_computes(step_time, stored_calls, config_file):
    """Its forward is the denominator: the same weights, nothing of ours, every prediction."""
    args = step_time.build_parser().parse_args(["--image-size", "64", "96"])
    cfg, model, _, batch = step_time._prepared(config_file, args, distil=True)
    plain, forward = stored_calls.plain_teacher(cfg, model, stored_calls.RoICalls(None))
    outputs = []
    handle = plain.head.register_forward_hook(lambda *call: outputs.append(call[-1]))
    forward(batch)
    handle.remove()
    run = model.teacher.start(batch, (64, 96), ["pred.cls", "pred.box"])
    for key, levels in zip(("pred.cls", "pred.box"), outputs[0]):
        for ours, theirs in zip(run[key], levels):
            assert not theirs.requires_grad
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert all(type(m).__name__ != "FusedNorm" for m in plain.modules())
    assert any(type(m).__name__ == "FusedNorm" for m in model.teacher.model.modules())


def _two_stage(tmp_path, student: str, teacher: str) -> str:
    """GDetKD's config; the queue has room for more steps than a test runs."""
    taught, teaching = tmp_path / f"{student}.yaml", tmp_path / "two_stage_teacher.yaml"
    pooling = {"MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7}
    teaching.write_text(tiny_cfg(teacher, **pooling).dump())
    values = {
        "KD.ENABLED": True,
        "KD.DISTILLERS": ("GDetKD",),
        "KD.TEACHER.CONFIG_FILE": str(teaching),
        "KD.TEACHER.ALLOW_UNTRAINED": True,
        "KD.GDETKD.DENSE.NUM_SAMPLES": 8,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
        **pooling,
    }
    taught.write_text(tiny_cfg(student, **values).dump())
    return str(taught)


@pytest.mark.parametrize("student", ["Cascade", "RetinaNet"])
def test_a_two_stage_teacher(step_time, stored_calls, tmp_path, student):
    """The plain one sees the boxes of the step once each, and answers as the teacher does."""
    file = _two_stage(tmp_path, student, "Cascade" if student == "Cascade" else "GeneralizedRCNN")
    args = step_time.build_parser().parse_args(["--image-size", "64", "96"])
    _, model, _, batch = step_time._prepared(file, args, distil=True)
    with EventStorage(0), model.tap.observe(model.student, model._student_needs) as observation:
        model.student(batch)
    with EventStorage(0):
        ctx = model._context(batch, observation, 0)
        ctx.teacher = noted = stored_calls.note_calls(model, ctx.teacher)
        sum(next(iter(model.distillers.values()))(ctx).values())
    calls = noted.calls
    stages = 3 if student == "Cascade" else 1
    assert len({id(boxes) for _, boxes, _ in calls}) == stages

    plain, forward = stored_calls.plain_teacher(build_config(file), model, noted)
    passes, outputs = [], {}
    handles = [
        module.register_forward_hook(lambda m, i, out, name=name: outputs.update({name: out}))
        for name, module in plain.named_modules()
        if name in ("roi_heads.box_head", "roi_heads.box_head.0", "roi_heads.box_head.2")
    ]
    pooler = plain.roi_heads.box_pooler
    handles.append(pooler.register_forward_hook(lambda *call: passes.append(call[-1])))
    forward(batch)
    for handle in handles:
        handle.remove()
    assert len(passes) == stages and not plain.proposal_generator.training
    for stage in {0, stages - 1}:
        name = f"roi_heads.box_head.{stage}" if stages > 1 else "roi_heads.box_head"
        (theirs,) = [v[k] for _, _, v in calls for k in v if k == f"roi.embed[{stage}]"]
        torch.testing.assert_close(outputs[name], theirs, rtol=1e-4, atol=1e-5)

    view = noted.view([])
    for _ in range(2):  # step after step in the order of the calls
        for keys, boxes, values in calls:
            assert view.run(keys, boxes) is values


def _taught_by_a_classifier(tmp_path) -> str:
    values = {
        "KD.ENABLED": True,
        "KD.DISTILLERS": ("DICOD",),
        "KD.TEACHER.TYPE": "ClassifierTeacher",
        "KD.TEACHER.ALLOW_UNTRAINED": True,
        "KD.TEACHER.CLASSIFIER.ARCH": "resnet18",
        "KD.TEACHER.CLASSIFIER.INPUT_SIZE": 40,
        "KD.DICOD.LOC.SAMPLE_SIZE": 32,
        "DATASETS.TRAIN": ("bccd_trainval",),  # as many classes as the student has
    }
    file = tmp_path / "taught_by_a_classifier.yaml"
    file.write_text(tiny_cfg("RetinaNet", **values).dump())
    return str(file)


def test_a_classifier(step_time, stored_calls, tmp_path):
    """The plain one sees the crops of the step; what is stored is what the teacher answers."""
    file = _taught_by_a_classifier(tmp_path)
    args = step_time.build_parser().parse_args(["--image-size", "64", "64"])
    cfg, model, _, batch = step_time._prepared(file, args, distil=True)
    with EventStorage(0), model.tap.observe(model.student, model._student_needs) as observation:
        model.student(batch)
        ctx = model._context(batch, observation, 0)
        ctx.teacher = noted = stored_calls.note_calls(model, ctx.teacher)
        (distiller,) = model.distillers.values()
        losses = distiller(ctx)
        # objects for the features and for the classes, and the boxes that are predicted for them
        asked = [(method, crops.shape[2:], crops.requires_grad) for method, crops, _ in noted.calls]
        small, large = torch.Size([32, 32]), torch.Size([40, 40])
        assert asked == [
            ("features", small, False),
            ("features", small, True),
            ("logits", large, False),
        ]
        assert len(noted.calls[0][1]) == len(noted.calls[2][1]) == 16
        assert len(noted.calls[1][1]) > 16

        plain, forward = stored_calls.plain_teacher(cfg, model, noted)
        stems = []
        plain.get_submodule("maxpool").register_forward_hook(lambda *c: stems.append(c[-1]))
        forward(batch)
        assert len(stems) == len(noted.calls)
        for stem, (_, crops, _) in zip(stems, noted.calls):
            theirs = model.teacher.features(crops, ("stem",))["stem"]
            assert not stem.requires_grad
            torch.testing.assert_close(stem, theirs, rtol=1e-4, atol=1e-5)

        ctx.teacher = noted.view([])
        again = distiller(ctx)
    assert set(again) == set(losses) == {"cls", "loc_obj", "loc_feat"}
    for name, value in losses.items():
        torch.testing.assert_close(again[name], value, rtol=1e-4, atol=1e-6)
    # the gradient ends at the stored features
    (leaf,) = [v["stem"] for k, v in ctx.teacher._answers.items() if k[2]]
    (gradient,) = torch.autograd.grad(again["loc_feat"], leaf)
    assert gradient.abs().sum() > 0


def test_a_classifier_is_measured(step_time, tmp_path, monkeypatch, capsys):
    args = ["--image-size", "64", "64", "--rounds", "1", "--warmup", "0"]
    file = _taught_by_a_classifier(tmp_path)
    result = step_time.measure_time(file, step_time.build_parser().parse_args(args))
    assert all(result["seconds"][name]["median"] > 0 for name in PARTS)
    off = ["KD.DICOD.CLS.ENABLED", "False", "KD.DICOD.LOC.FEAT_WEIGHT", "0.0"]
    monkeypatch.setattr("sys.argv", ["step_time.py", "--config-file", file, *off])
    with pytest.raises(SystemExit):
        step_time.main()
    assert "has no teacher" in capsys.readouterr().err


def test_queues_are_full(step_time, tmp_path):
    file = _two_stage(tmp_path, "RetinaNet", "GeneralizedRCNN")
    args = step_time.build_parser().parse_args(["--image-size", "64", "64"])
    _, model, _, _ = step_time._prepared(file, args, distil=True)
    queue = next(iter(model.distillers.values())).ckd["0"].queue
    assert queue.count == queue.size and queue.rows.abs().sum(dim=1).all()


def test_a_two_stage_pair_is_measured(step_time, tmp_path):
    args = ["--image-size", "64", "64", "--rounds", "1", "--warmup", "0"]
    file = _two_stage(tmp_path, "GeneralizedRCNN", "GeneralizedRCNN")
    result = step_time.measure_time(file, step_time.build_parser().parse_args(args))
    assert all(result["seconds"][name]["median"] > 0 for name in PARTS)


def test_whole_steps_of_a_mimicdet(step_time, tmp_path):
    """Its T-head teaches, on boxes; its losses use the student's live graph."""
    from tests.projects.mimicdet.test_separate_teacher import STUDENT, TEACHER
    from tests.projects.mimicdet.whole import mimicdet_cfg

    (tmp_path / "teacher.yaml").write_text(mimicdet_cfg(**TEACHER).dump())
    values = {
        "KD.TEACHER.CONFIG_FILE": str(tmp_path / "teacher.yaml"),
        "KD.TEACHER.ALLOW_UNTRAINED": True,
    }
    file = tmp_path / "student.yaml"
    file.write_text(mimicdet_cfg(**STUDENT, **values).dump())
    args = ["--image-size", "64", "64", "--rounds", "1", "--warmup", "0", "--whole"]
    result = step_time.measure_time(str(file), step_time.build_parser().parse_args(args))
    seconds = {name: value["median"] for name, value in result["seconds"].items()}
    assert set(seconds) == {"student step", "teacher forward", "KD step"}
    expected = seconds["KD step"] / (seconds["student step"] + seconds["teacher forward"])
    assert result["ratio"]["median"] == pytest.approx(expected)
    (line,) = step_time.table([{"config": "a.yaml", **result}]).splitlines()[2:]
    assert [cell.strip() for cell in line.split("|")][4:6] == ["", ""] and line.count("|") == 9


def test_a_step_leaves_the_weights_where_they_are(step_time, config_file):
    args = step_time.build_parser().parse_args(["--image-size", "64", "64"])
    _, model, optimizer, batch = step_time._prepared(config_file, args, distil=True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with EventStorage(0):
        step_time._step(model, optimizer, batch)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_from_the_command_line(step_time, config_file, tmp_path, monkeypatch, capsys):
    output = tmp_path / "figures.json"
    arguments = ["--config-file", config_file, "--image-size", "64", "64", "--rounds", "2"]
    arguments += ["--warmup", "0", "--threads", "1", "--memory-steps", "1", "--clock", "cpu"]
    arguments += ["--output", str(output), "SEED", "3"]
    monkeypatch.setattr("sys.argv", ["step_time.py", *arguments])
    monkeypatch.setattr(step_time, "_in_fresh_process", lambda function, *args: function(*args))
    threads = torch.get_num_threads()
    try:
        step_time.main()
    finally:
        torch.set_num_threads(threads)
    report = json.loads(output.read_text())
    (result,) = report["results"]
    assert set(result["seconds"]) == {*PARTS, "rest"}
    seconds = {name: result["seconds"][name]["median"] for name in PARTS}
    assert all(value > 0 for value in seconds.values())
    assert result["ratio"]["median"] > 0
    assert set(result["memory"]) == {"student alone", "KD", "extra", "teacher's weights"}
    assert result["memory"]["teacher's weights"] > 10  # MiB; a ResNet-18 has 43
    env = report["environment"]
    assert env["threads"] == 1 and env["torch"] == torch.__version__ and env["clock"] == "cpu"
    assert env["opts"] == ["SEED", "3"] and env["device"]
    assert "| student | " in capsys.readouterr().out


def test_nothing_to_compare(step_time, config_file, monkeypatch, capsys):
    for arguments, message in (
        ([], "--config-file or --table"),
        (["--config-file", config_file, "KD.ENABLED", "False"], "KD.ENABLED False"),
    ):
        monkeypatch.setattr("sys.argv", ["step_time.py", *arguments])
        with pytest.raises(SystemExit):
            step_time.main()
        assert message in capsys.readouterr().err


def test_each_file_is_measured_with_each_distiller(step_time):
    parser = step_time.build_parser()
    args = parser.parse_args(["--config-file", "a.yaml", "--distillers", "PKD", "LD", "--rounds=3"])
    args.opts = ["MODEL.DEVICE", "cpu"]
    first, second = step_time.variants(args)
    assert first.opts == ["MODEL.DEVICE", "cpu", "KD.DISTILLERS", "('PKD',)"]
    assert second.opts == ["MODEL.DEVICE", "cpu", "KD.DISTILLERS", "('LD',)"]
    assert first.rounds == 3 and args.opts == ["MODEL.DEVICE", "cpu"]
    assert step_time.name({"config": "x/gfl.yaml", "distiller": first.distiller}) == "gfl PKD"
    args.distillers = []
    (alone,) = step_time.variants(args)
    assert alone.opts == args.opts
    assert step_time.name({"config": "x/gfl.yaml", "distiller": alone.distiller}) == "gfl"
