"""Questions to a vision-language model as a differentiable reward."""

import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForImageTextToText, BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerBase

from .callables import check_inputs
from .pixels import PixelValues
from .reward_model import RewardModel, at_least_float32
from .weights import load_image_processor, load_model, load_tokenizer

YES_OR_NO = ("yes", "no")
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


class VLMReward(RewardModel):
    """Asks a vision-language model about each image, and rewards the answer it is about to give.

    For a question of yes or no the reward is log p(yes) - log p(no), of the first token of the answer. With `answers`
    that have values, such as `{"1": 1, "2": 2, "3": 3, "4": 4, "5": 5}`, it is the expected value over these answers.
    An answer counts in lower case and capitalised, with a space before it and without. The gradient flows through the
    model's preprocessing.

    Models of transformers with images in and text out: Qwen2-VL, Qwen2.5-VL, Qwen3-VL, and others whose chat template
    marks an image by one token and whose image processor cuts patches as theirs or resizes, crops and normalises, as
    LLaVA's. Others are refused. Models that think before they answer do not fit.

    Args:
        question (str | Sequence[str]): what is asked, or several questions; the reward is the mean of theirs. {prompt}
            stands for the image's prompt, and {name} for what its metadata have under that name.
        model (str | Path | PreTrainedModel): Hub id or folder, or the model itself, which is frozen.
        answers (Mapping[str, float] | None): values of the possible answers, each of which must be a single token. None
            is yes or no.
        closing (str | None): what follows each question. None names the answers: " Answer with one word: yes or no.".
        tokenizer (PreTrainedTokenizerBase | None): with the chat template; None is that of the Hub id or folder.
        image_processor (BaseImageProcessor | None): None is that of the Hub id or folder.
        max_pixels (int | None): greatest area of an image, for models that take any; fewer pixels cost less. None is
            the image processor's limit.
        dtype (torch.dtype | None): of the model's weights as they are loaded. None is bfloat16.
        quantization_config (Any): of `transformers`, such as `BitsAndBytesConfig(load_in_4bit=True)`, for loading.
        revision (str | None): branch, tag or commit of the Hub id.
        batch_size (int | None): images scored at a time. None is all of a batch.
        activation_checkpointing (bool): compute activations again in the backward pass rather than keep them.

    Raises:
        FileNotFoundError: if the model is neither on disk nor to be had from the Hub.
        TypeError: if an argument is of the wrong kind.
        ValueError: if the tokenizer has no token for an answer or no chat template with images, the image processor
            cannot be made differentiable, or an option has no effect.

    Example:
        ```python
        reward = VLMReward("Does this picture show {prompt}?", model="Qwen/Qwen2.5-VL-3B-Instruct")
        LeapAlignTrainer(pipe, reward, config, train_dataset=prompts).train()
        ```
    """

    def __init__(
        self,
        question: str | Sequence[str],
        model: str | Path | PreTrainedModel = "Qwen/Qwen2.5-VL-3B-Instruct",
        *,
        answers: Mapping[str, float] | None = None,
        closing: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        image_processor: BaseImageProcessor | None = None,
        max_pixels: int | None = None,
        dtype: torch.dtype | None = None,
        quantization_config: Any = None,
        revision: str | None = None,
        batch_size: int | None = None,
        activation_checkpointing: bool = False,
    ):
        super().__init__(batch_size=batch_size, activation_checkpointing=activation_checkpointing)
        self.questions = _check_questions(question)
        self.values = _check_answers(answers)
        names = list(YES_OR_NO if self.values is None else self.values)
        self.closing = f" Answer with one word: {', '.join(names[:-1])} or {names[-1]}." if closing is None else closing
        self.reads_prompts = any("{prompt}" in each for each in self.questions)
        loading = {"dtype": dtype, "quantization_config": quantization_config, "revision": revision}
        loading = {name: value for name, value in loading.items() if value is not None}
        if isinstance(model, PreTrainedModel):
            if loading or tokenizer is None or image_processor is None:
                raise ValueError(
                    "A model that is loaded already needs tokenizer=... and image_processor=..., and takes none of "
                    f"dtype, quantization_config and revision, but got {sorted(loading)}."
                )
        else:
            tokenizer = load_tokenizer(model if tokenizer is None else tokenizer, revision, "model")
            if image_processor is None:
                image_processor = load_image_processor(model, "model", revision)
        self.tokenizer = tokenizer
        self.answer_ids = [_tokens_of(tokenizer, name) for name in names]
        _check_distinct(names, self.answer_ids)
        self.pixel_values = PixelValues(image_processor, max_pixels)
        if not isinstance(model, PreTrainedModel):
            settings = {"dtype": torch.bfloat16, **loading}
            model = load_model(AutoModelForImageTextToText, model, argument="model", **settings)
        self.model = model
        self.image_token = getattr(model.config, "image_token_id", None)
        self._image_lengths: dict[tuple[int, int], int] = {}
        for each in self.questions:
            self.encode_prompt(each)
        self.eval().requires_grad_(False)

    def forward(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Score images.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].
            prompts (list[str]): length B.
            metadata (list[dict]): length B, with what the questions' placeholders name.

        Returns:
            tuple[Tensor, dict[str, Tensor]]: rewards with the images' graph, shape (B,), float32 (float64 for a model
                in float64); and, detached, "answered": the probability that the model gives one of the answers, and
                for several questions "question_0", ...: the reward of each; all of shape (B,).

        Raises:
            TypeError: if the images are no floating tensor, or the prompts or metadata no list.
            ValueError: if the shape, the range or a number is wrong, a prompt is empty or holds the image token, or the
                metadata lack what a question needs.
        """
        check_inputs(images, prompts, metadata, type(self).__name__, self.reads_prompts)
        with torch.autocast(images.device.type, enabled=False):
            images = at_least_float32(images)
            results = []
            for question in self.questions:
                filled = [fill(question, prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
                results.append(self._score_all(images, [self._encoded(text) for text in filled]))
        rewards, answered = torch.stack(results).unbind(-1)  # each (questions, B)
        details = {"answered": answered.mean(0).detach()}
        if len(self.questions) > 1:
            details |= {f"question_{index}": row.detach() for index, row in enumerate(rewards)}
        return rewards.mean(0), details

    def score(self, images: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """Ask one question about each image of a micro-batch.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].
            texts (Sequence[Tensor]): token ids of each conversation, with one token for the image.

        Returns:
            Tensor: the reward and the detached probability of all answers together, shape (B, 2).
        """
        logits = at_least_float32(self.logits(images, texts))
        answers = torch.stack([logits[:, ids].logsumexp(-1) for ids in self.answer_ids], dim=-1)
        answered = (answers.logsumexp(-1) - logits.logsumexp(-1)).exp().detach()
        if self.values is None:
            return torch.stack([answers[:, 0] - answers[:, 1], answered], dim=-1)
        values = answers.new_tensor(list(self.values.values()))
        return torch.stack([answers.softmax(-1) @ values, answered], dim=-1)

    def logits(self, images: Tensor, texts: Sequence[Tensor]) -> Tensor:
        """Compute the model's logits for the first token of its answer.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1].
            texts (Sequence[Tensor]): token ids of each conversation, with one token for the image.

        Returns:
            Tensor: shape (B, V), of the model's dtype.
        """
        inputs = self.pixel_values(images)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        length = self._image_length(images, inputs)
        rows = [self._with_image(ids.to(images.device), length) for ids in texts]
        # Padding is on the right of causal models: what comes before it does not change.
        inputs["input_ids"] = pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id or 0)
        inputs["attention_mask"] = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        if "mm_token_type_ids" in inspect.signature(self.model.forward).parameters:
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == self.image_token).int()
        last = torch.tensor([len(row) - 1 for row in rows], device=images.device)
        kept, place = last.unique(return_inverse=True)
        logits = self.model(**inputs, logits_to_keep=kept, use_cache=False).logits
        return logits[torch.arange(len(rows), device=images.device), place]

    def encode_prompt(self, prompt: str) -> Tensor:
        """Tokenise the conversation about an image.

        Args:
            prompt (str): the question, without placeholders.

        Returns:
            Tensor: token ids up to the answer, with one token for the image.

        Raises:
            ValueError: if there is not one image token.
        """
        content = [{"type": "image"}, {"type": "text", "text": prompt + self.closing}]
        try:
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
            )
        except ValueError as error:
            raise ValueError(
                f"{type(self.tokenizer).__name__} has no chat template that can be used: {error} Set "
                "tokenizer.chat_template to that of the model's processor."
            ) from error
        begin = self.tokenizer.bos_token
        special = begin is None or not text.startswith(begin)
        ids = self.tokenizer(text, add_special_tokens=special, return_tensors="pt").input_ids[0]
        found = int((ids == self.image_token).sum()) if self.image_token is not None else 0
        if found != 1:
            raise ValueError(
                f"The conversation about {prompt!r} has {found} image tokens (id {self.image_token}); it must have "
                "one. The prompt must not hold the token itself, and the tokenizer's chat template must mark an image "
                "by it, as those of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and LLaVA do."
            )
        return ids.to(self.model.device)

    def _with_image(self, ids: Tensor, length: int) -> Tensor:
        place = int((ids == self.image_token).nonzero())
        return torch.cat([ids[:place], ids.new_full((length,), self.image_token), ids[place + 1 :]])

    @torch.no_grad()
    def _image_length(self, images: Tensor, inputs: dict[str, Tensor]) -> int:
        """Tokens that the model makes of an image of this size, for models of no patches found out once."""
        if "image_grid_thw" in inputs:
            return int(inputs["image_grid_thw"][0].prod()) // self.pixel_values.processor.merge_size**2
        size = tuple(images.shape[-2:])
        if size not in self._image_lengths:
            one = {name: value[: len(value) // len(images)] for name, value in inputs.items()}
            features = self.model.get_image_features(**one, return_dict=True).pooler_output
            self._image_lengths[size] = len(features[0])
        return self._image_lengths[size]


def fill(question: str, prompt: str, row: Mapping[str, Any]) -> str:
    """Put a prompt and its metadata into a question.

    Args:
        question (str): with placeholders such as {prompt}; other braces stay.
        prompt (str): the image's prompt.
        row (Mapping[str, Any]): its metadata.

    Returns:
        str: the question.

    Raises:
        ValueError: if the metadata lack what a placeholder names.
    """
    known = {**row, "prompt": prompt}
    missing = [name for name in PLACEHOLDER.findall(question) if known.get(name) is None]
    if missing:
        raise ValueError(
            f"The question {question!r} needs {missing[0]!r}, but the metadata of {prompt!r} have only "
            f"{sorted(name for name, value in row.items() if value is not None)}. Give the prompts such a column."
        )
    return PLACEHOLDER.sub(lambda match: str(known[match[1]]), question)


def _check_questions(question: Any) -> list[str]:
    questions = [question] if isinstance(question, str) else question
    if not isinstance(questions, (list, tuple)) or not all(isinstance(each, str) for each in questions):
        raise TypeError(f"question={question!r} must be a text, or a list of texts.")
    if not questions or not all(each.strip() for each in questions):
        raise ValueError(f"question={question!r} must not be empty.")
    return list(questions)


def _check_answers(answers: Any) -> dict[str, float] | None:
    if answers is None:
        return None
    if not isinstance(answers, Mapping) or not all(isinstance(name, str) and name.strip() for name in answers):
        raise TypeError(f'answers={answers!r} must be a dict of texts and their values, such as {{"yes": 1, "no": 0}}.')
    if len(set(answers.values())) < 2:
        raise ValueError(f"answers={answers!r} must be two at least, of different values.")
    return dict(answers)


def _tokens_of(tokenizer: PreTrainedTokenizerBase, answer: str) -> list[int]:
    """Ids of the single tokens that an answer may be written as."""
    found = set()
    for word in (answer, answer.lower(), answer.capitalize()):
        for text in (word, f" {word}"):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            if len(ids) == 1 and ids[0] != tokenizer.unk_token_id:
                found.add(ids[0])
    if not found:
        raise ValueError(
            f"The tokenizer has no single token for the answer {answer!r}, so its probability cannot be read off. Ask "
            "for other answers, by answers={...}."
        )
    return sorted(found)


def _check_distinct(names: list[str], ids: list[list[int]]) -> None:
    for index, name in enumerate(names):
        for other in range(index):
            if set(ids[index]) & set(ids[other]):
                raise ValueError(
                    f"The answers {names[other]!r} and {name!r} share a token, so they cannot be told apart."
                )
