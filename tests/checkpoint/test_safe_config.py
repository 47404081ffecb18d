import pytest
from detectron2.config import CfgNode, get_cfg

from kd_d2.checkpoint.safe_config import (
    load_yaml_config,
    merge_opts,
    read_config_file,
    unsafe_load_requested,
)

_EVAL = 'SIZES: !!python/object/apply:eval ["[32, 64]"]'


def _write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


class TestRead:
    def test_chain_of_bases(self, tmp_path):
        _write(tmp_path, "base.yaml", "A: {X: 1, Y: 1}\nB: [1, 2]\n")
        _write(tmp_path, "sub/middle.yaml", "_BASE_: ../base.yaml\nA: {Y: 2, Z: 2}\n")
        path = _write(tmp_path, "sub/top.yaml", "_BASE_: middle.yaml\nA: {Z: 3}\nB: [3]\n")
        assert read_config_file(path) == {"A": {"X": 1, "Y": 2, "Z": 3}, "B": [3]}

    def test_list_of_bases_absolute_and_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        first = _write(tmp_path, "x/first.yaml", "A: {X: 1, Y: 1}\n")
        _write(tmp_path, "second.yaml", "A: {Y: 2}\n")
        path = _write(tmp_path, "z/top.yaml", f"_BASE_: ['{first}', '~/second.yaml']\nC: 1\n")
        assert read_config_file(path) == {"A": {"X": 1, "Y": 2}, "C": 1}

    def test_same_as_detectron2(self, tmp_path):
        _write(tmp_path, "a.yaml", "MODEL: {MASK_ON: True, RPN: {NMS_THRESH: 0.6}}\n")
        _write(tmp_path, "b.yaml", "MODEL: {RPN: {NMS_THRESH: 0.8}}\n")
        path = _write(tmp_path, "c.yaml", "_BASE_: [a.yaml, b.yaml]\nVERSION: 2\nSEED: 3\n")
        assert read_config_file(path) == CfgNode.load_yaml_with_base(path)

    def test_empty_file(self, tmp_path):
        assert read_config_file(_write(tmp_path, "a.yaml", "# nothing but a comment\n")) == {}

    @pytest.mark.parametrize(
        "text, named",
        [
            ("A: [1, 2", "not valid YAML"),
            ("A: 1\n\tB: 2", "not valid YAML"),
            ("- 1\n- 2", "a list instead of"),
            ("_BASE_: {A: 1}", "_BASE_ must be a path"),
            ("_BASE_: a.yaml", "includes itself"),
            (_EVAL, "!!python/object/apply:eval in line 1"),
            ("A: !!python/name:os.system", "!!python/name:os.system"),
            ("A: !unknown 3", "!unknown"),
        ],
    )
    def test_errors_name_the_file(self, tmp_path, text, named):
        path = _write(tmp_path, "a.yaml", text)
        with pytest.raises(ValueError) as caught:
            read_config_file(path)
        assert path in str(caught.value) and named in str(caught.value)

    def test_node_over_value(self, tmp_path):
        _write(tmp_path, "base.yaml", "A: {B: 1}\n")
        path = _write(tmp_path, "a.yaml", "_BASE_: base.yaml\nA: {B: {C: 1}}\n")
        with pytest.raises(ValueError, match="A.B is a node"):
            read_config_file(path)

    def test_missing_base_names_both_files(self, tmp_path):
        path = _write(tmp_path, "a.yaml", "_BASE_: nowhere.yaml\n")
        with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml.*_BASE_ in .*a\.yaml"):
            read_config_file(path)

    def test_python_tag_in_a_base(self, tmp_path):
        _write(tmp_path, "base.yaml", _EVAL)
        path = _write(tmp_path, "a.yaml", "_BASE_: base.yaml\n")
        with pytest.raises(ValueError, match=r"base\.yaml.*KD\.ALLOW_UNSAFE_LOAD True"):
            read_config_file(path)
        assert read_config_file(path, allow_unsafe=True) == {"SIZES": [32, 64]}


class TestLoad:
    def test_same_as_detectron2(self, tmp_path):
        path = _write(
            tmp_path, "a.yaml", "VERSION: 2\nMODEL: {MASK_ON: True}\nSOLVER: {STEPS: [3]}\n"
        )
        ours, theirs = get_cfg(), get_cfg()
        load_yaml_config(ours, path)
        theirs.merge_from_file(path)
        assert ours == theirs and ours.MODEL.MASK_ON and ours.SOLVER.STEPS == (3,)

    def test_old_version_is_upgraded(self, tmp_path):
        text = "MODEL:\n  WEIGHT: w.pkl\n  ROI_HEADS: {SCORE_THRESH: 0.3}\n"
        path = _write(tmp_path, "old.yaml", "VERSION: 1\n" + text)
        ours, theirs = get_cfg(), get_cfg()
        load_yaml_config(ours, path)
        theirs.merge_from_file(path)
        assert ours == theirs and ours.MODEL.WEIGHTS == "w.pkl" and ours.VERSION == 2

    def test_future_version(self, tmp_path):
        with pytest.raises(ValueError, match="VERSION 9"):
            load_yaml_config(get_cfg(), _write(tmp_path, "a.yaml", "VERSION: 9\n"))

    def test_unknown_keys_are_all_listed_with_close_ones(self, tmp_path):
        text = "VERSION: 2\nMODEL: {RETINANET: {NUM_CLASES: 3}, MASK_ON: True}\n"
        text += "SOLVER: {base_lr: 0.1}\n"
        path, cfg = _write(tmp_path, "a.yaml", text), get_cfg()
        with pytest.raises(ValueError) as caught:
            load_yaml_config(cfg, path)
        message = str(caught.value)
        assert path in message
        assert "MODEL.RETINANET.NUM_CLASES (did you mean MODEL.RETINANET.NUM_CLASSES" in message
        assert "SOLVER.base_lr (did you mean SOLVER.BASE_LR" in message
        assert cfg == get_cfg()  # nothing was merged

    def test_wrong_type_names_file_key_and_types(self, tmp_path):
        path, cfg = (
            _write(tmp_path, "a.yaml", "VERSION: 2\nSEED: 1\nSOLVER: {BASE_LR: 1}\n"),
            get_cfg(),
        )
        with pytest.raises(ValueError, match=r"SOLVER\.BASE_LR .*float.* int .*1\.0") as caught:
            load_yaml_config(cfg, path)
        assert path in str(caught.value) and cfg == get_cfg()

    def test_node_where_a_value_belongs_and_the_reverse(self, tmp_path):
        for text, key in (("SOLVER: 3", "SOLVER"), ("SOLVER: {BASE_LR: {A: 1}}", "SOLVER.BASE_LR")):
            with pytest.raises(ValueError, match=key):
                load_yaml_config(get_cfg(), _write(tmp_path, "a.yaml", f"VERSION: 2\n{text}\n"))

    def test_new_keys_where_the_node_allows_them(self, tmp_path):
        cfg = get_cfg()
        cfg.FREE = CfgNode(new_allowed=True)
        load_yaml_config(cfg, _write(tmp_path, "a.yaml", "VERSION: 2\nFREE: {A: {B: 1}}\n"))
        assert cfg.FREE.A.B == 1


class TestOpts:
    def test_same_as_detectron2(self):
        opts = ["SOLVER.BASE_LR", "0.5", "SOLVER.STEPS", "(3, 4)", "MODEL.WEIGHTS", "a/b.pth"]
        ours, theirs = get_cfg(), get_cfg()
        merge_opts(ours, opts)
        theirs.merge_from_list(opts)
        assert ours == theirs
        merge_opts(ours, None)
        merge_opts(ours, ())
        assert ours == theirs

    @pytest.mark.parametrize(
        "opts, named",
        [
            (["SEED", "3", "SOLVER.BASE_LR"], "'SOLVER.BASE_LR' at their end has no value"),
            (["SOLVER.BASE_LR=0.1"], "KEY VALUE"),
            (["SOLVER.BASE_LR=0.1", "SEED"], "KEY VALUE"),
            (["SEED", "3", "SOLVR.BASE_LR", "0.1"], "did you mean SOLVER.BASE_LR"),
            (["MODEL.WEIGHTS.A", "0.1"], "MODEL.WEIGHTS.A"),
            (["SEED", "3", "SOLVER.BASE_LR", "fast"], "SOLVER.BASE_LR must be of type float"),
            (["SOLVER.BASE_LR", "1"], "write 1.0"),
            (["MODEL.WEIGHTS", "3"], "in quotes"),
            (["MODEL", "3"], "MODEL must be of type node"),
            (["_BASE_", "a.yaml"], "_BASE_"),
        ],
    )
    def test_errors(self, opts, named):
        cfg = get_cfg()
        with pytest.raises(ValueError) as caught:
            merge_opts(cfg, opts)
        assert named in str(caught.value)
        assert cfg == get_cfg()  # nothing was merged, not even the good ones

    def test_renamed_key_keeps_its_message(self):
        cfg = get_cfg()
        cfg.register_renamed_key("SOLVER.LR", "SOLVER.BASE_LR")
        with pytest.raises(ValueError, match="renamed to SOLVER.BASE_LR"):
            merge_opts(cfg, ["SOLVER.LR", "0.1"])

    def test_unsafe_load_is_read_from_the_command_line(self):
        assert unsafe_load_requested(["SEED", "1", "KD.ALLOW_UNSAFE_LOAD", "True"])
        assert unsafe_load_requested(["KD.ALLOW_UNSAFE_LOAD", True])
        assert not unsafe_load_requested(["KD.ALLOW_UNSAFE_LOAD", "False"])
        assert not unsafe_load_requested(["KD.ALLOW_UNSAFE_LOAD"])
        assert not unsafe_load_requested(None)
