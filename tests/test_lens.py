import subprocess
import sys
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
import torch
from torch import Tensor, nn

import entropylens as el
from entropylens.capture.micro_batches import identifiers
from entropylens.registry import all_diagnostics

VOCABULARY = 13


class Model(nn.Module):
    """A language model of one layer, with its own loss, as transformers' models."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(8, VOCABULARY)

    loss_type = "ForCausalLM"

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Any:
        logits = self.head(self.dropout(self.embedding(input_ids)))
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            )
        return SimpleNamespace(logits=logits, loss=loss)


def batches(steps: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        yield torch.randint(0, VOCABULARY, (4, 12), generator=generator)


def train(
    steps: int, open_lens: Callable[[nn.Module, Any], el.Lens] | None = None, **options: Any
) -> tuple[Model, torch.optim.Optimizer]:
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(2)
    lens = open_lens(model, optimizer) if open_lens is not None else None
    for tokens in batches(steps):
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if lens is not None:
            lens.step(gradient_norm=norm)
    if lens is not None:
        lens.close()
    return model, optimizer


def series(run: el.Run, name: str, **filters: Any) -> dict[int, float]:
    table = run.metrics(name, **filters).to_arrow()
    return dict(zip(table["step"].to_pylist(), table["value"].to_pylist(), strict=True))


def table_of(run: el.Run, name: str) -> pa.Table:
    return getattr(run, name)().to_arrow()


def test_a_plain_loop_writes_what_happened(tmp_path: Path) -> None:
    train(20, lambda m, o: el.Lens(m, o, run_dir=tmp_path / "run", preset="full"))
    run = el.open_run(tmp_path / "run")
    assert run.state() == "finished"
    assert list(series(run, "loss/mean")) == list(range(1, 21))
    assert series(run, "learning_rate") == dict.fromkeys(range(1, 21), 0.01)
    assert series(run, "tokens/seen")[20] == 20 * 4 * 11
    norms = series(run, "gradient/norm/before_clip")
    clipped = series(run, "gradient/norm/after_clip")
    for step in range(1, 21):
        assert clipped[step] == pytest.approx(min(norms[step], 1.0), rel=1e-3)
    assert set(series(run, "update/norm")) == {1, 10, 20}
    assert table_of(run, "tokens").num_rows > 0
    assert table_of(run, "samples").num_rows > 0


def test_entropy_and_surprisal_equal_a_float64_reference(tmp_path: Path) -> None:
    model = Model().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tokens = next(batches(1))
    labels = tokens.clone()
    labels[0, 5:] = -100
    with el.Lens(model, optimizer, run_dir=tmp_path / "run", preset="full") as lens:
        model(tokens, labels=labels).loss.backward()
        optimizer.step()
        lens.step()
    logp = model(tokens).logits[:, :-1].double().log_softmax(-1)
    scored = labels[:, 1:] >= 0
    entropy = -(logp.exp() * logp).sum(-1)[scored]
    loss = nn.functional.cross_entropy(logp[scored], labels[:, 1:][scored])
    run = el.open_run(tmp_path / "run")
    assert series(run, "entropy/token/mean")[1] == pytest.approx(entropy.mean().item(), rel=1e-6)
    assert series(run, "surprisal/token/mean")[1] == pytest.approx(loss.item(), rel=1e-6)
    assert series(run, "loss/mean")[1] == pytest.approx(loss.item(), rel=1e-6)
    assert series(run, "entropy/token/count")[1] == scored.sum().item() == 37


@pytest.mark.parametrize("preset", ["fast", "full"])
def test_weights_after_fifty_steps_are_the_same_to_the_bit(tmp_path: Path, preset: str) -> None:
    bare, bare_optimizer = train(50)
    state = torch.get_rng_state()
    watched, watched_optimizer = train(
        50, lambda m, o: el.Lens(m, o, run_dir=tmp_path / preset, preset=preset)
    )
    assert torch.equal(torch.get_rng_state(), state)
    for name, weight in bare.state_dict().items():
        assert torch.equal(weight, watched.state_dict()[name]), name
    for one, other in zip(
        bare_optimizer.state.values(), watched_optimizer.state.values(), strict=True
    ):
        for name, value in one.items():
            assert torch.equal(value, other[name]), name


def test_hooks_are_gone_after_the_run(tmp_path: Path) -> None:
    model, optimizer = train(3, lambda m, o: el.Lens(m, o, run_dir=tmp_path / "run"))
    assert not model._forward_hooks
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_micro_batches_make_one_step_and_are_weighted_by_their_tokens(tmp_path: Path) -> None:
    uneven = [(2, 3), (4, 7)]
    generator = torch.Generator().manual_seed(4)
    parts = [
        (torch.randn(*shape, VOCABULARY, generator=generator),
         torch.randint(0, VOCABULARY, shape, generator=generator)) for shape in uneven
    ]  # fmt: skip
    with el.Lens(run_dir=tmp_path / "run", preset="full") as lens:
        for logits, targets in parts:
            lens.observe(logits=logits, targets=targets, loss=logits.mean())
        lens.step()
    logp = torch.cat([z.flatten(0, 1) for z, _ in parts]).double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    run = el.open_run(tmp_path / "run")
    assert series(run, "entropy/token/mean")[1] == pytest.approx(entropy.mean().item(), rel=1e-6)
    assert series(run, "tokens/seen")[1] == 34
    mean = sum(z.mean().item() for z, _ in parts) / 2
    assert series(run, "loss/mean")[1] == pytest.approx(mean, rel=1e-5)


def test_shares_of_a_summed_loss_are_added_up(tmp_path: Path) -> None:
    with el.Lens(run_dir=tmp_path / "run") as lens:
        lens.observe(loss=torch.tensor(0.5), loss_is_sum=True)
        lens.observe(loss=torch.tensor(0.25), loss_is_sum=True)
        lens.step()
    assert series(el.open_run(tmp_path / "run"), "loss/mean") == {1: 0.75}


def test_the_loss_that_a_trainer_scales_in_place_is_kept_as_it_was(tmp_path: Path) -> None:
    loss = torch.tensor(3.0)
    with el.Lens(run_dir=tmp_path / "run") as lens:
        lens.observe(loss=loss)
        loss /= 8
        lens.step()
    assert series(el.open_run(tmp_path / "run"), "loss/mean") == {1: 3.0}


def test_samples_and_tokens_carry_the_names_the_loop_gave(tmp_path: Path) -> None:
    logits = torch.zeros(3, 4, VOCABULARY)
    targets = torch.zeros(3, 4, dtype=torch.long)
    logits[1, :, 0] = -9.0
    names = ["one", "two", "three"]
    with el.Lens(run_dir=tmp_path / "run", decode=lambda token: f"<{token}>") as lens:
        lens.step(1.0, logits=logits, targets=targets, sample_id=names)
    run = el.open_run(tmp_path / "run")
    samples = table_of(run, "samples").to_pylist()
    assert samples[0]["selection"] == "highest_loss"
    assert samples[0]["sample_id"] == "two"
    tokens = table_of(run, "tokens").to_pylist()
    assert {row["sample_id"] for row in tokens} <= set(names)
    assert tokens[0]["sample_id"] == "two"
    assert {row["text"] for row in tokens} == {"<0>"}


def test_logits_shown_by_hand_replace_what_the_hook_reads(tmp_path: Path) -> None:
    model = Model()
    tokens = next(batches(1))
    with el.Lens(model, run_dir=tmp_path / "run", preset="full") as lens:
        logits = model(tokens, labels=tokens).logits
        lens.step(logits=logits[:2], targets=tokens[:2], shift=True)
        model(tokens, labels=tokens)
        lens.step(logits=logits[:1], targets=tokens[:1], shift=True)
    counts = series(el.open_run(tmp_path / "run"), "entropy/token/count")
    assert counts == {1: 22.0, 2: 11.0}


def test_evaluation_and_generation_are_not_taken_for_training(tmp_path: Path) -> None:
    model = Model()
    tokens = next(batches(1))
    with el.Lens(model, run_dir=tmp_path / "run", preset="full") as lens:
        model(tokens, labels=tokens)
        lens.step()
        with torch.no_grad(), lens.evaluation():
            model(tokens, labels=tokens)
            lens.log({"accuracy": torch.tensor(0.5), "loss": 2})
        model(tokens, labels=tokens)
        lens.step()
    run = el.open_run(tmp_path / "run")
    assert series(run, "tokens/step") == {1: 44.0, 2: 44.0}
    assert series(run, "user/accuracy", phases="eval") == {1: 0.5}
    assert series(run, "user/loss", phases="eval") == {1: 2.0}


def test_an_all_zero_mask_leaves_entropy_absent(tmp_path: Path) -> None:
    logits, targets = torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
    with el.Lens(run_dir=tmp_path / "run", preset="full") as lens:
        lens.step(logits=logits, targets=targets, mask=torch.zeros(2, 3, dtype=torch.bool))
    run = el.open_run(tmp_path / "run")
    names = set(run.metrics().to_arrow()["name"].to_pylist())
    assert not {name for name in names if name.startswith(("entropy/token/m", "surprisal"))}
    assert series(run, "tokens/step") == {1: 0.0}
    assert table_of(run, "tokens").num_rows == 0


def test_logits_that_are_not_finite_are_written_as_such(tmp_path: Path) -> None:
    logits = torch.zeros(1, 2, 5)
    logits[0, 1, 3] = torch.nan
    with el.Lens(run_dir=tmp_path / "run", preset="full") as lens:
        lens.step(float("nan"), logits=logits, targets=torch.zeros(1, 2, dtype=torch.long))
    run = el.open_run(tmp_path / "run")
    assert series(run, "entropy/token/mean")[1] != series(run, "entropy/token/mean")[1]
    assert series(run, "loss/mean")[1] != series(run, "loss/mean")[1]
    assert sum(s.faults != {} for s in run.status()) == 0


def test_a_wrong_argument_crashes_at_once(tmp_path: Path) -> None:
    where = tmp_path / "run"
    with pytest.raises(ValueError, match="did you mean 'balanced'"):
        el.Lens(run_dir=where, preset="balancd")
    with pytest.raises(ValueError, match="did you mean 'surprisal'"):
        el.Lens(run_dir=where, diagnostics={"suprisal": 1})
    with pytest.raises(ValueError, match="expected a temperature > 0, got 0"):
        el.Lens(run_dir=where, temperature=0.0)
    with pytest.raises(ValueError, match="did you mean 'full'"):
        el.Lens(run_dir=where, rows="ful")
    with pytest.raises(TypeError, match=r"expected a torch.optim.Optimizer"):
        el.Lens(optimizer=object(), run_dir=where)
    assert not where.exists()


def test_shapes_crash_in_the_first_step_and_are_counted_later(tmp_path: Path) -> None:
    logits, bad = torch.zeros(2, 3, 5), torch.zeros(2, 4, dtype=torch.long)
    with el.Lens(run_dir=tmp_path / "run", preset="full") as lens:
        with pytest.raises(ValueError, match="expected targets of shape"):
            lens.step(logits=logits, targets=bad)
        with pytest.raises(ValueError, match="expected logits and targets together, got logits"):
            lens.step(logits=logits)
        lens.step(1.0)
        lens.step(2.0, logits=logits, targets=bad)
        lens.step(3.0, logits=logits, targets=bad)
    run = el.open_run(tmp_path / "run")
    assert series(run, "loss/mean") == {1: 1.0, 2: 2.0, 3: 3.0}
    (status,) = run.status()
    assert sum(status.faults.values()) == 2


def test_a_diagnostic_that_raises_is_counted_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(type(all_diagnostics()["surprisal"]), "measure", broken)
    train(5, lambda m, o: el.Lens(m, o, run_dir=tmp_path / "run", preset="full"))
    run = el.open_run(tmp_path / "run")
    assert list(series(run, "entropy/token/mean")) == [1, 2, 3, 4, 5]
    assert series(run, "surprisal/token/mean") == {}
    (status,) = run.status()
    assert list(status.faults.values()) == [5]
    assert sum("no such luck" in message for message in caplog.messages) == 1


def test_an_exception_in_the_loop_seals_the_log_and_goes_on_up(tmp_path: Path) -> None:
    model = Model()

    def loop() -> None:
        with el.Lens(model, run_dir=tmp_path / "run") as lens:
            lens.step(1.0)
            raise KeyError("lost")

    with pytest.raises(KeyError):
        loop()
    run = el.open_run(tmp_path / "run")
    assert run.state() == "failed"
    assert series(run, "loss/mean") == {1: 1.0}
    assert any("lost" in message for message in table_of(run, "events")["message"].to_pylist())
    assert not model._forward_hooks


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGTERM)", "1 / 0", "sys.exit(0)"])
def test_a_process_that_ends_in_mid_training_leaves_all_its_steps(tmp_path: Path, end: str) -> None:
    script = f"""
import os, signal, sys
import entropylens as el
lens = el.Lens(run_dir={str(tmp_path / "run")!r})
for step in range(5):
    lens.step(1.0 + step)
{end}
"""
    subprocess.run([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    run = el.open_run(tmp_path / "run")
    assert list(series(run, "loss/mean")) == [1, 2, 3, 4, 5]
    expected = {"o": "terminated", "1": "failed", "s": "finished"}[end[0]]
    assert run.state() == expected
    assert not list((tmp_path / "run" / "metrics").glob("*.arrows"))


def test_training_twice_into_one_directory_makes_two_runs(tmp_path: Path) -> None:
    for _ in range(2):
        train(3, lambda m, o: el.Lens(m, o, run_dir=tmp_path / "run"))
    assert {run.path.name for run in el.list_runs(tmp_path)} == {"run", "run-2"}


def test_resume_shows_each_step_once_and_counts_tokens_on(tmp_path: Path) -> None:
    train(10, lambda m, o: el.Lens(m, o, run_dir=tmp_path / "run"))
    train(4, lambda m, o: el.Lens(m, o, run_dir=tmp_path / "run", resume_step=6))
    run = el.open_run(tmp_path / "run")
    seen = series(run, "tokens/seen")
    assert seen == {step: step * 44 for step in range(1, 11)}
    assert run.metrics("tokens/seen").to_arrow().num_rows == 10
    assert [attempt["start_step"] for attempt in run.attempts] == [0, 6]


def test_the_budget_thins_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("entropylens.budget.REVIEW_SECONDS", 0.0)
    train(
        200,
        lambda m, o: el.Lens(m, o, run_dir=tmp_path / "run", preset="full", max_overhead=1e-4),
    )
    run = el.open_run(tmp_path / "run")
    events = [e for e in table_of(run, "events").to_pylist() if e["kind"] == "budget"]
    assert events
    assert "of wall time" in events[0]["message"]
    assert len(series(run, "entropy/token/mean")) < 100
    fractions = series(run, "overhead/fraction")
    assert fractions
    assert all(0 < value < 1 for value in fractions.values())


def test_without_a_limit_everything_is_measured_and_the_share_still_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entropylens.budget.REVIEW_SECONDS", 0.0)
    train(60, lambda m, o: el.Lens(m, o, run_dir=tmp_path / "r", preset="full", max_overhead=None))
    run = el.open_run(tmp_path / "r")
    assert len(series(run, "entropy/token/mean")) == 60
    assert series(run, "overhead/fraction")


def test_sampled_rows_are_shared_among_the_micro_batches(tmp_path: Path) -> None:
    logits, targets = torch.zeros(8, 100, 5), torch.zeros(8, 100, dtype=torch.long)
    with el.Lens(run_dir=tmp_path / "run", preset="full", rows=256) as lens:
        for _ in range(2):
            for _ in range(4):
                lens.observe(logits=logits, targets=targets)
            lens.step()
    counts = series(el.open_run(tmp_path / "run"), "entropy/token/count")
    assert counts == {1: 4 * 256.0, 2: 256.0}


def test_identifiers_on_an_accelerator_are_refused() -> None:
    where = torch.zeros(3, device="meta")
    with pytest.raises(TypeError, match=r"expected sample_id on the host .* tensor on meta"):
        identifiers(where)


def test_a_name_that_the_log_does_not_take_is_refused(tmp_path: Path) -> None:
    with el.Lens(run_dir=tmp_path / "run") as lens:
        with pytest.raises(ValueError, match="expected a metric name in lower snake case"):
            lens.log({"My Metric": 1.0})
        lens.step(1.0)
        lens.log({"My Metric": 1.0})
    assert sum(el.open_run(tmp_path / "run").status()[0].faults.values()) == 1


def zeros(*shape: int) -> dict[str, Any]:
    return {"logits": torch.zeros(*shape), "targets": torch.zeros(*shape[:-1], dtype=torch.long)}


def test_bfloat16_scalars_are_written_and_spoil_no_other_row(tmp_path: Path) -> None:
    half = torch.tensor(1.5, dtype=torch.bfloat16)
    with el.Lens(run_dir=tmp_path / "run", preset="full") as lens:
        lens.step(half, gradient_norm=2 * half, **zeros(2, 3, 5))
        lens.log({"half": half})
    run = el.open_run(tmp_path / "run")
    assert series(run, "loss/mean") == {1: 1.5}
    assert series(run, "gradient/norm/before_clip") == {1: 3.0}
    assert series(run, "user/half") == {1: 1.5}
    assert series(run, "entropy/token/mean")


def test_a_decoder_that_raises_costs_the_text_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(token: int) -> str:
        raise ValueError("no such token")

    monkeypatch.setattr("entropylens.session.FLUSH_SECONDS", 0.0)
    with el.Lens(run_dir=tmp_path / "run", preset="full", decode=decode) as lens:
        lens.step(1.0, **zeros(2, 3, 5))
    run = el.open_run(tmp_path / "run")
    assert series(run, "loss/mean") == {1: 1.0}
    assert set(table_of(run, "tokens")["text"].to_pylist()) == {None}
    assert run.status()[0].faults == {"decode: ValueError": 1}


def test_a_step_that_fails_within_leaves_nothing_for_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Any) -> Any:
        raise RuntimeError("on two devices")

    with el.Lens(run_dir=tmp_path / "run", preset="full") as lens:
        with monkeypatch.context() as patch:
            patch.setattr("entropylens.watch.MicroBatches.reading", broken)
            lens.observe(loss=torch.tensor(5.0), **zeros(2, 3, 5))
            lens.step()
        lens.observe(loss=torch.tensor(7.0), **zeros(2, 3, 5))
        lens.step()
    run = el.open_run(tmp_path / "run")
    assert series(run, "loss/mean") == {1: 5.0, 2: 7.0}
    assert series(run, "tokens/step") == {1: 6.0, 2: 6.0}
    assert run.status()[0].faults == {"reading tokens: RuntimeError": 1}


def test_evaluation_with_gradients_is_no_training_either(tmp_path: Path) -> None:
    model, tokens = Model(), next(batches(1))
    with el.Lens(model, run_dir=tmp_path / "run", preset="full") as lens:
        with lens.evaluation():
            model(tokens, labels=tokens)
        model(tokens, labels=tokens)
        lens.step()
    assert series(el.open_run(tmp_path / "run"), "tokens/step") == {1: 44.0}


def test_losses_shown_by_hand_replace_what_the_hook_reads(tmp_path: Path) -> None:
    model, tokens = Model().eval(), next(batches(1))
    with el.Lens(model, run_dir=tmp_path / "run") as lens:
        for _ in range(2):
            for _ in range(2):
                loss = model(tokens, labels=tokens).loss
                lens.observe(loss=loss / 2, loss_is_sum=True)
            lens.step()
    expected = pytest.approx(loss.item(), rel=1e-6)
    assert series(el.open_run(tmp_path / "run"), "loss/mean") == {1: expected, 2: expected}


def test_sample_names_without_logits_go_to_what_the_hook_read(tmp_path: Path) -> None:
    model, tokens = Model(), next(batches(1))
    with el.Lens(model, run_dir=tmp_path / "run", preset="full") as lens:
        for name in "ab":
            model(tokens, labels=tokens)
            lens.observe(sample_id=[f"{name}{i}" for i in range(4)])
        lens.step()
    names = set(table_of(el.open_run(tmp_path / "run"), "tokens")["sample_id"].to_pylist())
    assert names == {f"{name}{i}" for name in "ab" for i in range(4)}


def test_all_rows_of_a_step_bear_the_number_the_loop_gave(tmp_path: Path) -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with el.Lens(model, optimizer, run_dir=tmp_path / "run", preset="full") as lens:
        for step, tokens in enumerate(batches(3)):
            model(tokens, labels=tokens).loss.backward()
            optimizer.step()
            lens.step(step=step)
    run = el.open_run(tmp_path / "run")
    for name in ("loss/mean", "entropy/token/mean", "gradient/norm/after_clip"):
        assert run.metrics(name).to_arrow()["step"].to_pylist() == [0, 1, 2], name


def test_a_sharded_norm_is_a_counted_fault_and_the_rest_is_written(tmp_path: Path) -> None:
    class Sharded(Tensor):
        def full_tensor(self) -> Tensor:
            raise AssertionError("would wait for the other ranks")

    with el.Lens(run_dir=tmp_path / "run", preset="full") as lens:
        lens.step(1.0, gradient_norm=torch.ones(()).as_subclass(Sharded), **zeros(2, 3, 5))
    run = el.open_run(tmp_path / "run")
    assert series(run, "loss/mean") == {1: 1.0}
    assert series(run, "gradient/norm/before_clip") == {}
    assert run.status()[0].faults == {"gradient norm: TypeError": 1}


def test_a_compiled_model_is_read_from_outside_of_its_graph(tmp_path: Path) -> None:
    model = Model().eval()
    compiled = torch.compile(model, backend="eager")
    watched: Any = compiled
    with el.Lens(watched, run_dir=tmp_path / "run", preset="full", max_overhead=None) as lens:
        for tokens in batches(10):
            compiled(tokens, labels=tokens)
            lens.step()
    run = el.open_run(tmp_path / "run")
    assert series(run, "surprisal/token/mean") == pytest.approx(series(run, "loss/mean"), rel=1e-5)
    assert len(series(run, "loss/mean")) == 10
    assert run.status()[0].faults == {}


def test_an_output_that_raises_when_looked_at_does_not_reach_the_loop(tmp_path: Path) -> None:
    class Lazy:
        @property
        def logits(self) -> Tensor:
            raise RuntimeError("not yet")

    class Odd(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return Lazy()

    model = Odd(2, 2)
    with el.Lens(model, run_dir=tmp_path / "run") as lens:
        model(torch.zeros(1, 2))
        lens.step(1.0)
    faults = el.open_run(tmp_path / "run").status()[0].faults
    assert faults == {"forward hook: RuntimeError": 1, "inputs hook: RuntimeError": 1}


def test_a_lens_that_cannot_be_attached_frees_its_directory(tmp_path: Path) -> None:
    class Odd(nn.Linear):
        def get_base_model(self) -> nn.Module:
            raise RuntimeError("none here")

    with pytest.raises(RuntimeError, match="none here"):
        el.Lens(Odd(2, 2), run_dir=tmp_path / "run")
    assert el.open_run(tmp_path / "run").state() == "failed"
    el.Lens(run_dir=tmp_path / "run", resume_step=0).close()


def test_one_value_that_cannot_be_logged_does_not_cost_the_others(tmp_path: Path) -> None:
    with el.Lens(run_dir=tmp_path / "run") as lens:
        lens.step(1.0)
        lens.log({"two": torch.ones(2), "one": 1.0})
        lens.event("note", "text", colour="red")
    run = el.open_run(tmp_path / "run")
    assert series(run, "user/one") == {1: 1.0}
    assert sum(run.status()[0].faults.values()) == 2


def test_shifting_what_has_no_positions_is_refused(tmp_path: Path) -> None:
    with (
        el.Lens(run_dir=tmp_path / "run") as lens,
        pytest.raises(ValueError, match=r"logits \[B, T, V\] and targets \[B, T\] to shift, got"),
    ):
        lens.step(shift=True, **zeros(3, 5))


def classifier() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def test_several_optimisers_have_their_values_under_their_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    generator, critic = nn.Linear(4, 4), nn.Linear(4, 1)
    optimizers = {
        "generator": torch.optim.SGD(generator.parameters(), lr=0.1),
        "critic": torch.optim.SGD(critic.parameters(), lr=0.2),
    }
    with el.Lens(None, optimizers, run_dir=tmp_path / "run", preset="full") as lens:
        for step in range(4):
            for name, optimizer in optimizers.items():
                loss = critic(generator(torch.ones(2, 4))).sum()
                optimizer.zero_grad()
                loss.backward()
                lens.observe(loss=loss, optimizer=name)
                if name == "generator" or step % 2:
                    optimizer.step()
            lens.step()
    run = el.open_run(tmp_path / "run")
    rows = run.metrics("learning_rate").to_arrow().to_pylist()
    assert {(row["module"], row["value"]) for row in rows} == {("generator", 0.1), ("critic", 0.2)}
    steps = {name: run.metrics("gradient/norm/after_clip", name).to_arrow()["step"].to_pylist()
             for name in optimizers}  # fmt: skip
    assert steps == {"generator": [1, 2, 3, 4], "critic": [2, 4]}
    assert len(run.metrics("loss/mean", "critic").to_arrow()) == 4
    # One of several that was not called had no step to make: nothing was skipped.
    assert set(run.metrics("optimizer/skipped").to_arrow()["value"].to_pylist()) == {0.0}
    assert run.status()[0].faults == {}


def test_steps_skipped_before_the_optimisers_first_call_are_told_afterwards(tmp_path: Path) -> None:
    model, optimizer = classifier()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    bad = {1, 2, 5}
    with el.Lens(model, optimizer, run_dir=tmp_path / "run", preset="full") as lens:
        for step in range(1, 7):
            optimizer.zero_grad()
            scaler.scale(
                model(torch.ones(2, 4)).sum() * (torch.inf if step in bad else 1)
            ).backward()
            scaler.step(optimizer)
            scaler.update()
            lens.step(1.0)
    skipped = series(el.open_run(tmp_path / "run"), "optimizer/skipped")
    assert skipped == {step: float(step in bad) for step in range(1, 7)}


def test_without_any_call_of_the_optimiser_nothing_is_said_of_skips(tmp_path: Path) -> None:
    model, optimizer = classifier()
    with el.Lens(model, optimizer, run_dir=tmp_path / "run") as lens:
        for _ in range(3):
            lens.step(1.0)
    assert series(el.open_run(tmp_path / "run"), "optimizer/skipped") == {}


def test_a_loss_module_can_be_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, criterion = nn.Conv1d(2, 5, 1), nn.CrossEntropyLoss(ignore_index=4)
    inputs, targets = torch.randn(3, 2, 6), torch.randint(0, 5, (3, 6))
    with el.Lens(model, run_dir=tmp_path / "run", preset="full", reads=[criterion]) as lens:
        loss = criterion(model(inputs), targets)
        lens.step(loss)
        with torch.no_grad():
            criterion(model(inputs), targets)
        lens.step()
    run = el.open_run(tmp_path / "run")
    logp = model(inputs).double().log_softmax(1).movedim(1, -1)[targets != 4]
    entropy = -(logp.exp() * logp).sum(-1).mean().item()
    assert series(run, "entropy/token/mean") == {1: pytest.approx(entropy, rel=1e-6)}
    assert series(run, "surprisal/token/mean") == {1: pytest.approx(loss.item(), rel=1e-6)}
    assert series(run, "tokens/step") == {1: float((targets != 4).sum())}
    assert not criterion._forward_hooks
    assert run.status()[0].faults == {}


def test_a_loss_module_given_probabilities_has_no_classes_to_read(tmp_path: Path) -> None:
    criterion = nn.CrossEntropyLoss()
    with el.Lens(run_dir=tmp_path / "run", preset="full", reads=[criterion]) as lens:
        criterion(input=torch.zeros(3, 5, requires_grad=True), target=torch.full((3, 5), 0.2))
        lens.step(1.0)
        criterion(torch.zeros(5, requires_grad=True), torch.tensor(3))
        lens.step(1.0)
    run = el.open_run(tmp_path / "run")
    assert series(run, "tokens/step") == {2: 1.0}
    assert run.status()[0].faults == {}


def test_quiet_steps_are_counted_and_what_is_due_is_measured_at_its_step(tmp_path: Path) -> None:
    model, optimizer = classifier()
    every = {"training_vitals": 7, "gradient_norm": 5}
    off = {"token_entropy", "surprisal", "token_table", "sample_table", "update_norm"}
    off |= {n for n, found in all_diagnostics().items() if found.reads == "probe"}
    off.add("step_control")
    settings: dict[str, Any] = {
        "diagnostics": {**every, **dict.fromkeys(off, False)},
        "max_overhead": None,
    }
    with el.Lens(model, optimizer, run_dir=tmp_path / "run", **settings) as lens:
        for step in range(1, 31):
            loss = model(torch.ones(2, 4)).sum() + step
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            lens.step(loss, logits=torch.zeros(2, 3), targets=torch.zeros(2, dtype=torch.long))
            assert lens.last_step == step
    run = el.open_run(tmp_path / "run")
    assert list(series(run, "loss/mean")) == [1, 7, 14, 21, 28]
    assert list(series(run, "gradient/norm/after_clip")) == [1, 5, 10, 15, 20, 25, 30]
    # A step that was not counted makes the sum unknown: absent from there on.
    assert series(run, "tokens/seen") == {1: 2.0}
    assert set(series(run, "tokens/step").values()) == {2.0}
    assert run.status()[0].step == 30


def test_a_quiet_step_still_flushes_what_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entropylens.session.FLUSH_SECONDS", 0.0)
    off = dict.fromkeys(all_diagnostics(), False)
    with el.Lens(run_dir=tmp_path / "run", diagnostics=off) as lens:
        lens.step()
        lens.log({"mine": torch.ones(1)})
        lens.step()
        assert lens._session._transfer.is_empty


def state_of(lens: el.Lens) -> Any:
    """A state as it comes back from a checkpoint that nobody trusts."""
    saved = BytesIO()
    torch.save(lens.state_dict(), saved)
    saved.seek(0)
    return torch.load(saved, weights_only=True)


def test_a_state_continues_its_run_and_forgets_what_came_after(tmp_path: Path) -> None:
    with el.Lens(run_dir=tmp_path / "run") as first:
        for step in range(1, 7):
            first.step(float(step), **zeros(2, 3, 5))
            if step == 4:
                state = state_of(first)
    assert state["tokens_seen"] == 24
    with el.Lens(run_dir=tmp_path / "run", state=state) as lens:
        assert lens.last_step == 4
        lens.step(50.0, **zeros(2, 3, 5))
    run = el.open_run(tmp_path / "run")
    assert series(run, "loss/mean") == {1: 1, 2: 2, 3: 3, 4: 4, 5: 50}
    assert series(run, "tokens/seen")[5] == 30
    assert [attempt["start_step"] for attempt in run.attempts] == [0, 4]


def test_a_state_is_found_in_the_directory_that_was_really_taken(tmp_path: Path) -> None:
    el.Lens(run_dir=tmp_path / "run").close()
    with el.Lens(run_dir=tmp_path / "run") as lens:
        lens.step(1.0)
        state = state_of(lens)
    assert lens.run_dir.name == "run-2"
    with el.Lens(run_dir=tmp_path / "run", state=state) as lens:
        assert lens.run_dir.name == "run-2"
    moved = tmp_path / "elsewhere"
    (tmp_path / "run-2").rename(moved)
    with el.Lens(run_dir=moved, state=state) as lens:
        assert lens.run_dir == moved
    assert len(el.open_run(moved).attempts) == 3


def test_a_branch_in_another_directory_leaves_the_first_run_alone(tmp_path: Path) -> None:
    with el.Lens(run_dir=tmp_path / "run") as lens:
        for step in range(1, 4):
            lens.step(float(step), **zeros(2, 3, 5))
            if step == 2:
                state = state_of(lens)
    el.Lens(run_dir=tmp_path / "taken").close()
    for asked, given in (("branch", "branch"), ("taken", "taken-2")):
        with el.Lens(run_dir=tmp_path / asked, state=state) as lens:
            lens.step(9.0, **zeros(2, 3, 5))
        branch = el.open_run(tmp_path / given)
        assert series(branch, "loss/mean") == {3: 9.0}
        assert series(branch, "tokens/seen") == {3: 18.0}
        assert branch.attempts[0]["start_step"] == 2
    assert series(el.open_run(tmp_path / "run"), "loss/mean") == {1: 1.0, 2: 2.0, 3: 3.0}


def test_a_state_carries_diagnostics_memory_and_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = type(all_diagnostics()["surprisal"])
    seen = []

    def measure(self: Any, reading: Any, state: Any) -> Any:
        seen.append(state)
        return [], torch.tensor(1.0) if state is None else state + 1

    monkeypatch.setattr(kind, "measure", measure)
    with el.Lens(run_dir=tmp_path / "run", preset="full") as lens:
        for _ in range(2):
            lens.step(**zeros(2, 3, 5))
        lens._session.budget.rows, lens._session.budget.widening = 256, 4
        state = state_of(lens)
    with el.Lens(run_dir=tmp_path / "run", preset="full", state=state) as lens:
        assert (lens._session.budget.rows, lens._session.budget.widening) == (256, 4)
        for _ in range(2):
            lens.step(**zeros(2, 3, 5))
    assert seen == [None, 1.0, 2.0]


def test_resuming_where_the_log_lost_the_step_leaves_the_sum_of_tokens_unknown(
    tmp_path: Path,
) -> None:
    with el.Lens(run_dir=tmp_path / "run") as lens:
        for _ in range(3):
            lens.step(1.0, **zeros(2, 3, 5))
    with el.Lens(run_dir=tmp_path / "run", resume_step=5) as lens:
        lens.step(1.0, **zeros(2, 3, 5))
    assert series(el.open_run(tmp_path / "run"), "tokens/seen") == {1: 6.0, 2: 12.0, 3: 18.0}


def test_rows_are_chosen_by_step_so_that_a_resumed_run_chooses_alike(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shown = [(torch.randn(8, 50, 5), torch.zeros(8, 50, dtype=torch.long)) for _ in range(4)]

    def go(lens: el.Lens, steps: range) -> None:
        for step in steps:
            lens.step(logits=shown[step][0], targets=shown[step][1])

    settings: dict[str, Any] = {"preset": "full", "rows": 32, "max_overhead": None}
    with el.Lens(run_dir=tmp_path / "whole", **settings) as lens:
        go(lens, range(4))
    with el.Lens(run_dir=tmp_path / "halves", **settings) as lens:
        go(lens, range(2))
    with el.Lens(run_dir=tmp_path / "halves", resume_step=2, **settings) as lens:
        go(lens, range(2, 4))
    whole, halves = (series(el.open_run(tmp_path / n), "entropy/token/mean")
                     for n in ("whole", "halves"))  # fmt: skip
    assert whole == halves
    assert len(set(whole.values())) == 4


def test_newest_values_are_handed_on_once(tmp_path: Path) -> None:
    with el.Lens(run_dir=tmp_path / "run", preset="full") as lens:
        lens.forward("loss/mean", "entropy/token/*")
        lens.step(1.0, **zeros(2, 3, 5))
        lens.step(2.0, **zeros(2, 3, 5))
        with lens.evaluation():
            lens.log({"loss/mean": 5.0})
        taken = lens.take_latest()
        assert taken["loss/mean"] == 2.0
        assert taken["entropy/token/mean"] == pytest.approx(1.6094379)
        assert not {n for n in taken if not n.startswith(("loss/mean", "entropy/token/"))}
        assert lens.take_latest() == {}


def test_time_within_time_that_is_ours_counts_once(tmp_path: Path) -> None:
    with el.Lens(run_dir=tmp_path / "run", max_overhead=None) as lens:
        lens.step(1.0)
        budget = lens._session.budget
        before = budget._spent
        lens.aside("outer", lambda: lens.aside("inner", lambda: sleep(0.05)))
        assert 0.05 <= budget._spent - before < 0.09
        before = budget._spent
        lens.aside("again", lambda: sleep(0.01))
        assert budget._spent - before >= 0.01


def test_the_preset_says_what_it_may_cost(tmp_path: Path) -> None:
    limits = {}
    for preset in ("fast", "balanced", "full"):
        with el.Lens(run_dir=tmp_path / preset, preset=preset):
            pass
        limits[preset] = el.open_run(tmp_path / preset).config["max_overhead"]
    assert limits == {"fast": 0.01, "balanced": 0.03, "full": 0.03}
    with pytest.raises(ValueError, match=r"Lens: max_overhead: .*did you mean 'fast'"):
        el.Lens(run_dir=tmp_path / "x", max_overhead="fats")


@pytest.mark.parametrize(
    "place",
    [
        "capture.forward.ModelTap._after_forward",
        "capture.optimizer.OptimizerTap._begin",
        "capture.optimizer.OptimizerTap._read_tensors",
    ],
)
def test_whatever_a_hook_raises_stays_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(f"entropylens.{place}", broken)
    train(3, lambda m, o: el.Lens(m, o, run_dir=tmp_path / "run", preset="full"))
    run = el.open_run(tmp_path / "run")
    assert list(series(run, "step/seconds")) == [1, 2, 3]
    assert sum(run.status()[0].faults.values()) == 3


def test_a_model_tapped_within_a_compiled_graph_leaves_it_whole_and_says_what_is_missing(
    tmp_path: Path,
) -> None:
    model, _ = classifier()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with el.Lens(model, run_dir=tmp_path / "run", preset="full", max_overhead=None) as lens:
        for _ in range(3):
            compiled(torch.ones(2, 4))
            lens.step(1.0)
    run = el.open_run(tmp_path / "run")
    assert series(run, "entropy/token/mean") == {}
    (event,) = (e for e in table_of(run, "events").to_pylist() if e["kind"] == "capture")
    assert "of a compiled model give what torch.compile returned" in event["message"]
    assert run.status()[0].faults == {}


def test_a_loss_module_beside_a_model_that_shows_tokens_is_not_counted_again(
    tmp_path: Path,
) -> None:
    model, criterion = Model().eval(), nn.CrossEntropyLoss()
    tokens = next(batches(1))
    with el.Lens(model, run_dir=tmp_path / "run", preset="full", reads=[model, criterion]) as lens:
        logits = model(tokens, labels=tokens).logits
        criterion(logits[:, 0], tokens[:, 1])
        lens.step(1.0)
    run = el.open_run(tmp_path / "run")
    assert series(run, "tokens/step") == {1: 44.0}
    assert [e for e in table_of(run, "events").to_pylist() if e["kind"] == "capture"] == []
