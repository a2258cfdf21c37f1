"""Preferences as TRL's own trainers log them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import TrainerCallback
from trl_runs import series, trained
from untouched import tiny
from untouched.in_transformers import dpo, kto, reward

import entropylens as el
from entropylens_callbacks.preferences import PreferenceWatch

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 3


def weights(run: el.Run, name: str) -> list[float]:
    return run.metrics(name).to_arrow()["weight"].to_pylist()


def same(ours: dict[int, float], theirs: dict[int, float], scale: float = 1.0) -> None:
    assert theirs
    assert {step: scale * value for step, value in ours.items()} == pytest.approx(
        theirs, rel=1e-4, abs=1e-5
    )


DPO = {
    "all parameters": {},
    "lora": {"peft_config": tiny.lora_config()},
    "accumulation": {"gradient_accumulation_steps": 2},
    "precomputed": {"precompute_ref_log_probs": True},
    "precomputed, lora": {"precompute_ref_log_probs": True, "peft_config": tiny.lora_config()},
    "checkpointing": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("options", DPO.values(), ids=DPO.keys())
def test_dpo_equals_trls_own_log(tmp_path: Path, options: dict[str, Any]) -> None:
    trainer = dpo(tmp_path, max_steps=STEPS, beta=0.3, **options)
    run = trained(trainer, tmp_path)
    for side in ("chosen", "rejected"):
        ours = f"preference/{side}"
        same(series(run, f"{ours}/logprob/mean"), series(run, f"framework/logps/{side}"))
        ratios = series(run, f"{ours}/log_ratio/mean")
        same(ratios, series(run, f"framework/rewards/{side}"), 0.3)
    margins = series(run, "preference/margin/mean")
    same(margins, series(run, "framework/rewards/margins"), 0.3)
    assert len({round(margin, 4) for margin in margins.values()}) > 1
    same(series(run, "preference/accuracy"), series(run, "framework/rewards/accuracies"))
    pairs = tiny.BATCH * options.get("gradient_accumulation_steps", 1)
    assert weights(run, "preference/margin/mean") == [pairs] * STEPS


def test_entropies_of_both_sides_make_the_step_s(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, max_steps=STEPS)
    with torch.no_grad():
        trainer.model.lm_head.weight *= 50
    run = trained(trainer, tmp_path)
    sides = [f"preference/{side}/entropy/mean" for side in ("chosen", "rejected")]
    values = [list(series(run, name).values()) for name in sides]
    counts = [weights(run, name) for name in sides]
    whole = [
        (a * n + b * m) / (n + m)
        for a, b, n, m in zip(*values, *counts, strict=True)
    ]  # fmt: skip
    assert whole == pytest.approx(list(series(run, "entropy/token/mean").values()), rel=1e-5)
    assert values[0] != pytest.approx(values[1], rel=1e-3)
    tokens = list(series(run, "tokens/step").values())
    assert [n + m for n, m in zip(*counts, strict=True)] == tokens


@pytest.mark.parametrize("lora", [False, True], ids=["all parameters", "lora"])
@pytest.mark.parametrize("precomputed", [False, True], ids=["", "precomputed"])
def test_kto_equals_trls_own_log_and_has_no_margin(
    tmp_path: Path, lora: bool, precomputed: bool
) -> None:
    """Mismatched completions, of which KTO asks the same models, are no part of it."""
    trainer = kto(
        tmp_path,
        tiny.lora_config() if lora else None,
        max_steps=STEPS,
        beta=0.3,
        precompute_ref_log_probs=precomputed,
    )
    run = trained(trainer, tmp_path)
    for side in ("chosen", "rejected"):
        theirs = series(run, f"framework/logps/{side}")
        assert theirs
        same(series(run, f"preference/{side}/logprob/mean"), theirs)
        ratios = series(run, f"preference/{side}/log_ratio/mean")
        same(ratios, series(run, f"framework/rewards/{side}"), 0.3)
    numbers = [
        run.metrics(f"preference/{s}/logprob/mean").to_arrow() for s in ("chosen", "rejected")
    ]
    counted: dict[int, float] = {}
    for table in numbers:
        for step, weight in zip(
            table["step"].to_pylist(), table["weight"].to_pylist(), strict=True
        ):
            counted[step] = counted.get(step, 0) + weight
    assert counted == dict.fromkeys(range(1, STEPS + 1), tiny.BATCH)
    names = set(run.metrics("preference/*").to_arrow()["name"].to_pylist())
    assert not [name for name in names if "margin" in name or "accuracy" in name]
    entropies = [name for name in names if name.endswith("entropy/mean")]
    assert len(entropies) == 2


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_reward_model_equals_trls_own_log(tmp_path: Path, accumulation: int) -> None:
    trainer = reward(tmp_path, max_steps=STEPS, gradient_accumulation_steps=accumulation)
    run = trained(trainer, tmp_path)
    same(series(run, "preference/accuracy"), series(run, "framework/accuracy"))
    same(series(run, "preference/margin/mean"), series(run, "framework/margin"))
    chosen, rejected = (series(run, f"preference/reward/{s}/mean") for s in ("chosen", "rejected"))
    middle = {step: (chosen[step] + rejected[step]) / 2 for step in chosen}
    same(middle, series(run, "framework/mean_reward"))
    spread = series(run, "preference/reward/std")
    widest = series(run, "framework/max_reward")
    least = series(run, "framework/min_reward")
    assert all(
        0 < spread[step] <= (widest[step] - least[step] + 1e-6) for step in range(1, STEPS + 1)
    )
    assert weights(run, "preference/reward/std") == [2 * tiny.BATCH * accumulation] * STEPS
    assert not run.metrics("preference/chosen/*").to_arrow()["name"].to_pylist()


def test_evaluation_and_other_forwards_are_not_looked_at(tmp_path: Path) -> None:
    """The whole set is evaluated after every step; the training's numbers stay its own."""
    trainer = dpo(tmp_path, max_steps=STEPS)
    trainer.eval_dataset = trainer.train_dataset
    evaluations = []

    class Evaluating(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            control.should_evaluate = True
            return control

        def on_evaluate(self, args: Any, state: Any, *others: Any, **kwargs: Any) -> None:
            evaluations.append(state.global_step)

    trainer.add_callback(Evaluating())
    run = trained(trainer, tmp_path)
    same(series(run, "preference/margin/mean"), series(run, "framework/rewards/margins"), 0.1)
    assert weights(run, "preference/margin/mean") == [tiny.BATCH] * STEPS
    assert len(evaluations) == STEPS


def test_hooks_are_on_both_models_while_it_trains_and_gone_afterwards(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, max_steps=2)
    seen = []
    compute = trainer.compute_loss

    def look(*args: Any, **kwargs: Any) -> Any:
        seen.append([len(m._forward_hooks) for m in (trainer.model, trainer.ref_model)])
        return compute(*args, **kwargs)

    before = [len(m._forward_hooks) for m in (trainer.model, trainer.ref_model)]
    trainer.compute_loss = look
    trained(trainer, tmp_path)
    assert all(there[1] == before[1] + 1 and there[0] > before[0] for there in seen)
    assert [len(m._forward_hooks) for m in (trainer.model, trainer.ref_model)] == before


def test_a_discounted_reference_that_was_computed_beforehand_is_not_taken(tmp_path: Path) -> None:
    """It would be no sum over all tokens, as the policy's is."""
    options = {"max_steps": 2, "ld_alpha": 0.5}
    run = trained(dpo(tmp_path / "a", precompute_ref_log_probs=True, **options), tmp_path / "a")
    assert series(run, "preference/chosen/logprob/mean")
    assert not series(run, "preference/margin/mean")
    run = trained(dpo(tmp_path / "b", **options), tmp_path / "b")
    assert len(series(run, "preference/margin/mean")) == 2


def test_a_loss_that_shows_nothing_is_told_once(tmp_path: Path) -> None:
    trainer = reward(tmp_path, max_steps=3)
    compute = trainer.compute_loss

    def copied(model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        ours = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        return compute(model, ours, *args, **kwargs)

    trainer.compute_loss = copied
    run = trained(trainer, tmp_path)
    told = run.events().to_arrow()["message"].to_pylist()
    assert sum("preferences are not recorded" in message for message in told) == 1
    assert not run.metrics("preference/*").to_arrow().num_rows


def test_only_trainers_of_preferences_suit() -> None:
    derived = type("Mine", (type("KTOTrainer", (), {}),), {})
    assert PreferenceWatch.suits(derived())
    assert not PreferenceWatch.suits(SimpleNamespace())
