"""A reward that a server computes."""

import base64
import io
import json
import math
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import torch
from PIL.Image import Image
from torch import Tensor

from ..media import to_pil
from ..ranges import Range
from .callables import check_inputs


class RemoteReward:
    """Scores from an HTTP server. They carry no gradient: training compares the samples of a prompt, as for BlackBox.

    Each call posts JSON {"images": [PNG in base64, ...], "prompts": [...], "metadata": [...]}, and expects
    {"scores": [number, ...]}, one an image.

    Args:
        url (str): of the server, http or https.
        timeout (float): seconds to wait for an answer.
        retries (int): further attempts after a failure of the connection or the server, each after a longer pause.

    Raises:
        ValueError: if the url is none, or a setting is out of range.
    """

    differentiable = False

    def __init__(self, url: str, *, timeout: float = 60.0, retries: int = 3):
        if urlsplit(url).scheme not in ("http", "https"):
            raise ValueError(f"url={url!r} must start with http:// or https://.")
        Range(0, excluded=True).check("timeout", timeout)
        Range(0, whole=True).check("retries", retries)
        self.url, self.timeout, self.retries = url, timeout, retries

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Ask the server.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1]; sent in 8 bits.
            prompts (list[str]): length B.
            metadata (list[dict]): length B, of what JSON can hold.

        Returns:
            Tensor: scores without graph, shape (B,), float32.

        Raises:
            TypeError: if the images, prompts or metadata are of the wrong kind.
            ValueError: if the images or prompts do not fit, or the answer does not.
            ConnectionError: if the server gives no answer.
        """
        check_inputs(images, prompts, metadata, type(self).__name__, reads_prompts=False)
        content = {"images": list(map(_png, to_pil(images))), "prompts": list(prompts), "metadata": list(metadata)}
        answer = self._post(json.dumps(content).encode())
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(images) or not all(map(_is_number, scores)):
            raise ValueError(
                f'{self.url} must answer {{"scores": [...]}} with {len(images)} numbers, but answered '
                f"{str(answer)[:200]}."
            )
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _post(self, body: bytes) -> Any:
        request = Request(self.url, body, {"Content-Type": "application/json"})
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(min(2.0 ** (attempt - 1), 30.0))
            try:
                with urlopen(request, timeout=self.timeout) as response:
                    return json.loads(response.read())
            except HTTPError as error:
                if error.code < 500:
                    raise ConnectionError(f"{self.url} refuses the request: {error}.") from error
                failure: Exception = error
            except ValueError as error:
                raise ValueError(f"{self.url} answers no JSON: {error}.") from error
            except (URLError, HTTPException, OSError) as error:
                failure = error
        raise ConnectionError(f"{self.url} gives no answer in {self.retries + 1} attempts: {failure}.") from failure


def _png(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
