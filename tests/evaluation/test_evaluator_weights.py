"""Evaluators load their weights as strictly as rewards do, and say what is wrong in the same words."""

import pytest
import torch
from geneval_cases import color_tokenizer, tiny_color_clip, tiny_mask2former
from safetensors.torch import load_file, save_file
from test_unified_reward import tiny_qwen, tiny_reward
from test_unified_reward import tiny_tokenizer as qwen_tokenizer

from trl_leapalign.evaluation import ColorClassifier, GenEval, Mask2FormerDetector, UnifiedReward
from trl_leapalign.evaluation.geneval.mmdet_checkpoint import load_mmdet_checkpoint

LOADED = {
    "detector": (tiny_mask2former, lambda: None, Mask2FormerDetector.from_pretrained),
    "color_classifier": (tiny_color_clip, color_tokenizer, ColorClassifier.from_pretrained),
    "source": (tiny_qwen, qwen_tokenizer, UnifiedReward.from_pretrained),
}
"""By the name of the argument: model, tokenizer and what loads them."""


@pytest.fixture(params=LOADED)
def case(request, tmp_path):
    """The argument's name, its folder and what loads it."""
    model, tokenizer, load = LOADED[request.param]
    model().save_pretrained(tmp_path)
    if request.param != "detector":
        tokenizer().save_pretrained(tmp_path)
    if request.param == "source":
        tiny_reward().image_processor.save_pretrained(tmp_path)
    load(tmp_path)  # as it is, it serves
    return request.param, tmp_path, load


def change(folder, edit):
    path = folder / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_missing_weights_are_named(case):
    _, folder, load = case
    name = max(load_file(folder / "model.safetensors"), key=lambda name: ("layers.1" in name, name))
    change(folder, lambda weights: weights.pop(name))
    with pytest.raises(ValueError, match=rf"{folder} does not hold this model: 1 weights are missing, such as \w+"):
        load(folder)


def test_unknown_and_misshapen_weights_are_named(case):
    _, folder, load = case
    change(folder, lambda weights: weights.update({"more.weight": torch.ones(2)}))
    with pytest.raises(ValueError, match=r"1 weights are unexpected, such as more\.weight"):
        load(folder)

    def misshape(weights):
        del weights["more.weight"]
        name = next(name for name, value in weights.items() if value.ndim == 1)
        weights[name] = torch.ones(1000)

    change(folder, misshape)
    with pytest.raises(ValueError, match=r"has shape \(1000,\), but the model's has"):
        load(folder)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.9])
def test_files_that_are_cut_off(case, share):
    _, folder, load = case
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"cannot be read as the weights of this model: .*fetch it again"):
        load(folder)


def test_a_file_for_a_folder(case):
    argument, folder, load = case
    with pytest.raises(ValueError, match=rf"{argument}='.*model\.safetensors' is a file\. Pass the folder that it is"):
        load(folder / "model.safetensors")


def test_a_folder_without_weights_and_one_that_is_not_there(case, tmp_path):
    argument, folder, load = case
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"cannot be read as the weights of this model: .*model\.safetensors"):
        load(folder)
    with pytest.raises(FileNotFoundError, match=rf"There is no file or folder '.*nowhere'.* Hub, as {argument}\."):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_an_mmdet_file_that_is_cut_off(tmp_path, share):
    path = tmp_path / "detector.pth"
    torch.save({"state_dict": {"a": torch.ones(1000)}}, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(ValueError, match=r"detector\.pth cannot be read as the weights .*fetch it again"):
        load_mmdet_checkpoint(path)


def test_a_detector_that_transformers_saved_long_ago(tmp_path):
    """Without a norm that is unused, and with buffers that are computed now."""
    model = tiny_mask2former()
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    norm = {name for name in weights if "pixel_level_module.encoder" in name and ".layernorm." in name}
    assert len(norm) == 2
    first = "model.pixel_level_module.encoder.encoder.layers.0.blocks.0.attention.self"
    assert f"{first}.query.weight" in weights
    change(tmp_path, lambda weights: [weights.pop(name) for name in norm])
    change(tmp_path, lambda weights: weights.update({f"{first}.relative_position_index": torch.zeros(4, 4)}))
    loaded = Mask2FormerDetector.from_pretrained(tmp_path).model.state_dict()
    for name, tensor in model.state_dict().items():
        assert ".swin.layernorm." in name or torch.equal(loaded[name], tensor), name


def test_geneval_says_which_of_its_models_is_missing(tmp_path):
    tiny_mask2former().save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no file or folder './none'.*as color_classifier"):
        GenEval.from_pretrained(tmp_path, "./none")
    with pytest.raises(FileNotFoundError, match=r"no file or folder './none'.*as detector"):
        GenEval.from_pretrained("./none", tmp_path)
