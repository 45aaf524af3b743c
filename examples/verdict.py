"""Align the shapes pipeline with the judge's verdict alone: 0 or 1 for a picture, and no gradient.

    python examples/verdict.py                       # the verdict, BlackBox(is_right)
    python examples/verdict.py --reward analytic     # the quick start's differentiable reward beside it

The world, the pipeline, the prompts and the evaluation are those of quickstart.py. Writes results.json; a run that was
stopped goes on from its last checkpoint when it is started again.
"""

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

from peft import LoraConfig

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from examples.quickstart import comparison_table, load, training_config, training_rows  # noqa: E402
from examples.shapes import evaluator, world  # noqa: E402
from examples.shapes.reward import nearness_first  # noqa: E402
from trl_leapalign import LeapAlignConfig, LeapAlignTrainer  # noqa: E402
from trl_leapalign.rewards import BlackBox  # noqa: E402
from trl_leapalign.training.checkpoints import last_checkpoint  # noqa: E402


def main() -> None:
    arguments = parse_arguments()
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    rows = evaluator.balanced(world.prompt_rows(arguments.split), arguments.num_images)
    pipeline = load()
    before = evaluator.score(evaluator.sample(pipeline, rows), rows)
    trainer = LeapAlignTrainer(
        pipeline,
        BlackBox(evaluator.is_right) if arguments.reward == "verdict" else nearness_first,
        make_config(arguments),
        train_dataset=world.prompt_rows("train", per_tag=60) if arguments.all_tasks else training_rows(),
        peft_config=LoraConfig(r=32, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"]),
    )
    start = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_checkpoint(output) if list(output.glob("checkpoint-*")) else None)
    seconds = time.perf_counter() - start
    trainer.save_model()
    after = evaluator.score(evaluator.sample(pipeline, rows), rows)
    print(comparison_table(before, after))
    print(f"\nTrained for {seconds:.0f} s, {trainer.state.global_step} updates in all.")
    results = {
        "arguments": vars(arguments),
        "before": {**before.accuracy, "overall": before.overall},
        "after": {**after.accuracy, "overall": after.overall},
        "history": trainer.state.log_history,
    }
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def make_config(arguments: argparse.Namespace) -> LeapAlignConfig:
    """The quick start's settings; for the verdict, groups of samples and no limit on their gradients."""
    config = training_config(arguments)
    checkpoints = {"save_strategy": "steps", "save_steps": 40, "save_total_limit": 1}
    if arguments.reward == "analytic":
        return replace(config, **checkpoints)
    return replace(
        config,
        **checkpoints,
        samples_per_prompt=arguments.samples_per_prompt,
        max_sample_grad_norm=None,
        method_kwargs={"pairs_per_rollout": 2},
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--reward", choices=["verdict", "analytic"], default="verdict")
    parser.add_argument("--output_dir", default="outputs/verdict", help="where results, adapter and checkpoints go")
    parser.add_argument("--seed", type=int, default=0, help="of the training run")
    parser.add_argument("--max_steps", type=int, default=360, help="updates of 24 images")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of the LoRA adapter")
    parser.add_argument("--samples_per_prompt", type=int, default=4, help="pictures that are compared with each other")
    parser.add_argument("--all_tasks", action="store_true", help="train on attribute binding too")
    parser.add_argument("--split", default="held-out", choices=["held-out", "tuning"], help="prompts of the evaluation")
    parser.add_argument("--num_images", type=int, default=1000, help="pictures of an evaluation")
    return parser.parse_args()


if __name__ == "__main__":
    main()
