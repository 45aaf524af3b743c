"""Training on quantized bases, and the optimizers of bitsandbytes."""

import copy
import logging
import tempfile

import pytest
import torch
from diffusers import BitsAndBytesConfig, PipelineQuantizationConfig
from training_cases import all_weights, make_trainer, same, sample, trained_weights

from examples.tiny import tiny_flux, tiny_sd3
from trl_leapalign.rollout import quantization
from trl_leapalign.rollout.quantization import (
    Quantization,
    chosen_components,
    num_bytes,
    quantization_of,
    quantize_linears,
    quantize_pipeline,
)

pytest.importorskip("bitsandbytes")
WAYS = {"nf4": Quantization(4), "nested": Quantization(4, nested=True), "int8": Quantization(8)}
NAMES = {"nf4": "bitsandbytes NF4", "nested": "bitsandbytes NF4", "int8": "bitsandbytes int8"}


@pytest.fixture(scope="module")
def saved():
    with tempfile.TemporaryDirectory() as folder:
        tiny_flux().save_pretrained(folder)
        yield folder


def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))


@pytest.mark.parametrize("way", WAYS)
def test_training_on_a_quantized_base_moves_adapters_alone_and_raises_the_reward(way, tmp_path):
    pipeline = tiny_flux()
    full = num_bytes(pipeline.transformer)
    saved_bytes = quantize_pipeline(pipeline, WAYS[way])
    assert list(saved_bytes) == ["transformer"] and saved_bytes["transformer"] == full - num_bytes(pipeline.transformer)
    assert saved_bytes["transformer"] > 0.4 * full
    assert quantization_of(pipeline.transformer) == NAMES[way]
    assert quantization_of(pipeline.text_encoder) is None
    before = all_weights(pipeline)
    settings = {"activation_checkpointing": True, "dry_run": True}
    trainer = make_trainer(tmp_path, pipeline, bright, prompts=["a red circle"], max_steps=8, **settings)
    start = trained_weights(trainer)
    trainer.train()
    after = all_weights(pipeline)
    assert same({key: value for key, value in after.items() if ".lora_" not in key}, before)
    assert all(not torch.equal(value, start[key]) for key, value in trained_weights(trainer).items())
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(rewards[-3:]) > sum(rewards[:3])


def test_the_adapter_of_a_quantized_base_works_on_the_full_precision_one(tmp_path):
    pipeline = tiny_flux()
    quantize_pipeline(pipeline, Quantization(4))
    trainer = make_trainer(tmp_path, pipeline, bright, prompts=["a red circle"], max_steps=8)
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "`transformer` by bitsandbytes NF4" in card and "loads on the full-precision base" in card
    full = tiny_flux()
    without = sample(full)
    full.load_lora_weights(tmp_path)
    assert sample(full).mean() > without.mean()
    # The same adapter put on the full-precision base by hand gives the same image.
    other = make_trainer(tmp_path / "other", tiny_flux(), bright, dry_run=False)
    with torch.no_grad():
        for name, parameter in other.rollout_model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(trained_weights(trainer)[name])
    torch.testing.assert_close(sample(full), sample(other.pipeline))


def test_gradients_through_a_quantized_base_are_those_of_its_rounded_weights():
    """In float64, on the weights that the 4 bits stand for."""
    from bitsandbytes.functional import dequantize_4bit

    torch.manual_seed(0)
    plain = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 3))
    quantized = copy.deepcopy(plain)
    assert quantize_linears(quantized, Quantization(4)) == ["0", "2"]
    rounded = copy.deepcopy(plain).double()
    for name in ("0", "2"):
        weight = quantized.get_submodule(name).weight
        rounded.get_submodule(name).weight.data = dequantize_4bit(weight.data, weight.quant_state).double()
    x = torch.randn(5, 64, requires_grad=True)
    y = x.detach().double().requires_grad_()
    with torch.no_grad():
        quantized.eval()(x)  # without gradients first, as inactive steps are
    [gradient] = torch.autograd.grad(quantized(x).square().sum(), x)
    [expected] = torch.autograd.grad(rounded(y).square().sum(), y)
    assert (gradient - expected).norm() <= 1e-5 * expected.norm()


def test_a_model_on_the_meta_device_is_quantized_layer_by_layer():
    with torch.device("meta"):
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64, bias=False))
    with pytest.raises(ValueError, match="0 is on the meta device"):
        quantize_linears(model, Quantization(4))
    seen = []

    def initialise(name, tensor):
        seen.append(name)
        tensor.normal_(generator=torch.Generator().manual_seed(len(seen)))

    quantize_linears(model, Quantization(4), initialise=initialise)
    assert seen == ["0.weight", "0.bias", "1.weight"]
    assert model(torch.ones(2, 64)).isfinite().all()
    with pytest.raises(ValueError, match="Sequential has no linear layers to quantize"):
        quantize_linears(model, Quantization(8))


LOADED = {
    "flag": ({"load_in_4bit": True}, "bitsandbytes NF4"),
    "flag and type": ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "bitsandbytes FP4"),
    "int8": ({"load_in_8bit": True}, "bitsandbytes int8"),
    "dict": ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes NF4"),
    "BitsAndBytesConfig": ({"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}, "bitsandbytes int8"),
    "backend": (
        {
            "quantization_config": {
                "quant_backend": "bitsandbytes_8bit",
                "quant_kwargs": {"load_in_8bit": True},
                "components_to_quantize": ["transformer"],
            }
        },
        "bitsandbytes int8",
    ),
    "mapping": (
        {
            "quantization_config": PipelineQuantizationConfig(
                quant_mapping={"transformer": BitsAndBytesConfig(load_in_8bit=True)}
            )
        },
        "bitsandbytes int8",
    ),
}


@pytest.mark.parametrize("case", LOADED)
def test_a_pipeline_given_by_name_is_quantized_when_it_is_loaded(case, saved, tmp_path):
    init_kwargs, expected = LOADED[case]
    trainer = make_trainer(tmp_path, saved, model_init_kwargs=init_kwargs)
    assert quantization_of(trainer.pipeline.transformer) == expected
    assert quantization_of(trainer.pipeline.text_encoder) is None


REFUSED = {
    "both": ({"load_in_4bit": True, "load_in_8bit": True}, {}, ValueError, "Choose one"),
    "type alone": ({"bnb_4bit_quant_type": "nf4"}, {}, ValueError, "no effect without load_in_4bit"),
    "unknown type": ({"load_in_4bit": True, "bnb_4bit_quant_type": "int3"}, {}, ValueError, "'int3' is unknown"),
    "nested int8": ({"load_in_8bit": True, "use_bnb_nested_quant": True}, {}, ValueError, "is for 4 bits"),
    "twice": ({"load_in_4bit": True, "quantization_config": {"load_in_8bit": True}}, {}, ValueError, "both given"),
    "unknown": ({"quantization_config": {"bits": 4}}, {}, ValueError, "not understood"),
    "kind": ({"quantization_config": 4}, {}, TypeError, "must be a diffusers.PipelineQuantizationConfig"),
    "full": ({"load_in_4bit": True}, {"full_finetuning": True}, ValueError, "only an adapter on them: use LoRA"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_quantized_so_is_refused(case, saved, tmp_path):
    init_kwargs, settings, error, message = REFUSED[case]
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, saved, model_init_kwargs=init_kwargs, **settings)


def test_a_loaded_pipeline_is_not_quantized_silently(tmp_path):
    with pytest.raises(ValueError, match=r"no effect on a pipeline that is loaded.*quantize_pipeline"):
        make_trainer(tmp_path, tiny_flux(), model_init_kwargs={"load_in_4bit": True})


@pytest.mark.parametrize("backend", ["gguf", "nunchaku_lite", "bfl", "auto-round"])
def test_back_ends_that_cannot_be_trained_are_refused_by_name(backend, tmp_path):
    class Quantizer:
        is_trainable = False

        class quantization_config:
            quant_method = backend

    pipeline = tiny_flux()
    pipeline.transformer.hf_quantizer = Quantizer()
    with pytest.raises(ValueError, match=f"The transformer is quantized by {backend}, through which no LoRA"):
        make_trainer(tmp_path, pipeline)


def test_weights_of_gguf_are_refused_by_name(tmp_path):
    pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFParameter

    pipeline = tiny_flux()
    layer = pipeline.transformer.transformer_blocks[0].attn.to_q
    layer.weight = GGUFParameter(layer.weight.data, requires_grad=False, quant_type=0)
    with pytest.raises(ValueError, match="quantized by gguf"):
        make_trainer(tmp_path, pipeline)


def test_components_are_chosen_by_their_size(saved, tmp_path, monkeypatch):
    from pathlib import Path

    assert chosen_components(Path(saved)) == {"transformer": "diffusers"}
    monkeypatch.setattr(quantization, "LARGE", 50_000)
    chosen = chosen_components(Path(saved))
    assert chosen.keys() == {"transformer", "text_encoder", "text_encoder_2"} and "vae" not in chosen
    assert chosen["text_encoder"] == "transformers"
    pipeline = tiny_sd3()
    assert quantize_pipeline(pipeline, Quantization(4)).keys() == chosen.keys() | {"text_encoder_3"}
    with pytest.raises(ValueError, match="The transformer is quantized already, by bitsandbytes NF4"):
        quantize_pipeline(pipeline, Quantization(4), ["transformer"])
    with pytest.raises(ValueError, match=r"no modules called \['unet'\]"):
        quantize_pipeline(pipeline, Quantization(4), ["unet"])


@pytest.mark.parametrize("optim", ["adamw_bnb_8bit", "paged_adamw_8bit", "paged_adamw_32bit"])
def test_optimizers_of_bitsandbytes_train_and_resume(optim, tmp_path, caplog):
    settings = {"optim": optim, "max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    caplog.set_level(logging.ERROR)
    whole = make_trainer(tmp_path / "whole", tiny_flux(), **settings)
    start = trained_weights(whole)
    whole.train()
    assert type(whole.optimizer.optimizer).__module__.startswith("bitsandbytes")
    assert any(not torch.equal(value, start[key]) for key, value in trained_weights(whole).items())
    resumed = make_trainer(tmp_path / "resumed", tiny_flux(), **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert same(trained_weights(resumed), trained_weights(whole))
