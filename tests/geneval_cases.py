"""Tiny detectors and colour classifiers of real classes, with random weights."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    SwinConfig,
)

from trl_leapalign.evaluation import ColorClassifier, Mask2FormerDetector
from trl_leapalign.evaluation.geneval.metadata import CLASS_NAMES, COLORS

SPECIAL = ["<pad>", "<unk>", "<bos>", "<eos>"]
WORDS = [*SPECIAL, *"a photo of object - colored dog cat couch".split(), *COLORS]
# Small enough for a quick test, large enough for the windows of the tiny Swin.
MAX_SIZE = (160, 96)


def tiny_config(num_labels: int = len(CLASS_NAMES)) -> Mask2FormerConfig:
    return Mask2FormerConfig(
        backbone_config=SwinConfig(
            embed_dim=8,
            depths=[2, 1, 1, 1],
            num_heads=[1, 2, 2, 4],
            window_size=2,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=20,
        dim_feedforward=24,
        encoder_layers=2,
        decoder_layers=3,
        num_attention_heads=2,
        num_queries=7,
        num_labels=num_labels,
    )


def tiny_mask2former(seed: int = 0, num_labels: int = len(CLASS_NAMES)) -> Mask2FormerForUniversalSegmentation:
    """A model without a weight that is 0 or 1."""
    torch.manual_seed(seed)
    model = Mask2FormerForUniversalSegmentation(tiny_config(num_labels)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        model.class_predictor.weight.mul_(5)
    return model


def tiny_detector(seed: int = 0) -> Mask2FormerDetector:
    return Mask2FormerDetector(tiny_mask2former(seed), max_size=MAX_SIZE)


def busy_detector() -> Mask2FormerDetector:
    """A detector that is sure of several classes, with masks that do not fill the image.

    A channel that is 1 everywhere lowers all mask logits.
    """
    model = tiny_mask2former(seed=1)
    pixels = model.model.pixel_level_module.decoder.mask_projection
    queries = model.model.transformer_module.decoder.mask_predictor.mask_embedder.get_submodule("2.0")
    with torch.no_grad():
        model.class_predictor.weight.mul_(6)
        pixels.weight.mul_(16)
        pixels.weight[0], pixels.bias[0] = 0, 1
        queries.weight[0], queries.bias[0] = 0, -20
    return Mask2FormerDetector(model, max_size=MAX_SIZE)


def color_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", 2), ("<eos>", 3)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")


def tiny_color_clip(seed: int = 0) -> CLIPModel:
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4
    )
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def tiny_classifier() -> ColorClassifier:
    return ColorClassifier(tiny_color_clip(), color_tokenizer())


def random_images(number: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Smooth colours with some noise, shape (number, 3, height, width) in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(number, 3, 4, 4, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")
    return (smooth + 0.1 * torch.rand(number, 3, height, width, generator=generator)).clamp(0, 1)
