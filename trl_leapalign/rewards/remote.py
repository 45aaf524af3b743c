"""A reward that a server computes."""

import base64
import io
import json
import threading
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urlsplit, urlunsplit
from urllib.request import HTTPRedirectHandler, Request, build_opener

import torch
from PIL.Image import Image
from torch import Tensor

from ..media import to_pil
from ..ranges import Range
from ..redaction import without_credentials
from .callables import check_inputs

MOST_BYTES = 2**22
"""Of an answer."""
MOST = torch.finfo(torch.float32).max
TRIED_AGAIN = (408, 425, 429)


class RemoteReward:
    """Scores from an HTTP server. They carry no gradient: training compares the samples of a prompt, as for BlackBox.

    Each call posts JSON {"images": [PNG in base64, ...], "prompts": [...], "metadata": [...]}, and expects
    {"scores": [number, ...]}, one an image. Redirects are not followed, as the scores would be another server's.

    Args:
        url (str): of the server, http or https. A user and a password in it are sent as basic authentication; errors
            tell neither them nor the query.
        timeout (float): seconds until an answer must be there, with all attempts and pauses.
        retries (int): further attempts after a failure of the connection or the server, or when it is too busy (429),
            each after a longer pause, or the one that the server asks for.

    Raises:
        ValueError: if the url is none, or a setting is out of range.
    """

    differentiable = False

    def __init__(self, url: str, *, timeout: float = 60.0, retries: int = 3):
        self.url, parts = without_credentials(str(url)), urlsplit(str(url))
        if parts.scheme not in ("http", "https") or not parts.hostname or self.url.endswith("//..."):
            raise ValueError(f"url={self.url!r} must be an address that starts with http:// or https://.")
        Range(0, excluded=True).check("timeout", timeout)
        Range(0, whole=True).check("retries", retries)
        self.timeout, self.retries = timeout, retries
        self._target = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], fragment=""))
        self._headers = {"Content-Type": "application/json"}
        if parts.username is not None:
            user = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            self._headers["Authorization"] = f"Basic {base64.b64encode(user).decode()}"

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Ask the server.

        Args:
            images (Tensor): shape (B, 3, H, W) in [0, 1]; sent in 8 bits.
            prompts (list[str]): length B.
            metadata (list[dict]): length B, of what JSON can hold.

        Returns:
            Tensor: scores without graph, shape (B,), float32, finite.

        Raises:
            TypeError: if the images, prompts or metadata are of the wrong kind.
            ValueError: if the images or prompts do not fit, or the answer does not.
            ConnectionError: if the server gives no answer in time, refuses the request or redirects it.
        """
        check_inputs(images, prompts, metadata, type(self).__name__, reads_prompts=False)
        content = {"images": list(map(_png, to_pil(images))), "prompts": list(prompts), "metadata": list(metadata)}
        answer = self._post(json.dumps(content).encode())
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list) or len(scores) != len(images) or not all(map(_is_number, scores)):
            raise ValueError(
                f'{self.url} must answer {{"scores": [...]}} with {len(images)} numbers that are finite in float32, '
                f"but answered {str(answer)[:200]}."
            )
        return torch.tensor(scores, dtype=torch.float32, device=images.device)

    def _post(self, body: bytes) -> Any:
        end = time.monotonic() + self.timeout
        failure: Exception | str = "the time is up"
        for attempt in range(self.retries + 1):
            if end <= time.monotonic():
                break
            pause = min(2.0**attempt, 30.0)
            try:
                answer = _within(end, lambda: self._open(body, end))
                return json.loads(answer)
            except HTTPError as error:
                if 300 <= error.code < 400:
                    raise ConnectionError(
                        f"{self.url} redirects to another address ({error.code}), which is not followed. Pass the "
                        "address that answers itself."
                    ) from None
                if error.code < 500 and error.code not in TRIED_AGAIN:
                    raise ConnectionError(f"{self.url} refuses the request: {error}.") from None
                failure, pause = error, _asked_pause(error.headers, pause)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{self.url} answers no JSON: {error}.") from None
            except (URLError, HTTPException, OSError) as error:
                failure = error
            if attempt < self.retries:
                if time.monotonic() + pause >= end:
                    break
                time.sleep(pause)
        raise ConnectionError(
            f"{self.url} gives no answer in {attempt + 1} attempts within {self.timeout:g} s: {failure}. See "
            "whether the server runs, or set a longer timeout."
        ) from None

    def _open(self, body: bytes, end: float) -> bytes:
        request = Request(self._target, body, self._headers)
        with build_opener(_NoRedirect).open(request, timeout=max(end - time.monotonic(), 1e-3)) as response:
            chunks, size = [], 0
            while chunk := response.read1(2**16):
                chunks.append(chunk)
                size += len(chunk)
                if size > MOST_BYTES:
                    raise ValueError(f"it is longer than {MOST_BYTES} bytes")
                if time.monotonic() > end:
                    raise TimeoutError("timed out")
        return b"".join(chunks)


class _NoRedirect(HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any) -> None:
        """Leave the answer as it is, which makes it an error."""


def _within(end: float, function: Callable[[], bytes]) -> bytes:
    """Call a function in a thread of its own, and leave it there if it is late: a server may send byte by byte."""
    results: list[bytes] = []
    failures: list[Exception] = []

    def run() -> None:
        try:
            results.append(function())
        except Exception as error:  # raised below, where it belongs
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(end - time.monotonic(), 0))
    if failures:
        raise failures[0]
    if not results:
        raise TimeoutError("timed out")
    return results[0]


def _asked_pause(headers: HTTPMessage, pause: float) -> float:
    """Seconds that the server asks to wait, which it gives as a number or a date."""
    asked = headers.get("Retry-After", "")
    try:
        seconds = float(asked) if asked.strip().isdecimal() else parsedate_to_datetime(asked).timestamp() - time.time()
    except (TypeError, ValueError, OverflowError):
        return pause
    return max(seconds, 0.0)


def _png(picture: Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -MOST <= value <= MOST
