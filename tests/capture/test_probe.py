"""An update is asked about at the same states before and after, and nothing is disturbed by it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from untouched import tiny

import entropylens as el
from entropylens.capture.asking import obstacle
from entropylens.capture.call import Call
from entropylens.capture.policy import PolicyBatch
from entropylens.capture.probe import SEQUENCES, Batch, UpdateProbe
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
        Batch(call=Call(module=model, kwargs=inputs), grid=source.grid),
        source,
        PolicyBatch(advantage=torch.arange(len(ids)).float()),
        None,
        generator(),
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
    assert reading.token_id is not None
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
    assert float((reading.direction - moved).norm() / moved.norm()) < 4e-3
    assert torch.allclose(reading.after, 2 * logits_of(model, ids, reading).double(), atol=1e-12)


def test_a_finite_difference_stands_in_where_forward_mode_is_not_supported() -> None:
    torch.manual_seed(0)
    model = tiny.llama().double()
    ids = batch()
    before, after = step(model, ids, 1e-2)
    probe = kept(model, ids)
    exact = probe.reading(before, after, 1.0)
    probe = kept(model, ids)
    probe._asking.whole.is_exact = False
    other = probe.reading(before, after, 1.0)
    assert (exact.is_exact, other.is_exact) == (True, False)
    size = float((exact.after - exact.before).norm())
    assert float((exact.direction - other.direction).norm()) < 1e-3 * size
    assert torch.allclose(exact.before, other.before)


class Opaque(torch.autograd.Function):
    """An identity that cannot be differentiated forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0]


class OpaqueNorm(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, hidden: Tensor) -> Tensor:
        return Opaque.apply(self.norm(hidden))  # type: ignore[no-untyped-call]


def test_an_operation_without_a_forward_derivative_is_noticed() -> None:
    torch.manual_seed(0)
    model = tiny.llama()
    ids = batch()
    before, after = step(model, ids, 0.1)
    exact = kept(model, ids).reading(before, after, 1.0)
    norm = model.model.norm
    model.model.norm = OpaqueNorm(norm)
    old, new = (
        {n.replace("model.norm.", "model.norm.norm."): value for n, value in weights.items()}
        for weights in (before, after)
    )
    reading = kept(model, ids).reading(old, new, 1.0)
    assert (exact.is_exact, reading.is_exact) == (True, False)
    size = float(exact.direction.norm())
    assert float((reading.direction - exact.direction).norm()) < 1e-3 * size


def test_running_out_of_memory_is_not_taken_for_a_missing_derivative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    model = tiny.llama()
    ids = batch()
    probe = kept(model, ids)
    monkeypatch.setattr("entropylens.capture.asking.jvp", full)
    with pytest.raises(torch.OutOfMemoryError):
        probe.reading(*step(model, ids, 0.1), 1.0)
    assert probe._asking.whole.is_exact


def test_checkpointing_s_own_hook_does_not_hinder_the_exact_derivative() -> None:
    torch.manual_seed(0)
    model = tiny.llama()
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    ids = batch()
    probe = kept(model, ids)
    reading = probe.reading(*step(model, ids, 0.1), 1.0)
    assert reading.is_exact
    assert bool((reading.after != reading.before).any())


def test_hooks_of_others_are_neither_fired_nor_ignored() -> None:
    model = tiny.llama()
    seen = []
    handle = model.model.norm.register_forward_hook(lambda *_: seen.append(1))
    ids = batch()
    probe = kept(model, ids)
    before, after = step(model, ids, 0.1)
    fired = len(seen)
    with pytest.raises(ValueError, match="expected modules without forward hooks of others"):
        probe.reading(before, after, 1.0)
    assert len(seen) == fired
    handle.remove()
    probe = kept(model, ids)
    assert probe.reading(before, after, 1.0).is_exact


def test_weights_that_are_not_the_model_s_are_refused_and_not_taken_for_no_change() -> None:
    model = tiny.llama()
    ids = batch()
    before, after = step(model, ids, 0.1)
    old, new = (
        {f"parameter_{i}": p for i, p in enumerate(weights.values())} for weights in (before, after)
    )
    probe = kept(model, ids)
    with pytest.raises(ValueError, match="expected the optimiser to hold the model's own param"):
        probe.reading(old, new, 1.0)


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
    call = Call(module=model, kwargs={"input_ids": ids, "attention_mask": mask})
    probe.keep(Batch(call=call, grid=source.grid), source, None, None, generator())
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


def test_only_whole_plain_models_of_moderate_size_are_asked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for model in (tiny.llama(), tiny.lora(tiny.llama()), tiny.Perceptron(), tiny.classifier()):
        assert obstacle(model) is None
    lazy = nn.Sequential(nn.LazyLinear(3))
    assert obstacle(lazy) == "its weights are not there before the first forward"
    packed = tiny.llama()
    packed.lm_head.weight = nn.Parameter(packed.lm_head.weight.to(torch.int8), requires_grad=False)
    assert obstacle(packed) == "its weights are quantised"
    monkeypatch.setattr("entropylens.capture.asking.MOST_BYTES", 1000)
    assert "copies of its weights would take" in (obstacle(tiny.llama()) or "")


def test_long_sequences_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entropylens.capture.probe.TOKENS", 36)
    model = tiny.llama()
    ids = batch(rows=8)
    probe = kept(model, ids)
    reading = probe.reading(*step(model, ids, 0.1), 1.0)
    assert len(reading.sequence.unique()) == 3


def lens_over(folder: Path, model: Any, steps: int, hinder: Any = None) -> el.Run:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    settings: dict[str, Any] = {"preset": "full", "max_overhead": None}
    with el.Lens(model, optimizer, run_dir=folder / "run", **settings) as lens:
        for number in range(steps):
            ids = batch()
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            if hinder is not None and number == 1:
                hinder()
            optimizer.step()
            optimizer.zero_grad()
            lens.step()
    run = el.open_run(folder / "run")
    assert run.status()[0].faults == {}
    return run


def test_any_loop_over_a_causal_model_shows_what_its_updates_do(tmp_path: Path) -> None:
    run = lens_over(tmp_path, tiny.llama(), 3)
    rows = run.metrics("entropy/change/measured").to_arrow().to_pylist()
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["value"] != 0 for row in rows)


def test_a_model_that_cannot_be_asked_any_more_is_let_be_and_an_event_says_so(
    tmp_path: Path,
) -> None:
    model = tiny.llama()
    hook = model.model.norm.register_forward_hook
    run = lens_over(tmp_path, model, 5, lambda: hook(lambda *_: None))
    rows = run.metrics("entropy/change/measured").to_arrow().to_pylist()
    assert [row["step"] for row in rows] == [1]
    events = [e for e in run.events().to_arrow().to_pylist() if e["kind"] == "capture"]
    assert len(events) == 1
    assert "without forward hooks of others" in events[0]["message"]


def test_a_loop_that_shows_its_policy_shows_its_updates_if_it_shows_its_inputs(
    tmp_path: Path,
) -> None:
    """Completions of 5 tokens behind prompts of 7."""
    torch.manual_seed(0)
    model = tiny.llama().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    settings: dict[str, Any] = {"preset": "full", "max_overhead": None}
    ids = batch()
    with el.Lens(model, optimizer, run_dir=tmp_path / "run", **settings) as lens:
        logits = model(input_ids=ids).logits[:, 6:-1]
        logp = logits.log_softmax(-1).gather(2, ids[:, 7:, None])[..., 0]
        advantage = torch.tensor([1.0, -1.0, 0.5, 0.0])
        (-(logp * advantage[:, None]).mean()).backward()
        lens.observe_policy(
            logits=logits, token_ids=ids[:, 7:], advantage=advantage, inputs={"input_ids": ids}
        )
        before = logits.detach()
        optimizer.step()
        lens.step()
    with torch.no_grad():
        after = model(input_ids=ids).logits[:, 6:-1]
    change = torch.distributions.Categorical(logits=after).entropy().mean() - (
        torch.distributions.Categorical(logits=before).entropy().mean()
    )
    run = el.open_run(tmp_path / "run")
    assert run.status()[0].faults == {}
    found = run.metrics("entropy/change/measured").to_arrow()["value"].to_pylist()
    assert found == [pytest.approx(change.item(), rel=1e-2, abs=1e-8)]
    cells = run.metrics("entropy/change/at/*").to_arrow()["value"].to_pylist()
    assert any(cells)


def test_what_stands_in_the_way_is_said_once(tmp_path: Path) -> None:
    def events(folder: Path, optimizers: Any, **inputs: Any) -> list[str]:
        model = tiny.llama()
        with el.Lens(model, optimizers(model), run_dir=folder, preset="full") as lens:
            for _ in range(3):
                ids = batch()
                model(input_ids=ids, labels=ids, **inputs).loss.backward()
                lens.step()
        rows = el.open_run(folder).events().to_arrow().to_pylist()
        told = [row["message"] for row in rows if row["kind"] == "capture"]
        return [message for message in told if message.startswith("no entropy/change")]

    def one(model: Any) -> Any:
        return torch.optim.SGD(model.parameters(), lr=0.1)

    def two(model: Any) -> Any:
        return [
            torch.optim.SGD(model.model.parameters(), lr=0.1),
            torch.optim.SGD(model.lm_head.parameters(), lr=0.1),
        ]

    assert events(tmp_path / "fine", one) == []
    (said,) = events(tmp_path / "two", two)
    assert said.endswith("2 optimisers train it")
    (said,) = events(tmp_path / "odd", one, max_length_q=12)
    assert "cannot be cut out of its inputs (input_ids, labels, max_length_q)" in said


def test_reduced_precision_is_set_aside_and_put_back() -> None:
    model = tiny.llama()
    ids = batch()
    probe = kept(model, ids)
    before, after = step(model, ids, 0.1)
    torch.set_float32_matmul_precision("high")
    try:
        reading = probe.reading(before, after, 1.0)
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    probe = kept(model, ids)
    assert torch.equal(reading.after, probe.reading(before, after, 1.0).after)
