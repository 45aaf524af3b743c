"""What a training step costs beside its floor, and how its memory grows with the number of sampling steps.

    python benchmarks/step.py --size cpu
    python benchmarks/step.py --size flux --steps 10 25 50      # FLUX.1-dev's sizes, random weights, on a GPU
    python benchmarks/step.py --size sd3 --steps 10 25 50       # SD3.5-M's
    python benchmarks/step.py --size flux --device cpu --quantize nf4     # one whole update, plan against measured
    python benchmarks/step.py --size wan --update                         # the same where there is a GPU

The floor of a step is what no method with these denoiser calls can go below: the bare calls without and with gradients,
the backward pass of the latter, and decoding and reward with theirs. The gradient comes from the reward, so the graphs
of all calls are held until then. The floor is replayed with the inputs that the step's own calls had, in turn with the
step, in the same process. Writes step.json, memory.png and time.png.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline
from matplotlib.figure import Figure
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.sizes import SIZES, Size  # noqa: E402
from benchmarks.true_sizes import TRUE_SIZES  # noqa: E402
from benchmarks.update import OneUpdate  # noqa: E402
from trl_leapalign import LeapAlignConfig, LeapAlignTrainer  # noqa: E402
from trl_leapalign.methods import METHODS  # noqa: E402
from trl_leapalign.rewards import BlackBox  # noqa: E402

FULL = "full back-propagation"
DEFAULT_STEPS = [10, 50]
BLACK_BOX, DIFFERENTIABLE = "leapalign, black box, 2 images", "leapalign, 2 images"
"""The same step without and with a gradient of the reward; a black box compares at least two images."""
SETTINGS = {
    **{name: {"method": name} for name in METHODS},
    FULL: {"method": "draft", "method_kwargs": {"num_last_steps": None}},
    "leapalign, 4 pairs": {"method": "leapalign", "method_kwargs": {"pairs_per_rollout": 4}},
    DIFFERENTIABLE: {"method": "leapalign", "per_device_train_batch_size": 2},
    BLACK_BOX: {"method": "leapalign", "per_device_train_batch_size": 2, "samples_per_prompt": 2},
}


@dataclass(frozen=True)
class Measurement:
    """What was measured of one method.

    Args:
        method (str): its name.
        num_steps (int): sampling steps.
        step_seconds (float): median of a training step without the optimizer's.
        floor_seconds (float | None): median of its floor; None where it was not measured.
        peak_mib (float): most memory of tensors during a step, above what was there before it.
        calls (tuple[int, int]): denoiser calls without and with gradients.
    """

    method: str
    num_steps: int
    step_seconds: float
    floor_seconds: float | None
    peak_mib: float
    calls: tuple[int, int]


@dataclass(frozen=True)
class Call:
    """A call of a denoiser, its tensors detached."""

    module: nn.Module
    args: tuple
    kwargs: dict[str, Any]
    with_gradients: bool
    output: Tensor


def main() -> None:
    arguments = parse_arguments()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if arguments.update or arguments.quantize or (device.type == "cpu" and arguments.size in TRUE_SIZES):
        measure_update(arguments, device, output)
        return
    size = SIZES[arguments.size]
    measurements = []
    for num_steps in arguments.steps:
        for method in arguments.methods:
            with_floor = num_steps == arguments.steps[0] and method != BLACK_BOX  # its floor is the denoiser's alone
            measurements.append(measure(size, method, num_steps, device, arguments.repeats, with_floor))
            print(describe(measurements[-1]), flush=True)
            write(output, arguments, device, measurements)
    draw_time(measurements, output / "time.png")
    draw_memory(measurements, output / "memory.png")


def measure_update(arguments: argparse.Namespace, device: torch.device, output: Path) -> None:
    """Make one whole update at a published model's size, and write time and memory beside the plan."""
    steps = arguments.steps[0] if arguments.steps != DEFAULT_STEPS else None
    update = OneUpdate(arguments.size, arguments.quantize, arguments.pixels, steps, str(device)).run()
    ratio = update.peak / update.planned
    print(
        f"{update.size}, {update.quantize or 'bfloat16'}, {update.pixels} pixels, {update.num_steps} steps: "
        f"{update.seconds:.0f} s, {update.before:.2f} GiB before, peak {update.peak:.2f} GiB = {ratio:.3f} x plan of "
        f"{update.planned:.2f} GiB (libraries, not counted: {update.libraries:.2f} GiB)",
        flush=True,
    )
    report = {**environment(arguments, device), "update": asdict(update)}
    name = f"update_{update.size}_{update.quantize or 'bfloat16'}.json"
    (output / name).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def measure(
    size: Size, method: str, num_steps: int, device: torch.device, repeats: int, with_floor: bool
) -> Measurement:
    """Time a method's step beside its floor, and take its peak memory."""
    trainer = make_trainer(size, method, num_steps, device)
    count = trainer.args.per_device_train_batch_size
    inputs = {"prompts": [size.prompt] * count, "metadata": [{}] * count, "indices": list(range(count))}

    def step() -> None:
        train_once(trainer, inputs)

    with recorded_calls(trainer) as calls:
        step()
    counts = (sum(not call.with_gradients for call in calls), sum(call.with_gradients for call in calls))
    floor = make_floor(trainer, calls, inputs) if with_floor else None
    if floor is not None:
        floor()
    steps, floors = [], []
    for _ in range(repeats if with_floor else 1):
        steps.append(seconds(step, device))
        if floor is not None:
            floors.append(seconds(floor, device))
    del calls, floor
    trainer.rollout_model.zero_grad(set_to_none=True)  # their memory belongs to the step
    return Measurement(
        method, num_steps, median(steps), median(floors) if floors else None, peak_mib(step, device), counts
    )


def make_trainer(size: Size, method: str, num_steps: int, device: torch.device) -> LeapAlignTrainer:
    config = LeapAlignConfig(
        output_dir="outputs/benchmark",
        max_steps=1,
        sample_num_steps=num_steps,
        sample_height=size.pixels,
        sample_width=size.pixels,
        activation_checkpointing=size.checkpointing,
        use_cpu=device.type == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dry_run=False,
        **{"per_device_train_batch_size": size.batch_size, **SETTINGS[method]},
    )
    pipeline = size.make_pipeline().to(device)
    pipeline.set_progress_bar_config(disable=True)
    reward = BlackBox(size.make_reward()) if method == BLACK_BOX else size.make_reward()
    return LeapAlignTrainer(pipeline, reward, config, train_dataset=[size.prompt])


def train_once(trainer: LeapAlignTrainer, inputs: dict[str, list]) -> None:
    """A training step without the optimizer's."""
    trainer.rollout_model.zero_grad(set_to_none=True)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.rollout_model, inputs)
    loss.backward()


@contextmanager
def recorded_calls(trainer: LeapAlignTrainer) -> Iterator[list[Call]]:
    """Take note of the denoisers' calls."""
    calls: list[Call] = []

    def record(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(Call(module, detached(args), detached(kwargs), torch.is_grad_enabled(), detached(output[0])))

    hooks = [each.register_forward_hook(record, with_kwargs=True) for each in trainer.denoisers.values()]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def detached(value: Any) -> Any:
    """The same structure with detached tensors; those that had a graph require gradients."""
    if isinstance(value, Tensor):
        return value.detach().requires_grad_(value.requires_grad)
    if isinstance(value, dict):
        return {key: detached(each) for key, each in value.items()}
    return type(value)(map(detached, value)) if isinstance(value, (list, tuple)) else value


def make_floor(trainer: LeapAlignTrainer, calls: list[Call], inputs: dict[str, list]) -> Callable[[], None]:
    """The bare calls one after another, the backward pass of those with gradients, decoding and reward with theirs."""
    with recorded_decoding(trainer.pipeline) as latents, torch.no_grad():
        images = trainer.rollout_model(inputs["prompts"], inputs["indices"]).images
    copies = len(images) // len(inputs["prompts"])

    def floor() -> None:
        trainer.rollout_model.zero_grad(set_to_none=True)
        results = []
        for call in calls:
            with torch.set_grad_enabled(call.with_gradients):
                results.append(call.module(*call.args, **call.kwargs)[0])
        decoded = trainer.pipeline.vae.decode(torch.cat(latents).detach().requires_grad_(), return_dict=False)[0]
        pictures = trainer.pipeline.image_processor.postprocess(decoded, output_type="pt")
        scores = trainer.rewards(pictures, inputs["prompts"] * copies, inputs["metadata"] * copies)
        scores.rewards.sum().backward()
        for result in filter(lambda each: each.requires_grad, reversed(results)):
            result.backward(torch.ones_like(result))

    return floor


@contextmanager
def recorded_decoding(pipeline: DiffusionPipeline) -> Iterator[list[Tensor]]:
    """Take note of what the decoder is given."""
    latents: list[Tensor] = []
    decode = pipeline.vae.decode

    def record(given: Tensor, *args: Any, **kwargs: Any) -> Any:
        latents.append(given.detach())
        return decode(given, *args, **kwargs)

    pipeline.vae.decode = record
    try:
        yield latents
    finally:
        del pipeline.vae.decode


def seconds(function: Callable[[], None], device: torch.device) -> float:
    """Time of one call."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_mib(function: Callable[[], None], device: torch.device) -> float:
    """Most memory of tensors during a call, above what was there before it, in MiB."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return (torch.cuda.max_memory_allocated(device) - before) / 2**20
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    changes = sorted(allocations(profile.profiler.kineto_results.experimental_event_tree()))
    current = peak = 0
    for _, change in changes:
        current += change
        peak = max(peak, current)
    return peak / 2**20


def allocations(events: list[Any]) -> Iterator[tuple[int, int]]:
    """Times and signed sizes of all allocations below profiler events."""
    stack = list(events)
    while stack:
        event = stack.pop()
        stack.extend(event.children)
        if event.tag == torch._C._profiler._EventType.Allocation:
            yield event.start_time_ns, event.extra_fields.alloc_size


def describe(measurement: Measurement) -> str:
    text = f"{measurement.method}, {measurement.num_steps} steps: {measurement.step_seconds:.2f} s"
    if measurement.floor_seconds is not None:
        text += f" = {measurement.step_seconds / measurement.floor_seconds:.3f} x floor"
    return (
        f"{text}, {measurement.peak_mib:.0f} MiB, calls {measurement.calls[0]} without and {measurement.calls[1]} with"
    )


def write(output: Path, arguments: argparse.Namespace, device: torch.device, measurements: list[Measurement]) -> None:
    """Write all measurements with what they were made on."""
    report = {**environment(arguments, device), "measurements": [asdict(each) for each in measurements]}
    (output / "step.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def environment(arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What measurements are made on."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_model()
    return {
        "commit": commit.stdout.strip(),
        "hardware": f"{hardware}, {torch.get_num_threads()} CPU threads",
        "torch": torch.__version__,
        "arguments": vars(arguments),
    }


def cpu_model() -> str:
    """Name of the processor, where the system tells."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in names:
        return platform.machine()
    return f"{names['model name']} (family {names.get('cpu family')}, model {names.get('model')})"


def draw_time(measurements: list[Measurement], path: Path) -> None:
    """Plot the steps beside their floors."""
    timed = [each for each in measurements if each.floor_seconds is not None]
    figure = Figure(figsize=(8, 0.45 * len(timed) + 1), layout="constrained")
    axes = figure.subplots()
    places = range(len(timed))
    axes.barh([place + 0.2 for place in places], [each.step_seconds for each in timed], 0.4, label="step")
    axes.barh([place - 0.2 for place in places], [each.floor_seconds for each in timed], 0.4, label="floor")
    axes.set_yticks(list(places), [each.method for each in timed])
    axes.set(xlabel=f"seconds, {timed[0].num_steps} sampling steps")
    axes.legend()
    figure.savefig(path, dpi=110)


def draw_memory(measurements: list[Measurement], path: Path) -> None:
    """Plot peak memory against the number of sampling steps."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(each.method for each in measurements):
        points = [(each.num_steps, each.peak_mib) for each in measurements if each.method == method]
        axes.plot(*zip(*points, strict=True), "o-", label=method)
    axes.set(xlabel="sampling steps", ylabel="peak memory of a step, MiB", yscale="log")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted({*SIZES, *TRUE_SIZES}), default="cpu")
    parser.add_argument("--methods", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--steps", nargs="+", type=int, default=DEFAULT_STEPS, help="floors are timed at the first")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", help="cuda if there is one, by default")
    parser.add_argument("--update", action="store_true", help="one whole update, and the plan of its memory")
    parser.add_argument("--quantize", choices=["nf4"], help="of the denoiser, in an update")
    parser.add_argument("--pixels", type=int, help="height and width in an update")
    parser.add_argument("--output_dir", default="outputs/benchmark")
    return parser.parse_args()


if __name__ == "__main__":
    main()
