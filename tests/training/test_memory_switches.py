"""What leaves the device: encoders, rewards, embeddings. Nothing of it changes a bit."""

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers.hooks import apply_group_offloading
from rollout_cases import Case, seeded
from training_cases import PROMPTS, Recorder, make_trainer, redness, same, sample, trained_weights

from examples.tiny import tiny_clip, tiny_flux, tiny_sd3, tiny_tokenizer
from trl_leapalign import LeapAlign, run_rollout
from trl_leapalign.rewards import RewardSet
from trl_leapalign.rollout.quantization import num_bytes


def run(directory, pipeline=None, **settings):
    recorder = Recorder()
    arguments = {"callbacks": [recorder], "eval_dataset": PROMPTS[:2]}
    trainer = make_trainer(directory, pipeline, arguments=arguments, max_steps=3, **settings)
    trainer.train()
    metrics = {key: value for key, value in trainer.evaluate().items() if not key.endswith("runtime")}
    return trainer, (recorder.gradients, trained_weights(trainer), sample(trainer.pipeline), metrics)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"), per_device_train_batch_size=2)[1]


@pytest.mark.parametrize("dry_run", [False, True])
def test_cache_and_offload_of_encoders_change_no_bit(dry_run, plain, tmp_path):
    switches = {"cache_prompt_embeddings": True, "offload_text_encoders": True}
    trainer, found = run(tmp_path, per_device_train_batch_size=2, dry_run=dry_run, **switches)
    assert same(found, plain)
    encoders = ("text_encoder", "text_encoder_2")
    assert trainer.memory.freed_bytes == {name: num_bytes(getattr(trainer.pipeline, name)) for name in encoders}
    assert trainer.memory.prompts.misses > 0
    misses = trainer.memory.prompts.misses
    trainer.evaluate()
    assert trainer.memory.prompts.misses == misses
    assert "encode_prompt" not in vars(trainer.pipeline)


def test_a_second_trainer_may_offload_the_same_pipeline(plain, tmp_path):
    pipeline = tiny_flux()
    make_trainer(tmp_path, pipeline, offload_text_encoders=True)
    pipeline.unload_lora_weights()
    trainer, found = run(tmp_path, pipeline, per_device_train_batch_size=2, offload_text_encoders=True)
    assert same(found, plain)
    trainer.memory.encoders.remove()
    assert not any(hasattr(part, "_hf_hook") for part in (pipeline.text_encoder, pipeline.text_encoder_2))


def test_embeddings_on_disk_serve_the_next_run(plain, tmp_path):
    first, found = run(tmp_path / "a", per_device_train_batch_size=2, prompt_cache_dir=str(tmp_path / "prompts"))
    assert same(found, plain) and first.memory.prompts.misses > 0
    second, found = run(tmp_path / "b", per_device_train_batch_size=2, prompt_cache_dir=str(tmp_path / "prompts"))
    assert same(found, plain) and second.memory.prompts.misses == 0


@pytest.mark.parametrize("how", ["model", "group"])
def test_offloaded_encoders_of_the_users_own_change_no_bit(how, plain, tmp_path):
    pipeline = tiny_flux()
    for encoder in (pipeline.text_encoder, pipeline.text_encoder_2):
        if how == "model":
            cpu_offload_with_hook(encoder, torch.device("cpu"))
        else:
            apply_group_offloading(encoder, onload_device=torch.device("cpu"), offload_type="leaf_level")
    assert same(run(tmp_path, pipeline, per_device_train_batch_size=2)[1], plain)


@pytest.mark.parametrize("name", ["transformer", "vae"])
@pytest.mark.parametrize("how", ["model", "group"])
def test_denoisers_and_decoders_are_not_offloaded(how, name):
    pipeline = tiny_sd3()
    part = getattr(pipeline, name)
    if how == "model":
        cpu_offload_with_hook(part, torch.device("cpu"))
    else:
        apply_group_offloading(part, onload_device=torch.device("cpu"), offload_type="leaf_level")
    with pytest.raises(ValueError, match=rf"moves weights.*\({name}: .*offload_text_encoders=True"):
        run_rollout(pipeline, LeapAlign(), **Case("sd3").inputs())


def test_what_takes_the_place_of_weights_is_what_the_backward_pass_reads():
    """Why an offloaded base is refused: norms save their weights by reference, and offloading replaces them."""
    norm = torch.nn.RMSNorm(4).requires_grad_(False)
    x = torch.ones(1, 4, requires_grad=True)
    y = x * norm.weight
    norm.weight.data = torch.zeros_like(norm.weight)
    [gradient] = torch.autograd.grad(y.sum(), x)
    assert not gradient.any()


def test_a_pipeline_of_a_device_map_trains_where_it_is(tmp_path):
    tiny_flux().save_pretrained(tmp_path / "pipeline")
    results = []
    for name, init_kwargs in (("plain", {}), ("mapped", {"device_map": "cpu"})):
        trainer, found = run(tmp_path / name, str(tmp_path / "pipeline"), model_init_kwargs=init_kwargs)
        results.append(found)
    assert trainer.pipeline.hf_device_map
    assert same(*results)


def test_encoders_go_to_the_device_one_after_another_and_rest_while_the_denoiser_runs(tmp_path):
    """On the CPU nothing moves, so the hooks' order is what can be seen."""
    pipeline = tiny_sd3()
    trainer = make_trainer(tmp_path, pipeline, offload_text_encoders=True)
    offload = trainer.memory.encoders
    assert list(offload.encoders) == ["text_encoder", "text_encoder_2", "text_encoder_3"]
    first, second, third = offload.hooks
    assert [hook.hook.prev_module_hook for hook in offload.hooks] == [None, first, second]
    assert all(hook.hook.execution_device == torch.device("cpu") for hook in (first, second, third))
    rests = []
    offload.rest = lambda: rests.append(1)
    sample(pipeline)
    assert len(rests) == 3


def test_switches_with_nothing_to_act_on_are_refused(tmp_path):
    pipeline = tiny_flux()
    pipeline.text_encoder = pipeline.text_encoder_2 = None
    with pytest.raises(ValueError, match="has no encoders to offload"):
        make_trainer(tmp_path, pipeline, offload_text_encoders=True)
    with pytest.raises(ValueError, match="none of \\['redness'\\] is one"):
        make_trainer(tmp_path, offload_rewards=True)
    with pytest.raises(ValueError, match="reward_device='card 3' is no device"):
        make_trainer(tmp_path, reward_device="card 3")
    with pytest.raises(ValueError, match="offload_rewards='no' must be"):
        make_trainer(tmp_path, offload_rewards="no")


# Rewards


class ClipReward(torch.nn.Module):
    """A reward of a real model, that depends on the batch and reports beside its rewards."""

    def __init__(self):
        super().__init__()
        self.clip, self.tokenizer, self.calls = tiny_clip(), tiny_tokenizer(), 0

    def forward(self, images, prompts, metadata):
        self.calls += 1
        features = self.clip.get_image_features(pixel_values=images).pooler_output
        ids = self.tokenizer(prompts, padding=True, return_tensors="pt").input_ids
        texts = self.clip.get_text_features(input_ids=ids.to(images.device)).pooler_output
        rewards = torch.cosine_similarity(features, texts - features.mean(0))
        return rewards, {"norm": features.detach().norm(dim=-1)}


@pytest.mark.parametrize("switch", [{"offload": True}, {"own_device": "cpu"}, {"own_device": "cpu", "offload": True}])
def test_rewards_that_come_and_go_have_the_same_values_and_gradients(switch):
    images = torch.rand(2, 3, 16, 16, generator=seeded(0), dtype=torch.float64)
    results = []
    for placement in ({}, switch):
        rewards = RewardSet([ClipReward().double(), redness])
        rewards.prepare(torch.device("cpu"), **placement)
        given = images.clone().requires_grad_()
        scores = rewards(given, PROMPTS[:2], [{}, {}])
        weights = torch.tensor([[0.3, -1.0], [2.0, 0.5]], dtype=torch.float64)
        [gradient] = torch.autograd.grad((scores.rewards * weights).sum(), given)
        with torch.no_grad():
            again = rewards(images, PROMPTS[:2], [{}, {}])
        results.append((scores.rewards.detach(), scores.metrics, gradient, again.rewards))
    assert same(*results)
    rewards.prepare(torch.device("cpu"))  # and back
    assert isinstance(rewards.functions[0], torch.nn.Module)


def test_training_with_offloaded_rewards_changes_no_bit(tmp_path):
    def results(name, **settings):
        trainer = make_trainer(tmp_path / name, reward=ClipReward(), per_device_train_batch_size=2, **settings)
        trainer.train()
        return trainer.rewards, trained_weights(trainer)

    rewards, expected = results("plain")
    placed, found = results("offloaded", offload_rewards=True)
    assert same(found, expected)
    assert placed.functions[0].function.calls == 2 * rewards.functions[0].calls


def test_an_offloaded_reward_that_is_detached_is_noticed():
    class Detached(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, images, prompts, metadata):
            return self.scale * images.detach().mean((1, 2, 3))

    rewards = RewardSet(Detached())
    rewards.prepare(torch.device("cpu"), offload=True)
    with pytest.raises(ValueError, match="is detached from the images"):
        rewards(torch.rand(1, 3, 4, 4, requires_grad=True), ["a"], [{}])
