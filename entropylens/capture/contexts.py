"""Settings of torch under which a model can be asked, put back afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["full_precision", "no_compiled_code", "no_fused_layers", "own_forwards"]


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
