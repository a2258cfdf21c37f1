"""How far along an update does damage begin, and what could have said so beforehand?"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from math import inf, isnan, pi, sqrt
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.functional import cross_entropy

from benchmarks.step_parts.onset_nets import Images
from entropylens.analysis.exact_radius import exact_radius

Floats = NDArray[np.float64]
Direction = Mapping[str, Tensor]
"""Change of each parameter; together of length one."""

GRID = np.concatenate([np.geomspace(0.05, 1, 16), np.geomspace(1, 100, 25)[1:]])
"""Values of r that are tried, each 22 % above the last."""
HALVINGS = 6
"""Of the gap between two of them, to 0.3 %."""
POINTS = 0.05
"""Share of samples whose loss counts as damage."""
EVENTS = ("loss", "accuracy", "held_out_accuracy")
SMALLEST = 13
"""Of 256 exact radii: their 5 % quantile."""


@dataclass(frozen=True)
class State:
    """How well a net does."""

    loss: float
    accuracy: float
    held_out_accuracy: float

    def damage(self, start: "State", floor: float) -> dict[str, bool]:
        """Which events have happened since the start? A loss that is NaN has been damaged."""
        return {
            "loss": not self.loss <= start.loss + max(start.loss, floor),
            "accuracy": self.accuracy <= start.accuracy - POINTS + 1e-9,
            "held_out_accuracy": self.held_out_accuracy <= start.held_out_accuracy - POINTS + 1e-9,
        }


def logits_along(
    net: nn.Module, images: Tensor, direction: Direction
) -> Callable[[Tensor], Tensor]:
    """What are the logits after a step of a given length? Running statistics stay as they are."""
    parameters = {name: value.detach() for name, value in net.named_parameters()}
    buffers = dict(net.named_buffers())

    def at(length: Tensor) -> Tensor:
        moved = {name: value + length * direction[name] for name, value in parameters.items()}
        kept = {name: value.clone() for name, value in buffers.items()}
        return functional_call(net, (moved, kept), (images,))

    return at


def derivative(along: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Value and derivative at length zero."""
    found = jvp(along, (torch.zeros(()),), (torch.ones(()),))
    return found[0], found[1]


def gradient(net: nn.Module, data: Images) -> dict[str, Tensor]:
    buffers = dict(net.named_buffers())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        kept = {name: value.clone() for name, value in buffers.items()}
        return cross_entropy(functional_call(net, (parameters, kept), (data.images,)), data.labels)

    return grad(loss)({name: value.detach() for name, value in net.named_parameters()})


def length_of(update: Direction) -> float:
    return sqrt(sum(float(value.detach().double().square().sum()) for value in update.values()))


def unit(update: Direction) -> dict[str, Tensor]:
    length = length_of(update)
    return {name: value / length for name, value in update.items()}


def spreads(slopes: Floats) -> Floats:
    """``[m]``, largest less smallest slope of a sample's logits."""
    return slopes.max(1) - slopes.min(1)


def margin_radii(logits: Floats, slopes: Floats) -> Floats:
    """``[m]`` lengths within which the Taylor series surely converges, with the margin counted.

    ``sqrt((pi / spread)^2 + (max(0, m) / D)^2)`` with m the log odds of the likeliest class and D
    the farthest that its slope is from another's; exact for two classes.
    """
    at = logits.argmax(1)[:, None]
    likeliest = np.take_along_axis(logits, at, 1)
    others = logits - likeliest
    np.put_along_axis(others, at, -inf, 1)
    log_odds = -np.logaddexp.reduce(others, 1)
    farthest = np.abs(slopes - np.take_along_axis(slopes, at, 1)).max(1)
    return np.hypot(pi / spreads(slopes), np.maximum(0, log_odds) / farthest)


def smallest_radii(logits: Floats, slopes: Floats, count: int) -> Floats | None:
    """The smallest exact radii, ascending; None where one of them cannot be told.

    Samples are taken by their `margin_radii`, which no exact radius is below, until no other can
    be among the smallest.
    """
    below = margin_radii(logits, slopes)
    found: list[float] = []
    for at in np.argsort(below):
        if len(found) >= count and below[at] >= sorted(found)[count - 1]:
            break
        found.append(float(exact_radius(logits[at : at + 1], slopes[at : at + 1])[0]))
    return None if any(map(isnan, found)) else np.sort(found)[:count]


def weighted_spreads(logits: Floats, slopes: Floats) -> Floats:
    """``[m]``, twice the standard deviation of the slopes under the softmax; at most the spread."""
    p = np.exp(logits - np.logaddexp.reduce(logits, 1)[:, None])
    mean = (p * slopes).sum(1, keepdims=True)
    return 2 * np.sqrt((p * (slopes - mean) ** 2).sum(1))


def quadratic_length(slope: float, curvature: float, rise: float) -> float:
    """Smallest length at which ``slope t + curvature t^2 / 2 = rise``; inf where it never is."""
    root = slope**2 + 2 * curvature * rise
    if root < 0 or slope + sqrt(root) <= 0:
        return inf
    return 2 * rise / (slope + sqrt(root))


def first_lengths(
    damage: Callable[[float], Mapping[str, bool]], grid: Floats
) -> dict[str, float | None]:
    """At which length does each event happen first? None where it does not.

    Args:
        damage: The events at a length, and whether they have happened.
        grid: Lengths to try, ascending; the gap before the first of them that is damaged is halved.
    """
    seen = cache(damage)
    found: dict[str, float | None] = {}
    for event in EVENTS:
        at = next((at for at, length in enumerate(grid) if seen(float(length))[event]), None)
        if at is None:
            found[event] = None
            continue
        low, high = float(grid[at - 1]) if at else 0.0, float(grid[at])
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if seen(middle)[event] else (middle, high)
        found[event] = high
    return found


def follow(
    net: nn.Module, probe: Images, held_out: Images, update: Direction, *, floor: float = 0.1
) -> dict[str, Any]:
    """Where along one update does damage begin, and what did each normaliser say?

    Args:
        net: In the mode in which the loss uses it.
        probe: Samples whose loss, accuracy and logits are followed.
        held_out: Samples whose accuracy is followed, too.
        update: Change of each parameter, of any length.
        floor: The loss is damaged once it has risen by as much as it was, or by this if more.

    Returns:
        ``onset``: length of the step at each event. ``scales``: by normaliser, what a length is
        multiplied with. ``within``: the worst at r <= 1. Unknown is None.
    """
    direction = unit(update)
    on_probe = logits_along(net, probe.images, direction)
    on_held_out = logits_along(net, held_out.images, direction)
    logits, slopes = derivative(on_probe)

    @cache
    @torch.no_grad()
    def state(length: float) -> State:
        at = torch.tensor(length)
        return _state(on_probe(at), probe.labels, on_held_out(at), held_out.labels)

    @torch.no_grad()
    def linearised(length: float) -> State:
        moved = logits + length * slopes
        return _state(moved, probe.labels, moved, probe.labels)

    z, a = logits.double().numpy(), slopes.double().numpy()
    lengths = GRID * pi / spreads(a).max()
    start, believed = state(0.0), linearised(0.0)
    onset = first_lengths(lambda length: state(length).damage(start, floor), lengths)
    told = first_lengths(lambda length: linearised(length).damage(believed, floor), lengths)

    def loss(length: Tensor) -> Tensor:
        return cross_entropy(on_probe(length), probe.labels)

    slope, curvature = map(float, derivative(grad(loss)))
    scales = logit_scales(z, a) | {
        "update_norm": 1.0,
        "relative_update_norm": 1 / length_of(dict(net.named_parameters())),
        "curvature": abs(curvature) / 2,
        "gradient_curvature": abs(curvature) / 2 / length_of(gradient(net, probe)),
        "quadratic_loss": 1 / quadratic_length(slope, curvature, max(start.loss, floor)),
    }
    safe = [state(float(length)) for length in lengths[GRID <= 1]]
    return {
        "start": asdict(start),
        "onset": onset,
        "scales": {name: scale or None for name, scale in scales.items()},
        "linearised_onset": told,
        "curvature": curvature,
        "within": {
            "loss_ratio": max(one.loss for one in safe) / start.loss,
            "accuracy_change": min(one.accuracy for one in safe) - start.accuracy,
            "held_out_accuracy_change": min(one.held_out_accuracy for one in safe)
            - start.held_out_accuracy,
        },
    }


def logit_scales(logits: Floats, slopes: Floats) -> dict[str, float | None]:
    """What first-order logits make of a step of length one, by normaliser."""
    r, weighted = spreads(slopes) / pi, weighted_spreads(logits, slopes) / pi
    margin, exact = margin_radii(logits, slopes), smallest_radii(logits, slopes, SMALLEST)
    return {
        "r_max": float(r.max()),
        "r_q95": float(np.quantile(r, 0.95)),
        "r_median": float(np.median(r)),
        "margin_min": float(1 / margin.min()),
        "margin_q05": float(1 / np.quantile(margin, 0.05)),
        "exact_min": None if exact is None else float(1 / exact[0]),
        "exact_q05": None if exact is None else float(1 / exact[-1]),
        "weighted_max": float(weighted.max()),
        "weighted_q95": float(np.quantile(weighted, 0.95)),
        "weighted_rms": float(np.sqrt((weighted**2).mean())),
    }


def _state(logits: Tensor, labels: Tensor, held_out: Tensor, held_out_labels: Tensor) -> State:
    return State(
        loss=float(cross_entropy(logits.double(), labels)),
        accuracy=float((logits.argmax(1) == labels).double().mean()),
        held_out_accuracy=float((held_out.argmax(1) == held_out_labels).double().mean()),
    )
