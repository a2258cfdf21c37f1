"""What an optimiser's step shows: the gradients it uses, the rates it uses, the update it makes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, NoReturn, Protocol

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.optim import Optimizer

from entropylens.diagnostics._summaries import wide_dtype
from entropylens.diagnostics.gradient_norm import total_norm
from entropylens.registry import GradientReading, UpdateReading

__all__ = [
    "OptimizerEvents",
    "OptimizerTap",
    "named_optimizers",
    "unwrap_optimizer",
    "with_closure",
]

_FLOATS: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class OptimizerEvents(Protocol):
    """What `OptimizerTap` asks and tells."""

    @property
    def due(self) -> Mapping[str, Any]:
        """What diagnostics that are due in the step in progress read; empty if none is."""

    def wants_update(self) -> bool:
        """Whether parameters are to be kept from before the step in progress; asked once in it."""

    def take(self, reads: str, reading: Any) -> None:
        """A reading is ready."""


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimiser inside a trainer's wrapper.

    Raises:
        TypeError: There is none.
    """
    inner = optimizer
    # accelerate's wrapper is an Optimizer too, but one that was never initialised.
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    if not isinstance(inner, Optimizer):
        raise TypeError(
            f"Lens: expected a torch.optim.Optimizer or a wrapper of one, "
            f"got {type(optimizer).__name__}"
        )
    return inner


def named_optimizers(optimizers: Any) -> dict[str, Optimizer]:
    """Optimisers by the name they have in the log; a single one has the empty name.

    Args:
        optimizers: None, one, a sequence (named optimizer0, optimizer1, ...) or a mapping from
            names; each may be a wrapper.

    Raises:
        TypeError: One of them is no optimiser.

    Example:
        >>> import torch
        >>> parameter = torch.nn.Parameter(torch.zeros(1))
        >>> list(named_optimizers([torch.optim.SGD([parameter]), torch.optim.SGD([parameter])]))
        ['optimizer0', 'optimizer1']
    """
    if optimizers is None:
        return {}
    if isinstance(optimizers, Mapping):
        found = {str(name): unwrap_optimizer(one) for name, one in optimizers.items()}
    elif isinstance(optimizers, Sequence):
        found = {f"optimizer{i}": unwrap_optimizer(one) for i, one in enumerate(optimizers)}
    else:
        return {"": unwrap_optimizer(optimizers)}
    return {"": next(iter(found.values()))} if len(found) == 1 else found


class OptimizerTap:
    """Reads an optimiser just before and just after each of its steps.

    Where the step is given a closure, as Lightning's automatic optimisation and LBFGS do, forward
    and backward run within the step: gradients and parameters are then read when the closure
    returns for the first time. Of several steps of one optimiser within one step of the run the
    first is read. A step that is compiled (`torch.compile(optimizer.step)`) is not read at all.

    The copy of the parameters that the update needs lives only during a step in which a diagnostic
    that reads the update is due.

    Args:
        optimizer: A torch optimiser.
        events: Asked what is due; must not raise.
        parameter_names: By identity; parameters without one are numbered.
        guard: Runs a function so that neither its errors nor its time escape unseen.
        name: In the log; empty where there is one optimiser.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        events: OptimizerEvents,
        parameter_names: dict[int, str],
        guard: Callable[[str, Callable[[], None]], None],
        name: str = "",
    ) -> None:
        self.name = name
        self.was_called = False
        """Whether it has been seen to step at all since the tap was made."""
        self._optimizer = optimizer
        self._events = events
        self._names = parameter_names
        self._guard = guard
        self._before: dict[str, Tensor] | None = None
        self.begin_step()
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def forget_calls(self) -> None:
        """Forget that the optimiser was called, or expected to be."""
        self.calls = 0
        """Times the optimiser was called in the step in progress."""
        self.is_expected = False
        """Whether the trainer said that the optimiser is to step in it."""

    def begin_step(self) -> None:
        """Forget the last step of the run."""
        self.forget_calls()
        self.rates: list[Tensor | float] = []
        """Of each parameter group, as the first call used them."""
        self._found_inf: Tensor | None = None

    def skipped(self) -> Tensor | float | None:
        """1 where the step in progress made no update, else 0; None where that is not known.

        A scaler's skip shows in the flag it gives to optimisers that skip by themselves, and in
        that it does not call the others, which says something once this one has been called.
        """
        if self._found_inf is not None:
            return (self._found_inf > 0).float()
        if self.calls:
            return 0.0
        return 1.0 if self.is_expected and self.was_called else None

    def remove(self) -> None:
        """Take the hooks out and drop what is held."""
        for handle in self._handles:
            handle.remove()
        self._before = None

    def gradients(self) -> dict[str, Tensor]:
        """Gradients as they are now, by parameter name; those without one are left out."""
        return {n: p.grad for n, p in self._parameters().items() if p.grad is not None}

    def _parameters(self) -> dict[str, Tensor]:
        groups = self._optimizer.param_groups
        trained = [p for group in groups for p in group["params"] if p.requires_grad]
        return {self._names.get(id(p), f"parameter_{i}"): p for i, p in enumerate(trained)}

    # -- hooks -------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if is_compiling():
            # Traced into a compiled step, counting its calls would compile it anew each time.
            return None
        self.calls += 1
        self.was_called = True
        self._before = None
        if self.calls > 1 or not self._events.due:
            return None
        try:
            return self._begin(args, kwargs)
        except Exception as error:
            self._guard("optimizer pre-step hook", partial(_raise, error))
            return None

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        watched = with_closure(args, kwargs, self._read_within)
        is_within = watched is not None
        self._guard("optimizer pre-step hook", self._read_rates if is_within else self._read_before)
        return watched

    def _after_step(self, *_: Any) -> None:
        if self._before is not None:
            self._guard("optimizer post-step hook", self._read_after)

    def _read_within(self) -> None:
        self._guard("optimizer closure", self._read_tensors)

    def _read_before(self) -> None:
        self._read_rates()
        self._read_tensors()

    def _read_rates(self) -> None:
        if "step" in self._events.due:
            self.rates = [_rate(group["lr"]) for group in self._optimizer.param_groups]
            # A gradient scaler leaves these here during the step of an optimiser that scales and
            # skips by itself, as torch's fused ones do.
            found = getattr(self._optimizer, "found_inf", None)
            self._found_inf = found.clone() if isinstance(found, Tensor) else None

    def _read_tensors(self) -> None:
        events = self._events
        if "gradients" in events.due:
            found: Mapping[str, Tensor] = self.gradients()
            scale = getattr(self._optimizer, "grad_scale", None)
            if isinstance(scale, Tensor):
                found = _Unscaled(found, scale.clone())
            if found:
                norm = total_norm(found.values())
                reading = GradientReading(gradients=found, norm=norm, optimizer=self.name)
                events.take("gradients", reading)
        if events.wants_update():
            self._before = {n: p.detach().clone() for n, p in self._parameters().items()}

    def _read_after(self) -> None:
        before, self._before = self._before, None
        after = self._parameters()
        if before and before.keys() <= after.keys():
            moments, corrections = self._second_moments(after)
            reading = UpdateReading(
                before=before,
                after={name: after[name].detach() for name in before},
                optimizer=self.name,
                gradients=self._used_gradients(),
                second_moments=moments,
                bias_corrections=corrections,
            )
            self._events.take("update", reading)

    def _used_gradients(self) -> Mapping[str, Tensor]:
        """What the step left of the gradients, without a loss scale."""
        found = self.gradients()
        scale, flag = (getattr(self._optimizer, name, None) for name in ("grad_scale", "found_inf"))
        if isinstance(scale, Tensor) and isinstance(flag, Tensor):
            # torch's fused steps write the gradients back unscaled, but for those they skip.
            return _Unscaled(found, torch.where(flag > 0, scale, 1.0))
        return found

    def _second_moments(
        self, parameters: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor | float]]:
        """Adam's second moments, where they are plain, and what divides them, by name."""
        moments: dict[str, Tensor] = {}
        corrections: dict[str, Tensor | float] = {}
        names = {id(parameter): name for name, parameter in parameters.items()}
        for group in self._optimizer.param_groups:
            steps: dict[str, Any] = {}
            for parameter in group["params"]:
                name, state = names.get(id(parameter)), self._optimizer.state.get(parameter, {})
                moment = state.get("exp_avg_sq")
                if name is not None and _is_moment_of(moment, parameter):
                    moments[name], steps[name] = moment, state.get("step")
            if "betas" in group:
                corrections |= _bias_corrections(group["betas"][1], steps)
        return moments, corrections


class _Unscaled(Mapping[str, Tensor]):
    """Gradients divided by a number one at a time, when they are looked at."""

    def __init__(self, gradients: Mapping[str, Tensor], scale: Tensor) -> None:
        self._gradients, self._scale = gradients, scale

    def __getitem__(self, name: str) -> Tensor:
        return self._gradients[name].float() / self._scale

    def __iter__(self) -> Iterator[str]:
        return iter(self._gradients)

    def __len__(self) -> int:
        return len(self._gradients)


def _is_moment_of(moment: Any, parameter: Tensor) -> bool:
    """Whether it is a plain tensor of the parameter's shape: not sharded, factored or quantised."""
    return (
        type(moment) is Tensor
        and moment.dtype in _FLOATS
        and moment.shape == parameter.shape
        and not hasattr(parameter, "placements")
    )


def _bias_corrections(beta: Any, steps: Mapping[str, Any]) -> dict[str, Tensor | float]:
    """1 - beta^step by name; steps that live on a device stay there."""
    found: dict[str, Tensor | float] = {}
    on_device: dict[str, Tensor] = {}
    for name, step in steps.items():
        if isinstance(step, Tensor) and not step.is_cpu:
            on_device[name] = step.reshape(())
        elif step is not None:
            found[name] = 1 - beta ** float(step)
    if on_device:
        counts = torch.stack(list(on_device.values()))
        powers = 1 - beta ** counts.to(wide_dtype(counts))
        found.update(zip(on_device, powers.unbind(), strict=True))
    return found


def with_closure(args: tuple[Any, ...], kwargs: dict[str, Any], work: Callable[[], None]) -> Any:
    """Arguments of an optimiser's step whose closure does ``work`` when it first returns.

    Returns:
        Arguments and keywords, as a pre-hook gives them back; None where there is no closure, and
        gradients are there already.
    """
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if not callable(closure):
        return None
    watched = _call_once_after(closure, work)
    if "closure" in kwargs:
        return args, {**kwargs, "closure": watched}
    return (args[0], watched, *args[2:]), kwargs


def _call_once_after(closure: Callable[..., Any], work: Callable[[], None]) -> Callable[..., Any]:
    """``closure``, with ``work`` done when it returns for the first time."""
    done = False

    def watched(*args: Any, **kwargs: Any) -> Any:
        nonlocal done
        result = closure(*args, **kwargs)
        if not done:
            done = True
            work()
        return result

    return watched


def _raise(error: Exception) -> NoReturn:
    raise error


def _rate(rate: Tensor | float) -> Tensor | float:
    """A learning rate as it is now; one that is a tensor stays on its device."""
    return rate.detach().clone() if isinstance(rate, Tensor) else float(rate)
