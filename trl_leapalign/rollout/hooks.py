"""Functions that run around the calls of a module, outside of what torch.compile compiled of it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from diffusers.hooks import HookRegistry
from torch import nn

from .pipelines import temporary_attribute

Before = Callable[[], None]
After = Callable[[nn.Module, tuple, dict[str, Any], Any], None]


@contextmanager
def around_calls(module: nn.Module, before: Before | None = None, after: After | None = None) -> Iterator[None]:
    """Run functions before or after each call of a module for a while.

    A hook is compiled together with its module, and a new one makes the module compile again. So a compiled module gets
    none: the functions are called around what was compiled.

    Args:
        module (nn.Module): the module; wherever `module.compile()` was called or not.
        before (Before | None): called before everything else.
        after (After | None): called with the module, what it was given and what it returned.
    """
    compiled = vars(module).get("_compiled_call_impl")
    if compiled is None:
        hooks = [] if before is None else [module.register_forward_pre_hook(lambda *_: before(), prepend=True)]
        hooks += [] if after is None else [module.register_forward_hook(after, with_kwargs=True)]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        if before is not None:
            before()
        output = compiled(*args, **kwargs)
        if after is not None:
            after(module, args, kwargs, output)
        return output

    with temporary_attribute(module, "_compiled_call_impl", call):
        yield


def check_repeatable(denoisers: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise ValueError if a call of a denoiser changes what the next one returns.

    Args:
        denoisers (Iterable[tuple[str, nn.Module]]): by component name.
    """
    for name, denoiser in denoisers:
        registries = [vars(part)["_diffusers_hook"] for part in denoiser.modules() if "_diffusers_hook" in vars(part)]
        stateful = {key for registry in registries for key in _stateful(registry)}
        if stateful:
            raise ValueError(
                f"base_penalty calls the {name} a second time at each step with gradients, but it has hooks that keep "
                f"state from call to call ({', '.join(sorted(stateful))}), so the images would change. Take them off: "
                f"pipeline.{name}.disable_cache(), or set base_penalty=None."
            )


def _stateful(registry: HookRegistry) -> list[str]:
    return [name for name, hook in registry.hooks.items() if hook._is_stateful]
