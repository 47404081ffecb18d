"""Every command and every piece of code in a README works as printed."""

import functools
import pathlib
import re
import shlex
from typing import List, Tuple

import pytest
from detectron2.engine import default_argument_parser

from kd_d2.engine.main import build_config
from tests.documents import blocks, check_commands, shell_lines

ROOT = pathlib.Path(__file__).resolve().parents[1]
READMES = sorted(
    [*ROOT.glob("*/README.md"), ROOT / "README.md", *ROOT.glob("projects/*/README.md")]
)


def commands() -> List[Tuple[str, str]]:
    result = []
    for readme in READMES:
        inline = re.findall(r"`((?:python|torchrun|make) [^`]+)`", readme.read_text())
        code = "\n".join([*blocks(readme, "sh"), *(" ".join(line.split()) for line in inline)])
        result += [(str(readme.relative_to(ROOT)), line) for line in shell_lines(code)]
    return sorted(set(result))


def test_there_are_commands():
    found = [command for _, command in commands()]
    assert "make demo" in found and "make test" in found
    assert sum("train_net.py" in command for command in found) >= 4


@pytest.mark.parametrize("readme,command", commands(), ids=lambda value: value[:90])
def test_command(readme, command):
    check_commands(command, readme)


@pytest.mark.parametrize("readme", READMES, ids=lambda path: path.parent.name)
def test_links_lead_somewhere(readme):
    for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text()):
        if "://" not in target:
            assert (readme.parent / target).exists(), f"{readme}: {target}"


@pytest.fixture
def pair(tmp_path, monkeypatch):
    """Folder with the student and the teacher that the examples of the README name."""
    from tests.fixtures import save_weights, tiny_cfg, tiny_model

    for name in ("my_student.yaml", "my_teacher.yaml"):
        (tmp_path / name).write_text(tiny_cfg("GFL").dump())
    save_weights(tiny_model("GFL", seed=3), tmp_path / "teacher" / "model_final.pth")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def example(language: str, name: str) -> str:
    """The block of the README that begins with a comment with this file name."""
    (code,) = [b for b in blocks(ROOT / "README.md", language) if b.startswith(f"# {name}\n")]
    return code


def one_step(config: pathlib.Path):
    """Model in training mode, its losses on a batch, and what they were made of."""
    from detectron2.utils.events import EventStorage

    from kd_d2.engine.trainer import KDTrainer
    from tests.fixtures import tiny_batch

    model = KDTrainer.build_model(build_config(str(config))).train()
    with EventStorage(0) as storage:
        losses = model(tiny_batch())
    return model, losses, {k: v for k, (v, _) in storage.latest().items()}


def reaches_the_backbone(model, loss) -> bool:
    loss.backward(retain_graph=True)
    found = any(p.grad is not None and p.grad.any() for p in model.student.backbone.parameters())
    model.zero_grad()
    return found


def test_recipe_of_your_own(pair):
    """Blocks named in YAML give what they give when they are composed in Python."""
    import torch
    from torch.nn import functional as F

    (pair / "my_recipe.yaml").write_text(example("yaml", "my_recipe.yaml"))
    model, losses, logged = one_step(pair / "my_recipe.yaml")
    assert {k for k in losses if "kd" in k} == {"loss_kd/pair/feat", "loss_kd/pair/cls"}
    assert losses["loss_kd/pair/feat"].item() == pytest.approx(2 * logged["kd_raw/pair/feat"])
    assert reaches_the_backbone(model, losses["loss_kd/pair/feat"])
    assert reaches_the_backbone(model, losses["loss_kd/pair/cls"])

    # class scores: BCE with the teacher's probabilities, weighted by its confidence in the cell
    from tests.fixtures import tiny_batch

    total, weights = 0.0, 0.0
    with torch.no_grad():
        sides = []
        for detector in (model.student, model.teacher.model):
            detector.train()
            images = detector.preprocess_image(tiny_batch()).tensor
            pyramid = detector.backbone(images)
            sides.append(detector.head([pyramid[f] for f in detector.head_in_features])[0])
        for ours, theirs in zip(*sides):
            score = theirs.sigmoid()
            confidence = score.amax(dim=1)
            loss = F.binary_cross_entropy_with_logits(ours, score, reduction="none").sum(1)
            total += (confidence * loss).sum()
            weights += confidence.sum()
    assert losses["loss_kd/pair/cls"].item() == pytest.approx((total / weights).item(), rel=1e-4)


def test_block_of_your_own(pair):
    """The example's distance, against attention transfer by torch's own functions."""
    import torch
    from torch.nn import functional as F

    from kd_d2.blocks import KD_DISTANCES
    from tests.fixtures import tiny_batch

    (pair / "my_recipe.yaml").write_text(example("yaml", "my_recipe.yaml"))
    code = example("python", "attention_transfer.py")
    assert len(code.splitlines()) <= 30
    (pair / "attention_transfer.py").write_text(code)
    (pair / "my_attention.yaml").write_text(example("yaml", "my_attention.yaml"))
    try:
        model, losses, _ = one_step(pair / "my_attention.yaml")
    finally:
        KD_DISTANCES._obj_map.pop("AttentionTransfer", None)
    terms = {k.rsplit("/")[-1] for k in losses if k.startswith("loss_kd/pair/")}
    assert terms == {"feat", "cls", "attention"}
    assert reaches_the_backbone(model, losses["loss_kd/pair/attention"])
    expected = 0.0
    with torch.no_grad():
        maps = [
            m.backbone(m.preprocess_image(tiny_batch()).tensor)
            for m in (model.student, model.teacher.model)
        ]
        for level in maps[0]:
            ours, theirs = (F.normalize((m[level] ** 2).sum(1).flatten(1)) for m in maps)
            expected += 10 * F.mse_loss(ours, theirs, reduction="sum") / 2
    assert losses["loss_kd/pair/attention"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_method_of_your_own(pair):
    """The distiller of the README trains, from a file beside a config."""
    from tests.engine.support import isolated_registries

    (code,) = [b for b in blocks(ROOT / "README.md", "python") if "DISTILLER_REGISTRY" in b]
    (pair / "my_method.py").write_text(code)
    (pair / "my_config.yaml").write_text(
        '_BASE_: "my_student.yaml"\nKD:\n  ENABLED: True\n  DISTILLERS: ("Attention",)\n'
        '  IMPORTS: ("my_method.py",)\n  TEACHER:\n    CONFIG_FILE: "my_teacher.yaml"\n'
        '    WEIGHTS: "teacher/model_final.pth"\n'
    )
    with isolated_registries():
        model, losses, _ = one_step(pair / "my_config.yaml")
    assert losses["loss_kd/attention/map"] > 0
    assert reaches_the_backbone(model, losses["loss_kd/attention/map"])


def method_rows():
    section = (ROOT / "README.md").read_text().split("\n## Methods\n")[1].split("\n#")[0]
    rows = [line for line in section.splitlines() if line.startswith("| [")]
    return {re.match(r"\| \[(\w+)\]", row).group(1): row for row in rows}


@functools.lru_cache(maxsize=None)
def keys_of(model_node: str):
    """What the tap knows of the networks of a MODEL node (as YAML); each is built once."""
    import yaml
    from detectron2.config import CfgNode
    from detectron2.modeling import build_model

    from kd_d2.config import get_cfg
    from kd_d2.distillation import build_tap

    cfg = get_cfg()
    cfg.MODEL = CfgNode(yaml.safe_load(model_node))
    cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "", "cpu"
    model = build_model(cfg)
    return build_tap(model).keys(model)


@pytest.mark.parametrize("name", sorted(method_rows()))
def test_command_of_a_method_builds_it(name):
    """The row's command trains that method, on a pair that it can work with."""
    from kd_d2.distillation import (
        DISTILLER_REGISTRY,
        DetectorTeacher,
        build_distillers,
        teacher_wanted,
    )
    from tests.fixtures import untrained_teacher_keys

    row = method_rows()[name]
    (command,) = re.findall(r"`(python [^`]+)`", row)
    words = shlex.split(command)
    args = default_argument_parser().parse_args(words[words.index("train_net.py") + 1 :])
    cfg = build_config(str(ROOT / args.config_file), args.opts)
    assert [entry.partition("/")[0] for entry in cfg.KD.DISTILLERS] == [name]
    if not teacher_wanted(cfg):
        teacher = {}
    elif cfg.KD.TEACHER.TYPE == "DetectorTeacher":
        teacher = keys_of(DetectorTeacher.load_config(cfg).MODEL.dump())
    else:
        teacher = untrained_teacher_keys(cfg)
    distillers, _ = build_distillers(cfg, keys_of(cfg.MODEL.dump()), teacher)
    assert sum(next(iter(distillers.values())).weights.values()) > 0
    # what could not be checked is marked
    info = DISTILLER_REGISTRY.get(name).info
    assert ("○" in row) == bool(info.unverified)
