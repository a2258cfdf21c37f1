"""An update is asked about at the same states before and after, and nothing is disturbed by it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from untouched import tiny

from entropylens.capture.policy import PolicyBatch
from entropylens.capture.probe import SEQUENCES, UpdateProbe
from entropylens.capture.tokens import LogitTokens
from entropylens.registry import ProbeReading

pytestmark = pytest.mark.filterwarnings("ignore")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def batch(rows: int = 4, width: int = 12) -> Tensor:
    return torch.randint(2, len(tiny.VOCABULARY), (rows, width), generator=generator())


def kept(model: nn.Module, ids: Tensor, **more: Any) -> UpdateProbe:
    probe = UpdateProbe(model)
    source = LogitTokens.of(torch.zeros(*ids[:, 1:].shape, len(tiny.VOCABULARY)), ids[:, 1:])
    inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids), **more}
    probe.keep(
        inputs, source, PolicyBatch(advantage=torch.arange(len(ids)).float()), None, generator()
    )
    return probe


def step(model: Any, ids: Tensor, rate: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in trained.items()}
    model.zero_grad()
    logits = model(input_ids=ids).logits[:, :-1]
    cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()).backward()
    with torch.no_grad():
        for parameter in trained.values():
            parameter -= rate * parameter.grad
    return before, {n: p.detach() for n, p in trained.items()}


def logits_of(model: Any, ids: Tensor, reading: ProbeReading) -> Tensor:
    model.eval()
    with torch.no_grad():
        found = model(input_ids=ids).logits
    # In a batch without padding the index among scored tokens is the column.
    return found[reading.sequence, reading.position]


@pytest.mark.parametrize("lora", [False, True], ids=["all parameters", "lora"])
def test_it_sees_the_model_as_it_was_and_as_it_is(lora: bool) -> None:
    torch.manual_seed(0)
    model: Any = tiny.lora(tiny.llama()) if lora else tiny.llama()
    ids = batch()
    probe = kept(model, ids)
    before, after = step(model, ids, 0.1)
    reading = probe.reading(before, after, 1.0)
    assert reading.is_exact
    assert torch.allclose(reading.after, logits_of(model, ids, reading), atol=1e-6)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.copy_(before[name])
    assert torch.allclose(reading.before, logits_of(model, ids, reading), atol=1e-6)
    assert reading.advantage is not None
    assert torch.equal(reading.advantage, reading.sequence.float())
    assert torch.equal(reading.token_id, ids[reading.sequence, reading.position + 1])


def test_the_direction_is_what_small_updates_do_at_the_temperature_of_the_loss() -> None:
    torch.manual_seed(0)
    model = tiny.llama().double()
    ids = batch()
    probe = kept(model, ids)
    before, after = step(model, ids, 1e-3)
    reading = probe.reading(before, after, 0.5)
    moved = reading.after - reading.before
    # Llama's norms and rotations are in float32 whatever the weights are.
    assert float((reading.direction - moved).norm() / moved.norm()) < 2e-3
    assert torch.allclose(reading.after, 2 * logits_of(model, ids, reading).double(), atol=1e-12)


def test_a_finite_difference_stands_in_where_forward_mode_is_not_supported() -> None:
    torch.manual_seed(0)
    model = tiny.llama().double()
    ids = batch()
    before, after = step(model, ids, 1e-2)
    probe = kept(model, ids)
    exact = probe.reading(before, after, 1.0)
    probe = kept(model, ids)
    probe._has_forward_mode = False
    other = probe.reading(before, after, 1.0)
    assert (exact.is_exact, other.is_exact) == (True, False)
    size = float((exact.after - exact.before).norm())
    assert float((exact.direction - other.direction).norm()) < 1e-3 * size
    assert torch.allclose(exact.before, other.before)


def test_an_operation_without_a_forward_derivative_is_noticed() -> None:
    class Opaque(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            return gradients[0]

    torch.manual_seed(0)
    model = tiny.llama()
    model.model.norm.register_forward_hook(lambda module, args, out: Opaque.apply(out))  # type: ignore[no-untyped-call]
    ids = batch()
    probe = kept(model, ids)
    reading = probe.reading(*step(model, ids, 0.1), 1.0)
    assert not reading.is_exact
    moved = reading.after - reading.before
    assert float((reading.direction - moved).norm() / moved.norm()) < 0.2


def test_neither_modes_nor_random_numbers_nor_weights_change() -> None:
    torch.manual_seed(0)
    model = tiny.llama().train()
    model.model.layers[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    ids = batch()
    probe = kept(model, ids)
    before, after = step(model, ids, 0.1)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    identities = {n: id(p) for n, p in model.named_parameters()}
    state = torch.get_rng_state()
    probe.reading(before, after, 1.0)
    assert torch.equal(state, torch.get_rng_state())
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert identities == {n: id(p) for n, p in model.named_parameters()}
    assert all(torch.equal(weights[n], p) for n, p in model.named_parameters())


def test_padding_on_the_left_is_no_state() -> None:
    torch.manual_seed(0)
    model = tiny.llama()
    ids = batch()
    targets = ids[:, 1:].clone()
    targets[:, :6] = -100
    probe = UpdateProbe(model)
    source = LogitTokens.of(torch.zeros(*targets.shape, len(tiny.VOCABULARY)), targets)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    probe.keep({"input_ids": ids, "attention_mask": mask}, source, None, None, generator())
    before, after = step(model, ids, 0.1)
    reading = probe.reading(before, after, 1.0)
    weighted = reading.weight > 0
    assert int(weighted.sum()) == 4 * 5
    model.eval()
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask).logits
    expected = found[reading.sequence, reading.position + 6]
    assert torch.allclose(reading.after[weighted], expected[weighted], atol=1e-6)


def test_a_few_sequences_stand_for_all() -> None:
    model = tiny.llama()
    ids = batch(rows=40, width=30)
    probe = kept(model, ids)
    before, after = step(model, ids, 0.1)
    reading = probe.reading(before, after, 1.0)
    assert len(reading.sequence.unique()) == SEQUENCES
    assert reading.before.shape[0] == 256
    assert float(reading.weight.sum()) == pytest.approx(SEQUENCES * 29)


def test_half_precision_weights_are_asked_in_single_precision() -> None:
    torch.manual_seed(0)
    model = tiny.llama().bfloat16()
    ids = batch()
    probe = kept(model, ids)
    before, after = step(model, ids, 0.5)
    reading = probe.reading(before, after, 1.0)
    assert reading.before.dtype == reading.direction.dtype == torch.float32
    expected = logits_of(model.float(), ids, reading)
    assert torch.allclose(reading.after, expected, atol=1e-5)


def test_inputs_that_cannot_be_cut_are_not_kept() -> None:
    probe = kept(tiny.llama(), batch(), pixel_values=torch.zeros(7, 3))
    assert probe.is_empty


def test_only_whole_causal_language_models_are_asked() -> None:
    assert UpdateProbe.suits(tiny.llama())
    assert UpdateProbe.suits(tiny.lora(tiny.llama()))
    assert not UpdateProbe.suits(tiny.Perceptron())
    assert not UpdateProbe.suits(tiny.classifier())
