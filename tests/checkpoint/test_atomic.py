import os
import stat

import pytest
import torch

from kd_d2.checkpoint import atomic
from kd_d2.checkpoint.atomic import atomic_save, atomic_write, remove_stale


def _files(folder):
    return sorted(os.listdir(folder))


def test_writes_and_replaces(tmp_path):
    path = str(tmp_path / "a.bin")
    for content in (b"first", b"second, longer"):
        with atomic_write(path) as file:
            file.write(content)
        assert open(path, "rb").read() == content
    assert _files(tmp_path) == ["a.bin"]


def test_exception_leaves_the_old_file(tmp_path):
    path = str(tmp_path / "a.bin")
    open(path, "wb").write(b"old")
    with pytest.raises(KeyboardInterrupt):
        with atomic_write(path) as file:
            file.write(b"half of the n")
            raise KeyboardInterrupt
    assert open(path, "rb").read() == b"old"
    assert _files(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_kill_at_each_step_leaves_a_complete_file(tmp_path, monkeypatch, step):
    """What a reader sees at the moment a step begins, when nothing after it happens."""
    path, seen = str(tmp_path / "a.pth"), []
    atomic_save({"iteration": 1}, path)

    def killed(*args):
        seen.append(torch.load(path, weights_only=True))
        raise SystemExit

    monkeypatch.setattr(atomic.os, step, killed)
    with pytest.raises(SystemExit):
        atomic_save({"iteration": 2}, path)
    assert seen == [{"iteration": 1}]
    assert torch.load(path, weights_only=True) == {"iteration": 1}


def test_synced_before_renamed(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(atomic.os, "fsync", lambda fd: (order.append("fsync"), fsync(fd)))
    monkeypatch.setattr(atomic.os, "replace", lambda *a: (order.append("replace"), replace(*a)))
    with atomic_write(str(tmp_path / "a")) as file:
        file.write(b"x")
    assert order == ["fsync", "replace", "fsync"]  # the file, the rename, the directory


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o022)
    try:
        atomic_save({}, str(tmp_path / "a.pth"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(os.stat(tmp_path / "a.pth").st_mode) == 0o644


def test_symbolic_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    os.symlink(tmp_path / "disk" / "a", tmp_path / "link")
    with atomic_write(str(tmp_path / "link")) as file:
        file.write(b"x")
    assert os.path.islink(tmp_path / "link")
    assert (tmp_path / "disk" / "a").read_bytes() == b"x"


class _FullDisk:
    def __init__(self, file):
        self.file = file

    def write(self, data):
        raise OSError(28, "No space left on device")

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_full_disk_names_the_file_and_keeps_the_old_one(tmp_path, monkeypatch):
    path = str(tmp_path / "a.pth")
    atomic_save({"iteration": 1}, path)
    save = torch.save
    monkeypatch.setattr(atomic.torch, "save", lambda obj, file: save(obj, _FullDisk(file)))
    with pytest.raises(OSError, match=r"a\.pth .*space") as caught:
        atomic_save({"x": torch.zeros(100)}, path)
    assert "free space" in str(caught.value)
    assert torch.load(path, weights_only=True) == {"iteration": 1}
    assert _files(tmp_path) == ["a.pth"]


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        atomic_save({}, str(tmp_path / "nowhere" / "a.pth"))


def test_remove_stale(tmp_path):
    generator = atomic_write(str(tmp_path / "a.pth"))
    generator.__enter__().write(b"never finished")
    (tmp_path / ".hidden").write_text("not ours")
    assert len(_files(tmp_path)) == 2
    assert len(remove_stale(str(tmp_path))) == 1
    assert _files(tmp_path) == [".hidden"]
    assert remove_stale(str(tmp_path / "nowhere")) == []
    with pytest.raises(OSError):
        generator.__exit__(None, None, None)
