"""Accelerate's state of the process, kept apart for each trainer: one that is made later must not break another."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.state import AcceleratorState, PartialState


@contextmanager
def state_of_others_kept() -> Iterator[None]:
    """Let a configuration read device and number of processes without a change for the trainers that are there.

    `TrainingArguments` empties Accelerate's state, which the accelerator of every trainer refers to.
    """
    kept = AcceleratorState._shared_state, PartialState._shared_state
    AcceleratorState._shared_state, PartialState._shared_state = {}, {}
    try:
        yield
    finally:
        if kept[0]:
            AcceleratorState._shared_state, PartialState._shared_state = kept


def begin_state(process: PartialState) -> None:
    """Let the next accelerator have a state of its own.

    Args:
        process (PartialState): device and processes of its configuration.
    """
    AcceleratorState._shared_state, PartialState._shared_state = {}, vars(process)


def use_state(accelerator_state: AcceleratorState, process: PartialState) -> None:
    """Make the state of a trainer that of the process again.

    Args:
        accelerator_state (AcceleratorState): of its accelerator.
        process (PartialState): of its configuration.
    """
    AcceleratorState._shared_state, PartialState._shared_state = vars(accelerator_state), vars(process)
