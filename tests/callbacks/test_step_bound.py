"""Steps are bounded within the loops of others: Lightning, Hugging Face, TRL, and a plain one."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from accelerate.state import AcceleratorState
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback
from untouched import tiny
from untouched.in_lightning import Adversaries
from untouched.in_transformers import dpo, grpo, hf, sft

import entropylens as el
from entropylens_callbacks.lightning import EntropyLensCallback
from entropylens_callbacks.transformers import attach

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 36
SPIKE = range(25, 30)
"""Steps whose learning rate is a thousand times too high."""
OUTLIER = 30
"""The step whose batch is out of the ordinary."""
CLIP = 2.0
"""About twice an ordinary norm: once clipped, no gradient looks suspicious."""
ENFORCE = el.StepBound(mode="enforce", warmup=12)
SHADOW = el.StepBound(mode="shadow", warmup=12)


def actions(run_dir: Path) -> list[dict[str, Any]]:
    run = el.open_run(run_dir)
    assert run.status()[0].faults == {}
    return [e for e in run.events().to_arrow().to_pylist() if e["kind"] == "control"]


def evidence(run_dir: Path, step: int) -> dict[str, Any]:
    found = [e for e in actions(run_dir) if e["step"] == step]
    assert len(found) == 1
    return dict(json.loads(found[0]["evidence"]))


def scaler() -> torch.amp.GradScaler:
    """One under which nothing overflows."""
    return torch.amp.GradScaler("cpu", init_scale=16.0)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return torch.stack([(one[n] - other[n]).norm() for n in one]).norm().item()


def are_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


# -- Lightning -------------------------------------------------------------------------------------


class Learner(pl.LightningModule):  # type: ignore[misc]
    """Without dropout; how logits and classes are shown differs."""

    def __init__(self, shows: str = "returned", *, spikes: Iterable[int] = SPIKE) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, tiny.CLASSES))
        self.criterion = nn.CrossEntropyLoss()
        self.shows, self.spikes = shows, {*spikes}
        self.automatic_optimization = shows != "manual"
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.before: list[float] = []
        """Of each micro-batch but the first: the last one's loss, with this one's weights."""
        self._last: tuple[Tensor, Tensor] | None = None
        if shows == "returned":
            del self.criterion

    def training_step(self, batch: Any, number: int) -> Any:
        features, classes = batch
        if self._last is not None:
            with torch.no_grad():
                before = nn.functional.cross_entropy(self.net(self._last[0]), self._last[1])
            self.before.append(before.item())
        self._last = features, classes
        logits = self.net(features)
        if self.shows == "returned":
            loss = nn.functional.cross_entropy(logits, classes)
        else:
            loss = self.criterion(logits, classes)
        self.losses.append(loss.item())
        if self.shows == "manual":
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
            return None
        return {"loss": loss, "logits": logits, "targets": classes}

    def on_train_batch_start(self, batch: Any, number: int) -> None:
        step = self.current_epoch * self.trainer.num_training_batches + number + 1
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] = 1e-2 * (1000 if step in self.spikes else 1)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        self.norms.append(torch.stack([g.norm() for g in gradients]).norm().item())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.net.parameters(), lr=1e-2)


def stream(count: int, outliers: Iterable[int] = ()) -> DataLoader[Any]:
    """Micro-batches of a rule with some noise; those of an outlier have enormous features."""
    rule = torch.randn(8, tiny.CLASSES, generator=torch.Generator().manual_seed(3))
    drawn = tiny.class_batches()
    made = []
    for number in range(count):
        features, noise = next(drawn)
        classes = torch.where(torch.arange(len(noise)) == 0, noise, (features @ rule).argmax(1))
        made.append((features * (300 if number in {*outliers} else 1), classes))
    return DataLoader(made, batch_size=None)  # type: ignore[arg-type]


def fit(
    module: pl.LightningModule,
    folder: Path,
    control: el.StepBound | None,
    data: Any = None,
    *callbacks: Any,
    ckpt_path: str | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    own = [] if control is None else [EntropyLensCallback(folder / "run", control=control)]
    settings = {"max_epochs": 1, "enable_checkpointing": bool(callbacks), **options}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*own, *callbacks],
        default_root_dir=str(folder),
        **settings,
    )
    trainer.fit(module, data or stream(STEPS), ckpt_path=ckpt_path)
    return weights(module)


@pytest.mark.parametrize("shows", ["returned", "criterion", "manual"])
def test_a_spike_of_the_rate_does_no_harm_in_lightning(shows: str, tmp_path: Path) -> None:
    quiet = fit(Learner(shows, spikes=()), tmp_path / "quiet", None)
    harmed = fit(Learner(shows), tmp_path / "harmed", None)
    module = Learner(shows)
    guarded = fit(module, tmp_path, ENFORCE)
    assert distance(guarded, quiet) < 0.02 * distance(harmed, quiet)
    found = actions(tmp_path / "run")
    assert {e["step"] for e in found} & {*SPIKE}
    assert {e["mode"] for e in found} == {"enforce"}
    assert all(e["step"] >= SPIKE[0] and e["after"] < 1 for e in found)
    scales = el.open_run(tmp_path / "run").metrics("control/step_scale").to_arrow()
    by_step = dict(zip(scales["step"].to_pylist(), scales["value"].to_pylist(), strict=True))
    assert all(by_step[step] < 0.1 for step in SPIKE)
    # What the linearised loss was asked of is the last ordinary batch, not one before.
    expected = module.before[SPIKE[0] - 2]
    assert evidence(tmp_path / "run", SPIKE[0])["loss_without"] == pytest.approx(expected, rel=1e-4)


def test_in_shadow_the_spike_happens_in_lightning(tmp_path: Path) -> None:
    harmed = fit(Learner(), tmp_path / "harmed", None)
    watched = fit(Learner(), tmp_path, SHADOW)
    assert are_same(watched, harmed)
    found = actions(tmp_path / "run")
    assert {e["mode"] for e in found} == {"shadow"}
    assert SPIKE[0] in {e["step"] for e in found}
    assert all("would have" in e["message"] for e in found)


@pytest.mark.parametrize("shows", ["returned", "criterion"])
@pytest.mark.parametrize("scaled", [False, True])
def test_lightnings_clipping_hides_no_gradient_and_the_loss_comes_in_time(
    shows: str, scaled: bool, tmp_path: Path
) -> None:
    """Two micro-batches a step; of the outlier's one is ordinary."""
    module = Learner(shows, spikes=())
    options: dict[str, Any] = {"gradient_clip_val": CLIP, "accumulate_grad_batches": 2}
    if scaled:
        options["plugins"] = [MixedPrecision("16-mixed", "cpu", scaler())]
    data = stream(2 * STEPS, [2 * OUTLIER - 1])
    fit(module, tmp_path, ENFORCE, data, **options)
    found = evidence(tmp_path / "run", OUTLIER)
    assert found["gradient_norm"] == pytest.approx(module.norms[OUTLIER - 1], rel=1e-4)
    assert found["gradient_norm"] > 20 * found["typical"] > 0.1
    expected = sum(module.losses[2 * OUTLIER - 2 : 2 * OUTLIER]) / 2
    assert found["loss"] == pytest.approx(expected, rel=1e-3)


def test_two_optimisers_are_refused_in_lightning(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a model and one optimiser.*got a model and 2 optimi"):
        fit(Adversaries(), tmp_path, ENFORCE, stream(2))


def test_a_resumed_training_is_bounded_as_an_uninterrupted_one_in_lightning(
    tmp_path: Path,
) -> None:
    options: dict[str, Any] = {"max_epochs": 4}
    saver = ModelCheckpoint(tmp_path / "kept", every_n_epochs=1, save_top_k=-1)
    whole = fit(Learner(), tmp_path / "whole", ENFORCE, stream(10), saver, **options)
    kept = tmp_path / "kept" / "epoch=1-step=20.ckpt"
    found = fit(Learner(), tmp_path / "rest", ENFORCE, stream(10), ckpt_path=str(kept), **options)
    assert are_same(found, whole)
    alike = ("step", "message", "after")
    one, other = (
        [{k: e[k] for k in alike} for e in actions(tmp_path / name / "run")]
        for name in ("whole", "rest")
    )
    assert one
    assert [e for e in one if e["step"] > 20] == [e for e in other if e["step"] > 20]


# -- Hugging Face and TRL --------------------------------------------------------------------------


class Spiking(TrainerCallback):  # type: ignore[misc]
    """Multiplies the learning rate of some steps; the scheduler puts it back after each."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 in SPIKE:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = args.learning_rate * 1000


CONSTANT = {"lr_scheduler_type": "constant", "learning_rate": 1e-3, "max_steps": STEPS}


def train(
    make: Callable[..., Any],
    folder: Path,
    control: el.StepBound | None,
    *,
    spikes: bool = True,
    resume: str | None = None,
    model: Any = None,
    **options: Any,
) -> Any:
    torch.manual_seed(0)
    given = {} if model is None else {"model": model}
    trainer = make(folder, **given, **{**CONSTANT, **options})
    trainer.remove_callback(PrinterCallback)
    if spikes:
        trainer.add_callback(Spiking())
    if control is not None:
        attach(trainer, folder / "run", control=control)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_a_spike_of_the_rate_does_no_harm_in_transformers(tmp_path: Path) -> None:
    quiet = weights(train(hf, tmp_path / "quiet", None, spikes=False).model)
    harmed = weights(train(hf, tmp_path / "harmed", None).model)
    guarded = weights(train(hf, tmp_path / "guarded", ENFORCE).model)
    assert distance(guarded, quiet) < 0.02 * distance(harmed, quiet)
    found = actions(tmp_path / "guarded" / "run")
    assert {e["mode"] for e in found} == {"enforce"}
    assert all(e["step"] >= SPIKE[0] for e in found)
    first = evidence(tmp_path / "guarded" / "run", SPIKE[0])
    assert first["loss_without"] > 0
    assert first["rate"] == pytest.approx(1.0)
    shadowed = train(hf, tmp_path / "shadowed", SHADOW)
    assert are_same(weights(shadowed.model), harmed)
    assert {e["mode"] for e in actions(tmp_path / "shadowed" / "run")} == {"shadow"}


def test_a_resumed_training_is_bounded_as_an_uninterrupted_one_in_transformers(
    tmp_path: Path,
) -> None:
    whole = train(hf, tmp_path / "whole", ENFORCE, save_strategy="steps", save_steps=20)
    checkpoint = tmp_path / "whole" / "out" / "checkpoint-20"
    resumed = train(hf, tmp_path / "rest", ENFORCE, resume=str(checkpoint))
    assert are_same(weights(resumed.model), weights(whole.model))
    one, other = (
        [(e["step"], e["message"], e["after"]) for e in actions(tmp_path / name / "run")]
        for name in ("whole", "rest")
    )
    assert one
    assert [e for e in one if e[0] > 20] == [e for e in other if e[0] > 20]


class _Outlying:
    """Multiplies the loss of one step, as a bad batch would."""

    def __init__(self, compute: Callable[..., Any], parts: int) -> None:
        self._compute, self._parts, self._calls = compute, parts, 0
        self.losses: list[float] = []

    def __call__(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        self._calls += 1
        loss = self._compute(model, inputs, *args, **kwargs)
        loss = loss * 1e3 if self._calls == OUTLIER * self._parts else loss
        self.losses.append(loss.item())
        return loss


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("scaled", [False, True])
def test_transformers_clipping_hides_no_gradient_and_the_loss_comes_in_time(
    parts: int, scaled: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    options = {**CONSTANT, "gradient_accumulation_steps": parts, "max_grad_norm": CLIP}
    trainer = hf(tmp_path, **options)
    trainer.remove_callback(PrinterCallback)
    trainer.compute_loss = told = _Outlying(trainer.compute_loss, parts)
    if scaled:
        trainer.accelerator.scaler = scaler()
        trainer.accelerator.native_amp = True
        trainer.accelerator.state._mixed_precision = "fp16"
    attach(trainer, tmp_path / "run", control=ENFORCE)
    try:
        trainer.train()
    finally:
        AcceleratorState._reset_state()
    found = evidence(tmp_path / "run", OUTLIER)
    logged = {e["step"]: e for e in trainer.state.log_history if "grad_norm" in e}
    assert found["gradient_norm"] == pytest.approx(logged[OUTLIER]["grad_norm"], rel=1e-4)
    assert found["gradient_norm"] > 100 * found["typical"] > 0.1
    expected = sum(told.losses[parts * (OUTLIER - 1) : parts * OUTLIER])
    assert found["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_lora_adapter_is_guarded(tmp_path: Path) -> None:
    trainer = train(hf, tmp_path, ENFORCE, model=tiny.lora(tiny.llama()))
    first = evidence(tmp_path / "run", SPIKE[0])
    assert first["loss_without"] > 0
    assert trainer.state.global_step == STEPS


def test_supervised_fine_tuning_with_a_fused_head_is_guarded(tmp_path: Path) -> None:
    quiet = weights(train(sft, tmp_path / "quiet", None, spikes=False).model)
    harmed = weights(train(sft, tmp_path / "harmed", None).model)
    guarded = weights(train(sft, tmp_path / "guarded", ENFORCE).model)
    assert distance(guarded, quiet) < 0.02 * distance(harmed, quiet)
    first = evidence(tmp_path / "guarded" / "run", SPIKE[0])
    assert first["loss_without"] > 0
    assert first["loss_with"] > first["loss_without"]


def test_a_policy_is_guarded_without_taking_its_likelihood_for_its_loss(tmp_path: Path) -> None:
    harmed = train(grpo, tmp_path / "harmed", None)
    guarded = train(grpo, tmp_path / "guarded", ENFORCE)
    assert guarded.state.global_step == STEPS
    first = evidence(tmp_path / "guarded" / "run", SPIKE[0])
    assert first["ratio"] > 0
    assert "loss_without" not in first
    start = weights(tiny_start())
    assert distance(weights(guarded.model), start) < 0.02 * distance(weights(harmed.model), start)


def test_preferences_are_guarded_without_taking_likelihood_for_their_loss(tmp_path: Path) -> None:
    train(dpo, tmp_path, ENFORCE)
    first = evidence(tmp_path / "run", SPIKE[0])
    assert first["ratio"] > 0
    assert "loss_without" not in first


def tiny_start() -> nn.Module:
    torch.manual_seed(0)
    return tiny.llama()


# -- a plain loop ----------------------------------------------------------------------------------


def loop(folder: Path, *, is_late: bool) -> Iterator[tuple[int, Any, Tensor]]:
    module, data = Learner(), iter(stream(STEPS))
    optimizer = module.configure_optimizers()
    with el.Lens(module.net, optimizer, run_dir=folder / "run", control=ENFORCE) as lens:
        for step in range(1, STEPS + 1):
            optimizer.param_groups[0]["lr"] = 10.0 if step in SPIKE else 1e-2
            features, classes = next(data)
            logits = module.net(features)
            loss = nn.functional.cross_entropy(logits, classes)
            (loss * (1e3 if step == SPIKE[-1] + 3 else 1)).backward()
            norm = nn.utils.clip_grad_norm_(module.parameters(), CLIP)
            shown: dict[str, Any] = {"logits": logits, "targets": classes}
            if not is_late:
                lens.observe(**shown, loss=loss, gradient_norm=norm)
            optimizer.step()
            optimizer.zero_grad()
            lens.step(**(shown if is_late else {}))
            yield step, norm, loss


@pytest.mark.parametrize("is_late", [False, True])
def test_what_a_plain_loop_shows_before_or_after_the_step_is_used(
    is_late: bool, tmp_path: Path
) -> None:
    steps = {step: (norm, loss) for step, norm, loss in loop(tmp_path, is_late=is_late)}
    assert evidence(tmp_path / "run", SPIKE[0])["loss_without"] > 0
    outlier = SPIKE[-1] + 3
    told = [e for e in actions(tmp_path / "run") if e["step"] == outlier and "grad" in e["message"]]
    assert len(told) == (not is_late)
    if told:
        found = json.loads(told[0]["evidence"])
        assert found["gradient_norm"] == pytest.approx(steps[outlier][0].item())
        assert found["loss"] == pytest.approx(steps[outlier][1].item())


def test_a_loss_that_a_plain_loop_shows_after_the_step_is_not_taken_for_the_next_ones(
    tmp_path: Path,
) -> None:
    module, data = Learner(), iter(stream(STEPS))
    optimizer = module.configure_optimizers()
    with el.Lens(module.net, optimizer, run_dir=tmp_path / "run", control=ENFORCE) as lens:
        for step in range(1, STEPS + 1):
            features, classes = next(data)
            loss = nn.functional.cross_entropy(module.net(features), classes)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            lens.observe(loss=loss * (1e3 if step == OUTLIER else 1))
            lens.step()
    looks = el.open_run(tmp_path / "run").metrics("control/looks/count").to_arrow()["value"]
    assert max(looks.to_pylist()) == 0
