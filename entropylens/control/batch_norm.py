"""Running statistics of batch norm, kept from before a batch that may be a bad one."""

from math import nan
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["RunningStatistics"]

_STATISTICS: Final = ("running_mean", "running_var", "num_batches_tracked")


class RunningStatistics:
    """Those of a model's batch-norm layers as they were before the forwards of a step.

    Args:
        model: Any; most have none.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._kept: dict[str, list[Tensor]] = {}

    def moved(self) -> Tensor | float:
        """``[]``: by which share of itself a layer's running variance has moved since `keep`.

        The largest over layers; NaN where there is none, or nothing was kept.
        """
        kept = self._kept.get("running_var")
        if not kept:
            return nan
        changes = torch._foreach_sub(self._buffers("running_var"), kept)
        moved, size = (torch.stack(torch._foreach_norm([*some], 2)) for some in (changes, kept))
        return (moved / size).amax()

    def keep(self) -> None:
        """Keep them as they are."""
        for name in _STATISTICS if self._layers else ():
            buffers = self._buffers(name)
            if name not in self._kept:
                self._kept[name] = [buffer.clone() for buffer in buffers]
            elif buffers:
                torch._foreach_copy_(self._kept[name], buffers)

    def put_back(self) -> None:
        """Make them what was kept."""
        for name, kept in self._kept.items():
            if kept:
                torch._foreach_copy_(self._buffers(name), kept)

    def forget(self) -> None:
        """Free what was kept."""
        self._kept = {}

    def _buffers(self, name: str) -> list[Tensor]:
        # Looked up each time: a model that is moved has others.
        found = [getattr(layer, name) for layer in self._layers]
        return [buffer for buffer in found if buffer is not None]
