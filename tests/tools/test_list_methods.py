"""The list of methods: complete, taken from the code, and told apart from a user's own."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from kd_d2.config import get_cfg
from kd_d2.distillation import DISTILLER_REGISTRY
from kd_d2.engine.catalogue import list_blocks, list_methods
from kd_d2.engine.main import import_components
from tests.engine.support import USER_MODULE, isolated_registries

ROOT = Path(__file__).resolve().parents[2]

import_components()


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("list_methods", ROOT / "tools/list_methods.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(script, capsys, *arguments, code=0):
    assert script.main([str(a) for a in arguments]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def shipped():
    """Methods of the library and its projects; other tests register some of their own."""
    return {
        name: cls
        for name, cls in DISTILLER_REGISTRY
        if cls.__module__.startswith(("kd_d2.baselines.", "kd_d2.projects."))
    }


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_method_says_what_it_is(name):
    info = shipped()[name].info
    assert info is not None, f"{name} has no `info`"
    assert info.title and info.paper and info.compares
    assert isinstance(info.requires, tuple) and isinstance(info.gains, tuple)
    assert all(re.search(r"\d", gain) for gain in info.gains), "a gain without a number"


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_key_has_a_default_and_most_a_meaning(name):
    (method,) = [m for m in list_methods() if m.name == name]
    assert method.summary and method.keys
    cfg = get_cfg()
    for key in method.keys:
        node = cfg
        for part in key.name.split("."):
            node = node[part]
        assert key.default == node and key.name.startswith(method.node + ".")
    # two keys in a row may share a comment
    assert sum(not key.comment for key in method.keys) <= len(method.keys) / 3


def test_readme_names_every_method():
    text = (ROOT / "README.md").read_text()
    section = text.split("\n## Methods\n")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")]
    named = {re.sub(r"[\[`]([^\]`]+)[\]`].*", r"\1", row.split("|")[1].strip()) for row in rows}
    assert set(shipped()) <= named, sorted(set(shipped()) - named)
    for name, cls in shipped().items():
        (row,) = [r for r in rows if re.match(rf"\| [\[`]{re.escape(name)}[\]`]", r)]
        assert f"`KD.{cls.node_name()}`" in row, name


def test_blocks_are_all_listed():
    from kd_d2.blocks import registry

    listed = {(block.registry, block.name) for block in list_blocks()}
    names = [n for n in registry.__all__ if n.startswith("KD_")]
    assert listed == {(n, block) for n in names for block, _ in getattr(registry, n)}
    for block in list_blocks():
        assert block.summary, f"{block.name} has no docstring"
        assert block.signature.startswith(block.name + "(")
    (conv,) = [b for b in list_blocks() if b.name == "ConvAdapter"]
    assert conv.signature.startswith("ConvAdapter(kernel_size=1, relu=False, std=None")


def test_table_has_a_row_for_every_method(script, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")
    text = run(script, capsys)
    firsts = {line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")}
    assert set(shipped()) <= firsts
    assert max(map(len, text.splitlines())) <= 160
    row = re.search(r"^\| CrossKD .*?^\+-", text, re.M | re.S).group()
    cells = [[part.strip() for part in line.split("|")[1:-1]] for line in row.splitlines()[:-1]]
    columns = [" ".join(filter(None, column)) for column in zip(*cells)]
    assert "GFL R-101 -> R-50: 40.2 -> 43.7" in columns[3]
    assert columns[5].startswith("KD.CROSSKD: PRESET, MODES,")


def test_one_method_in_detail(script, capsys):
    text = run(script, capsys, "--method", "pkd")
    assert "KD.PKD.WEIGHT = 6.0  (float)\n    Weight of the summed loss" in text
    assert "KD.PKD.SCHEDULE.START_ITER = 0  (int)\n    First iteration (0-based)" in text
    assert "equal channels" in text and "NeurIPS 2022" in text and "40.2 -> 43.3" in text
    assert run(script, capsys, "--method", "PKD", "--markdown").count("| `KD.PKD.") >= 8


def test_json_is_the_catalogue(script, capsys):
    methods = {m["name"]: m for m in json.loads(run(script, capsys, "--json"))}
    assert set(shipped()) <= set(methods)
    keys = {k["name"]: k for k in methods["CrossKD"]["keys"]}
    assert keys["KD.CROSSKD.BRANCHES"]["default"] == ["cls", "reg"]
    assert keys["KD.CROSSKD.BRANCHES"]["type"] == "tuple"
    assert "Table 3" in keys["KD.CROSSKD.BRANCHES"]["comment"]
    assert methods["PKD"]["info"]["requires"] == ["equal channels"]
    blocks = json.loads(run(script, capsys, "--blocks", "--json"))
    assert {"registry", "name", "signature", "summary"} == set(blocks[0])


def test_markdown_tables_are_well_formed(script, capsys):
    for arguments in (["--markdown"], ["--blocks", "--markdown"]):
        lines = run(script, capsys, *arguments).splitlines()
        columns = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
        assert len(columns) == 1 and columns.pop() >= 4
        assert set(lines[1]) <= set("|-: ")


def test_a_users_module_is_listed_too(script, capsys):
    with isolated_registries():
        text = run(script, capsys, "--imports", USER_MODULE, "--method", "Queue")
    assert "Pulls the adapted mean feature" in text and "KD.QUEUE.WEIGHT = 1.0" in text


def test_unknown_names_are_one_sentence(script, capsys):
    text = run(script, capsys, "--method", "pdk", code=1)
    assert text.startswith("error: no method 'pdk' is registered; known: ")
    assert re.search("similar: .*pkd", text) and len(text.splitlines()) == 1
    text = run(script, capsys, "--imports", "nowhere.py", code=1)
    assert "nowhere.py" in text and len(text.splitlines()) == 1
