"""Files of graphs, and the tool that writes them."""

import importlib.util
import json
import os
import sys

import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image

from kd_d2 import __version__
from kd_d2.export import Tolerance, check_request, read_images, write_graphs
from kd_d2.export.graph_files import GRAPH_FORMATS
from kd_d2.export.torchscript_format import METADATA_NAME
from tests.export.graph_cases import THRESHOLDS, assert_detects_the_same, photograph, sharpen
from tests.fixtures import CLASSES, save_weights, tiny_cfg, tiny_model

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PHOTOGRAPHS = [photograph(0, 110, 150), photograph(1, 90, 140)]


def tool():
    path = os.path.join(ROOT, "tools", "export_student.py")
    spec = importlib.util.spec_from_file_location("export_student", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def detector():
    return tiny_cfg("GFL", **THRESHOLDS), sharpen(tiny_model("GFL", **THRESHOLDS))


@pytest.fixture
def run_folder(tmp_path, detector):
    """What a run leaves, and two images."""
    cfg, model = detector
    save_weights(model, tmp_path / "run" / "model_final.pth", classes=CLASSES)
    (tmp_path / "run" / "last_checkpoint").write_text("model_final.pth")
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    for index, image in enumerate(PHOTOGRAPHS):
        rgb = image.flip(0).permute(1, 2, 0).numpy()
        Image.fromarray(rgb).save(tmp_path / f"{index}.png")
    return tmp_path


def arguments(folder, *more):
    images = [str(folder / f"{index}.png") for index in range(2)]
    return ["--weights", str(folder / "run"), "--images", *images, *more]


@pytest.mark.slow
def test_the_tool_writes_files_that_say_what_they_are(run_folder, detector, capsys):
    _, model = detector
    out = run_folder / "out"
    tool().main(
        arguments(
            run_folder,
            *("--formats", "safetensors", "onnx", "torchscript", "--input-type", "float32"),
            *("--output", str(out), "TEST.DETECTIONS_PER_IMAGE", "30"),
        )
    )
    names = ["config.yaml", "model_student.onnx", "model_student.pth", "model_student.safetensors"]
    assert sorted(os.listdir(out)) == [*names, "model_student.ts"]
    text = capsys.readouterr().out
    assert (
        text.count("detections in 3 batches, largest difference") == 2 and "not checked" not in text
    )

    extra = {METADATA_NAME: ""}
    torch.jit.load(str(out / "model_student.ts"), _extra_files=extra)
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(
        str(out / "model_student.onnx"), providers=["CPUExecutionProvider"]
    )
    metadata = session.get_modelmeta().custom_metadata_map
    assert metadata == json.loads(extra[METADATA_NAME])
    assert json.loads(metadata.pop("classes")) == list(CLASSES)
    versions = ("kd_d2_version", "detectron2_version", "pytorch_version")
    assert [metadata.pop(key) for key in versions][0] == __version__
    assert metadata == {
        "meta_architecture": "GFL",
        "pixel_format": "BGR",
        "pixel_type": "float32",
        "min_size_test": "128",
        "max_size_test": "128",
        "score_threshold": "0.3",
        "nms_threshold": "0.6",
        "max_detections": "30",
        "candidates_per_level": "1000",
    }
    (images,) = session.get_inputs()
    assert (images.name, images.type) == ("images", "tensor(float)")
    assert images.shape == ["num_images", 3, "height", "width"]
    assert [(x.name, x.type) for x in session.get_outputs()] == [
        ("num_detections", "tensor(int64)"),
        ("boxes", "tensor(float)"),
        ("scores", "tensor(float)"),
        ("classes", "tensor(int64)"),
    ]
    assert session.get_outputs()[1].shape[1:] == [30, 4]

    found = session.run(None, {"images": PHOTOGRAPHS[0][None].float().numpy()})
    assert found[0].tolist() == [30] and found[1].shape == (1, 30, 4)
    expected = model([{"image": PHOTOGRAPHS[0]}])[0]["instances"][:30]
    boxes = torch.as_tensor(found[1][0])
    torch.testing.assert_close(boxes, expected.pred_boxes.tensor, atol=0.01, rtol=0)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--tolerance"], "unrecognized"),
        (["--formats", "onnx"], "give --images to compare on, or --no-check"),
        (["--formats", "torchscript", "--images", "{}/none.png"], "There is no image .*none.png"),
        (["--formats", "onnx", "--images", "{}/run/config.yaml"], "cannot be read as an image"),
        (["--formats", "tflite"], "invalid choice"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(run_folder, more, message, capsys):
    more = [x.format(run_folder) for x in more]
    options = ["--weights", str(run_folder / "run"), "--output", str(run_folder / "out")]
    with pytest.raises((ValueError, SystemExit)) as caught:
        tool().main([*options, *more])
    assert not (run_folder / "out").exists()
    if caught.type is ValueError:
        assert caught.match(message)


def test_overrides_after_an_option_with_several_values(run_folder):
    parse = tool().parse_arguments
    options = ["--weights", "w", "--output", "o", "--formats", "pth", "safetensors"]
    assert parse([*options, "--", "MODEL.DEVICE", "cpu"]).opts == ["MODEL.DEVICE", "cpu"]
    assert parse([*options, "--no-check", "MODEL.DEVICE", "cpu"]).opts == ["MODEL.DEVICE", "cpu"]


def test_a_file_that_differs_is_not_written(tmp_path, detector):
    images = [PHOTOGRAPHS[0]]
    with pytest.raises(ValueError) as caught:
        # Less than the rounding of other kernels.
        write_graphs(
            *detector, str(tmp_path), ["torchscript"], images, tolerance=Tolerance(1e-9, 1e-9)
        )
    assert "torchscript file detects something else" in str(caught.value)
    assert "(allowed: 1e-09)" in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_nothing_to_compare(tmp_path, detector):
    from tests.export.graph_cases import blank

    with pytest.raises(ValueError, match="finds nothing in the 1 images"):
        write_graphs(*detector, str(tmp_path), ["torchscript"], [blank(64, 96)])
    assert os.listdir(tmp_path) == []


def test_unchecked_files_work_too(tmp_path, detector):
    cfg, model = detector
    (file,) = write_graphs(cfg, model, str(tmp_path), ["torchscript"], check=False)
    assert file.comparison is None
    with open(file.path, "rb") as opened:
        run = GRAPH_FORMATS["torchscript"].load(opened.read())
    assert_detects_the_same(run, model, [PHOTOGRAPHS[1]], range(1, 101))


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_a_missing_package_is_named(monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match="pip install onnx onnxruntime"):
        check_request(["onnx"], ["image"], True)
    check_request(["torchscript"], ["image"], True)
    check_request([], [], True)


def test_images_are_read_as_the_detector_sees_them(run_folder):
    cfg = get_cfg()
    cfg.INPUT.FORMAT, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = "BGR", 0, 0
    paths = [str(run_folder / "0.png")]
    assert torch.equal(read_images(cfg, paths)[0], PHOTOGRAPHS[0])
    cfg.INPUT.FORMAT = "RGB"
    assert torch.equal(read_images(cfg, paths)[0], PHOTOGRAPHS[0].flip(0))
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 55, 1000
    assert read_images(cfg, paths)[0].shape == (3, 55, 75)
