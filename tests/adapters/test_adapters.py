import pytest
import torch
from diffusers import FluxTransformer2DModel
from peft import LoraConfig
from pipeline_cases.images import lumina
from torch import nn

from examples.tiny import tiny_flux, tiny_sd3
from trl_leapalign.adapters.lora import attach_lora, default_lora, find_denoisers, prepare_denoisers
from trl_leapalign.adapters.restored import restored_on_error
from trl_leapalign.adapters.saving import LORA_FILE, lora_state_dict, save_trained

FLUX_TARGETS = {
    *(f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "to_add_out")),
    *(f"transformer_blocks.0.attn.add_{name}_proj" for name in "qkv"),
    *(f"transformer_blocks.0.{part}.net.{layer}" for part in ("ff", "ff_context") for layer in ("0.proj", "2")),
    *(f"single_transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v")),
    *(f"single_transformer_blocks.0.{name}" for name in ("proj_mlp", "proj_out")),
}
SD3_TARGETS = {
    *(f"transformer_blocks.{i}.attn.{name}" for i in (0, 1) for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"transformer_blocks.{i}.attn.add_{name}_proj" for i in (0, 1) for name in "qkv"),
    *(f"transformer_blocks.{i}.ff.net.{layer}" for i in (0, 1) for layer in ("0.proj", "2")),
    "transformer_blocks.0.attn.to_add_out",
    *(f"transformer_blocks.0.ff_context.net.{layer}" for layer in ("0.proj", "2")),
}


@pytest.mark.parametrize(("build", "targets"), [(tiny_flux, FLUX_TARGETS), (tiny_sd3, SD3_TARGETS)])
def test_default_lora_adapts_attention_and_feed_forward_of_every_block(build, targets):
    transformer = build().transformer
    config = default_lora(transformer)
    assert set(config.target_modules) == targets
    assert (config.r, config.lora_alpha, config.lora_dropout, config.init_lora_weights) == (32, 32, 0.0, "gaussian")
    attach_lora({"transformer": transformer}, None)
    names = {name.partition(".lora_")[0] for name, p in transformer.named_parameters() if p.requires_grad}
    assert names == targets


def test_a_config_without_targets_takes_the_default_ones():
    transformer, config = tiny_flux().transformer, LoraConfig(r=3)
    attach_lora({"transformer": transformer}, config)
    assert set(transformer.peft_config["default"].target_modules) == FLUX_TARGETS
    assert config.target_modules is None  # the user's own is not changed


def test_no_default_for_a_module_without_blocks():
    with pytest.raises(ValueError, match="Linear has no linear layers in blocks"):
        default_lora(nn.Linear(2, 2))


def test_a_module_that_takes_no_adapters():
    with pytest.raises(ValueError, match=r"The transformer \(Sequential\) is no diffusers model"):
        attach_lora({"transformer": nn.Sequential(nn.Linear(2, 2))}, LoraConfig(target_modules=["0"]))


def test_a_text_encoder_takes_no_adapter_and_stays_as_it_is():
    pipeline = tiny_flux()
    with pytest.raises(ValueError, match=r"The text_encoder \(CLIPTextModel\) is no diffusers model"):
        with restored_on_error(pipeline):
            prepare_denoisers(pipeline, ["text_encoder"], None, full_finetuning=False, checkpointing=False)
    assert not any("lora" in name for name, _ in pipeline.text_encoder.named_parameters())


def test_adapters_of_a_model_that_diffusers_gives_none_come_off_after_an_error():
    pipeline = lumina()
    names = {name for name, _ in pipeline.transformer.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        with restored_on_error(pipeline):
            prepare_denoisers(pipeline, None, None, full_finetuning=False, checkpointing=False)
            assert any("lora" in name for name, _ in pipeline.transformer.named_parameters())
            raise KeyboardInterrupt
    assert {name for name, _ in pipeline.transformer.named_parameters()} == names
    assert not getattr(pipeline.transformer, "peft_config", None)


def test_a_compiled_denoiser_is_refused_and_one_compiled_in_place_is_not():
    pipeline = tiny_flux()
    plain = pipeline.transformer
    pipeline.transformer = torch.compile(plain)
    with pytest.raises(ValueError, match=r"wrapped the transformer, .*in place: pipeline\.transformer\.compile\(\)"):
        find_denoisers(pipeline)
    pipeline.transformer = plain
    plain.compile()
    assert find_denoisers(pipeline) == {"transformer": plain}


@pytest.mark.parametrize(
    ("prepare", "message"),
    [("disable_lora", r"is disabled, .*pipeline\.enable_lora"), ("fuse_lora", r"is fused, .*pipeline\.unfuse_lora")],
)
def test_an_adapter_that_has_no_effect_is_refused(prepare, message):
    pipeline = tiny_flux()
    pipeline.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    getattr(pipeline, prepare)()
    with pytest.raises(ValueError, match=message):
        attach_lora({"transformer": pipeline.transformer}, None)


def test_adapters_of_single_parameters_are_refused():
    with pytest.raises(ValueError, match=r"target_parameters=\['weight'\] train weights that pipelines cannot load"):
        attach_lora({"transformer": tiny_flux().transformer}, LoraConfig(r=2, target_parameters=["weight"]))


def test_denoisers_are_found_by_name():
    pipeline = tiny_flux()
    assert find_denoisers(pipeline) == {"transformer": pipeline.transformer}
    assert find_denoisers(pipeline, ["vae", "transformer"]) == {
        "vae": pipeline.vae,
        "transformer": pipeline.transformer,
    }
    with pytest.raises(
        ValueError, match=r"called text_encoder_3. Set denoisers to some of \['text_encoder', 'text_enc"
    ):
        find_denoisers(pipeline, ["transformer", "text_encoder_3"])


@pytest.mark.parametrize("build", [tiny_flux, tiny_sd3])
def test_only_what_is_trained_requires_gradients(build):
    pipeline = build()
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.train().requires_grad_(True)
    prepare_denoisers(pipeline, None, None, full_finetuning=False, checkpointing=False)
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            trained = {key for key, parameter in part.named_parameters() if parameter.requires_grad}
            lora = {key for key, _ in part.named_parameters() if "lora_" in key}
            assert trained == lora and bool(lora) == (name == "transformer")
    prepare_denoisers(build(), None, None, full_finetuning=True, checkpointing=True)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_an_adapter_is_float32_at_least(dtype, expected):
    transformer = tiny_flux().transformer.to(dtype)
    attach_lora({"transformer": transformer}, None)
    assert {p.dtype for name, p in transformer.named_parameters() if "lora_" in name} == {expected}
    assert {p.dtype for name, p in transformer.named_parameters() if "lora_" not in name} == {dtype}


def test_a_loaded_bf16_adapter_becomes_float32():
    transformer = tiny_flux().transformer.to(torch.bfloat16)
    transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.bfloat16()
    attach_lora({"transformer": transformer}, None)
    assert {p.dtype for name, p in transformer.named_parameters() if "lora_" in name} == {torch.float32}


def test_several_adapters_are_refused():
    transformer = tiny_flux().transformer
    for name in ("one", "two"):
        transformer.add_adapter(LoraConfig(r=2, target_modules=["to_q"]), adapter_name=name)
    with pytest.raises(ValueError, match=r"already has the adapters \['one', 'two'\]"):
        attach_lora({"transformer": transformer}, None)


def test_state_dict_means_the_adapter():
    """lora_B @ lora_A of the dictionary is what the adapter adds to a layer, without any scale."""
    transformer = tiny_flux().transformer.double()
    attach_lora({"transformer": transformer}, LoraConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=["to_q"]))
    generator = torch.Generator().manual_seed(0)
    layer = transformer.transformer_blocks[0].attn.to_q
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_(generator=generator)
        x = torch.randn(5, 32, generator=generator, dtype=torch.float64)
        added = layer(x) - layer.base_layer(x)
    weights, config = lora_state_dict(transformer)
    a, b = (weights[f"transformer_blocks.0.attn.to_q.lora_{side}.weight"] for side in "AB")
    torch.testing.assert_close(x @ a.T @ b.T, added, rtol=1e-12, atol=1e-12)
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (4, 4, False)
    assert isinstance(transformer, FluxTransformer2DModel) and not any(v.requires_grad for v in weights.values())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_initialisation_that_rewrites_the_base_is_refused_before_it_does(init):
    pipeline = tiny_flux()
    before = {key: value.clone() for key, value in pipeline.transformer.state_dict().items()}
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}' changes the base weights"):
        attach_lora({"transformer": pipeline.transformer}, LoraConfig(r=2, init_lora_weights=init))
    after = pipeline.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_full_finetuning_in_bfloat16_is_refused():
    pipeline = tiny_flux().to(torch.bfloat16)
    with pytest.raises(ValueError, match="too coarse for full fine-tuning"):
        prepare_denoisers(pipeline, None, None, full_finetuning=True, checkpointing=False)


def test_adapters_of_a_pipeline_that_cannot_save_them_load_into_the_module(tmp_path):
    pipeline, fresh = tiny_flux(), tiny_flux()
    denoisers = {"transformer": pipeline.transformer}
    attach_lora(denoisers, LoraConfig(r=4, lora_alpha=6))
    for parameter in (p for p in pipeline.transformer.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(0))
    save_trained(object(), denoisers, tmp_path, full_finetuning=False)
    fresh.transformer.load_lora_adapter(tmp_path / "transformer", weight_name=LORA_FILE, prefix="transformer")
    images, same = (
        each("a cat", height=16, width=16, num_inference_steps=2, max_sequence_length=16, output_type="latent",
             generator=torch.Generator().manual_seed(0)).images
        for each in (pipeline, fresh)
    )  # fmt: skip
    torch.testing.assert_close(images, same, rtol=0, atol=1e-5)
    without = tiny_flux()("a cat", height=16, width=16, num_inference_steps=2, max_sequence_length=16,
                          output_type="latent", generator=torch.Generator().manual_seed(0)).images  # fmt: skip
    assert (images - without).abs().max() > 1e-3


def test_equal_weights_are_equal_files(tmp_path):
    pipeline = tiny_flux()
    attach_lora({"transformer": pipeline.transformer}, None)
    contents = set()
    for _ in range(10):  # safetensors writes metadata in another order each time
        save_trained(pipeline, {"transformer": pipeline.transformer}, tmp_path, full_finetuning=False)
        contents.add((tmp_path / LORA_FILE).read_bytes())
    assert len(contents) == 1
