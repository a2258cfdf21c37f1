"""What a person looks at to tell a healthy run from one that is about to fail, figure by figure."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final

from entropylens.dictionary import definition
from entropylens.errors import EntropyLensError
from entropylens.figures.colours import COLOURS

__all__ = ["EVALUATION", "PANELS", "ROLLOUT", "Panel", "Shown", "panel_of", "unit_of"]

EVALUATION: Final = "eval"
ROLLOUT: Final = "rollout"


@dataclass(frozen=True)
class Shown:
    """A series and how it is drawn."""

    name: str
    label: str
    colour: str = "blue"
    role: str = "line"
    """line, or low or high: the edges of a band, which are named in pairs."""
    phase: str = "train"


@dataclass(frozen=True)
class Panel:
    """A figure of vital signs; it is there where the log has one of its lines."""

    key: str
    title: str
    series: tuple[Shown, ...]
    logarithmic: bool = False
    reference: float | None = None
    """A value that must not be passed, drawn across."""
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        """Gather the names."""
        object.__setattr__(self, "names", tuple(dict.fromkeys(s.name for s in self.series)))


PANELS: Final = (
    Panel(
        "entropy",
        "Token entropy",
        (
            Shown("entropy/token/p05", "5 %", role="low"),
            Shown("entropy/token/p95", "5-95 %", role="high"),
            Shown("entropy/token/p25", "25 %", role="low"),
            Shown("entropy/token/p75", "", role="high"),
            Shown("entropy/token/p50", "median", "purple"),
            Shown("entropy/token/mean", "mean", "orange"),
        ),
    ),
    Panel(
        "reward",
        "Reward",
        (
            Shown("reward/mean", "mean reward", "green", phase=ROLLOUT),
            Shown("framework/reward", "reward, as the trainer logs it", "orange"),
            Shown("framework/rewards/margins", "reward margin", "blue"),
        ),
    ),
    Panel(
        "loss",
        "Loss",
        (
            Shown("loss/mean", "training", "blue"),
            Shown("loss/mean", "evaluation", "orange", phase=EVALUATION),
        ),
    ),
    Panel(
        "groups",
        "Groups that teach nothing",
        (
            Shown("group/no_spread/share", "equal rewards", "purple", phase=ROLLOUT),
            Shown("group/all_correct/share", "all right", "green", phase=ROLLOUT),
            Shown("group/all_wrong/share", "all wrong", "red", phase=ROLLOUT),
        ),
    ),
    Panel(
        "diversity",
        "Share of answers",
        (
            Shown("answer/distinct/share", "different", "blue", phase=ROLLOUT),
            Shown("pass_at/1", "right (pass@1)", "green", phase=ROLLOUT),
        ),
    ),
    Panel(
        "change",
        "Entropy change in a step",
        (
            Shown("entropy/change/predicted", "predicted", "blue"),
            Shown("entropy/change/extrapolated", "extrapolated", "green"),
            Shown("entropy/change/measured", "measured", "orange"),
        ),
    ),
    Panel(
        "covariance",
        "Covariance of log p and advantage",
        (
            Shown("covariance/total/mean", "total", "grey"),
            Shown("covariance/within/mean", "within states", "blue"),
            Shown("covariance/between/mean", "between states", "orange"),
        ),
    ),
    Panel(
        "radius",
        "Share of the ghost radius that a step uses",
        (
            Shown("ghost/ratio/max", "largest", "red"),
            Shown("ghost/ratio/p95", "95 %", "orange"),
            Shown("ghost/ratio/p50", "median", "blue"),
        ),
        reference=1.0,
    ),
    Panel(
        "kl",
        "KL divergence and gates",
        (
            Shown("kl/mean", "KL to the reference", "blue"),
            Shown("framework/kl", "KL, as the trainer logs it", "blue"),
            Shown("control/gate", "gate", "orange"),
        ),
    ),
    Panel(
        "control",
        "Factor of bounded steps",
        (Shown("control/step_scale", "step scale", "green"),),
    ),
    Panel(
        "ratio",
        "Importance ratios",
        (
            Shown("ratio/effective_sample_size/share", "effective sample size", "blue"),
            Shown("clip/region/share", "in the clipped region", "orange"),
        ),
    ),
    Panel(
        "mismatch",
        "Sampler against trainer",
        (Shown("mismatch/kl", "KL divergence", "red"),),
    ),
    Panel(
        "length",
        "Length of completions",
        (
            Shown("completion/length/p50", "50 %", role="low", phase=ROLLOUT),
            Shown("completion/length/p95", "50-95 %", role="high", phase=ROLLOUT),
            Shown("completion/length/mean", "mean", "blue", phase=ROLLOUT),
        ),
    ),
    Panel(
        "gradient",
        "Gradient norm",
        (
            Shown("gradient/norm/before_clip", "before clipping", "blue"),
            Shown("gradient/norm/after_clip", "after clipping", "orange"),
        ),
        logarithmic=True,
    ),
    Panel(
        "conditioning",
        "Worst condition number",
        (Shown("conditioning/kappa_max", "largest", "red"),),
        logarithmic=True,
    ),
    Panel(
        "representation",
        "Representation entropy",
        (Shown("representation/dse", "diffusion spectral entropy, mean of layers", "purple"),),
    ),
    Panel(
        "attention",
        "Attention heads",
        (
            Shown("attention/overloaded/share", "look everywhere", "orange"),
            Shown("attention/collapsed/share", "look at one place", "red"),
        ),
    ),
    Panel(
        "gap",
        "Surprisal gap",
        (Shown("surprisal_gap/mean", "mean of -log p - H", "purple"),),
    ),
    Panel("rate", "Learning rate", (Shown("learning_rate", "learning rate", "green"),)),
    Panel(
        "update",
        "Update against weights",
        (Shown("update/relative_norm", "update norm / weight norm", "blue"),),
        logarithmic=True,
    ),
    Panel(
        "speed",
        "Throughput",
        (Shown("throughput/tokens_per_second", "tokens per second", "green"),),
    ),
    Panel(
        "cost",
        "Cost of watching",
        (Shown("overhead/fraction", "share of wall time", "grey"),),
    ),
)
"""The most telling first. Names that no diagnostic of ours writes yet wait for it."""


def panel_of(names: Sequence[str]) -> Panel:
    """A panel for series that somebody picked.

    Args:
        names: Metric names.

    Returns:
        The panel; its colours follow one another.
    """
    palette = list(COLOURS)
    series = [Shown(name, name, palette[at % len(palette)]) for at, name in enumerate(names)]
    return Panel(" ".join(names), ", ".join(names), tuple(series))


@cache
def unit_of(name: str) -> str:
    """The unit of a metric; empty for pure numbers and for names that are not defined."""
    try:
        unit = definition(name).unit
    except EntropyLensError:
        return ""
    return "" if unit == "1" else unit
