"""Pictures and COCO files of what a checkpoint detects in images, videos and cameras."""

import importlib.util
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from PIL import Image
from pycocotools.coco import COCO

from kd_d2.data import build_test_loader
from tests.engine.support import data_module, teacher_keys, write_yaml
from tests.fixtures import CLASSES, registered_toy_dataset, save_weights, tiny_cfg, tiny_model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("predict", ROOT / "tools/predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    with registered_toy_dataset(folder, 3, size=(100, 121)) as name:
        yield name, folder / name


@pytest.fixture
def run_folder(tmp_path, toy):
    """What a training run leaves behind: config, checkpoint, its name."""
    folder = tmp_path / "run"
    folder.mkdir()
    student = {"DATASETS.TRAIN": (toy[0],), "DATASETS.TEST": (toy[0],)}
    keys = {"KD.ENABLED": True, "KD.DISTILLERS": ("PKD",), "KD.IMPORTS": ("data.py",)}
    keys.update(teacher_keys(tmp_path, "FCOS"))
    data_module(folder / "data.py", toy[0])
    write_yaml(folder / "config.yaml", tiny_cfg("RetinaNet", **student), **keys)
    save_weights(tiny_model("RetinaNet", seed=3), folder / "model_final.pth", classes=CLASSES)
    (folder / "last_checkpoint").write_text("model_final.pth")
    return folder


def predict(script, *words, open_capture=None):
    args = script.build_parser().parse_args([str(word) for word in words])
    return script.predict(args, open_capture)


def read(path):
    return json.loads(Path(path).read_text())


def test_detections_are_those_of_an_evaluation(script, toy, run_folder, tmp_path):
    name, images = toy
    output = tmp_path / "seen"
    run = predict(script, images, "--weights", run_folder, "--output", output, "--max-size", 60)
    cfg = tiny_cfg("RetinaNet")
    evaluator = COCOEvaluator(name, tasks=("bbox",), output_dir=str(tmp_path / "evaluation"))
    model = tiny_model("RetinaNet", seed=3).eval()
    inference_on_dataset(model, build_test_loader(cfg, name), evaluator)
    expected = read(tmp_path / "evaluation" / "coco_instances_results.json")
    assert len(expected) > 30 and {x["category_id"] for x in expected} == {1, 2, 3}
    assert read(output / "coco_instances_results.json") == expected

    listed = read(output / "images.json")
    assert [x["file_name"] for x in listed["images"]] == [
        str(images / f"000{i}.png") for i in (1, 2, 3)
    ]
    assert {(x["height"], x["width"]) for x in listed["images"]} == {(100, 121)}
    # pycocotools reads both
    coco = COCO(str(output / "images.json"))
    assert coco.loadCats([1, 2, 3]) == [{"id": i + 1, "name": x} for i, x in enumerate(CLASSES)]
    loaded = coco.loadRes(str(output / "coco_instances_results.json"))
    assert len(loaded.getAnnIds(imgIds=[2])) == sum(x["image_id"] == 2 for x in expected)

    pictures = sorted((output / "pictures").iterdir())
    assert [x.name for x in pictures] == ["0001.jpg", "0002.jpg", "0003.jpg"]
    assert Image.open(pictures[0]).size == (60, 49)
    assert run.failures == [] and set(map(str, pictures)) < set(run.written)


def test_teacher_beside_the_student(script, toy, run_folder, tmp_path):
    image, output = toy[1] / "0001.png", tmp_path / "both"
    words = (image, "--weights", run_folder, "--output", output, "--score-threshold", 0.05)
    predict(script, *words, "--teacher")
    student, teacher = (
        read(output / f"{name}.json") for name in ("coco_instances_results", "teacher_results")
    )
    picture = np.asarray(Image.open(output / "pictures" / "0001.jpg"))
    assert picture.shape == (100, 2 * 121 + 4, 3)
    left, right = picture[:, :121], picture[:, 125:]
    original = np.asarray(Image.open(image)).astype(int)
    assert np.abs(left - original).max() > 100 and np.abs(right - original).max() > 100
    assert teacher and teacher != student
    # the teacher by itself
    alone = tmp_path / "alone"
    options = ("--config-file", tmp_path / "teacher.yaml", "--weights", tmp_path / "teacher.pth")
    predict(script, image, *options, "--output", alone, "--no-pictures")
    # batch norms of the teacher are part of its convs
    ours = read(alone / "coco_instances_results.json")
    assert len(ours) == len(teacher) and not (alone / "pictures").exists()
    for a, b in zip(ours, teacher):
        assert a["category_id"] == b["category_id"] and a["image_id"] == b["image_id"] == 1
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
        assert a["bbox"] == pytest.approx(b["bbox"], abs=1e-2)


def write_video(path, frames, code="MJPG", fps=8.0):
    height, width = frames[0].shape[:2]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), fps, (width, height))
    for frame in frames:
        writer.write(frame)
    writer.release()


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames, fps = [], capture.get(cv2.CAP_PROP_FPS)
    while True:
        found, frame = capture.read()
        if not found:
            return frames, fps
        frames.append(frame)


@pytest.fixture
def frames():
    generator = np.random.default_rng(0)
    small = generator.integers(0, 256, (4, 6, 8, 3), dtype=np.uint8)
    return [cv2.resize(frame, (96, 72), interpolation=cv2.INTER_CUBIC) for frame in small]


def test_video(script, run_folder, tmp_path, frames):
    write_video(tmp_path / "clip.avi", frames)
    output = tmp_path / "seen"
    options = ("--weights", run_folder, "--output", output)
    predict(script, tmp_path / "clip.avi", *options, "--score-threshold", 1)
    decoded, _ = read_video(tmp_path / "clip.avi")
    written, fps = read_video(output / "pictures" / "clip.mp4")
    assert len(written) == len(decoded) == 4 and fps == 8
    assert os.listdir(output / "pictures") == ["clip.mp4"]
    # nothing reaches the threshold: the frames themselves, in order, as far as MP4 keeps them
    distances = [[np.abs(a.astype(int) - b).mean() for b in decoded] for a in written]
    assert np.argmin(distances, axis=1).tolist() == [0, 1, 2, 3]
    assert max(distances[i][i] for i in range(4)) < 8
    images = read(output / "images.json")["images"]
    assert [(x["id"], x["frame"]) for x in images] == [(1, 0), (2, 1), (3, 2), (4, 3)]
    results = read(output / "coco_instances_results.json")
    # a frame is detected in as an image file is
    cv2.imwrite(str(tmp_path / "frame.png"), decoded[2])
    predict(script, tmp_path / "frame.png", "--weights", run_folder, "--output", tmp_path / "one")
    single = read(tmp_path / "one" / "coco_instances_results.json")
    assert single and [{**x, "image_id": 3} for x in single] == [
        x for x in results if x["image_id"] == 3
    ]


class Camera:
    """Frames without end, or until the user presses Ctrl-C."""

    def __init__(self, frames, interrupted_after=None):
        self.frames, self.left, self.opened = frames, interrupted_after, []
        self.released = 0

    def __call__(self, target):
        self.opened.append(target)
        self.number = 0
        return self

    def isOpened(self):
        return bool(self.frames)

    def get(self, what):
        return {cv2.CAP_PROP_FRAME_COUNT: -1.0, cv2.CAP_PROP_FPS: 0.0}[what]

    def read(self):
        if self.left is not None and self.number == self.left:
            raise KeyboardInterrupt
        frame = self.frames[self.number % len(self.frames)]
        self.number += 1
        return True, frame

    def release(self):
        self.released += 1


@pytest.mark.parametrize("limit, interrupted, count", [(3, None, 3), (0, 2, 2)])
def test_camera(limit, interrupted, count, script, run_folder, tmp_path, frames):
    camera, output = Camera(frames, interrupted), tmp_path / "seen"
    options = ("--weights", run_folder, "--output", output, "--max-frames", limit)
    run = predict(script, "0", *options, open_capture=camera)
    assert camera.opened == [0] and camera.released == 1 and run.failures == []
    images = read(output / "images.json")["images"]
    assert [x["frame"] for x in images] == list(range(count))
    assert images[0]["file_name"] == "camera 0"
    written, fps = read_video(output / "pictures" / "camera_0.mp4")
    assert len(written) == count and fps == 25


def test_camera_that_is_not_there(script, run_folder, tmp_path):
    options = ("--weights", run_folder, "--output", tmp_path / "seen")
    run = predict(script, "7", *options, open_capture=Camera([]))
    assert run.failures == ["camera 7: opencv cannot open it"]


def test_unreadable_files_are_counted_and_left_out(script, toy, run_folder, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "a.jpg").write_text("no picture")
    good = (toy[1] / "0001.png").read_bytes()
    (folder / "b.png").write_bytes(good)
    (folder / "c.png").write_bytes(good[: len(good) // 2])
    (folder / "d.mp4").write_text("no video")
    (folder / "notes.txt").write_text("neither image nor video")
    output = tmp_path / "seen"
    with pytest.raises(SystemExit, match="error: 3 inputs could not be read.*a.jpg: Unidentified"):
        script.main([str(folder), "--weights", str(run_folder), "--output", str(output)])
    assert capsys.readouterr().err.count("skipped: ") == 3
    assert [x["file_name"] for x in read(output / "images.json")["images"]] == [
        str(folder / "b.png")
    ]
    assert os.listdir(output / "pictures") == ["b.jpg"]
    assert {x["image_id"] for x in read(output / "coco_instances_results.json")} == {1}


def test_inputs_are_never_overwritten(script, toy, run_folder, tmp_path):
    folder = tmp_path / "photos"
    (folder / "sub").mkdir(parents=True)
    image = Image.open(toy[1] / "0001.png")
    for name in ("a.png", "a.jpg", "sub/A.png"):
        image.save(folder / name)
    options = ("--weights", run_folder, "--output", folder / "seen")
    for _ in range(2):  # what the first run made is no input of the second
        run = predict(script, folder, *options)
        names = ["a.jpg", "a_2.jpg", "A_3.jpg"]
        assert sorted(os.listdir(folder / "seen" / "pictures")) == sorted(names)
        assert len(run.results.images) == 3
    picture = folder / "seen" / "pictures" / "a.jpg"
    before = picture.read_bytes()
    with pytest.raises(ValueError, match=r"a.jpg, where the picture of .* belongs, is an input"):
        predict(script, picture, *options)
    assert picture.read_bytes() == before


@pytest.mark.parametrize(
    "words, message",
    [
        (("--score-threshold", "2"), "--score-threshold must lie between 0 and 1, got 2.0"),
        (("--max-size", "-1"), "must not be negative"),
        (("--max-size", "9", "--min-size", "10"), "--min-size 10 is more than --max-size 9"),
        (("lost.png",), "the input lost.png does not exist"),
        (("--weights", "lost.pth"), "config.yaml: give the config of the run as --config-file"),
        (("--classes", "a", "b"), "2 --classes are given, but the detector has 3"),
        (("--teacher", "--opts", "KD.TEACHER.CONFIG_FILE", ""), "names no teacher"),
        (("--teacher", "--opts", "KD.TEACHER.WEIGHTS", "no.pth"), "no.pth does not exist"),
        (("--opts", "MODEL.RETINANET.NUM_CLASSES", "4"), "does not fit the student"),
    ],
)
def test_wrong_input_is_one_message(words, message, script, toy, run_folder, tmp_path):
    output = tmp_path / "seen"
    image = [] if words[0] == "lost.png" else [str(toy[1] / "0001.png")]
    options = ["--weights", str(run_folder), "--output", str(output)]
    with pytest.raises(SystemExit, match=message):
        script.main([*image, *(words if not image else ()), *options, *(words if image else ())])
    assert not output.exists()


def test_an_empty_folder(script, run_folder, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no image or video in .*empty"):
        predict(script, tmp_path / "empty", "--weights", run_folder, "--output", tmp_path / "seen")


@pytest.mark.parametrize(
    "given, stored, expected",
    [
        (["x", "y", "z"], ["p", "q", "r"], ["x", "y", "z"]),
        ([], ["p", "q", "r"], ["p", "q", "r"]),
        ([], None, list(CLASSES)),  # of the data set
        ([], ["of", "another"], list(CLASSES)),
    ],
)
def test_names_of_classes(given, stored, expected, toy):
    from kd_d2.prediction import class_names_of

    cfg = tiny_cfg("RetinaNet", **{"DATASETS.TEST": (toy[0],)})
    assert class_names_of(tiny_model("RetinaNet"), cfg, given, stored) == expected
    assert class_names_of(tiny_model("RetinaNet"), tiny_cfg("RetinaNet")) == []
