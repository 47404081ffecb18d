import importlib.util
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg as get_plain_cfg
from detectron2.modeling import META_ARCH_REGISTRY, build_model
from detectron2.modeling.meta_arch import RetinaNet
from torch import nn

from kd_d2.checkpoint import KDCheckpointer
from kd_d2.config import CONFIG_NODES, get_cfg
from kd_d2.export import export_student, needed_packages, student_config

_ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

# Builds the exported student in a process in which importing kd_d2 fails.
_PLAIN = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "kd_d2":
                raise ImportError("kd_d2 is not available here")

    sys.meta_path.insert(0, Blocker())
    import torch
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.config import get_cfg
    from detectron2.modeling import build_model

    folder, out, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    cfg = get_cfg()
    cfg.merge_from_file(folder + "/config.yaml", allow_unsafe=False)
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    model = build_model(cfg).eval()
    state = torch.load(cfg.MODEL.WEIGHTS, weights_only=True)
    assert set(state) == {"model"}, set(state)
    model.load_state_dict(state["model"], strict=True)
    assert set(DetectionCheckpointer(build_model(cfg)).load(cfg.MODEL.WEIGHTS)) == set()
    image = torch.arange(3 * 64 * 96).reshape(3, 64, 96) % 251
    with torch.no_grad():
        fields = model([{"image": image.byte()}])[0]["instances"].get_fields()
    fields["pred_boxes"] = fields["pred_boxes"].tensor
    torch.save(fields, out)
    assert not any(name.split(".")[0] == "kd_d2" for name in sys.modules)
"""


def _retinanet(backbone="build_retinanet_resnet_fpn_backbone"):
    cfg = get_cfg()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    cfg.MODEL.BACKBONE.NAME = backbone
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = ["res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[s] for s in (16, 32, 64, 128, 256)]
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    cfg.MODEL.RETINANET.NUM_CONVS = 1
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.KD.ENABLED = True
    cfg.KD.DISTILLERS = ("PKD",)
    cfg.KD.TEACHER.WEIGHTS = "teacher/that/is/never/opened.pth"
    return cfg


def _rcnn():
    cfg = _retinanet("build_resnet_fpn_backbone")
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    levels = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.RESNETS.OUT_FEATURES = cfg.MODEL.FPN.IN_FEATURES = levels
    cfg.MODEL.RPN.IN_FEATURES = ["p2", "p3", "p4", "p5", "p6"]
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2", "p3", "p4", "p5"]
    cfg.MODEL.ROI_BOX_HEAD.NAME = "FastRCNNConvFCHead"
    cfg.MODEL.ROI_BOX_HEAD.NUM_FC = 1
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION = 7
    return cfg


def _gfl():
    cfg = _retinanet("build_kd_resnet_fpn_backbone")
    cfg.MODEL.META_ARCHITECTURE = "GFL"
    cfg.MODEL.FPN.P6_SOURCE = "p5"
    cfg.MODEL.GFL.NUM_CLASSES = 3
    cfg.MODEL.GFL.NUM_CONVS = 1
    cfg.MODEL.GFL.NORM = ""
    return cfg


def _train(cfg, folder):
    """What a training run leaves behind: config.yaml and a checkpoint with its adapters."""
    torch.manual_seed(0)
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape))
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.yaml"), "w") as file:
        file.write(cfg.dump())
    checkpointer = KDCheckpointer(model, folder, distillers=nn.Linear(3, 4))
    checkpointer.save("model_0000009", iteration=9)
    return model.eval()


def _tool():
    path = os.path.join(_ROOT, "tools", "export_student.py")
    spec = importlib.util.spec_from_file_location("export_student", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class TestStockArchitectures:
    @pytest.mark.slow
    @pytest.mark.parametrize(
        "make",
        [_retinanet, _rcnn, lambda: _retinanet("build_kd_resnet_fpn_backbone")],
        ids=["RetinaNet", "R-CNN", "RetinaNet with the library's equal backbone"],
    )
    def test_detects_the_same_without_kd_d2(self, tmp_path, make):
        cfg, run, out = make(), str(tmp_path / "run"), str(tmp_path / "out")
        model = _train(cfg, run)
        export = export_student(cfg, os.path.join(run, "model_0000009.pth"), out)
        assert export.packages == [] and export.dropped == 0 and export.num_detections > 0
        assert export.num_parameters == sum(p.numel() for p in model.parameters())
        assert sorted(os.listdir(out)) == ["config.yaml", "model_student.pth"]

        script = tmp_path / "plain.py"
        script.write_text(textwrap.dedent(_PLAIN))
        result = subprocess.run(
            [
                sys.executable,
                str(script),
                out,
                tmp_path / "fields.pth",
                str(torch.get_num_threads()),
            ],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )
        assert result.returncode == 0, result.stderr
        fields = torch.load(tmp_path / "fields.pth", weights_only=True)

        cfg.MODEL.RETINANET.SCORE_THRESH_TEST = cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
        reference = build_model(cfg).eval()
        reference.load_state_dict(model.state_dict())
        image = torch.arange(3 * 64 * 96).reshape(3, 64, 96) % 251
        with torch.no_grad():
            expected = reference([{"image": image.byte()}])[0]["instances"]
        assert len(expected) > 0
        assert torch.equal(fields["pred_boxes"], expected.pred_boxes.tensor)
        assert torch.equal(fields["scores"], expected.scores)
        assert torch.equal(fields["pred_classes"], expected.pred_classes)

    def test_config_has_only_keys_of_detectron2_and_keeps_their_values(self):
        cfg = _retinanet()
        cfg.SOLVER.BASE_LR = 0.123
        plain = student_config(cfg)
        reference = get_plain_cfg()
        reference.merge_from_other_cfg(plain)  # raises on an unknown key
        assert reference == plain
        assert plain.SOLVER.BASE_LR == 0.123 and plain.MODEL.RETINANET.NUM_CLASSES == 3
        assert "KD" not in plain and "GFL" not in plain.MODEL

    def test_zoo_weights_can_be_exported(self, tmp_path):
        cfg = _retinanet()
        model = build_model(cfg)
        DetectionCheckpointer(model, str(tmp_path)).save("zoo")
        os.remove(tmp_path / "last_checkpoint")
        export = export_student(cfg, str(tmp_path / "zoo.pth"), str(tmp_path))
        assert export.packages == []


class TestOwnArchitectures:
    def test_config_keeps_the_nodes_of_the_library(self, tmp_path):
        cfg, run, out = _gfl(), str(tmp_path / "run"), str(tmp_path / "out")
        model = _train(cfg, run)
        export = export_student(cfg, os.path.join(run, "model_0000009.pth"), out)
        assert export.packages == ["kd_d2.modeling"] and export.num_detections > 0
        read = get_cfg()
        read.merge_from_file(os.path.join(out, "config.yaml"), allow_unsafe=False)
        assert read.MODEL.GFL.NUM_CLASSES == 3 and read.MODEL.FPN.P6_SOURCE == "p5"
        assert not read.KD.ENABLED and read.KD.TEACHER.WEIGHTS == ""
        with open(os.path.join(out, "config.yaml")) as file:
            assert "\nKD:" not in file.read()
        student = build_model(read)
        DetectionCheckpointer(student).load(read.MODEL.WEIGHTS)
        expected = model.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in student.state_dict().items())

    @pytest.mark.parametrize(
        "key, value", [("P6_SOURCE", "p5"), ("P7_RELU", False)], ids=["P6", "P7"]
    )
    def test_pyramid_that_detectron2_lacks(self, key, value):
        cfg = _retinanet("build_kd_resnet_fpn_backbone")
        cfg.MODEL.FPN[key] = value
        packages = needed_packages(cfg, build_model(cfg))
        assert packages == ["kd_d2.modeling"]
        assert student_config(cfg, packages).MODEL.FPN[key] == value

    def test_training_only_modules_are_left_out(self, tmp_path, monkeypatch):
        class Assisted(RetinaNet):
            training_only_modules = ("assistant", "head.bbox_subnet.0")

            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.assistant = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
                self.assistant2 = nn.Linear(2, 2)

        monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, "Assisted", Assisted)

        def add_assisted_config(cfg):
            cfg.MODEL.ASSISTED = type(cfg)({"WIDTH": 2})
            cfg.KD.ASSISTED = type(cfg)({"WEIGHT": 1.0})

        monkeypatch.setitem(CONFIG_NODES._obj_map, "add_assisted_config", add_assisted_config)
        cfg, run, out = _retinanet(), str(tmp_path / "run"), str(tmp_path / "out")
        cfg.MODEL.META_ARCHITECTURE = "Assisted"
        _train(cfg, run)
        # The detections differ, because here a module is left out that inference uses.
        with pytest.raises(ValueError, match="detects other objects"):
            export_student(cfg, os.path.join(run, "model_0000009.pth"), out)
        assert os.listdir(out) == []
        Assisted.training_only_modules = ("assistant",)
        export = export_student(cfg, os.path.join(run, "model_0000009.pth"), out)
        assert export.dropped == 7
        assert export.packages == [__name__.split(".")[0]]
        state = torch.load(export.files[0], weights_only=True)["model"]
        assert [key for key in state if "assist" in key] == ["assistant2.weight", "assistant2.bias"]
        assert "assistant" not in state._metadata and "assistant2" in state._metadata
        with open(os.path.join(out, "config.yaml")) as file:
            text = file.read()
        assert "ASSISTED:" in text and "CROSSKD" not in text and "\nKD:" not in text


class TestErrors:
    def test_weights_of_another_model_are_listed(self, tmp_path):
        cfg, run = _retinanet(), str(tmp_path / "run")
        _train(cfg, run)
        cfg.MODEL.RETINANET.NUM_CLASSES = 5
        with pytest.raises(ValueError) as caught:
            export_student(cfg, os.path.join(run, "model_0000009.pth"), str(tmp_path / "out"))
        assert "head.cls_score.weight: (9, 32, 3, 3)" in str(caught.value)
        assert not (tmp_path / "out").exists()

    def test_folder_of_the_run_is_not_overwritten(self, tmp_path):
        cfg = _retinanet()
        _train(cfg, str(tmp_path))
        with pytest.raises(ValueError, match="another --output"):
            export_student(cfg, str(tmp_path / "model_0000009.pth"), str(tmp_path))

    def test_empty_weights(self, tmp_path):
        with pytest.raises(ValueError):
            export_student(_retinanet(), "", str(tmp_path))


class TestTool:
    def test_from_a_run_folder(self, tmp_path, capsys):
        run, out = str(tmp_path / "run"), str(tmp_path / "out")
        _train(_gfl(), run)
        export = _tool().main(["--weights", run, "--output", out, "TEST.DETECTIONS_PER_IMAGE", "7"])
        text = capsys.readouterr().out
        assert "model_student.pth" in text and "import kd_d2.modeling" in text
        assert export.num_detections == 7

    def test_safetensors(self, tmp_path):
        pytest.importorskip("safetensors")
        run, out = str(tmp_path / "run"), str(tmp_path / "out")
        model = _train(_retinanet(), run)
        export = _tool().main(["--weights", run, "--output", out, "--safetensors"])
        assert os.path.basename(export.files[1]) == "model_student.safetensors"
        student = build_model(_retinanet())
        KDCheckpointer(student).load(export.files[1])
        expected = model.state_dict()
        assert all(torch.equal(v, expected[k]) for k, v in student.state_dict().items())

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--weights", "{}"], "no file last_checkpoint"),
            (["--weights", "{}/a.pth"], "There is no .*config.yaml"),
            (["--weights", "{}/a.pth", "--config-file", "{}/none.yaml"], "There is no .*none.yaml"),
            (["--weights", "{}/a.pth", "--config-file", "{}/b.yaml", "A.B"], "A.B"),
        ],
    )
    def test_mistakes_on_the_command_line(self, tmp_path, arguments, message):
        (tmp_path / "b.yaml").write_text("VERSION: 2\n")
        arguments = ["--output", str(tmp_path / "out")] + [a.format(tmp_path) for a in arguments]
        with pytest.raises(ValueError, match=message):
            _tool().main(arguments)

    def test_as_a_program(self, tmp_path):
        tool = os.path.join(_ROOT, "tools", "export_student.py")
        path = os.pathsep.join([_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
        result = subprocess.run(
            [sys.executable, tool, "--weights", str(tmp_path), "--output", str(tmp_path / "out")],
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 1
        assert result.stderr.strip().split("\n")[-1].startswith("export_student: error: ")
