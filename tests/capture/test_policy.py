"""What a loop or a trainer says of a policy's tokens, and where it goes in the log."""

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


def shown(seed: int = 0) -> dict[str, Tensor]:
    drawn = generator(seed)
    logits = 2 * torch.randn(ROWS, WIDTH, VOCABULARY, generator=drawn)
    return {
        "logits": logits,
        "token_ids": torch.randint(0, VOCABULARY, (ROWS, WIDTH), generator=drawn),
        "mask": torch.rand(ROWS, WIDTH, generator=drawn) < 0.8,
        "advantage": torch.randn(ROWS, generator=drawn),
    }


def statistics(batch: dict[str, Tensor]) -> dict[str, Tensor]:
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
    assert "sampling/z" not in values(run_with(tmp_path / "unknown", batch))
    found = values(run_with(tmp_path / "own", {**batch, "is_own_sample": True}))
    part = statistics(batch)
    gap = (-part["logprob"] - part["entropy"]).sum()
    logp = batch["logits"].double().log_softmax(-1)[batch["mask"]]
    spread = (logp.exp() * (logp + part["entropy"][:, None]) ** 2).sum()
    assert found["sampling/z"] == pytest.approx((gap / spread.sqrt()).item(), rel=1e-4)


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
        "Lens.observe_policy: expected advantage of shape [B] or [B, C] with B = 6 and C of "
        "at most 9, got (3,)"
    )
    assert refused(next(folders), old_logprob=torch.zeros(6)) == (
        "Lens.observe_policy: expected old_logprob of shape [B, C] with B = 6 and C of at most "
        "9, got (6,)"
    )
    assert refused(next(folders), reward=torch.zeros(6, 2)) == (
        "Lens.observe_policy: expected reward of shape [B] with B = 6 and C of at most 9, got "
        "(6, 2)"
    )
    assert refused(next(folders), reference_logprob=torch.zeros(6, 20)) == (
        "Lens.observe_policy: expected reference_logprob of shape [B, C] with B = 6 and C of at "
        "most 9, got (6, 20)"
    )
    assert refused(next(folders), ratio_level="prompt") == (
        "Lens.observe_policy: expected ratio_level to be one of token, sequence, product, "
        "got 'prompt'"
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
