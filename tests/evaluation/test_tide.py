"""Error types against numbers computed by hand, and AP against pycocotools."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from kd_d2.evaluation import tide_errors
from kd_d2.evaluation.tide import COCO_THRESHOLDS, ERROR_TYPES

A, B = 1, 2


def box(shift=0.0, width=100.0, height=100.0):
    """A box moved to the right; two of width 100 have IoU (100 - shift) / (100 + shift)."""
    return [50.0 + shift, 50.0, width, height]


FAR = [250.0, 250.0, 100.0, 100.0]


def scene(objects, detections, images=1, classes=2):
    """Data set and predictions.

    Args:
        objects: (image, class, box) each, and True for a crowd region.
        detections: (image, class, box, score) each.
    """
    annotations = [
        {"id": i, "image_id": o[0], "category_id": o[1], "bbox": o[2], "iscrowd": int(any(o[3:]))}
        for i, o in enumerate(objects, 1)
    ]
    gt = {
        "images": [{"id": i} for i in range(1, images + 1)],
        "categories": [{"id": c} for c in range(1, classes + 1)],
        "annotations": annotations,
    }
    names = ("image_id", "category_id", "bbox", "score")
    return gt, [dict(zip(names, detection)) for detection in detections]


def toy():
    """Six images, one object each, and one error of every type or nearly so."""
    objects = [(i, c, box()) for i, c in enumerate((A, A, B, B, A, B), 1)]
    detections = [
        (1, A, box(), 0.9),
        (1, A, box(2), 0.8),  # duplicate
        (2, B, box(), 0.85),  # wrong class
        (3, B, box(40), 0.7),  # IoU 0.43
        (4, A, box(40), 0.6),  # that and the wrong class
        (5, A, FAR, 0.5),
        (6, B, box(19), 0.95),  # IoU 0.68: right up to 0.65
    ]
    return scene(objects, detections, images=6)


def test_toy_at_every_threshold():
    result = tide_errors(*toy())
    assert result.thresholds == pytest.approx(np.arange(10) * 0.05 + 0.5)
    low = {"Cls": 16.34, "Loc": 10.89, "Both": 0, "Dupe": 0, "Bkg": 0, "Miss": 16.83}
    high = {**low, "Loc": 27.72, "Miss": 8.42}
    for i in range(10):
        expected = low if i < 4 else high
        assert result.ap[i] == pytest.approx(33.66 if i < 4 else 16.83, abs=5e-3)
        for name in ERROR_TYPES:
            assert result.errors[name][i] == pytest.approx(expected[name], abs=5e-3), (i, name)
        counts = {name: numbers[i] for name, numbers in result.counts.items()}
        loc = 1 if i < 4 else 2
        assert counts == {"Cls": 1, "Loc": loc, "Both": 1, "Dupe": 1, "Bkg": 1, "Miss": 2}
    assert np.mean(result.ap) == pytest.approx(23.56, abs=5e-3)


def test_tidecv_on_blood_cells():
    """Real boxes and detections; made by benchmarks/tide_against_tidecv.py, which runs both."""
    content = json.loads(Path(__file__).with_name("tidecv_bccd.json").read_text())
    annotations, predictions = (
        [
            {"id": i, "image_id": x[0], "category_id": x[1], "bbox": x[2:6], "score": x[-1]}
            for i, x in enumerate(rows, 1)
        ]
        for rows in (
            content["objects, image category left top width height"],
            content["detections, image category left top width height score"],
        )
    )
    assert len(annotations) == 945 and len(predictions) == 1350
    gt = {
        "images": [{"id": i} for i in content["images"]],
        "categories": content["categories"],
        "annotations": [{**x, "iscrowd": 0} for x in annotations],
    }
    result = tide_errors(gt, predictions)
    rows = content["rows of tidecv"]
    assert [row["threshold"] for row in rows] == pytest.approx(result.thresholds)
    for i, row in enumerate(rows):
        assert result.ap[i] == pytest.approx(row["value"]["AP"], abs=1e-5)
        for name in ERROR_TYPES:
            assert result.errors[name][i] == pytest.approx(row["value"][name], abs=1e-5), (i, name)
        assert {name: numbers[i] for name, numbers in result.counts.items()} == row["number"]


# objects, detections, counts that are not 0, AP, errors that are not 0; at IoU 0.5
RULES = {
    "right": ([(1, A, box())], [(1, A, box(), 0.9)], {}, 100, {}),
    "exactly the threshold is right": (
        [(1, A, box())], [(1, A, box(width=50), 0.9)], {}, 100, {},
    ),
    "exactly the threshold takes the object": (
        [(1, A, box())],
        [(1, A, box(), 0.8), (1, A, box(width=50), 0.9)],
        # the first takes the object, so the exact one is a duplicate
        {"Dupe": 1}, 100, {},
    ),
    "exactly the threshold, object taken": (
        [(1, A, box())],
        [(1, A, box(), 0.9), (1, A, box(width=50), 0.8)],
        {"Loc": 1}, 100, {},
    ),
    "the best free object is taken": (
        [(1, A, box(20)), (1, A, box(0)), (1, A, box(-20))],
        [(1, A, box(1), 0.9), (1, A, box(21), 0.8), (1, A, box(-19), 0.7)],
        {}, 100, {},
    ),
    "duplicate before the object's own detection": (
        [(1, A, box())],
        [(1, A, box(2), 0.9), (1, A, box(), 0.8)],
        {"Dupe": 1}, 100, {},
    ),
    "box before class": (
        [(1, A, box(67)), (1, B, box())],
        [(1, A, box(), 0.9)],
        {"Loc": 1, "Miss": 1}, 0,
        # class A is complete, B is left with nothing found; without B's object only A remains
        {"Loc": 50},
    ),
    "class before duplicate": (
        [(1, A, box()), (1, B, box())],
        [(1, A, box(), 0.9), (1, A, box(2), 0.8)],
        {"Cls": 1}, 50, {"Cls": 50},
    ),
    "other class with exactly the threshold": (
        [(1, A, box()), (1, B, FAR)],
        [(1, B, box(width=50), 0.9), (1, B, FAR, 0.8)],
        # B: F T, precision 1/2; mended: both complete
        {"Cls": 1}, 25, {"Cls": 75},
    ),
    "exactly 0.1, same class": (
        [(1, A, [0.0, 0.0, 10.0, 100.0])], [(1, A, [0.0, 0.0, 10.0, 10.0], 0.9)],
        {"Loc": 1}, 0, {"Loc": 100},
    ),
    "exactly 0.1, other class": (
        [(1, A, [0.0, 0.0, 10.0, 100.0]), (1, B, FAR)],
        [(1, B, [0.0, 0.0, 10.0, 10.0], 0.9), (1, B, FAR, 0.8)],
        # B: F T; A is found by nothing and drops out when its object does
        {"Bkg": 1, "Miss": 1}, 25, {"Bkg": 25, "Miss": 25},
    ),
    "below 0.1": (
        [(1, A, box()), (1, A, FAR)],
        [(1, A, box(90), 0.9), (1, A, FAR, 0.8)],
        # F T of two: 1/2 at 51 of 101 recalls; without the first 1, without the object 1/2 at all
        {"Bkg": 1, "Miss": 1}, 100 * 51 / 202, {"Bkg": 100 * 51 / 202, "Miss": 50 - 100 * 51 / 202},
    ),
    "wrong class and bad box": (
        [(1, A, box()), (1, B, FAR)],
        [(1, B, box(40), 0.9), (1, B, FAR, 0.8)],
        {"Both": 1, "Miss": 1}, 25, {"Both": 25, "Miss": 25},
    ),
    "one claim is mended, the other removed": (
        [(1, A, box()), (1, A, FAR)],
        [(1, A, box(40), 0.9), (1, A, box(41), 0.8), (1, A, FAR, 0.7)],
        # F F T of two objects: 1/3 at 51 recalls; mended: T T
        {"Loc": 2}, 100 * 51 / 303, {"Loc": 100 - 100 * 51 / 303},
    ),
    "claims at an object that is found are removed": (
        [(1, A, box())],
        [(1, A, box(40), 0.9), (1, A, box(), 0.8)],
        {"Loc": 1}, 50, {"Loc": 50},
    ),
    "no object is found twice": (
        [(1, A, box()), (1, A, FAR)],
        [(1, A, box(40), 0.9), (1, A, box(), 0.8)],
        # F T of two objects, then T: 51 recalls
        {"Loc": 1, "Miss": 1}, 100 * 51 / 202,
        {"Loc": 100 * 51 / 202, "Miss": 50 - 100 * 51 / 202},
    ),
    "of a claim by box and one by class the higher score wins: box": (
        [(1, A, box())],
        [(1, A, box(40), 0.9), (1, B, box(), 0.8)],
        # class B has a detection and no object: AP 0
        {"Loc": 1, "Cls": 1}, 0, {"Loc": 50},
    ),
    "of a claim by box and one by class the higher score wins: class": (
        [(1, A, box())],
        [(1, A, box(40), 0.8), (1, B, box(), 0.9)],
        {"Loc": 1, "Cls": 1}, 0, {"Cls": 100},
    ),
    "inside a crowd region": (
        [(1, A, box()), (1, A, FAR, True)],
        [(1, A, [260.0, 260.0, 20.0, 20.0], 0.9), (1, A, box(), 0.8)],
        {"Bkg": 1}, 100, {},
    ),
    "half inside a crowd region, twice": (
        [(1, A, box()), (1, A, FAR, True)],
        [(1, A, [240.0, 260.0, 20.0, 20.0], 0.9)] * 2 + [(1, A, box(), 0.8)],
        {"Bkg": 2}, 100, {},
    ),
    "less than half inside a crowd region": (
        [(1, A, box()), (1, A, FAR, True)],
        [(1, A, [239.0, 260.0, 20.0, 20.0], 0.9), (1, A, box(), 0.8)],
        {"Bkg": 1}, 50, {"Bkg": 50},
    ),
    "inside another class's crowd region": (
        [(1, A, box()), (1, B, FAR, True)],
        [(1, A, [260.0, 260.0, 20.0, 20.0], 0.9), (1, A, box(), 0.8)],
        {"Bkg": 1}, 50, {"Bkg": 50},
    ),
    "bad box inside a crowd region": (
        [(1, A, box()), (1, A, box(-50, width=300), True)],
        [(1, A, box(40), 0.9)],
        {"Loc": 1}, 0, {"Loc": 100},
    ),
    "right inside a crowd region": (
        [(1, A, box()), (1, A, box(-50, width=300), True)],
        [(1, A, box(), 0.9)],
        {}, 100, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    objects, detections, counts, ap, errors = RULES[name]
    result = tide_errors(*scene(objects, detections), thresholds=[0.5])
    found = {kind: numbers[0] for kind, numbers in result.counts.items() if numbers[0]}
    assert found == counts
    assert result.ap == (pytest.approx(ap),)
    cost = {kind: values[0] for kind, values in result.errors.items() if values[0] > 1e-9}
    assert cost == pytest.approx(errors)


def random_scene(seed, ties=False):
    """Objects, crowd regions, good and bad detections; images without one, the other and both."""
    rng = np.random.default_rng(seed)
    objects, detections = [], []
    for image in range(1, 31):
        for _ in range(rng.integers(0, 6) if image % 5 else 0):
            where = np.concatenate([rng.uniform(0, 200, 2), rng.uniform(20, 100, 2)])
            label = int(rng.integers(1, 5))
            objects.append((image, label, where.tolist(), bool(rng.random() < 0.15)))
            for _ in range(rng.integers(0, 4) if image % 7 else 0):
                moved = np.abs(where + rng.normal(0, rng.choice([1, 6, 25]), 4)) + 1
                seen = label if rng.random() < 0.7 else int(rng.integers(1, 5))
                detections.append((image, seen, moved.tolist(), rng.random()))
        for _ in range(rng.integers(0, 3) if image % 7 else 0):
            where = np.concatenate([rng.uniform(0, 200, 2), rng.uniform(20, 100, 2)])
            detections.append((image, int(rng.integers(1, 5)), where.tolist(), rng.random() * 0.6))
    if ties:
        detections = [(*d[:3], round(d[3], 1)) for d in detections]
    return scene(objects, detections, images=30, classes=4)


def coco_precision(gt, predictions, image_ids=None):
    """COCOeval's AP (percent) at each of the ten thresholds."""
    gt = copy.deepcopy(gt)
    for annotation in gt["annotations"]:
        annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3]
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = gt
        api.createIndex()
        coco = COCOeval(api, api.loadRes(copy.deepcopy(predictions)), "bbox")
        coco.params.imgIds = image_ids or coco.params.imgIds
        coco.evaluate()
        coco.accumulate()
    precision = coco.eval["precision"][:, :, :, 0, 2]  # all areas, 100 detections
    assert (precision >= 0).all()  # every class occurs
    return 100 * precision.mean(axis=(1, 2))


@pytest.mark.parametrize("seed", range(4))
def test_ap_is_that_of_pycocotools(seed):
    gt, predictions = random_scene(seed)
    result = tide_errors(gt, predictions)
    assert result.ap == pytest.approx(coco_precision(gt, predictions), abs=1e-9)
    assert min(sum(numbers) for numbers in result.counts.values()) > 5  # all types occur
    some = list(range(3, 25))
    result = tide_errors(gt, predictions, image_ids=some)
    assert result.ap == pytest.approx(coco_precision(gt, predictions, some), abs=1e-9)


@pytest.mark.parametrize(
    "name", [name for name in RULES if "crowd" in name and "another" not in name]
)
def test_crowd_regions_are_those_of_pycocotools(name):
    # exactly half inside counts as inside at IoU 0.5
    gt, predictions = scene(*RULES[name][:2], classes=1)
    assert tide_errors(gt, predictions).ap == pytest.approx(coco_precision(gt, predictions))


def test_every_detection_is_a_true_positive_or_one_type_of_error():
    gt, predictions = random_scene(5)
    result = tide_errors(gt, predictions)
    objects = sum(not a["iscrowd"] for a in gt["annotations"])
    detected = [sum(result.counts[k][i] for k in ERROR_TYPES if k != "Miss") for i in range(10)]
    right = [len(predictions) - n for n in detected]
    assert all(0 <= r <= objects - m for r, m in zip(right, result.counts["Miss"]))
    assert right[0] > 10 and right == sorted(right, reverse=True)
    assert all(0 <= value <= 100 for values in result.errors.values() for value in values)


@pytest.mark.parametrize("ties", [False, True])
def test_no_order_matters(ties):
    gt, predictions = random_scene(6, ties)
    expected = tide_errors(gt, predictions)
    rng = np.random.default_rng(0)
    for _ in range(3):
        rng.shuffle(predictions)
        for entries in gt.values():
            rng.shuffle(entries)
        assert tide_errors(gt, predictions) == expected


def test_objects_of_images_without_detections_are_missed():
    gt, predictions = scene(
        [(1, A, box()), (2, A, box()), (2, A, FAR)], [(1, A, box(), 0.9)], images=3
    )
    result = tide_errors(gt, predictions, thresholds=[0.5])
    assert result.counts["Miss"] == (2,)
    # recall 1/3: 34 of the 101 points
    assert result.ap == (pytest.approx(100 * 34 / 101),)
    assert result.errors["Miss"] == (pytest.approx(100 * 67 / 101),)
    assert tide_errors(gt, predictions, image_ids=[1, 3]).ap == (100.0,) * 10


def test_nothing_to_find():
    gt, predictions = scene([], [(1, A, box(), 0.9)])
    result = tide_errors(gt, predictions, thresholds=[0.5])
    assert result.ap == (0.0,) and result.counts["Bkg"] == (1,)
    assert all(values == (0.0,) for values in result.errors.values())


def test_best_scores_of_an_image_count():
    wrong = [(1, A, FAR, 0.5 + i / 1000) for i in range(100)]
    right = [(1, B, box(), 0.4), (2, A, box(), 0.1)]
    gt, predictions = scene([(1, B, box()), (2, A, box())], wrong + right, images=2)
    result = tide_errors(gt, predictions, thresholds=[0.5])
    # B's detection is the 101st of its image; A's is its image's first
    assert result.counts["Bkg"] == (100,) and result.counts["Miss"] == (1,)
    assert result.ap == (pytest.approx(100 / 101 / 2),)
    more = tide_errors(gt, predictions, thresholds=[0.5], max_per_image=101)
    assert more.counts["Miss"] == (0,)


def test_result_as_metrics_rows_and_json():
    result = tide_errors(*toy(), thresholds=[0.5, 0.75])
    metrics = result.metrics()
    assert list(metrics)[:6] == list(ERROR_TYPES) and len(metrics) == 18
    assert metrics["Loc"] == pytest.approx((10.89 + 27.72) / 2, abs=5e-3)
    assert metrics["Loc-50"] == pytest.approx(10.89, abs=5e-3)
    assert metrics["Loc-75"] == pytest.approx(27.72, abs=5e-3)
    second = result.rows()[1]
    assert second["threshold"] == 0.75 and second["number of Loc"] == 2
    assert second["AP"] == pytest.approx(16.83, abs=5e-3) and second["Miss"] == result.errors[
        "Miss"
    ][1]  # fmt: skip
    assert json.loads(json.dumps(result.as_dict()))["counts"]["Miss"] == [2, 2]
    assert [f"Cls-{100 * t:g}" for t in COCO_THRESHOLDS] == list(
        tide_errors(*toy()).metrics()
    )[6:16]  # fmt: skip


def changed(what, index, **values):
    """The toy with an entry of a list changed; None removes a key."""
    gt, predictions = toy()
    entry = predictions[index] if what == "predictions" else gt[what][index]
    for key, value in values.items():
        entry[key] = value
        if value is None:
            del entry[key]
    return gt, predictions


@pytest.mark.parametrize(
    "inputs,message",
    [
        (changed("predictions", 2, image_id=77), r"image_id: 77 not among the 6 images"),
        (changed("predictions", 2, image_id="2"), r"image_id: '2' not among"),
        (changed("predictions", 2, category_id=9), r"category_id: 9 not among the 2 categories"),
        (changed("predictions", 2, score=None), r"prediction .* has no 'score'"),
        (changed("predictions", 2, score=float("nan")), r"score nan instead of a finite number"),
        (changed("predictions", 2, bbox=[1, 2, 3]), r"bbox \[1, 2, 3\] instead of four finite"),
        (changed("predictions", 2, bbox=[1, 2, 3, "x"]), r"instead of four finite"),
        (changed("predictions", 2, bbox=None), r"prediction .* has no 'bbox'"),
        (changed("annotations", 2, category_id=9), r"annotations .*: 9 not among"),
        (changed("annotations", 2, id=None), r"annotation .* has no 'id'"),
        ((toy()[0], []), "there are no predictions"),
        (({"images": [], "annotations": []}, toy()[1]), "no list 'categories'"),
        (([], toy()[1]), "no list 'images'"),
    ],
)
def test_wrong_input_is_named(inputs, message):
    with pytest.raises(ValueError, match=message):
        tide_errors(*inputs)


def test_unknown_image_ids_are_refused():
    with pytest.raises(ValueError, match="image_ids: 7, 8, 9 and 2 more not among the 6 images"):
        tide_errors(*toy(), image_ids=[1, 7, 8, 9, 10, 11])


@pytest.mark.parametrize("thresholds", [[], [0.1], [1.0], [0.5, 0.5], [0.7, 0.6]])
def test_wrong_thresholds_are_refused(thresholds):
    with pytest.raises(ValueError, match="thresholds must be ascending IoUs between 0.1 and 1"):
        tide_errors(*toy(), thresholds=thresholds)


def test_progress_sees_the_images_with_detections():
    seen = []

    def progress(images):
        seen.extend(images)
        return images

    gt, predictions = toy()
    tide_errors(gt, [p for p in predictions if p["image_id"] != 4], progress=progress)
    assert seen == [0, 1, 2, 4, 5]


def test_pycocotools_object_is_ground_truth_too():
    gt, predictions = toy()
    with contextlib.redirect_stdout(io.StringIO()):
        api = COCO()
        api.dataset = gt
        api.createIndex()
    assert tide_errors(api, predictions) == tide_errors(gt, predictions)
