"""Batches of the shape that verl's driver has, shown to the tap; verl itself is not here."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor

import entropylens as el
from entropylens_callbacks.verl import VerlTap, attach
from entropylens_callbacks.verl_batches import clip_bounds, length_limit, plain_settings

WIDTH, PROMPT, END = 9, 4, 2
EVERYTHING: dict[str, Any] = {"preset": "full", "max_overhead": None}


class Tensors:
    """A TensorDict as far as it is used: iterating it gives rows, so names are asked of keys."""

    def __init__(self, fields: dict[str, Tensor]) -> None:
        self._fields = fields

    def __getitem__(self, name: str) -> Tensor:
        return self._fields[name]

    def __iter__(self) -> Any:
        raise AssertionError("a TensorDict is iterated by rows")

    def __bool__(self) -> bool:
        raise AssertionError("a TensorDict has no truth value")

    def keys(self) -> Any:
        return self._fields.keys()

    def pop(self, name: str) -> Tensor:
        return self._fields.pop(name)


class Tokenizer:
    eos_token_id: ClassVar[Any] = END

    def decode(self, tokens: list[int]) -> str:
        return " ".join(map(str, tokens))

    def batch_decode(self, rows: list[list[int]], *, skip_special_tokens: bool) -> list[str]:
        assert skip_special_tokens
        return [self.decode([token for token in row if token != 0]) for row in rows]


def made(
    sizes: tuple[int, ...] = (4, 4, 4), *, without: tuple[str, ...] = (), seed: int = 0
) -> tuple[Any, Tensor]:
    """A DataProto and the entropies that ``fit`` takes out, with rows as balancing leaves them."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(sizes)
    uid = [f"prompt {number}" for number, size in enumerate(sizes) for _ in range(size)]
    length = torch.randint(2, WIDTH + 1, (rows,), generator=generator)
    length[:3] = WIDTH
    mask = torch.arange(WIDTH) < length[:, None]
    responses = torch.randint(3, 40, (rows, WIDTH), generator=generator) * mask
    ended = torch.arange(rows) % 3 > 0
    responses[torch.arange(rows)[ended], length[ended] - 1] = END
    scores = torch.zeros(rows, WIDTH)
    scores[torch.arange(rows), length - 1] = (
        torch.rand(rows, generator=generator).round(decimals=1) * 2
    )
    old = -3 * torch.rand(rows, WIDTH, generator=generator)
    noise = torch.randn(rows, WIDTH, generator=generator)
    padding = torch.where(mask, 0.0, torch.nan)  # whatever stands there must not be read
    fields = {
        "prompts": torch.randint(3, 40, (rows, PROMPT), generator=generator),
        "responses": responses,
        "response_mask": mask.long(),
        "attention_mask": torch.cat([torch.ones(rows, PROMPT, dtype=torch.long), mask.long()], 1),
        "old_log_probs": old + padding,
        "rollout_log_probs": old + 0.1 * noise + padding,
        "ref_log_prob": old - 0.2 * noise + padding,
        "token_level_scores": scores,
        "token_level_rewards": scores - 7,
        "advantages": torch.randn(rows, 1, generator=generator).expand(-1, WIDTH) + padding,
        "returns": torch.zeros(rows, WIDTH),
    }
    entropys = 2 * torch.rand(rows, WIDTH, generator=generator) + padding
    order = torch.randperm(rows, generator=generator)
    names = {
        "uid": np.array([uid[at] for at in order], dtype=object),
        "acc": np.array([bool(at % 2) for at in order], dtype=object),
        "pred": np.array([f"answer {at}" for at in order], dtype=object),
    }
    batch = SimpleNamespace(
        batch=Tensors({n: value[order] for n, value in fields.items() if n not in without}),
        non_tensor_batch={n: value for n, value in names.items() if n not in without},
        meta_info={"reward_extra_keys": ["acc", "pred"], "temperature": 1.0},
    )
    return batch, entropys[order]


def shown(folder: Path, *steps: tuple[Any, Tensor | None], **options: Any) -> el.Run:
    with VerlTap(folder / "run", **{**EVERYTHING, **options}) as tap:
        for batch, entropys in steps:
            tap.observe(batch, entropys)
    return el.open_run(folder / "run")


def value(run: el.Run, name: str) -> float:
    (found,) = run.metrics(name).to_arrow()["value"].to_pylist()
    return float(found)


def names_of(run: el.Run) -> set[str]:
    return set(run.metrics().to_arrow()["name"].to_pylist())


def masked(batch: Any, name: str) -> np.ndarray:
    """The field's generated tokens, float64."""
    kept = batch.batch["response_mask"].numpy() == 1
    return np.asarray(batch.batch[name].numpy()[kept], dtype=np.float64)


def by_prompt(batch: Any, values: np.ndarray) -> list[np.ndarray]:
    uid = batch.non_tensor_batch["uid"]
    return [values[uid == name] for name in sorted(set(uid))]


def test_tokens_equal_a_float64_reference_over_the_response_mask(tmp_path: Path) -> None:
    batch, entropys = made()
    run = shown(tmp_path, (batch, entropys))
    assert run.status()[0].faults == {}
    entropy = entropys.numpy()[batch.batch["response_mask"].numpy() == 1].astype(np.float64)
    old, advantage = masked(batch, "old_log_probs"), masked(batch, "advantages")
    within = (old + entropy) * advantage
    ratio = old - masked(batch, "rollout_log_probs")
    backward = masked(batch, "ref_log_prob") - old
    expected = {
        "entropy/token/mean": entropy.mean(),
        "entropy/token/count": len(entropy),
        "surprisal/token/mean": -old.mean(),
        "covariance/within/mean": within.mean(),
        "covariance/within/std": within.std(),
        "covariance/total/mean": np.cov(old, advantage, bias=True)[0, 1],
        "mismatch/log_ratio/mean": ratio.mean(),
        "mismatch/kl": (np.exp(ratio) - 1 - ratio).mean(),
        "kl/mean": (np.exp(backward) - 1 - backward).mean(),
        "ratio/on_policy/share": 1.0,
    }
    found = {name: value(run, name) for name in expected}
    assert found == pytest.approx(expected, rel=1e-5)


def test_completions_equal_a_reference_by_prompt_however_rows_are_shuffled(tmp_path: Path) -> None:
    batch, entropys = made()
    run = shown(tmp_path, (batch, entropys), correct_from=1.0, tokenizer=Tokenizer())
    uid = batch.non_tensor_batch["uid"]
    assert any(len(set(uid[at : at + 4])) > 1 for at in range(0, 12, 4)), "rows are shuffled"
    reward = batch.batch["token_level_scores"].numpy().astype(np.float64).sum(1)
    groups = by_prompt(batch, reward)
    right = [(group >= 1).mean() for group in groups]
    length = batch.batch["response_mask"].numpy().sum(1)
    responses = batch.batch["responses"].numpy()
    truncated = [
        count == WIDTH and row[count - 1] != END
        for row, count in zip(responses, length, strict=True)
    ]
    assert 0 < sum(truncated) < sum(length == WIDTH)
    expected = {
        "reward/mean": reward.mean(),
        "reward/max": reward.max(),
        "group/reward/std/mean": np.mean([group.std(ddof=1) for group in groups]),
        "group/reward/between_std": np.std([group.mean() for group in groups], ddof=1),
        "group/mixed/share": np.mean([0 < share < 1 for share in right]),
        "group/all_wrong/share": np.mean([share == 0 for share in right]),
        "pass_at/1": np.mean(right),
        "pass_at/4": np.mean([share > 0 for share in right]),
        "completion/length/mean": length.mean(),
        "completion/length/correct/mean": length[reward >= 1].mean(),
        "completion/truncated/share": np.mean(truncated),
        "reward/component/mean": batch.non_tensor_batch["acc"].astype(float).mean(),
        "reward/component/correlation": np.corrcoef(
            batch.non_tensor_batch["acc"].astype(float), reward
        )[0, 1],
    }
    found = {name: value(run, name) for name in expected}
    assert found == pytest.approx(expected, rel=1e-5)
    assert run.metrics("reward/component/mean").to_arrow()["module"].to_pylist() == ["acc"]
    assert run.metrics("reward/mean").to_arrow()["phase"].to_pylist() == ["rollout"]


def test_no_value_that_is_written_is_nan(tmp_path: Path) -> None:
    run = shown(tmp_path, made(), made((3, 1), seed=1), tokenizer=Tokenizer())
    rows = run.metrics().to_arrow().to_pylist()
    assert not [row["name"] for row in rows if row["value"] is None or row["value"] != row["value"]]


def test_what_is_known_of_a_sequence_goes_with_its_own_row(tmp_path: Path) -> None:
    batch, entropys = made()
    run = shown(tmp_path, (batch, entropys))
    reward = batch.batch["token_level_scores"].numpy().sum(1)
    kept = batch.batch["response_mask"].numpy() == 1
    for name, rows in (("correct", reward >= 1), ("wrong", reward < 1)):
        expected = entropys.numpy()[rows[:, None] & kept].mean()
        assert value(run, f"entropy/outcome/{name}/mean") == pytest.approx(expected, rel=1e-5)
    uid = batch.non_tensor_batch["uid"]
    named = run.samples().to_arrow().to_pylist()
    assert {row["sample_id"] for row in named} == {uid[row["sequence"]] for row in named}


def test_pass_rates_are_of_each_rows_own_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, entropys = made((4, 2, 5))
    told: dict[str, Any] = {}
    with VerlTap(tmp_path / "run", **EVERYTHING) as tap:
        monkeypatch.setattr(tap.lens, "observe_policy", lambda **known: told.update(known))
        tap.observe(batch, entropys)
    reward, uid = batch.batch["token_level_scores"].numpy().sum(1), batch.non_tensor_batch["uid"]
    expected = [(reward[uid == name] >= 1).mean() for name in uid]
    assert told["pass_rate"].tolist() == pytest.approx(expected)
    assert told["group"].tolist() == [list(dict.fromkeys(uid)).index(name) for name in uid]


def test_nothing_of_the_trainer_is_changed(tmp_path: Path) -> None:
    batch, entropys = made()
    before = {name: batch.batch[name].clone() for name in batch.batch.keys()}  # noqa: SIM118
    names = {name: values.copy() for name, values in batch.non_tensor_batch.items()}
    entropies, state = entropys.clone(), torch.get_rng_state()
    shown(tmp_path, (batch, entropys), tokenizer=Tokenizer(), record_text=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert list(batch.batch.keys()) == list(before)
    for name, tensor in before.items():
        assert torch.equal(batch.batch[name].nan_to_num(7), tensor.nan_to_num(7)), name
    assert torch.equal(entropys.nan_to_num(7), entropies.nan_to_num(7))
    assert batch.non_tensor_batch.keys() == names.keys()
    assert all((batch.non_tensor_batch[name] == names[name]).all() for name in names)
    assert batch.meta_info == {"reward_extra_keys": ["acc", "pred"], "temperature": 1.0}


def test_steps_bear_verls_numbers(tmp_path: Path) -> None:
    with VerlTap(tmp_path / "run", **EVERYTHING) as tap:
        for step in (31, 32, 33):
            tap.observe(*made(seed=step), step=step, seconds=2.5)
    run = el.open_run(tmp_path / "run")
    for name in ("entropy/token/mean", "reward/mean", "mismatch/kl"):
        assert run.metrics(name).to_arrow()["step"].to_pylist() == [31, 32, 33]
    assert run.metrics("rollout/seconds").to_arrow()["value"].to_pylist() == [2.5] * 3


@pytest.mark.parametrize(("preset", "every"), [("fast", 10), ("balanced", 1), ("full", 1)])
def test_entropies_come_as_often_as_advantages(tmp_path: Path, preset: str, every: int) -> None:
    run = shown(tmp_path, *(made(seed=at) for at in range(21)), preset=preset)
    due = [step for step in range(1, 22) if step == 1 or step % every == 0]
    for name in ("entropy/token/mean", "surprisal/token/mean", "covariance/within/mean"):
        assert run.metrics(name).to_arrow()["step"].to_pylist() == due


def test_a_schedule_that_is_asked_for_comes_first(tmp_path: Path) -> None:
    steps = [made(seed=at) for at in range(4)]
    run = shown(tmp_path, *steps, preset="balanced", diagnostics={"token_entropy": 2})
    assert run.metrics("entropy/token/mean").to_arrow()["step"].to_pylist() == [1, 2, 4]
    assert run.metrics("surprisal/token/mean").to_arrow()["step"].to_pylist() == [1, 2, 3, 4]


# -- what is not there -----------------------------------------------------------------------------


def test_without_the_optional_fields_the_rest_is_told_and_the_unknown_absent(
    tmp_path: Path,
) -> None:
    optional = ("prompts", "attention_mask", "rollout_log_probs", "ref_log_prob", "uid")
    batch, entropys = made(without=(*optional, "token_level_scores", "acc"))
    batch.meta_info = {}
    run = shown(tmp_path, (batch, entropys))
    assert run.status()[0].faults == {}
    found = names_of(run)
    assert {"entropy/token/mean", "covariance/within/mean", "completion/length/mean"} <= found
    unknown = ("mismatch/", "kl/", "reward/", "group/", "pass_at/", "completion/truncated/")
    assert not [name for name in found if name.startswith(unknown)]


def test_without_entropies_only_completions_are_told_and_the_log_says_so_once(
    tmp_path: Path,
) -> None:
    run = shown(tmp_path, *((made(seed=at)[0], None) for at in range(3)))
    assert run.status()[0].faults == {}
    found = names_of(run)
    assert {"reward/mean", "group/mixed/share", "completion/length/mean"} <= found
    assert not [n for n in found if n.startswith(("entropy/", "surprisal/", "covariance/", "kl/"))]
    messages = [row["message"] for row in run.events().to_arrow().to_pylist()]
    assert sum("no entropys were given" in message for message in messages) == 1


def test_of_unequal_groups_only_what_is_each_completions_own_is_told(tmp_path: Path) -> None:
    batch, entropys = made((4, 1, 3))
    run = shown(tmp_path, (batch, entropys), tokenizer=Tokenizer())
    assert run.status()[0].faults == {}
    reward = batch.batch["token_level_scores"].numpy().astype(np.float64).sum(1)
    expected = {
        "reward/mean": reward.mean(),
        "reward/std": reward.std(ddof=1),
        "reward/min": reward.min(),
        "reward/max": reward.max(),
        "completion/length/mean": batch.batch["response_mask"].numpy().sum(1).mean(),
    }
    found = {name: value(run, name) for name in expected}
    assert found == pytest.approx(expected, rel=1e-5)
    assert run.metrics("reward/*").to_arrow()["phase"].unique().to_pylist() == ["rollout"]
    assert not [name for name in names_of(run) if name.startswith(("group/", "pass_at/"))]


def test_correctness_is_unknown_where_no_reward_tells_it(tmp_path: Path) -> None:
    run = shown(tmp_path, made(), correct_from=None)
    found = names_of(run)
    assert {"reward/mean", "group/reward/std/mean"} <= found
    assert not [n for n in found if n.startswith(("pass_at/", "entropy/outcome/", "group/mixed"))]


def test_a_reward_that_is_nan_is_neither_right_nor_wrong(tmp_path: Path) -> None:
    batch, entropys = made()
    batch.batch["token_level_scores"][0] = torch.nan
    run = shown(tmp_path, (batch, entropys))
    reward = batch.batch["token_level_scores"].numpy().sum(1)
    assert value(run, "reward/mean") == pytest.approx(np.nanmean(reward), rel=1e-5)
    groups = by_prompt(batch, reward)
    known = [group for group in groups if not np.isnan(group).any()]
    expected = np.mean([(group >= 1).mean() for group in known])
    assert value(run, "pass_at/1") == pytest.approx(expected)


def test_a_missing_response_mask_is_the_attention_of_the_responses(tmp_path: Path) -> None:
    whole, entropys = made()
    bare, _ = made(without=("response_mask",))
    expected = value(shown(tmp_path / "one", (whole, entropys)), "entropy/token/mean")
    assert value(shown(tmp_path / "two", (bare, entropys)), "entropy/token/mean") == expected


def test_rejected_tokens_are_no_tokens_of_the_loss_but_of_the_completion(tmp_path: Path) -> None:
    batch, entropys = made()
    length = batch.batch["attention_mask"][:, PROMPT:].sum(1)
    batch.batch["response_mask"][::2] = 0
    run = shown(tmp_path, (batch, entropys))
    assert value(run, "completion/length/mean") == pytest.approx(float(length.float().mean()))
    assert value(run, "entropy/token/count") == float(length[1::2].sum())


@pytest.mark.parametrize("field", ["responses", "old_log_probs", "advantages"])
def test_a_first_batch_without_a_needed_field_is_refused_by_name(
    tmp_path: Path, field: str
) -> None:
    with pytest.raises(ValueError, match=rf"got one without {field} \(it has .*prompts.*1dda039b9"):
        shown(tmp_path, made(without=(field,)))


def test_a_first_batch_without_any_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without response_mask"):
        shown(tmp_path, made(without=("response_mask", "attention_mask")))


def test_what_is_no_dataproto_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a DataProto with batch .* got SimpleNamespace"):
        shown(tmp_path, (SimpleNamespace(keys=["a"]), None))


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    batch, entropys = made()
    with pytest.raises(ValueError, match=r"expected entropys \[B, C\] .* \(12, 9\), got \(12, 5\)"):
        shown(tmp_path / "narrow", (batch, entropys[:, :5]))
    batch.batch._fields["advantages"] = SimpleNamespace(is_nested=True)
    with pytest.raises(ValueError, match=r"expected advantages .* got nested"):
        shown(tmp_path / "jagged", (batch, entropys))


def test_a_later_batch_that_lacks_a_field_is_a_counted_fault_and_the_run_goes_on(
    tmp_path: Path,
) -> None:
    run = shown(tmp_path, made(), made(without=("advantages",), seed=1), made(seed=2))
    assert run.metrics("entropy/token/mean").to_arrow()["step"].to_pylist() == [1, 3]
    (count,) = run.status()[0].faults.values()
    assert count == 1


# -- verl's metrics, settings and text -------------------------------------------------------------


def test_verls_metrics_stand_beside_ours(tmp_path: Path) -> None:
    logged = {
        "actor/entropy": 0.5,
        "actor/grad_norm": np.float64(2.0),
        "num_turns/max": np.int64(3),
        "critic/score/mean": np.float32(0.25),
        "val-core/openai/gsm8k/acc/mean@1": 0.75,
        "note": "text",
    }
    with VerlTap(tmp_path / "run", **EVERYTHING) as tap:
        tap.observe(*made(), metrics=logged, step=5)
    run = el.open_run(tmp_path / "run")
    assert run.status()[0].faults == {}
    rows = [r for r in run.metrics().to_arrow().to_pylist() if r["name"].startswith("framework/")]
    assert {(r["name"], r["value"], r["phase"], r["step"]) for r in rows} == {
        ("framework/actor/entropy", 0.5, "train", 5),
        ("framework/actor/grad_norm", 2.0, "train", 5),
        ("framework/num_turns/max", 3.0, "train", 5),
        ("framework/critic/score/mean", 0.25, "train", 5),
        ("framework/val_core/openai/gsm8k/acc/mean_1", 0.75, "eval", 5),
    }


def test_settings_are_kept_and_the_length_limit_is_read(tmp_path: Path) -> None:
    config = {"data": {"max_response_length": WIDTH + 1}, "trainer": {"project_name": "mine"}}
    run = shown(tmp_path, made(), config=config, tokenizer=Tokenizer())
    assert run.config["user"] == config
    assert value(run, "completion/truncated/share") == 0


@pytest.mark.parametrize(
    ("actor", "expected"),
    [
        ({"clip_ratio": 0.2, "clip_ratio_low": 0.1, "clip_ratio_high": 0.28}, (0.1, 0.28)),
        ({"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": 0.0}, (0.2, 0.0)),
        ({"clip_ratio": 0.2, "policy_loss": {"loss_mode": "gspo"}}, (0.2, 0.2)),
        ({"clip_ratio": 0.2, "policy_loss": {"loss_mode": "dppo_tv"}}, None),
        ({}, None),
    ],
)
def test_clip_bounds_are_those_of_losses_that_clip_ratios(actor: Any, expected: Any) -> None:
    assert clip_bounds({"actor_rollout_ref": {"actor": actor}}) == expected
    assert clip_bounds({}) is None


class Node(dict[str, Any]):
    """A DictConfig as far as it is used; a value that begins with ``${`` is an interpolation."""


class OmegaConf:
    """Its functions; what is interpolated is looked up in `known`, or cannot be resolved."""

    known: ClassVar[dict[str, Any]] = {}

    @staticmethod
    def is_config(value: Any) -> bool:
        return isinstance(value, Node)

    @classmethod
    def select(cls, config: Node, path: str) -> Any:
        found: Any = config
        for name in path.split("."):
            found = None if found is None else found.get(name)
        return cls.known[found] if str(found).startswith("${") else found

    @classmethod
    def to_container(cls, config: Node, *, resolve: bool) -> dict[str, Any]:
        assert not resolve, "what is behind an interpolation is not to be written"
        return dict(config)


@pytest.fixture
def interpolating(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Values of interpolations, while omegaconf seems to be imported."""
    known: dict[str, Any] = {}
    monkeypatch.setitem(sys.modules, "omegaconf", SimpleNamespace(OmegaConf=OmegaConf))
    monkeypatch.setattr(OmegaConf, "known", known)
    return known


def test_interpolations_are_kept_as_text_and_read_where_they_are_needed(
    tmp_path: Path, interpolating: dict[str, Any]
) -> None:
    interpolating |= {"${limit}": WIDTH + 1, "${low}": 0.1, "${oc.env:OURS}": "hidden"}
    actor = {"clip_ratio_low": "${low}", "clip_ratio_high": "${nowhere}", "clip_ratio": 0.2}
    config = Node(
        data={"max_response_length": "${limit}"},
        actor_rollout_ref={"actor": actor},
        trainer={"logger": "${oc.env:OURS}"},
    )
    run = shown(tmp_path, made(), config=config, tokenizer=Tokenizer())
    assert run.config["user"] == dict(config)
    assert "hidden" not in (tmp_path / "run/run.json").read_text()
    assert value(run, "completion/truncated/share") == 0
    assert clip_bounds(config) == (0.1, 0.2)


def test_what_cannot_be_resolved_is_not_known_and_does_not_raise(
    tmp_path: Path, interpolating: dict[str, Any]
) -> None:
    actor = {"clip_ratio": "${nowhere}", "policy_loss": {"loss_mode": "${nowhere}"}}
    settings = {
        "data": {"max_response_length": "${nowhere}"},
        "actor_rollout_ref": {"actor": actor},
    }
    assert interpolating == {}
    for at, config in enumerate((Node(settings), settings)):
        assert (clip_bounds(config), length_limit(config)) == (None, None)
        run = shown(tmp_path / str(at), made(), config=config, tokenizer=Tokenizer())
        assert run.status()[0].faults == {}


SECRETS = (
    "api_key", "WANDB_API_KEY", "aws-secret-access-key", "token", "hub_token", "access_token",
    "secret", "client_secret", "password", "db_password", "key",
)  # fmt: skip
HARMLESS = (
    "tokenizer", "num_tokens", "max_token_len", "token_level", "key_value", "prompt_key",
    "reward_fn_key", "keys", "secretary", "monkey",
)  # fmt: skip


def test_values_under_a_secrets_name_are_blank_at_any_depth(tmp_path: Path) -> None:
    names = (*SECRETS, *HARMLESS)
    inner = {name: f"value of {name}" for name in names}
    config = {"trainer": {"env": [inner]}, "use": {"token": None, "password": False}, **inner}
    run = shown(tmp_path, made(), config=config)
    written = json.loads((tmp_path / "run/run.json").read_text())
    expected = {name: "" if name in SECRETS else f"value of {name}" for name in names}
    assert run.config["user"] == {**config, "trainer": {"env": [expected]}, **expected}
    assert not [name for name in SECRETS if f'value of {name}"' in json.dumps(written)]
    assert config["token"] == "value of token", "the trainer's own settings are as they were"
    assert plain_settings(None) == {}


def test_text_is_kept_where_asked_for_without_padding(tmp_path: Path) -> None:
    batch, entropys = made()
    run = shown(tmp_path, (batch, entropys), record_text=True, tokenizer=Tokenizer())
    rows = run.completions().to_arrow().to_pylist()
    assert rows
    decode = Tokenizer().decode
    length = batch.batch["response_mask"].sum(1).tolist()
    responses, prompts = batch.batch["responses"].tolist(), batch.batch["prompts"].tolist()
    pairs = {
        decode(text[:count]): decode(prompt)
        for text, count, prompt in zip(responses, length, prompts, strict=True)
    }
    assert all(pairs[row["text"]] == row["prompt"] for row in rows)


def test_text_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a tokenizer with record_text=True"):
        VerlTap(tmp_path / "run", record_text=True)


# -- attach ----------------------------------------------------------------------------------------


class RayPPOTrainer:
    """The order of calls of verl's own ``fit``."""

    def __init__(self, steps: int = 3) -> None:
        self.config = {"trainer": {"project_name": "mine"}}
        self.tokenizer = Tokenizer()
        self.global_steps, self.steps = 10, steps
        self.updated: list[Any] = []
        self.seen: dict[int, float] = {}

    def fit(self) -> str:
        for _ in range(self.steps):
            self.global_steps += 1
            batch, self.entropys = made(seed=self.global_steps)
            scored, _ = self._compute_old_log_prob(batch)
            kept = batch.batch["response_mask"] == 1
            self.seen[self.global_steps] = float(scored.batch["entropys"][kept].mean())
            scored.batch.pop("entropys")
            batch = self.advantages_of(batch)
            self._update_actor(batch)
        return "done"

    def advantages_of(self, batch: Any) -> Any:
        return batch

    def _compute_old_log_prob(self, batch: Any) -> Any:
        fields = {
            "old_log_probs": batch.batch["old_log_probs"].nan_to_num(0.0),
            "entropys": self.entropys,
        }
        batch.batch._fields["old_log_probs"] = fields["old_log_probs"]
        return SimpleNamespace(batch=Tensors(fields)), 0.0

    def _update_actor(self, batch: Any) -> Any:
        self.updated.append(batch)
        return batch


def series(run: el.Run, name: str) -> dict[int, float]:
    table = run.metrics(name).to_arrow()
    return dict(zip(table["step"].to_pylist(), table["value"].to_pylist(), strict=True))


def test_one_line_before_fit_writes_what_the_driver_saw(tmp_path: Path) -> None:
    trainer = RayPPOTrainer()
    attach(trainer, tmp_path / "run", **EVERYTHING)
    assert trainer.fit() == "done"
    run = el.open_run(tmp_path / "run")
    assert (run.state(), run.status()[0].faults) == ("finished", {})
    assert list(trainer.seen) == [11, 12, 13]
    assert series(run, "entropy/token/mean") == pytest.approx(trainer.seen, rel=1e-5)
    assert list(series(run, "group/mixed/share")) == [11, 12, 13]
    assert run.config["user"] == trainer.config
    assert len(trainer.updated) == 3


def test_entropies_of_rows_that_were_drawn_anew_are_not_given_to_others(tmp_path: Path) -> None:
    class Resampling(RayPPOTrainer):
        def advantages_of(self, batch: Any) -> Any:
            again = torch.tensor([0, 0, *range(2, 12)])
            for name, values in batch.batch._fields.items():
                batch.batch._fields[name] = values[again]
            return batch

    trainer = Resampling()
    attach(trainer, tmp_path / "run", **EVERYTHING)
    trainer.fit()
    run = el.open_run(tmp_path / "run")
    assert run.status()[0].faults == {}
    assert "completion/length/mean" in names_of(run)
    assert not [name for name in names_of(run) if name.startswith("entropy/")]


def test_an_exception_out_of_fit_seals_the_log_as_failed(tmp_path: Path) -> None:
    class Failing(RayPPOTrainer):
        def _update_actor(self, batch: Any) -> Any:
            raise RuntimeError("out of memory")

    trainer = Failing()
    attach(trainer, tmp_path / "run", **EVERYTHING)
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.fit()
    run = el.open_run(tmp_path / "run")
    assert run.state() == "failed"
    assert list(series(run, "entropy/token/mean")) == [11]


def test_our_own_errors_do_not_reach_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("ours")

    trainer = RayPPOTrainer()
    tap = attach(trainer, tmp_path / "run", **EVERYTHING)
    monkeypatch.setattr("entropylens_callbacks.verl.tensors_of", broken)
    assert trainer.fit() == "done"
    assert len(trainer.updated) == 3
    assert sum(el.open_run(tap.lens.run_dir).status()[0].faults.values()) == 3


@pytest.mark.parametrize("first", [ValueError("ours"), TypeError("ours"), None])
def test_a_batch_of_another_form_warns_and_never_ends_a_training(
    tmp_path: Path,
    first: Exception | None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Other(RayPPOTrainer):
        def advantages_of(self, batch: Any) -> Any:
            if self.global_steps < 13:
                batch.batch.pop("advantages")
            return batch

    def broken(*_: Any) -> None:
        assert first is not None
        raise first

    trainer = Other(steps=4)
    attach(trainer, tmp_path / "run", **EVERYTHING)
    if first is not None:
        monkeypatch.setattr("entropylens_callbacks.verl.tensors_of", broken)
    assert trainer.fit() == "done"
    assert len(trainer.updated) == 4
    said = "ours" if first is not None else "got one without advantages"
    warned = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert [said in one for one in warned] == [True]
    run = el.open_run(tmp_path / "run")
    assert run.state() == "finished"
    events = run.events().to_arrow().to_pylist()
    (event,) = [row for row in events if row["kind"] == "capture" and said in row["message"]]
    assert (event["severity"], event["message"].startswith("nothing is recorded")) == (
        "warning",
        True,
    )
    if first is None:
        assert list(series(run, "entropy/token/mean")) == [13, 14]
        assert list(run.status()[0].faults.values()) == [1]


def test_trainers_without_the_seams_are_refused(tmp_path: Path) -> None:
    class Old:
        def fit(self) -> None: ...

    class OfTransferQueue(RayPPOTrainer):
        def _compute_old_log_prob(self, batch: Any, metrics: dict[str, Any]) -> Any: ...  # type: ignore[override]

        def _update_actor(self, batch: Any, metrics: dict[str, Any]) -> Any: ...  # type: ignore[override]

    message = "got {} without _compute_old_log_prob and _update_actor .* call VerlTap.observe"
    for trainer in (Old(), OfTransferQueue()):
        with pytest.raises(ValueError, match=message.format(type(trainer).__name__)):
            attach(trainer, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fit_that_goes_past_the_seams_is_complained_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Own(RayPPOTrainer):
        def fit(self) -> str:
            return "done"

    trainer = Own()
    attach(trainer, tmp_path / "run", **EVERYTHING)
    assert trainer.fit() == "done"
    assert "Own.fit ended without a call of _update_actor" in caplog.text
    events = el.open_run(tmp_path / "run").events().to_arrow().to_pylist()
    assert any("call VerlTap.observe in its loop" in row["message"] for row in events)
