"""FlowBP (https://huggingface.co/papers/2606.11075): the end as a sum of velocities, some of them with gradients."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch

from ..ranges import Range
from .base import Method, Schedule
from .flow import RECTIFIED
from .surrogate import Segment, Support, SurrogatePlan, SurrogateTrajectory, floored_similarity, unit_weight

SECOND_SUPPORT_SCALE = 0.25
"""Factor of the gradient of the second active velocity of a quadrature."""


@dataclass(frozen=True)
class FlowBPSparse(Method[SurrogatePlan]):
    """Euler's sum over all steps, with gradients at a few of them:

        x_hat_T = sg(x_0) + sum over i of h_i v_theta(sg(x_i), t_i),        h_i = t_{i+1} - t_i

    x_T carries its gradient, w = 1. The K active steps are drawn without replacement, step i with probability
    proportional to (i + 1)^b, and their gradients scaled by `1 + gamma * (sum |h| / sum over active |h| - 1)`.

    Args:
        num_active_steps (int): K. The paper uses 3 for FLUX.1, 4 for SD3.5.
        late_bias (float): b. The paper uses 2 for FLUX.1, 1 for SD3.5.
        gradient_rescale (float): gamma. The paper uses 1 for FLUX.1, 0.5 for SD3.5.

    Raises:
        ValueError: if a setting is out of its range.
    """

    num_active_steps: int = 3
    late_bias: float = 2.0
    gradient_rescale: float = 1.0

    def __post_init__(self) -> None:
        Range(1, whole=True).check("FlowBPSparse: num_active_steps", self.num_active_steps)
        Range(0).check("FlowBPSparse: late_bias", self.late_bias)
        Range(0).check("FlowBPSparse: gradient_rescale", self.gradient_rescale)

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> SurrogatePlan:
        _check_schedule("FlowBPSparse", schedule, self.num_active_steps)
        active = _draw_late(schedule.levels, self.num_active_steps, self.late_bias, generator)
        scales = dict.fromkeys(active, _rescaled(_euler(schedule), active, self.gradient_rescale))
        return SurrogatePlan(tuple(active), paths=((_euler_segment(0, schedule.num_steps, schedule, scales),),))

    def follow(self, plan: SurrogatePlan, schedule: Schedule) -> SurrogateTrajectory:
        return SurrogateTrajectory(plan, schedule, unit_weight)


@dataclass(frozen=True)
class FlowBPBridge(Method[SurrogatePlan]):
    """FlowBP-Sparse in two segments that meet at a step j, through whose denoiser input the later one is nested:

        x_hat_j = sg(x_0) + sum over i < j of h_i v_i           x_j carries its gradient
        x_hat_T = x_j + sum over i >= j of h_i v_i              x_T carries its gradient, w = 1

    with v_j's input scaled by alpha as in LeapAlign; all other inputs are sg(x_i). j is the later of two steps drawn
    uniformly. The active steps are split in proportion to the segments' lengths, at least one each, j among them.

    Args:
        num_active_steps (int): K, at least 2; the paper's 5.
        late_bias (float): b, within each segment. The paper uses 2 for FLUX.1, 4 for SD3.5.
        gradient_rescale (float): gamma. The paper uses 1 for FLUX.1, 0 for SD3.5.
        gradient_discount (float): alpha. The paper uses 0.1 for FLUX.1, 0.5 for SD3.5.

    Raises:
        ValueError: if a setting is out of its range.
    """

    num_active_steps: int = 5
    late_bias: float = 2.0
    gradient_rescale: float = 1.0
    gradient_discount: float = 0.1

    def __post_init__(self) -> None:
        Range(2, whole=True).check("FlowBPBridge: num_active_steps", self.num_active_steps)
        Range(0).check("FlowBPBridge: late_bias", self.late_bias)
        Range(0).check("FlowBPBridge: gradient_rescale", self.gradient_rescale)
        Range(0, 1).check("FlowBPBridge: gradient_discount", self.gradient_discount)

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> SurrogatePlan:
        levels = schedule.levels
        _check_schedule("FlowBPBridge", schedule, self.num_active_steps)
        place = max(torch.randperm(len(levels), generator=generator)[:2].tolist())
        before, joint, after = levels[:place], levels[place], levels[place + 1 :]
        num_before = round(self.num_active_steps * len(before) / len(levels))
        fewest = max(1, self.num_active_steps - 1 - len(after))
        num_before = min(max(num_before, fewest), len(before), self.num_active_steps - 1)
        num_after = self.num_active_steps - 1 - num_before
        active = _draw_late(before, num_before, self.late_bias, generator)
        active += [joint, *_draw_late(after, num_after, self.late_bias, generator)]
        scales = dict.fromkeys(active, _rescaled(_euler(schedule), active, self.gradient_rescale))
        segments = (
            _euler_segment(0, joint, schedule, scales),
            _euler_segment(joint, schedule.num_steps, schedule, scales),
        )
        return SurrogatePlan(tuple(active), self.gradient_discount, paths=(segments,))

    def follow(self, plan: SurrogatePlan, schedule: Schedule) -> SurrogateTrajectory:
        return SurrogateTrajectory(plan, schedule, unit_weight)


@dataclass(frozen=True)
class FlowBPLagrange(Method[SurrogatePlan]):
    """LeapAlign whose two leaps are quadratures over several velocities:

        x_hat_j = sg(x_k) + sum over supports s in [k, j) of w_s v_s,    and so from j to the end

    The supports of a leap are up to `order` steps spread evenly from its start; w_s integrates the Lagrange polynomial
    of the velocity over time. The first two supports carry gradients, the second scaled by 0.25 and its input
    detached; both are scaled by `1 + gamma * (sum |w| / sum over active |w| - 1)`. Distances and loss weight are
    LeapAlign's. The steps, counted from the end, are cut into three lengths (end to j, j to k, k to noise) by a
    Dirichlet distribution.

    Args:
        gradient_discount (float): alpha in [0, 1].
        similarity_floor (float): tau > 0.
        order (int): most supports of a leap.
        gradient_rescale (float): gamma. The paper uses 0.5 for FLUX.1, 0 for SD3.5.
        concentrations (tuple[float, float, float]): of the three lengths, from the clean end.
        num_late_steps (int | None): j is one of so many last steps; what is cut off goes to the noise side. None is no
            limit; the paper uses 10 for SD3.5.

    Raises:
        ValueError: if a setting is out of its range.
    """

    gradient_discount: float = 0.1
    similarity_floor: float = 0.2
    order: int = 3
    gradient_rescale: float = 0.5
    concentrations: tuple[float, float, float] = (2.5, 6.0, 2.0)
    num_late_steps: int | None = None

    def __post_init__(self) -> None:
        Range(0, 1).check("FlowBPLagrange: gradient_discount", self.gradient_discount)
        Range(0, excluded=True).check("FlowBPLagrange: similarity_floor", self.similarity_floor)
        Range(1, whole=True).check("FlowBPLagrange: order", self.order)
        Range(0).check("FlowBPLagrange: gradient_rescale", self.gradient_rescale)
        concentrations = tuple(self.concentrations) if isinstance(self.concentrations, (tuple, list)) else ()
        if len(concentrations) != 3 or any(each not in Range(0, excluded=True) for each in concentrations):
            raise ValueError(
                f"FlowBPLagrange: concentrations={self.concentrations!r} must be three finite numbers above 0."
            )
        object.__setattr__(self, "concentrations", concentrations)
        if self.num_late_steps is not None:
            Range(1, whole=True).check("FlowBPLagrange: num_late_steps", self.num_late_steps)

    def draw(self, schedule: Schedule, generator: torch.Generator | None) -> tuple[int, int]:
        """Draw the steps k < j."""
        levels = schedule.levels
        # torch.distributions takes no generator
        gammas = torch._standard_gamma(torch.tensor(self.concentrations, dtype=torch.float64), generator=generator)
        to_end, between, _ = (gammas / gammas.sum() * len(levels)).round().int().tolist()
        to_end = min(max(to_end, 1), len(levels) - 1)
        between = min(max(between, 1), len(levels) - to_end)
        if self.num_late_steps is not None:
            to_end = min(to_end, self.num_late_steps)
        return levels[len(levels) - to_end - between], levels[len(levels) - to_end]

    def plan(self, schedule: Schedule, generator: torch.Generator | None) -> SurrogatePlan:
        _check_schedule("FlowBPLagrange", schedule, 2)
        first, joint = self.draw(schedule, generator)
        leaps = [self._leap(first, joint, schedule), self._leap(joint, schedule.num_steps, schedule)]
        active = [support.step for segment in leaps for support in segment.supports[:2]]
        return SurrogatePlan(tuple(active), self.gradient_discount, paths=(tuple(leaps),))

    def _leap(self, start: int, end: int, schedule: Schedule) -> Segment:
        steps = [level for level in schedule.levels if start <= level < end]
        count = min(self.order, len(steps))
        # Halves are rounded to even, as the paper's code does.
        places = [round(index * (len(steps) - 1) / max(count - 1, 1)) for index in range(count)]
        steps = [steps[place] for place in places]
        times = schedule.times
        weights = lagrange_weights([times[step] for step in steps], times[start], times[end])
        scale = _rescaled(dict(zip(steps, weights, strict=True)), steps[:2], self.gradient_rescale)
        scales = [scale, SECOND_SUPPORT_SCALE * scale] + [1.0] * len(steps)
        supports = [Support(*each) for each in zip(steps, weights, scales, strict=False)]
        return Segment(start, end, tuple(supports))

    def follow(self, plan: SurrogatePlan, schedule: Schedule) -> SurrogateTrajectory:
        return SurrogateTrajectory(plan, schedule, partial(floored_similarity, floor=self.similarity_floor))


def lagrange_weights(points: Sequence[float], start: float, end: float) -> list[float]:
    """Return the weights with which values at `points` integrate their polynomial from `start` to `end`.

    Args:
        points (Sequence[float]): different times.
        start (float): lower bound of the integral.
        end (float): upper bound of the integral.

    Returns:
        list[float]: one weight a point.
    """
    powers = torch.arange(len(points), dtype=torch.float64)
    moments = (end ** (powers + 1) - start ** (powers + 1)) / (powers + 1)
    values = torch.tensor(points, dtype=torch.float64) ** powers[:, None]
    return torch.linalg.solve(values, moments).tolist()


def _euler(schedule: Schedule) -> dict[int, float]:
    return {step: schedule.times[step + 1] - schedule.times[step] for step in range(schedule.num_steps)}


def _euler_segment(start: int, end: int, schedule: Schedule, scales: dict[int, float]) -> Segment:
    """All steps from `start` to `end`, some with a scale of their gradient."""
    supports = [Support(step, weight, scales.get(step, 1.0)) for step, weight in _euler(schedule).items()]
    return Segment(start, end, tuple(support for support in supports if start <= support.step < end))


def _rescaled(weights: dict[int, float], active: Sequence[int], rescale: float) -> float:
    """The factor that makes up for the weights of the steps without gradient."""
    share = sum(abs(weights[step]) for step in active) / sum(map(abs, weights.values()))
    return 1.0 + rescale * (1.0 / share - 1.0)


def _draw_late(steps: Sequence[int], count: int, bias: float, generator: torch.Generator | None) -> list[int]:
    """Different steps, ascending, with probabilities proportional to (place + 1)^bias."""
    if count == 0:
        return []
    odds = torch.arange(1, len(steps) + 1, dtype=torch.float64) ** bias
    return sorted(steps[place] for place in odds.multinomial(count, generator=generator).tolist())


def _check_schedule(method: str, schedule: Schedule, num_steps: int) -> None:
    if schedule.interpolant is not RECTIFIED:
        raise ValueError(
            f"{method} sums Euler steps of a rectified flow, but this scheduler follows another path. Use LeapAlign."
        )
    if len(schedule.levels) < num_steps:
        raise ValueError(
            f"{method} needs at least {num_steps} sampling steps, but there are {len(schedule.levels)}. Use more "
            "sampling steps or fewer num_active_steps."
        )
