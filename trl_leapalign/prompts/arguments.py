"""The arguments of a pipeline's call."""

import inspect
from typing import Any

PASSED_ON = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def call_parameters(pipeline: Any) -> dict[str, inspect.Parameter]:
    """Find the arguments of a pipeline's call, also of one that passes *args or **kwargs on to the class it inherits.

    Args:
        pipeline (DiffusionPipeline): the pipeline.

    Returns:
        dict[str, inspect.Parameter]: by name, without self; with a parameter of the kind `VAR_KEYWORD` only if the
            call takes arguments of any name.
    """
    found: dict[str, inspect.Parameter] = {}
    passed_on: dict[str, inspect.Parameter] = {}
    for owner in type(pipeline).__mro__:
        if "__call__" in vars(owner):
            parameters = list(inspect.signature(vars(owner)["__call__"]).parameters.values())[1:]
            passed_on = {each.name: each for each in parameters if each.kind in PASSED_ON}
            found = {**{each.name: each for each in parameters if each.kind not in PASSED_ON}, **found}
            if not passed_on:
                break
    return {**found, **passed_on}
