"""The programs in the docs run."""

import re
from pathlib import Path

import torch
from recordings import errors, gradients, record
from rollout_cases import Case, seeded

from trl_leapalign import LeapAlignConfig
from trl_leapalign.rollout.run import run_rollout
from trl_leapalign.training.watch import check_limits

DOCS = Path(__file__).parent.parent / "docs"


def programs(name):
    return re.findall(r"```python\n(.*?)```", (DOCS / name).read_text(encoding="utf-8"), re.DOTALL)


def test_your_own_method_has_the_gradient_that_it_says(tmp_path):
    method_program, config_program = programs("your_own_method.md")
    assert len(method_program.splitlines()) <= 41
    names = {}
    exec(compile(method_program, "your_own_method.md", "exec", dont_inherit=True), names)
    names["LeapAlignConfig"] = lambda output_dir, **settings: LeapAlignConfig(str(tmp_path), **settings)
    exec(config_program, names)
    method = names["config"].build_method()
    assert method.sharpness == 2.0

    case = Case("sd3", dtype=torch.float64)
    recording, pipeline = record(case, 5), case.pipeline()
    output = run_rollout(pipeline, method, method_generator=seeded(0), **case.inputs(5), output_type="latent")
    assert torch.equal(output.images, recording.latents[-1])
    (step,) = output.active_steps
    path = -recording.sigmas[step] * recording.velocity(step, recording.latents[step])
    assert errors(gradients(pipeline, output.images), gradients(recording.pipeline, path))[0] < 1e-9
    assert torch.equal(output.weights, 1 / output.metrics["d_0"].clamp(min=0.1))


def test_methods_are_chosen_as_the_page_says():
    (program,) = programs("methods.md")
    names = {"configs": []}
    names["LeapAlignConfig"] = lambda **settings: names["configs"].append(LeapAlignConfig("outputs", **settings))
    exec("from trl_leapalign import FlowBPBridge\n" + program, names)
    first, second = (config.build_method() for config in names["configs"])
    assert first == second


def test_guards_are_set_as_the_page_says():
    names = {"configs": []}
    names["LeapAlignConfig"] = lambda *args, **settings: names["configs"].append(LeapAlignConfig(*args, **settings))
    first, second = programs("guards.md")
    exec(first.replace("from trl_leapalign import LeapAlignConfig", ""), names)
    exec(second, names)
    assert [config.watch_steps for config in names["configs"]] == [20, 25]
    for config in names["configs"]:
        check_limits(config.watch_limits)
