"""Rollouts of random settings: is the image the pipeline's own, is the gradient finite, is a second run the same?

    python tests/rollout/random_settings.py --count 500 --seed 0

Each setting follows from one number, which is printed if it fails; `--seed` NUMBER with `--count 1` runs it again.
"""

import argparse
import logging
import random
import sys
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

from rollout_cases import Case, snapshot, trained_parameters  # noqa: E402

from trl_leapalign.methods import METHODS, Method  # noqa: E402
from trl_leapalign.rollout.rollout_model import RolloutModel  # noqa: E402

SOLVERS = {
    "flux": ("euler", "stochastic_euler", "unipc", "dpm", "lcm"),
    "sd3": ("euler", "stochastic_euler", "inverted_euler", "heun", "unipc", "dpm", "lcm"),
}
CHOICES: dict[str, dict[str, tuple]] = {
    "leapalign": {
        "gradient_discount": (0.0, 0.1, 0.3, 1.0),
        "similarity_floor": (0.1, 1.0),
        "num_leaps": (1, 2, 3),
        "nested_gradient_only": (False, True),
        "pairs_per_rollout": (1, 2),
    },
    "refl": {"num_late_steps": (None, 1, 2)},
    "draft": {"num_last_steps": (1, 2, None), "random_truncation": (False, True)},
    "draft_lv": {"num_copies": (1, 2, 3)},
    "drtune": {"num_train_steps": (1, 2)},
    "flowbp_sparse": {"num_active_steps": (1, 2), "gradient_rescale": (0.5, 1.0)},
    "flowbp_bridge": {"num_active_steps": (2, 3), "gradient_discount": (0.0, 0.1)},
    "flowbp_lagrange": {"order": (1, 2), "gradient_discount": (0.0, 0.1)},
}
STOPS_EARLY = ("refl", "drtune")
"""Methods that reward another image than the sampler's."""
WORDS = ("a", "red", "blue", "circle", "two", "squares", "cat", "dog", "above", "left", "of", "the")
DTYPES = (torch.float32, torch.float32, torch.bfloat16, torch.float64)


class Refused(Exception):
    """The settings contradict each other, and the library says so."""


@dataclass(frozen=True)
class Setting:
    """One random setting.

    Args:
        case (Case): pipeline, solver, guidance, what is trained, dtype.
        method (str): name of the method.
        options (dict): its settings.
        num_steps (int): sampling steps.
        batch (int): samples of a rollout.
        accumulation (int): rollouts whose gradients are added up.
        base_penalty (bool): whether the distance to the base is measured too.
        seed (int): of noise and choices.
    """

    case: Case
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    num_steps: int = 4
    batch: int = 1
    accumulation: int = 1
    base_penalty: bool = False
    seed: int = 0

    @classmethod
    def draw(cls, seed: int) -> "Setting":
        """The setting that follows from a number."""
        draw = random.Random(seed)
        family = draw.choice(sorted(SOLVERS))
        trained = draw.choice(("lora", "lora", "full"))
        case = Case(
            family,
            draw.choice(SOLVERS[family]),
            guided=draw.random() < 0.4,
            trained=trained,
            checkpointing=draw.random() < 0.25,
            dtype=draw.choice(DTYPES),
        )
        method = draw.choice(sorted(METHODS))
        options = {name: draw.choice(values) for name, values in CHOICES[method].items() if draw.random() < 0.6}
        return cls(
            case,
            method,
            options,
            num_steps=draw.randint(3, 10),
            batch=draw.randint(1, 3),
            accumulation=draw.randint(1, 3),
            base_penalty=trained == "lora" and draw.random() < 0.3,
            seed=draw.randrange(2**31),
        )

    def call_kwargs(self) -> dict[str, Any]:
        inputs = self.case.inputs(self.num_steps)
        del inputs["prompt"], inputs["generator"]
        if "negative_prompt" in inputs:
            inputs["negative_prompt"] = "a dog"
        return inputs

    def batches(self) -> list[dict[str, list]]:
        draw = random.Random(self.seed)
        numbers = [range(n * self.batch, (n + 1) * self.batch) for n in range(self.accumulation)]
        return [
            {
                "prompts": [" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) for _ in own],
                "indices": list(own),
                "metadata": [{} for _ in own],
            }
            for own in numbers
        ]


def check(setting: Setting) -> None:
    """Run a setting twice.

    Raises:
        Refused: if the method does not work with so few steps, or with this solver.
        AssertionError: if anything is not as promised.
    """
    first, second = run(setting), run(setting)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert not different, f"two runs differ in {different[:3]}"


def run(setting: Setting) -> dict[str, Tensor]:
    """Images and gradients of a setting, checked."""
    try:
        method: Method = METHODS[setting.method](**setting.options)
    except ValueError as error:
        raise Refused(str(error)) from error
    torch.manual_seed(setting.seed)
    pipeline = setting.case.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    denoisers = {"transformer": pipeline.transformer}
    size = setting.batch * setting.accumulation
    model = RolloutModel(
        pipeline, denoisers, method, setting.call_kwargs(), setting.seed, size, base_penalty=setting.base_penalty
    )
    state, results = torch.get_rng_state(), {}
    for number, batch in enumerate(setting.batches()):
        plain = model.sample(**batch)  # which leaves attributes behind that were not there before
        before, hooks = snapshot(pipeline), count_hooks(pipeline)
        try:
            output = model(**batch)
        except ValueError as error:
            if "steps" not in str(error):
                raise
            raise Refused(str(error)) from error
        after = snapshot(pipeline)
        changed = [name for name in before if name != "attributes" and before[name] != after[name]]
        assert not changed, f"the pipeline is not as it was: {changed}"
        assert count_hooks(pipeline) == hooks, "hooks were left behind"
        assert torch.equal(torch.get_rng_state(), state), "the random state is not as it was"
        if setting.method not in STOPS_EARLY and setting.options.get("reward_input", "sample") == "sample":
            assert torch.equal(output.images[: len(plain)], plain), "the image is not the pipeline's own"
        assert output.images.isfinite().all() and output.weights.isfinite().all(), "not finite"
        loss = (output.weights * output.images.flatten(1).mean(1)).mean() / setting.accumulation
        loss = loss if output.penalty is None else loss + output.penalty.mean()
        loss.backward()
        results[f"images {number}"] = output.images.detach()
    gradients = {name: p.grad for name, p in trained_parameters(pipeline).items() if p.grad is not None}
    assert gradients and all(gradient.isfinite().all() for gradient in gradients.values()), "gradients are not finite"
    assert any(gradient.any() for gradient in gradients.values()), "all gradients are zero"
    return results | gradients


def count_hooks(pipeline: Any) -> int:
    modules = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for part in modules for m in part.modules())


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(count: int, seed: int) -> list[int]:
    """Check settings `seed` to `seed + count - 1`, print what happened and return the numbers that failed."""
    refused: Counter[str] = Counter()
    failed = []
    for number in range(seed, seed + count):
        setting = Setting.draw(number)
        try:
            check(setting)
        except Refused as error:
            refused[str(error)[:60]] += 1
        except Exception:
            failed.append(number)
            say(f"FAILED: seed {number}: {setting}\n{traceback.format_exc()}")
        if (number - seed) % 50 == 49:
            say(f"{number - seed + 1} of {count} done, {len(failed)} failed")
    say(f"{count} settings from seed {seed}: {len(failed)} failed {failed}, {sum(refused.values())} refused:")
    for message, times in refused.most_common():
        say(f"  {times} x {message}...")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    sys.exit(1 if main(**vars(parser.parse_args())) else 0)
