"""Options from the command line and from YAML, which mean the same in both."""

import argparse
import difflib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers.hf_argparser import string_to_bool
from trl import TrlParser

NONE = ("none", "null")


class OptionParser(TrlParser):
    """A TrlParser that takes one value where a list is asked for, empty lists and None in lists of numbers.

    On the command line, `--pipeline_columns` alone is an empty list, and `--reward_threshold None` is [None]. In YAML,
    `reward: pickscore` is a list of one, and 1e-4 is a number wherever it stands.
    """

    def __init__(self, *arguments: Any, **options: Any):
        super().__init__(*arguments, **options)
        for action in self._lists():
            action.nargs = "*"
            if action.type is float:
                action.type = _optional_number

    def _lists(self) -> list[argparse.Action]:
        return [action for action in self._actions if action.nargs in ("+", "*")]

    def parse_args_and_config(self, args: Sequence[str]) -> tuple[Any, ...]:
        """Parse options, with those of a YAML file after `--config` as defaults.

        Args:
            args (Sequence[str]): of the command line.

        Returns:
            tuple[Any, ...]: an instance of each dataclass.

        Raises:
            ValueError: if the file is missing, broken or sets what there is not, or a value cannot be taken.
        """
        given, path = _without_config(list(args))
        if path is not None:
            settings = read_yaml(path)
            for name, value in _environment(path, settings.pop("env", None)).items():
                os.environ[name] = value
            self._set_defaults(path, settings)
        return self.parse_args_into_dataclasses(args=given, look_for_args_file=False)

    def _set_defaults(self, path: Path, settings: dict[str, Any]) -> None:
        actions = {action.dest: action for action in self._actions}
        for name, value in settings.items():
            if name not in actions or name == "help":
                close = difflib.get_close_matches(str(name), actions, n=1)
                hint = f" Did you mean {close[0]}?" if close else " See --help for what there is."
                raise ValueError(f"{path} sets {name!r}, which is no option.{hint}")
            self.set_defaults_with_config(**{name: self._default(actions[name], value)})

    def _default(self, action: argparse.Action, value: Any) -> Any:
        if action in self._lists():
            return value if value is None or isinstance(value, (list, dict)) else [value]
        if isinstance(value, bool) and action.type is not string_to_bool:
            return "yes" if value else "no"  # YAML's word for what is written so
        return value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read settings from a YAML file.

    Args:
        path (str | Path): the file.

    Returns:
        dict[str, Any]: the settings by name. Numbers such as 1e-4 are numbers.

    Raises:
        ValueError: if the file is missing, no mapping, or has a key twice.
    """
    if not Path(path).is_file():
        raise ValueError(f"There is no file {str(path)!r}, which --config should name.")
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8-sig"), Loader=_Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} must hold settings as NAME: VALUE, but holds a {type(settings).__name__}.")
    return settings


class _Loader(yaml.SafeLoader):
    """YAML without keys that are there twice, in which 1e-4 is a number as it is in YAML 1.2."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(
                    "in one mapping", node.start_mark, f"{key.value!r} is set twice: drop one", key.start_mark
                )
            seen.add(key.value if isinstance(key.value, str) else id(key))
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def _without_config(args: list[str]) -> tuple[list[str], Path | None]:
    """Options without --config, and the file that it names."""
    rest, paths = [], []
    words = iter(args)
    for word in words:
        if word == "--config" or word.startswith("--config="):
            path = word.partition("=")[2] or next(words, None)
            if path is None:
                raise ValueError("--config needs the name of a YAML file.")
            paths.append(Path(path))
        else:
            rest.append(word)
    if len(paths) > 1:
        raise ValueError(f"--config is given {len(paths)} times, but settings come from one file. Merge them.")
    return rest, paths[0] if paths else None


def _environment(path: Path, variables: Any) -> dict[str, str]:
    if not isinstance(variables, dict | None):
        raise ValueError(f"env in {path} must hold environment variables as NAME: VALUE, but is {variables!r}.")
    return {str(name): str(value) for name, value in (variables or {}).items()}


def _optional_number(text: str) -> float | None:
    return None if text.lower() in NONE else float(text)


_optional_number.__name__ = "number"  # as argparse calls it in errors
