"""The table of evidence: its statistics, its list, and what is checked in."""

import json
import math
import sys
from pathlib import Path

import evidence
import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def run(method, seed, ap, **more):
    facts = {"iterations": 10, "resumed": False, "versions": {"torch": "2"}}
    return {"method": method, "seed": seed, "metrics": {"AP": ap}, **facts, **more}


ENTRY = {
    "system": "S",
    "pair": "a, b",
    "data": "d",
    "configs": "configs/comparison/bccd",
    "alone": "plain",
    "methods": {"x": "X", "absent": "Absent"},
}
# differences 3, 1, 8: mean 4, variance (1 + 9 + 16) / 2 = 13
RUNS = [
    *(run("plain", seed, ap) for seed, ap in ((1, 10.0), (2, 20.0), (3, 30.0), (4, 0.0))),
    run("x", 2, 21.0, seconds=30.0),
    run("x", 1, 13.0, seconds=50.0),
    run("x", 3, 38.0, seconds=1.0, resumed=True),
]


def test_interval_is_students():
    """The 97.5 % quantile of t with two degrees of freedom is 4.30265 (any printed table)."""
    low, high = evidence.interval([3.0, 1.0, 8.0])
    half = 4.30265 * math.sqrt(13 / 3)
    assert (low, high) == pytest.approx((4 - half, 4 + half), rel=1e-5)
    assert all(math.isnan(v) for v in evidence.interval([1.0]))


def test_rows_are_paired_by_seed():
    (row,) = evidence.compared(ENTRY, {"runs": RUNS, "hardware": "h"})
    assert row["seeds"] == [1, 2, 3] and row["method"] == "X"
    # the student alone of seed 4 has no partner and does not count
    assert row["alone"] == pytest.approx((20, 10)) and row["distilled"][0] == pytest.approx(24)
    assert row["difference"] == pytest.approx(4) and row["better"] == 3
    assert row["seconds"] == 40  # the resumed run was not timed as a whole
    text = evidence.page([row], ["PKD"], "--stored")
    assert "python benchmarks/evidence.py --stored" in text
    assert "| 20.00 ± 10.00 |" in text and "+4.00" in text and "3 of 3" in text
    assert "* PKD: GFL R-101 -> R-50: 40.2 -> 43.3" in text.split("## Published")[1]
    json.dumps(row)


def test_a_detector_that_found_nothing_has_no_ap():
    runs = [{**run, "metrics": {}} if run["method"] == "x" else run for run in RUNS]
    (row,) = evidence.compared(ENTRY, {"runs": runs, "hardware": "h"})
    assert math.isnan(row["difference"]) and row["alone"] == pytest.approx((20, 10))
    assert "+nan" in evidence.page([row], ["PKD"], "") and row["better"] == 0
    assert evidence.without_nan(row)["difference"] is None


def test_mistakes_in_the_list_are_named(tmp_path):
    broken = tmp_path / "list.yaml"
    entry = {key: value for key, value in ENTRY.items() if key != "alone"}
    broken.write_text(yaml.safe_dump({"comparisons": [{**entry, "colour": "red"}]}))
    with pytest.raises(ValueError, match=r"comparison 1 lacks \['alone'\] .* \['colour'\]"):
        evidence.read_list(broken)
    with pytest.raises(ValueError, match="no stored results of configs/comparison/bccd"):
        evidence.stored(ENTRY)
    with pytest.raises(ValueError, match="'NoMethod', which is no method"):
        evidence.published_figures(["NoMethod"])


def test_the_list_names_what_exists():
    published, comparisons = evidence.read_list(evidence.LIST)
    assert evidence.published_figures(published)
    for entry in comparisons:
        for name in (entry["alone"], *entry["methods"]):
            assert (ROOT / entry["configs"] / f"{name}.yaml").is_file()
        runs = evidence.stored(entry)["runs"]
        assert {run["method"] for run in runs} >= {entry["alone"], *entry["methods"]}
        for command in entry.get("before", []):
            assert (ROOT / command["run"].split()[0]).is_file()


def test_training_starts_what_the_comparison_needs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = []

    def answer(command):
        commands.append(command)
        if command[0] == "benchmarks/compare.py":
            output = Path(command[command.index("--output") + 1])
            output.mkdir(parents=True)
            (output / "results.json").write_text('{"runs": []}')

    monkeypatch.setattr(evidence, "_run", answer)
    (tmp_path / "there.pth").touch()
    before = [{"makes": "there.pth", "run": "a.py"}, {"makes": "missing.pth", "run": "b.py --x 1"}]
    monkeypatch.setattr(sys, "argv", ["evidence.py", "--seeds", "4", "5"])
    result = evidence.measured({**ENTRY, "before": before}, evidence.parse_args())
    assert result == {"runs": []}
    first, second = commands
    assert first == ["b.py", "--x", "1"]
    text = " ".join(second)
    assert "--configs configs/comparison/bccd --output output/comparison/bccd" in text
    assert "--methods plain x absent --seeds 4 5 --threads 1" in text


def test_the_checked_in_table_is_that_of_the_stored_results():
    _, comparisons = evidence.read_list(evidence.LIST)
    rows = [
        row for entry in comparisons for row in evidence.compared(entry, evidence.stored(entry))
    ]
    checked_in = (ROOT / "docs/results/evidence.json").read_text()
    assert "NaN" not in checked_in
    assert json.loads(checked_in) == evidence.without_nan(rows)
    text = (ROOT / "docs/results/evidence.md").read_text()
    for row in rows:
        assert f"{row['difference']:+.2f}" in text
