"""Time and memory of one whole update at a published model's size: rollout, reward, backward pass, optimizer."""

import ctypes
import gc
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from benchmarks.true_sizes import TRUE_SIZES, clip_huge
from trl_leapalign import LeapAlignConfig, LeapAlignTrainer
from trl_leapalign.training.memory_plan import MemoryPlan, plan_memory

PROMPT = "a photo of a red circle left of a dog"
GIB = 2**30


@dataclass(frozen=True)
class Update:
    """What one update took, memory in GiB.

    Args:
        size (str): name of the size.
        quantize (str | None): how the denoiser is quantized.
        pixels (int): height and width of the images.
        num_steps (int): sampling steps.
        seconds (float): of the update.
        libraries (float): memory of the process before anything was built, on the CPU.
        before (float): memory before the update, without the libraries.
        peak (float): most memory during it, likewise.
        planned (float): what the plan says of the peak.
        plan (dict[str, float]): its rows.
    """

    size: str
    quantize: str | None
    pixels: int
    num_steps: int
    seconds: float
    libraries: float
    before: float
    peak: float
    planned: float
    plan: dict[str, float]


class OneUpdate:
    """A trainer at a published model's size that makes one update."""

    def __init__(self, name: str, quantize: str | None, pixels: int | None, num_steps: int | None, device: str):
        size = TRUE_SIZES[name]
        self.name, self.quantize, self.device = name, quantize, torch.device(device)
        return_freed_memory()
        self.libraries = used(self.device)
        pipeline = size.make_pipeline(quantize == "nf4")
        self.pixels, self.num_steps = pixels or size.pixels, num_steps or size.num_steps
        config = LeapAlignConfig(
            output_dir="outputs/benchmark",
            max_steps=1,
            per_device_train_batch_size=1,
            sample_num_steps=self.num_steps,
            sample_height=self.pixels,
            sample_width=self.pixels,
            sample_kwargs=size.call_kwargs,
            activation_checkpointing=True,
            use_cpu=self.device.type == "cpu",
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            dry_run=False,
        )
        self.trainer = LeapAlignTrainer(pipeline, clip_huge(), config, train_dataset=[PROMPT])

    def plan(self) -> MemoryPlan:
        """Plan the update's memory, without a look at what is measured."""
        config, trainer = self.trainer.args, self.trainer
        call = {**config.call_kwargs(), "num_inference_steps": 2}
        return plan_memory(
            trainer.pipeline,
            list(trainer.denoisers),
            trainer.rewards.functions,
            lambda twin: twin(PROMPT, output_type="pt", return_dict=False, **call)[0],
            method=trainer.rollout_model.method,
            num_steps=self.num_steps,
            optimizer=config.optim,
        )

    def run(self) -> Update:
        """Plan the update, make it, and measure it."""
        plan = self.plan()
        gc.collect()
        before = used(self.device)
        reset_peak(self.device)
        start = time.perf_counter()
        self.trainer.train()
        seconds = time.perf_counter() - start
        peak = peak_used(self.device)
        sizes = {"libraries": self.libraries, "before": before - self.libraries, "peak": peak - self.libraries}
        planned = {"planned": plan.first_update, "plan": plan.rows()}
        return Update(self.name, self.quantize, self.pixels, self.num_steps, seconds, **sizes, **planned)


def return_freed_memory() -> None:
    """Let the C library give tensors' memory back when they are freed, so that the process's memory is theirs."""
    try:
        ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 22)  # M_MMAP_THRESHOLD
    except OSError:
        print("There is no glibc here, so freed memory may still count as used.")


def used(device: torch.device) -> float:
    """Memory in use, in GiB: of tensors on a GPU, of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device) / GIB
    return psutil.Process().memory_info().rss / GIB


def reset_peak(device: torch.device) -> None:
    """Forget the highest use so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_used(device: torch.device) -> float:
    """Highest use since `reset_peak`, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
