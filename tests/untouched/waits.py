"""Who waits for the device? Notes every operation that would, and whose line of code it is."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import entropylens
import entropylens_callbacks

__all__ = ["Waits", "watched_for_waits"]

OURS = [Path(package.__file__ or "").parent for package in (entropylens, entropylens_callbacks)]
TRAINERS = ("transformers", "trl", "accelerate", "lightning", "peft")
ALLOWED = {
    # After an event that has passed; on a CPU nothing has to pass.
    ("transfer.py", "land"),
    # Identifiers that the loop has on the host; others are refused.
    ("micro_batches.py", "identifiers"),
    # A checkpoint is written: its time is no step's time.
    ("lens.py", "state_dict"),
    # Steps that torch's optimisers count on the host; what they count on a device stays there.
    ("optimizer.py", "_bias_corrections"),
}
PASSED_ON = {("attention.py", "__torch_dispatch__"), ("contexts.py", "__torch_dispatch__")}
"""Carry out what the model asks for."""
ON_HOST = ("session.py", "decompose")
"""Works on copies that have been brought to the host, in another thread where they had to be."""
_METHODS = ("cpu", "to", "numpy", "tolist", "item", "__array__", "__bool__", "__float__", "__int__")


class Waits(TorchDispatchMode):
    """While it is active, `found` gathers what waits and who asked for it.

    On an accelerator a wait is whatever gives its value or a shape that depends on values to the
    host: seen here by the operations' own tags, by boolean indices, and by the methods that read
    memory without an operation. A line belongs to the innermost frame outside of torch.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []
        self.theirs = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        tags = set(func.tags)
        indices = args[1] if len(args) > 1 and "index" in func.name() else ()
        is_index = func.name() in ("aten::index.Tensor", "aten::index_put", "aten::index_put_")
        by_mask = is_index and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in indices
        )
        depends = torch.Tag.data_dependent_output in tags
        depends |= torch.Tag.dynamic_output_shape in tags and not is_index
        if depends or by_mask:
            self.note(func.name())
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        """Attribute an operation to the line that asked for it."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            path, function = Path(frame.f_code.co_filename), frame.f_code.co_name
            if (path.name, function) in PASSED_ON:
                frame = frame.f_back
                continue
            if any(folder in path.parents for folder in OURS):
                if (path.name, function) not in ALLOWED and not _is_on_host(frame):
                    self.found.append(f"{what} at {path.name}:{frame.f_lineno} {function}")
                return
            is_library = "site-packages" in path.parts or path == Path(__file__)
            if not is_library or any(name in path.parts for name in TRAINERS):
                break
            frame = frame.f_back
        self.theirs += 1


def _is_on_host(frame: Any) -> bool:
    while frame is not None:
        if (Path(frame.f_code.co_filename).name, frame.f_code.co_name) == ON_HOST:
            return True
        frame = frame.f_back
    return False


def _noting(mode: Waits, name: str) -> Callable[..., Any]:
    original = getattr(Tensor, name)

    def noted(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        values = [*args, *kwargs.values()]
        moves = name != "to" or any(isinstance(v, str | torch.device) for v in values)
        if moves:
            mode.note(name)
        return original(self, *args, **kwargs)

    return noted


@contextmanager
def watched_for_waits() -> Iterator[Waits]:
    """Note every wait within the block."""
    mode = Waits()
    own = {name: Tensor.__dict__.get(name) for name in _METHODS}
    for name in _METHODS:
        setattr(Tensor, name, _noting(mode, name))
    try:
        with mode:
            yield mode
    finally:
        for name, method in own.items():
            if method is None:
                delattr(Tensor, name)
            else:
                setattr(Tensor, name, method)
