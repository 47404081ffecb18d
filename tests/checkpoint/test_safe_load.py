import builtins
import hashlib
import os
import pickle
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

from kd_d2.checkpoint.safe_load import file_sha256, is_intact, load_checkpoint_file


class _Program:
    """Pickles to a call of os.mkdir, which shows whether the file was run."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def _pickle(path, value, protocol=2):
    with open(path, "wb") as file:
        pickle.dump(value, file, protocol=protocol)
    return str(path)


def _same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            _same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            _same(x, y)
    elif isinstance(a, (np.ndarray, np.generic)):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_array_equal(a, b)
    else:
        assert a == b


_ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "transposed": np.arange(6, dtype=np.int64).reshape(2, 3).T,
    "big endian": np.arange(3, dtype=">i4"),
    "half": np.ones((1, 1, 1), np.float16),
    "bool": np.array([True, False]),
    "empty": np.zeros((0, 4), np.float32),
    "no dimension": np.array(3.5),
    "text": np.array(["person", "dog"]),
    "scalar": np.float64(0.25),
    "count": np.int64(7),
}


class TestPickle:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_what_zoo_files_contain(self, tmp_path, protocol):
        shared = np.ones(3, np.float32)
        value = {
            "model": OrderedDict(_ARRAYS),
            "__author__": "Detectron2 Model Zoo",
            "matching_heuristics": True,
            "list": [1, 2.5, None, (b"bytes", {"nested": shared}), shared],
            "bytes": bytearray(b"\x00\xff"),
            "names": {"a", "b"},
        }
        loaded = load_checkpoint_file(_pickle(tmp_path / "a.pkl", value, protocol))
        _same(loaded, value)
        assert loaded["list"][-1] is loaded["list"][3][1]["nested"]
        assert loaded["model"]["float"].flags.writeable

    def test_python_2_file(self, tmp_path):
        # Protocol 2 as Python 2 wrote it: the names are bytes and the data is a str.
        data = np.float32([1, -2]).tobytes()
        text = (
            b"\x80\x02}U\x07conv1_wcnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
            b"K\x00\x85U\x01b\x87R(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
            b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            b"U" + bytes([len(data)]) + data + b"tbs."
        )
        (tmp_path / "a.pkl").write_bytes(text)
        _same(load_checkpoint_file(str(tmp_path / "a.pkl")), {"conv1_w": np.float32([1, -2])})

    def test_program_is_refused_and_not_run(self, tmp_path):
        path = _pickle(tmp_path / "evil.pkl", {"model": _Program(tmp_path / "ran")})
        with pytest.raises(ValueError) as caught:
            load_checkpoint_file(path)
        message = str(caught.value)
        assert "evil.pkl" in message and "posix.mkdir" in message or "nt.mkdir" in message
        assert "KD.ALLOW_UNSAFE_LOAD True" in message
        assert not (tmp_path / "ran").exists()

    def test_program_runs_when_asked_to(self, tmp_path):
        path = _pickle(tmp_path / "a.pkl", {"model": _Program(tmp_path / "ran")})
        load_checkpoint_file(path, allow_unsafe=True)
        assert (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        "value, named",
        [
            (eval, "builtins.eval"),
            (getattr, "builtins.getattr"),
            (torch.zeros(2), "torch"),
            (np.array([{}, None], dtype=object), "numpy.dtype('O8')"),
            (np.zeros(2, dtype=[("a", "f4")]), "numpy.dtype('V4')"),
            (np.random.RandomState(0), "numpy"),
            (OrderedDict, "function or class"),
        ],
    )
    def test_everything_else_is_refused_by_name(self, tmp_path, value, named):
        with pytest.raises(ValueError) as caught:
            load_checkpoint_file(_pickle(tmp_path / "a.pkl", [value]))
        assert named in str(caught.value) and "ALLOW_UNSAFE_LOAD" in str(caught.value)

    @pytest.mark.parametrize(
        "text",
        [
            # an array of 2**40 numbers with 4 bytes of data
            b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00U\x01btR"
            b"(K\x01\x8a\x06\x00\x00\x00\x00\x00\x01\x85cnumpy\ndtype\n(U\x02f4K\x00K\x01tR\x89"
            b"U\x04abcdtb.",
            # bytes(10**12)
            b"cbuiltins\nbytes\n(L1000000000000L\ntR.",
            # changes the function that rebuilds arrays
            b"cnumpy\ndtype\n(N}U\x05_callNstb.",
            b"",
            b"no pickle at all",
        ],
    )
    def test_forged_files(self, tmp_path, text):
        (tmp_path / "a.pkl").write_bytes(text)
        with pytest.raises(ValueError, match=r"a\.pkl"):
            load_checkpoint_file(str(tmp_path / "a.pkl"))
        good = _pickle(tmp_path / "b.pkl", {"x": np.ones(2)})
        _same(load_checkpoint_file(good), {"x": np.ones(2)})

    def test_truncated_at_any_byte(self, tmp_path):
        content = pickle.dumps({"x": np.ones(3, np.float32)}, protocol=2)
        for length in range(len(content)):
            (tmp_path / "a.pkl").write_bytes(content[:length])
            with pytest.raises(ValueError, match=r"a\.pkl is truncated, damaged"):
                load_checkpoint_file(str(tmp_path / "a.pkl"))


class TestTorch:
    @pytest.mark.parametrize("ending", ["pth", "pt", "pyth"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_round_trip(self, tmp_path, ending, zipped):
        path = str(tmp_path / f"a.{ending}")
        value = {"model": {"w": torch.arange(3)}, "iteration": 4}
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        loaded = load_checkpoint_file(path)
        assert loaded["iteration"] == 4 and loaded["model"]["w"].tolist() == [0, 1, 2]
        assert is_intact(path)

    @pytest.mark.parametrize("zipped", [True, False])
    def test_program_is_refused_and_not_run(self, tmp_path, zipped):
        path = str(tmp_path / "evil.pth")
        value = {"model": _Program(tmp_path / "ran")}
        torch.save(value, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(ValueError) as caught:
            load_checkpoint_file(path)
        message = str(caught.value)
        assert "evil.pth" in message and "mkdir" in message
        assert "KD.ALLOW_UNSAFE_LOAD True" in message and "weights_only" not in message
        assert not (tmp_path / "ran").exists() and is_intact(path)
        load_checkpoint_file(path, allow_unsafe=True)
        assert (tmp_path / "ran").exists()

    def test_other_instructions_are_refused_with_a_reason(self, tmp_path):
        path = str(tmp_path / "a.pth")
        torch.save({"x": 1 << 5000}, path)
        with pytest.raises(ValueError, match="beyond tensors.*ALLOW_UNSAFE_LOAD"):
            load_checkpoint_file(path)
        assert load_checkpoint_file(path, allow_unsafe=True) == {"x": 1 << 5000}

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("unsafe", [True, False])
    def test_truncated(self, tmp_path, zipped, unsafe):
        path = tmp_path / "a.pth"
        torch.save({"x": torch.ones(500)}, path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
        for length in (0, 1, 100, len(content) // 2, len(content) - 1):
            path.write_bytes(content[:length])
            assert not is_intact(str(path))
            with pytest.raises(ValueError, match=r"a\.pth is truncated, damaged") as caught:
                load_checkpoint_file(str(path), allow_unsafe=unsafe)
            assert "weights_only" not in str(caught.value)

    def test_changed_bit_in_the_weights(self, tmp_path):
        path = tmp_path / "a.pth"
        torch.save({"x": torch.ones(5000)}, path)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
        torch.load(path, weights_only=True)  # torch does not notice
        assert not is_intact(str(path))
        with pytest.raises(ValueError, match="checksums"):
            load_checkpoint_file(str(path))

    def test_text_file(self, tmp_path):
        (tmp_path / "a.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:")
        with pytest.raises(ValueError, match="truncated, damaged or not a checkpoint"):
            load_checkpoint_file(str(tmp_path / "a.pth"))

    def test_missing(self, tmp_path):
        with pytest.raises(ValueError, match=r"nowhere\.pth"):
            load_checkpoint_file(str(tmp_path / "nowhere.pth"))
        assert not is_intact(str(tmp_path / "nowhere.pth"))


class TestSafetensors:
    def test_round_trip_and_damage(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        path = str(tmp_path / "a.safetensors")
        safetensors.save_file({"w": torch.arange(3)}, path)
        assert load_checkpoint_file(path)["w"].tolist() == [0, 1, 2]
        os.truncate(path, os.path.getsize(path) - 1)
        with pytest.raises(ValueError, match="truncated"):
            load_checkpoint_file(path)

    def test_without_the_package(self, tmp_path, monkeypatch):
        (tmp_path / "a.safetensors").write_bytes(b"")
        importing = builtins.__import__

        def without(name, *args, **kwargs):
            if name.startswith("safetensors"):
                raise ImportError(name)
            return importing(name, *args, **kwargs)

        for name in [name for name in sys.modules if name.startswith("safetensors")]:
            monkeypatch.delitem(sys.modules, name)
        monkeypatch.setattr(builtins, "__import__", without)
        with pytest.raises(ImportError, match="pip install safetensors"):
            load_checkpoint_file(str(tmp_path / "a.safetensors"))


def test_sha256(tmp_path):
    content = os.urandom(3 << 20)
    (tmp_path / "a").write_bytes(content)
    assert file_sha256(str(tmp_path / "a")) == hashlib.sha256(content).hexdigest()
