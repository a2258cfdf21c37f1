"""What attention layers attend to, seen where their kernels are called."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from entropylens.diagnostics._attention import rows_of_logits, rows_of_query_key
from entropylens.registry import AttentionRows

__all__ = ["AttentionTap", "Queries", "joined", "moved"]

QUERIES: Final = 32
"""Of each sequence."""
_EXAMPLES: Final = 64
_QUERIES_OF_EXAMPLE: Final = 4
"""Of an entry that is no sequence of tokens: patches of an image."""
_FUSED: Final = "aten::_scaled_dot_product_"
_SOFTMAX: Final = frozenset(("aten::_softmax", "aten::_safe_softmax"))


@dataclass(frozen=True)
class Queries:
    """Positions whose attention is looked at, of each of the first rows of a batch."""

    columns: Tensor
    """``[B, Q]``"""
    present: Tensor
    """``[B, Q]`` bool."""
    positions: int
    """Of each sequence: an attention over another number of them has queries of its own."""

    @classmethod
    def of_tokens(cls, present: Tensor, generator: torch.Generator) -> Queries:
        """A uniform sample of each sequence's positions.

        Args:
            present: ``[B, T]`` bool: which of them count.
            generator: Of our own.
        """
        key = torch.rand(present.shape, generator=generator, device=present.device)
        many = min(QUERIES, present.shape[1])
        columns = torch.where(present, key, key + 1.0).topk(many, largest=False).indices
        return cls(columns, present.gather(1, columns), present.shape[1])

    @classmethod
    def of_examples(cls, rows: int, positions: int, device: torch.device) -> Queries:
        """A few positions of some entries, others of each."""
        row = torch.arange(min(rows, _EXAMPLES), device=device)
        many = min(_QUERIES_OF_EXAMPLE, positions)
        step = torch.arange(many, device=device) * (positions // many)
        columns = (step + row[:, None]) % positions
        return cls(columns, torch.ones_like(columns, dtype=torch.bool), positions)


class AttentionTap(TorchDispatchMode):
    """Sees attention within a forward without gradients, kernel by kernel, at a few queries.

    Fused kernels (`torch.nn.functional.scaled_dot_product_attention`, whatever carries it out)
    never make the map: of the chosen queries alone the logits are computed from q and k. Elsewhere
    the softmax's own input is read: a map ``[B, H, T, S]``, or ``[B H, T, S]`` of a module that is
    named as attention is. Kernels of other libraries are not seen.

    Args:
        module: Tells the name of the module that runs.
        rows: Of the batch.
        queries: None takes a few positions of some rows.
    """

    def __init__(
        self, module: Callable[[], str], rows: int, queries: Queries | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: dict[str, AttentionRows] = {}
        """By module; of several attentions of one, the first."""
        self._module, self._rows, self._queries = module, rows, queries

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Carry the operation out, and look at it if it is an attention's."""
        given, operation = kwargs or {}, func._schema.name
        if operation.startswith(_FUSED):
            self._take_fused(_by_name(func, args, given))
        elif operation in _SOFTMAX:
            self._take_softmax(args[0], args[1])
        return func(*args, **given)

    def _take_fused(self, given: Mapping[str, Any]) -> None:
        query, key = given["query"], given["key"]
        queries = self._wanted(query)
        if queries is None:
            return
        bias = given.get("attn_mask")
        bias = given.get("attn_bias") if bias is None else bias
        scale = given.get("scale")
        parts = []
        for row, columns in enumerate(queries.columns):
            keys = key[row]
            if keys.shape[0] != query.shape[1]:
                keys = keys.repeat_interleave(query.shape[1] // keys.shape[0], 0)
            seen = None
            if given.get("is_causal"):
                # As torch aligns them: query i attends to keys up to i.
                seen = torch.arange(keys.shape[1], device=keys.device) <= columns[:, None]
            part = rows_of_query_key(
                query[row].movedim(0, 1)[columns],
                keys,
                scale=query.shape[-1] ** -0.5 if scale is None else scale,
                bias=None if bias is None else _bias(bias, row, columns, query.shape),
                visible=seen,
            )
            parts.append(part)
        self._keep(joined(parts), queries)

    def _take_softmax(self, logits: Tensor, axis: int) -> None:
        if axis not in (-1, logits.ndim - 1):
            return
        is_attention = "att" in self._module().lower()
        if logits.ndim == 3 and is_attention and logits.shape[0] % self._rows == 0:
            logits = logits.view(self._rows, -1, *logits.shape[1:])
        queries = self._wanted(logits)
        if queries is not None:
            row = torch.arange(queries.columns.shape[0], device=logits.device)[:, None]
            chosen = logits.movedim(1, 2)[row, queries.columns]
            self._keep(rows_of_logits(chosen.flatten(0, 1)), queries)

    def _wanted(self, queried: Tensor) -> Queries | None:
        """Positions to look at in ``[B, H, T, ...]``; None where there are none."""
        if queried.ndim != 4 or self._module() in self.found:
            return None
        rows, _, positions, _ = queried.shape
        if rows != self._rows or positions < 2:
            return None
        wanted, device = self._queries, queried.device
        if wanted is None or wanted.positions != positions:
            return Queries.of_examples(rows, positions, device)
        if wanted.columns.device != device:
            # A model that is spread over several devices.
            return Queries(wanted.columns.to(device), wanted.present.to(device), positions)
        return wanted

    def _keep(self, found: AttentionRows, queries: Queries) -> None:
        reach = torch.where(queries.present.flatten(), found.reach, 0)
        self.found[self._module()] = replace(found, reach=reach)


def joined(parts: Sequence[AttentionRows]) -> AttentionRows:
    """The rows of several, one after the other."""
    columns = {
        one.name: torch.cat([getattr(part, one.name) for part in parts])
        for one in fields(AttentionRows)
    }
    return AttentionRows(**columns)


def moved(rows: AttentionRows, device: torch.device) -> AttentionRows:
    """The same on another device."""
    return AttentionRows(**{f.name: getattr(rows, f.name).to(device) for f in fields(rows)})


def _by_name(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    names = [argument.name for argument in func._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _bias(bias: Tensor, row: int, columns: Tensor, shape: torch.Size) -> Tensor:
    """``[Q, H or 1, S]`` of a mask that is added to logits of ``shape[:3]`` queries."""
    rows, heads, positions, _ = shape
    while bias.ndim < 4:
        bias = bias[None]
    # A head of a mask is often all heads', and then takes no memory of its own.
    per_head = 1 if bias.stride(1) == 0 or bias.shape[1] == 1 else heads
    whole = bias[:, :per_head].expand(rows, per_head, positions, bias.shape[-1])
    found = whole[row].movedim(0, 1)[columns]
    if found.dtype == torch.bool:
        return torch.zeros(found.shape, device=found.device).masked_fill(~found, -torch.inf)
    return found
