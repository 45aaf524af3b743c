"""Pairs of pictures and what people say of them, in a folder that a page and a training share."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import Tensor

from ..media import save_sample, to_bytes


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt.

    Args:
        prompt (str): what both were made from.
        first (str): name of one picture.
        second (str): name of the other; the first in the alphabet comes first.
    """

    prompt: str
    first: str
    second: str

    @property
    def id(self) -> str:
        """Follows from the prompt and the pictures: the same pair is voted on once."""
        return hashlib.sha256(json.dumps([self.prompt, self.first, self.second]).encode()).hexdigest()[:16]


class VoteFolder:
    """A folder of pictures, of the pairs to vote on and of the votes.

    It has `pictures/NAME.png`, `pairs.jsonl`, to which trainings append, and `votes.jsonl`, to which the page appends:
    a line each, `{"id", "prompt", "first", "second"}` and with it `"winner"`, a picture's name or null for no
    difference, and `"time"`. Pictures are named after their pixels, so that a training that is resumed, and makes the
    same ones again, finds their votes. Nothing is ever changed or deleted. A line that is not whole, as a crash leaves
    it, does not count, so that its pair is asked for or voted on again.

    Args:
        path (str | Path): the folder, which is made if need be.

    Raises:
        ValueError: if the path is a file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{str(path)!r} is a file. Pass a folder for pictures and votes, which may be new.")
        (self.path / "pictures").mkdir(parents=True, exist_ok=True)

    def picture(self, name: str) -> Path:
        """Return the file of a picture."""
        return self.path / "pictures" / f"{name}.png"

    def add_picture(self, image: Tensor) -> str:
        """Write a picture unless it is there.

        Args:
            image (Tensor): shape (3, H, W) in [0, 1]; kept in 8 bits.

        Returns:
            str: its name.
        """
        pixels = to_bytes(image[None])[0].cpu().numpy()
        name = hashlib.sha256(str(pixels.shape).encode() + pixels.tobytes()).hexdigest()[:16]
        if not self.picture(name).exists():
            save_sample(image, self.picture(name))
        return name

    def ask(self, pairs: list[Pair]) -> None:
        """Ask for votes on pairs; those that were asked for before are not asked again.

        Args:
            pairs (list[Pair]): whose pictures are there.
        """
        known = self.pairs().keys()
        for pair in {pair.id: pair for pair in pairs if pair.id not in known}.values():
            self._append("pairs.jsonl", {"id": pair.id, **asdict(pair)})

    def pairs(self) -> dict[str, Pair]:
        """Return all pairs by id, in the order in which they were asked for."""
        return {line["id"]: Pair(line["prompt"], line["first"], line["second"]) for line in self._lines("pairs.jsonl")}

    def vote(self, pair: Pair, winner: str | None) -> None:
        """Keep a vote.

        Args:
            pair (Pair): what was voted on.
            winner (str | None): the better picture; None for no difference.

        Raises:
            ValueError: if the winner is none of the two pictures, or the pair has a vote already.
        """
        if winner not in (pair.first, pair.second, None):
            raise ValueError(f"The winner {winner!r} is none of the pictures {pair.first} and {pair.second}.")
        if pair.id in self.votes():
            raise ValueError(f"There is a vote on the pair {pair.id} already. Votes stay as they are.")
        time = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._append("votes.jsonl", {"id": pair.id, **asdict(pair), "winner": winner, "time": time})

    def votes(self) -> dict[str, str | None]:
        """Return the winners of all votes by the pair's id; None for no difference."""
        found: dict[str, str | None] = {}
        for line in self._lines("votes.jsonl"):
            found.setdefault(line["id"], line["winner"])
        return found

    def _lines(self, name: str) -> Iterator[dict[str, Any]]:
        path = self.path / name
        for line in path.read_bytes().split(b"\n") if path.exists() else ():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def _append(self, name: str, row: dict[str, Any]) -> None:
        """Write a line at once and to the disk; what a crash left of another line is closed first."""
        path = self.path / name
        torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        with path.open("ab", buffering=0) as file:
            file.write(b"\n" * torn + json.dumps(row).encode() + b"\n")
            os.fsync(file.fileno())
