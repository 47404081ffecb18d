import copy
import logging
import os
import pickle
import subprocess
import sys
import textwrap
from collections import defaultdict

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import SimpleTrainer
from detectron2.engine.hooks import LRScheduler, PeriodicCheckpointer
from detectron2.solver import LRMultiplier
from fvcore.common.param_scheduler import MultiStepParamScheduler
from torch import nn

from kd_d2.checkpoint import KDCheckpointer


class _Model(nn.Module):
    def __init__(self, width=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(3, width, 1)
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 2)
        self.register_buffer("pixel_mean", torch.tensor([100.0, 110.0, 120.0]), persistent=False)

    def forward(self, data):
        return {"loss": self.head(self.norm(self.conv(data)).mean((2, 3))).square().mean()}


class _State:
    """A checkpointable that holds whatever it is given."""

    def __init__(self, **state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def _equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def _warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def _trainer(folder, seed=0):
    class Data(torch.utils.data.IterableDataset):
        def __iter__(self):
            while True:
                yield torch.ones(2, 3, 4, 4) * torch.arange(3.0).reshape(1, 3, 1, 1)

    model = _Model(seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    trainer = SimpleTrainer(model, torch.utils.data.DataLoader(Data(), batch_size=None), optimizer)
    multiplier = MultiStepParamScheduler([1.0, 0.1], milestones=[4], num_updates=8)
    scheduler = LRMultiplier(optimizer, multiplier, max_iter=8)
    checkpointer = KDCheckpointer(model, str(folder), trainer=trainer)
    trainer.register_hooks(
        [LRScheduler(scheduler=scheduler), PeriodicCheckpointer(checkpointer, 3)]
    )
    return trainer, checkpointer


class TestRoundTrip:
    def test_trainer_with_optimizer_and_scheduler(self, tmp_path):
        """8 iterations at once equal 6 iterations, a new process' objects, and 2 more."""
        whole, _ = _trainer(tmp_path / "whole")
        whole.train(0, 8)
        first, _ = _trainer(tmp_path / "parts")
        first.train(0, 6)
        second, checkpointer = _trainer(tmp_path / "parts", seed=5)
        extra = checkpointer.resume_or_load("", resume=True)
        assert extra["iteration"] == 5 and second.iter == 5
        assert checkpointer.last_report.ok
        second.train(6, 8)
        assert _equal(whole.model, second.model)
        whole, second = whole.state_dict(), second.state_dict()
        assert str(whole) == str(second)
        assert second["hooks"]["LRScheduler"]["last_epoch"] == 8
        assert second["optimizer"]["param_groups"][0]["lr"] == pytest.approx(0.01)

    def test_plain_detectron2_reads_it_without_code(self, tmp_path):
        trainer, _ = _trainer(tmp_path)
        trainer.train(0, 3)
        model = _Model(seed=3)
        plain = DetectionCheckpointer(model, str(tmp_path))
        extra = plain.resume_or_load("", resume=True)
        assert _equal(model, trainer.model)
        assert set(extra) == {"iteration", "trainer"} and extra["iteration"] == 2
        assert sorted(os.listdir(tmp_path)) == [
            "last_checkpoint",
            "model_0000002.pth",
            "model_final.pth",
        ]

    def test_reads_what_detectron2_wrote(self, tmp_path):
        DetectionCheckpointer(_Model(), str(tmp_path)).save("model_0000003", iteration=3)
        model = _Model(seed=1)
        assert KDCheckpointer(model, str(tmp_path)).resume_or_load("")["iteration"] == 3
        assert _equal(model, _Model())

    def test_not_resuming_loads_the_model_only(self, tmp_path):
        KDCheckpointer(_Model(), str(tmp_path), queue=_State(n=1)).save(
            "model_0000003", iteration=3
        )
        queue, model = _State(n=9), _Model(seed=1)
        checkpointer = KDCheckpointer(model, str(tmp_path / "new"), queue=queue)
        checkpointer.resume_or_load(str(tmp_path / "model_0000003.pth"), resume=True)
        assert queue.state == {"n": 9} and _equal(model, _Model())
        assert checkpointer.resume_or_load("", resume=False) == {}

    def test_entry_missing_on_resume_is_reported(self, tmp_path, caplog):
        KDCheckpointer(_Model(), str(tmp_path)).save("model_0000003", iteration=3)
        KDCheckpointer(_Model(), str(tmp_path), distillers=_State(n=9)).resume_or_load("")
        assert any("has no entry distillers" in text for text in _warnings(caplog))

    def test_only_the_main_process_writes(self, tmp_path):
        KDCheckpointer(_Model(), str(tmp_path), save_to_disk=False).save("model_0000003")
        assert os.listdir(tmp_path) == []


class TestWhatIsWritten:
    def test_numpy_scalars_become_numbers(self, tmp_path):
        state = {
            "best": np.float64(0.5),
            "flag": np.bool_(True),
            np.int64(3): [np.float32(2), (np.int32(1),)],
            "table": defaultdict(list, a=[1]),
        }
        KDCheckpointer(_Model(), str(tmp_path), hook=_State(**{"x": state})).save(
            "a", ap=np.float32(3)
        )
        hook = _State()
        extra = KDCheckpointer(_Model(), str(tmp_path), hook=hook).load(str(tmp_path / "a.pth"))
        assert extra["ap"] == 3.0 and type(extra["ap"]) is float
        expected = {"best": 0.5, "flag": True, 3: [2.0, (1,)], "table": {"a": [1]}}
        assert hook.state["x"] == expected and type(hook.state["x"]["flag"]) is bool

    @pytest.mark.parametrize(
        "entry, named",
        [
            ({"rng": [np.zeros(3)]}, "trainer['rng'][0] is a numpy.ndarray"),
            ({"f": {"g": len}}, "trainer['f']['g'] is a builtins.builtin_function_or_method"),
            ({"s": {1, 2}}, "trainer['s'] is a builtins.set"),
            ({"m": nn.ReLU()}, "torch.nn.modules.activation.ReLU"),
            ({"n": 1 << 5000}, "trainer['n']"),
        ],
    )
    def test_what_could_not_be_read_again_is_refused_by_name(self, tmp_path, entry, named):
        checkpointer = KDCheckpointer(_Model(), str(tmp_path), trainer=_State(**entry))
        with pytest.raises(ValueError) as caught:
            checkpointer.save("model_0000001")
        assert named in str(caught.value)
        assert os.listdir(tmp_path) == []

    def test_every_accepted_type_is_read_again(self, tmp_path):
        state = {
            "values": [None, True, 7, 2.5, float("inf"), "text", (1, 2), 1 << 1000],
            "tensors": [torch.ones(2), nn.Parameter(torch.zeros(1)), torch.get_rng_state()],
            "torch": [torch.float16, torch.device("cpu"), torch.Size([1, 2])],
        }
        checkpointer = KDCheckpointer(_Model(), str(tmp_path))
        checkpointer.save("a", state=state)
        loaded = checkpointer.load(str(tmp_path / "a.pth"))["state"]
        assert loaded["values"] == state["values"] and loaded["torch"] == state["torch"]
        assert all(torch.equal(a, b) for a, b in zip(loaded["tensors"], state["tensors"]))

    def test_module_versions_survive(self, tmp_path):
        checkpointer = KDCheckpointer(_Model(), str(tmp_path))
        checkpointer.save("a")
        saved = torch.load(tmp_path / "a.pth", weights_only=True)["model"]
        assert saved._metadata["norm"]["version"] == 2


class TestReport:
    def test_missing_unexpected_and_mismatched(self, tmp_path):
        state = _Model(width=5).state_dict()
        del state["head.bias"]
        state["old.weight"] = torch.zeros(1)
        state["anchor_generator.cell_anchors.0"] = torch.zeros(9, 4)
        torch.save(state, tmp_path / "a.pth")
        checkpointer = KDCheckpointer(_Model())
        assert checkpointer.last_report is None
        checkpointer.load(str(tmp_path / "a.pth"))
        report = checkpointer.last_report
        assert report.missing == ["head.bias"] and report.unexpected == ["old.weight"]
        assert ("conv.weight", (5, 3, 1, 1), (4, 3, 1, 1)) in report.mismatched
        assert [name for name, _, _ in report.mismatched] == sorted(
            ["conv.bias", "conv.weight", "head.weight"]
            + [f"norm.{k}" for k in ("bias", "running_mean", "running_var", "weight")]
        )
        checkpointer.load("")
        assert checkpointer.last_report is None

    def test_other_pixel_statistics_are_warned_about(self, tmp_path, caplog):
        state = {**_Model().state_dict(), "pixel_mean": torch.tensor([100.0, 110.0, 120.0])}
        torch.save(state, tmp_path / "a.pth")
        checkpointer = KDCheckpointer(_Model())
        checkpointer.load(str(tmp_path / "a.pth"))
        assert checkpointer.last_report.ok
        assert not any("PIXEL_MEAN" in text for text in _warnings(caplog))
        state["pixel_mean"] = torch.tensor([0.4, 0.4, 0.4]).reshape(3, 1, 1)
        torch.save(state, tmp_path / "a.pth")
        checkpointer.load(str(tmp_path / "a.pth"))
        assert any("PIXEL_MEAN" in text for text in _warnings(caplog))


class TestFormats:
    @staticmethod
    def _numpy_state(seed=1):
        return {key: value.numpy() for key, value in _Model(seed=seed).state_dict().items()}

    def _load(self, path):
        model = _Model()
        checkpointer = KDCheckpointer(model)
        checkpointer.load(str(path))
        return model, checkpointer.last_report

    def test_detectron2_zoo(self, tmp_path):
        state = {"model": self._numpy_state(), "__author__": "Detectron2 Model Zoo"}
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(state))
        model, report = self._load(tmp_path / "a.pkl")
        assert report.ok and _equal(model, _Model(seed=1))

    def test_converted_backbone_with_heuristics(self, tmp_path):
        weight = np.ones((4, 3, 1, 1), np.float32)
        state = {"model": {"conv.weight": weight}, "__author__": "x", "matching_heuristics": True}
        (tmp_path / "a.pkl").write_bytes(pickle.dumps(state))
        model = nn.Sequential(_Model())
        checkpointer = KDCheckpointer(model)
        checkpointer.load(str(tmp_path / "a.pkl"))
        assert model[0].conv.weight.eq(1).all()
        assert "0.conv.bias" in checkpointer.last_report.missing

    def test_caffe2(self, tmp_path):
        blobs = {"conv_w": np.ones((4, 3, 1, 1), np.float32), "conv_w_momentum": np.zeros(1)}
        for name, content in (("detector", {"blobs": blobs, "cfg": "A: 1"}), ("imagenet", blobs)):
            (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content, protocol=2))
            model, report = self._load(tmp_path / f"{name}.pkl")
            assert model.conv.weight.eq(1).all() and report.unexpected == []

    def test_pycls(self, tmp_path):
        torch.save({"model_state": _Model(seed=1).state_dict()}, tmp_path / "a.pyth")
        model, _ = self._load(tmp_path / "a.pyth")
        assert torch.equal(model.conv.weight, _Model(seed=1).conv.weight)
        torch.save({"state": 1}, tmp_path / "b.pyth")
        with pytest.raises(ValueError, match="model_state"):
            self._load(tmp_path / "b.pyth")

    def test_heuristics_by_query(self, tmp_path):
        torch.save({"conv.weight": torch.ones(4, 3, 1, 1)}, tmp_path / "a.pth")
        model = nn.Sequential(_Model())
        KDCheckpointer(model).load(f"{tmp_path}/a.pth?matching_heuristics=True")
        assert model[0].conv.weight.eq(1).all()
        with pytest.raises(ValueError, match="Unsupported query"):
            KDCheckpointer(model).load(f"{tmp_path}/a.pth?other=True")

    def test_safetensors(self, tmp_path):
        safetensors = pytest.importorskip("safetensors.torch")
        safetensors.save_file(_Model(seed=1).state_dict(), str(tmp_path / "a.safetensors"))
        model, report = self._load(tmp_path / "a.safetensors")
        assert report.ok and _equal(model, _Model(seed=1))

    def test_wrapped_model(self, tmp_path):
        torch.save(nn.DataParallel(_Model(seed=1)).state_dict(), tmp_path / "a.pth")
        model, report = self._load(tmp_path / "a.pth")
        assert report.ok and _equal(model, _Model(seed=1))

    @pytest.mark.parametrize(
        "content, named",
        [
            ({"meta": {}, "state_dict": {}}, "convert_weights"),
            ({"model": [1]}, "not a state dict"),
            ([1, 2], "instead of a dict"),
        ],
    )
    def test_other_files_are_named_and_the_object_stays_usable(self, tmp_path, content, named):
        torch.save(content, tmp_path / "a.pth")
        torch.save(_Model().state_dict(), tmp_path / "good.pth")
        checkpointer = KDCheckpointer(_Model())
        with pytest.raises(ValueError, match=named) as caught:
            checkpointer.load(str(tmp_path / "a.pth"))
        assert "a.pth" in str(caught.value)
        checkpointer.load(str(tmp_path / "good.pth"))
        assert checkpointer.last_report.ok

    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"nowhere\.pth"):
            KDCheckpointer(_Model()).load(str(tmp_path / "nowhere.pth"))

    def test_program_is_refused_unless_allowed(self, tmp_path):
        torch.save({"model": _Model().state_dict(), "extra": _State()}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match="_State.*KD.ALLOW_UNSAFE_LOAD"):
            KDCheckpointer(_Model()).load(str(tmp_path / "a.pth"))
        extra = KDCheckpointer(_Model(), allow_unsafe=True).load(str(tmp_path / "a.pth"))
        assert type(extra["extra"]).__name__ == "_State"


class TestResumeAfterDamage:
    @pytest.fixture
    def folder(self, tmp_path):
        for iteration in (1, 3, 5):
            checkpointer = KDCheckpointer(_Model(seed=iteration), str(tmp_path))
            checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        return tmp_path

    @staticmethod
    def _resume(folder):
        model = _Model(seed=99)
        extra = KDCheckpointer(model, str(folder)).resume_or_load("", resume=True)
        assert _equal(model, _Model(seed=extra["iteration"]))
        return extra["iteration"]

    def test_tag_wins(self, folder):
        assert self._resume(folder) == 5
        (folder / "last_checkpoint").write_text("model_0000003.pth")
        assert self._resume(folder) == 3

    @pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "flipped"])
    def test_falls_back_to_the_newest_intact_one(self, folder, damage, caplog):
        path = folder / "model_0000005.pth"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        if damage != "missing":
            kept = {"truncated": content[:-100], "empty": b"", "flipped": content}[damage]
            path.write_bytes(bytes(kept))
        assert self._resume(folder) == 3
        warning = "\n".join(_warnings(caplog))
        assert "model_0000005.pth" in warning and "model_0000003.pth" in warning

    @pytest.mark.parametrize("tag", [None, ""])
    def test_without_a_tag(self, folder, tag, caplog):
        (folder / "last_checkpoint").unlink()
        if tag is not None:
            (folder / "last_checkpoint").write_text(tag)
        assert KDCheckpointer(_Model(), str(folder)).has_checkpoint()
        assert self._resume(folder) == 5
        assert any("last_checkpoint" in text for text in _warnings(caplog))

    def test_final_model_is_ordered_by_its_iteration(self, folder):
        KDCheckpointer(_Model(seed=4), str(folder)).save("model_final", iteration=4)
        (folder / "last_checkpoint").write_text("model_0000009.pth")
        assert self._resume(folder) == 5
        os.remove(folder / "model_0000005.pth")
        assert self._resume(folder) == 4

    def test_exported_and_best_models_are_not_resumed(self, folder):
        for iteration in (1, 3, 5):
            os.remove(folder / f"model_{iteration:07d}.pth")
        for name in ("model_student", "model_best"):
            torch.save(_Model().state_dict(), folder / f"{name}.pth")
        with pytest.raises(ValueError, match="no other intact checkpoint"):
            self._resume(folder)

    def test_clear_error_when_all_are_damaged(self, folder):
        for iteration in (1, 3, 5):
            (folder / f"model_{iteration:07d}.pth").write_bytes(b"")
        with pytest.raises(ValueError, match=r"model_0000005\.pth is missing or damaged"):
            self._resume(folder)

    def test_leftovers_are_removed(self, folder):
        stale = folder / ".model_0000007.pth.0123456789ab.kdtmp"
        stale.write_bytes(b"half")
        assert self._resume(folder) == 5
        assert not stale.exists()

    def test_failed_save_keeps_file_and_tag(self, folder, monkeypatch):
        before = {name: (folder / name).read_bytes() for name in os.listdir(folder)}

        def full(*args):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("kd_d2.checkpoint.atomic.os.fsync", full)
        for name in ("model_0000005", "model_0000007"):
            with pytest.raises(OSError, match="free space"):
                KDCheckpointer(_Model(seed=7), str(folder)).save(name, iteration=7)
        assert before == {name: (folder / name).read_bytes() for name in os.listdir(folder)}


_SAVER = """
    import os, random, signal, sys, time
    import torch
    from torch import nn
    from kd_d2.checkpoint import KDCheckpointer

    torch.set_num_threads(1)
    folder, trials = sys.argv[1], int(sys.argv[2])
    random.seed(0)

    def build():
        return nn.Linear(300, 300)

    def save_forever(start, ready):
        model = build()
        checkpointer = KDCheckpointer(model, folder)
        for iteration in range(start, 10**9):
            with torch.no_grad():
                model.weight.fill_(iteration)
            # Two names in turn: overwriting a file must be as safe as writing a new one.
            checkpointer.save(f"model_{iteration % 2:07d}", iteration=iteration)
            os.write(ready, b".")

    last, leftovers = -1, 0
    for trial in range(trials):
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            save_forever(last + 1, write)
        os.read(read, 1)  # it has saved once
        time.sleep(random.uniform(0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read), os.close(write)
        leftovers += sum(name.endswith(".kdtmp") for name in os.listdir(folder))
        tagged = open(os.path.join(folder, "last_checkpoint")).read()
        data = torch.load(os.path.join(folder, tagged), weights_only=True)
        assert data["model"]["weight"].eq(data["iteration"]).all(), "mixed content"
        model = build()
        extra = KDCheckpointer(model, folder).resume_or_load("", resume=True)
        assert extra["iteration"] > last and model.weight.eq(extra["iteration"]).all()
        last = extra["iteration"]
        assert not any(name.endswith(".kdtmp") for name in os.listdir(folder))
    print("saved", last, "left", leftovers)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_killed_while_saving(tmp_path):
    """A process that does nothing but save is killed 25 times at random moments."""
    script = tmp_path / "saver.py"
    script.write_text(textwrap.dedent(_SAVER))
    (tmp_path / "run").mkdir()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    result = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run"), "25"],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    print(result.stdout)  # how many of the kills hit a file in the middle


def test_state_of_the_run_is_not_changed_by_saving(tmp_path):
    state = {"a": [1, 2.5, {"b": np.float32(1)}], "t": torch.ones(2)}
    before = copy.deepcopy(state)
    KDCheckpointer(_Model(), str(tmp_path), x=_State(**state)).save("a")
    assert str(state) == str(before) and type(state["a"][2]["b"]) is np.float32


_RANK = """
    import sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from kd_d2.checkpoint import KDCheckpointer

    rank, folder, store = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    dist.init_process_group("gloo", init_method="file://" + store, rank=rank, world_size=2)

    def build(value):
        model = nn.Linear(2, 2)
        nn.init.constant_(model.weight, value)
        return model

    # Each rank has other weights; the main process' ones are saved.
    checkpointer = KDCheckpointer(build(rank + 1), folder)
    for iteration in (3, 7):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    dist.barrier()
    if rank == 0:
        open(folder + "/model_0000007.pth", "wb").close()
    dist.barrier()
    model = build(9)
    extra = KDCheckpointer(model, folder).resume_or_load("", resume=True)
    assert extra["iteration"] == 3 and model.weight.eq(1).all(), (rank, extra)
    dist.barrier()
    if rank == 0:
        open(folder + "/model_0000003.pth", "wb").close()
    dist.barrier()
    try:
        KDCheckpointer(model, folder).resume_or_load("", resume=True)
    except ValueError as error:
        assert "Cannot resume" in str(error)
        print("refused", rank)
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.mark.distributed
def test_two_processes_resume_from_one_file(tmp_path):
    """Rank 0 writes and chooses; both load that file, and both stop when there is none."""
    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(_RANK))
    (tmp_path / "run").mkdir()
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), str(tmp_path / "run"), str(tmp_path / "store")],
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for rank, process in enumerate(ranks):
            out, error = process.communicate(timeout=120)
            assert process.returncode == 0, error
            assert f"refused {rank}" in out
    finally:
        for process in ranks:
            process.kill()
            process.wait()
