from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.data import IterableDataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from untouched.trainings import gradient_scaler

import entropylens as el
from entropylens_callbacks import loggable
from entropylens_callbacks.samples import SAMPLE_ID, _NamingCollator
from entropylens_callbacks.transformers import EntropyLensCallback, attach

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

VOCABULARY, LENGTH = 31, 12


def config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        attention_dropout=0.1,
        pad_token_id=0,
    )


def samples(count: int = 64) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator).tolist()
    made = []
    for number, row in enumerate(rows):
        labels = [*row]
        labels[: number % 5] = [-100] * (number % 5)
        made.append({"input_ids": row, "labels": labels, "name": f"sample {number}"})
    return made


def trainer(tmp_path: Path, *, model: Any = None, callbacks: Any = (), **options: Any) -> Trainer:
    torch.manual_seed(0)
    settings = {
        "use_cpu": True,
        "report_to": "none",
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 2,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 0,
        **options,
    }
    found = Trainer(
        model or LlamaForCausalLM(config()),
        args=TrainingArguments(str(tmp_path / "out"), **settings),
        train_dataset=samples(),
        eval_dataset=samples(8),
        callbacks=list(callbacks),
    )
    found.remove_callback(PrinterCallback)
    return found


def series(run: el.Run, name: str, **filters: Any) -> dict[int, float]:
    table = run.metrics(name, **filters).to_arrow()
    return dict(zip(table["step"].to_pylist(), table["value"].to_pylist(), strict=True))


def test_one_line_before_train_writes_what_happened(tmp_path: Path) -> None:
    found = trainer(tmp_path)
    attach(found, preset="full", max_overhead=None)
    found.train()
    run = el.open_run(tmp_path / "out" / "entropylens")
    assert run.state() == "finished"
    assert list(series(run, "loss/mean")) == [1, 2, 3, 4, 5, 6]
    logged = {e["step"]: e for e in found.state.log_history if "loss" in e}
    for step, entry in logged.items():
        ours = series(run, "loss/mean")
        assert entry["loss"] == pytest.approx((ours[step - 1] + ours[step]) / 2, abs=1e-4)
        assert series(run, "gradient/norm/before_clip")[step] == pytest.approx(entry["grad_norm"])
        assert series(run, "learning_rate")[step] == pytest.approx(entry["learning_rate"])
    assert series(run, "surprisal/token/mean") == pytest.approx(series(run, "loss/mean"), rel=1e-5)
    assert series(run, "framework/loss").keys() == logged.keys()
    for step, after in series(run, "gradient/norm/after_clip").items():
        before = series(run, "gradient/norm/before_clip")[step]
        assert after == pytest.approx(min(before, 1.0), rel=1e-3)
    assert run.status()[0].faults == {}


@pytest.mark.parametrize("preset", ["fast", "full"])
def test_weights_after_fifty_steps_are_the_same_to_the_bit(tmp_path: Path, preset: str) -> None:
    bare = trainer(tmp_path / "bare", max_steps=50)
    bare.train()
    watched = trainer(tmp_path / "watched", max_steps=50)
    attach(watched, preset=preset, sample_id="name")
    watched.train()
    assert run_of(watched).status()[0].faults == {}
    for name, weight in bare.model.state_dict().items():
        assert torch.equal(weight, watched.model.state_dict()[name]), name
    one, other = bare.optimizer.state_dict(), watched.optimizer.state_dict()
    for key, values in one["state"].items():
        for name, value in values.items():
            assert torch.equal(value, other["state"][key][name])
    assert [e.get("loss") for e in bare.state.log_history] == [
        e.get("loss") for e in watched.state.log_history
    ]


def run_of(found: Trainer, name: str = "entropylens") -> el.Run:
    return el.open_run(Path(found.args.output_dir) / name)


def test_where_no_trainer_is_found_it_sees_what_the_protocol_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("entropylens_callbacks.transformers._calling_trainer", lambda: None)
    callback = EntropyLensCallback(tmp_path / "run", preset="full", max_overhead=None)
    found = trainer(tmp_path, callbacks=[callback])
    found.train()
    run = el.open_run(tmp_path / "run")
    assert list(series(run, "loss/mean")) == [1, 2, 3, 4, 5, 6]
    assert set(series(run, "gradient/norm/before_clip")) == {2, 4, 6}
    assert series(run, "surprisal/token/mean") == pytest.approx(series(run, "loss/mean"), rel=1e-5)


def watching(found: Trainer) -> EntropyLensCallback:
    callbacks = found.callback_handler.callbacks
    (callback,) = (c for c in callbacks if isinstance(c, EntropyLensCallback))
    return callback


@pytest.mark.parametrize("way", ["callbacks", "report_to", "add_callback"])
def test_every_way_in_finds_the_trainer_and_sees_the_same(tmp_path: Path, way: str) -> None:
    options: dict[str, Any] = {"preset": "full", "max_overhead": None}
    if way == "report_to":
        found = trainer(tmp_path, report_to="entropylens")
        watching(found).options = options
    elif way == "callbacks":
        found = trainer(tmp_path, callbacks=[EntropyLensCallback(**options)])
    else:
        found = trainer(tmp_path)
        found.add_callback(EntropyLensCallback(**options))
    found.train()
    run = run_of(found)
    assert list(series(run, "gradient/norm/before_clip")) == [1, 2, 3, 4, 5, 6]
    assert isinstance(found.callback_handler.callbacks[0], EntropyLensCallback)
    assert run.status()[0].faults == {}
    with pytest.raises(ValueError, match="attach once, or leave it out of callbacks= and report"):
        attach(found)


def test_joining_while_it_trains_is_too_late_for_names(tmp_path: Path) -> None:
    found = trainer(tmp_path)
    found.add_callback(EntropyLensCallback(sample_id="name"))
    with pytest.raises(ValueError, match=r"expected to join the trainer before .* use attach"):
        found.train()


def test_accumulated_micro_batches_are_one_step_with_the_trainers_loss(tmp_path: Path) -> None:
    found = trainer(tmp_path, gradient_accumulation_steps=3, logging_steps=1, max_steps=3)
    attach(found, preset="full", max_overhead=None)
    found.train()
    run = run_of(found)
    ours = series(run, "loss/mean")
    assert list(ours) == [1, 2, 3]
    for entry in found.state.log_history:
        if "loss" in entry:
            assert entry["loss"] == pytest.approx(ours[entry["step"]], abs=1e-4)
    assert series(run, "surprisal/token/mean") == pytest.approx(ours, rel=1e-5)


def test_evaluation_is_written_as_such_and_never_as_training(tmp_path: Path) -> None:
    found = trainer(tmp_path, eval_strategy="steps", eval_steps=3)
    attach(found, preset="full", sample_id="index")
    found.train()
    run = run_of(found)
    evaluated = {e["step"]: e["eval_loss"] for e in found.state.log_history if "eval_loss" in e}
    assert series(run, "loss/mean", phases="eval") == pytest.approx(evaluated)
    scored = sum(sum(label >= 0 for label in s["labels"][1:]) for s in samples())
    assert max(series(run, "tokens/seen").values()) < scored
    assert run.status()[0].faults == {}


def test_samples_carry_the_column_or_the_index_that_was_asked_for(tmp_path: Path) -> None:
    for column, known in (
        ("name", {f"sample {i}" for i in range(64)}),
        ("index", {str(i) for i in range(64)}),
    ):
        found = trainer(tmp_path / column)
        attach(found, preset="full", sample_id=column)
        found.train()
        run = run_of(found)
        names = run.samples().to_arrow()["sample_id"].to_pylist()
        assert names
        assert set(names) <= known
        assert len(set(names)) > 8
        assert run.status()[0].faults == {}


def test_the_sample_that_is_named_is_the_one_that_was_measured(tmp_path: Path) -> None:
    without_dropout = config()
    without_dropout.attention_dropout = 0.0
    model = LlamaForCausalLM(without_dropout)
    found = trainer(tmp_path, model=model, learning_rate=0.0, max_steps=4)
    attach(found, preset="full", sample_id="index", max_overhead=None)
    found.train()
    model.eval()
    rows = run_of(found).samples().to_arrow().to_pylist()
    losses = []
    for sample in samples():
        with torch.no_grad():
            inputs = {k: torch.tensor([sample[k]]) for k in ("input_ids", "labels")}
            losses.append(model(**inputs).loss.item())
    assert rows
    for row in rows:
        nearest = min(range(len(losses)), key=lambda number: abs(losses[number] - row["loss"]))
        assert nearest == int(row["sample_id"])
        assert row["loss"] == pytest.approx(losses[nearest], abs=1e-6)


def test_training_twice_makes_two_runs_and_resuming_goes_on_in_the_first(tmp_path: Path) -> None:
    found = trainer(tmp_path, save_strategy="steps", save_steps=4)
    attach(found, preset="full")
    found.train()
    found.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    run = run_of(found)
    assert [attempt["start_step"] for attempt in run.attempts] == [0, 4]
    table = run.metrics("tokens/seen").to_arrow()
    assert table["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert table["value"].to_pylist() == sorted(table["value"].to_pylist())
    found.train()
    assert run_of(found, "entropylens-2").state() == "finished"


def test_an_exception_seals_the_log_takes_the_hooks_out_and_goes_on_up(tmp_path: Path) -> None:
    class Broken(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                raise RuntimeError("out of luck")

    found = trainer(tmp_path, callbacks=[Broken()])
    attach(found)
    with pytest.raises(RuntimeError, match="out of luck"):
        found.train()
    run = run_of(found)
    assert run.state() == "failed"
    assert list(series(run, "loss/mean")) == [1, 2, 3]
    assert not found.model._forward_hooks


def test_generation_between_steps_is_not_recorded(tmp_path: Path) -> None:
    class Sampling(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)

    found = trainer(tmp_path, callbacks=[Sampling()])
    attach(found, preset="full")
    found.train()
    assert len(series(run_of(found), "tokens/step")) == 6
    assert max(series(run_of(found), "tokens/step").values()) <= 4 * (LENGTH - 1)


def test_a_classifier_is_read_as_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = config()
    made.num_labels = 3
    found = trainer(tmp_path, model=LlamaForSequenceClassification(made))
    found.train_dataset = [
        {"input_ids": s["input_ids"], "labels": i % 3} for i, s in enumerate(samples())
    ]
    attach(found, preset="full")
    found.train()
    run = run_of(found)
    assert series(run, "surprisal/token/mean") == pytest.approx(series(run, "loss/mean"), rel=1e-4)
    assert series(run, "tokens/step") == dict.fromkeys(range(1, 7), 4.0)


def test_attaching_twice_or_naming_a_column_that_is_not_there_is_refused(tmp_path: Path) -> None:
    found = trainer(tmp_path)
    with pytest.raises(ValueError, match=r"'index' or a column of the training set .* got 'id'"):
        attach(found, sample_id="id")
    attach(found)
    with pytest.raises(ValueError, match="expected a trainer without an EntropyLensCallback"):
        attach(found)


def test_setup_errors_stop_training_before_it_starts(tmp_path: Path) -> None:
    found = trainer(tmp_path)
    attach(found, preset="fats")
    with pytest.raises(ValueError, match="did you mean 'fast'"):
        found.train()


@pytest.mark.parametrize("told", [None, False, True])
def test_a_loss_of_the_users_own_is_the_one_the_trainer_steps_on(
    tmp_path: Path, told: bool | None
) -> None:
    class Own(Trainer):  # type: ignore[misc]
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return model(**inputs).loss * 1.0

    made = trainer(tmp_path, gradient_accumulation_steps=2, logging_steps=1, max_steps=3)
    made.__class__, made.loss_is_scaled_for_ga = Own, told
    attach(made, max_overhead=None)
    made.train()
    ours = series(run_of(made), "loss/mean")
    for entry in made.state.log_history:
        if "loss" in entry:
            assert entry["loss"] == pytest.approx(ours[entry["step"]], abs=1e-4)


def test_labels_that_smoothing_keeps_from_the_model_are_scored_all_the_same(tmp_path: Path) -> None:
    found = trainer(tmp_path, label_smoothing_factor=0.1)
    attach(found, preset="full", max_overhead=None)
    found.train()
    run = run_of(found)
    bare = trainer(tmp_path / "bare")
    attach(bare, preset="full", max_overhead=None)
    bare.train()
    assert series(run, "tokens/step") == series(run_of(bare), "tokens/step")
    first = series(run_of(bare), "surprisal/token/mean")[1]
    assert series(run, "surprisal/token/mean")[1] == pytest.approx(first, rel=1e-5)


def test_a_set_that_reads_whole_batches_still_does_and_names_them(tmp_path: Path) -> None:
    class Batched(list[dict[str, Any]]):
        read: ClassVar[list[list[int]]] = []

        def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
            self.read.append(indices)
            return [self[i] for i in indices]

    found = trainer(tmp_path)
    found.train_dataset = Batched(samples())
    attach(found, preset="full", sample_id="index", max_overhead=None)
    found.train()
    names = run_of(found).samples().to_arrow()["sample_id"].to_pylist()
    assert len(Batched.read) >= 6
    assert set(names) <= {str(i) for batch in Batched.read for i in batch}


def test_naming_needs_samples_that_can_carry_a_name(tmp_path: Path) -> None:
    found = trainer(tmp_path)
    found.train_dataset = [(1, 2)] * 8
    with pytest.raises(ValueError, match=r"expected a training set of mappings .* of tuple"):
        attach(found, sample_id="index")

    class Stream(IterableDataset[Any]):
        def __iter__(self) -> Iterator[Any]:
            return iter(samples())

        def __len__(self) -> int:
            return 64

    found.train_dataset = Stream()
    with pytest.raises(ValueError, match=r"expected a map-style training set .* got Stream"):
        attach(found, sample_id="index")


def test_samples_of_evaluation_reach_their_collator_as_they_are() -> None:
    seen: list[Any] = []

    def collate(batch: Any) -> tuple[int, int]:
        seen.append(batch)
        return 1, 2

    collator: Any = _NamingCollator(collate)
    pairs = [(1, 2), (3, 4)]
    assert collator(pairs) == (1, 2)
    assert seen[0] is pairs
    assert collator([{"x": 1, SAMPLE_ID: 7}]) == (1, 2)
    assert seen[1] == [{"x": 1}]


def test_names_that_trainers_log_are_made_to_fit() -> None:
    assert loggable({"Eval//Acc @1": 1, "text": "x", "/": 2.0}) == {"eval/acc_1": 1.0}


def test_our_metrics_reach_tensorboard_wherever_we_stand_among_the_reporters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    found = trainer(tmp_path, report_to=["tensorboard", "entropylens"])
    watching(found).options = {"preset": "full", "max_overhead": None}
    found.train()
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    scalars = {e.step: e.value for e in events.Scalars("train/entropylens/entropy/token/mean")}
    entropy = series(run_of(found), "entropy/token/mean")
    assert scalars == pytest.approx({step: entropy[step] for step in (2, 4, 6)}, rel=1e-6)
    # What the trainer itself keeps is as it would be without us.
    assert not any("entropylens" in key for e in found.state.log_history for key in e)


def test_which_metrics_are_passed_on_can_be_said(tmp_path: Path) -> None:
    class Keeps(TrainerCallback):  # type: ignore[misc]
        seen: ClassVar[list[dict[str, Any]]] = []

        def on_log(self, *args: Any, logs: Any = None, **kwargs: Any) -> None:
            self.seen.append(dict(logs))

    found = trainer(tmp_path, callbacks=[Keeps()], logging_steps=1)
    attach(found, preset="full", max_overhead=None, forward=["surprisal/token/*"])
    found.train()
    ours = [{k for k in logs if k.startswith("entropylens/")} for logs in Keeps.seen]
    assert "entropylens/surprisal/token/p95" in ours[0]
    assert all(name.startswith("entropylens/surprisal/token/") for names in ours for name in names)
    surprisal = series(run_of(found), "surprisal/token/mean")
    told = [logs.get("entropylens/surprisal/token/mean") for logs in Keeps.seen]
    assert told[:6] == pytest.approx(list(surprisal.values()))
    assert told[6] is None  # the summary at the end is no step's


def test_the_checkpoint_carries_our_state_and_resuming_goes_on_where_it_says(
    tmp_path: Path,
) -> None:
    el.Lens(run_dir=tmp_path / "run").close()
    found = trainer(tmp_path, save_strategy="steps", save_steps=2)
    attach(found, tmp_path / "run", preset="full", max_overhead=None)
    found.train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    state = torch.load(checkpoint / "entropylens-rank-000.pt", weights_only=True)
    assert state["step"] == 4
    assert state["tokens_seen"] == series(el.open_run(tmp_path / "run-2"), "tokens/seen")[4]
    again = trainer(tmp_path)
    attach(again, tmp_path / "run", preset="full", max_overhead=None)
    again.train(resume_from_checkpoint=str(checkpoint))
    run = el.open_run(tmp_path / "run-2")
    assert [attempt["start_step"] for attempt in run.attempts] == [0, 4]
    assert run.metrics("tokens/seen").to_arrow()["step"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert not (tmp_path / "run-3").exists()
    branch = trainer(tmp_path)
    attach(branch, tmp_path / "branch", preset="full", max_overhead=None)
    branch.train(resume_from_checkpoint=str(checkpoint))
    assert list(series(el.open_run(tmp_path / "branch"), "loss/mean")) == [5, 6]
    assert run.metrics("tokens/seen").to_arrow().num_rows == 6


def test_a_checkpoint_of_another_step_or_without_us_is_no_state_of_ours(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    for number, state in enumerate((None, {"step": 3, "run_id": "another"})):
        if state is not None:
            torch.save(state, checkpoint / "entropylens-rank-000.pt")
        found = trainer(tmp_path)
        attach(found, tmp_path / str(number), preset="full")
        found.train(resume_from_checkpoint=str(checkpoint))
        assert list(series(el.open_run(tmp_path / str(number)), "loss/mean")) == [5, 6]


@pytest.mark.parametrize("optimizer", ["adamw_torch", "adamw_torch_fused"])
def test_overflows_are_skips_also_under_the_fused_optimiser_that_hides_them(
    tmp_path: Path, optimizer: str
) -> None:
    class Moves(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.moved: list[bool] = []

        def on_step_begin(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            self.weight = model.lm_head.weight.detach().clone()

        def on_step_end(self, *args: Any, model: Any = None, **kwargs: Any) -> None:
            self.moved.append(not torch.equal(self.weight, model.lm_head.weight))

    moves = Moves()
    found = trainer(tmp_path, callbacks=[moves], optim=optimizer, max_steps=12, logging_steps=1)
    found.accelerator.scaler = gradient_scaler(torch.float16)
    found.accelerator.native_amp = True
    found.accelerator.state._mixed_precision = "fp16"
    try:
        attach(found, preset="full", max_overhead=None)
        found.train()
    finally:
        AcceleratorState._reset_state()
    run = run_of(found)
    skipped = series(run, "optimizer/skipped")
    assert [not value for value in skipped.values()] == moves.moved
    assert 0 < sum(skipped.values()) < 12
    for step, value in skipped.items():
        if not value:
            after = series(run, "gradient/norm/after_clip")[step]
            before = series(run, "gradient/norm/before_clip")[step]
            assert after == pytest.approx(min(before, 1.0), rel=1e-3)


def test_a_damaged_state_costs_the_continuation_and_not_the_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = trainer(tmp_path, save_strategy="steps", save_steps=4)
    attach(found, preset="full")
    found.train()
    checkpoint = tmp_path / "out" / "checkpoint-4"
    (checkpoint / "entropylens-rank-000.pt").write_bytes(b"torn")
    again = trainer(tmp_path)
    attach(again, preset="full")
    again.train(resume_from_checkpoint=str(checkpoint))
    assert any("expected our state in" in message for message in caplog.messages)
    assert list(series(run_of(found), "loss/mean")) == [1, 2, 3, 4, 5, 6]
    assert list(series(run_of(again, "entropylens-2"), "loss/mean")) == [5, 6]


def test_a_checkpoint_without_our_state_rewinds_nobodys_run(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=4).train()
    first = trainer(tmp_path)
    attach(first, preset="full")
    first.train()
    other = trainer(tmp_path)
    attach(other, preset="full")
    other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert list(series(run_of(first), "loss/mean")) == [1, 2, 3, 4, 5, 6]
    assert list(series(run_of(other, "entropylens-2"), "loss/mean")) == [5, 6]


def test_one_callback_object_sees_everything_of_a_second_trainer(tmp_path: Path) -> None:
    callback = EntropyLensCallback(tmp_path / "run", sample_id="name", preset="full")
    for number in (1, 2):
        trainer(tmp_path / str(number), callbacks=[callback]).train()
    run = el.open_run(tmp_path / "run-2")
    assert list(series(run, "loss/mean")) == [1, 2, 3, 4, 5, 6]
    assert list(series(run, "gradient/norm/before_clip")) == [1, 2, 3, 4, 5, 6]
    assert None not in run.samples().to_arrow()["sample_id"].to_pylist()
