"""Random numbers that depend on what they are for, not on what was drawn before."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch


class Purpose(IntEnum):
    """What random numbers are for; each is unrelated to the others."""

    NOISE = 0
    STEPS = 1
    PROMPTS = 2
    EVALUATION = 3
    SOLVER = 4
    PARTING = 5


def derive_seed(seed: int, purpose: Purpose, *key: int) -> int:
    """Mix a run's seed, a purpose and a number within it into one seed.

    Args:
        seed (int): of the run, not negative.
        purpose (Purpose): what it is for.
        *key (int): such as a sample's index, not negative.

    Returns:
        int: in [0, 2^63); different arguments give unrelated seeds.
    """
    return int(np.random.SeedSequence([seed, purpose, *key]).generate_state(1, np.uint64)[0] >> 1)


def make_generator(seed: int, purpose: Purpose, *key: int) -> torch.Generator:
    """Make a CPU generator seeded with `derive_seed`, so that noise is the same on every device."""
    return torch.Generator("cpu").manual_seed(derive_seed(seed, purpose, *key))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global random states of Python, NumPy and torch, on the CPU and all GPUs, and put them back afterwards.

    Args:
        seed (int): in [0, 2^63).
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with seeded_torch(seed):
            random.seed(seed)
            np.random.seed(seed % 2**32)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


@contextmanager
def seeded_torch(seed: int) -> Iterator[None]:
    """Seed torch's global random states, on the CPU and all GPUs of CUDA, and put them back afterwards.

    Args:
        seed (int): in [0, 2^63).
    """
    with torch.random.fork_rng(devices=cuda_devices()):
        if torch.cuda.is_available() and not torch.cuda.is_initialized():
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs later, for good
        else:
            torch.manual_seed(seed)
        yield


def cuda_devices() -> list[int]:
    """The GPUs that have a random state: none as long as this process has not used one."""
    return list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
