"""Random state of a process: captured into plain tensors, restored, kept by a block."""

import contextlib
import random
from typing import Dict, Iterator

import numpy as np
import torch

__all__ = [
    "capture_random_state",
    "preserve_random_state",
    "restore_random_state",
    "seed_random_state",
]


def capture_random_state() -> Dict[str, torch.Tensor]:
    """Return the state of the generators of torch (CPU, current GPU), numpy and Python.

    All values are tensors or numbers, so that a checkpoint holding them loads with
    ``weights_only=True``.
    """
    _, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, python_gauss = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy": torch.from_numpy(keys.astype(np.int64)),
        "numpy_position": int(position),
        "numpy_has_gauss": int(has_gauss),
        "numpy_gauss": float(gauss),
        "python_version": version,
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": python_gauss,
    }
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Dict[str, torch.Tensor]) -> None:
    """Inverse of :func:`capture_random_state`."""
    torch.set_rng_state(state["torch"])
    np.random.set_state(
        (
            "MT19937",
            state["numpy"].numpy().astype(np.uint32),
            state["numpy_position"],
            state["numpy_has_gauss"],
            state["numpy_gauss"],
        )
    )
    words = tuple(state["python"].tolist())
    random.setstate((state["python_version"], words, state["python_gauss"]))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_random_state(seed: int) -> None:
    """Seed all generators of :func:`capture_random_state` with one number below 2^32."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


@contextlib.contextmanager
def preserve_random_state() -> Iterator[None]:
    """Whatever random numbers the block draws, the code after it sees the same as without it."""
    state = capture_random_state()
    try:
        yield
    finally:
        restore_random_state(state)
