"""Remembered prompts: bit for bit what the encoders return, and only for what they were asked."""

import gc

import pytest
import torch
from PIL import Image
from rollout_cases import Case, seeded

from examples.tiny import tiny_flux, tiny_sd3
from trl_leapalign import LeapAlign, run_rollout
from trl_leapalign.rollout.prompt_cache import NotCacheable, PromptCache, _Entry, _update
from trl_leapalign.rollout.quantization import Quantization, quantize_pipeline

PROMPTS = ["a red circle", "two blue squares left of the cat"]


def encode(pipeline, prompt=PROMPTS, **arguments):
    with torch.no_grad():
        return pipeline.encode_prompt(prompt=prompt, **{**({"prompt_2": None}), **arguments})


def equal(first, second):
    """Bit for bit, strides included."""
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert (first.dtype, first.shape, first.device) == (second.dtype, second.shape, second.device)
        assert first.stride() == second.stride() and torch.equal(first, second)
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second)
        for pair in zip(first, second, strict=True):
            equal(*pair)
    elif isinstance(first, dict):
        assert list(first) == list(second)
        for key in first:
            equal(first[key], second[key])
    else:
        assert first == second


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_images_and_gradients_are_those_without_a_cache(family, guided, on_disk, tmp_path):
    results = []
    for cached in (False, True):
        case = Case(family, guided=guided)
        pipeline = case.pipeline()
        cache = PromptCache(pipeline, tmp_path if on_disk else None)
        calls = []
        pipeline.text_encoder.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for _ in range(2):
            if cached:
                with cache.active():
                    output = run_rollout(pipeline, LeapAlign(), method_generator=seeded(0), **case.inputs())
            else:
                output = run_rollout(pipeline, LeapAlign(), method_generator=seeded(0), **case.inputs())
        trained = [p for p in pipeline.transformer.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(output.images.square().sum(), trained, allow_unused=True)
        results.append([output.images, [g for g in gradients if g is not None]])
        assert "encode_prompt" not in vars(pipeline)
        results[-1].append(len(calls))
    equal(*(result[:2] for result in results))
    assert (cache.misses, cache.hits) == (cache.hits, cache.misses) != (0, 0)
    assert results[1][2] == results[0][2] / 2
    assert (cache.num_bytes == 0) is on_disk


def test_each_difference_is_an_entry_of_its_own():
    pipeline = tiny_sd3()
    cache = PromptCache(pipeline)
    common = {"prompt_2": None, "prompt_3": None}
    given = torch.zeros(1, 16, 32)
    pooled = torch.zeros(1, 64)
    calls = [
        {"prompt": PROMPTS[0]},
        {"prompt": [PROMPTS[0]]},
        {"prompt": PROMPTS},
        {"prompt": PROMPTS[::-1]},
        {"prompt": PROMPTS[0], "max_sequence_length": 8},
        {"prompt": PROMPTS[0], "do_classifier_free_guidance": False},
        {"prompt": PROMPTS[0], "negative_prompt": PROMPTS[1]},
        {"prompt": None, "prompt_embeds": given, "pooled_prompt_embeds": pooled, "do_classifier_free_guidance": False},
        {
            "prompt": None,
            "prompt_embeds": given + 1,
            "pooled_prompt_embeds": pooled,
            "do_classifier_free_guidance": False,
        },
    ]
    with cache.active():
        for each in (*calls, *calls):
            encode(pipeline, **{**common, **each})
    assert (cache.misses, cache.hits) == (len(calls), len(calls))
    # Defaults and positions do not matter, precision and the encoders do.
    with cache.active():
        pipeline.encode_prompt(PROMPTS[0], None, None, max_sequence_length=256)
        assert cache.hits == len(calls) + 1
        with torch.autocast("cpu", torch.bfloat16):
            encode(pipeline, PROMPTS[0], **common)
        assert cache.misses == len(calls) + 1
        pipeline.text_encoder = tiny_sd3(seed=1).text_encoder
        encode(pipeline, PROMPTS[0], **common)
        assert cache.misses == len(calls) + 2


def test_writing_into_what_came_back_does_not_reach_the_cache():
    pipeline = tiny_flux()
    expected = encode(pipeline)
    cache = PromptCache(pipeline)
    with cache.active():
        for _ in range(3):
            result = encode(pipeline)
            equal(result, expected)
            for tensor in result:
                tensor.zero_()
    assert cache.hits == 2


def test_entries_keep_strides_of_views_and_structure(tmp_path):
    base = torch.arange(24.0).view(2, 3, 4)
    result = (
        base.transpose(0, 2),
        base[:, 1:, ::2],
        base[:1].expand(5, 3, 4),
        [torch.ones(0, 3), torch.tensor(True), None],
        {"mask": torch.ones(2, dtype=torch.bool), "length": 3, "half": torch.ones(3, dtype=torch.bfloat16)},
    )
    entry = _Entry.of(result)
    equal(entry.restore(torch.device("cpu")), result)
    entry.save(tmp_path / "entry.safetensors")
    equal(_Entry.load(tmp_path / "entry.safetensors").restore(torch.device("cpu")), result)
    for refused in (object(), torch.ones(2, requires_grad=True), {1: 2}):
        with pytest.raises(NotCacheable):
            _Entry.of(refused)


def test_calls_that_draw_noise_or_have_other_arguments_are_made_each_time():
    pipeline = tiny_flux()
    cache = PromptCache(pipeline)
    noisy = type(pipeline).encode_prompt

    class Noisy(type(pipeline)):
        def encode_prompt(self, *args, **kwargs):
            embeddings, *others = noisy(self, *args, **kwargs)
            return embeddings + torch.randn_like(embeddings), *others

        def encode_image(self, image, generator):
            return image

    pipeline.__class__ = Noisy
    with cache.active():
        assert not torch.equal(encode(pipeline)[0], encode(pipeline)[0])
        assert (cache.misses, cache.hits) == (2, 0)
        pipeline.encode_image(torch.ones(2), seeded(0))
        assert (cache.misses, cache.hits) == (2, 0)


def test_image_encoders_are_remembered_by_the_image():
    pipeline = tiny_flux()
    calls = []

    class Edit(type(pipeline)):
        def encode_image(self, image, device=None):
            calls.append(image)
            return torch.ones(2)

    pipeline.__class__ = Edit
    black, white = Image.new("RGB", (4, 4)), Image.new("RGB", (4, 4), "white")
    with PromptCache(pipeline).active():
        for image in (black, white, black.copy(), torch.zeros(3), torch.zeros(3), torch.ones(3)):
            pipeline.encode_image(image)
    assert len(calls) == 4


def test_a_folder_is_shared_by_runs_of_the_same_encoders_alone(tmp_path):
    def misses(pipeline):
        cache = PromptCache(pipeline, tmp_path)
        with cache.active():
            equal(encode(pipeline), encode(pipeline))
        return cache.misses

    assert [misses(tiny_flux()), misses(tiny_flux())] == [1, 0]
    assert misses(tiny_flux(seed=1)) == 1
    changed = tiny_flux()
    changed.tokenizer.model_max_length = 12
    assert misses(changed) == 1
    pytest.importorskip("bitsandbytes")
    quantized = tiny_flux()
    quantize_pipeline(quantized, Quantization(4), ["text_encoder_2"])
    assert misses(quantized) == 1
    assert not list(tmp_path.glob("*.part"))


def test_different_values_have_different_digests():
    import hashlib

    values = [1, 1.0, True, "1", None, ["1"], ("1",), ["1", []], [["1"]], {"a": "b"}, ["a", "b"], torch.float32]
    values += [torch.zeros(2), torch.zeros(2, 1), torch.zeros(2, dtype=torch.int32), torch.zeros(2).numpy()]
    digests = set()
    for value in values:
        digest = hashlib.sha256()
        _update(digest, value)
        digests.add(digest.digest())
    assert len(digests) == len(values)


def test_a_cache_does_not_keep_a_pipeline_alive_or_changed():
    pipeline = tiny_flux()
    cache = PromptCache(pipeline)
    with pytest.raises(KeyError), cache.active(), cache.active():
        raise KeyError
    assert "encode_prompt" not in vars(pipeline)
    with cache.active():
        encode(pipeline)
    del cache
    gc.collect()
    equal(encode(pipeline), encode(tiny_flux()))
