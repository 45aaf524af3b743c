"""Equal texts for equal things, in every process; other texts for whatever changes images or scores."""

import os
import socket
import subprocess
import sys
from functools import partial

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from peft import LoraConfig
from reward_cases import CASES
from training_cases import blueness

from examples.tiny import tiny_flux, tiny_sd3
from trl_leapalign.evaluation import evaluate
from trl_leapalign.evaluation.identity import Unidentifiable, identify, identify_pipeline, identify_source
from trl_leapalign.rewards import VideoReward


def with_adapters():
    pipeline = tiny_flux()
    torch.manual_seed(0)
    for name in ("one", "two"):
        config = LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False)
        pipeline.transformer.add_adapter(config, adapter_name=name)
    return pipeline


def new_scheduler(pipeline):
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=9.0)


def permuted(pipeline):
    """The same bytes in another order, which a sum does not notice."""
    weight = pipeline.transformer.proj_out.weight
    weight.data = weight.data.flip(0)


def other_buffer(pipeline):
    pipeline.vae.register_buffer("scale_of_noise", torch.ones(4))


CHANGES = {
    "scheduler": new_scheduler,
    "permutation": permuted,
    "buffer": other_buffer,
    "dtype": lambda pipeline: pipeline.vae.to(torch.bfloat16),
    "config": lambda pipeline: pipeline.vae.register_to_config(scaling_factor=0.5),
    "tokenizer": lambda pipeline: setattr(pipeline.tokenizer, "model_max_length", 3),
    "scale": lambda pipeline: pipeline.set_adapters(["one", "two"], [1.0, 0.5]),
    "active": lambda pipeline: pipeline.set_adapters(["one"]),
    "disabled": lambda pipeline: pipeline.disable_lora(),
    "merged": lambda pipeline: pipeline.fuse_lora(adapter_names=["one"]),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_images_changes_the_identity(change):
    pipeline = with_adapters()
    before = identify_pipeline(pipeline)
    assert identify_pipeline(with_adapters()) == before
    change(pipeline)
    after = identify_pipeline(pipeline)
    assert after.keys() == before.keys() and after != before


def test_a_call_leaves_the_identity_as_it_is():
    pipeline = tiny_sd3()
    before = identify_pipeline(pipeline)
    pipeline(["a cat", "a dog on a mat"], height=16, width=16, num_inference_steps=2)
    assert identify_pipeline(pipeline) == before


def scaled(scale):
    return lambda images, prompts, metadata: scale * images.mean((1, 2, 3))


class Judge:
    def __init__(self, threshold, cache=()):
        self.threshold = threshold
        self._cache = cache

    def __call__(self, images, prompts, metadata):
        return images.mean((1, 2, 3)) - self.threshold


def test_callables_are_told_apart_by_code_and_settings():
    texts = [
        identify(each)
        for each in (
            scaled(1.0),
            scaled(2.0),
            lambda images, prompts, metadata: images.amax((1, 2, 3)),
            lambda images, prompts, metadata: images.amin((1, 2, 3)),
            partial(blueness, metadata=None),
            Judge(0.1),
            Judge(0.2),
            CASES["pickscore"](),
            CASES["pickscore"](scale="reference"),
            VideoReward(CASES["clip"](), every=1),
            VideoReward(CASES["clip"](), every=2),
        )
    ]
    assert len(set(texts)) == len(texts)
    assert identify(scaled(1.0)) == texts[0]
    assert identify(Judge(0.1, cache=["notes"])) == texts[5]
    assert identify(CASES["pickscore"]()) == texts[7]


def test_the_identity_is_that_of_another_process():
    program = (
        "from examples.tiny import tiny_flux; from trl_leapalign.evaluation.identity import identify_pipeline; "
        "print(sorted(identify_pipeline(tiny_flux()).items()))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONHASHSEED": "7"}
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert found.stdout.strip().endswith(str(sorted(identify_pipeline(tiny_flux()).items())))


def test_what_cannot_be_identified_is_judged_again(tmp_path, caplog):
    with socket.socket() as connection:
        with pytest.raises(Unidentifiable, match="socket"):
            identify(lambda images, prompts, metadata: connection)
        looks = []

        def judge(images, prompts, metadata, connection=connection):
            looks.append(len(images))
            return images.mean((1, 2, 3))

        call = {"height": 16, "width": 16, "num_inference_steps": 2}
        for _ in range(2):
            evaluate(tiny_flux, ["a cat"], judge, tmp_path / "out", images_per_prompt=1, call_kwargs=call)
        assert looks == [1, 1]
        assert "'judge' cannot be identified, so finished scores of it are never used again" in caplog.text


def test_a_folder_is_identified_by_its_files(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    before = identify_source(tmp_path)
    assert identify_source(str(tmp_path)) == before
    (tmp_path / "model_index.json").write_text("[]  ")
    assert identify_source(tmp_path) != before
    with pytest.raises(Unidentifiable, match="has no commit"):
        identify_source("nobody/nothing")
