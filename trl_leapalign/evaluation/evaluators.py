"""What judges images, by name or as a callable, loaded only when it is needed."""

import difflib
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeAlias

from ..rewards import (
    REWARDS,
    HumanReward,
    NamedReward,
    OCRReward,
    RewardFunction,
    RewardSet,
    VLMReward,
)
from .geneval.evaluator import GenEval
from .geneval.metadata import parse_task
from .identity import Unidentifiable, identify, identify_files
from .unified_reward import ALIGNMENT_PROMPT, IMAGE_QUALITY_PROMPT, UnifiedReward

logger = logging.getLogger(__name__)

IDENTITY = "code, settings and weights"
"""Where `Evaluator.made_with` says what a callable is."""

UNIFIED_REWARD = partial(UnifiedReward.from_pretrained, source="CodeGoat24/UnifiedReward-qwen-7b")

EVALUATORS: dict[str, Callable[..., RewardFunction]] = {
    **REWARDS,
    "geneval": GenEval.from_pretrained,
    "human": HumanReward,
    "ocr": OCRReward,
    "unifiedreward-alignment": partial(UNIFIED_REWARD, prompt=ALIGNMENT_PROMPT),
    "unifiedreward-iq": partial(UNIFIED_REWARD, prompt=IMAGE_QUALITY_PROMPT),
    "vlm": VLMReward,
}
"""What loads each evaluator that has a name; all of them are rewards too."""


@dataclass(frozen=True)
class Evaluator(NamedReward):
    """Something that judges images, and how to get it.

    Args:
        name (str): what its scores are called; also that of a file.
        load (Callable[[], RewardFunction]): returns it: `evaluator(images, prompts, metadata)`.
        settings (Mapping[str, Any]): what its scores depend on, kept beside them.
        is_geneval (bool): whether the score is GenEval's, the mean over its tags, for which rows need its metadata.
        function (RewardFunction | None): what `load` returns, if it is there already; its code, settings and weights
            are then a part of what its scores depend on.

    Raises:
        ValueError: if the name cannot be that of a file.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    is_geneval: bool = False
    function: RewardFunction | None = None

    def __post_init__(self):
        if not self.name or self.name.startswith(".") or any(sign in self.name for sign in '/\\:*?"<>|'):
            raise ValueError(f"The evaluator's name {self.name!r} must be one that a file can have.")

    @cached_property
    def made_with(self) -> dict[str, Any]:
        """What the scores depend on, beside the images: settings, local files, and the identity of a callable."""
        files = {f"{key} files": identify_files(value) for key, value in self.settings.items() if _is_path(value)}
        return {**self.settings, **files, "is_geneval": self.is_geneval, IDENTITY: self._identity}

    @property
    def _identity(self) -> str | None:
        if self.function is None:
            return self.name
        try:
            return identify(self.function)
        except Unidentifiable as error:
            logger.warning(
                f"The evaluator {self.name!r} cannot be identified, so finished scores of it are never used again: "
                f"{error} Name it and give its settings with Evaluator(name, load, settings)."
            )
            return None

    @property
    def reusable(self) -> bool:
        """Whether finished scores may be used again."""
        return self.made_with[IDENTITY] is not None

    def check_rows(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Raise ValueError if the prompts lack what the evaluator needs to know of them.

        Args:
            rows (Sequence[Mapping[str, Any]]): prompts and their metadata.
        """
        for index, row in enumerate(rows if self.is_geneval else ()):
            parse_task(row, f"{self.name} cannot judge these prompts: row {index}")


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, Path)) and Path(value).exists()


EvaluatorSource: TypeAlias = str | RewardFunction | Evaluator


def named_evaluator(name: str, **settings: Any) -> Evaluator:
    """Find an evaluator by name, and check its settings; nothing is loaded yet.

    Args:
        name (str): one of `EVALUATORS`: a built-in reward, "geneval", "unifiedreward-alignment", "unifiedreward-iq",
            "vlm", "ocr" or "human".
        **settings (Any): of what loads it, such as `path_or_id`; GenEval's `detector` must be given, and so must the
            `question` of "vlm" and the `folder` of "human".

    Returns:
        Evaluator: the evaluator.

    Raises:
        ValueError: if the name is unknown or a setting is missing that has no default.
        TypeError: if it does not have such settings.
    """
    if name not in EVALUATORS:
        close = difflib.get_close_matches(name.lower(), EVALUATORS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"There is no evaluator {name!r}.{hint} Choose one of {sorted(EVALUATORS)}.")
    if name == "geneval" and settings.get("detector") is None:
        raise ValueError(
            "GenEval needs a detector, since its scores depend on it: set geneval_detector in an evaluation, "
            'reward_kwargs={"geneval": {"detector": ...}} in training (detector=... in Python) to the published one\'s '
            "file, or to facebook/mask2former-swin-small-coco-instance."
        )
    load = EVALUATORS[name]
    known = _settings_of(load)
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise TypeError(f"The evaluator {name!r} has no settings {', '.join(unknown)}. It takes: {', '.join(known)}.")
    missing = [
        parameter.name
        for parameter in inspect.signature(load).parameters.values()
        if parameter.default is parameter.empty
        and parameter.kind is not parameter.VAR_KEYWORD
        and parameter.name not in settings
    ]
    if missing:
        raise ValueError(
            f"The evaluator {name!r} needs {', '.join(missing)}. In training set "
            f'reward_kwargs={{{name!r}: {{"{missing[0]}": ...}}}}, in an evaluation evaluator_kwargs likewise.'
        )
    return Evaluator(name, lambda: load(**settings), {"evaluator": name, **settings}, name == "geneval")


def _settings_of(load: Callable[..., RewardFunction]) -> list[str]:
    """What a `from_pretrained` takes, with what it hands on to the class."""
    parameters = inspect.signature(load).parameters
    names = [name for name, parameter in parameters.items() if parameter.kind is not parameter.VAR_KEYWORD]
    if len(names) < len(parameters):
        kind = (load.func if isinstance(load, partial) else load).__self__
        handed_on = inspect.signature(kind).parameters.values()
        names += [each.name for each in handed_on if each.default is not each.empty and each.name not in names]
    return names


def named_rewards(
    functions: Any, settings: Mapping[str, Mapping[str, Any]], defaults: Mapping[str, Any] | None = None
) -> list[Any]:
    """Let the names of evaluators stand for rewards, with their settings, beside those of built-in rewards.

    Args:
        functions (Any): a reward function, an `Evaluator` or a name, or a list of them.
        settings (Mapping[str, Mapping[str, Any]]): by name, settings of its `from_pretrained`.
        defaults (Mapping[str, Any] | None): settings beneath these, for those that have them.

    Returns:
        list[Any]: the same with an `Evaluator` in place of each name that has settings or is no built-in reward;
            nothing is loaded yet.

    Raises:
        TypeError: if a reward does not have such settings.
        ValueError: if settings are those of no reward, or one that is needed is missing.
    """
    listed = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    unused = sorted(name for name in settings if name not in [item for item in listed if isinstance(item, str)])
    if unused:
        raise ValueError(
            f"reward_kwargs has settings of {', '.join(unused)}, but the rewards given by name are "
            f"{[item for item in listed if isinstance(item, str)]}."
        )
    return [
        named_evaluator(item, **{**_known(item, defaults or {}), **settings.get(item, {})})
        if isinstance(item, str) and (item in settings or item in EVALUATORS.keys() - REWARDS.keys())
        else item
        for item in listed
    ]


def _known(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some settings that an evaluator has."""
    known = _settings_of(EVALUATORS[name]) if name in EVALUATORS else []
    return {key: value for key, value in settings.items() if key in known}


def check_rows(rewards: Sequence[Any], *sources: Any) -> None:
    """Raise ValueError if prompts lack what a reward needs to know of them.

    Args:
        rewards (Sequence[Any]): rewards; those that are no `Evaluator` need nothing.
        *sources (Any): rows of prompts and metadata; a function of prompts or None is not looked at.
    """
    for evaluator in rewards:
        if isinstance(evaluator, Evaluator):
            for rows in sources:
                evaluator.check_rows(() if rows is None or callable(rows) else rows)


def as_evaluators(sources: EvaluatorSource | Sequence[EvaluatorSource]) -> list[Evaluator]:
    """Check evaluators before anything is sampled.

    Args:
        sources (EvaluatorSource | Sequence[EvaluatorSource]): names, callables or `Evaluator`s.

    Returns:
        list[Evaluator]: of different names.

    Raises:
        TypeError: if one cannot be called with images, prompts and metadata.
        ValueError: if there is none, a name is unknown, or two have the same.
    """
    sources = list(sources) if isinstance(sources, (list, tuple)) else [sources]
    if not sources:
        raise ValueError(f"There are no evaluators. Pass some of {sorted(EVALUATORS)}, or callables of your own.")
    evaluators = [_as_evaluator(source) for source in sources]
    names = [evaluator.name.lower() for evaluator in evaluators]
    for evaluator in evaluators:
        if names.count(evaluator.name.lower()) > 1:
            raise ValueError(
                f"Two evaluators are called {evaluator.name!r}, so their scores would share a file. Pass each once, or "
                "as Evaluator(name, load) under names of your own."
            )
    return evaluators


def _as_evaluator(source: EvaluatorSource) -> Evaluator:
    if isinstance(source, Evaluator):
        return source
    if isinstance(source, str):
        return named_evaluator(source)
    return callable_evaluator(source)


def callable_evaluator(function: RewardFunction, name: str | None = None) -> Evaluator:
    """Make an evaluator of a callable.

    Args:
        function (RewardFunction): the callable.
        name (str | None): what its scores are called; None is the callable's own name.

    Returns:
        Evaluator: the evaluator.

    Raises:
        TypeError: if it cannot be called with images, prompts and metadata.
    """
    own = RewardSet([function]).names[0]
    kind = function if inspect.isroutine(function) else type(function)
    settings = {"evaluator": f"{kind.__module__}:{kind.__qualname__}"}
    return Evaluator(name or own, lambda: function, settings, isinstance(function, GenEval), function)
