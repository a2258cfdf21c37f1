"""GRPO and RLOO: what TRL logs itself, and what it does not, against TRL's own tensors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl_runs import logged, series, trained
from untouched import tiny
from untouched.in_transformers import brief, grpo, kto, right, rloo

from entropylens_callbacks.transformers import attach
from entropylens_callbacks.trl import RolloutOptions

pytestmark = pytest.mark.filterwarnings("ignore")

STEPS = 4


def kept_inputs(trainer: Any) -> list[Mapping[str, Any]]:
    """The batches that the loss sees, once the trainer was attached to."""
    seen: list[Mapping[str, Any]] = []
    compute = trainer._compute_loss

    def keep(model: Any, inputs: Any) -> Any:
        seen.append({k: v.clone() if isinstance(v, Tensor) else v for k, v in inputs.items()})
        return compute(model, inputs)

    trainer._compute_loss = keep
    return seen


def calm(model: Any = None) -> Any:
    """A model without dropout: two forwards of it agree."""
    model = model or tiny.llama()
    model.config.attention_dropout = 0.0
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.0
    return model


@pytest.mark.parametrize("lora", [False, True], ids=["all parameters", "lora"])
@pytest.mark.parametrize("make", [grpo, rloo, kto])
def test_entropy_equals_trls_own(tmp_path: Path, make: Any, lora: bool) -> None:
    trainer = make(tmp_path, tiny.lora_config() if lora else None, max_steps=STEPS)
    run = trained(trainer, tmp_path)
    theirs = logged(trainer, "entropy")
    assert list(theirs) == list(range(1, STEPS + 1))
    assert series(run, "entropy/token/mean") == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("make", [grpo, rloo])
def test_what_both_report_is_the_same(tmp_path: Path, make: Any) -> None:
    options: dict[str, Any] = {"num_iterations": 2, "beta": 0.1, "epsilon": 0.02}
    if make is grpo:
        # By default TRL weights each token's KL with the importance ratio.
        options["use_bias_correction_kl"] = False
    trainer = make(tmp_path, max_steps=STEPS, **options)
    run = trained(trainer, tmp_path)
    pairs = {
        "kl/mean" if make is grpo else "": "kl",
        "clip/low/share": "clip_ratio/low_mean",
        "clip/high/share": "clip_ratio/high_mean",
        "clip/region/share": "clip_ratio/region_mean",
    }
    for ours, theirs in pairs.items():
        if ours:
            assert series(run, ours) == pytest.approx(logged(trainer, theirs), abs=1e-5), ours
    assert max(series(run, "clip/region/share").values()) > 0
    generations = range(1, STEPS + 1, 2)
    for ours, theirs in {
        "reward/mean": "reward",
        "reward/std": "reward_std",
        "group/no_spread/share": "frac_reward_zero_std",
        "completion/length/mean": "completions/mean_length",
        "completion/truncated/share": "completions/clipped_ratio",
    }.items():
        found, told = series(run, ours), logged(trainer, theirs)
        assert list(found) == list(generations)
        assert found == pytest.approx({step: told[step] for step in generations}, abs=1e-6), ours
    for name in ("right", "brief"):
        found, told = (
            series(run, "reward/component/mean", name),
            logged(trainer, f"rewards/{name}/mean"),
        )
        assert found == pytest.approx({step: told[step] for step in generations}, abs=1e-6)
    phases = {row["phase"] for row in run.metrics("reward/mean").to_arrow().to_pylist()}
    assert phases == {"rollout"}


def test_shuffled_rows_keep_their_rewards_groups_and_text(tmp_path: Path) -> None:
    """Each row's completion, decoded here, must score what is told of it."""
    trainer = grpo(tmp_path, max_steps=3, per_device_train_batch_size=16)
    seen = kept_inputs(trainer)
    run = trained(trainer, tmp_path, rollouts=RolloutOptions(record_text=True, correct_by="right"))
    tokenizer = trainer.processing_class
    assert seen[0]["entropylens_row"].tolist() != list(range(16))
    for number, batch in enumerate(seen, start=1):
        texts = tokenizer.batch_decode(batch["completion_ids"], skip_special_tokens=True)
        prompts = tokenizer.batch_decode(batch["prompt_ids"], skip_special_tokens=True)
        rewards = [a + (b or 0.0) for a, b in zip(right(texts), brief(texts), strict=True)]
        told = {p + t: r for p, t, r in zip(prompts, texts, rewards, strict=True)}
        rows = run.completions(steps=(number, number)).to_arrow().to_pylist()
        assert len(rows) == 2
        for row in rows:
            assert row["reward"] == pytest.approx(told[row["prompt"] + row["text"]], abs=1e-6)
        correct = torch.tensor(right(texts)).bool()
        mask = batch["completion_mask"].bool()
        outcome = series(run, "entropy/outcome/correct/mean")
        weights = {
            row["step"]: row["weight"]
            for row in run.metrics("entropy/outcome/correct/mean").to_arrow().to_pylist()
        }
        assert number in outcome
        assert weights[number] == int(mask[correct].sum())


@pytest.mark.parametrize("make", [grpo, rloo])
def test_covariances_equal_a_float64_reference_on_the_same_batch(tmp_path: Path, make: Any) -> None:
    """With a learning rate of 0 the model at hand is the one that was measured."""
    trainer = make(tmp_path, model=calm(), learning_rate=0.0, max_steps=2)
    seen = kept_inputs(trainer)
    run = trained(trainer, tmp_path)
    model = trainer.model.double().eval()
    # In the first step the backbone is not watched yet.
    for step, batch in enumerate(seen[1:], start=2):
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
        attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=attention).logits
        width = batch["completion_ids"].shape[1]
        logp = (logits[:, -width - 1 : -1] / trainer.temperature).log_softmax(-1)
        keep = batch["completion_mask"].bool()
        lp = logp.gather(2, batch["completion_ids"][..., None])[..., 0][keep]
        p = logp.exp()
        entropy = -(p * logp).sum(-1)
        discriminator = p * (logp + entropy[..., None])
        expected = (p * discriminator).sum(-1)[keep]
        entropy = entropy[keep]
        advantage = batch["advantages"].double()[:, None].expand(keep.shape)[keep]
        own = lp.exp() * (lp + entropy)
        for name, value in {
            "covariance/within/mean": ((lp + entropy) * advantage).mean(),
            "covariance/total/mean": torch.stack([lp, advantage]).cov(correction=0)[0, 1],
            "covariance/policy_gradient/mean": (own * advantage).mean(),
            "discriminator/expected/mean": expected.mean(),
            "entropy/change/estimate/discriminator": -(advantage * (own - expected)).mean(),
        }.items():
            # The trainer's forward was in float32.
            assert series(run, name)[step] == pytest.approx(float(value), rel=2e-3, abs=2e-6), name


def test_old_policies_make_ratios_and_new_ones_do_not(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, num_iterations=2, max_steps=4)
    seen = kept_inputs(trainer)
    run = trained(trainer, tmp_path)
    assert all("old_per_token_logps" in batch for batch in seen)
    assert set(series(run, "ratio/mean")) == {1, 2, 3, 4}
    other = tmp_path / "on-policy"
    run = trained(grpo(other, max_steps=2), other)
    assert series(run, "ratio/on_policy/share") == {1: 1.0, 2: 1.0}
    assert series(run, "ratio/mean") == {}


def test_the_gap_test_is_made_only_where_the_policy_drew_its_tokens_whole(tmp_path: Path) -> None:
    def tested(name: str, model: Any = None, **options: Any) -> bool:
        folder = tmp_path / name
        run = trained(grpo(folder, model=model or calm(), max_steps=2, **options), folder)
        return bool(series(run, "gap_test/z"))

    assert tested("whole")
    assert not tested("dropout", model=tiny.llama())
    assert not tested("nucleus", top_p=0.9)
    assert not tested("top k", top_k=5)
    assert not tested("old", num_iterations=2)
    assert not tested("masked", mask_truncated_completions=True)


def test_accumulated_micro_batches_are_one_step(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    run = trained(trainer, tmp_path)
    for name in ("entropy/token/mean", "covariance/within/mean", "reward/mean"):
        assert list(series(run, name)) == [1, 2, 3]
    weights = run.metrics("covariance/within/mean").to_arrow()["weight"].to_pylist()
    assert weights == list(series(run, "tokens/step").values())
    assert weights == list(series(run, "completion/tokens").values())


def test_prediction_stands_beside_measurement(tmp_path: Path) -> None:
    run = trained(grpo(tmp_path, max_steps=4, learning_rate=3e-5), tmp_path)
    predicted, measured = (series(run, f"entropy/change/{n}") for n in ("predicted", "measured"))
    assert list(predicted) == [1, 2, 3, 4]
    for step, value in measured.items():
        assert value == pytest.approx(predicted[step], rel=0.15, abs=1e-7)
    assert set(series(run, "entropy/change/exact/share").values()) == {1.0}


def test_a_private_name_that_moved_is_said_loudly_and_leaves_the_entropy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = grpo(tmp_path, max_steps=2)
    generate = trainer._generate_and_score_completions

    class Renamed(type(trainer)):  # type: ignore[misc]
        _generate_and_score_completions = property()

        def _prepare_inputs(self, batch: Any) -> Any:
            return generate(batch)

    trainer.__class__ = Renamed
    run = trained(trainer, tmp_path)
    expected = "to have _generate_and_score_completions, as TRL 1.16 has it"
    assert expected in caplog.text
    events = [e for e in run.events().to_arrow().to_pylist() if e["kind"] == "capture"]
    assert [expected in event["message"] for event in events] == [True]
    assert events[0]["severity"] == "warning"
    assert list(series(run, "entropy/token/mean")) == [1, 2]
    assert series(run, "reward/mean") == {}


def test_a_reward_function_that_is_not_there_is_refused(tmp_path: Path) -> None:
    trainer = grpo(tmp_path)
    with pytest.raises(ValueError, match="expected correct_by to be a reward function of the "
                       r"trainer \(right, brief\), got 'verifier'"):  # fmt: skip
        attach(trainer, tmp_path / "run", rollouts=RolloutOptions(correct_by="verifier"))


def test_thinking_ends_at_the_delimiter(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, max_steps=2)
    seen = kept_inputs(trainer)
    run = trained(trainer, tmp_path, rollouts=RolloutOptions(thinking_end="="))
    delimiter = tiny.VOCABULARY["="]
    for step, batch in enumerate(seen, start=1):
        thinking = 0
        for row, mask in zip(batch["completion_ids"].tolist(), batch["completion_mask"].tolist(),
                             strict=True):  # fmt: skip
            kept = [token for token, keep in zip(row, mask, strict=True) if keep]
            thinking += kept.index(delimiter) if delimiter in kept else len(kept)
        rows = run.metrics("entropy/phase/thinking/mean", steps=(step, step)).to_arrow()
        assert rows["weight"].to_pylist() == [thinking]


def test_checkpointing_leaves_the_derivative_exact(tmp_path: Path) -> None:
    run = trained(grpo(tmp_path, gradient_checkpointing=True, max_steps=2), tmp_path)
    assert series(run, "entropy/change/exact/share") == {1: 1.0, 2: 1.0}
    assert all(series(run, "entropy/change/measured").values())


@pytest.mark.parametrize("level", ["sequence", "product"])
def test_states_have_the_ratio_of_their_sequence(tmp_path: Path, level: str) -> None:
    """Once no token is learnt from, every estimate that knows the loss says no change."""
    options: dict[str, Any] = {"num_iterations": 3, "epsilon": 0.0, "max_steps": 3, "beta": 0.0}
    if level == "sequence":
        options |= {"importance_sampling_level": "sequence", "loss_type": "grpo"}
    make = grpo if level == "sequence" else rloo
    run = trained(make(tmp_path, model=calm(), **options), tmp_path)
    clipped = series(run, "clip/region/share")
    assert clipped[3] == 1.0
    rows = run.metrics("entropy/change/state/correlation", steps=(3, 3)).to_arrow().to_pylist()
    told = {row["module"] for row in rows}
    # A column of zeros has no correlation; those that do not know the ratio have one.
    assert "natural_gradient" in told
    assert not {"discriminator", "steer", "clip_b"} & told


def test_two_generations_of_one_step_are_one_rollout_of_different_groups(tmp_path: Path) -> None:
    trainer = grpo(tmp_path, gradient_accumulation_steps=2, steps_per_generation=1, max_steps=2)
    options = RolloutOptions(record_text=True)
    run = trained(trainer, tmp_path, rollouts=options)
    weights = run.metrics("group/no_spread/share").to_arrow()["weight"].to_pylist()
    assert weights == [4.0, 4.0]
    prompts: dict[str, set[str]] = {}
    for row in run.completions().to_arrow().to_pylist():
        prompts.setdefault(row["group"], set()).add(row["prompt"])
    assert all(len(found) == 1 for found in prompts.values())


def test_what_scores_while_generating_may_return_anything(tmp_path: Path) -> None:
    """Another version's dictionary is a counted fault and stops nothing."""
    trainer = rloo(tmp_path, max_steps=1)
    score = trainer._get_per_token_logps_and_entropies
    attach(trainer, tmp_path / "run", preset="full")
    watched = trainer._get_per_token_logps_and_entropies
    assert watched is not score
    policy = trainer.callback_handler.callbacks[0]._policy
    policy._scored = []
    noted = policy._noting(lambda: {"logps": torch.zeros(1)})
    assert noted() == {"logps": torch.zeros(1)}


def test_correctness_of_several_rewards_is_unknown_unless_one_is_named(tmp_path: Path) -> None:
    run = trained(grpo(tmp_path / "several", max_steps=1), tmp_path / "several")
    assert series(run, "pass_at/1") == series(run, "entropy/outcome/correct/mean") == {}
    named = tmp_path / "named"
    run = trained(grpo(named, max_steps=1), named, rollouts=RolloutOptions(correct_by="right"))
    assert list(series(run, "pass_at/1")) == [1]


def test_samples_of_a_policy_are_not_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected no sample_id for GRPOTrainer, whose samples"):
        attach(grpo(tmp_path), tmp_path / "run", sample_id="index")


def test_the_usual_delimiter_counts_only_as_one_token(tmp_path: Path) -> None:
    run = trained(grpo(tmp_path, max_steps=1), tmp_path)
    assert series(run, "entropy/phase/thinking/mean") == {}


def test_two_rewards_of_one_name_are_told_apart(tmp_path: Path) -> None:
    def scaled(factor: float) -> Any:
        def reward(completions: list[str], **known: Any) -> list[float]:
            return [factor * len(text) for text in completions]

        return reward

    trainer = grpo(tmp_path, max_steps=2, rewards=[scaled(1.0), scaled(-3.0)])
    run = trained(trainer, tmp_path)
    assert series(run, "reward/mean") == pytest.approx(logged(trainer, "reward"), abs=1e-5)
    first, second = (series(run, "reward/component/mean", name) for name in ("reward", "reward_2"))
    assert {step: -3 * value for step, value in first.items()} == pytest.approx(second)


def test_tokens_bear_the_name_of_their_group_or_their_prompt(tmp_path: Path) -> None:
    run = trained(grpo(tmp_path / "plain", max_steps=2), tmp_path / "plain")
    names = set(run.tokens().to_arrow()["sample_id"].to_pylist())
    assert names == {f"group {number}" for number in range(4)}
    folder = tmp_path / "text"
    run = trained(grpo(folder, max_steps=2), folder, rollouts=RolloutOptions(record_text=True))
    rows = [r for r in run.tokens().to_arrow().to_pylist() if r["selection"] == "change"]
    prompts = {row["prompt"] for row in tiny.prompts()}
    assert rows
    assert {row["sample_id"] for row in rows} <= prompts
    change = series(run, "entropy/change/rollouts")
    entropy = series(run, "entropy/token/mean")
    assert change == {2: pytest.approx(entropy[2] - entropy[1], abs=1e-6)}
