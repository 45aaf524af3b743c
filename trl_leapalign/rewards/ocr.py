"""How well an image shows the text that it should: a reward without gradient."""

import re
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..media import to_bytes
from .callables import check_inputs

QUOTED = re.compile(r'"([^"]+)"|\u201c([^\u201d]+)\u201d')
SCORES = ("edit_distance", "exact")

Reader = Callable[[np.ndarray], str]
"""`reader(image)` with an image (H, W, 3) in RGB, uint8, returns the text in it."""


class OCRReward:
    """Reads the text in an image, and compares it with the one asked for. It carries no gradient.

    The text is that of the prompt's column `text_column`, or what the prompt has in double quotes: a shop sign that
    says "Open". Case and white space do not count. "edit_distance" is 1 - min(d, n) / n with the Levenshtein distance d
    to the n characters asked for, and 1 where the whole text occurs among others; "exact" is 1 for the text alone and 0
    otherwise.

    Args:
        reader (Reader | None): returns the text in an image (H, W, 3), uint8. None is `rapid_ocr()`, PaddleOCR's models
            on the CPU: `pip install "trl-leapalign[ocr]"`.
        score (str): "edit_distance" or "exact".
        text_column (str): where a prompt's metadata have the text.

    Raises:
        ValueError: if the score is unknown.
        TypeError: if the reader cannot be called.
        ImportError: if there is no reader and the extra is not installed.
    """

    differentiable = False

    def __init__(self, reader: Reader | None = None, *, score: str = "edit_distance", text_column: str = "text"):
        if score not in SCORES:
            raise ValueError(f"score={score!r} is unknown. Choose one of {', '.join(SCORES)}.")
        if reader is not None and not callable(reader):
            raise TypeError(f"reader must be called with an image and return its text, but {reader!r} cannot.")
        self.reader = rapid_ocr() if reader is None else reader
        self.score, self.text_column = score, text_column

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
    ) -> tuple[Tensor, dict[str, list[str]]]:
        """Read images.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1]; read in 8 bits.
            prompts (list[str]): length B.
            metadata (list[dict]): length B.

        Returns:
            tuple[Tensor, dict[str, list[str]]]: from 0 to 1, without graph, shape (B,), float32; and "text", what was
                read in each image.

        Raises:
            TypeError: if the reader returns no text.
            ValueError: if a prompt has no text, or the shape or range of the images is wrong.
        """
        check_inputs(images, prompts, metadata, type(self).__name__, reads_prompts=False)
        wanted = [self._wanted(prompt, row) for prompt, row in zip(prompts, metadata, strict=True)]
        found = [self.reader(image) for image in to_bytes(images).permute(0, 2, 3, 1).contiguous().cpu().numpy()]
        strangers = [text for text in found if not isinstance(text, str)]
        if strangers:
            raise TypeError(f"The reader must return the text in an image, but returned {strangers[0]!r}.")
        compare = exact_match if self.score == "exact" else edit_similarity
        scores = [compare(text, goal) for text, goal in zip(found, wanted, strict=True)]
        return torch.tensor(scores, device=images.device), {"text": found}

    def _wanted(self, prompt: str, row: dict[str, Any]) -> str:
        text = row.get(self.text_column)
        if text is None and (match := QUOTED.search(prompt)):
            text = match[1] or match[2]
        if not isinstance(text, str) or not _plain(text):
            raise ValueError(
                f"The prompt {prompt!r} asks for no text. Put it in double quotes, or give the prompts a column "
                f"{self.text_column!r}."
            )
        return text


def rapid_ocr() -> Reader:
    """A reader of PaddleOCR's models (English and Chinese), on the CPU by onnxruntime; nothing is downloaded.

    Returns:
        Reader: it joins the lines that it finds, from top to bottom, by spaces.

    Raises:
        ImportError: if rapidocr or onnxruntime is not installed.
    """
    missing = [name for name in ("rapidocr", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ImportError(f'Reading text needs {" and ".join(missing)}: pip install "trl-leapalign[ocr]".')
    from rapidocr import RapidOCR

    engine = RapidOCR(params={"Global.log_level": "error"})

    def read(image: np.ndarray) -> str:
        return " ".join(engine(np.ascontiguousarray(image[:, :, ::-1])).txts or ())  # it takes BGR

    return read


def edit_similarity(text: str, wanted: str) -> float:
    """Compare a text with the one asked for, character by character.

    Args:
        text (str): what was read.
        wanted (str): what was asked for, not empty.

    Returns:
        float: 1 - min(d, n) / n with the Levenshtein distance d and n = len(wanted); 1 if `wanted` occurs in the text.
            Without white space and case.
    """
    text, wanted = _plain(text), _plain(wanted)
    if wanted in text:
        return 1.0
    return 1.0 - min(levenshtein(text, wanted), len(wanted)) / len(wanted)


def exact_match(text: str, wanted: str) -> float:
    """Return 1.0 if a text is the one asked for, without white space and case, and 0.0 otherwise."""
    return float(_plain(text) == _plain(wanted))


def levenshtein(first: str, second: str) -> int:
    """Return the least number of characters to insert, delete or replace that makes one text the other."""
    row = list(range(len(second) + 1))
    for index, character in enumerate(first, 1):
        diagonal, row[0] = row[0], index
        for column, other in enumerate(second, 1):
            diagonal, row[column] = (
                row[column],
                min(diagonal + (character != other), row[column] + 1, row[column - 1] + 1),
            )
    return row[-1]


def _plain(text: str) -> str:
    return "".join(text.split()).casefold()
