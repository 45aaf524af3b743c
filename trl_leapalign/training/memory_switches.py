"""What carries no gradient leaves the device, as the config says."""

import logging
from contextlib import AbstractContextManager, nullcontext

from diffusers import DiffusionPipeline
from torch import nn

from ..leapalign_config import LeapAlignConfig
from ..rewards import RewardSet
from ..rollout.placement import EncoderOffload, place
from ..rollout.prompt_cache import SEAMS, PromptCache

logger = logging.getLogger(__name__)


class MemorySwitches:
    """Puts a pipeline on its device, its encoders off it if asked to, and remembers what they return.

    Args:
        pipeline (DiffusionPipeline): the pipeline; its frozen parts are in eval mode.
        denoisers (dict[str, nn.Module]): its components that are trained, by name.
        config (LeapAlignConfig): `cache_prompt_embeddings`, `prompt_cache_dir`, `offload_text_encoders`,
            `reward_device`, `offload_rewards` and the device.

    Raises:
        ValueError: if a switch has nothing to act on.
    """

    def __init__(self, pipeline: DiffusionPipeline, denoisers: dict[str, nn.Module], config: LeapAlignConfig):
        self.config = config
        self.encoders: EncoderOffload | None = place(pipeline, denoisers, config.device, config.offload_text_encoders)
        self.prompts: PromptCache | None = None
        if config.cache_prompt_embeddings or config.prompt_cache_dir is not None:
            if not any(hasattr(pipeline, name) for name in SEAMS):
                raise ValueError(
                    f"{type(pipeline).__name__} has no encode_prompt, whose results could be remembered. Leave "
                    "cache_prompt_embeddings and prompt_cache_dir out."
                )
            self.prompts = PromptCache(pipeline, config.prompt_cache_dir)

    def prompts_cached(self) -> AbstractContextManager:
        """A context in which prompts are encoded once."""
        return nullcontext() if self.prompts is None else self.prompts.active()

    def place_rewards(self, rewards: RewardSet) -> None:
        """Move reward models to where the config wants them."""
        rewards.prepare(self.config.device, own_device=self.config.reward_device, offload=self.config.offload_rewards)

    @property
    def freed_bytes(self) -> dict[str, int]:
        """Bytes that are not on the device while the pipeline samples, by component."""
        return {} if self.encoders is None else self.encoders.num_bytes
