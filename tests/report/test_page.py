"""The page as text: complete, escaped, self-contained, with the numbers of the runs."""

import base64
import hashlib
import importlib
import io
import json
import re

import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from kd_d2.analysis import deployed, flop_analysis, flops_by_module, random_batch
from kd_d2.report import CostOptions, Options, collect, read_runs, write_page
from kd_d2.report.cost import Cost, Network
from kd_d2.report.matching import match
from tests.report.conftest import EVIL, TOY_CLASSES
from tests.report.strict_html import check, table_rows
from tests.report.test_run import write_run


def page_of(folders, measured=False, **options):
    """Report and page; networks are not built unless they are to be measured."""
    runs = read_runs([str(folder) for folder in folders])
    unknown = Network(None, [], "cpu", Cost({"parameters, millions": 1.0}, ""))
    with pytest.MonkeyPatch.context() as patch:
        if not measured:
            # "kd_d2.report.collect" is also the name of a function
            module = importlib.import_module("kd_d2.report.collect")
            patch.setattr(module, "network_of", lambda run, options: unknown)
        report = collect(runs, Options(**options))
    return report, write_page(report, "A <title>", "made & sent")


@pytest.fixture(scope="module")
def two(trained):
    """(report, page, tree) of the two trained runs."""
    report, page = page_of(trained, measured=True, baseline=0, images=3, threshold=0.1)
    return report, page, check(page)


def table_after(tree, section, number=0):
    return tree.by_id(section).all("table")[number]


def test_nothing_is_missing(two):
    report, _, tree = two
    assert [run.missing for run in report.runs] == [[], []]
    assert "Nothing." in tree.by_id("missing").text
    headings = [h.text for h in tree.all("h2")]
    assert len(headings) == 8 and [a.text for a in tree.all("nav")[0].all("a")] == headings
    assert tree.all("h1")[0].text == "A <title>" and "made & sent" in tree.text


def test_names_are_escaped(two):
    _, page, tree = two
    assert EVIL not in page and "<i>" not in page and not tree.all("i")
    assert f"class {EVIL}" in table_rows(table_after(tree, "scores"))
    assert "pkd <i>" in tree.all("thead")[0].text


def test_the_script_is_the_one_that_the_policy_allows(two):
    _, _, tree = two
    (script,) = tree.all("script")
    assert "</" not in script.text
    (policy,) = [m.attributes["content"] for m in tree.all("meta") if "http-equiv" in m.attributes]
    digest = base64.b64encode(hashlib.sha256(script.text.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; ") and f"'sha256-{digest}'" in policy


def test_ap_is_that_of_the_logs(two, trained):
    _, _, tree = two
    rows = table_rows(table_after(tree, "scores"))
    logs = []
    for folder in trained:
        lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        logs.append([line for line in lines if "bbox/AP" in line][-1])
    assert logs[0]["iteration"] == 20
    labels = {
        "bbox/AP": "AP, mean over IoU 0.50 to 0.95", "bbox/AP50": "AP50, IoU 0.50",
        "bbox/APs": "APs, objects below 32² pixels", "bbox/APm": "APm, from 32² to 96²",
        "bbox/APl": "APl, above 96²", "bbox/AP-plain": "class plain",
    }  # fmt: skip
    marked = 0
    for scalar, label in labels.items():
        values = [log[scalar] for log in logs]
        cells = rows[label]
        if values[0] != values[0]:  # NaN
            assert [cell.text for cell in cells] == ["–", "–"]
            continue
        assert cells[0].text == f"{values[0]:.2f}"
        change = round(values[1] - values[0], 2)
        shown = f"{change:+.2f}" if change else "±0.00"
        assert cells[1].text == f"{values[1]:.2f} {shown}"
        best = [bool(cell.all("strong")) for cell in cells]
        assert best == [change < 0, change > 0]
        marked += sum(best)
    assert marked > 0
    assert rows["source"][0].text == "metrics.json, iteration 20"
    assert {f"class {name}" for name in TOY_CLASSES} <= set(rows)


def test_errors_are_the_logged_ones_or_computed(two, trained):
    report, _, tree = two
    rows = table_rows(table_after(tree, "errors"))
    stored = json.loads((trained[1] / "inference" / "coco_tide.json").read_text())
    mean = sum(stored["errors"]["Miss"]) / 10
    cells = rows["Miss: object that nothing found"]
    assert cells[1].text.startswith(f"{mean:.2f}")
    assert [cell.text.split("/")[0] for cell in rows["source"]] == [
        "computed here from inference",
        "inference",
    ]
    # what is computed for the run that logged them is what it logged
    from kd_d2.report.errors import computed_errors

    (data,) = report.test_data[1].values()
    computed = computed_errors(report.runs[1], data)
    assert computed.mean == pytest.approx(report.errors[1].mean)
    assert computed.at_half == pytest.approx(report.errors[1].at_half)


def test_config_differences(two):
    _, _, tree = two
    section = tree.by_id("configs")
    rows = {row.all("th")[0].text: row for row in section.all("tr") if row.all("td")}
    assert [c.text for c in rows["DISTILLERS"].all("td")] == ["[]", "['PKD']"]
    assert [c.text for c in rows["ENABLED"].all("td")] == ["False", "True"]
    changed = [(c.attributes["class"] or "") for c in rows["ENABLED"].all("td")]
    assert changed == ["wrap", "changed wrap"]
    assert "MAX_ITER" not in rows and "OUTPUT_DIR" not in rows


def test_every_loss_has_a_curve(two, trained):
    report, _, tree = two
    charts = {
        card.all("figcaption")[0].text.split(" (")[0]: card
        for card in tree.by_id("curves").all("figure")
    }
    logged = {name for run in report.runs for name in run.series}
    wanted = {n for n in logged if n.startswith(("loss", "kd_")) or n in ("lr", "bbox/AP")}
    assert {"loss_kd/pkd/feat", "kd_raw/pkd/feat", "kd_grad_ratio/pkd", "lr"} <= wanted
    assert any(n.startswith("kd_factor/") for n in wanted)
    assert wanted <= set(charts)
    (svg,) = charts["kd_raw/pkd/feat"].all("svg")
    (curve,) = json.loads(svg.attributes["data-curves"])
    values = dict(report.runs[1].series["kd_raw/pkd/feat"])
    assert curve["run"] == 1 and dict(zip(curve["x"], curve["y"])) == pytest.approx(
        values, rel=1e-4
    )
    drawn = [c.attributes["data-run"] for c in charts["bbox/AP"].all("g", "curve")]
    assert drawn == ["0", "1"]


def test_detections(two, trained):
    report, _, tree = two
    (gallery,) = report.galleries
    section = tree.by_id("detections")
    groups = section.all("div", "panels")
    assert len(groups) == 3 and all(len(g.all("figure")) == 3 for g in groups)
    stored = json.loads((trained[0] / "inference" / "coco_instances_results.json").read_text())
    records = {r["image_id"]: r for r in DatasetCatalog.get(report.runs[0].test_sets[0])}
    # evenly spaced: 3 of 6
    assert [p.record["image_id"] for p in gallery.pictures] == [2, 4, 6]
    boxes = 0
    for picture, group in zip(gallery.pictures, groups):
        truth, plain, _ = group.all("figure")
        image_id = picture.record["image_id"]
        assert len(truth.all("g", "truth")) == len(records[image_id]["annotations"]) == 2
        mine = [p for p in stored if p["image_id"] == image_id and round(p["score"], 4) >= 0.05]
        mine = sorted(mine, key=lambda p: -p["score"])[:60]
        shown = [g for g in plain.all("g", "box") if "data-score" in g.attributes]
        assert len(shown) == len(mine)
        expected = sorted(round(p["bbox"][0], 1) for p in mine)
        found = sorted(float(g.all("rect")[0].attributes["x"]) for g in shown)
        assert found == pytest.approx(expected, abs=0.06)
        hidden = [g for g in shown if "off" in g.attributes["class"].split()]
        assert len(hidden) == sum(round(p["score"], 4) < 0.1 for p in mine)
        judged = match(gallery.columns[0][1][gallery.pictures.index(picture)], picture.truth)
        assert len(plain.all("g", "right")) == judged.right.count("right")
        boxes += len(shown)
    assert boxes > 0
    image = section.all("image")[0].attributes["href"]
    with Image.open(io.BytesIO(base64.b64decode(image.split(",")[1]))) as picture:
        assert picture.format == "JPEG" and picture.size == (128, 128)
    uses = [use.attributes["href"] for use in section.all("use")]
    assert uses == [f"#image-0-{i}" for i in range(3) for _ in range(3)]


def test_cost(two, trained):
    report, _, tree = two
    rows = table_rows(table_after(tree, "cost"))
    stored = json.loads((trained[0] / "result.json").read_text())
    assert rows["parameters, millions"][0].text == f"{stored['parameters'] / 1e6:.2f}"
    # counted again, by module: all of a convolutional network is in its parts
    model = deployed(report.runs[0].cfg)
    by_module = flops_by_module(flop_analysis(model, random_batch(1, 128, 128, 1)))
    total = sum(by_module[name] for name, _ in model.named_children()) / 1e9
    assert rows["multiply-adds, 10⁹"][0].text == f"{total:.2f}"
    assert rows["how"][0].text == "one image of 128×128 pixels"
    assert not any(label.startswith("latency") for label in rows)


def test_latency(trained):
    (run,) = read_runs([str(trained[0])])
    options = Options(images=0, cost=CostOptions((64, 96), latency=True))
    (cost,) = collect([run], options).costs
    p50, p90, p99 = (cost.figures[f"latency, ms, p{p}"] for p in (50, 90, 99))
    assert 0 < p50 <= p90 <= p99 and "64×96 pixels; 20 passes on" in cost.note


def test_without_a_script_everything_can_be_read(two):
    """What needs the script is hidden until it runs; nothing else is."""
    _, _, tree = two
    hidden = [e for e in tree.everything() if "hidden" in e.attributes]
    assert {(e.name, e.attributes.get("class")) for e in hidden} == {
        ("input", None),
        ("span", "control"),
    }
    assert not tree.all("noscript") and not tree.all("template")
    for card in tree.by_id("curves").all("figure"):
        assert card.all("path") and card.all("svg")[0].all("text")


def test_a_checkpoint_stands_in_for_predictions(trained, tmp_path):
    """The same detections as the stored ones, which the last evaluation made with its weights."""
    copy = tmp_path / "plain"
    copy.mkdir()
    for name in ("config.yaml", "metrics.json", "model_final.pth"):
        (copy / name).symlink_to(trained[0] / name)
    report, page = page_of([trained[0], copy], images=2)
    (gallery,) = report.galleries
    (_, stored), (_, detected) = gallery.columns
    assert sum(map(len, stored)) > 0
    for first, second in zip(stored, detected):
        assert [b.label for b in first] == [b.label for b in second]
        for a, b in zip(first, second):
            assert a.xyxy == pytest.approx(b.xyxy, abs=1e-2) and abs(a.score - b.score) < 2e-4
    # no predictions, so no types of errors
    tree = check(page)
    rows = [[c.text for c in r.all("th") + r.all("td")] for r in tree.by_id("missing").all("tr")]
    (line,) = [row for row in rows if row[1] == "errors"]
    assert "there are no stored predictions" in line[2]


def test_only_predictions(trained, tmp_path):
    """An evaluation without training: AP from predictions."""
    copy = tmp_path / "evaluated"
    copy.mkdir()
    for name in ("config.yaml", "inference"):
        (copy / name).symlink_to(trained[0] / name)
    report, page = page_of([trained[0], copy], images=0)
    tree = check(page)
    cells = table_rows(table_after(tree, "scores"))["AP, mean over IoU 0.50 to 0.95"]
    assert cells[0].text == cells[1].text and not cells[0].all("strong")
    assert report.evaluations[1][0].source.startswith("computed here from")
    assert [line.part for line in report.runs[1].missing] == ["curves"]
    assert "no images were asked for" in tree.by_id("detections").text


def test_nothing_but_a_log(tmp_path):
    folder = write_run(tmp_path / "r", config=None, metrics=[{"iteration": 9, "loss_a": 1.0}])
    report, page = page_of([folder], measured=True)
    tree = check(page)
    assert len(tree.by_id("curves").all("figure")) == 2
    parts = {line.part for line in report.runs[0].missing}
    assert parts >= {"config", "scores", "errors", "cost", "detections"}
    for part in ("scores", "configs", "errors", "cost", "detections"):
        assert "No run has any." in tree.by_id(part).text, part
    assert "there is no config.yaml" in tree.by_id("configs").text


def test_a_config_of_another_program(tmp_path):
    folder = write_run(tmp_path / "r", "A: {B: '<b>'}\n", [{"iteration": 9, "loss_a": 1.0}])
    report, page = page_of([folder], measured=True, images=1)
    assert "do not exist: A" in " ".join(line.reason for line in report.runs[0].missing)
    assert "'<b>'" in check(page).by_id("configs").text


def test_one_run_is_compared_with_the_defaults(trained):
    _, page = page_of(trained[:1], images=0)
    section = check(page).by_id("configs")
    rows = {row.all("th")[0].text: row for row in section.all("tr") if row.all("td")}
    assert [c.text for c in rows["MAX_ITER"].all("td")] == ["40000", "20"]
    assert "BASE_LR" in rows and "GAMMA" not in rows


def test_ten_runs(tmp_path):
    folders = [
        write_run(
            tmp_path / f"run{i}",
            f"SEED: {i}\nDATASETS:\n  TEST: ['d']\n",
            [{"iteration": 9, "loss_a": i + 1.0, "bbox/AP": 10.0 + i % 4}],
        )
        for i in range(10)
    ]
    _, page = page_of(folders, baseline=2)
    tree = check(page)
    cells = table_rows(table_after(tree, "scores"))["AP, mean over IoU 0.50 to 0.95"]
    assert [c.text for c in cells][:4] == ["10.00 -2.00", "11.00 -1.00", "12.00", "13.00 +1.00"]
    assert [i for i, c in enumerate(cells) if c.all("strong")] == [3, 7]
    assert "baseline" in table_after(tree, "scores").all("th")[3].text
    colours = {
        re.search(r"c\d", g.attributes["class"])[0] for g in tree.by_id("curves").all("g", "curve")
    }
    assert len(colours) == 10
