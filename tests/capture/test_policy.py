"""What a loop or a trainer says of a policy's tokens, and where it goes in the log."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import entropylens as el
from entropylens.capture.policy import delimited

ROWS, WIDTH, VOCABULARY = 6, 9, 11


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shown(seed: int = 0) -> dict[str, Any]:
    drawn = generator(seed)
    logits = 2 * torch.randn(ROWS, WIDTH, VOCABULARY, generator=drawn)
    return {
        "logits": logits,
        "token_ids": torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=drawn),
        "mask": torch.rand(ROWS, WIDTH, generator=drawn) < 0.8,
        "advantage": torch.randn(ROWS, generator=drawn),
    }


def statistics(batch: dict[str, Any]) -> dict[str, Tensor]:
    """Numbers of the counted tokens in float64, one after the other."""
    logp = batch["logits"].double().log_softmax(-1)
    mask = batch["mask"]
    entropy = -(logp.exp() * logp).sum(-1)
    logprob = logp.gather(2, batch["token_ids"][..., None])[..., 0]
    advantage = batch["advantage"].double()
    advantage = advantage[:, None].expand(mask.shape) if advantage.ndim == 1 else advantage
    return {"logprob": logprob[mask], "entropy": entropy[mask], "advantage": advantage[mask]}


def run_with(folder: Path, *batches: dict[str, Any], **options: Any) -> el.Run:
    settings = {"preset": "full", "max_overhead": None, **options}
    with el.Lens(run_dir=folder / "run", **settings) as lens:
        for batch in batches:
            lens.observe_policy(**batch)
        lens.step()
    run = el.open_run(folder / "run")
    assert run.status()[0].faults == {}
    return run


def values(run: el.Run) -> dict[str, float]:
    rows = run.metrics("*").to_arrow().to_pylist()
    return {row["name"]: row["value"] for row in rows if not row["module"]}


def test_two_micro_batches_are_one_set_of_tokens(tmp_path: Path) -> None:
    batches = [shown(1), shown(2)]
    run = run_with(tmp_path, *batches)
    parts = [statistics(batch) for batch in batches]
    lp, h, a = (torch.cat([p[n] for p in parts]) for n in ("logprob", "entropy", "advantage"))
    found = values(run)
    assert found["entropy/token/mean"] == pytest.approx(h.mean().item(), rel=1e-6)
    assert found["covariance/within/mean"] == pytest.approx(((lp + h) * a).mean().item(), rel=1e-5)
    pair = torch.stack([lp, a])
    assert found["covariance/total/mean"] == pytest.approx(
        pair.cov(correction=0)[0, 1].item(), rel=1e-5
    )
    assert found["tokens/step"] == len(lp)


def test_log_probabilities_with_entropies_say_the_same_as_logits(tmp_path: Path) -> None:
    batch = shown()
    logp = batch["logits"].double().log_softmax(-1)
    other = {
        "logprob": logp.gather(2, batch["token_ids"][..., None])[..., 0].float(),
        "entropy": -(logp.exp() * logp).sum(-1).float(),
        "mask": batch["mask"],
        "advantage": batch["advantage"],
    }
    one = values(run_with(tmp_path / "logits", batch))
    two = values(run_with(tmp_path / "pairs", other))
    for name in ("entropy/token/mean", "covariance/within/mean", "discriminator/mean"):
        assert one[name] == pytest.approx(two[name], rel=1e-5)
    # What needs whole distributions is not known without them.
    assert "discriminator/expected/mean" in one
    assert "discriminator/expected/mean" not in two


def test_advantages_by_token_and_what_stands_in_masked_places(tmp_path: Path) -> None:
    batch = shown()
    advantage = torch.randn(ROWS, WIDTH, generator=generator(5))
    batch["advantage"] = advantage.masked_fill(~batch["mask"], torch.nan)
    batch["logits"] = batch["logits"].masked_fill(~batch["mask"][..., None], torch.nan)
    found = values(run_with(tmp_path, batch))
    part = statistics(batch)
    expected = ((part["logprob"] + part["entropy"]) * part["advantage"]).mean().item()
    assert found["covariance/within/mean"] == pytest.approx(expected, rel=1e-5)


def test_a_micro_batch_without_an_old_policy_is_its_own_among_others(tmp_path: Path) -> None:
    batch = shown()
    logp = batch["logits"].log_softmax(-1).gather(2, batch["token_ids"][..., None])[..., 0]
    found = values(run_with(tmp_path, {**batch, "old_logprob": logp - 0.1}, shown(2)))
    counts = [int(b["mask"].sum()) for b in (batch, shown(2))]
    expected = (counts[0] * math.exp(0.1) + counts[1]) / sum(counts)
    assert found["ratio/mean"] == pytest.approx(expected, rel=1e-5)
    assert found["ratio/on_policy/share"] == pytest.approx(counts[1] / sum(counts))


def test_one_advantage_a_sequence_may_be_a_column(tmp_path: Path) -> None:
    batch = shown()
    one = values(run_with(tmp_path / "flat", batch))
    column = {**batch, "advantage": batch["advantage"][:, None]}
    assert (
        values(run_with(tmp_path / "column", column))["covariance/within/mean"]
        == (one["covariance/within/mean"])
    )


def test_a_factor_of_the_loss_weighs_the_pull(tmp_path: Path) -> None:
    batch = shown()
    weight = torch.rand(ROWS, WIDTH, generator=generator(7))
    found = values(run_with(tmp_path / "weighted", {**batch, "loss_weight": weight}))
    logp = batch["logits"].double().log_softmax(-1)
    p, entropy = logp.exp(), -(logp.exp() * logp).sum(-1)
    discriminator = p * (logp + entropy[..., None])
    picked = discriminator.gather(2, batch["token_ids"][..., None])[..., 0]
    change = -(picked - (p * discriminator).sum(-1)) * batch["advantage"][:, None] * weight
    expected = change[batch["mask"]].mean().item()
    assert found["entropy/change/estimate/discriminator"] == pytest.approx(expected, rel=1e-4)
    unknown = values(run_with(tmp_path / "unknown", {**batch, "is_pull_known": False}))
    assert "covariance/within/mean" in unknown
    assert "discriminator/excess/mean" in unknown
    assert (
        not {"entropy/change/estimate/discriminator", "entropy/change/estimate/steer"}
        & unknown.keys()
    )


def test_ratios_of_sequences_take_all_tokens_however_few_rows_are_asked_for(
    tmp_path: Path,
) -> None:
    batch = shown()
    logp = batch["logits"].log_softmax(-1).gather(2, batch["token_ids"][..., None])[..., 0]
    noise = 0.1 * torch.randn(ROWS, WIDTH, generator=generator(3))
    given = {**batch, "old_logprob": logp - noise, "ratio_level": "product"}
    found = values(run_with(tmp_path, given, rows=16))
    ratio = torch.where(batch["mask"], noise.double(), 0.0).sum(1).exp()
    assert found["ratio/mean"] == pytest.approx(ratio.mean().item(), rel=1e-5)


def test_other_policies_are_compared(tmp_path: Path) -> None:
    batch = shown()
    logp = batch["logits"].log_softmax(-1).gather(2, batch["token_ids"][..., None])[..., 0]
    noise = 0.1 * torch.randn(ROWS, WIDTH, generator=generator(3))
    found = values(
        run_with(
            tmp_path,
            {
                **batch,
                "old_logprob": logp - noise,
                "sampler_logprob": logp + noise,
                "reference_logprob": logp - 2 * noise,
                "clip": (0.05, 0.05),
            },
        )
    )
    kept = noise[batch["mask"]].double()
    assert found["ratio/mean"] == pytest.approx(kept.exp().mean().item(), rel=1e-5)
    assert found["kl/k1/mean"] == pytest.approx(2 * kept.mean().item(), rel=1e-4, abs=1e-7)
    a = batch["advantage"][:, None].expand(ROWS, WIDTH)[batch["mask"]]
    clipped = ((kept.exp() > 1.05) & (a > 0)) | ((kept.exp() < 0.95) & (a < 0))
    assert found["clip/region/share"] == pytest.approx(clipped.double().mean().item())
    # The sampler is compared with the policy that was there when it sampled: the old one.
    assert found["mismatch/log_ratio/mean"] == pytest.approx(
        -2 * kept.mean().item(), rel=1e-4, abs=1e-7
    )


@pytest.mark.parametrize("level", ["sequence", "product"])
def test_a_sequence_has_one_ratio(tmp_path: Path, level: str) -> None:
    batch = shown()
    logp = batch["logits"].log_softmax(-1).gather(2, batch["token_ids"][..., None])[..., 0]
    noise = 0.1 * torch.randn(ROWS, WIDTH, generator=generator(3))
    given = {**batch, "old_logprob": logp - noise, "ratio_level": level, "clip": (0.05, 0.05)}
    found = values(run_with(tmp_path, given))
    kept = torch.where(batch["mask"], noise.double(), 0.0)
    sums, counts = kept.sum(1), batch["mask"].sum(1)
    ratio = (sums / counts if level == "sequence" else sums).exp()
    assert found["ratio/mean"] == pytest.approx(ratio.mean().item(), rel=1e-5)
    a = batch["advantage"]
    clipped = ((ratio > 1.05) & (a > 0)) | ((ratio < 0.95) & (a < 0))
    assert found["clip/region/share"] == pytest.approx(clipped.double().mean().item())
    product = sums.exp()
    share = product.sum() ** 2 / (ROWS * product.square().sum())
    name = "ratio/sequence/effective_sample_size/share"
    assert found[name] == pytest.approx(share.item(), rel=1e-5)


def test_the_gap_is_tested_where_the_policy_drew_its_own_tokens(tmp_path: Path) -> None:
    batch = shown()
    p = batch["logits"].softmax(-1).flatten(0, 1)
    drawn = torch.multinomial(p, 1, generator=generator(4)).view(ROWS, WIDTH)
    batch = {**batch, "token_ids": drawn}
    assert "gap_test/z" not in values(run_with(tmp_path / "unknown", batch))
    found = values(run_with(tmp_path / "own", {**batch, "is_own_sample": True}))
    part = statistics(batch)
    gap = (-part["logprob"] - part["entropy"]).sum()
    logp = batch["logits"].double().log_softmax(-1)[batch["mask"]]
    spread = (logp.exp() * (logp + part["entropy"][:, None]) ** 2).sum()
    assert found["gap_test/z"] == pytest.approx((gap / spread.sqrt()).item(), rel=1e-4)


def test_a_rollout_is_recorded_apart(tmp_path: Path) -> None:
    reward = torch.tensor([1.0, 0.0, 1.0, 1.0])
    with el.Lens(run_dir=tmp_path / "run", preset="full", max_overhead=None) as lens:
        lens.observe_rollout(reward=reward, group=torch.arange(4) // 2, group_size=2, seconds=0.5)
        lens.observe_policy(**shown())
        lens.step()
    rows = el.open_run(tmp_path / "run").metrics("*").to_arrow().to_pylist()
    phases = {row["name"]: row["phase"] for row in rows}
    assert phases["reward/mean"] == phases["group/no_spread/share"] == "rollout"
    assert phases["covariance/within/mean"] == "train"
    found = {row["name"]: row["value"] for row in rows}
    assert found["reward/mean"] == 0.75
    assert found["group/no_spread/share"] == 0.5
    assert found["rollout/seconds"] == 0.5


def test_generations_of_one_step_are_one_rollout(tmp_path: Path) -> None:
    with el.Lens(run_dir=tmp_path / "run", preset="full", max_overhead=None) as lens:
        for rewards, width in (([1.0, 1.0], 3), ([0.0, 1.0], 5)):
            ids = torch.ones(2, width, dtype=torch.long)
            mask = torch.ones_like(ids, dtype=torch.bool)
            lens.observe_rollout(
                reward=torch.tensor(rewards), group_size=2, token_id=ids, mask=mask, seconds=1.0
            )
        lens.step()
    rows = el.open_run(tmp_path / "run").metrics("*").to_arrow().to_pylist()
    found = {row["name"]: row["value"] for row in rows}
    assert len(rows) == len({(row["name"], row["module"]) for row in rows})
    assert found["reward/mean"] == 0.75
    assert found["group/no_spread/share"] == 0.5
    assert found["completion/length/mean"] == 4.0
    assert found["rollout/seconds"] == 2.0


def test_rollouts_that_come_every_second_step_are_measured_at_any_interval(tmp_path: Path) -> None:
    """Generations at steps 1, 3, 5, ...: never at a multiple of 2."""
    steps = {}
    for every in (1, 2, 3, 4):
        folder = tmp_path / str(every)
        chosen = {"reward_components": every}
        with el.Lens(run_dir=folder, diagnostics=chosen, max_overhead=None) as lens:
            for step in range(1, 14):
                if step % 2:
                    lens.observe_rollout(reward=torch.ones(4), group_size=2)
                lens.step()
        rows = el.open_run(folder).metrics("reward/mean").to_arrow().to_pylist()
        steps[every] = [row["step"] for row in rows]
    assert steps[1] == steps[2] == [1, 3, 5, 7, 9, 11, 13]
    assert steps[3] == steps[4] == [1, 5, 9, 13]


def refused(folder: Path, **changes: Any) -> str:
    batch: dict[str, Any] = {**shown(), **changes}
    known = {name: value for name, value in batch.items() if value is not None}
    with (
        el.Lens(run_dir=folder / "run", preset="full") as lens,
        pytest.raises((TypeError, ValueError)) as caught,
    ):
        lens.observe_policy(**known)
    return str(caught.value)


def test_what_does_not_fit_is_refused_in_the_first_step(tmp_path: Path) -> None:
    folders = (tmp_path / str(number) for number in range(10))
    assert refused(next(folders), advantage=torch.zeros(3)) == (
        "policy: expected advantage of shape (6, 9) or (6,) or (6, 1), got (3,)"
    )
    assert refused(next(folders), old_logprob=torch.zeros(6)) == (
        "policy: expected old_logprob of shape (6, 9), got (6,)"
    )
    # One column too few would be taken for the last ones.
    assert refused(next(folders), old_logprob=torch.zeros(6, 8)) == (
        "policy: expected old_logprob of shape (6, 9), got (6, 8)"
    )
    assert refused(next(folders), reward=torch.zeros(6, 2)) == (
        "policy: expected reward of shape (6,), got (6, 2)"
    )
    assert refused(next(folders), ratio_level="prompt") == (
        "policy: expected ratio_level to be one of token, sequence, product, got 'prompt'"
    )
    assert refused(next(folders), token_ids=None) == (
        "Lens.observe_policy: expected logits and token_ids, or logprob and entropy, got logits"
    )
    assert refused(next(folders), logits=None, token_ids=None) == (
        "Lens.observe_policy: expected logits and token_ids, or logprob and entropy, got none of "
        "them"
    )
    pair = {"logits": None, "token_ids": None, "logprob": torch.zeros(6, 9)}
    assert refused(next(folders), **pair, entropy=torch.zeros(6, 8)) == (
        "Lens.observe_policy: expected entropy of the shape of logprob, (6, 9), got (6, 8)"
    )
    assert "old_logprobs" in refused(next(folders), old_logprobs=torch.zeros(6, 9))


def test_a_delimiter_of_several_tokens_is_in_neither_part() -> None:
    ids = torch.tensor([[4, 7, 8, 5, 7, 8, 6], [7, 4, 4, 8, 4, 7, 8], [4, 4, 4, 4, 4, 7, 8]])
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[2, 6] = False  # the delimiter's end is padding
    thoughts, answers = delimited(ids, mask, [7, 8])
    assert thoughts.int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 1, 0],
    ]
    assert answers.int().tolist() == [[0, 0, 0, 1, 1, 1, 1], [0] * 7, [0] * 7]


def test_a_delimiter_longer_than_the_text_is_not_there() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    thoughts, answers = delimited(ids, torch.ones_like(ids, dtype=torch.bool), [1, 1, 1, 1])
    assert bool(thoughts.all())
    assert not bool(answers.any())
