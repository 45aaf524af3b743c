"""Methods, hooks and compiled models that a rollout must see through, or refuse."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import random_settings
import torch
from diffusers import FlowMapEulerDiscreteScheduler
from rollout_cases import Case, seeded

from examples.tiny import tiny_flux
from trl_leapalign.methods import DRaFT, DRaFTLV, LeapAlign, Method, Outcome, Plan
from trl_leapalign.methods.draft import SolverTrajectory
from trl_leapalign.rollout.hooks import around_calls, check_repeatable
from trl_leapalign.rollout.rollout_model import RolloutModel
from trl_leapalign.rollout.run import run_rollout


class Bent(SolverTrajectory):
    """Does something wrong."""

    def __init__(self, bend: dict[str, Any]):
        super().__init__()
        self.bend = bend

    def enter(self, step, latents):
        super().enter(step, latents)
        return self.bend["enter"](latents) if "enter" in self.bend else latents

    def outcome(self):
        return self.bend["outcome"](super().outcome()) if "outcome" in self.bend else super().outcome()


@dataclass(frozen=True)
class Own(Method):
    """A method of the user's."""

    planned: Any = field(default_factory=lambda: Plan((2,), through_solver=True))
    follows: bool = True
    bend: dict[str, Any] = field(default_factory=dict)

    def plan(self, schedule, generator):
        return self.planned

    def follow(self, plan, schedule):
        return Bent(self.bend) if self.follows else None


WRONG = {
    "no plan": (Own(None), TypeError, r"Own.plan\(\) returned None. Return a Plan"),
    "stop": (Own(Plan((0,), stop=99)), ValueError, "stops after step 99, but the 3 steps are 0 to 2"),
    "negative stop": (Own(Plan((0,), stop=-1)), ValueError, "stops after step -1"),
    "after the stop": (Own(Plan((2,), stop=1)), ValueError, "steps that are taken are 0 to 1"),
    "no steps": (Own(Plan(())), ValueError, "at least one step"),
    "steps twice": (Own(Plan((1, 1))), ValueError, "each once"),
    "step beyond": (Own(Plan((3,))), ValueError, "0 to 2"),
    "step of a float": (Own(Plan((1.0,))), ValueError, "step number"),
    "copies": (Own(Plan((2,), copies=-1)), ValueError, "copies=-1"),
    "stop and copies": (Own(Plan((2,), stop=2, copies=1)), ValueError, "Drop one"),
    "no trajectory": (Own(follows=False), TypeError, r"Own.follow\(\) returned None"),
    "batch that shrinks": (Own(bend={"enter": lambda x: x[:1]}), ValueError, "latents of shape"),
    "latents of another shape": (Own(bend={"enter": lambda x: x.flatten(1)}), ValueError, "Return the latents"),
    "no latents": (Own(bend={"enter": lambda x: None}), TypeError, "returned a NoneType"),
    "no outcome": (Own(bend={"outcome": lambda o: None}), TypeError, "Return an Outcome"),
    "weights of one": (Own(bend={"outcome": lambda o: Outcome(o.weights[:1])}), ValueError, "weights of shape"),
    "weights with a graph": (
        Own(bend={"outcome": lambda o: Outcome(o.weights.clone().requires_grad_())}),
        ValueError,
        "Detach them",
    ),
    "metric of a number": (Own(bend={"outcome": lambda o: replace(o, metrics={"a": 1})}), ValueError, "gives a of"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_method_that_is_wrong_is_named(name):
    method, kind, message = WRONG[name]
    case = Case("flux")
    pipeline = case.pipeline()
    with pytest.raises(kind, match=message):
        run_rollout(pipeline, method, method_generator=seeded(0), **case.inputs(3))
    assert not {"step", "set_timesteps"} & vars(pipeline.scheduler).keys()


def test_a_method_of_ones_own_that_is_right_is_draft():
    case = Case("flux")
    own, draft = (run_rollout(case.pipeline(), each, **case.inputs(3)) for each in (Own(), DRaFT(1)))
    assert torch.equal(own.images, draft.images)


@pytest.mark.parametrize("family", ["flux", "sd3"])
@pytest.mark.parametrize("copies", [1, 2, 5])
def test_copies_do_not_change_a_single_samples_image(family, copies):
    case = Case(family)
    pipeline = case.pipeline()
    inputs = {**case.inputs(4), "prompt": "a red circle"}
    expected = pipeline(**{**inputs, "generator": seeded(1)}, output_type="pt", return_dict=False)[0]
    output = run_rollout(pipeline, DRaFTLV(copies), **inputs)
    assert torch.equal(output.images[:1], expected)
    assert output.images.shape[0] == copies + 1 and output.images.requires_grad


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_a_compiled_denoiser_gives_the_same_and_compiles_once(whole):
    torch._dynamo.reset()
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    case, results = Case("flux"), []
    for compiles in (False, True):
        pipeline = case.pipeline()
        if compiles and whole:
            pipeline.transformer.compile(backend=backend)
        elif compiles:
            pipeline.transformer.compile_repeated_blocks(backend=backend)
        model = RolloutModel(
            pipeline,
            {"transformer": pipeline.transformer},
            LeapAlign(),
            {key: value for key, value in case.inputs(4).items() if key not in ("prompt", "generator")},
            seed=0,
            draw_group_size=1,
            base_penalty=True,
        )
        rollouts, counts = [], []
        for _ in range(3):
            output = model(["a red circle"], [0])
            (output.images.sum() + output.penalty.sum()).backward()
            rollouts.append(output.images.detach())
            counts.append(len(compiled))
        gradients = [p.grad for p in pipeline.transformer.parameters() if p.grad is not None]
        results.append((rollouts, gradients))
    assert counts[0] > 0 and counts[1] == counts[0] == counts[2]
    (eager, expected), (images, gradients) = results
    assert all(map(torch.equal, images, eager))
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.allclose(gradient, other, rtol=1e-4, atol=1e-6 * other.abs().max().item())
    torch._dynamo.reset()


def test_functions_around_a_compiled_module_run_and_go():
    module, seen = torch.nn.Linear(1, 1), []
    module.compile(backend="eager")
    own = module._compiled_call_impl
    after = lambda module, args, kwargs, output: seen.append(output)  # noqa: E731
    with around_calls(module, lambda: seen.append("before"), after):
        output = module(torch.ones(1))
    assert seen[0] == "before" and seen[1] is output
    assert module._compiled_call_impl is own
    torch._dynamo.reset()


def test_hooks_without_state_may_be_called_twice():
    pipeline = tiny_flux()
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    check_repeatable([("transformer", pipeline.transformer)])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_choices_from_a_generator_on_the_gpu():
    case = Case("flux")
    generators = [torch.Generator("cuda").manual_seed(3) for _ in range(2)]
    steps = [
        [run_rollout(case.pipeline(), LeapAlign(), method_generator=each, **case.inputs(8)).active_steps] * 2
        for each in generators
    ]
    assert steps[0] == steps[1]


def test_ten_random_settings():
    assert random_settings.main(count=10, seed=1000) == []


def test_average_velocities_are_refused_for_what_they_are():
    pipeline = tiny_flux()
    pipeline.scheduler = FlowMapEulerDiscreteScheduler()
    with pytest.raises(ValueError, match="average velocity"):
        run_rollout(pipeline, LeapAlign(), prompt="a cat", height=16, width=16, num_inference_steps=3)
