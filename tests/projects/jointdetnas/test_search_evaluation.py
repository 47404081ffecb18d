"""A search with real detectors: inheritance, training, restarts, export."""

import glob
import json
import os
import shutil

import pytest
import torch
from detectron2.engine import HookBase

from kd_d2.engine import KDTrainer
from kd_d2.engine.main import build_config
from kd_d2.projects.jointdetnas import Architecture, parse
from kd_d2.projects.jointdetnas.score import StudentScore
from kd_d2.projects.jointdetnas.search.commands import build_course
from kd_d2.projects.jointdetnas.search.evaluation import evaluate, prepare
from kd_d2.projects.jointdetnas.search.proposal import Proposal
from kd_d2.projects.jointdetnas.search.pruning import backbone_macs
from tests.projects.jointdetnas.cases import BOTTLENECK, STEM
from tests.projects.jointdetnas.search_setting import in_this_process, script, setting

LARGEST = "d2-2-3-2_w6-6-6-6_n6_s6"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with setting(tmp_path_factory.mktemp("search")) as result:
        yield result


@pytest.fixture(scope="module")
def searched(home):
    """The finished search of six trials."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "")
        module = script()
        in_this_process(module, monkeypatch)
        module.main(["worker", "--config-file", home.write("done"), "--worker-id", "a"])
    return build_course(build_config(str(home.folder / "done.yaml")))


def load(path):
    return torch.load(path, weights_only=True)


def fresh(home, output, **changes):
    """Config and course of a search that has not begun, one of whose trials is evaluated here."""
    cfg = build_config(home.write(output, **changes))
    shutil.rmtree(cfg.OUTPUT_DIR, ignore_errors=True)
    return cfg, build_course(cfg, create=True)


def run(cfg, course, proposal, trainer=KDTrainer):
    candidate = course.candidate(proposal.number)
    candidate.write_spec(proposal)
    own = prepare(cfg, course, proposal.number)
    evaluate(cfg, own, candidate, trainer)
    return candidate


def base():
    return Proposal(0, "Base", None, None, "d1-1-1-1_w4-4-4-4_n4_s4")


# ------------------------------------------------------------------------------------ a search
def test_it_visits_every_change(searched):
    trials = searched.journal.trials()
    assert [t.state for t in trials] == ["complete"] * 6
    changes = [searched.candidate(n).spec().change for n in range(6)]
    assert changes == [
        *("Base", "Teacher", "Rearrange", "ChannelPruning", "AddLayer", "LayerPruning")
    ]
    for trial in trials:
        result = searched.candidate(trial.number).result()
        assert trial.score == result["score"] == max(e["score"] for e in result["sizes"])
    assert sorted(os.listdir(os.path.join(searched.folder, "teachers"))) == sorted(
        {searched.candidate(n).spec().teacher for n in range(6)}
    )
    page = open(os.path.join(searched.folder, "search.html")).read()
    assert "6 of 6 trials" in page and 'src="pareto.png"' in page and "ChannelPruning" in page
    assert os.path.getsize(os.path.join(searched.folder, "scores.png")) > 1000


def test_results(searched):
    """Every number of the result against its source."""
    cfg = build_config(f"{searched.folder}.yaml")
    score = StudentScore(cfg, parse(BOTTLENECK, STEM))
    for number in range(6):
        result = searched.candidate(number).result()
        architecture = Architecture.from_entry(result["arch"])
        for entry in result["sizes"]:
            width, height = entry["size"]
            stored = json.load(open(searched.candidate(number).path(f"eval_{width}x{height}.json")))
            assert entry["AP"] == stored["metrics"]["AP"]
            assert entry["score"] == score(architecture, (width, height), entry["AP"])
        assert sum(result["macs"].values()) == score.cost(architecture)
        assert (result["iterations"], result["epochs"]) == (2, 2 * 2 / 6)
        assert result["teacher_parameters"] > 100_000
    assert searched.candidate(0).result()["macs"] != searched.candidate(3).result()["macs"]


def test_encodings_are_those_of_the_actions(searched):
    stages = {}
    for number in range(6):
        candidate = searched.candidate(number)
        result, spec = candidate.result(), candidate.spec()
        stages[number] = Architecture.from_entry(result["arch"])
        config = build_config(candidate.config)
        assert config.MODEL.MORPH_RESNET.ENCODING == str(stages[number])
        assert config.KD.TEACHER.ELASTIC.SUBNET == spec.teacher
        assert config.SEED == 1000 * 7 + number
        if spec.parent is None:
            continue
        before = stages[spec.parent]
        blocks = sum(stages[number].depths) - sum(before.depths)
        expected = {"AddLayer": 1, "LayerPruning": -1}
        assert blocks == expected.get(spec.change, 0)
        same = stages[number] == before
        assert same == (spec.change == "Teacher")
        if spec.change == "ChannelPruning":
            assert stages[number].num_rankable_channels < before.num_rankable_channels
    added = next(n for n in range(6) if searched.candidate(n).spec().change == "AddLayer")
    ages = searched.candidate(added).result()["arch"]["age"]
    assert ages.count(1) == 1 and set(ages) == {1, 100}


def test_a_changed_teacher_leaves_the_student(searched):
    """Trial 1 began with the trained weights of trial 0, adapter included, and changed them."""
    spec = searched.candidate(1).spec()
    assert (spec.change, spec.parent) == ("Teacher", 0) and spec.teacher != LARGEST
    parent, begun = load(searched.candidate(0).student), load(searched.candidate(1).init)
    trained = load(searched.candidate(1).student)
    assert all(torch.equal(parent["model"][k], v) for k, v in begun["model"].items())
    assert all(torch.equal(parent["distillers"][k], v) for k, v in begun["distillers"].items())
    assert "jointdetnas.adapter.weight" in begun["distillers"]
    key = "roi_heads.box_head.fc1.weight"
    assert not torch.equal(begun["model"][key], trained["model"][key])
    # the first trial changed the adapter, hence it is no fresh one
    assert "distillers" not in load(searched.candidate(0).init)


def test_only_what_is_needed_is_kept(searched):
    needed = searched.needed(searched.journal.trials())
    assert len(needed) >= 5
    for number in range(6):
        names = set(os.listdir(searched.candidate(number).folder))
        assert {"spec.json", "result.json", "config.yaml", "metrics.json"} <= names
        assert ("student.pth" in names) == ("init.pth" in names) == (number in needed)
        if number not in needed:
            continue
        assert not [n for n in names if n.startswith("model_") or n == "last_checkpoint"]
        assert set(load(searched.candidate(number).student)) == {
            *("model", "arch", "training", "distillers", "run_info")
        }


def test_nothing_is_done_twice(searched, home, monkeypatch):
    module = script()
    monkeypatch.setattr(module, "evaluate_in_process", lambda *_: pytest.fail("evaluated again"))
    module.main(["worker", "--config-file", str(home.folder / "done.yaml"), "--worker-id", "b"])
    assert len(searched.journal.trials()) == 6


# --------------------------------------------------------------------------------- one trial
class Killed(BaseException):
    pass


class KillAt(HookBase):
    def __init__(self, iteration):
        self._iteration = iteration

    def after_step(self):
        if self.trainer.iter + 1 == self._iteration:
            raise Killed


def killed_at(iteration):
    class Trainer(KDTrainer):
        def build_hooks(self):
            return [*super().build_hooks(), KillAt(iteration)]

    return Trainer


class Fast(KDTrainer):
    """Evaluates nothing; a constant AP."""

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {} if not cfg.DATASETS.TEST else {"bbox": {"AP": 30.0}}


@pytest.mark.parametrize("resume", ["restart", "continue"])
def test_killed_training_ends_in_the_same_weights(resume, home):
    changes = {"SEARCH.RESUME": resume, "SOLVER.MAX_ITER": 4, "SOLVER.CHECKPOINT_PERIOD": 2}
    expected = load(run(*fresh(home, "whole", **changes), base(), Fast).student)
    cfg, course = fresh(home, "parts", **changes)
    with pytest.raises(Killed):
        run(cfg, course, base(), killed_at(3))
    candidate = course.candidate(0)
    assert glob.glob(candidate.path("model_*.pth")) and not candidate.has(candidate.student)
    first = os.stat(candidate.init).st_mtime_ns
    seen = []

    class Observed(Fast):
        def train(self):
            seen.append(self.start_iter)
            super().train()

    run(cfg, course, base(), Observed)
    assert seen == [{"restart": 0, "continue": 2}[resume]]
    assert os.stat(candidate.init).st_mtime_ns == first
    found = load(candidate.student)
    for entry in ("model", "distillers"):
        assert found[entry].keys() == expected[entry].keys()
        for key, value in expected[entry].items():
            assert torch.equal(found[entry][key], value), key


def test_killed_evaluation_goes_on_where_it_was(home):
    cfg, course = fresh(home, "evaluation")
    calls = []

    class Interrupted(Fast):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            if cfg.DATASETS.TEST:
                calls.append((cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST))
                if len(calls) == 2:
                    raise Killed
            return super().test(cfg, model, evaluators)

    with pytest.raises(Killed):
        run(cfg, course, base(), Interrupted)
    candidate = course.candidate(0)
    assert calls == [(64, 64), (96, 64)] and candidate.result() is None

    class Untrained(Interrupted):
        def __init__(self, cfg):
            raise AssertionError("trained again")

    result = run(cfg, course, base(), Untrained).result()
    assert calls == [(64, 64), (96, 64), (96, 64)]
    # AP 30 at both: the smaller image has the better score
    assert result["size"] == [64, 64] and result["AP"] == 30.0
    assert result["score"] == pytest.approx(30 * (64 * 64 / (96 * 64)) ** -0.32)


def test_adapter_starts_afresh_if_it_shall(home):
    cfg, course = fresh(home, "afresh", **{"SEARCH.INHERIT_ADAPTER": False})
    run(cfg, course, base(), Fast)
    child = Proposal(1, "Teacher", 0, None, "d1-1-1-1_w4-4-4-4_n4_s5")
    candidate = run(cfg, course, child, Fast)
    assert "distillers" not in load(candidate.init) and "distillers" in load(candidate.student)


def test_missing_ap(home):
    class Broken(Fast):
        @classmethod
        def test(cls, cfg, model, evaluators=None):
            return {"bbox": {"AP": float("nan")}} if cfg.DATASETS.TEST else {}

    result = run(*fresh(home, "nan"), base(), Broken).result()
    assert result["score"] is None and result["AP"] is None


def test_missing_parent(home):
    cfg, course = fresh(home, "orphan")
    course.candidate(1).write_spec(Proposal(1, "Teacher", 0, None, LARGEST))
    with pytest.raises(FileNotFoundError, match="0000/student.pth"):
        prepare(cfg, course, 1)


def test_pool_sampling(home):
    """Table 10: a subnet as it is, recalibrated, not trained."""
    cfg, course = fresh(home, "sampling", **{"SEARCH.METHOD": "PoolSampling"})
    proposal = course.method.propose(0, [])

    class Untrained(Fast):
        def __init__(self, cfg):
            raise AssertionError("trained")

    candidate = run(cfg, course, proposal, Untrained)
    result = candidate.result()
    assert (result["change"], result["teacher"], result["epochs"]) == ("Pool", LARGEST, 0.0)
    assert result["arch"]["encoding"].startswith("[(12,12,48)-(12,12,48)]")
    assert result["teacher_parameters"] == result["parameters"]
    # the subnet costs more than the base of the score, so its score is less than its AP
    assert [e["score"] < 30 for e in result["sizes"]] == [True, True]
    written = build_config(candidate.config)
    assert written.DATASETS.TEST == (home.dataset,) and not written.KD.ENABLED


# -------------------------------------------------------------------------- what comes out
def test_export(searched, home, capsys):
    output = str(home.folder / "exported")
    script().main(["export", "--output", output, "OUTPUT_DIR", str(searched.folder)])
    number = searched.outcomes(searched.journal.trials())[0].number
    result = searched.candidate(number).result()
    assert f"trial {number}: AP {result['AP']:.2f}" in capsys.readouterr().out
    cfg = build_config(os.path.join(output, "config.yaml"))
    assert not cfg.KD.ENABLED and cfg.MODEL.MORPH_RESNET.ENCODING == result["arch"]["encoding"]
    assert [cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST] == result["size"]
    text = open(os.path.join(output, "config.yaml")).read()
    assert "SEARCH:" not in text and "\nKD:" not in text
    model = KDTrainer.build_student(cfg)
    model.load_state_dict(load(cfg.MODEL.WEIGHTS)["model"])
    assert KDTrainer.test(cfg, model)["bbox"]["AP"] == pytest.approx(result["AP"])
    tuned = build_config(os.path.join(output, "finetune.yaml"))
    assert tuned.MODEL.WEIGHTS == os.path.abspath(cfg.MODEL.WEIGHTS) and tuned.KD.ENABLED
    assert (tuned.SOLVER.MAX_ITER, tuned.SOLVER.BASE_LR) == (117266, 0.01)
    assert tuned.KD.TEACHER.ELASTIC.SUBNET == result["teacher"]
    written = json.load(open(os.path.join(output, "result.json")))
    lineage = written.pop("lineage")
    assert lineage[0] == 0 and lineage[-1] == number
    assert written.pop("lineage_iterations") == 2 * len(lineage) and written == result


def test_status_pareto_and_reclaim(searched, capsys):
    module, folder = script(), ["OUTPUT_DIR", str(searched.folder)]
    module.main(["status", *folder])
    out = capsys.readouterr().out
    assert out.startswith("6 of 6 trials; generation 5; 0 running; best score")
    assert "Rearrange" in out and "worker a" not in out
    module.main(["pareto", *folder])
    table = capsys.readouterr().out
    assert table.startswith("| trial |")
    assert open(os.path.join(searched.folder, "pareto.md")).read() == table
    module.main(["reclaim", "--worker-id", "a", *folder])
    assert "may take over now: none" in capsys.readouterr().out


def test_errors_of_commands(searched, home, capsys, monkeypatch):
    module, folder = script(), ["OUTPUT_DIR", str(searched.folder)]
    other = str(home.folder / "none")
    for arguments, message in (
        (["status"], "status needs the folder of the search: OUTPUT_DIR <folder>"),
        (["status", "OUTPUT_DIR", other], f"{other} is not the folder of a search"),
        (["export", "--trial", "x", "--output", other, *folder], "a number or 'best', got 'x'"),
        (["export", "--trial", "9", "--output", other, *folder], "trial 9 is not complete"),
    ):
        with pytest.raises(SystemExit) as error:
            module.main(arguments)
        assert message in str(error.value)
    for changes, message in (
        ({"SEARCH.TOP_K": 3}, "belongs to another search: SEARCH.TOP_K is 5 there and 3 here"),
        ({"SEED": 8}, "belongs to another search: SEED is 7 there and 8 here"),
        ({"SEARCH.METHOD": "x"}, "SEARCH.METHOD must be one of"),
        ({"DATASETS.TEST": (home.dataset,) * 2}, "DATASETS.TEST of a search must be one data set"),
        ({"SEARCH.SCORE.SIZES": ((64,),)}, "SEARCH.SCORE.SIZES must be pairs"),
    ):
        path = home.write("other", **{"OUTPUT_DIR": str(searched.folder), **changes})
        with pytest.raises(SystemExit) as error:
            module.main(["worker", "--config-file", path, "--worker-id", "c"])
        assert message in str(error.value)


def test_other_weights_are_another_search(searched, home):
    state = load(home.folder / "base.pth")
    state["model"]["roi_heads.box_head.fc1.bias"] += 1
    torch.save(state, home.folder / "other.pth")
    path = home.write(
        "weights",
        **{"OUTPUT_DIR": str(searched.folder), "MODEL.WEIGHTS": str(home.folder / "other.pth")},
    )
    with pytest.raises(SystemExit) as error:
        script().main(["worker", "--config-file", path, "--worker-id", "c"])
    assert "belongs to another search: MODEL.WEIGHTS is" in str(error.value)


def test_prune(home, capsys):
    config, output = home.write("prune"), str(home.folder / "pruned")
    module = script()
    module.main(["prune", "--config-file", config, "--percent", "0.3", "--output", output])
    cfg = build_config(os.path.join(output, "config.yaml"))
    architecture = parse(cfg.MODEL.MORPH_RESNET.ENCODING, STEM)
    before = parse(BOTTLENECK, STEM)
    removed = round(0.3 * before.num_rankable_channels)
    assert architecture.num_rankable_channels == before.num_rankable_channels - removed
    model = KDTrainer.build_student(cfg)
    model.load_state_dict(load(cfg.MODEL.WEIGHTS)["model"])
    assert cfg.OUTPUT_DIR == os.path.join(output, "run") and cfg.KD.ENABLED
    # as small as another one
    like = ["--like", cfg.MODEL.WEIGHTS]
    module.main(["prune", "--config-file", config, "--output", f"{output}2", *like])
    again = build_config(os.path.join(f"{output}2", "config.yaml")).MODEL.MORPH_RESNET.ENCODING
    macs = [backbone_macs(parse(e, STEM), (96, 64)) for e in (again, str(architecture))]
    assert macs[0] <= macs[1]
    for arguments in ([], ["--percent", "0.3", "--gmacs", "1"]):
        with pytest.raises(SystemExit) as error:
            module.main(["prune", "--config-file", config, "--output", output, *arguments])
        assert "prune needs one of --percent, --gmacs and --like" in str(error.value)
