"""What `trl-leapalign check` finds on tiny pipelines."""

import logging
from dataclasses import replace

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler
from PIL import Image
from pipeline_cases import CASES

from examples.tiny import tiny_flux, tiny_sd3
from examples.tiny_edit import tiny_qwen_image_edit
from examples.tiny_video import tiny_wan
from trl_leapalign import LeapAlignConfig
from trl_leapalign.cli import check as check_module
from trl_leapalign.cli.check import check
from trl_leapalign.cli.main import main

SIZE = {"sample_height": 16, "sample_width": 16}


def settings(tmp_path, **more):
    return LeapAlignConfig(str(tmp_path), **{"sample_num_steps": 3, "use_cpu": True, **SIZE, **more})


def test_a_pipeline_that_can_be_trained(tmp_path):
    pipeline = tiny_sd3()
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    found = check(pipeline, settings(tmp_path, sample_guidance_scale=1.0))
    assert found.trainable and found.identical and found.name == "StableDiffusion3Pipeline"
    assert found.schedulers == ("FlowMatchEulerDiscreteScheduler (flow matching, shift 3.0)",)
    assert found.num_steps == 3 and len(found.active_steps) == 2
    transformer = found.denoisers["transformer"]
    assert transformer.calls_per_step == 1 and transformer.num_parameters == len(
        [name for name in pipeline.transformer.state_dict() if "lora_" in name]
    )
    assert transformer.grad_norm > 0
    assert found.output.startswith("(2, 3, 16, 16) torch.float32, images")
    assert found.checkpointing == "keeps the output and the gradients"
    assert (
        found.lora == 'loaded with pipeline.load_lora_weights("FOLDER", weight_name="pytorch_lora_weights.safetensors")'
    )
    assert "activation_checkpointing=True" in found.settings[0]
    assert not pipeline.transformer.is_gradient_checkpointing
    after = {name.replace(".base_layer", ""): value for name, value in pipeline.transformer.state_dict().items()}
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert not list(tmp_path.iterdir())
    text = found.markdown()
    assert "It can be trained." in text and "same output as a plain call | yes, bit for bit" in text


def test_calls_are_counted_by_step(tmp_path):
    """Heun makes 2 T - 1 steps, and true guidance calls the transformer twice."""
    pipeline = tiny_sd3()
    pipeline.scheduler = FlowMatchHeunDiscreteScheduler(shift=1.0)
    found = check(pipeline, settings(tmp_path, activation_checkpointing=True))
    assert found.num_steps == 5 and found.denoisers["transformer"].calls_per_step == 1
    kwargs = {"max_sequence_length": 16, "true_cfg_scale": 2.0, "negative_prompt": "a dog"}
    found = check(tiny_flux(), settings(tmp_path, sample_kwargs=kwargs), ["a red circle"])
    assert found.num_steps == 3 and found.denoisers["transformer"].calls_per_step == 2
    assert any(setting.startswith("a guidance with one call") for setting in found.settings)


def test_loops_in_step_with_each_other_count_once(tmp_path):
    """Video and audio: one call of the transformer for both of their streams, three with this guidance."""
    case = next(case for case in CASES if str(case) == "LTX2Pipeline")
    kwargs = case.inputs()
    size = {f"sample_{name}": kwargs.pop(name) for name in ("height", "width")}
    num_steps, prompt = kwargs.pop("num_inference_steps"), kwargs.pop("prompt")
    del kwargs["generator"]
    guidance = {"sample_guidance_scale": kwargs.pop("guidance_scale")} if "guidance_scale" in kwargs else {}
    config = settings(tmp_path, sample_num_steps=num_steps, sample_kwargs=kwargs, **size, **guidance)
    found = check(case.build(), config, [prompt])
    assert found.trainable and found.num_steps == num_steps
    assert found.denoisers["transformer"].calls_per_step == 3


def test_with_the_settings_of_a_training_and_a_method_that_adds_copies(tmp_path):
    more = {"eval_strategy": "steps", "save_strategy": "best", "metric_for_best_model": "rewards/hpsv2.1/x"}
    config = settings(tmp_path, method="draft_lv", sample_kwargs={"max_sequence_length": 16}, **more)
    found = check(tiny_flux(), config, ["a red circle"])
    assert found.trainable and found.identical and found.active_steps == (2, 3, 4)
    assert found.num_steps == 3 and found.denoisers["transformer"].calls_per_step == 1
    assert found.output.startswith("(2, 3, 16, 16)")


def test_settings_that_a_trial_does_without(tmp_path):
    more = {"eval_strategy": "steps", "eval_steps": 5, "eval_prompts": ["a cat"], "base_penalty": 0.1}
    config = settings(tmp_path, lr_scheduler_type="reduce_lr_on_plateau", **more)
    found = check(tiny_sd3(), replace(config, sample_guidance_scale=1.0))
    assert found.trainable and found.denoisers["transformer"].calls_per_step == 1


def test_checkpointing_that_changes_the_output(tmp_path):
    pipeline = tiny_flux()
    pipeline.transformer.transformer_blocks[0].register_forward_hook(
        lambda module, args, output: tuple(2 * value for value in output) if enabled() else output
    )

    def enabled():
        return pipeline.transformer.is_gradient_checkpointing and torch.is_grad_enabled()

    found = check(pipeline, settings(tmp_path, sample_kwargs={"max_sequence_length": 16}), ["a red circle"])
    assert found.trainable and found.identical
    assert found.checkpointing.startswith("not possible: Gradient checkpointing changes the output")
    assert found.settings[0] == "activation_checkpointing=False"
    assert not pipeline.transformer.is_gradient_checkpointing and not pipeline.vae.is_gradient_checkpointing


def test_video_and_two_transformers(tmp_path):
    kwargs = {"max_sequence_length": 16, "num_frames": 5}
    found = check(tiny_wan(boundary_ratio=0.9), settings(tmp_path, sample_kwargs=kwargs, sample_guidance_scale=1.0))
    assert found.trainable and set(found.denoisers) == {"transformer", "transformer_2"}
    assert sum(each.calls_per_step for each in found.denoisers.values()) == pytest.approx(1)
    assert "(2, 5, 3, 16, 16) torch.float32, video" in found.output
    assert any("VideoReward" in setting for setting in found.settings)


def test_an_edit_without_and_with_its_image(tmp_path):
    config = settings(tmp_path, sample_height=64, sample_width=64, sample_num_steps=2)
    found = check(tiny_qwen_image_edit(), config, ["a blue square"])
    assert not found.trainable and found.images == ("image",)
    assert "called without image" in found.problem and "give the prompts a column called so" in found.problem
    rows = [{"prompt": "a blue square", "image": Image.new("RGB", (64, 64), color)} for color in ("red", "green")]
    found = check(tiny_qwen_image_edit(), config, rows)
    assert found.trainable and found.identical
    assert found.num_steps == 2 and found.denoisers["transformer"].calls_per_step == 1
    assert "pipeline_columns={'image': 'image'}" in found.settings


def test_a_pipeline_that_does_not_sample_by_flow_matching(tmp_path):
    pipeline = tiny_sd3()
    pipeline.scheduler = DDIMScheduler()
    found = check(pipeline, settings(tmp_path))
    assert not found.trainable and "does not sample by flow matching: it has DDIMScheduler" in found.problem
    assert found.schedulers == ("DDIMScheduler (no flow matching)",)
    assert "It cannot be trained: ValueError" in found.markdown()


def broken():
    pipeline = tiny_flux()
    pipeline.scheduler = DDIMScheduler()
    return pipeline


@pytest.mark.parametrize(("source", "status"), [("tiny_flux", None), ("broken", 1)])
def test_the_command(source, status, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = "examples.tiny:tiny_flux" if source == "tiny_flux" else f"{__name__}:broken"
    options = ["--sample_height", "16", "--sample_width", "16", "--sample_kwargs", '{"max_sequence_length": 16}']
    arguments = ["check", name, *options, "--use_cpu", "--sample_num_steps", "2", "--output_dir", str(tmp_path / "out")]
    if status is None:
        main(arguments)
        assert "It can be trained." in capsys.readouterr().out
    else:
        with pytest.raises(SystemExit) as exit:
            main(arguments)
        assert exit.value.code == status
        assert "DDIMScheduler" in capsys.readouterr().out


def test_memory_that_is_not_enough_is_told_apart(tmp_path, monkeypatch, caplog):
    def fail(*arguments, **settings):
        raise torch.OutOfMemoryError("tried to allocate 2 GiB")

    monkeypatch.setattr(check_module, "LeapAlignTrainer", fail)
    with caplog.at_level(logging.DEBUG, "trl_leapalign"):
        found = check(tiny_flux(), settings(tmp_path))
    assert found.out_of_memory and not found.trainable
    assert "is not known, since the memory" in found.markdown() and "2 GiB" in found.markdown()
    assert "cannot be trained" not in found.markdown()
    assert "Traceback" in caplog.text and "in fail" in caplog.text
