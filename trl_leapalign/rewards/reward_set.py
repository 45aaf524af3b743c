"""The one contract of rewards, and the checks that a reward function keeps it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..ranges import Range
from .black_box import BlackBox, read_numbers
from .builtin import check_reward_name, load_named
from .callables import NamedReward, RewardFunction, check_callable, check_rewards, name_of
from .placement import PlacedReward
from .reward_model import RewardModel


@dataclass(frozen=True)
class Scores:
    """What the rewards say of a batch.

    Args:
        rewards (Tensor): one row a reward, shape (M, B), float32 or float64, with graph if the images have one.
        total (Tensor): sum of the rewards times their weights, shape (B,), detached.
        metrics (dict[str, Tensor]): values to log by name, detached: each reward's if there are several, and the
            tensors of its dict.
        details (dict[str, Any]): all that the rewards returned beside the rewards, by name.
    """

    rewards: Tensor
    total: Tensor
    metrics: dict[str, Tensor]
    details: dict[str, Any]


class RewardSet:
    """One or several reward functions with their weights and thresholds.

    A reward whose attribute `differentiable` is False, such as `BlackBox`, has no gradient; one whose attribute
    `inputs` is "latents" is called with the end latents in place of the images.

    Args:
        functions (RewardFunction | str | Sequence[RewardFunction | str]): the reward function or functions. A name is
            one of `REWARDS`, which is loaded, and so is a `NamedReward`.
        weights (Sequence[float] | None): c_m of each; None is 1 for each.
        thresholds (Sequence[float | None] | None): lambda_m of each, on its own scale; None in the list is none. None
            for the list is the recommended one of each built-in reward, and none for others.
        settings (dict[str, Any] | None): arguments of `load_reward` for those given by name, such as
            `{"activation_checkpointing": True}`.

    Raises:
        TypeError: if one cannot be called with images, prompts and metadata, or weights or thresholds are no list.
        ValueError: if there is none, a name is unknown, or the weights or thresholds do not match them or are not
            finite.
        FileNotFoundError: if the weights of a built-in reward are not to be had.
    """

    def __init__(
        self,
        functions: RewardFunction | str | Sequence[RewardFunction | str],
        weights: Sequence[float] | None = None,
        thresholds: Sequence[float | None] | None = None,
        settings: dict[str, Any] | None = None,
    ):
        listed = check_reward_settings(functions, weights, thresholds)
        self.weights = [1.0] * len(listed) if weights is None else list(weights)
        self.names = _unique([name_of(function) for function in listed])
        self.functions = [load_named(item, **(settings or {})) for item in listed]
        self.differentiable = [getattr(function, "differentiable", True) for function in self.functions]
        self.inputs = [_inputs(function) for function in self.functions]
        self.thresholds = list(map(_threshold, self.functions)) if thresholds is None else list(thresholds)

    def prepare(self, device: torch.device, *, own_device: str | None = None, offload: bool = False) -> None:
        """Move reward models to a device, freeze them and put them in eval mode.

        One that is on an accelerator of its own, such as a second GPU, stays there: it moves the images itself.

        Args:
            device (torch.device): of the images.
            own_device (str | None): of the reward models, if it is another; images are copied there.
            offload (bool): keep reward models on the CPU but while they score or are differentiated.

        Raises:
            ValueError: if no reward is a model that could be moved.
        """
        models = [model for model in map(_model, self.functions) if model is not None]
        if (own_device is not None or offload) and not models:
            raise ValueError(
                "reward_device and offload_rewards move rewards that are an nn.Module, but none of "
                f"{self.names} is one. Make it one, or move its model yourself."
            )
        where = device if own_device is None else torch.device(own_device)
        for model in models:
            model.eval().requires_grad_(False)
            kinds = {value.device.type for value in (*model.parameters(), *model.buffers())}
            if own_device is None and not offload and kinds <= {"cpu"}:
                model.to(device)
        self.functions = [_bare(function) for function in self.functions]
        if own_device is not None or offload:
            self.functions = [_placed(function, where, offload) for function in self.functions]

    @property
    def black_boxes(self) -> list[str]:
        """Names of the rewards without gradient."""
        return [
            name for name, differentiable in zip(self.names, self.differentiable, strict=True) if not differentiable
        ]

    @property
    def asking_for_latents(self) -> list[str]:
        """Names of the rewards that need the end latents: for their gradient, or as what they score."""
        both = zip(self.names, self.differentiable, self.inputs, strict=True)
        return [name for name, differentiable, kind in both if not differentiable or kind == "latents"]

    @property
    def decoding(self) -> str:
        """What a rollout must decode: "differentiable" images, "plain" ones without gradients, or "none"."""
        if "images" not in self.inputs:
            return "none"
        return "differentiable" if self.image_gradients else "plain"

    @property
    def image_gradients(self) -> bool:
        """Whether a reward differentiates the images."""
        return any(d and kind == "images" for d, kind in zip(self.differentiable, self.inputs, strict=True))

    def __call__(
        self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]], latents: Tensor | None = None
    ) -> Scores:
        """Score a batch, in float32 at least and without autocast.

        Args:
            images (Tensor): shape (B, 3, H, W), or (B, F, 3, H, W) for video, in [0, 1].
            prompts (list[str]): length B.
            metadata (list[dict]): length B.
            latents (Tensor | None): what the sampling ended with, shape (B, ...), for rewards that ask for it.

        Returns:
            Scores: rewards, with graph where they are differentiable, and what to log.

        Raises:
            TypeError: if a reward returns something that is not a floating tensor.
            ValueError: if its shape is wrong, it has lost the graph, the reward changes the images in place, or it
                asks for latents where there are none.
        """
        given = {"images": images, "latents": latents}
        precise = {
            kind: value.to(torch.promote_types(value.dtype, torch.float32))
            for kind, value in given.items()
            if value is not None and kind in self.inputs
        }
        with torch.autocast(images.device.type, enabled=False):
            return self._score(precise, prompts, metadata)

    def _score(self, given: dict[str, Tensor], prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        rows, metrics, details = [], {}, {}
        for index, (name, kind) in enumerate(zip(self.names, self.inputs, strict=True)):
            if kind not in given:
                raise ValueError(f"The reward {name!r} asks for latents, and there are none here, only images.")
            images, function = given[kind], self.functions[index]
            score = _measure if self.differentiable[index] else _ask
            rewards, extra = score(function, name, images, prompts, metadata)
            rows.append(rewards.to(images.device, torch.promote_types(rewards.dtype, torch.float32)))
            if len(self.functions) > 1:
                metrics[f"rewards/{name}"] = rows[-1].detach()
            details[name] = {key: _detach(value) for key, value in extra.items()}
            metrics.update({f"rewards/{name}/{key}": value for key, value in _numbers(details[name], images)})
        rewards = torch.stack(rows)
        total = torch.tensor(self.weights, dtype=rewards.dtype, device=rewards.device) @ rewards.detach()
        return Scores(rewards, total, metrics, details)


def check_reward_settings(
    functions: Any, weights: Any = None, thresholds: Any = None
) -> list[RewardFunction | NamedReward | str]:
    """Check what a `RewardSet` is made of, before anything is loaded.

    Args:
        functions (Any): should be a reward function, the name of one, or a list of them.
        weights (Any): should be a list of numbers, one a reward, or None.
        thresholds (Any): should be a list of numbers or None, one a reward, or None.

    Returns:
        list[RewardFunction | NamedReward | str]: the reward functions and names.

    Raises:
        TypeError: if something is of the wrong kind.
        ValueError: if there is no reward, a name is unknown, or numbers do not match or are not finite.
    """
    listed = list(functions) if isinstance(functions, (list, tuple)) else [functions]
    if not listed:
        raise ValueError("There is no reward: pass a reward function, or a list of them that is not empty.")
    for function in listed:
        if isinstance(function, str):
            check_reward_name(function)
        else:
            check_callable(function)
    if weights is not None:
        _check_numbers("reward_weights", weights, len(listed))
        if not any(weights):
            raise ValueError(f"reward_weights={weights} are all zero, so nothing would be learnt.")
    if thresholds is not None:
        _check_numbers("reward_threshold", thresholds, len(listed), optional=True)
    return listed


def _check_numbers(name: str, values: Any, count: int, optional: bool = False) -> None:
    if not isinstance(values, (list, tuple)):
        raise TypeError(f"{name}={values!r} must be a list of numbers, in the order of the rewards.")
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries for {count} rewards: {values}. Give one for each.")
    for index, value in enumerate(values):
        if value is not None or not optional:
            Range().check(f"{name}[{index}]", value)


def _apply(
    function: RewardFunction, name: str, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> Any:
    """Call a reward function on lists of its own, and see that it leaves the images as they are."""
    before = _version(images)
    try:
        result = function(images, list(prompts), [dict(row) for row in metadata])
    except RuntimeError as error:
        if "numpy()" not in str(error):
            raise
        raise ValueError(
            f"The reward {name!r} turns tensors into NumPy arrays, through which no gradient flows. Compute it with "
            "torch operations only."
        ) from error
    if _version(images) != before:
        raise ValueError(
            f"The reward {name!r} changes the images in place, so the next one would see others. Use operations that "
            "return new tensors, or start with images = images.clone()."
        )
    return result


def _measure(
    function: RewardFunction, name: str, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> tuple[Tensor, dict[str, Any]]:
    """Rewards with graph, and what is reported beside them."""
    result = _apply(function, name, images, prompts, metadata)
    rewards, extra = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    if not isinstance(extra, dict):
        raise TypeError(
            f"The reward {name!r} returned a {type(extra).__name__} beside its rewards. Return the rewards "
            "alone, or (rewards, dict)."
        )
    check_rewards(rewards, images, name)
    return rewards, extra


@torch.no_grad()
def _ask(
    function: RewardFunction, name: str, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]
) -> tuple[Tensor, dict[str, Any]]:
    """Rewards without gradient, and what is reported beside them."""
    images = images.detach()
    return read_numbers(_apply(function, name, images, prompts, metadata), images, name)


def _bare(function: RewardFunction) -> RewardFunction:
    """A reward without what `prepare` put around it."""
    if isinstance(function, BlackBox):
        function.function = _bare(function.function)
        return function
    return function.function if isinstance(function, PlacedReward) else function


def unwrapped(function: RewardFunction) -> RewardFunction:
    """A reward's own function: without `BlackBox`, and without what moves it between devices."""
    bare = function.function if isinstance(function, PlacedReward) else function
    if isinstance(bare, BlackBox):
        bare = bare.function
    return bare.function if isinstance(bare, PlacedReward) else bare


def _model(function: RewardFunction) -> nn.Module | None:
    """The model that a reward is, if it is one."""
    bare = _bare(function)
    inner = bare.function if isinstance(bare, BlackBox) else bare
    return inner if isinstance(inner, nn.Module) else None


def _placed(function: RewardFunction, device: torch.device, offload: bool) -> RewardFunction:
    """A reward whose model is on a device of its own, or there only while it is needed."""
    function = _bare(function)
    if isinstance(function, BlackBox):
        function.function = _placed(function.function, device, offload)
        return function
    return PlacedReward(function, device, offload) if isinstance(function, nn.Module) else function


def _inputs(function: RewardFunction) -> str:
    """What a reward is called with."""
    kind = getattr(function, "inputs", "images")
    if kind not in ("images", "latents"):
        raise ValueError(f"The reward {name_of(function)!r} has inputs={kind!r}; choose 'images' or 'latents'.")
    return kind


def _version(images: Tensor) -> int:
    return 0 if images.is_inference() else images._version


def check_finite(scores: Scores, names: list[str], prompts: list[str]) -> None:
    """Raise ValueError if a reward is NaN or infinite.

    Args:
        scores (Scores): of a batch.
        names (list[str]): of the rewards, length M.
        prompts (list[str]): length B.
    """
    broken = (~torch.isfinite(scores.rewards)).nonzero().tolist()
    if broken:
        reward, sample = broken[0]
        raise ValueError(
            f"{len(broken)} of {scores.rewards.numel()} rewards are not finite, such as {names[reward]!r} of "
            f"{prompts[sample]!r}: {scores.rewards[reward, sample].item()}. Check the reward, and that the images are "
            "finite (black or NaN images come from a decoder in float16)."
        )


def _detach(value: Any) -> Any:
    """The same without graphs, all the way down: what is kept of a batch must not keep its activations."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, dict):
        return {key: _detach(each) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_detach, value))
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(map(_detach, value))
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _detach(getattr(value, each.name)) for each in fields(value)}
    return value


def _numbers(extra: dict[str, Any], images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The entries to log: numbers, and tensors or arrays of one value or one a sample."""
    for key, value in extra.items():
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biuf":
            value = torch.from_numpy(np.array(value, dtype=np.float64))
        if isinstance(value, (int, float)):
            yield key, torch.tensor(float(value), device=images.device)
        elif isinstance(value, Tensor) and value.shape in ((), (1,), (len(images),)):
            yield key, value


def _threshold(function: RewardFunction) -> float | None:
    return function.threshold if isinstance(function, RewardModel) else None


def _unique(names: list[str]) -> list[str]:
    return [name if names.count(name) == 1 else f"{name}_{index}" for index, name in enumerate(names)]
