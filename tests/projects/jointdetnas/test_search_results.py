"""What is read from results: Pareto front, progress, the numbers behind the figures, pictures."""

import importlib.util
import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kd_d2.projects.jointdetnas.search import figures
from kd_d2.projects.jointdetnas.search.analyses import (
    action_gains,
    epochs_curve,
    lineage,
    matched_teachers,
    pair_generations,
    score_curves,
)
from kd_d2.projects.jointdetnas.search.commands import choose_trial, reclaim, status, workers
from kd_d2.projects.jointdetnas.search.journal import Journal
from kd_d2.projects.jointdetnas.search.page import report, write_page
from kd_d2.projects.jointdetnas.search.results import (
    Point,
    best_result,
    pareto_front,
    points,
    progress,
    rows,
    time_left,
)
from kd_d2.projects.jointdetnas.search.worker import worker_lock
from tests.fixtures import tiny_cfg
from tests.projects.jointdetnas.cases import student
from tests.projects.jointdetnas.search_cases import ROOT, course

PLOTS = Path(__file__).parents[3] / "projects/JointDetNAS/tools/plots.py"


def result(number, change, parent, score, teacher=10, epochs=3.0, macs=(100, 200)):
    """A trial whose AP is its score at the first resolution, and one more at the second."""
    sizes = [
        {"size": [64, 64], "AP": score, "score": score, "macs": macs[0], "flops": 1},
        {"size": [96, 64], "AP": score + 1, "score": score - 1, "macs": macs[1], "flops": 1},
    ]
    return {
        "number": number,
        "change": change,
        "parent": parent,
        "action": None,
        "teacher": "d1-1-1-1_w4-4-4-4_n4_s4",
        "score": score,
        "size": [64, 64],
        "AP": score,
        "sizes": sizes,
        "macs": {"stem": 1, "res2": 10 - number},
        "parameters": 5,
        "teacher_parameters": teacher,
        "arch": ROOT.entry(),
        "iterations": 10,
        "epochs": epochs,
    }


# by hand: 0 -> 1 (better) -> 3 (better); 0 -> 2 (worse); 1 -> 4 (equal); 3 -> 5 (better)
FOUND = [
    result(0, "Base", None, 20.0, teacher=50),
    result(1, "Teacher", 0, 22.0, teacher=40),
    result(2, "AddLayer", 0, 19.0, teacher=50),
    result(3, "ChannelPruning", 1, 25.0, teacher=40),
    result(4, "Rearrange", 1, 22.0, teacher=40),
    result(5, "ChannelPruning", 3, 25.5, teacher=40, macs=(90, 180)),
]


def test_generations_of_pairs():
    assert pair_generations(FOUND) == {0: 0, 1: 1, 2: 0, 3: 2, 4: 1, 5: 3}


def test_gains_of_actions():
    gains = action_gains(FOUND[::-1])
    assert gains.trials == [0, 1, 2, 3, 4, 5]
    assert gains.cumulated["ChannelPruning"] == [0, 0, 0, 3.0, 3.0, 3.5]
    assert gains.cumulated["AddLayer"] == gains.cumulated["Rearrange"] == [0] * 6
    assert {
        g: {n: c for n, c in counts.items() if c} for g, counts in gains.beneficial.items()
    } == {
        2: {"ChannelPruning": 1},
        3: {"ChannelPruning": 1},
    }


def test_teachers():
    curve, everywhere = matched_teachers(FOUND)
    assert curve == [(0, 50), (1, 40), (2, 40), (3, 40), (4, 40), (5, 40)]
    assert everywhere == [50, 40, 50, 40, 40, 40]
    assert matched_teachers([{**FOUND[0], "teacher_parameters": None}]) == ([], [])


def test_scores_by_resolution():
    curves = score_curves(FOUND)
    assert curves[(64, 64)][:4] == [(0, 20, 20), (1, 22, 22), (2, 19, 22), (3, 25, 25)]
    assert curves[(96, 64)][-1] == (5, 24.5, 24.5)


def test_epochs_of_the_lineage():
    assert [r["number"] for r in lineage(FOUND, 5)] == [0, 1, 3, 5]
    # at the larger size AP is one more; two ways of 6 epochs, three of 9
    assert epochs_curve(FOUND) == [(3.0, 21.0), (6.0, 23.0), (9.0, 26.0), (12.0, 26.5)]


def test_pareto_front():
    found = [
        Point(100, 20.0, 0, (64, 64)),
        Point(200, 20.0, 1, (64, 64)),  # dearer, not better
        Point(150, 25.0, 2, (64, 64)),
        Point(150, 25.0, 3, (64, 64)),  # the same, later
        Point(150, 24.0, 4, (64, 64)),
        Point(90, 10.0, 5, (64, 64)),
        Point(300, 30.0, 6, (64, 64)),
        Point(300, 31.0, 7, (64, 64)),
    ]
    assert [p.trial for p in pareto_front(found)] == [5, 0, 2, 7]
    assert pareto_front(found[::-1]) == pareto_front(found)
    assert pareto_front([]) == []
    # none of the rest beats one of the front
    for p in found:
        for f in pareto_front(found):
            assert not (p.macs <= f.macs and p.ap > f.ap) and not (p.macs < f.macs and p.ap >= f.ap)


def test_points():
    assert points(FOUND[:1]) == [Point(100, 20.0, 0, (64, 64)), Point(200, 21.0, 0, (96, 64))]


def test_best():
    assert best_result([]) is None
    twice = [*FOUND, {**FOUND[5], "number": 6}]
    assert best_result(twice)["number"] == best_result(twice[::-1])["number"] == 5


# ------------------------------------------------------------------------------- a folder of it
def folder_of(path, found=FOUND, failed=(), running=()):
    search = course(path, max_trials=10)
    for number in range(len(found) + len(failed) + len(running)):
        search.journal.begin(number, "a")
    for entry in found:
        candidate = search.candidate(entry["number"])
        os.makedirs(candidate.folder)
        candidate.write_result(entry)
        search.journal.complete(entry["number"], entry["score"])
    for number in failed:
        search.journal.fail(number, "out of memory")
    return search


def test_progress(tmp_path):
    search = folder_of(tmp_path, failed=(6,), running=(7,))
    trials = search.journal.trials()
    line = progress(search, trials)
    assert line.startswith(
        "7 of 10 trials; generation 7; 1 running; 1 failed; best score 25.500, trial 5: AP 25.50 "
        "at 64x64, 9e-08 GMAC"
    )
    assert line.endswith(" left")
    cells = rows(search, trials)
    assert cells[3][3:7] == ("25.00", "64x64", "1e-07", "25.000")
    assert cells[6][6] == "failed" and cells[7][6] == "running"
    text = status(search)
    assert "trial 6 failed: out of memory" in text and text.splitlines()[0] == line
    assert progress(course(tmp_path / "new"), []) == "0 of 100 trials; 0 running"


def test_time_left(tmp_path):
    search = folder_of(tmp_path, FOUND[:3], running=(3, 4))
    trials = search.journal.trials()

    def lasting(trial, seconds):
        return type(trial)(**{**vars(trial), "ended": trial.started + timedelta(seconds=seconds)})

    done = [lasting(t, s) for t, s in zip(trials, (60, 90, 6000))]
    # seven trials of 90 s, two at a time
    assert time_left(search, [*done, *trials[3:]]) == timedelta(seconds=315)
    assert time_left(search, trials[3:]) is None


def test_page(tmp_path, monkeypatch):
    search = folder_of(tmp_path)
    line = write_page(search)
    page = (tmp_path / "search.html").read_text()
    assert line in page and "<td>ChannelPruning" not in page and "<td>25.500</td>" in page
    for name in ("pareto.png", "scores.png"):
        assert f'src="{name}"' in page
        assert np.asarray(Image.open(tmp_path / name)).std() > 5
    assert not [n for n in os.listdir(tmp_path) if n.startswith(".")]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    write_page(search)
    assert "<img" not in (tmp_path / "search.html").read_text()
    # a full disk is no reason to stop
    monkeypatch.setattr(
        "kd_d2.projects.jointdetnas.search.page.atomic_write",
        lambda path: (_ for _ in ()).throw(OSError("disk full")),
    )
    report(search)


def test_page_before_the_first_result(tmp_path):
    write_page(course(tmp_path))
    assert "0 of 100 trials" in (tmp_path / "search.html").read_text()


def test_choice_of_a_trial(tmp_path):
    search = folder_of(tmp_path, failed=(6,))
    for number in (1, 5):
        open(search.candidate(number).student, "w").close()
    assert choose_trial(search, "best") == 5 and choose_trial(search, "1") == 1
    with pytest.raises(ValueError, match="trial 6 is not complete"):
        choose_trial(search, "6")
    with pytest.raises(ValueError, match="weights of trial 2 were not kept"):
        choose_trial(search, "2")
    with pytest.raises(ValueError, match="number or 'best', got 'worst'"):
        choose_trial(search, "worst")
    with pytest.raises(ValueError, match="no trial of .* is complete yet"):
        choose_trial(course(tmp_path / "new"), "best")


def test_reclaim(tmp_path):
    search = folder_of(tmp_path, FOUND[:2], running=(2,))
    lock = worker_lock(str(tmp_path), "a")
    os.makedirs(tmp_path / "workers")
    assert workers(str(tmp_path)) == []
    lock.acquire()
    assert workers(str(tmp_path))[0].startswith("worker a: running, process")
    with pytest.raises(ValueError, match="worker 'a' is running, process .*: end it first"):
        reclaim(search, "a")
    assert search.journal.trials()[2].worker == "a"
    lock.release()
    # of another machine, nobody knows whether it lives: who reclaims says it does not
    os.symlink("elsewhere|pid:[1]|1|5|abc", lock.path)
    assert workers(str(tmp_path)) == ["worker a: running, process 1 on elsewhere"]
    assert reclaim(search, "a") == [2] and lock.holder() is None
    assert search.journal.trials()[2].worker == ""
    assert reclaim(search, "a") == []


# ------------------------------------------------------------------------------------ pictures
def test_figures_are_drawn(tmp_path):
    both = {"R50": FOUND, "R101": FOUND[:4]}
    figures.draw_actions(both, str(tmp_path / "actions.png"))
    figures.draw_capacity(both, str(tmp_path / "capacity.png"))
    figures.draw_actions({"nothing better": FOUND[:1]}, str(tmp_path / "few.png"))
    for name in ("actions.png", "capacity.png", "few.png"):
        assert np.asarray(Image.open(tmp_path / name)).std() > 5


def plots():
    spec = importlib.util.spec_from_file_location("plots", PLOTS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_plots_of_a_search(tmp_path, capsys):
    """From journal and results alone."""
    folder_of(tmp_path / "search")
    kept = {"journal.log", "result.json"}
    for path in (tmp_path / "search").rglob("*"):
        assert path.is_dir() or path.name in kept, path
    shutil.copytree(tmp_path / "search", tmp_path / "copy")
    run = tmp_path / "run"
    run.mkdir()
    cfg = tiny_cfg("GeneralizedRCNN", **{"SOLVER.MAX_ITER": 100})
    (run / "config.yaml").write_text(cfg.dump())
    (run / "metrics.json").write_text(
        "".join(json.dumps({"iteration": i, "bbox/AP": ap}) + "\n" for i, ap in ((49, 9), (99, 12)))
    )
    module = plots()
    assert module.full_training(f"{run}:24") == [(12.0, 9), (24.0, 12)]
    output = tmp_path / "figures"
    arguments = ["--search", f"a={tmp_path / 'search'}", "--search", f"b={tmp_path / 'copy'}"]
    module.main([*arguments, "--full", f"whole={run}:24", "--output", str(output)])
    names = {"actions", "capacity", "allocation", "scores", "pareto", "epochs"}
    assert {p.name for p in output.iterdir()} == {f"{name}.png" for name in names}
    assert f"wrote {output}/epochs.png" in capsys.readouterr().out
    assert module.allocation(FOUND) == ({"stem": 1, "res2": 10}, {"stem": 1, "res2": 5})


def test_plot_of_norm_weights(tmp_path):
    from kd_d2.projects.jointdetnas.search.students import write_student

    model = student()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv3.norm.weight"):
                parameter.fill_(9.0)  # the last norm of a block is in no group
            if name.endswith("res3.0.shortcut.norm.weight"):
                parameter.fill_(-2.0)
    path = str(tmp_path / "student.pth")
    write_student(model, path, tiny_cfg("GeneralizedRCNN"))
    module = plots()
    groups = module.norm_weights(path)
    assert list(groups) == ["inside of blocks"] + [f"projection, stage {s}" for s in (1, 2, 3, 4)]
    assert len(groups["inside of blocks"]) == sum(
        sum(ROOT.block(p).channels[:-1]) for p in ROOT.positions
    )
    assert groups["projection, stage 2"] == [2.0] * 24 and max(groups["inside of blocks"]) < 9
    module.main(["--weights", f"one={path}", "--output", str(tmp_path / "figures")])
    assert (tmp_path / "figures/weights.png").exists()


def test_plots_of_nothing(tmp_path):
    module = plots()
    Journal(str(tmp_path / "empty"))
    torch.save({"model": {}}, tmp_path / "other.pth")
    for arguments, message in (
        ([], "give what to draw"),
        (["--search", f"a={tmp_path / 'empty'}"], "no trial of .* is complete yet"),
        (["--search", f"a={tmp_path}"], "is not the folder of a search"),
        (["--full", f"a={tmp_path}"], "--full takes TITLE=FOLDER:EPOCHS"),
        (["--weights", f"a={tmp_path / 'other.pth'}"], "has no entry arch"),
    ):
        with pytest.raises(SystemExit, match=message):
            module.main([*arguments, "--output", str(tmp_path / "out")])
