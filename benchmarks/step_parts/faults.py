"""What goes wrong, and what must not be taken for it: faults, and courses without any."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import cos, inf, nan, pi
from typing import Final

import torch
from torch import Tensor

from benchmarks.step_parts.programs import WARMUP, generator

__all__ = ["COURSES", "FAULTS", "PLAIN", "Course", "Fault"]

OVERFLOWN: Final = 1e-3
"""Share of gradient entries that are not finite after an overflow."""


@dataclass(frozen=True, kw_only=True)
class Fault:
    """Something that goes wrong for some steps.

    Args:
        steps: How many; infinite: it stays so.
        rate: Factor of the learning rate.
        garbage: Whether noise with random labels is trained on.
        gradient: Factor of all gradients, before anything looks at them.
        overflows: Whether some gradient entries are inf or NaN.
        beta2: Adam's decay rate of squares, instead of its own.
        eps: Adam's epsilon, instead of its own.
    """

    steps: float
    rate: float = 1.0
    garbage: bool = False
    gradient: float = 1.0
    overflows: bool = False
    beta2: float | None = None
    eps: float | None = None

    def concerns(self, optimiser: str) -> bool:
        """Whether there is what it changes."""
        return (self.beta2 is None and self.eps is None) or optimiser.startswith("adam")

    def set(self, optimizer: torch.optim.Optimizer) -> None:
        """Change the optimiser's settings, after its learning rate was set anew."""
        for group in optimizer.param_groups:
            group["lr"] *= self.rate
            if self.beta2 is not None:
                group["betas"] = group["betas"][0], self.beta2
            if self.eps is not None:
                group["eps"] = self.eps

    def spoil(self, gradients: Iterable[Tensor], seed: int, step: int) -> None:
        """Change gradients, in place."""
        source = generator(seed, step, stream=2)
        for at, gradient in enumerate(gradients):
            gradient.mul_(self.gradient)
            if self.overflows:
                drawn = torch.rand(gradient.shape, generator=source)
                gradient[drawn < OVERFLOWN] = inf
                gradient[drawn > 1 - OVERFLOWN / 2] = nan
                if at == 0:
                    gradient.view(-1)[0] = inf


FAULTS: Final[Mapping[str, Fault]] = {
    "rate_x10": Fault(steps=20, rate=10),
    "rate_x100": Fault(steps=20, rate=100),
    "rate_x1000": Fault(steps=20, rate=1_000),
    "rate_x10000": Fault(steps=20, rate=10_000),
    "garbage_once": Fault(steps=1, garbage=True),
    "garbage_five_times": Fault(steps=5, garbage=True),
    "gradient_x1000": Fault(steps=1, gradient=1_000),
    "beta2_to_half": Fault(steps=inf, beta2=0.5),
    "eps_to_1e-20": Fault(steps=inf, eps=1e-20),
    "overflow_once": Fault(steps=1, overflows=True),
    "overflow_three_times": Fault(steps=3, overflows=True),
}


@dataclass(frozen=True, kw_only=True)
class Course:
    """A healthy training.

    Args:
        steps: How many.
        rate: Factor of the learning rate, of the step and of the optimiser's name.
        share: Of a whole batch.
        shifted: First steps, in which the data are others.
    """

    steps: int
    rate: Callable[[int, str], float]
    share: float = 1.0
    shifted: int = 0


def _warm(step: int, optimiser: str) -> float:
    return min((step + 1) / max(WARMUP[optimiser], 1), 1.0)


def _restarted(step: int, optimiser: str) -> float:
    """From 0 up in 60 steps; along cosines down to 0 in 200 steps, three times."""
    return min(step / 60, 1.0) * (1 + cos(pi * (step % 200) / 200)) / 2


PLAIN: Final = Course(steps=320, rate=_warm)
COURSES: Final[Mapping[str, Course]] = {
    "restarts": Course(steps=600, rate=_restarted),
    "other_data_first": Course(steps=300, rate=_warm, shifted=150),
    "small_batches": Course(steps=300, rate=_warm, share=1 / 8),
}
"""Of what may look like a fault and is none."""
