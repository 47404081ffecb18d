"""Runs of the trainer set up loggers and threads; every test starts without."""

import logging

import pytest
import torch
from detectron2.utils import logger as d2_logger


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # takes a second, with compilers and drivers asked for their versions
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "environment")
    # set by Detectron2's seed_all_rng
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    # also before the test: fixtures of a module may have trained something
    reset_loggers()
    yield
    reset_loggers()
    torch.set_num_threads(threads)
    # set by benchmarks; other tests compare this process with fresh ones bit by bit
    torch.set_flush_denormal(False)


def reset_loggers() -> None:
    for name in ("detectron2", "fvcore", "kd_d2"):
        log = logging.getLogger(name)
        for handler in log.handlers[:]:
            log.removeHandler(handler)
            handler.close()
        log.setLevel(logging.NOTSET)
        log.propagate = True
    d2_logger.setup_logger.cache_clear()
    d2_logger._cached_log_stream.cache_clear()
