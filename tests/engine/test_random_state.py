"""Capturing, restoring and preserving the random state."""

import random

import numpy as np
import pytest
import torch

from kd_d2.engine.random_state import (
    capture_random_state,
    preserve_random_state,
    restore_random_state,
    seed_random_state,
)


def draw():
    """Numbers of every generator, with the spare Gaussian values that numpy and Python keep."""
    return (
        torch.rand(3).tolist(),
        np.random.rand(3).tolist(),
        np.random.randn(),
        [random.random() for _ in range(3)],
        random.gauss(0, 1),
    )


@pytest.fixture(autouse=True)
def undisturbed():
    with preserve_random_state():
        seed_random_state(5)
        np.random.randn()  # leaves a spare value
        random.gauss(0, 1)
        yield


def test_restored_state_repeats_all_generators():
    state = capture_random_state()
    first = draw()
    second = draw()
    assert all(a != b for a, b in zip(first, second))
    restore_random_state(state)
    assert draw() == first


def test_state_survives_a_checkpoint(tmp_path):
    state = capture_random_state()
    expected = draw()
    torch.save(state, tmp_path / "state.pth")
    restore_random_state(torch.load(tmp_path / "state.pth", weights_only=True))
    assert draw() == expected


def test_preserve_undoes_draws_seeds_and_failures():
    expected = draw()
    seed_random_state(5)
    np.random.randn()
    random.gauss(0, 1)
    with pytest.raises(KeyError), preserve_random_state():
        draw()
        seed_random_state(99)
        raise KeyError
    assert draw() == expected


def test_seed_sets_all_generators():
    seed_random_state(17)
    first = draw()
    draw()
    seed_random_state(17)
    assert draw() == first
    seed_random_state(18)
    assert all(a != b for a, b in zip(draw(), first))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_state_of_the_gpu():
    torch.rand(1, device="cuda")
    state = capture_random_state()
    first = torch.rand(3, device="cuda").tolist()
    restore_random_state(state)
    assert torch.rand(3, device="cuda").tolist() == first
