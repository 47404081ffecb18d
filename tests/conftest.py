"""Runs of the trainer set up loggers and threads; every test starts without."""

import logging

import pytest
import torch
from detectron2.utils import logger as d2_logger


@pytest.fixture(autouse=True)
def own_process_state(monkeypatch):
    loggers = [logging.getLogger(name) for name in ("detectron2", "fvcore", "kd_d2")]
    before = [(log.handlers[:], log.level, log.propagate) for log in loggers]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    # takes a second, with compilers and drivers asked for their versions
    monkeypatch.setattr("detectron2.engine.defaults.collect_env_info", lambda: "environment")
    # set by Detectron2's seed_all_rng
    monkeypatch.setenv("PYTHONHASHSEED", "0")
    yield
    torch.set_num_threads(threads)
    for log, (handlers, level, propagate) in zip(loggers, before):
        for handler in set(log.handlers) - set(handlers):
            handler.close()
        log.handlers[:] = handlers
        log.setLevel(level)
        log.propagate = propagate
    d2_logger.setup_logger.cache_clear()
    d2_logger._cached_log_stream.cache_clear()
