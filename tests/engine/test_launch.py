"""Which processes are started, and how they talk."""

import argparse
import importlib
import os

import pytest
import torch
from torch.multiprocessing import ProcessExitedException

from kd_d2.engine.launch import launch, started_by_torchrun

# the package has the function of this name
launch_module = importlib.import_module("kd_d2.engine.launch")

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "TORCHELASTIC_RUN_ID")


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


def options(**changes):
    values = {"num_gpus": 1, "num_machines": 1, "machine_rank": 0, "dist_url": "auto", **changes}
    return argparse.Namespace(**values)


def test_one_process_is_this_one(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    seen = []
    launch(lambda *args: seen.append((args, os.environ["CUDA_VISIBLE_DEVICES"])), options(), (1, 2))
    assert seen == [((1, 2), "3")]


@pytest.mark.parametrize("before", [None, "0,1"])
@pytest.mark.parametrize("device, visible", [("cpu", ""), ("cuda", None)])
def test_gpus_are_hidden_from_processes_on_the_cpu(device, visible, before, monkeypatch):
    """Detectron2's launcher decides for NCCL by the GPUs that its processes see."""
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    seen = []
    monkeypatch.setattr(
        launch_module,
        "d2_launch",
        lambda main, num, **kwargs: seen.append((num, os.environ.get("CUDA_VISIBLE_DEVICES"))),
    )
    launch(print, options(num_gpus=2), device=device)
    assert seen == [(2, before if visible is None else visible)]
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == before


def test_a_lost_process_ends_with_one_line(monkeypatch):
    def lost(*args, **kwargs):
        text = "process 1 terminated with signal SIGKILL"
        raise ProcessExitedException(text, 1, 123, -9, "SIGKILL")

    monkeypatch.setattr(launch_module, "d2_launch", lost)
    with pytest.raises(SystemExit, match="process 1 terminated with signal SIGKILL"):
        launch(print, options(num_gpus=2))


@pytest.mark.parametrize("device, backend, chosen", [("cpu", "gloo", []), ("cuda", "nccl", [1])])
def test_backend_under_torchrun_follows_the_device(device, backend, chosen, monkeypatch):
    environment = {"RANK": 1, "WORLD_SIZE": 2, "LOCAL_RANK": 1, "MASTER_ADDR": "localhost"}
    assert not started_by_torchrun()
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    assert started_by_torchrun()
    calls, devices, groups = [], [], []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    monkeypatch.setattr(
        launch_module.dist, "init_process_group", lambda backend: calls.append(backend)
    )
    monkeypatch.setattr(launch_module.comm, "create_local_process_group", groups.append)
    launch(lambda x: calls.append(x), options(), ("ran",), device=device)
    assert calls == [backend, "ran"] and devices == chosen and groups == [2]


def test_one_process_under_torchrun_needs_no_group(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(launch_module.dist, "init_process_group", None)
    seen = []
    launch(seen.append, options(), ("ran",))
    assert seen == ["ran"]
