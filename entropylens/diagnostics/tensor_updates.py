"""What did the optimiser do, tensor by tensor and layer by layer?"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby
from typing import Any, Final

import torch
from torch import Tensor

from entropylens.diagnostics._layers import layer_of
from entropylens.diagnostics._tensor_norms import (
    SQUARES,
    joined_norms,
    limit_shares,
    sizes_of,
    staleness,
    tensor_norms,
    update_norms,
    zero_update_shares,
)
from entropylens.registry import Block, Diagnostic, Metric, UpdateReading, diagnostic

__all__ = ["TensorUpdates"]

_PLAIN: Final = (
    "exact, of each trainable tensor that this rank holds whole, the same on all ranks under DDP; "
    "sharded ones (DTensor) are left out, since no rank knows their numbers alone"
)
_GRADIENTS: Final = (
    _PLAIN + "; of the gradient as the step left it, absent where it left none or a sparse one "
    "(nn.Embedding(sparse=True)), and wrong where an optimiser fills its gradients with zeros "
    "within the step"
)
_COST: Final = "a copy of the trainable parameters during the step and about ten reads of them"


def _metric(question: str, formula: str, high: str, low: str, **other: str) -> Metric:
    fixed = {"unit": "1", "estimator": _PLAIN, "cost": _COST, "source": "Definition"}
    return Metric(question=question, formula=formula, high=high, low=low, **{**fixed, **other})


_RULE: Final = "Karpathy's and Cockpit's update-size rule of thumb (1e-3), tensor by tensor"
_LAYER: Final = (
    "; module is the layer: the parameter's name up to its first number, else the module that "
    "holds it, after the optimiser's name where there are several; absent where its tensors are on "
    "several devices"
)
_BOLD: Final = "above about 1e-2: unusually bold, or weights that are still near 0"
_SHY: Final = "below about 1e-5: it hardly learns"
_LOUD: Final = "this part makes most of the global norm, and most of what clipping takes off"
_QUIET: Final = "a vanishing signal, or a part that the loss hardly depends on"
METRICS: Final[Mapping[str, Metric]] = {
    "tensor/update_rms": _metric(
        "How far did this step move an element of this tensor?",
        "sqrt(mean (theta_after - theta_before)^2); module is the parameter",
        "a learning rate that is large for this tensor, or a step at stale second moments",
        "learning rate spent, no gradient, or a skipped step (exactly 0)",
    ),
    "tensor/update_to_weight": _metric(
        "By which share of its own size did this step move the tensor?",
        "sqrt(mean (theta_after - theta_before)^2) / sqrt(mean theta_before^2); absent where all "
        "weights are 0; module is the parameter",
        _BOLD,
        _SHY,
        source=_RULE,
    ),
    "tensor/gradient_norm": _metric(
        "How large is this tensor's gradient?",
        "||g||_2 as the optimiser used it, clipping included; module is the parameter",
        _LOUD,
        _QUIET,
        estimator=_GRADIENTS,
    ),
    "tensor/staleness": _metric(
        "Does Adam's second moment still know how large the gradient is?",
        "RMS_t = sqrt(mean(g^2 / max(v_hat, eps^2))), v_hat = v / (1 - beta_2^t), eps = 1e-8; "
        "module is the parameter",
        "above about 2: the gradient grew faster than v follows, the step is too large, and a "
        "spike of the loss follows within some steps; remedies are a smaller beta_2 or dividing "
        "the learning rate by max(1, RMS_t)",
        "about 1: v knows the gradient's size; well below 1: the gradient has become small",
        estimator=_GRADIENTS + ". v is that after the step, so g is in it: RMS_t is exactly 1 in "
        "the first step and at most sqrt((1 - beta_2^t) / (1 - beta_2)), which is 4.5 for beta_2 = "
        "0.95 and 31.6 for 0.999. Of AMSGrad it is the running v, not its maximum. Absent where v "
        "is not kept, or kept factored, quantised or on another device",
        source="Wortsman et al. (2023), Stable and low-precision training for large-scale "
        "vision-language models, arXiv 2304.13013, Sec. 3 (threshold 2.3)",
    ),
    "tensor/zero_update/share": _metric(
        "How much of the update is lost to rounding?",
        "share of the elements with g != 0 whose stored value the step left as it was; absent "
        "where there is none; module is the parameter",
        "steps below half a unit in the last place: bfloat16 swallows them; keep a float32 copy, "
        "round stochastically or raise the learning rate. 1 where the rate is 0 or the step was "
        "skipped",
        "every element moves",
        estimator=_GRADIENTS + ". What is compared is the parameter as the model stores it: with "
        "float32 masters that are not the model's own (DeepSpeed) nothing is lost by it",
    ),
    "tensor/gradient_at_limit/share": _metric(
        "Does clipping by value flatten this tensor's gradient?",
        "share of elements with |g| = max |g|, where more than one has it, else 0; module is the "
        "parameter",
        "clip_grad_value_ acts on so many elements: the direction of the gradient changes",
        "no clipping by value",
        estimator=_GRADIENTS + ". Tells of clip_grad_value_ only: clip_grad_norm_ scales all "
        "elements alike. In tensors of a few elements, and in bfloat16, some are equal by chance",
    ),
    "layer/gradient_norm": _metric(
        "How large is this layer's gradient?",
        "||g||_2 over the tensors of a layer",
        _LOUD + "; growing towards the first layers: exploding gradients",
        _QUIET + "; shrinking towards the first layers: vanishing gradients",
        estimator=_GRADIENTS + _LAYER,
    ),
    "layer/update_to_weight": _metric(
        "By which share of its own size did this step move the layer?",
        "||theta_after - theta_before||_2 / ||theta_before||_2 over the tensors of a layer; absent "
        "where all weights are 0",
        _BOLD,
        _SHY,
        estimator=_PLAIN + _LAYER,
        source=_RULE,
    ),
}


class _Chosen(Sequence[Tensor]):
    """Values of a mapping at some names, each looked at when it is its turn."""

    def __init__(self, values: Mapping[str, Tensor], names: Sequence[str]) -> None:
        self._values, self._names = values, names

    def __getitem__(self, at: Any) -> Any:
        return self._values[self._names[at]]

    def __len__(self) -> int:
        return len(self._names)


@diagnostic(
    reads="update",
    every={"fast": 0, "balanced": 100, "full": 10},
    floor=1000,
    metrics=METRICS,
)
class TensorUpdates(Diagnostic):
    """Update, gradient and second moment of each tensor, and of each layer."""

    def measure(self, reading: UpdateReading, state: Any) -> tuple[list[Block], Any]:
        """Compare the tensors of one optimiser before and after one step."""
        names = [name for name, old in reading.before.items() if _is_plain(old)]
        places = {layer: at for at, layer in enumerate(dict.fromkeys(map(layer_of, names)))}
        names.sort(key=lambda name: places[layer_of(name)])
        by_device: dict[torch.device, list[str]] = {}
        for name in names:
            by_device.setdefault(reading.before[name].device, []).append(name)
        split = _in_several(by_device.values())
        return [_block(reading, on_one, split) for on_one in by_device.values()], state


def _in_several(groups: Collection[Sequence[str]]) -> frozenset[str]:
    """Layers that have tensors in more than one of the groups of names."""
    seen = Counter(layer for names in groups for layer in {*map(layer_of, names)})
    return frozenset(layer for layer, count in seen.items() if count > 1)


def _block(reading: UpdateReading, names: Sequence[str], split: Collection[str]) -> Block:
    """What is to be said of the tensors of one device; of layers in ``split``, not as layers."""
    rows = _Rows(reading.optimizer, split)
    _of_updates(rows, reading, names)
    having = [name for name in names if _is_dense(reading.gradients.get(name))]
    if having:
        _of_gradients(rows, reading, having)
    return rows.block()


def _is_dense(gradient: Tensor | None) -> bool:
    return gradient is not None and gradient.layout == torch.strided


def _is_plain(tensor: Tensor) -> bool:
    is_whole = not hasattr(tensor, "placements") and tensor.layout == torch.strided
    return is_whole and tensor.is_floating_point() and tensor.numel() > 0


def _is_beside(reading: UpdateReading, name: str) -> bool:
    """Whether the parameter has a second moment, on its own device."""
    moment = reading.second_moments.get(name)
    return moment is not None and moment.device == reading.before[name].device


class _Rows:
    """Columns of a block, as they grow."""

    def __init__(self, optimizer: str, split: Collection[str]) -> None:
        self._optimizer, self._split = optimizer, split
        self._names: list[str] = []
        self._modules: list[str] = []
        self._values: list[Tensor] = []
        self._present: list[Tensor] = []

    def add(
        self, name: str, modules: Sequence[str], values: Tensor, present: Tensor | None = None
    ) -> None:
        """Values of one metric, one for each module; all are present unless it is told."""
        self._names += [name] * len(modules)
        self._modules += modules
        self._values.append(values)
        self._present.append(torch.ones_like(values) if present is None else present.to(values))

    def add_by_layer(
        self, name: str, names: Sequence[str], norms: Tensor, others: Tensor | None = None
    ) -> None:
        """Norms of layers, whose tensors stand together; divided by norms of others."""
        layers, counts = zip(*((k, len(list(g))) for k, g in groupby(names, layer_of)), strict=True)
        kept = [at for at, layer in enumerate(layers) if layer not in self._split]
        if not kept:
            return
        start = f"{self._optimizer}/" if self._optimizer else ""
        modules = [f"{start}{layers[at]}" for at in kept]
        values = _at(joined_norms(norms, counts, SQUARES), kept)
        if others is None:
            self.add(name, modules, values)
        else:
            divisors = _at(joined_norms(others, counts, SQUARES), kept)
            self.add(name, modules, values / divisors, divisors != 0)

    def block(self) -> Block:
        """All of it."""
        values, present = torch.cat(self._values).float(), torch.cat(self._present).float()
        return Block.metrics(self._names, values, weight=present, modules=self._modules)


def _at(values: Tensor, places: Sequence[int]) -> Tensor:
    """Some of them; an index tensor would come from the host, and wait for the stream."""
    return torch.stack([values[at] for at in places]) if len(places) < len(values) else values


def _of_updates(rows: _Rows, reading: UpdateReading, names: Sequence[str]) -> None:
    before = [reading.before[name] for name in names]
    updates = update_norms(before, [reading.after[name] for name in names])
    weights = tensor_norms(before)
    rows.add("tensor/update_rms", names, updates / sizes_of(before).sqrt())
    rows.add("tensor/update_to_weight", names, updates / weights, weights != 0)
    rows.add_by_layer("layer/update_to_weight", names, updates, weights)


def _of_gradients(rows: _Rows, reading: UpdateReading, names: Sequence[str]) -> None:
    gradients = _Chosen(reading.gradients, names)
    before, after = _Chosen(reading.before, names), _Chosen(reading.after, names)
    norms = tensor_norms(gradients)
    rows.add("tensor/gradient_norm", names, norms)
    rows.add_by_layer("layer/gradient_norm", names, norms)
    swallowed = zero_update_shares(before, after, gradients)
    rows.add("tensor/zero_update/share", names, swallowed, swallowed.isfinite())
    limited = limit_shares(gradients)
    rows.add("tensor/gradient_at_limit/share", names, limited, limited.isfinite())
    adaptive = [name for name in names if _is_beside(reading, name)]
    if adaptive:
        moments = _Chosen(reading.second_moments, adaptive)
        corrections = [reading.bias_corrections.get(name, 1.0) for name in adaptive]
        stale = staleness(_Chosen(reading.gradients, adaptive), moments, corrections)
        rows.add("tensor/staleness", adaptive, stale)
