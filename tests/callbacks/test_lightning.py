import csv
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from time import sleep
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor, nn
from torch.utils.data import DataLoader
from untouched import tiny
from untouched.in_lightning import (
    Adversaries,
    Classifier,
    LanguageModel,
    Manual,
    WithCriterion,
    mixed,
)

import entropylens as el
from entropylens_callbacks.lightning import EntropyLensCallback

pytestmark = pytest.mark.filterwarnings("ignore")

FULL: Mapping[str, Any] = {"preset": "full", "max_overhead": None}


def trainer(folder: Path, *callbacks: Any, **options: Any) -> pl.Trainer:
    settings = {
        "accelerator": "cpu",
        "max_epochs": 1,
        "logger": False,
        "log_every_n_steps": 2,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": str(folder),
        **options,
    }
    return pl.Trainer(callbacks=list(callbacks), **settings)


def loader(count: int = 8, *, tokens: bool = False) -> DataLoader[Any]:
    batches: Any = tiny.token_batches() if tokens else tiny.class_batches()
    return DataLoader([next(batches) for _ in range(count)], batch_size=None)  # type: ignore[arg-type]


def series(run: el.Run, name: str, module: str = "", **filters: Any) -> dict[int, float]:
    table = run.metrics(name, module, **filters).to_arrow()
    return dict(zip(table["step"].to_pylist(), table["value"].to_pylist(), strict=True))


def run_of(folder: Path, name: str = "entropylens") -> el.Run:
    return el.open_run(folder / name)


def test_logits_and_targets_that_a_step_returns_are_measured(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Classifier()
    trainer(tmp_path, EntropyLensCallback(**FULL), gradient_clip_val=0.2).fit(module, loader())
    run = run_of(tmp_path)
    assert run.state() == "finished"
    losses = series(run, "loss/mean")
    assert list(losses) == list(range(1, 9))
    assert list(losses.values()) == pytest.approx(module.losses, rel=1e-6)
    assert series(run, "surprisal/token/mean") == pytest.approx(losses, rel=1e-5)
    before = series(run, "gradient/norm/before_clip")
    after = series(run, "gradient/norm/after_clip")
    assert any(norm > 0.2 for norm in before.values())
    for step, norm in before.items():
        assert after[step] == pytest.approx(min(norm, 0.2), rel=1e-3)
    # StepLR halves it after five steps: what a step used, not what the next one will.
    assert series(run, "learning_rate") == pytest.approx(
        {step: 1e-2 if step <= 5 else 5e-3 for step in range(1, 9)}
    )
    assert run.status()[0].faults == {}


def test_accumulated_micro_batches_make_one_step_with_their_mean_loss(tmp_path: Path) -> None:
    """The last step of the epoch has one micro-batch, which Lightning divides by three as well."""
    module = WithCriterion()
    callback = EntropyLensCallback(**FULL)
    trainer(tmp_path, callback, accumulate_grad_batches=3).fit(module, loader(7))
    run = run_of(tmp_path)
    means = [sum(module.losses[:3]) / 3, sum(module.losses[3:6]) / 3, module.losses[6]]
    assert list(series(run, "loss/mean").values()) == pytest.approx(means, rel=1e-6)
    assert list(series(run, "surprisal/token/mean").values()) == pytest.approx(means, rel=1e-5)
    assert series(run, "tokens/step") == {1: 12.0, 2: 12.0, 3: 4.0}


def test_steps_in_which_nothing_is_due_are_counted_as_batches_that_stepped(tmp_path: Path) -> None:
    module = WithCriterion()
    off = {"token_entropy", "surprisal", "token_table", "sample_table", "update_norm"}
    every = {"training_vitals": 6, "gradient_norm": 9, **dict.fromkeys(off, False)}
    callback = EntropyLensCallback(diagnostics=every, max_overhead=None)
    trainer(tmp_path, callback, accumulate_grad_batches=2).fit(module, loader(48))
    run = run_of(tmp_path)
    assert list(series(run, "loss/mean")) == [1, 6, 12, 18, 24]
    assert list(series(run, "gradient/norm/after_clip")) == [1, 9, 18]
    for step, loss in series(run, "loss/mean").items():
        first = 2 * step - 2
        assert loss == pytest.approx(sum(module.losses[first : first + 2]) / 2, rel=1e-6)
    assert run.status()[0].step == 24


def test_manual_optimisation_has_the_loss_that_its_step_follows(tmp_path: Path) -> None:
    module = Manual()
    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(module, loader())
    run = run_of(tmp_path)
    pairs = zip(module.losses[::2], module.losses[1::2], strict=True)
    assert list(series(run, "loss/mean").values()) == pytest.approx([a + b for a, b in pairs])
    assert max(series(run, "gradient/norm/after_clip").values()) <= 0.5 + 1e-4
    assert run.status()[0].faults == {}


def test_each_of_several_optimisers_has_its_own_loss_rate_and_norm(tmp_path: Path) -> None:
    module = Adversaries()
    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(module, loader())
    run = run_of(tmp_path)
    for number in (0, 1):
        name = f"optimizer{number}"
        losses = series(run, "loss/mean", name)
        assert list(losses) == list(range(1, 9))
        assert list(losses.values()) == pytest.approx(module.losses[number::2], rel=1e-6)
        assert len(series(run, "gradient/norm/after_clip", name)) == 8
    assert set(series(run, "learning_rate", "optimizer1").values()) == {0.1}
    assert series(run, "loss/mean") == {}


def test_a_model_of_transformers_within_is_read_and_the_frozen_one_beside_it_is_not(
    tmp_path: Path,
) -> None:
    class Plain(LanguageModel):
        def training_step(self, batch: Tensor, number: int) -> Tensor:
            self.reference(input_ids=batch, labels=batch)
            return self.keep(self.model(input_ids=batch, labels=batch).loss)

    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(Plain(), loader(tokens=True))
    run = run_of(tmp_path)
    assert series(run, "surprisal/token/mean") == pytest.approx(series(run, "loss/mean"), rel=1e-5)
    assert set(series(run, "tokens/step").values()) == {4.0 * 11}


@pytest.mark.parametrize("is_headless", [True, False])
def test_a_loss_module_over_a_model_of_transformers_is_read(
    tmp_path: Path, is_headless: bool
) -> None:
    class Over(WithCriterion):
        def __init__(self) -> None:
            super().__init__()
            found = tiny.llama()
            self.encoder = found.model if is_headless else found
            self.head = nn.Linear(16, len(tiny.VOCABULARY))

        def training_step(self, batch: Tensor, number: int) -> Tensor:
            out = self.encoder(input_ids=batch)
            logits = self.head(out.last_hidden_state) if is_headless else out.logits
            return self.keep(self.criterion(logits[:, :-1].movedim(-1, 1), batch[:, 1:]))

    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(Over(), loader(tokens=True))
    run = run_of(tmp_path)
    assert series(run, "surprisal/token/mean") == pytest.approx(series(run, "loss/mean"), rel=1e-5)
    said = [e["message"] for e in run.events().to_arrow().to_pylist() if e["kind"] == "capture"]
    assert not any("no token statistics" in message for message in said)


def test_a_submodule_can_be_named_and_what_cannot_be_found_is_told(tmp_path: Path) -> None:
    class Two(LanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.reference.requires_grad_(True)

    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(Two(), loader(tokens=True))
    run = run_of(tmp_path)
    assert series(run, "entropy/token/mean") == {}
    (event,) = (e for e in run.events().to_arrow().to_pylist() if e["kind"] == "capture")
    assert "name the module that has them" in event["message"]
    named = EntropyLensCallback(tmp_path / "named", module="model", **FULL)
    trainer(tmp_path, named).fit(Two(), loader(tokens=True))
    assert len(series(run_of(tmp_path, "named"), "entropy/token/mean")) == 8
    with pytest.raises(AttributeError, match="nowhere"):
        trainer(tmp_path, EntropyLensCallback(module="nowhere")).fit(Two(), loader(tokens=True))


class Moves(pl.Callback):  # type: ignore[misc]
    """Whether the weights moved in each batch."""

    def __init__(self) -> None:
        self.moved: list[bool] = []

    def on_train_start(self, trainer: Any, module: Any) -> None:
        self.weight = module.net.layers[0].weight.detach().clone()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        weight = module.net.layers[0].weight.detach().clone()
        self.moved.append(not torch.equal(weight, self.weight))
        self.weight = weight


@pytest.mark.parametrize("kind", ["automatic", "automatic, fused", "manual"])
def test_overflows_under_a_scaler_are_skips_and_losses_have_no_scale(
    tmp_path: Path, kind: str
) -> None:
    torch.manual_seed(0)
    module = Manual() if kind == "manual" else Classifier(fused="fused" in kind)
    watched, moves = EntropyLensCallback(**FULL), Moves()
    trainer(tmp_path, watched, moves, plugins=mixed()).fit(module, loader(20))
    moved, losses = moves.moved, module.losses
    if kind == "manual":
        moved = moved[1::2]
        losses = [a + b for a, b in zip(losses[::2], losses[1::2], strict=True)]
    run = run_of(tmp_path)
    skipped = series(run, "optimizer/skipped")
    assert [not value for value in skipped.values()] == moved
    assert 0 < sum(skipped.values()) < len(skipped)
    assert list(series(run, "loss/mean").values()) == pytest.approx(losses, rel=1e-3)
    assert run.status()[0].faults == {}


def test_our_metrics_reach_the_users_loggers_and_theirs_reach_our_log(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(str(tmp_path / "csv"))
    module = Classifier()
    fitted = trainer(tmp_path, EntropyLensCallback(**FULL), logger=logger)
    fitted.fit(module, loader(), loader(2))
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    ours = {int(r["step"]): float(r["entropylens/entropy/token/mean"]) for r in rows
            if r["entropylens/entropy/token/mean"]}  # fmt: skip
    run = run_of(tmp_path)
    entropy = series(run, "entropy/token/mean")
    # Lightning's loggers count steps from 0.
    assert ours == pytest.approx({step - 1: entropy[step] for step in (2, 4, 6, 8)}, rel=1e-6)
    losses = series(run, "loss/mean", phases="train")
    theirs = series(run, "framework/train_loss", phases="train")
    assert theirs == pytest.approx({step: losses[step] for step in (2, 4, 6, 8)}, rel=1e-6)
    assert series(run, "loss/mean", phases="eval") == {8: 0.5}
    assert series(run, "framework/val_loss", phases="eval") == {8: 0.5}
    assert len(fitted.loggers) == 1


def test_without_a_logger_evaluation_is_written_all_the_same(tmp_path: Path) -> None:
    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(Classifier(), loader(), loader(2))
    assert series(run_of(tmp_path), "loss/mean", phases="eval") == {8: 0.5}


def test_which_metrics_are_passed_on_can_be_said(tmp_path: Path) -> None:
    logger = pl.loggers.CSVLogger(str(tmp_path / "csv"))
    callback = EntropyLensCallback(forward=["surprisal/*"], **FULL)
    trainer(tmp_path, callback, logger=logger).fit(Classifier(), loader())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        columns = next(csv.reader(file))
    ours = {column for column in columns if column.startswith("entropylens/")}
    assert "entropylens/surprisal/token/p95" in ours
    assert all(column.startswith("entropylens/surprisal/") for column in ours)


def test_a_checkpoint_continues_the_run_with_every_step_once(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1)
    module = Classifier()
    trainer(tmp_path, EntropyLensCallback(**FULL), keep, enable_checkpointing=True).fit(
        module, loader()
    )
    checkpoint = next(path for path in (tmp_path / "kept").glob("*.ckpt") if "step=3" in path.name)
    again = Classifier()
    trainer(tmp_path, EntropyLensCallback(**FULL), keep, enable_checkpointing=True).fit(
        again, loader(), ckpt_path=str(checkpoint)
    )
    run = run_of(tmp_path)
    assert [attempt["start_step"] for attempt in run.attempts] == [0, 3]
    losses = series(run, "loss/mean")
    assert list(losses) == list(range(1, 9))
    assert run.metrics("loss/mean").to_arrow().num_rows == 8
    assert list(losses.values()) == pytest.approx([*module.losses[:3], *again.losses], rel=1e-6)
    assert list(series(run, "tokens/seen").values()) == [4.0 * step for step in range(1, 9)]


def test_a_checkpoint_without_our_state_continues_at_its_step(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3, save_top_k=-1)
    trainer(tmp_path, keep, enable_checkpointing=True).fit(Classifier(), loader())
    checkpoint = next(path for path in (tmp_path / "kept").glob("*.ckpt") if "step=6" in path.name)
    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(
        Classifier(), loader(), ckpt_path=str(checkpoint)
    )
    run = run_of(tmp_path)
    assert list(series(run, "loss/mean")) == [7, 8]
    assert series(run, "tokens/seen") == {}


def foreign(folder: Path) -> str:
    """A checkpoint, at step 4, of a training that nobody watched."""
    keep = ModelCheckpoint(folder, filename="foreign", every_n_train_steps=4)
    trainer(folder, keep, enable_checkpointing=True, max_steps=4).fit(Classifier(), loader())
    return str(folder / "foreign.ckpt")


def test_a_foreign_checkpoint_rewinds_nobodys_run(tmp_path: Path) -> None:
    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(Classifier(), loader())
    callback = EntropyLensCallback(**FULL)
    trainer(tmp_path, callback).fit(Classifier(), loader(), ckpt_path=foreign(tmp_path / "kept"))
    assert list(series(run_of(tmp_path), "loss/mean")) == list(range(1, 9))
    assert list(series(run_of(tmp_path, "entropylens-2"), "loss/mean")) == [5, 6, 7, 8]
    # The same object in another Trainer has the state of the first, which is none of its own.
    trainer(tmp_path, callback).fit(Classifier(), loader(), ckpt_path=foreign(tmp_path / "more"))
    assert list(series(run_of(tmp_path, "entropylens-3"), "loss/mean")) == [5, 6, 7, 8]


def test_a_checkpoint_made_before_we_counted_the_step_resumes_with_its_number(
    tmp_path: Path,
) -> None:
    class Early(pl.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "early.ckpt")

    first, second = Classifier(), Classifier()
    trainer(tmp_path, Early(), EntropyLensCallback(**FULL)).fit(first, loader())
    resumed = trainer(tmp_path, EntropyLensCallback(**FULL))
    resumed.fit(second, loader(), ckpt_path=str(tmp_path / "early.ckpt"))
    losses = series(run_of(tmp_path), "loss/mean")
    assert list(losses) == list(range(1, 5 + len(second.losses)))
    assert list(losses.values())[4:] == pytest.approx(second.losses, rel=1e-6)


def test_a_logger_that_raises_does_not_keep_the_others_from_our_metrics(tmp_path: Path) -> None:
    class Broken(pl.loggers.CSVLogger):  # type: ignore[misc]
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if any(name.startswith("entropylens/") for name in metrics):
                raise OSError("no space")

    behind = pl.loggers.CSVLogger(str(tmp_path / "behind"))
    loggers = [Broken(str(tmp_path / "broken")), behind]
    trainer(tmp_path, EntropyLensCallback(**FULL), logger=loggers).fit(Classifier(), loader())
    text = (Path(behind.log_dir) / "metrics.csv").read_text()
    assert "entropylens/entropy/token/mean" in text
    assert run_of(tmp_path).status()[0].faults == {"forward to Broken: OSError": 4}


def test_losses_that_no_optimiser_of_lightnings_follows_are_not_kept(tmp_path: Path) -> None:
    class Raw(Manual):
        def training_step(self, batch: Any, number: int) -> None:
            optimizer = self.optimizers(use_pl_optimizer=False)
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self.net(batch[0]), batch[1]))
            optimizer.step()

    callback = EntropyLensCallback(**FULL)
    trainer(tmp_path, callback).fit(Raw(), loader())
    assert callback._losses == []
    assert len(series(run_of(tmp_path), "gradient/norm/after_clip")) == 8


def test_manual_optimisation_has_no_norm_before_its_own_clipping(tmp_path: Path) -> None:
    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(Manual(), loader())
    assert series(run_of(tmp_path), "gradient/norm/before_clip") == {}


def test_fit_called_again_goes_on_and_leaves_no_hook(tmp_path: Path) -> None:
    module, callback = WithCriterion(), EntropyLensCallback(**FULL)
    fitted = trainer(tmp_path, callback)
    fitted.fit(module, loader())
    fitted.fit_loop.max_epochs = 2
    fitted.fit(module, loader())
    assert list(series(run_of(tmp_path), "loss/mean")) == list(range(1, 17))
    assert not module.criterion._forward_hooks
    assert callback.lens is None
    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(WithCriterion(), loader())
    assert list(series(run_of(tmp_path, "entropylens-2"), "loss/mean")) == list(range(1, 9))


@pytest.mark.parametrize(
    ("error", "state"), [(RuntimeError, "failed"), (KeyboardInterrupt, "terminated")]
)
def test_an_exception_seals_the_log_takes_the_hooks_out_and_goes_on_up(
    tmp_path: Path, error: type[BaseException], state: str
) -> None:
    class Broken(WithCriterion):
        def on_train_batch_start(self, batch: Any, number: int) -> None:
            if number == 3:
                raise error("out of luck")

    module = Broken()
    with pytest.raises((error, SystemExit)):
        trainer(tmp_path, EntropyLensCallback(**FULL)).fit(module, loader())
    run = run_of(tmp_path)
    assert run.state() == state
    assert list(series(run, "loss/mean")) == [1, 2, 3]
    assert not module.criterion._forward_hooks


def test_a_fault_of_ours_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(EntropyLensCallback, "_show_batch", broken)
    monkeypatch.setattr(EntropyLensCallback, "_show_before_step", broken)
    monkeypatch.setattr(el.Lens, "state_dict", broken)
    module = Classifier()
    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(module, loader())
    assert len(module.losses) == 8
    assert run_of(tmp_path).status()[0].faults == {
        "batch end: RuntimeError": 8,
        "before step: RuntimeError": 8,
        "state: RuntimeError": 1,
    }


@pytest.mark.parametrize(
    ("logits", "targets", "tokens"),
    [
        (torch.zeros(2, 3, 4, 5), torch.zeros(2, 4, 5).long(), 40),
        (torch.zeros(4, 3), torch.zeros(4, 3), None),
        (torch.zeros(4), torch.zeros(4).long(), None),
        (torch.zeros(4, 3), torch.zeros(7).long(), None),
    ],
    ids=["segmentation", "regression", "binary", "something else"],
)
def test_what_a_step_returns_under_these_names_is_read_only_where_it_is_classes(
    tmp_path: Path, logits: Tensor, targets: Tensor, tokens: int | None
) -> None:
    class Returns(Classifier):
        def training_step(self, batch: Any, number: int) -> Any:
            loss = super().training_step(batch, number)["loss"]
            return {"loss": loss, "logits": logits, "targets": targets}

    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(Returns(), loader())
    run = run_of(tmp_path)
    expected = {} if tokens is None else dict.fromkeys(range(1, 9), float(tokens))
    assert series(run, "tokens/step") == expected
    assert run.status()[0].faults == {}


def test_an_optimiser_that_steps_thrice_in_a_batch_is_read_once(tmp_path: Path) -> None:
    class Eager(Adversaries):
        def training_step(self, batch: Any, number: int) -> None:
            _, critic = self.optimizers()
            for _ in range(3):
                loss = self.keep((self.critic(batch[0]) - 1).square().mean())
                critic.zero_grad()
                self.manual_backward(loss)
                critic.step()

    module = Eager()
    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(module, loader())
    run = run_of(tmp_path)
    losses = series(run, "loss/mean", "optimizer1")
    assert list(losses.values()) == pytest.approx(module.losses[::3], rel=1e-6)
    assert run.metrics("gradient/norm/after_clip").to_arrow().num_rows == 8


def test_a_module_may_use_the_experiments_of_all_loggers(tmp_path: Path) -> None:
    class Draws(WithCriterion):
        def on_train_batch_end(self, *_: Any) -> None:
            for logger in self.loggers:
                logger.experiment.log_metrics({"drawn": 1.0}, 0)

    logger = pl.loggers.CSVLogger(str(tmp_path / "csv"))
    trainer(tmp_path, EntropyLensCallback(**FULL), logger=logger).fit(Draws(), loader())
    assert run_of(tmp_path).state() == "finished"


def test_a_checkpoints_time_is_no_steps_time(tmp_path: Path) -> None:
    class Slow(TorchCheckpointIO):  # type: ignore[misc]
        def save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
            sleep(0.5)
            super().save_checkpoint(*args, **kwargs)

    keep = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=3)
    trainer(tmp_path, EntropyLensCallback(**FULL), keep, enable_checkpointing=True,
            plugins=[Slow()]).fit(Classifier(), loader())  # fmt: skip
    seconds = series(run_of(tmp_path), "step/seconds")
    assert all(seconds[step] < 0.4 for step in range(2, 9))


def test_samples_bear_the_names_of_the_batch(tmp_path: Path) -> None:
    class Named(Classifier):
        def training_step(self, batch: Any, number: int) -> Any:
            return super().training_step((batch["x"], batch["y"]), number)

    batches = tiny.class_batches()
    data = []
    for number in range(4):
        features, classes = next(batches)
        data.append({"x": features, "y": classes, "id": [f"{number}.{row}" for row in range(4)]})
    callback = EntropyLensCallback(sample_id="id", **FULL)
    loading: DataLoader[Any] = DataLoader(data, batch_size=None)  # type: ignore[arg-type]
    trainer(tmp_path, callback).fit(Named(), loading)
    rows = run_of(tmp_path).samples().to_arrow().to_pylist()
    assert rows
    assert all(row["sample_id"].startswith(f"{row['step'] - 1}.") for row in rows)


def test_the_environment_attaches_it_through_lightnings_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (entry,) = (
        e for e in entry_points(group="lightning.pytorch.callbacks_factory")
        if e.name == "entropylens"
    )  # fmt: skip
    monkeypatch.delenv("ENTROPYLENS", raising=False)
    assert entry.load()() == []
    monkeypatch.setenv("ENTROPYLENS", "0")
    assert entry.load()() == []
    monkeypatch.setenv("ENTROPYLENS", "full")
    trainer(tmp_path).fit(WithCriterion(), loader())
    run = run_of(tmp_path)
    assert run.config["preset"] == "full"
    assert len(series(run, "loss/mean")) == 8
    monkeypatch.setenv("ENTROPYLENS", "1")
    trainer(tmp_path).fit(WithCriterion(), loader())
    assert run_of(tmp_path, "entropylens-2").config["preset"] == "balanced"
    monkeypatch.setenv("ENTROPYLENS", "ful")
    with pytest.raises(ValueError, match=r"ENTROPYLENS: .* did you mean 'full'"):
        trainer(tmp_path)


def test_a_callback_of_the_users_own_is_the_only_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENTROPYLENS", "1")
    trainer(tmp_path, EntropyLensCallback(tmp_path / "mine", **FULL)).fit(Classifier(), loader())
    assert [run.path.name for run in el.list_runs(tmp_path)] == ["mine"]


def test_a_step_that_lightning_skips_is_no_fault(tmp_path: Path) -> None:
    class Picky(WithCriterion):
        def training_step(self, batch: Any, number: int) -> Any:
            return None if number == 2 else super().training_step(batch, number)

    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(Picky(), loader())
    run = run_of(tmp_path)
    assert set(series(run, "loss/mean")) == {1, 2, 4, 5, 6, 7, 8}
    assert run.status()[0].faults == {}


def test_a_module_that_validates_with_gradients_is_not_taken_for_training(tmp_path: Path) -> None:
    class Curious(WithCriterion):
        def validation_step(self, batch: Any, number: int) -> None:
            with torch.enable_grad():
                self.criterion(self.net(batch[0]), batch[1])

    module = Curious()
    fitted = trainer(tmp_path, EntropyLensCallback(**FULL), inference_mode=False,
                     val_check_interval=2)  # fmt: skip
    fitted.fit(module, loader(), loader(2))
    assert set(series(run_of(tmp_path), "tokens/step").values()) == {4.0}


def test_a_module_without_anything_to_read_still_has_its_vitals(tmp_path: Path) -> None:
    class Regression(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(8, 1)

        def training_step(self, batch: Any, number: int) -> Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer(tmp_path, EntropyLensCallback(**FULL)).fit(Regression(), loader())
    run = run_of(tmp_path)
    assert len(series(run, "loss/mean")) == len(series(run, "gradient/norm/before_clip")) == 8
    assert series(run, "entropy/token/mean") == {}
