r"""Trains the shapes base: a genuine `FluxPipeline` of 48x48 pictures, from nothing, on two CPU cores.

    MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_TOP_PAD_=268435456 \
        python -m examples.shapes.pretrain

The base draws well but follows its prompts badly on purpose: a share of its captions is paired with a plausible wrong
scene, so that there is something for alignment to mend. An interrupted run goes on from its checkpoint.
"""

import argparse
import math
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from examples.shapes import world
from examples.shapes.muon import Muon

TAG_WEIGHTS = {"single_object": 1, "two_object": 2, "counting": 1.5, "colors": 1, "position": 4, "color_attr": 6}
WRONG_SCENES = {
    "single_object": 0.02,
    "two_object": 0.3,
    "counting": 0.3,
    "colors": 0.03,
    "position": 0.3,
    "color_attr": 0.3,
}
"""Share of each task's captions that are paired with a wrong scene."""

SHIFT = 3.0
DECODER_NOISE = 0.2
"""Noise on the latents of the last stage of the decoder, in standard deviations."""
PROMPT_LENGTH = world.PIPELINE_KWARGS["max_sequence_length"]
PAD, EOS, UNKNOWN = "<pad>", "</s>", "<unk>"


@dataclass(frozen=True)
class Settings:
    """Sizes of the run: `pool` scenes are drawn once; `vae` and `flow` settings are for the two networks."""

    pool: int
    vae_steps: int
    vae_batch: int
    vae_lr: float
    decoder_steps: int
    flow_steps: int
    flow_batch: int
    flow_lr: float
    compile: bool
    save_seconds: float = 120.0


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word of the world; `</s>` is not token 2, which CLIP takes as a sign of its legacy pooling."""
    prefixes = [prefix for split in world.SPLITS for prefix in world.PREFIXES[split]]
    captions = [
        world.caption(said) for tag in world.TAGS for each in world.contents(tag) for said in world.wordings(each)
    ]
    words = sorted({word for text in prefixes + captions for word in text.split()})
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"$A {EOS}", special_tokens=[(EOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, model_max_length=PROMPT_LENGTH
    )


def build_pipeline() -> FluxPipeline:
    """The untrained pipeline: 0.2 M parameters of VAE, 0.2 M of text encoders, 1.3 M of transformer."""
    tokenizer = build_tokenizer()
    text = {"vocab_size": len(tokenizer), "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    clip_config = CLIPTextConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, projection_dim=64,
        max_position_embeddings=PROMPT_LENGTH, **text,
    )  # fmt: skip
    t5_config = T5Config(d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, dropout_rate=0.0, **text)
    vae = AutoencoderKL(
        block_out_channels=(16, 24, 32), down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, layers_per_block=1, latent_channels=4, norm_num_groups=8,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, sample_size=world.IMAGE_SIZE,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=4, num_attention_heads=3, attention_head_dim=32,
        joint_attention_dim=64, pooled_projection_dim=64, guidance_embeds=False, axes_dims_rope=(4, 14, 14),
    )  # fmt: skip
    zero_output_projections(transformer)
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=CLIPTextModel(clip_config),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5_config),
        tokenizer_2=tokenizer,
        transformer=transformer,
    )


def zero_output_projections(transformer: FluxTransformer2DModel) -> None:
    """Starts every block as the identity and the predicted velocity at zero, as diffusion transformers should."""
    for name, module in transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and ((name.endswith("linear") and "norm" in name) or name == "proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)


def captioned_scenes(count: int, seed: int) -> tuple[list[str], Tensor]:
    """Draws captions and their scenes, some wrong on purpose (`WRONG_SCENES`).

    Returns:
        `tuple[list[str], Tensor]`: prompts and images in [0, 255], (count, 3, H, W), uint8.
    """
    rng = random.Random(seed)
    prefixes = [prefix for split in world.SPLITS for prefix in world.PREFIXES[split]]
    said = {tag: [each for content in world.contents(tag) for each in world.wordings(content)] for tag in world.TAGS}
    tags = rng.choices(world.TAGS, [TAG_WEIGHTS[tag] for tag in world.TAGS], k=count)
    prompts, images = [], torch.empty(count, 3, world.IMAGE_SIZE, world.IMAGE_SIZE, dtype=torch.uint8)
    for index, tag in enumerate(tags):
        content = rng.choice(said[tag])
        prompts.append(f"{rng.choice(prefixes)} {world.caption(content)}")
        if rng.random() < WRONG_SCENES[tag]:
            content = world.corrupted(content, rng)
        images[index] = torch.from_numpy(world.render(world.place(content, rng)) * 255).round()
    return prompts, images


def to_model_range(images: Tensor) -> Tensor:
    """Maps images from [0, 255] to the VAE's [-1, 1]."""
    return images.float() / 127.5 - 1


def cosine(optimizer: torch.optim.Optimizer, steps: int, warmup: int) -> torch.optim.lr_scheduler.LambdaLR:
    """A linear warm-up, then half a cosine down to zero."""

    def factor(step: int) -> float:
        progress = min(max(step - warmup, 0) / max(steps - warmup, 1), 1.0)
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * progress)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Stage:
    """A resumable training loop over one loss, with clipping, a weight average and checkpoints.

    Linear layers learn by Muon, all else by AdamW, both with a cosine schedule.
    """

    def __init__(self, name: str, modules: torch.nn.ModuleDict, lr: float, steps: int, checkpoint: Path) -> None:
        self.name, self.modules, self.steps, self.step = name, modules, steps, 0
        self.checkpoint = checkpoint.with_suffix(f".{name}.pt")
        linear = [module.weight for module in modules.modules() if isinstance(module, torch.nn.Linear)]
        other = [each for each in modules.parameters() if all(each is not weight for weight in linear)]
        self.optimizers = [torch.optim.AdamW(other, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)]
        if linear:
            self.optimizers.append(Muon(linear, lr=lr))
        self.schedules = [cosine(optimizer, steps, warmup=100) for optimizer in self.optimizers]
        self.average = torch.optim.swa_utils.AveragedModel(
            modules, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
        )

    def _parts(self) -> dict[str, torch.nn.Module | torch.optim.Optimizer | torch.optim.lr_scheduler.LRScheduler]:
        parts = {"modules": self.modules, "average": self.average}
        parts |= {f"optimizer {index}": optimizer for index, optimizer in enumerate(self.optimizers)}
        return parts | {f"schedule {index}": schedule for index, schedule in enumerate(self.schedules)}

    def save(self) -> None:
        """Writes the checkpoint; an interruption leaves the old one whole."""
        state = {"step": self.step} | {key: part.state_dict() for key, part in self._parts().items()}
        torch.save(state, self.checkpoint.with_suffix(".tmp"))
        self.checkpoint.with_suffix(".tmp").replace(self.checkpoint)

    def resume(self) -> None:
        """Takes up the checkpoint if there is one."""
        if self.checkpoint.exists():
            state = torch.load(self.checkpoint)
            self.step = state["step"]
            for key, part in self._parts().items():
                part.load_state_dict(state[key])

    def run(self, loss_of: Callable[[torch.Generator], Tensor], save_seconds: float) -> None:
        """Trains to the last step and loads the averaged weights into the modules."""
        self.resume()
        start, saved, total = time.monotonic(), time.monotonic(), 0.0
        first_step = self.step
        while self.step < self.steps:
            loss = loss_of(torch.Generator().manual_seed(self.step))
            self.modules.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
            for part in self.optimizers + self.schedules:
                part.step()
            self.average.update_parameters(self.modules)
            self.step += 1
            total += loss.item()
            if self.step % 100 == 0:
                pace = (time.monotonic() - start) / (self.step - first_step)
                print(f"{self.name} step {self.step}/{self.steps} loss {total / 100:.4f} {pace:.3f} s/step", flush=True)
                total = 0.0
            if time.monotonic() - saved > save_seconds or self.step == self.steps:
                self.save()
                saved = time.monotonic()
        self.modules.load_state_dict(self.average.module.state_dict())


def train_vae(vae: AutoencoderKL, images: Tensor, settings: Settings, checkpoint: Path) -> None:
    """Trains the autoencoder on images in [0, 255], (N, 3, H, W), and sets the latents' scale and shift."""

    def loss_of(generator: torch.Generator) -> Tensor:
        batch = to_model_range(images[torch.randint(len(images), (settings.vae_batch,), generator=generator)])
        posterior = vae.encode(batch).latent_dist
        decoded = vae.decode(posterior.sample(generator)).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch) + 1e-3 * divergence

    modules = torch.nn.ModuleDict({"vae": vae})
    Stage("vae", modules, settings.vae_lr, settings.vae_steps, checkpoint).run(loss_of, settings.save_seconds)
    latents = encoded(vae, images[:2048])
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())


def train_decoder(vae: AutoencoderKL, images: Tensor, settings: Settings, checkpoint: Path) -> None:
    """Trains the decoder alone on noisy mean latents, so that it forgives the flow's errors; the latents stay."""
    noise = DECODER_NOISE / vae.config.scaling_factor

    def loss_of(generator: torch.Generator) -> Tensor:
        chunk = images[torch.randint(len(images), (settings.vae_batch,), generator=generator)]
        latents = encoded(vae, chunk)
        latents = latents + noise * torch.randn(latents.shape, generator=generator)
        decoded, batch = vae.decode(latents).sample, to_model_range(chunk)
        return F.l1_loss(decoded, batch) + F.mse_loss(decoded, batch)

    modules = torch.nn.ModuleDict({"decoder": vae.decoder})
    Stage("decoder", modules, settings.vae_lr / 2, settings.decoder_steps, checkpoint).run(
        loss_of, settings.save_seconds
    )


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: Tensor, batch: int = 128) -> Tensor:
    """Mean latents of images in [0, 255]: (N, 3, H, W) -> (N, C, h, w)."""
    return torch.cat([vae.encode(to_model_range(chunk)).latent_dist.mean for chunk in images.split(batch)])


def training_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """Noise levels in [0, 1], (count,): four fifths about 0.85, where objects take place, shape and colour."""
    uniform = torch.rand(count, generator=generator)
    everywhere = SHIFT * uniform / (1 + (SHIFT - 1) * uniform)
    decisive = torch.sigmoid(1.7 + 0.8 * torch.randn(count, generator=generator))
    return torch.where(torch.arange(count) % 5 == 0, everywhere, decisive)


def train_flow(
    pipeline: FluxPipeline, prompts: list[str], images: Tensor, settings: Settings, checkpoint: Path
) -> None:
    """Trains transformer and text encoders by flow matching: x_sigma = (1 - sigma) x_0 + sigma noise.

    Args:
        pipeline (`FluxPipeline`): its VAE is trained.
        prompts (`list[str]`): N captions.
        images (`Tensor`): their scenes in [0, 255], (N, 3, H, W).
        settings (`Settings`): sizes of the run.
        checkpoint (`Path`): where the stage is kept.
    """
    vae, transformer = pipeline.vae, pipeline.transformer
    velocity_of = torch.compile(transformer) if settings.compile else transformer
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    latents = (encoded(vae, images) - shift) * scale
    tokens = pipeline.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    height, width = latents.shape[2] // 2, latents.shape[3] // 2
    latents = pipeline._pack_latents(latents, *latents.shape)
    image_ids = pipeline._prepare_latent_image_ids(None, height, width, "cpu", torch.float32)
    text_ids = torch.zeros(PROMPT_LENGTH, 3)

    def loss_of(generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(latents), (settings.flow_batch,), generator=generator)
        clean = latents[chosen]
        noise = torch.randn(clean.shape, generator=generator)
        sigma = training_sigmas(len(clean), generator)
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        velocity = velocity_of(
            hidden_states=noisy,
            timestep=sigma,
            pooled_projections=pipeline.text_encoder(tokens[chosen]).pooler_output,
            encoder_hidden_states=pipeline.text_encoder_2(tokens[chosen]).last_hidden_state,
            txt_ids=text_ids,
            img_ids=image_ids,
        ).sample
        return F.mse_loss(velocity, noise - clean)

    modules = torch.nn.ModuleDict(
        {"transformer": transformer, "text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    )
    Stage("flow", modules, settings.flow_lr, settings.flow_steps, checkpoint).run(loss_of, settings.save_seconds)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model", help="folder of the pipeline")
    parser.add_argument("--checkpoint", type=Path, default=Path(tempfile.gettempdir()) / "shapes_pretrain")
    parser.add_argument("--start", type=Path, help="pipeline to go on from, its VAE kept; by default an untrained one")
    parser.add_argument("--compile", action="store_true", help="twice as fast; needs a C++ compiler")
    parser.add_argument("--pool", type=int, default=40_000, help="number of captioned scenes")
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--vae-lr", type=float, default=2e-3)
    parser.add_argument("--decoder-steps", type=int, default=600)
    parser.add_argument("--flow-steps", type=int, default=2400)
    parser.add_argument("--flow-batch", type=int, default=64)
    parser.add_argument("--flow-lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Trains the VAE, its decoder, then the flow, and saves the pipeline."""
    arguments = vars(parse_arguments())
    output, checkpoint, seed, start = (arguments.pop(name) for name in ("output", "checkpoint", "seed", "start"))
    settings = Settings(**arguments)
    torch.manual_seed(seed)
    pipeline = FluxPipeline.from_pretrained(start) if start else build_pipeline()
    prompts, images = captioned_scenes(settings.pool, seed)
    if start is None:
        train_vae(pipeline.vae.train(), images, settings, checkpoint)
        train_decoder(pipeline.vae, images, settings, checkpoint)
    pipeline.vae.eval()
    train_flow(pipeline, prompts, images, settings, checkpoint)
    for module in (pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2):
        module.eval()
    pipeline.save_pretrained(output, safe_serialization=True)


if __name__ == "__main__":
    main()
