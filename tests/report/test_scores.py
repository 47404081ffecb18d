"""AP from logs, results and predictions."""

import json
import math

import pytest
from pycocotools.coco import COCO

from kd_d2.report import Run, read_runs
from kd_d2.report.scores import box_scores, logged_evaluations, metric_order


def run_with(series, test_sets=("d",), dropped=(), result=()):
    config = {"DATASETS": {"TEST": list(test_sets)}}
    return Run("r", "r", config, dict(series), dict(dropped), dict(result))


def test_the_last_evaluation_counts():
    run = run_with(
        {"bbox/AP": [(9, 1.0), (19, 2.0)], "bbox/AP-x": [(9, 5.0)], "loss": [(39, 1.0)]},
        dropped={"bbox/APl": 2},
    )
    (found,) = logged_evaluations(run)
    assert (found.dataset, found.task) == ("d", "bbox")
    assert found.source == "metrics.json, iteration 19"
    # that of a class was not logged at the end, and there are no large objects
    assert found.metrics["AP"] == 2 and math.isnan(found.metrics["APl"])
    assert set(found.metrics) == {"AP", "APl"}


def test_several_data_sets_and_kinds():
    run = run_with(
        {"a/bbox/AP": [(9, 1.0)], "b/bbox/AP": [(9, 2.0)], "b/segm/AP": [(9, 3.0)]}, ("a", "b")
    )
    found = {(e.dataset, e.task): e.metrics["AP"] for e in logged_evaluations(run)}
    assert found == {("a", "bbox"): 1, ("b", "bbox"): 2, ("b", "segm"): 3}
    run = run_with({"small/bbox/AP": [(9, 1.0)], "bbox_TTA/AP": [(9, 2.0)]})
    found = {(e.dataset, e.task): e.metrics["AP"] for e in logged_evaluations(run)}
    assert found == {("d", "small: bbox"): 1, ("d", "bbox_TTA"): 2}


def test_a_teacher_is_not_the_run():
    assert logged_evaluations(run_with({"teacher/d/AP": [(0, 60.0)], "tide/Cls": [(0, 1.0)]})) == []


def test_result_json_stands_in():
    stored = {"metrics": {"AP": 3.0, "APl": math.nan, "seconds": 4.0, "AP50": "?"}}
    (found,) = logged_evaluations(run_with({}, result=stored))
    assert found.source == "result.json" and found.metrics["AP"] == 3
    assert set(found.metrics) == {"AP", "APl"}
    assert logged_evaluations(run_with({}, result={"metrics": {}})) == []


def test_order_of_metrics():
    names = ["AP-b", "APs", "AP-a", "AP", "AP70", "AP50"]
    assert metric_order(names) == ["AP", "AP50", "APs", "AP70", "AP-a", "AP-b"]
    assert metric_order(names, ["b", "a"])[-2:] == ["AP-b", "AP-a"]


def test_scores_from_predictions_equal_those_of_the_evaluator(trained):
    """Detectron2's evaluator logged them at the end of the run."""
    (run,) = read_runs([str(trained[0])])
    (logged,) = logged_evaluations(run)
    from detectron2.data import MetadataCatalog

    json_file = MetadataCatalog.get(run.test_sets[0]).json_file
    found = json.loads((trained[0] / "inference" / "coco_instances_results.json").read_text())
    ours = box_scores(COCO(json_file), found)
    assert set(ours) == set(logged.metrics) and len(ours) == 9
    for name, value in logged.metrics.items():
        assert ours[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert ours["AP50"] > 0  # there is something to compare
