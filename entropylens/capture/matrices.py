"""Which matrices a model's weights are, one at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

__all__ = ["Matrix", "MatrixSet", "matrices_in", "matrices_of"]

_FACTOR: Final = re.compile(r"(?P<place>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.|$)")
_PLAIN: Final = (Tensor, nn.Parameter)
_PRECISE: Final = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A matrix of a model's weights: a parameter, a part of one, or several together."""

    name: str
    """As `entropylens.readings.WeightReading` has it."""
    parameters: tuple[str, ...]
    """Names of what it is made of."""
    shape: tuple[int, int]
    """(out, in)."""
    stored: torch.dtype
    """Precision of what is stored."""
    read: Callable[[], Tensor]
    """Gives ``[out, in]``, detached, as the weights are when it is called."""
    rank: int | None = None
    """Largest rank by construction, where that is less than the shape allows."""


@dataclass(frozen=True)
class MatrixSet:
    """The matrices of a model, and what could be one but cannot be read."""

    matrices: list[Matrix] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    """Why, by parameter name."""

    def add(
        self,
        name: str,
        parameters: tuple[str, ...],
        value: Tensor,
        read: Callable[[], Tensor],
        rank: int | None = None,
    ) -> None:
        """Add a matrix whose values come later, if ``value`` has the shape of one."""
        out, width = value.shape
        if min(out, width) > 1:
            self.matrices.append(
                Matrix(
                    name=name,
                    parameters=parameters,
                    shape=(out, width),
                    stored=value.dtype,
                    read=read,
                    rank=rank,
                )
            )


def matrices_of(model: nn.Module, *, trained: bool = False) -> MatrixSet:
    """Every matrix among a model's parameters, under the names that the model has for them.

    A convolution is flattened to ``[out, in * kernel]``, a stack of experts ``[E, out, in]`` taken
    apart. Of a LoRA adapter (PEFT's) stand the product B A with its scale and its sum with the
    base, not the factors; of one with learnt magnitudes (DoRA) the product alone. Parameters that
    are shared stand once. Vectors are no matrices, nor is what has one row or column.

    Args:
        model: Any module.
        trained: Leave out what is not trained, but for the sums.

    Returns:
        The matrices in the model's order, and those refused: quantised, sharded, complex, or
        without values (on the meta device, not yet initialised).
    """
    found = MatrixSet()
    modules = dict(model.named_modules(remove_duplicate=False))
    adapters = {name: module for name, module in modules.items() if _is_adapter(module)}
    for name, parameter in model.named_parameters():
        if _FACTOR.match(name) or (trained and not parameter.requires_grad):
            continue
        holder = modules[name.rpartition(".")[0]]
        _add(found, name, parameter, is_convolution=isinstance(holder, _ConvNd))
    for name, adapter in adapters.items():
        _add_adapter(found, name, adapter)
    return found


def matrices_in(state: Mapping[str, Tensor], *, scale: float | None = None) -> MatrixSet:
    """Every matrix of a state dict, by the rules of `matrices_of` as far as names tell.

    Three axes are a stack where the name speaks of experts, else a convolution of one dimension.

    Args:
        state: Tensors by name.
        scale: Of LoRA products; None is 1, since a state dict does not hold it.
    """
    found = MatrixSet()
    factors: dict[str, dict[str, str]] = {}
    for name, value in state.items():
        factor = _FACTOR.match(name)
        if factor is None:
            _add(found, name, value, is_convolution="expert" not in name)
        else:
            factors.setdefault(factor["place"], {})[factor["side"]] = name
    for place, sides in factors.items():
        if sides.keys() == {"A", "B"}:
            _add_product(found, place, state, sides["A"], sides["B"], scale or 1.0)
        else:
            name = next(iter(sides.values()))
            found.refused[name] = "its other factor is missing"
    return found


def _obstacle(value: Tensor) -> str | None:
    """Why a tensor cannot be read as it is; None where it can."""
    if isinstance(value, nn.UninitializedParameter):
        return "it has no values before the first forward"
    if hasattr(value, "placements") or hasattr(value, "ds_id"):
        return "it is sharded over ranks"
    if type(value) not in _PLAIN or type(value.data) not in _PLAIN:
        return f"it is quantised or of another kind ({type(value).__name__})"
    if value.is_meta:
        return "it is on the meta device, without values"
    if value.is_complex():
        return "it is complex"
    if value.dtype not in _PRECISE:
        return f"it is quantised ({str(value.dtype).removeprefix('torch.')})"
    return None


def _add(found: MatrixSet, name: str, value: Tensor, *, is_convolution: bool) -> None:
    if name.endswith("_flat_param"):
        found.refused[name] = "it is sharded over ranks"
        return
    if not isinstance(value, nn.UninitializedParameter):
        lengths = [length for length in value.shape if length > 1]
        if len(lengths) < 2:
            return
    reason = _obstacle(value)
    if reason is not None:
        found.refused[name] = reason
        return
    if value.ndim == 3 and not is_convolution and value.shape[0] > 1:
        for at, part in enumerate(value):
            found.add(f"{name}[{at}]", (name,), part, partial(_part, value, at))
        return
    # A batch of one, as in position embeddings, is no axis of the matrix.
    shape = value.shape[1:] if value.shape[0] == 1 and value.ndim > 2 else value.shape
    flat = (shape[0], prod(shape[1:]))
    found.add(name, (name,), value.detach().reshape(flat), partial(_reshaped, value, flat))


def _part(value: Tensor, at: int) -> Tensor:
    return value.detach()[at]


def _reshaped(value: Tensor, shape: tuple[int, int]) -> Tensor:
    return value.detach().reshape(shape)


# -- LoRA -----------------------------------------------------------------------------------------


def _is_adapter(module: nn.Module) -> bool:
    names = ("lora_A", "lora_B", "get_delta_weight", "get_base_layer", "active_adapters")
    return all(hasattr(module, name) for name in names)


def _add_adapter(found: MatrixSet, place: str, module: Any) -> None:
    base = module.get_base_layer().weight
    for adapter in module.active_adapters:
        factors = tuple(_factors(module, place, adapter))
        if not factors:
            continue
        names = tuple(name for name, _ in factors)
        reasons = [reason for _, value in factors if (reason := _obstacle(value)) is not None]
        if reasons:
            found.refused[f"{place}.lora"] = reasons[0]
            continue
        suffix = "" if adapter == "default" else f".{adapter}"
        rank, first = int(module.r[adapter]), factors[0][1]
        lengths = (base.shape[0], prod(base.shape[1:]))
        shape = lengths if base.ndim > 1 and _obstacle(base) is None else _outer(factors)
        like = torch.empty(shape, dtype=first.dtype, device="meta")
        product = partial(_product, module, adapter)
        found.add(f"{place}.lora{suffix}", names, like, product, rank)
        if getattr(module, "use_dora", {}).get(adapter):
            continue
        reason = _obstacle(base)
        if reason is not None:
            found.refused[f"{place}+lora{suffix}"] = f"of its base: {reason}"
            continue
        total = partial(_sum, module, adapter)
        like = torch.empty(shape, dtype=base.dtype, device="meta")
        found.add(f"{place}+lora{suffix}", (f"{place}.base_layer.weight", *names), like, total)


def _factors(module: Any, place: str, adapter: str) -> Iterator[tuple[str, Tensor]]:
    for kind in ("lora_A", "lora_B"):
        if adapter in getattr(module, kind):
            yield f"{place}.{kind}.{adapter}.weight", getattr(module, kind)[adapter].weight
    for kind in ("lora_embedding_A", "lora_embedding_B"):
        if adapter in getattr(module, kind, {}):
            yield f"{place}.{kind}.{adapter}", getattr(module, kind)[adapter]


def _outer(factors: tuple[tuple[str, Tensor], ...]) -> tuple[int, int]:
    (_, first), (_, second) = factors
    return second.shape[0], prod(first.shape[1:])


def _product(module: Any, adapter: str) -> Tensor:
    delta = module.get_delta_weight(adapter).detach()
    return delta.reshape(delta.shape[0], -1)


def _sum(module: Any, adapter: str) -> Tensor:
    base = module.get_base_layer().weight.detach()
    if adapter in module.merged_adapters:
        return base.reshape(base.shape[0], -1)
    return base.reshape(base.shape[0], -1).float() + _product(module, adapter).float()


def _add_product(
    found: MatrixSet, place: str, state: Mapping[str, Tensor], inner: str, outer: str, scale: float
) -> None:
    first, second = state[inner], state[outer]
    for name, value in ((inner, first), (outer, second)):
        if (reason := _obstacle(value)) is not None:
            found.refused[name] = reason
            return
    shape = (second.shape[0], prod(first.shape[1:]))
    like = torch.empty(shape, dtype=first.dtype, device="meta")
    read = partial(_multiplied, state, inner, outer, scale)
    found.add(f"{place}.lora", (inner, outer), like, read, first.shape[0])


def _multiplied(state: Mapping[str, Tensor], inner: str, outer: str, scale: float) -> Tensor:
    first, second = state[inner].float(), state[outer].float()
    return scale * second.reshape(second.shape[0], -1) @ first.reshape(first.shape[0], -1)
