"""A differentiable reward for the shapes world, by analysis: no network, no training.

With d = image - background, a thing of template A (coverage) and colour offset e at place p changes the squared
distance between image and scene from |d|^2 by |e|^2 sum(A^2) - 2 (A correlated with d.e)(p). So one correlation gives
the fit of every thing at every place, and the nearest scene that satisfies the prompt is a small search.
The reward is the mean of two terms, each about 1 for a right picture:

    nearness    exp(-distance^2 / 2) to that nearest scene, in units of one mean object's energy;
    posterior   the probability of its things against every other shape, colour or nothing at the same places, and of
                nothing against one more thing elsewhere, in parts of that in a perfect picture.

Nearness alone cares too little for shape; the posterior alone would let anything pass that beats the alternatives.
"""

from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from examples.shapes import world

TEMPERATURE = 0.5
"""Of the posterior, in mean object energies: high enough that a wholly wrong picture still has a slope."""
MOST_THINGS = len(world.NUMBERS)
BOX = 2 * world.HALF_BOX + 1
PLACES = world.IMAGE_SIZE - BOX + 1
"""Places of a box along one axis; place (0, 0) is a centre at pixel (HALF_BOX, HALF_BOX)."""
BLOCK = 2
"""Pairs of places are searched over blocks of BLOCK x BLOCK places."""
FORBIDDEN = 1e4
"""Cost of a forbidden place, in mean object energies."""


@dataclass(frozen=True)
class Stencils:
    """Constants of the world as tensors: K colours, S shapes."""

    templates: Tensor  # (S, BOX, BOX), coverage in [0, 1]
    offsets: Tensor  # (K, 3), colour less background
    energies: Tensor  # (K, S), squared norm of a thing on the background
    unit: Tensor  # (), the mean of `energies`


@cache
def stencils(device: torch.device, dtype: torch.dtype) -> Stencils:
    """The world's constants on a device."""
    templates = torch.stack([torch.from_numpy(world.template(shape)) for shape in world.SHAPES]).to(device, dtype)
    offsets = torch.tensor(list(world.COLORS.values()), device=device, dtype=dtype)
    offsets = offsets - torch.tensor(world.BACKGROUND, device=device, dtype=dtype)
    energies = offsets.square().sum(1)[:, None] * templates.square().sum((1, 2))
    return Stencils(templates, offsets, energies, energies.mean())


@cache
def forbidden_pairs(relation: str | None, device: torch.device) -> Tensor:
    """Pairs of blocks whose things would overlap or not stand in `relation`, (blocks, blocks), bool."""
    axis = torch.arange(PLACES // BLOCK, device=device)
    blocks = BLOCK * torch.cartesian_prod(axis, axis)
    y, x = (blocks[:, None] - blocks[None]).unbind(-1)
    forbidden = torch.maximum(x.abs(), y.abs()) < world.MIN_SEPARATION
    if relation is not None:
        direction = world.RELATIONS[relation]
        along, across = x * direction[0] + y * direction[1], x * direction[1] + y * direction[0]
        forbidden |= along < across.abs()
    return forbidden


def fits(offset: Tensor) -> Tensor:
    """Change of the squared distance by each thing at each place, in units: (B, 3, H, W) -> (B, K, S, PLACES^2)."""
    known = stencils(offset.device, offset.dtype)
    size = offset.shape[2:]
    along = torch.einsum("kc,bchw->bkhw", known.offsets, offset)
    spectrum = torch.fft.rfft2(along)[:, :, None] * torch.fft.rfft2(known.templates, s=size).conj()
    overlap = torch.fft.irfft2(spectrum, s=size)[..., :PLACES, :PLACES].flatten(3)
    return (known.energies[..., None] - 2 * overlap) / known.unit


def wanted_things(metadata: list[world.Row], device: torch.device) -> Tensor:
    """Which things each row asks for, (B, MOST_THINGS, K, S), bool: several colours if open, nothing past the last."""
    wanted = torch.zeros(len(metadata), MOST_THINGS, len(world.COLORS), len(world.SHAPES), dtype=torch.bool)
    for index, row in enumerate(metadata):
        for slot, thing in enumerate(world.content_of(row).things):
            colors = slice(None) if thing.color is None else list(world.COLORS).index(thing.color)
            wanted[index, slot, colors, world.SHAPES.index(thing.shape)] = True
    return wanted.to(device)


@torch.no_grad()
def nearest_places(fit: Tensor, wanted: Tensor, relations: list[str | None]) -> Tensor:
    """The places of the nearest scene: exact for one thing and for pairs, one after another for three and four.

    Args:
        fit (`Tensor`): as from `fits`, (B, K, S, PLACES^2).
        wanted (`Tensor`): as from `wanted_things`, (B, MOST_THINGS, K, S).
        relations (`list[str | None]`): B relations of the first thing to the second.

    Returns:
        `Tensor`: indices of places, (B, MOST_THINGS), int64; meaningless past the last thing.
    """
    maps = fit[:, None].masked_fill(~wanted[..., None], FORBIDDEN).amin(dim=(2, 3))  # (B, MOST_THINGS, PLACES^2)
    result = places_one_by_one(maps)
    is_pair = wanted.any(dim=(2, 3)).sum(1) == 2
    if is_pair.any():
        pairs = is_pair.nonzero()[:, 0]
        masks = torch.stack([forbidden_pairs(relations[index], fit.device) for index in pairs.tolist()])
        result[pairs, :2] = places_of_pairs(maps[pairs, :2], masks)
    return result


def places_one_by_one(maps: Tensor) -> Tensor:
    """The best place of each thing that is clear of the places before: (B, N, PLACES^2) -> (B, N)."""
    taken = torch.zeros_like(maps[:, 0])
    chosen = []
    for costs in maps.unbind(1):
        chosen.append((costs + taken).argmin(1))
        taken = taken + FORBIDDEN * near(chosen[-1], BOX)
    return torch.stack(chosen, dim=1)


def near(chosen: Tensor, distance: int) -> Tensor:
    """Whether each place is less than a Chebyshev distance from the chosen one: (B,) -> (B, PLACES^2), bool."""
    axis = torch.arange(PLACES, device=chosen.device)
    in_row = (axis - chosen[:, None] // PLACES).abs() < distance
    in_column = (axis - chosen[:, None] % PLACES).abs() < distance
    return (in_row[:, :, None] & in_column[:, None, :]).flatten(1)


def beside(chosen: Tensor, reach: int = 2) -> Tensor:
    """The places up to `reach` from the chosen ones along both axes: (B, N) -> (B, N, (2 * reach + 1)^2)."""
    steps = torch.arange(-reach, reach + 1, device=chosen.device)
    y = (chosen[..., None] // PLACES + steps).clamp(0, PLACES - 1)
    x = (chosen[..., None] % PLACES + steps).clamp(0, PLACES - 1)
    return (y[..., :, None] * PLACES + x[..., None, :]).flatten(2)


def places_of_pairs(maps: Tensor, forbidden: Tensor) -> Tensor:
    """The best pair of places that is not forbidden: (B, 2, PLACES^2), (B, blocks, blocks) -> (B, 2)."""
    side = PLACES // BLOCK
    blocks = maps.unflatten(2, (side, BLOCK, side, BLOCK)).transpose(3, 4).reshape(len(maps), 2, side**2, BLOCK**2)
    best, inner = blocks.min(dim=-1)
    sums = best[:, 0, :, None] + best[:, 1, None, :]
    chosen = sums.masked_fill(forbidden, FORBIDDEN).flatten(1).argmin(1)
    chosen = torch.stack([chosen // side**2, chosen % side**2], dim=1)  # (B, 2), blocks
    inner = inner.gather(2, chosen[..., None])[..., 0]
    y, x = BLOCK * (chosen // side) + inner // BLOCK, BLOCK * (chosen % side) + inner % BLOCK
    return y * PLACES + x


def at_places(fit: Tensor, chosen: Tensor) -> Tensor:
    """Fits at the chosen places: (B, K, S, P), (B, N) -> (B, N, K, S)."""
    index = chosen[:, None, None].expand(-1, *fit.shape[1:3], -1)
    return fit.gather(3, index).movedim(3, 1)


def local_fits(fit: Tensor, chosen: Tensor) -> Tensor:
    """Fits of all things up to two pixels beside places, so that a wrong one is judged where it fits best.

    (B, K, S, P), (B, N) -> (B, N, K, S)
    """
    around = beside(chosen)
    return at_places(fit, around.flatten(1)).unflatten(1, around.shape[1:]).amin(2)


def log_odds(local: Tensor) -> Tensor:
    """Log-probability of each thing at a place, against all others and nothing: (..., K, S) to the same."""
    scores = -local / TEMPERATURE
    return scores - F.pad(scores.flatten(-2), (0, 1)).logsumexp(-1)[..., None, None]


@cache
def perfect_log_odds(device: torch.device, dtype: torch.dtype) -> Tensor:
    """`log_odds` of each thing where it stands alone, as it should: (K, S)."""
    known = stencils(device, dtype)
    things = torch.einsum("kc,syx->kscyx", known.offsets, known.templates).flatten(0, 1)
    margin = (world.IMAGE_SIZE - BOX) // 2
    alone = F.pad(things, (margin, world.IMAGE_SIZE - BOX - margin) * 2)
    places = torch.full((len(alone), 1), margin * PLACES + margin, device=device)
    odds = log_odds(local_fits(fits(alone), places)[:, 0]).flatten(1)
    return odds.diagonal().view(known.energies.shape)


def posterior(fit: Tensor, wanted: Tensor, chosen: Tensor) -> Tensor:
    """Probability of the wanted things at their places, and of nothing elsewhere, (B,) in [0, 1].

    In parts of what it is in a perfect picture, at most 1 for each thing: stronger colours do not pay.
    """
    known = stencils(fit.device, fit.dtype)
    local = local_fits(fit, chosen)
    choice = local.masked_fill(~wanted, FORBIDDEN).flatten(2).argmin(2, keepdim=True)
    found = log_odds(local).flatten(2).gather(2, choice)[..., 0]
    perfect = perfect_log_odds(fit.device, fit.dtype).flatten()[choice[..., 0]]
    present = wanted.any(dim=(2, 3))
    log_things = torch.where(present, (found - perfect).clamp(max=0), 0).sum(1)

    covered = torch.stack([near(place, world.HALF_BOX + 5) for place in chosen.unbind(1)], dim=1)
    covered = (covered & present[..., None]).any(1)
    additional = fit.amin(dim=(1, 2)).masked_fill(covered, FORBIDDEN).amin(1)
    faintest = known.energies.min() / known.unit
    log_nothing = F.logsigmoid(additional / TEMPERATURE) - F.logsigmoid(faintest / TEMPERATURE)
    return (log_things + log_nothing.clamp(max=0)).exp()


def shapes_reward(images: Tensor, prompts: list[str], metadata: list[world.Row]) -> tuple[Tensor, dict[str, Tensor]]:
    """How well images show what their rows ask for.

    Args:
        images (`Tensor`): values in [0, 1], (B, 3, 48, 48); gradients flow back to them.
        prompts (`list[str]`): unused, the rows say all.
        metadata (`list[dict]`): B rows of `world.prompt_rows`.

    Returns:
        `tuple[Tensor, dict[str, Tensor]]`: rewards in [0, 1], (B,), and their terms `nearness` and `posterior`.
    """
    known = stencils(images.device, images.dtype)
    offset = images - images.new_tensor(world.BACKGROUND)[:, None, None]
    fit = fits(offset)
    wanted = wanted_things(metadata, images.device)
    chosen = nearest_places(fit, wanted, [row["relation"] for row in metadata])
    costs = at_places(fit, chosen).masked_fill(~wanted, FORBIDDEN).amin(dim=(2, 3))
    distance = offset.square().sum((1, 2, 3)) / known.unit + torch.where(wanted.any(dim=(2, 3)), costs, 0).sum(1)
    terms = {"nearness": torch.exp(-0.5 * distance.clamp(min=0)), "posterior": posterior(fit, wanted, chosen)}
    return (terms["nearness"] + terms["posterior"]) / 2, terms


def nearness_first(images: Tensor, prompts: list[str], metadata: list[world.Row]) -> tuple[Tensor, dict[str, Tensor]]:
    """The terms of `shapes_reward`, four parts of nearness to one of the posterior: what the examples train with.

    With more of the posterior, colours grow stronger in training than they should, then all alike.
    """
    _, terms = shapes_reward(images, prompts, metadata)
    return terms["nearness"].lerp(terms["posterior"], 0.2), terms
