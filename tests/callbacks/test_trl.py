"""TRL's fused heads: entropy as TRL logs it, and what it does not compute, from hidden states."""

from pathlib import Path
from typing import Any

import pytest
import torch
from trl_runs import logged, series, trained
from untouched import tiny
from untouched.in_transformers import dpo, sft
from untouched.trainings import STEPS

import entropylens as el
from entropylens_callbacks.transformers import EntropyLensCallback

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("lora", [False, True], ids=["all parameters", "lora"])
@pytest.mark.parametrize("make", [sft, dpo])
def test_entropy_and_loss_equal_trls_own_log(tmp_path: Path, make: Any, lora: bool) -> None:
    trainer = make(tmp_path, tiny.lora_config() if lora else None)
    run = trained(trainer, tmp_path)
    theirs = logged(trainer, "entropy")
    assert list(theirs) == list(range(1, STEPS + 1))
    assert series(run, "entropy/token/mean") == pytest.approx(theirs, abs=1e-5)
    assert series(run, "framework/entropy") == pytest.approx(theirs)
    assert series(run, "loss/mean") == pytest.approx(logged(trainer, "loss"), abs=1e-5)
    if make is sft:
        loss = series(run, "loss/mean")
        assert series(run, "surprisal/token/mean") == pytest.approx(loss, rel=1e-5)


def test_entropy_is_complete_however_few_rows_are_projected(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    run = trained(trainer, tmp_path, rows=5)
    assert series(run, "entropy/token/mean") == pytest.approx(logged(trainer, "entropy"), abs=1e-5)
    counts = run.metrics("varentropy/token/mean").to_arrow()
    tokens = series(run, "tokens/step")
    assert [tokens[step] for step in counts["step"].to_pylist()] == counts["weight"].to_pylist()


def test_what_the_head_does_not_compute_equals_a_float64_reference(tmp_path: Path) -> None:
    """With a learning rate of 0 the model that was measured is the one at hand."""
    trainer = sft(tmp_path, learning_rate=0.0, max_steps=3)
    trainer.model.eval()
    for module in trainer.model.modules():
        module.train = lambda mode=True, module=module: module  # no dropout while it trains
    seen: list[Any] = []
    compute = trainer.compute_loss

    def keep(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append({k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)})
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = keep
    run = trained_in_eval(trainer, tmp_path)
    found = trainer.model.double()
    for step, inputs in enumerate(seen[1:], start=2):
        labels = inputs.pop("labels")
        with torch.no_grad():
            logits = found(**inputs).logits[:, :-1]
        logp = logits.log_softmax(-1)[labels[:, 1:] >= 0]
        entropy = -(logp.exp() * logp).sum(-1)
        varentropy = (logp.exp() * (logp + entropy[:, None]) ** 2).sum(-1).mean().item()
        best = logp.exp().amax(-1).mean().item()
        assert series(run, "varentropy/token/mean")[step] == pytest.approx(varentropy, rel=1e-5)
        assert series(run, "probability/max/mean")[step] == pytest.approx(best, rel=1e-5)
        assert series(run, "entropy/token/mean")[step] == pytest.approx(
            entropy.mean().item(), rel=1e-6
        )


def trained_in_eval(trainer: Any, folder: Path) -> el.Run:
    """The adapter reads training forwards; this model only looks as if it were evaluated."""
    trainer.model.training = True
    return trained(trainer, folder)


def test_packed_documents_are_sequences_of_their_own(tmp_path: Path) -> None:
    """Packed or padded, a sequence is one addition and not a row full of them."""
    trainer = sft(tmp_path, packing=True, max_length=48, per_device_train_batch_size=1, max_steps=2)
    run = trained(trainer, tmp_path)
    longest = [row for row in run.samples().to_arrow().to_pylist() if row["selection"] == "longest"]
    assert longest
    completions = max(len(row["completion"]) for row in tiny.sums()) + 1
    assert all(0 < row["tokens"] <= completions + len("999+99=") for row in longest)
    positions = [row["position"] for row in run.tokens().to_arrow().to_pylist()]
    assert max(positions) < completions + len("999+99=")
    assert run.metrics("entropy/token/count").to_arrow()["value"].to_pylist()[0] > 2 * completions


def test_preference_pairs_are_named_chosen_and_rejected(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    run = trained(trainer, tmp_path, sample_id="index")
    names = {row["sample_id"] for row in run.samples().to_arrow().to_pylist()}
    assert all(name.partition("/")[2] in ("chosen", "rejected") for name in names)
    assert {name.partition("/")[2] for name in names} == {"chosen", "rejected"}


def test_the_chosen_row_is_the_one_that_bears_the_name(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    run = trained(trainer, tmp_path, sample_id="index")
    rows = trainer.train_dataset
    for row in run.samples().to_arrow().to_pylist():
        number, part = row["sample_id"].split("/")
        # The end of the sequence is scored as well.
        expected = len(rows[int(number)][f"{part}_ids"])
        assert row["tokens"] == expected


def test_accumulated_entropies_are_weighted_by_tokens_where_trl_averages(tmp_path: Path) -> None:
    trainer = sft(tmp_path, gradient_accumulation_steps=2)
    run = trained(trainer, tmp_path)
    assert series(run, "entropy/token/mean") == pytest.approx(logged(trainer, "entropy"), abs=2e-3)
    assert series(run, "surprisal/token/mean") == pytest.approx(series(run, "loss/mean"), rel=1e-5)


def test_a_callback_that_names_samples_leaves_a_constructor_its_training_set(
    tmp_path: Path,
) -> None:
    """DPO with precomputed reference log-probabilities replaces the set after we have joined."""
    callback = EntropyLensCallback(tmp_path / "run", sample_id="index", preset="full")
    trainer = dpo(tmp_path, precompute_ref_log_probs=True, callbacks=[callback])
    trainer.train()
    names = el.open_run(tmp_path / "run").samples().to_arrow()["sample_id"].to_pylist()
    assert names
    assert None not in names


def test_projected_rows_are_at_the_temperature_of_the_loss(tmp_path: Path) -> None:
    trainer = sft(tmp_path)
    trainer.temperature = 0.5
    run = trained(trainer, tmp_path)
    assert run.config["temperature"] == 0.5
