"""UnifiedReward: a vision-language model that writes down a score. It gives no gradient."""

import logging
import math
import re
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    BaseImageProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ..media import to_pil
from ..rewards.callables import check_inputs
from ..rewards.weights import load_image_processor, load_model, load_tokenizer

logger = logging.getLogger(__name__)

ALIGNMENT_PROMPT = """This image was made from the description: "{prompt}"
Does it show what the description says? Look for everything that is named, and whether its number, colours, actions and
places are right. How beautiful the image is does not matter.
Give a score from 1 (it shows something else) to 5 (it shows all of it), with decimals if you like.
Write as the last line: Final Score: <score>"""

IMAGE_QUALITY_PROMPT = """How good is this image as a picture? Look at sharpness, light, colours and composition, and
for what is wrong in it, such as broken shapes, extra limbs, noise or garbled text. What it shows does not matter.
Give a score from 1 (very bad) to 5 (flawless), with decimals if you like.
Write as the last line: Final Score: <score>"""

SCORES = ("final", "alignment", "coherence", "style")

IMAGE_TOKEN = "<|image_pad|>"
# The conversation that Qwen2-VL and Qwen2.5-VL are trained on, for tokenizers that come without it.
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "<|im_start|>user\n<|vision_start|>{image}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
)
_CHAT_MODELS = ("qwen2_vl", "qwen2_5_vl")
_MARKUP = re.compile(r"[*_`#$\[\]]")
_TO = r"\s*(?:-|\u2013|to)\s*"
# A number that is no part of a longer one or of a range; \u2013 is a dash.
_NUMBER = rf"(\d+(?:\.\d+)?)(?!\d|[.,]\d|{_TO}\d)"


class UnifiedReward(nn.Module):
    """Scores images by what a vision-language model answers, from 1 (bad) to 5 (good).

    The model is one of Qwen's kind: "CodeGoat24/UnifiedReward-qwen-7b" answers with a final score, and
    "CodeGoat24/UnifiedReward-2.0-qwen-7b" can score alignment, coherence and style. Published figures need the prompt
    that its authors give; the default is a short one of our own.

    Args:
        model (PreTrainedModel): a model with images in and text out, frozen here.
        tokenizer (PreTrainedTokenizerBase): its tokenizer.
        image_processor (BaseImageProcessor): its image processor.
        prompt (str): what is asked about an image; "{prompt}" in it stands for the image's prompt.
        score (str): which score of the answer counts: "final" (the text "Final Score:"), or "alignment", "coherence" or
            "style" ("Style Score (1-5):"). Details have all that are found.
        image_size (tuple[int, int] | None): height and width to squash images to first; Flow-GRPO and FlowBP use
            (512, 512). None leaves them as they are.
        max_new_tokens (int): how long an answer may get.
        unparsed_score (float): score of an answer that has none. It is NaN in an evaluation, which counts such answers;
            training, which a NaN stops, needs a number, such as 1.

    Raises:
        ValueError: if a setting is out of range or the model takes no images in Qwen's way.
    """

    differentiable = False

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: BaseImageProcessor,
        prompt: str = ALIGNMENT_PROMPT,
        score: str = "final",
        image_size: tuple[int, int] | None = None,
        max_new_tokens: int = 1024,
        unparsed_score: float = math.nan,
    ):
        super().__init__()
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"prompt={prompt!r} must be a text that is not empty.")
        if score not in SCORES:
            raise ValueError(f"score={score!r} is unknown. Known are: {', '.join(SCORES)}.")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens!r} must be at least 1.")
        token = getattr(model.config, "image_token_id", None)
        if token is None or tokenizer.convert_tokens_to_ids(IMAGE_TOKEN) != token:
            raise ValueError(
                f"{type(model).__name__} and its tokenizer do not mark images by {IMAGE_TOKEN}, as Qwen2-VL and "
                "Qwen2.5-VL do. Use one of UnifiedReward's -qwen- models; those in LLaVA's format are not supported."
            )
        if tokenizer.chat_template is None and model.config.model_type not in _CHAT_MODELS:
            raise ValueError(
                f"The tokenizer of this {model.config.model_type} model has no chat template, so its conversation is "
                "not known. Load the tokenizer from the model's own folder, with its chat_template.jinja."
            )
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.prompt = prompt
        self.score = score
        self.image_size = image_size
        self.max_new_tokens = max_new_tokens
        self.unparsed_score = unparsed_score
        self.warned = False

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
        **settings: Any,
    ) -> "UnifiedReward":
        """Load the model, its tokenizer and its image processor.

        Args:
            source (str | Path): Hub id or folder.
            device (str | torch.device | None): where the model goes; None is the CPU.
            dtype (torch.dtype): of its weights.
            **settings (Any): prompt, score, image_size and max_new_tokens.

        Returns:
            UnifiedReward: frozen, in eval mode.

        Raises:
            FileNotFoundError: if files are missing; the message says how to pass a local path.
            ValueError: if they are cut off, or those of another model.
        """
        model = load_model(AutoModelForImageTextToText, source, dtype=dtype, argument="source")
        tokenizer = load_tokenizer(source, argument="source")
        processor = load_image_processor(source, argument="source")
        return cls(model, tokenizer, processor, **settings).to(device or "cpu")

    @torch.no_grad()
    def forward(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Score images one by one, with greedy decoding.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].
            prompts (list[str]): length B.
            metadata (list[dict]): length B, unused.

        Returns:
            tuple[Tensor, dict[str, Any]]: scores from 1 to 5, shape (B,), float32, `unparsed_score` where the answer
                has none; and "answer", the texts; "unparsed", 1 for answers without the score and 0 for others, shape
                (B,); "score_or_zero", in which answers without a score count 0, as some published evaluations do;
                "final", "alignment", "coherence" and "style", shape (B,), NaN where the answer does not have them.
        """
        check_inputs(images, prompts, metadata, type(self).__name__)
        answers = [self.answer(image, prompt) for image, prompt in zip(to_pil(images), prompts, strict=True)]
        found = {name: [parse_score(answer, name) for answer in answers] for name in SCORES}
        values = {name: torch.tensor(numbers, device=images.device) for name, numbers in found.items()}
        scores = values[self.score]
        unparsed = scores.isnan()
        self._warn(unparsed.tolist(), answers)
        details = {"answer": answers, "unparsed": unparsed.float(), "score_or_zero": scores.nan_to_num(0.0), **values}
        return scores.masked_fill(unparsed, self.unparsed_score), details

    @torch.no_grad()
    def answer(self, image: Image.Image, prompt: str) -> str:
        """Ask about an image.

        Args:
            image (Image.Image): in RGB.
            prompt (str): what the image was made from.

        Returns:
            str: the model's answer.
        """
        inputs = self._inputs(image, prompt).to(self.model.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        output = self.model.generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=None,
            top_p=None,
            top_k=None,
        )
        return self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _inputs(self, image: Image.Image, prompt: str) -> Any:
        """Tokens and patches of one question, with as many image tokens as the model will put features in."""
        if self.image_size is not None:
            image = image.resize(self.image_size[::-1], Image.Resampling.BICUBIC)
        pixels = self.image_processor(images=[image], return_tensors="pt")
        merge = self.model.config.vision_config.spatial_merge_size
        image_tokens = IMAGE_TOKEN * (int(pixels["image_grid_thw"][0].prod()) // merge**2)
        chat = self._chat(self.prompt.replace("{prompt}", prompt)).replace(IMAGE_TOKEN, image_tokens, 1)
        inputs = self.tokenizer(chat, return_tensors="pt", add_special_tokens=False)
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.model.config.image_token_id).int()
        inputs.update(pixels)
        return inputs

    def _chat(self, question: str) -> str:
        """The conversation with one place for the image, by the tokenizer's own template."""
        question = question.replace(IMAGE_TOKEN, "")  # a prompt that names it would take the image's place
        if self.tokenizer.chat_template is None:
            return _CHAT.format(image=IMAGE_TOKEN, question=question)
        content = [{"type": "image"}, {"type": "text", "text": question}]
        message = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)

    def _warn(self, unparsed: list[bool], answers: list[str]) -> None:
        if any(unparsed) and not self.warned:
            self.warned = True
            logger.warning(
                f"{sum(unparsed)} of {len(unparsed)} answers have no {self.score} score, such as "
                f"{answers[unparsed.index(True)][-200:]!r}. Their score is {self.unparsed_score}, and the detail "
                "'unparsed' counts them. Check that the prompt is one this model knows, and that max_new_tokens is "
                "enough. This is said once."
            )


def parse_score(answer: str, name: str = "final") -> float:
    """Find a score in an answer, whatever its case and Markdown.

    Args:
        answer (str): what the model wrote.
        name (str): "final", "alignment", "coherence" or "style".

    Returns:
        float: the first number after "<name> Score:" or "<name> Score (1-5):", also one above 5 ("10" is 10); NaN if
            there is none.
    """
    pattern = rf"\b{name}\s*score\s*(?:\(\s*1{_TO}5\s*\))?\s*[:=]\s*{_NUMBER}"
    match = re.search(pattern, _MARKUP.sub("", answer), flags=re.IGNORECASE)
    if match is not None:
        return float(match[1])
    return math.nan
