"""Values of the updates since the last log, averaged over samples and processes."""

from collections import defaultdict, deque
from statistics import fmean, median, pstdev

import psutil
import torch
from accelerate.utils import gather_object
from torch import Tensor


class MetricBuffer:
    """Keeps values on their device until they are logged.

    Args:
        keep (int | None): how many of the last batches are kept; None is all since the last log.
    """

    def __init__(self, keep: int | None = None):
        self._values: dict[str, deque[Tensor]] = defaultdict(lambda: deque(maxlen=keep))

    def __bool__(self) -> bool:
        return bool(self._values)

    def add(self, values: dict[str, Tensor]) -> None:
        """Add the values of a batch.

        Args:
            values (dict[str, Tensor]): scalars, or one value a sample, shape (B,).
        """
        for name, value in values.items():
            self._values[name].append(value.detach().float().reshape(-1))

    def latest(self, name: str, num_batches: int) -> Tensor:
        """Return the values of the last batches, one after another, shape (num_batches * B,)."""
        return torch.cat(list(self._values[name])[-num_batches:])

    def num_batches(self, name: str) -> int:
        """Return how many batches have a value of this name."""
        return len(self._values[name]) if name in self._values else 0

    def last_batch(self) -> dict[str, float]:
        """Return the means of the last batch of this process."""
        return {name: values[-1].mean().item() for name, values in self._values.items()}

    def pop(self) -> dict[str, list[float]]:
        """Return all values of all processes and forget them; names may differ between processes."""
        columns = {name: torch.cat(list(values)).tolist() for name, values in self._values.items()}
        self._values.clear()
        return merge(gather_object([columns]))


def merge(columns: list[dict[str, list[float]]]) -> dict[str, list[float]]:
    """Concatenate columns of the same name, in the order of the names."""
    names = sorted({name for each in columns for name in each})
    return {name: [value for each in columns for value in each.get(name, [])] for name in names}


def summarise(columns: dict[str, list[float]]) -> dict[str, float]:
    """Average each column; of "reward" also give the standard deviation over samples, of gradients the median.

    Args:
        columns (dict[str, list[float]]): values by name, none empty.

    Returns:
        dict[str, float]: means, "reward_std", and "sample_grad_norm_median", which a few huge gradients do not move.
    """
    medians = {f"{name}_median": median(columns[name]) for name in columns if name.startswith("sample_grad_norm")}
    means = {name: fmean(values) for name, values in columns.items()}
    return {**means, **medians, "reward_std": pstdev(columns["reward"])}


def saturated(outputs: Tensor) -> Tensor:
    """Return the share of values at the ends of their range, where clamping leaves no gradient.

    Args:
        outputs (Tensor): images or video in [0, 1], shape (B, 3, H, W) or (B, F, 3, H, W), or audio in [-1, 1], shape
            (B, C, T).

    Returns:
        Tensor: in [0, 1], shape (B,).
    """
    low = 0.0 if outputs.ndim > 3 else -1.0
    return ((outputs <= low) | (outputs >= 1)).flatten(1).float().mean(1)


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory that was in use on a GPU since the last call; on the CPU, of the process, now.

    Args:
        device (torch.device): where the model runs.

    Returns:
        float: in GiB.
    """
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return peak / 2**30
    memory = psutil.Process().memory_info()
    return getattr(memory, "peak_wset", memory.rss) / 2**30  # only Windows keeps a peak
