"""Options of the command line that say how the model is loaded and what is trained of it."""

import sys

import pytest
from trl import TrlParser

from examples.tiny import tiny_flux
from trl_leapalign import LeapAlignConfig, LeapAlignTrainer
from trl_leapalign.cli.arguments import TrainArguments
from trl_leapalign.cli.main import main
from trl_leapalign.rollout.quantization import quantization_of

MODULE = """
from examples.tiny import tiny_flux

def pipeline():
    return tiny_flux()

def brightness(images, prompts, metadata):
    return images.mean((1, 2, 3))
"""
COMMON = ["--max_steps", "1", "--sample_num_steps", "2", "--sample_height", "16", "--sample_width", "16"]
COMMON += ["--per_device_train_batch_size", "1", "--report_to", "none", "--train_prompts", "prompts.txt"]
COMMON += ["--reward", "my_models:brightness", "--output_dir", "out"]


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """Run `train` with options, and return the trainer that it made."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    (tmp_path / "my_models.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "prompts.txt").write_text("a red circle\n", encoding="utf-8")
    made = []
    train = LeapAlignTrainer.train
    monkeypatch.setattr(LeapAlignTrainer, "train", lambda self, **kwargs: (made.append(self), train(self, **kwargs))[1])

    def run(*options):
        main(["train", *COMMON, *options])
        return made[-1]

    return run


@pytest.mark.parametrize("named", [False, True])
def test_a_quantized_pipeline_is_trained_and_its_adapter_saved(named, trained, tmp_path):
    pytest.importorskip("bitsandbytes")
    if named:
        tiny_flux().save_pretrained(tmp_path / "flux")
    options = ["--load_in_4bit", "--use_peft", "--lora_r", "3", "--lora_alpha", "6", "--lora_target_modules", "to_q"]
    trainer = trained("--pipeline", str(tmp_path / "flux") if named else "my_models:pipeline", *options, "to_k")
    assert quantization_of(trainer.pipeline.transformer) == "bitsandbytes NF4"
    [config] = trainer.pipeline.transformer.peft_config.values()
    assert (config.r, config.lora_alpha, config.target_modules) == (3, 6, {"to_q", "to_k"})
    assert "quantized" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    fresh = tiny_flux()
    fresh.load_lora_weights(tmp_path / "out")


def test_eight_bits_and_the_switches_of_memory(trained):
    pytest.importorskip("bitsandbytes")
    switches = ["--cache_prompt_embeddings", "--offload_text_encoders", "--optim", "adamw_bnb_8bit"]
    trainer = trained("--pipeline", "my_models:pipeline", "--load_in_8bit", *switches)
    assert quantization_of(trainer.pipeline.transformer) == "bitsandbytes int8"
    assert trainer.memory.prompts.misses == 1 and trainer.memory.prompts.hits >= 1
    assert trainer.memory.freed_bytes.keys() == {"text_encoder", "text_encoder_2"}


def test_check_quantizes_too(trained, capsys):
    pytest.importorskip("bitsandbytes")
    small = ["--sample_num_steps", "2", "--sample_height", "16", "--sample_width", "16", "--output_dir", "out"]
    main(["check", "my_models:pipeline", "--load_in_4bit", *small])
    assert "FluxPipeline" in capsys.readouterr().out


def lora_of(*options):
    arguments, config = TrlParser((TrainArguments, LeapAlignConfig)).parse_args_and_config(
        ["--pipeline", "x", "--reward", "y", "--output_dir", "z", *options]
    )
    from trl_leapalign.config_checks import read_dict

    return arguments.lora_config(config, read_dict("lora", arguments.lora))


def test_the_default_adapter_is_kept_but_for_what_is_set():
    assert lora_of() is None and lora_of("--use_peft") is None
    config = lora_of("--lora_r", "8")
    assert (config.r, config.lora_alpha, config.target_modules) == (8, 8, None)
    assert config.init_lora_weights == "gaussian"
    config = lora_of("--lora_alpha", "64", "--lora", '{"r": 4, "use_rslora": true}')
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 64, True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--load_in_4bit", "--load_in_8bit"], "Choose one"),
        (["--use_bnb_nested_quant"], "no effect without load_in_4bit"),
        (["--load_in_4bit", "--model_init_kwargs", '{"load_in_4bit": true}'], "Drop one"),
        (["--load_in_4bit", "--model_init_kwargs", '{"quantization_config": {"load_in_8bit": true}}'], "Drop one"),
        (["--use_peft", "--full_finetuning"], "there is no LoRA"),
        (["--lora_r", "4", "--lora", '{"r": 8}'], "Set one"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options, message, trained, tmp_path):
    tiny_flux().save_pretrained(tmp_path / "flux")
    with pytest.raises(ValueError, match=message):
        trained("--pipeline", str(tmp_path / "flux"), *options)


def test_quantized_weights_are_not_fully_trained(trained):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(ValueError, match="use LoRA"):
        trained("--pipeline", "my_models:pipeline", "--load_in_4bit", "--full_finetuning")
