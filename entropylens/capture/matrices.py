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

from entropylens.capture.head import unwrapped

__all__ = ["Matrix", "MatrixSet", "matrices_in", "matrices_of"]

_FACTOR: Final = re.compile(r"(?P<place>.+)\.lora_(?P<embedding>embedding_)?(?P<side>[AB])(\.|$)")
_FACTORS: Final = ("lora_A", "lora_B", "lora_E", "lora_embedding_A", "lora_embedding_B")
"""Dicts by adapter, of modules with a weight or of parameters (AdaLoRA's, embeddings')."""
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

    Names are those within what parallel training and `torch.compile` wrap around the model, as the
    layers of representations have them: without a leading ``module.`` or ``_orig_mod.``.

    A convolution is flattened to ``[out, in * kernel]``, a stack of experts ``[E, out, in]`` taken
    apart. Of a LoRA adapter (PEFT's) stand the product B A with its scale and its sum with the
    base, not the factors; of one with learnt magnitudes (DoRA) the product alone. Factors that are
    not PEFT's are matrices like any other. Parameters that are shared stand once. Vectors are no
    matrices, nor is what has one row or column.

    Args:
        model: Any module.
        trained: Leave out what is not trained: of an adapter if none of its factors is. The sum
            of a trained product with a base that is not stays.

    Returns:
        The matrices in the model's order, and those refused: quantised, sharded, complex, without
        values (on the meta device, not yet initialised), or adapters of what is no weight of a
        module. A matrix is read from the module that holds it, even if its parameter was replaced.
    """
    model, found = unwrapped(model), MatrixSet()
    modules = dict(model.named_modules())
    adapters = {name: module for name, module in modules.items() if _is_adapter(module)}
    covered = {name for place, one in adapters.items() for name in _names(one, place)}
    for name, parameter in model.named_parameters():
        if name in covered or (trained and not parameter.requires_grad):
            continue
        place, _, attribute = name.rpartition(".")
        _add_parameter(found, name, modules[place], attribute)
    for place, adapter in adapters.items():
        _add_adapter(found, place, adapter, trained=trained)
    return found


def matrices_in(state: Mapping[str, Tensor], *, scale: float | None = None) -> MatrixSet:
    """Every matrix of a state dict, by the rules of `matrices_of` as far as names tell.

    Three axes are a stack where the name speaks of experts, else a convolution of one dimension.
    That one is transposed cannot be known: it is flattened as it lies, to
    ``[in, out / groups * kernel]``.

    Args:
        state: Tensors by name.
        scale: Of LoRA products; None is 1, since a state dict does not hold it.
    """
    found = MatrixSet()
    factors: dict[str, dict[str, str]] = {}
    for name, value in state.items():
        factor = _FACTOR.match(name)
        if factor is None:
            get = partial(state.__getitem__, name)
            _add(found, name, value, get, is_convolution="expert" not in name)
        else:
            factors.setdefault(factor["place"], {})[factor["side"]] = name
    scale = 1.0 if scale is None else scale
    for place, sides in factors.items():
        if any(name.startswith(f"{place}.lora_E") for name in state):
            found.refused[f"{place}.lora"] = "it is AdaLoRA's, with a factor more than A and B"
        elif sides.keys() == {"A", "B"}:
            _add_product(found, place, state, sides["A"], sides["B"], scale)
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


def _add_parameter(found: MatrixSet, name: str, holder: nn.Module, attribute: str) -> None:
    get = partial(getattr, holder, attribute)
    value = get()
    if _is_packed(value) and hasattr(holder, "weight"):
        found.refused[name] = _obstacle(value) or "it is quantised"
    elif isinstance(holder, _ConvNd) and holder.transposed and attribute == "weight":
        _add_transposed(found, name, value, partial(_turned, get, holder.groups))
    else:
        _add(found, name, value, get, is_convolution=isinstance(holder, _ConvNd))


def _is_packed(value: Tensor) -> bool:
    """Whether a parameter holds codes, whose shape need not be that of the weight."""
    if isinstance(value, nn.UninitializedParameter):
        return False
    return not (value.is_floating_point() or value.is_complex()) and value.numel() > 1


def _add(
    found: MatrixSet,
    name: str,
    value: Tensor,
    get: Callable[[], Tensor],
    *,
    is_convolution: bool,
) -> None:
    """Add what is stored as ``value``, and given by ``get`` when it is asked for."""
    if not _is_readable(found, name, value):
        return
    if value.ndim == 3 and not is_convolution and value.shape[0] > 1:
        for at, part in enumerate(value):
            found.add(f"{name}[{at}]", (name,), part, partial(_part, get, at))
        return
    # A batch of one, as in position embeddings, is no axis of the matrix.
    shape = value.shape[1:] if value.shape[0] == 1 and value.ndim > 2 else value.shape
    flat = (shape[0], prod(shape[1:]))
    found.add(name, (name,), value.detach().reshape(flat), partial(_reshaped, get, flat))


def _add_transposed(found: MatrixSet, name: str, value: Tensor, get: Callable[[], Tensor]) -> None:
    if _is_readable(found, name, value):
        turned = get().detach()
        flat = (turned.shape[0], prod(turned.shape[1:]))
        found.add(name, (name,), turned.reshape(flat), partial(_reshaped, get, flat))


def _is_readable(found: MatrixSet, name: str, value: Tensor) -> bool:
    """Whether it can be a matrix and be read; what can only be the one is refused."""
    if name.endswith("_flat_param"):
        found.refused[name] = "it is sharded over ranks"
        return False
    is_lazy = isinstance(value, nn.UninitializedParameter)
    if not is_lazy and sum(length > 1 for length in value.shape) < 2:
        return False
    reason = _obstacle(value)
    if reason is not None:
        found.refused[name] = reason
    return reason is None


def _part(get: Callable[[], Tensor], at: int) -> Tensor:
    return get().detach()[at]


def _reshaped(get: Callable[[], Tensor], shape: tuple[int, int]) -> Tensor:
    return get().detach().reshape(shape)


def _turned(get: Callable[[], Tensor], groups: int) -> Tensor:
    """``[out, in / groups, *kernel]`` of a transposed convolution's ``[in, out / groups, ...]``."""
    return get().unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


# -- LoRA -----------------------------------------------------------------------------------------


def _is_adapter(module: nn.Module) -> bool:
    names = ("lora_A", "lora_B", "get_base_layer", "active_adapters")
    return all(hasattr(module, name) for name in names)


def _names(module: nn.Module, place: str) -> Iterator[str]:
    """Parameters that are an adapter's own, not its base's."""
    for name, _ in module.named_parameters(prefix=place):
        if name.removeprefix(place).lstrip(".").startswith("lora_"):
            yield name


def _add_adapter(found: MatrixSet, place: str, module: Any, *, trained: bool) -> None:
    for adapter in module.active_adapters:
        factors = dict(_factors(module, place, adapter))
        if not factors or (trained and not any(one.requires_grad for one in factors.values())):
            continue
        suffix = "" if adapter == "default" else f".{adapter}"
        like = _like(module, adapter, factors)
        if isinstance(like, str):
            found.refused[f"{place}.lora{suffix}"] = like
            continue
        names, rank = tuple(factors), len(next(iter(factors.values())))
        product = partial(_product, module, adapter)
        found.add(f"{place}.lora{suffix}", names, like, product, rank)
        if not getattr(module, "use_dora", {}).get(adapter):
            _add_sum(found, place, module, adapter, suffix, (names, like))


def _add_sum(
    found: MatrixSet,
    place: str,
    module: Any,
    adapter: str,
    suffix: str,
    product: tuple[tuple[str, ...], Tensor],
) -> None:
    name, base, (names, like) = f"{place}+lora{suffix}", module.get_base_layer().weight, product
    reason = _obstacle(base)
    if reason is not None:
        found.refused[name] = f"of its base: {reason}"
        return
    total = partial(_sum, module, adapter)
    found.add(name, (f"{place}.base_layer.weight", *names), like.to(base.dtype), total)


def _factors(module: Any, place: str, adapter: str) -> Iterator[tuple[str, Tensor]]:
    for kind in _FACTORS:
        held = getattr(module, kind, {})
        if adapter in held:
            value = held[adapter]
            factor = getattr(value, "weight", value)
            yield f"{place}.{kind}.{adapter}" + ("" if factor is value else ".weight"), factor


def _like(module: Any, adapter: str, factors: Mapping[str, Tensor]) -> Tensor | str:
    """Shape and precision of an adapter's product, or why it has none that can be read.

    The product is taken once: cheaper than one forward, since a batch has more tokens than the
    product has ranks.
    """
    for factor in factors.values():
        if (reason := _obstacle(factor)) is not None:
            return reason
    if not isinstance(getattr(module.get_base_layer(), "weight", None), Tensor):
        return "it adapts a module that has no weight of that name"
    if (adapted := getattr(module, "parameter_name", "weight")) != "weight":
        return f"it adapts {adapted}, not the weight"
    try:
        shape = _product(module, adapter).shape
    except Exception as error:
        return f"its product cannot be taken ({type(error).__name__})"
    dtype = next(iter(factors.values())).dtype
    return torch.empty(shape, dtype=dtype, device="meta")


def _product(module: Any, adapter: str) -> Tensor:
    with torch.no_grad():
        delta = module.get_delta_weight(adapter)
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
