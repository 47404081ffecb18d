"""DICOD in the real trainer: files, resume, the student that is left, and what is refused."""

import copy

import pytest
import torch

from kd_d2.export import export_student
from tests.engine.support import StopAt, train
from tests.fixtures import registered_toy_dataset, tiny_batch, tiny_cfg, tiny_model
from tests.projects.dicod.detectors import KEYS, classifier, only


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A function (folder, student, keys) -> config of a short run, with a classifier's file."""
    folder = tmp_path_factory.mktemp("dicod")
    model = classifier()
    weights = folder / "classifier.pth"
    torch.save({"model": model.state_dict(), "run_info": model.metadata()}, weights)
    with registered_toy_dataset(folder, 4, size=(128, 128)) as data:

        def make(name, student="SSD", **keys):
            values = {
                **KEYS,
                "KD.TEACHER.WEIGHTS": str(weights),
                "KD.TEACHER.CLASSIFIER.ARCH": "resnet18",
                "KD.TEACHER.CLASSIFIER.INPUT_SIZE": 32,
                "DATASETS.TRAIN": (data,),
                "SOLVER.MAX_ITER": 3,
                "SOLVER.CHECKPOINT_PERIOD": 1,
                "OUTPUT_DIR": str(folder / name),
            }
            return tiny_cfg(student, **{**values, **keys})

        yield make


def test_resume_continues_the_curve_and_the_teacher_stays_as_it_is(runs):
    before = {}

    def started(trainer):
        before.update(copy.deepcopy(trainer.teacher.model.state_dict()))

    whole = train(runs("whole"), started=started)
    train(runs("parts"), hooks=[StopAt(1)])
    resumed = train(runs("parts"), resume=True)
    assert sorted(resumed.curve) == [1, 2]
    for i in (1, 2):
        assert resumed.curve[i] == whole.curve[i]
        assert resumed.curve[i]["kd_raw/dicod/cls"] > 0
    for name, value in whole.student.named_parameters():
        assert torch.equal(value, dict(resumed.student.named_parameters())[name]), name
    theirs = whole.teacher.model
    assert before and not any(m.training for m in theirs.modules())
    for name, value in theirs.state_dict().items():
        assert torch.equal(value, before[name]), name
    saved = torch.load(whole.cfg.OUTPUT_DIR + "/model_final.pth", weights_only=True)
    assert set(saved["model"]) == set(tiny_model("SSD").state_dict())


def test_the_student_is_a_plain_detector(runs, tmp_path):
    """It detects the same without KD, and the export names no classifier."""
    # so small a step that the random network still finds something
    trainer = train(runs("student", **{"SOLVER.MAX_ITER": 1, "SOLVER.BASE_LR": 1e-5}))
    path = trainer.cfg.OUTPUT_DIR + "/model_final.pth"
    plain = tiny_model("SSD", seed=9).eval()
    state = torch.load(path, weights_only=True)["model"]
    plain.load_state_dict(state, strict=True)
    batch = tiny_batch(sizes=((128, 128),))
    with torch.no_grad():
        found, expected = trainer.model.eval()(batch), plain(batch)
    for a, b in zip(found, expected, strict=True):
        assert len(a["instances"]) > 0
        assert torch.equal(a["instances"].pred_boxes.tensor, b["instances"].pred_boxes.tensor)
        assert torch.equal(a["instances"].scores, b["instances"].scores)
    export = export_student(trainer.cfg, path, str(tmp_path / "student"))
    text = open(export.files[-1]).read()
    assert "classifier.pth" not in text and "DICOD" not in text
    exported = torch.load(export.files[0], weights_only=True)["model"]
    assert exported.keys() == state.keys()


def test_pixels_alone_read_no_file(runs):
    keys = {**only("loc_obj"), "KD.TEACHER.WEIGHTS": "no/such/file.pth", "SOLVER.MAX_ITER": 2}
    trainer = train(runs("pixels", **keys))
    assert trainer.teacher is None
    assert trainer.curve[1]["loss_kd/dicod/loc_obj"] > 0
    assert "loss_kd/dicod/cls" not in trainer.curve[1]


@pytest.mark.parametrize(
    "facts, keys, message",
    [
        ({"classes": ["square", "disc", "cross"]}, {}, "0: student 'disc', teacher 'square'"),
        ({"classes": ["disc", "square"]}, {}, "the student has 3 .* the classifier of .* 2;"),
        ({}, {"KD.TEACHER.CLASSIFIER.INPUT_SIZE": 56}, "INPUT_SIZE is 56, but .* with 32"),
        ({}, {"KD.TEACHER.TYPE": "DetectorTeacher"}, "KD.TEACHER.CONFIG_FILE is empty"),
    ],
)
def test_classifiers_that_do_not_fit(runs, tmp_path, facts, keys, message):
    model = classifier(**facts)
    path = tmp_path / "other.pth"
    torch.save({"model": model.state_dict(), "run_info": model.metadata()}, path)
    with pytest.raises(ValueError, match=message):
        train(runs("refused", **{"KD.TEACHER.WEIGHTS": str(path), **keys}))
