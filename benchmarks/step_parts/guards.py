"""What may stand between a gradient and the step: the product's policies, and what papers propose.

Every guard makes one optimiser step a call of `step`, or less than one. Numbers are their papers'
own; none is tuned here.
"""

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from copy import deepcopy
from functools import partial
from math import isfinite, pi
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from benchmarks.step_parts.programs import cross_entropy
from entropylens.control import POLICIES, StepBound, StepGuard

__all__ = ["BASELINES", "DEFAULT", "GUARDS", "PRODUCT", "Guard", "Product", "concerns"]

GRID: Final = (*(2.0**-k for k in range(17)), 0.0)
"""Scales of an update that the line search tries."""


class Guard(Protocol):
    """What the training calls instead of ``optimizer.step()``."""

    @property
    def looks(self) -> int:
        """Steps at which the model was asked once more."""
        ...

    @property
    def interventions(self) -> int:
        """Steps that were made smaller or dropped."""
        ...

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        """After the backward pass: make the step, or less of it."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """For another guard to go on from."""
        ...

    def close(self) -> None:
        """Let go of the model."""
        ...


class Unguarded:
    """Makes every step. What others begin from."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.model, self.optimizer = model, optimizer
        self.looks = self.interventions = 0
        self.begin()
        vars(self).update(deepcopy(dict(state or {})))

    def begin(self) -> None:
        """Set up what is remembered."""

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        kept = {k: v for k, v in vars(self).items() if k not in ("model", "optimizer")}
        return deepcopy(kept)

    def close(self) -> None:
        """Nothing was hooked."""

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self.model.parameters() if p.grad is not None]

    def parameters(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters() if p.grad is not None]


class Product:
    """A policy of `entropylens.control`."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        state: Mapping[str, Any] | None = None,
        *,
        policy: str,
    ) -> None:
        self.optimizer = optimizer
        self.guard = StepGuard(
            model, optimizer, StepBound(policy=policy, mode="enforce"), state=state
        )

    @property
    def looks(self) -> int:
        return self.guard.looks

    @property
    def interventions(self) -> int:
        return self.guard.interventions

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        self.guard.observe(targets=targets, loss=loss)
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return deepcopy(self.guard.state_dict())

    def close(self) -> None:
        self.guard.close()


class GradientClipping(Unguarded):
    """Gradients of a joint norm above 1 are scaled down to it (Pascanu et al., arXiv 1211.5063)."""

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.interventions += not norm <= 1
        self.optimizer.step()


class AdaGC(Unguarded):
    """Each tensor's gradient is held to 1.05 times its own typical norm.

    The typical norm is an exponential average (0.98) of the norms after clipping. In the first 100
    steps gradients are clipped to a joint norm of 1 instead, and the least norm of each tensor is
    what the average begins from. Numbers: the paper's, as in public implementations. A gradient
    that is not finite stays so, ``0 * inf`` being NaN, and its tensor is not clipped any more.
    Source: arXiv 2502.11034, algorithm 1.
    """

    absolute, relative, decay, warmup = 1.0, 1.05, 0.98, 100

    def begin(self) -> None:
        self.steps = 0
        self.typical: Tensor | None = None

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        gradients = self.gradients()
        norms = torch.stack(torch._foreach_norm(gradients))
        if self.steps < self.warmup or self.typical is None:
            scales = (self.absolute / norms.norm()).clamp(max=1).expand_as(norms)
            clipped = scales * norms
            self.typical = clipped if self.typical is None else self.typical.minimum(clipped)
        else:
            scales = (self.relative * self.typical / norms).nan_to_num(1.0).clamp(max=1)
            self.typical = self.decay * self.typical + (1 - self.decay) * scales * norms
        self.steps += 1
        self.interventions += bool((scales < 1).any())
        torch._foreach_mul_(gradients, list(scales))
        self.optimizer.step()


class ZClip(Unguarded):
    """A joint norm more than 2.5 standard deviations above its average is an outlier.

    It is scaled to ``mean + 2.5**2 / z * sd``, z being its deviations; mean and variance are
    exponential averages (0.97) of the norms after clipping, begun from 25 steps. As in the paper
    there is no fixed norm besides. Once a norm is NaN the averages are, and nothing is clipped
    any more. Source: arXiv 2504.02507, and its released ``zclip.py``.
    """

    decay, threshold, warmup, eps = 0.97, 2.5, 25, 1e-6

    def begin(self) -> None:
        self.first: list[float] = []
        self.mean = self.variance = 0.0

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        gradients = self.gradients()
        norm = torch.stack(torch._foreach_norm(gradients)).norm().item()
        if len(self.first) < self.warmup:
            self.first.append(norm)
            if len(self.first) == self.warmup:
                self.mean = sum(self.first) / self.warmup
                self.variance = sum((x - self.mean) ** 2 for x in self.first) / self.warmup
        else:
            sd = self.variance**0.5
            deviations = (norm - self.mean) / (sd + self.eps)
            kept = norm
            if deviations > self.threshold:
                kept = self.mean + self.threshold**2 / deviations * sd
                self.interventions += 1
                torch._foreach_mul_(gradients, kept / norm)
            self.mean = self.decay * self.mean + (1 - self.decay) * kept
            apart = (1 - self.decay) * (kept - self.mean) ** 2
            self.variance = self.decay * self.variance + apart
        self.optimizer.step()


class AdaptiveGradientClipping(Unguarded):
    """The gradient of each output unit is held to 0.01 of the norm of its weights.

    Weights count as at least 1e-3; vectors are one unit; the last layer's matrix is left out. The
    0.01 is the paper's for its largest batches and what libraries default to. Source: Brock et al.,
    arXiv 2102.06171, equation 3.
    """

    share, least = 0.01, 1e-3

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        last = max(at for at, p in enumerate(parameters) if p.ndim > 1)
        is_smaller = False
        for at, parameter in enumerate(parameters):
            gradient = parameter.grad
            if at == last or gradient is None:
                continue
            most = self.share * _unit_norms(parameter.detach()).clamp(min=self.least)
            scale = (most / _unit_norms(gradient).clamp(min=1e-6)).clamp(max=1)
            is_smaller |= bool((scale < 1).any())
            gradient.mul_(scale)
        self.interventions += is_smaller
        self.optimizer.step()


def _unit_norms(tensor: Tensor) -> Tensor:
    if tensor.ndim <= 1:
        return tensor.norm()
    return tensor.flatten(1).norm(dim=1).view(-1, *[1] * (tensor.ndim - 1))


class StableAdamW(Unguarded):
    """Each tensor's learning rate is divided by the root mean square of g / sqrt(v), if above 1.

    v is Adam's corrected average of squares with the present one in it, at least eps squared. Only
    Adam and AdamW have one. Source: Wortsman et al., arXiv 2304.13013, algorithm 2.
    """

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        parameters, gradients = self.parameters(), self.gradients()
        before = [p.clone() for p in parameters]
        self.optimizer.step()
        is_smaller = False
        for group in self.optimizer.param_groups:
            for at, parameter in enumerate(group["params"]):
                state = self.optimizer.state[parameter]
                squares = state["exp_avg_sq"] / (1 - group["betas"][1] ** state["step"].item())
                squares = squares.clamp(min=group["eps"] ** 2)
                rms = (gradients[at].square() / squares).mean().sqrt()
                # Twice an lr makes twice an update, decay included: it can be divided afterwards.
                if not rms <= 1:
                    is_smaller = True
                    parameters[at].copy_(before[at] + (parameters[at] - before[at]) / rms)
        self.interventions += is_smaller


class SkipStep(Unguarded):
    """A step whose loss or gradient norm is 6 standard deviations from its last 128 is left out.

    From 64 steps on, in either direction; the outlier itself is among the next 128, and so is a
    loss that is not finite, after which every step is left out until it is forgotten: so in
    the released code. There the moments become NaN with such a gradient, here they are left alone.
    Source: OLMo 2, arXiv 2501.00656, and OLMo-core's ``skip_step_optimizer.py``.
    """

    window, deviations = 128, 6

    def begin(self) -> None:
        self.losses: deque[float] = deque(maxlen=self.window + 1)
        self.norms: deque[float] = deque(maxlen=self.window + 1)

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        self.losses.append(loss.item())
        self.norms.append(torch.stack(torch._foreach_norm(self.gradients())).norm().item())
        is_young = len(self.losses) < max(20, self.window // 2)
        if is_young or (self._is_ordinary(self.losses) and self._is_ordinary(self.norms)):
            self.optimizer.step()
        else:
            self.interventions += 1

    def _is_ordinary(self, values: deque[float]) -> bool:
        sd, mean = torch.std_mean(torch.tensor([*values][:-1]))
        return bool((values[-1] - mean).abs() / sd <= self.deviations)


class LineSearch(Unguarded):
    """Of the proposed update at `GRID`, what gives the batch its least true loss.

    A forward per scale; statistics of batch norm are put back after them.
    """

    @torch.no_grad()
    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        parameters = self.parameters()
        before = [p.clone() for p in parameters]
        self.optimizer.step()
        update = torch._foreach_sub(parameters, before)
        kept = [buffer.clone() for buffer in self.model.buffers()]
        losses = []
        for scale in GRID:
            _place(parameters, before, update, scale)
            found = cross_entropy(self.model(inputs), targets).item()
            losses.append(found if isfinite(found) else torch.inf)
        for buffer, old in zip(self.model.buffers(), kept, strict=True):
            buffer.copy_(old)
        scale = GRID[min(range(len(GRID)), key=losses.__getitem__)]
        _place(parameters, before, update, scale)
        self.looks += 1
        self.interventions += scale < 1


def _place(
    parameters: list[Tensor], before: list[Tensor], update: tuple[Tensor, ...], scale: float
) -> None:
    torch._foreach_copy_(parameters, before)
    if scale:
        torch._foreach_add_(parameters, update, alpha=scale)


class ReleasedRule(Unguarded):
    """The ghost paper's released controller: the radius along the raw gradient.

    ``scale = min(1, rho / (lr ||g||))`` with ``rho = pi / Delta_a`` along ``g / ||g||``, and then
    the optimiser's own step with ``lr * scale``: under Adam, whose step is another one, the bound
    is not kept. A radius that is NaN scales nothing, as there. Source: arXiv 2603.13552, its
    ``archgrid/run.py``.
    """

    def step(self, inputs: Tensor, targets: Tensor, loss: Tensor) -> None:
        model, optimizer = self.model, self.optimizer
        with torch.no_grad(), forward_ad.dual_level(), warnings.catch_warnings():
            # torch compiles decompositions with what it calls deprecated, once a process.
            warnings.simplefilter("ignore", DeprecationWarning)
            moved: dict[str, Tensor] = {name: b.clone() for name, b in model.named_buffers()}
            for name, parameter in model.named_parameters():
                moved[name] = forward_ad.make_dual(parameter.detach(), parameter.grad)
            change = forward_ad.unpack_dual(functional_call(model, moved, (inputs,))).tangent
        rate = optimizer.param_groups[0]["lr"]
        ratio = rate * (change.amax(-1) - change.amin(-1)).amax().item() / pi
        scale = min(1.0, 1 / ratio) if ratio else 1.0
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = rate
        self.looks += 1
        self.interventions += scale < 1


DEFAULT: Final = StepBound().policy
PRODUCT: Final = (DEFAULT, *(name for name in POLICIES if name != DEFAULT))
BASELINES: Final[Mapping[str, type[Unguarded]]] = {
    "none": Unguarded,
    "gradient_clipping": GradientClipping,
    "adagc": AdaGC,
    "zclip": ZClip,
    "adaptive_gradient_clipping": AdaptiveGradientClipping,
    "stable_adamw": StableAdamW,
    "skip_step": SkipStep,
    "line_search": LineSearch,
    "released_rule": ReleasedRule,
}
GUARDS: Final[Mapping[str, Callable[..., Guard]]] = {
    **BASELINES,
    **{name: partial(Product, policy=name) for name in PRODUCT},
}


def concerns(policy: str, optimiser: str) -> bool:
    """Whether a policy is defined for an optimiser."""
    return policy != "stable_adamw" or optimiser.startswith("adam")
