"""GenEval's colour classifier: CLIP between ten colours, on a thing cut out of its image."""

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedTokenizerBase

from ...rewards.preprocessing import CLIP_MEAN, CLIP_STD
from ...rewards.weights import load_model, load_tokenizer
from .metadata import COLORS
from .rules import Detection

BACKGROUND = (153, 153, 153)
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class ColorClassifier(nn.Module):
    """Names the colour of things.

    Args:
        model (CLIPModel): frozen here; GenEval's is OpenAI's ViT-L/14.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.

    Raises:
        ValueError: if the tokenizer is another model's.
    """

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase):
        super().__init__()
        known = model.config.text_config.vocab_size
        if len(tokenizer) != known:
            raise ValueError(
                f"The tokenizer has {len(tokenizer)} tokens, but CLIP knows {known}. From a folder without tokenizer "
                "files, transformers makes an empty one: add the model's own."
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.text_features: dict[str, Tensor] = {}

    @classmethod
    def from_pretrained(cls, source: str | Path = "openai/clip-vit-large-patch14") -> "ColorClassifier":
        """Load the classifier.

        Args:
            source (str | Path): Hub id or folder of a CLIP model with its tokenizer.

        Returns:
            ColorClassifier: on the CPU, in float32.

        Raises:
            FileNotFoundError: if the files are neither on disk nor to be had from the Hub.
            ValueError: if they are those of another model, cut off, or without the tokenizer's.
        """
        model = load_model(CLIPModel, source, argument="color_classifier")
        return cls(model, load_tokenizer(source, argument="color_classifier"))

    @torch.no_grad()
    def forward(self, image: Image.Image, class_name: str, detections: Sequence[Detection]) -> list[str]:
        """Name the colour of each thing.

        Args:
            image (Image.Image): the whole image, in RGB.
            class_name (str): what the things are.
            detections (Sequence[Detection]): where they are, at least one.

        Returns:
            list[str]: one of `COLORS` for each.
        """
        return [COLORS[index] for index in self.similarities(image, class_name, detections).argmax(1).tolist()]

    @torch.no_grad()
    def similarities(self, image: Image.Image, class_name: str, detections: Sequence[Detection]) -> Tensor:
        """Cosines of things and colours, shape (len(detections), 10), float32; arguments as for `forward`."""
        size = self.model.config.vision_config.image_size
        pixels = torch.stack([to_pixels(cut_out(image, detection), size) for detection in detections])
        pixels = pixels.to(self.model.device, self.model.dtype)
        features = self.model.get_image_features(pixel_values=pixels).pooler_output.float()
        return F.normalize(features, dim=-1) @ self._color_features(class_name).to(features.device).T

    def _color_features(self, class_name: str) -> Tensor:
        """Unit features of the colours for a class, shape (10, D): the mean over the templates."""
        if class_name not in self.text_features:
            texts = [template.format(color=color, name=class_name) for color in COLORS for template in TEMPLATES]
            length = self.model.config.text_config.max_position_embeddings
            tokens = self.tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
            tokens = tokens.to(self.model.device)
            output = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            features = F.normalize(output.pooler_output.float(), dim=-1).unflatten(0, (len(COLORS), len(TEMPLATES)))
            self.text_features[class_name] = F.normalize(features.mean(1), dim=-1).cpu()
        return self.text_features[class_name]


def cut_out(image: Image.Image, detection: Detection) -> Image.Image:
    """Crop an image to a thing's box, with everything outside its mask grey.

    Args:
        image (Image.Image): in RGB, W x H.
        detection (Detection): the thing; its mask has shape (H, W).

    Returns:
        Image.Image: the crop, in RGB.
    """
    if detection.mask is not None:
        blank = Image.new("RGB", image.size, BACKGROUND)
        image = Image.composite(image, blank, Image.fromarray(detection.mask.cpu().numpy()))
    return image.crop(detection.box)


def to_pixels(image: Image.Image, size: int) -> Tensor:
    """CLIP's own preprocessing in 8 bits: shortest edge to `size` by PIL's bicubic, centre crop, normalise.

    Args:
        image (Image.Image): in RGB.
        size (int): pixels of the model's square input.

    Returns:
        Tensor: shape (3, size, size), float32.
    """
    width, height = image.size
    shortest = min(width, height)
    width, height = int(size * width / shortest), int(size * height / shortest)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1) / 255
    mean, std = (pixels.new_tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (pixels - mean) / std
