"""What GenEval asks of an image: its classes, colours, tasks and prompts, and reading them from a file."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias
from urllib.request import urlopen

METADATA_URL = "https://raw.githubusercontent.com/djghosh13/geneval/main/prompts/evaluation_metadata.jsonl"
METADATA_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
# The 80 classes of COCO in its order, under the names that GenEval's prompts use.
CLASS_NAMES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote"),
    *("computer keyboard", "cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock"),
    *("vase", "scissors", "teddy bear", "hair drier", "toothbrush"),
)

MetadataSource: TypeAlias = str | Path | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Clause:
    """Things that an image must show, or must not.

    Args:
        class_name (str): one of `CLASS_NAMES`.
        count (int): how many, at least 1.
        color (str | None): the colour of all of them, one of `COLORS`.
        relation (str | None): where they are, one of `RELATIONS`.
        target (int | None): index of the earlier clause that `relation` is relative to.
    """

    class_name: str
    count: int
    color: str | None = None
    relation: str | None = None
    target: int | None = None


@dataclass(frozen=True)
class GenEvalTask:
    """What one prompt asks for.

    Args:
        tag (str): the kind of task, one of `TAGS`.
        include (tuple[Clause, ...]): what the image must show, all of it.
        exclude (tuple[Clause, ...]): what is wrong if it shows as many or more.
    """

    tag: str
    include: tuple[Clause, ...]
    exclude: tuple[Clause, ...] = ()


def parse_task(row: Mapping[str, Any], where: str = "The row") -> GenEvalTask:
    """Read the task of a metadata row. Entries that are None count as absent, as `datasets` fills them in.

    Args:
        row (Mapping[str, Any]): with tag, include and perhaps exclude; other columns are allowed.
        where (str): what error messages call the row.

    Returns:
        GenEvalTask: the task.

    Raises:
        ValueError: if an entry is missing, unknown or out of range.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where} is {row!r}, but must be an object with tag, include and prompt.")
    for key in ("tag", "include"):
        if row.get(key) is None:
            raise ValueError(f"{where} has no {key!r}. GenEval needs tag, include and, where there is one, exclude.")
    _check_known(where, "tag", row["tag"], TAGS)
    include = _parse_clauses(row["include"], f"{where}, include", ("color", "position"))
    if not include:
        raise ValueError(f"{where} has an empty include, so every image would be right.")
    exclude = () if row.get("exclude") is None else _parse_clauses(row["exclude"], f"{where}, exclude", ())
    return GenEvalTask(row["tag"], include, exclude)


def _parse_clauses(entries: Any, where: str, options: tuple[str, ...]) -> tuple[Clause, ...]:
    if not isinstance(entries, (list, tuple)):
        raise ValueError(f"{where} is {entries!r}, but must be a list of objects.")
    return tuple(_parse_clause(entry, index, f"{where}[{index}]", options) for index, entry in enumerate(entries))


def _parse_clause(entry: Any, index: int, where: str, options: tuple[str, ...]) -> Clause:
    if not isinstance(entry, Mapping):
        raise ValueError(f"{where} is {entry!r}, but must be an object with class and count.")
    entry = {key: value for key, value in entry.items() if value is not None}
    allowed = ("class", "count", *options)
    unknown = sorted(set(entry) - set(allowed))
    if unknown:
        raise ValueError(f"{where} has {', '.join(map(repr, unknown))}; only {', '.join(allowed)} mean something here.")
    for key in ("class", "count"):
        if key not in entry:
            raise ValueError(f"{where} has no {key!r}.")
    _check_known(where, "class", entry["class"], CLASS_NAMES)
    count = entry["count"]
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{where} has count {count!r}, but must have a whole number of at least 1.")
    if "color" in entry:
        _check_known(where, "color", entry["color"], COLORS)
    relation, target = _parse_position(entry["position"], index, where) if "position" in entry else (None, None)
    return Clause(entry["class"], count, entry.get("color"), relation, target)


def _parse_position(position: Any, index: int, where: str) -> tuple[str, int]:
    if not isinstance(position, (list, tuple)) or len(position) != 2:
        raise ValueError(f"{where} has position {position!r}, but must have [relation, index of an earlier entry].")
    relation, target = position
    _check_known(where, "relation", relation, RELATIONS)
    if isinstance(target, bool) or not isinstance(target, int) or not 0 <= target < index:
        earlier = f"0 to {index - 1}" if index else "none, since it is the first"
        raise ValueError(f"{where} is {relation} entry {target!r}, which is no earlier entry ({earlier}).")
    return relation, target


def _check_known(where: str, what: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{where} has the unknown {what} {value!r}. Known are: {', '.join(known)}.")


def read_geneval(source: MetadataSource = METADATA_URL, timeout: float = 30.0) -> list[dict[str, Any]]:
    """Read GenEval's prompts with their metadata, and check every row.

    Args:
        source (str | Path | Sequence[Mapping]): path or URL of a file with one JSON object a line, or the rows. The
            default is the published file of 553 prompts, whose contents must be the known ones.
        timeout (float): seconds to wait for a URL.

    Returns:
        list[dict]: rows with prompt, tag, include and whatever else they have.

    Raises:
        FileNotFoundError: if there is no such file.
        OSError: if a URL cannot be read.
        ValueError: if there are no rows, or one is broken; the message names its line.
    """
    if not isinstance(source, (str, Path)):
        rows = [(f"Row {index}", row) for index, row in enumerate(source)]
    else:
        rows = [(where, _parse_line(line, where)) for where, line in _lines(source, timeout)]
    if not rows:
        raise ValueError("There are no GenEval prompts: the file or list is empty.")
    for where, row in rows:
        parse_task(row, where)
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not prompt.strip():
            raise ValueError(f"{where} has the prompt {prompt!r}, but needs a text that is not empty.")
    return [dict(row) for _, row in rows]


def _lines(source: str | Path, timeout: float) -> list[tuple[str, str]]:
    """The lines that are not blank, each with what to call it."""
    data = _download(source, timeout) if str(source).startswith(("http://", "https://")) else _read(Path(source))
    if source == METADATA_URL and hashlib.sha256(data).hexdigest() != METADATA_SHA256:
        raise ValueError(
            f"{source} is not the published GenEval file: its SHA-256 is not {METADATA_SHA256}. Get "
            "evaluation_metadata.jsonl elsewhere and pass its path."
        )
    try:
        lines = data.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not in UTF-8: {error}") from error
    return [(f"Line {number} of {source}", line) for number, line in enumerate(lines, start=1) if line.strip()]


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise FileNotFoundError(f"There is no GenEval metadata file {str(path)!r}. The published one is {METADATA_URL}")
    return path.read_bytes()


def _download(url: str | Path, timeout: float) -> bytes:
    try:
        with urlopen(str(url), timeout=timeout) as response:
            return response.read()
    except OSError as error:
        raise OSError(
            f"GenEval's metadata could not be read from {url} ({error}). Without a network, copy the file "
            "evaluation_metadata.jsonl of github.com/djghosh13/geneval (folder prompts) here and pass its path."
        ) from error


def _parse_line(line: str, where: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is no JSON: {error}. Every line must hold one object.") from error
