"""Random numbers that depend on what they are for, not on what was drawn before."""

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
