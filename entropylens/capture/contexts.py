"""Settings of torch under which a model can be asked, put back afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Harmless", "full_precision", "no_compiled_code", "no_fused_layers", "own_forwards"]


@contextmanager
def full_precision() -> Iterator[None]:
    """No products of less precision than their factors (TF32, bfloat16)."""
    backends: Any = (torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None))
    settings = [(one, one.fp32_precision) for one in backends if hasattr(one, "fp32_precision")]
    if not settings:
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(precision)
        return
    lower = [(one, precision) for one, precision in settings if precision not in ("none", "ieee")]
    try:
        for one, _ in lower:
            one.fp32_precision = "ieee"
        yield
    finally:
        for one, precision in lower:
            one.fp32_precision = precision


@contextmanager
def no_fused_layers() -> Iterator[None]:
    """In evaluation `torch.nn`'s transformer layers are one operation without a derivative."""
    is_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_enabled)


@contextmanager
def no_compiled_code() -> Iterator[None]:
    """Compiled modules run as they were written: nothing is compiled anew for us."""
    set_stance: Any = getattr(torch.compiler, "set_stance", None)
    if set_stance is None or "torch._dynamo" not in sys.modules:
        yield
        return
    with set_stance("force_eager"):
        yield


@contextmanager
def own_forwards(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Forwards without the autocast that accelerate wraps around them."""
    wrapped = [(m, m.__dict__["forward"]) for m in modules if "_original_forward" in m.__dict__]
    try:
        for module, _ in wrapped:
            module.forward = module.__dict__["_original_forward"]
        yield
    finally:
        for module, forward in wrapped:
            module.forward = forward


class Harmless(TorchDispatchMode):
    """Refuses what a forward of ours must not do, before it is done.

    Ranks look at different times: one that communicates within its forward would wait for the
    others, or mix with what they send. And some models write to their weights in forward.

    Args:
        model: Whose weights are not to be written to.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._weights = {parameter.data_ptr() for parameter in model.parameters()} - {0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Carry an operation out, if it may be.

        Raises:
            RuntimeError: It may not.
        """
        if func.namespace in ("c10d", "_c10d_functional", "c10d_functional"):
            raise RuntimeError("its forward communicates with other ranks")
        if func._schema.is_mutable and self._writes_weights(func, args, kwargs or {}):
            raise RuntimeError("its forward writes to its weights")
        return func(*args, **(kwargs or {}))

    def _writes_weights(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> bool:
        for at, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[at] if at < len(args) else kwargs.get(argument.name)
            written = value if isinstance(value, list | tuple) else [value]
            if any(isinstance(v, Tensor) and v.data_ptr() in self._weights for v in written):
                return True
        return False
