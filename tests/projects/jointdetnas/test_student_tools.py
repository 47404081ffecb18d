"""The commands cost.py and evolve.py, and that what they write trains with train_net.py's code."""

import importlib.util
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser

from kd_d2.checkpoint import KDCheckpointer, load_checkpoint_file
from kd_d2.engine.main import build_config, prepare
from kd_d2.projects.jointdetnas import parse, resolve
from tests.fixtures import registered_toy_dataset
from tests.projects.jointdetnas.cases import BOTTLENECK, MOVED, STEM, student, student_cfg

TOOLS = Path(__file__).parents[3] / "projects/JointDetNAS/tools"


def script(name):
    spec = importlib.util.spec_from_file_location(f"jointdetnas_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(text):
    return {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.strip()}


def test_cost_of_presets(capsys):
    script("cost").main(["searched_r50", "--size", "1080", "720"])
    found = rows(capsys.readouterr().out)
    assert found["backbone"] == ["19,393,448", "50.07", "50.48"]
    assert found["detector"] == ["37,414,728", "145.30", "145.79"]
    assert found["image"][1] == "1080x720,"


def test_cost_of_a_checkpoint(capsys, tmp_path):
    KDCheckpointer(student(MOVED), str(tmp_path)).save("model")
    command = script("cost")
    assert command.read_architecture(str(tmp_path / "model.pth")) == parse(MOVED, STEM)
    torch.save({"model": {}}, tmp_path / "plain.pth")
    with pytest.raises(SystemExit, match="plain.pth has no entry arch"):
        command.main([str(tmp_path / "plain.pth")])
    with pytest.raises(SystemExit, match="'r19' is neither"):
        command.main(["r19"])
    with pytest.raises(SystemExit, match="--size must be positive"):
        command.main(["r18", "--size", "0", "5"])


@pytest.mark.slow
def test_latency(capsys):
    text = "[(4,4,8)],[(4,4,8)],[(4,4,8)],[(4,4,8)]"
    arguments = ["--size", "64", "64", "--latency", "--rounds", "1", "--device", "cpu"]
    script("cost").main([text, *arguments])
    out = capsys.readouterr().out
    assert "as run by Detectron2 on cpu" in out and "images/s" in out


@pytest.fixture
def saved(tmp_path):
    """Config and checkpoint of a small student."""
    KDCheckpointer(student(BOTTLENECK), str(tmp_path / "base")).save("model_final")
    config = tmp_path / "student.yaml"
    cfg = student_cfg(BOTTLENECK)
    cfg.SEARCH.CHANNEL_PRUNING.MIN_CHANNELS = 2
    config.write_text(cfg.dump())
    return str(config), str(tmp_path / "base/model_final.pth"), tmp_path


def evolve(saved, *arguments):
    script("evolve").main(["--config-file", saved[0], "--weights", saved[1], *arguments])


def test_list(saved, capsys):
    evolve(saved, "--list")
    assert capsys.readouterr().out.splitlines() == [
        *("ChannelPruning", "LayerPruning"),
        *("AddLayer stage 1", "AddLayer stage 2", "AddLayer stage 3", "AddLayer stage 4"),
        *("Rearrange stage 1 right", "Rearrange stage 1 left"),
        *("Rearrange stage 2 right", "Rearrange stage 2 left"),
        *("Rearrange stage 3 right", "Rearrange stage 3 left"),
    ]


def test_one_shot_pruning(saved, capsys):
    out = str(saved[2] / "pruned")
    keys = ["SEARCH.CHANNEL_PRUNING.PERCENT", "0.3"]
    evolve(saved, "--action", "ChannelPruning", "--output", out, *keys)
    old = parse(BOTTLENECK, STEM).num_rankable_channels
    new = parse(load_checkpoint_file(f"{out}/model_init.pth")["arch"]["encoding"], STEM)
    assert new.num_rankable_channels == old - round(0.3 * old)
    printed = capsys.readouterr().out.splitlines()
    assert printed[:3] == ["ChannelPruning", BOTTLENECK, str(new)]
    cfg = build_config(f"{out}/config.yaml")
    assert cfg.MODEL.MORPH_RESNET.ENCODING == str(new)
    # it evaluates as it is, and is not mistaken for a run to resume
    arguments = ["--eval-only", "--config-file", f"{out}/config.yaml"]
    assert prepare(default_argument_parser().parse_args(arguments))() == {}
    assert not (Path(out) / "last_checkpoint").exists()


def test_pruned_student_trains(saved):
    out = str(saved[2] / "pruned")
    evolve(saved, "--action", "ChannelPruning", "--output", out)
    with registered_toy_dataset(saved[2], 2, size=(64, 64)) as name:
        opts = ["DATASETS.TRAIN", f"('{name}',)", "SOLVER.MAX_ITER", "1"]
        opts += ["INPUT.MIN_SIZE_TRAIN", "(64,)"]
        opts += ["KD.ENABLED", "True", "KD.DISTILLERS", "('BNSparsity',)"]
        arguments = ["--config-file", f"{out}/config.yaml", *opts]
        prepare(default_argument_parser().parse_args(arguments))()
    final = load_checkpoint_file(f"{out}/run/model_final.pth")
    start = load_checkpoint_file(f"{out}/model_init.pth")
    assert final["arch"] == start["arch"] and final["iteration"] == 0
    assert any(not torch.equal(v, start["model"][k]) for k, v in final["model"].items())


def test_move_that_measures_features(saved):
    out = str(saved[2] / "moved")
    with registered_toy_dataset(saved[2], 4, size=(64, 64)) as name:
        keys = ["DATASETS.TRAIN", f"('{name}',)", "SEARCH.CALIBRATION_BATCHES", "1"]
        options = ["--action", "Rearrange", "--stage", "2", "--direction", "left"]
        evolve(saved, *options, "--output", out, *keys)
    data = load_checkpoint_file(f"{out}/model_init.pth")
    assert data["model"]["backbone.fpn_lateral3.weight"].shape == (12, 28, 1, 1)
    assert parse(data["arch"]["encoding"], STEM).depths == (2, 4, 1, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--action", "Grow", "--output", "x"], "'Grow' is none of"),
        (["--action", "AddLayer", "--stage", "5", "--output", "x"], "'AddLayer stage 5' is not"),
        (["--action", "AddLayer", "--stage", "1"], "--output must be a folder"),
        (["--action", "AddLayer", "--stage", "1", "--output", "{base}"], "--output must be a fold"),
        (
            ["--action", "AddLayer", "--stage", "1", "--output", "x", "--root", "searched_r18"]
            + ["SEARCH.ADD_LAYER.EXTRA_DEPTH", "0"],
            "'AddLayer stage 1' is not legal",
        ),
    ],
)
def test_mistakes_are_one_sentence(saved, monkeypatch, arguments, message):
    monkeypatch.chdir(saved[2])
    with pytest.raises(SystemExit, match=message):
        evolve(saved, *(a.format(base=saved[2] / "base") for a in arguments))
    assert not (saved[2] / "x").exists()


def test_recipes_are_those_of_the_paper():
    """Encodings, input sizes and schedules of the files below configs/COCO."""
    folder = TOOLS.parent / "configs/COCO"
    for name in ("r18", "r50", "r101"):
        base = build_config(str(folder / f"base_{name}.yaml"))
        assert base.MODEL.MORPH_RESNET.ENCODING == str(resolve(name))
        assert (base.SOLVER.MAX_ITER, base.SOLVER.IMS_PER_BATCH, base.SOLVER.BASE_LR) == (
            *(180000, 16),
            0.02,
        )
        assert base.INPUT.MIN_SIZE_TRAIN == (640, 800)
        assert base.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
        assert (base.INPUT.MIN_SIZE_TEST, base.INPUT.MAX_SIZE_TEST) == (800, 1333)
        assert base.KD.DISTILLERS == ("BNSparsity",) and base.KD.BNSPARSITY.WEIGHT == 1e-5
        assert base.MODEL.RESNETS.NORM == "SyncBN" and base.MODEL.BACKBONE.FREEZE_AT == 0
        searched = build_config(str(folder / f"searched_{name}.yaml"))
        assert searched.MODEL.MORPH_RESNET.ENCODING == str(resolve(f"searched_{name}"))
        assert (searched.INPUT.MIN_SIZE_TEST, searched.INPUT.MAX_SIZE_TEST) == (720, 1080)
    for name in ("r50", "r101"):
        pruned = build_config(str(folder / f"table2_{name}.yaml"))
        assert pruned.MODEL.MORPH_RESNET.ENCODING == str(resolve(name))
        assert pruned.SOLVER.MAX_ITER == 90000 and pruned.INPUT.MIN_SIZE_TRAIN == (800,)
