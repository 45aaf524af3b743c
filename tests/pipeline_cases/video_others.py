"""Video pipelines of Kandinsky, Sana, Helios, Cosmos, ChronoEdit, Lucy and Motif."""

from typing import Any

from diffusers import (
    AutoencoderKLCosmos,
    AutoencoderKLHunyuanVideo,
    ChronoEditPipeline,
    ChronoEditTransformer3DModel,
    Cosmos2_5_PredictBasePipeline,
    Cosmos2VideoToWorldPipeline,
    CosmosTextToWorldPipeline,
    CosmosTransformer3DModel,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeliosPipeline,
    HeliosScheduler,
    HeliosTransformer3DModel,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
    LucyEditPipeline,
    SanaImageToVideoPipeline,
    SanaVideoPipeline,
    SanaVideoTransformer3DModel,
)
from transformers import CLIPTextModel, CLIPVisionModel, Gemma2Config, Gemma2Model

from examples.tiny import VOCABULARY, tiny_t5, tiny_tokenizer
from examples.tiny_edit import tiny_qwen_processor, tiny_qwen_tokenizer, tiny_qwen_vl
from examples.tiny_video import tiny_umt5, tiny_wan_transformer, tiny_wan_vae

from .parts import (
    VIDEO,
    arguments,
    case,
    clip_image_processor,
    clip_vision_config,
    image,
    long_clip_config,
    video,
)
from .video_wan import WIDTH, WITH_IMAGE, unipc


def kandinsky() -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=7.0),
        "vae": AutoencoderKLHunyuanVideo(
            latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
        ),
        "text_encoder": tiny_qwen_vl(),
        "tokenizer": tiny_qwen_processor(),
        "text_encoder_2": CLIPTextModel(long_clip_config()),
        "tokenizer_2": tiny_tokenizer(),
        "transformer": Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=32,
            in_text_dim2=32,
            time_dim=16,
            out_visual_dim=4,
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 4, 4),
            visual_cond=True,
        ),
    }


def sana(scheduler: Any) -> dict[str, Any]:
    gemma = Gemma2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    return {
        "scheduler": scheduler,
        "vae": tiny_wan_vae(),
        "text_encoder": Gemma2Model(gemma),
        "tokenizer": tiny_tokenizer(),
        "transformer": SanaVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            num_cross_attention_heads=2,
            cross_attention_head_dim=12,
            cross_attention_dim=24,
            caption_channels=32,
            sample_size=4,
        ),
    }


def sana_inputs(**more: Any) -> dict[str, Any]:
    return arguments(
        negative_prompt="a dog",
        guidance_scale=3.0,
        height=32,
        width=32,
        frames=5,
        max_sequence_length=16,
        complex_human_instruction=None,
        use_resolution_binning=False,
        **more,
    )


def wan_parts(**more: Any) -> dict[str, Any]:
    return {"vae": tiny_wan_vae(), "text_encoder": tiny_umt5(), "tokenizer": tiny_tokenizer(), **more}


def guided(**more: Any) -> dict[str, Any]:
    return arguments(negative_prompt="a dog", guidance_scale=3.0, max_sequence_length=16, **more)


def helios() -> dict[str, Any]:
    return wan_parts(
        scheduler=HeliosScheduler(stages=1, stage_range=[0, 1]),
        transformer=HeliosTransformer3DModel(
            **{name: value for name, value in WIDTH.items() if name != "rope_max_seq_len"},
            in_channels=4,
            rope_dim=(4, 4, 4),
        ),
    )


class Unchecked:
    """In place of the safety checker of Cosmos, which is a package of its own: everything passes."""

    def to(self, device: Any) -> "Unchecked":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


def cosmos_transformer(**more: Any) -> CosmosTransformer3DModel:
    return CosmosTransformer3DModel(
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        mlp_ratio=2,
        adaln_lora_dim=4,
        max_size=(4, 32, 32),
        concat_padding_mask=False,
        **more,
    )


def cosmos1() -> dict[str, Any]:
    return {
        "scheduler": EDMEulerScheduler(),
        "vae": AutoencoderKLCosmos(
            latent_channels=4,
            encoder_block_out_channels=(8, 8, 8, 8),
            decode_block_out_channels=(8, 8, 8, 8),
            attention_resolutions=(8,),
            resolution=64,
            num_layers=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=4,
        ),
        "text_encoder": tiny_t5(),
        "tokenizer": tiny_tokenizer(),
        "transformer": cosmos_transformer(in_channels=4, text_embed_dim=32),
        "safety_checker": Unchecked(),
    }


def cosmos2() -> dict[str, Any]:
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
        "vae": tiny_wan_vae(),
        "text_encoder": tiny_t5(),
        "tokenizer": tiny_tokenizer(),
        "transformer": cosmos_transformer(in_channels=5, text_embed_dim=32),
        "safety_checker": Unchecked(),
    }


def cosmos25() -> dict[str, Any]:
    return {
        "scheduler": unipc(),
        "vae": tiny_wan_vae(),
        "text_encoder": tiny_qwen_vl(),
        "tokenizer": tiny_qwen_tokenizer(),
        "transformer": cosmos_transformer(
            in_channels=5,
            text_embed_dim=32,
            use_crossattn_projection=True,
            crossattn_proj_in_channels=64,
            encoder_hidden_states_channels=32,
        ),
        "safety_checker": Unchecked(),
    }


CASES = [
    case(
        "kandinsky 5",
        "text to video",
        Kandinsky5T2VPipeline,
        kandinsky,
        lambda: guided(**VIDEO),
    ),
    case(
        "kandinsky 5",
        "image to video",
        Kandinsky5I2VPipeline,
        kandinsky,
        lambda: guided(**{**VIDEO, "num_frames": 29}, image=image()),
    ),
    case(
        "sana video",
        "text to video",
        SanaVideoPipeline,
        lambda: sana(
            DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
        ),
        sana_inputs,
    ),
    case(
        "sana video",
        "image to video",
        SanaImageToVideoPipeline,
        lambda: sana(FlowMatchEulerDiscreteScheduler(shift=8.0)),
        lambda: sana_inputs(image=image(32)),
    ),
    case(
        "helios",
        "text to video",
        HeliosPipeline,
        helios,
        lambda: guided(**VIDEO, num_latent_frames_per_chunk=2, history_sizes=[2, 2, 1]),
    ),
    case(
        "chronoedit",
        "edit",
        ChronoEditPipeline,
        lambda: wan_parts(
            scheduler=unipc(),
            image_encoder=CLIPVisionModel(clip_vision_config()),
            image_processor=clip_image_processor(),
            transformer=ChronoEditTransformer3DModel(**WIDTH, in_channels=WITH_IMAGE, image_dim=32),
        ),
        lambda: guided(**VIDEO, image=image()),
    ),
    case(
        "lucy",
        "edit",
        LucyEditPipeline,
        lambda: wan_parts(scheduler=unipc(), transformer=tiny_wan_transformer(8), expand_timesteps=True),
        lambda: guided(**VIDEO, video=video()),
    ),
    case(
        "cosmos predict 2.5",
        "text to video",
        Cosmos2_5_PredictBasePipeline,
        cosmos25,
        lambda: guided(**VIDEO),
    ),
    case(
        "cosmos predict 2",
        "image to video",
        Cosmos2VideoToWorldPipeline,
        cosmos2,
        lambda: guided(**VIDEO, image=image()),
        unsupported="turns its output into a numpy array",
    ),
    case(
        "cosmos predict 1",
        "text to video",
        CosmosTextToWorldPipeline,
        cosmos1,
        lambda: guided(**VIDEO),
        unsupported="does not sample by flow matching",
    ),
]
