"""verl: what the driver knows of a step's completions and tokens, by `VerlTap` or `attach`.

verl itself is never imported: its batch is read by the names of its fields.
"""

from __future__ import annotations

import functools
import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

import entropylens as el
from entropylens_callbacks import loggable

__all__ = ["VerlTap", "attach"]

log = logging.getLogger("entropylens")

_READ_FROM: Final = "verl-project/verl at 1dda039b9 (2026-08-22)"
_NEEDED: Final = ("responses", "response_mask", "old_log_probs", "advantages")
_OF_TOKENS: Final = ("rollout_log_probs", "ref_log_prob")
_OPTIONAL: Final = ("prompts", "attention_mask", "token_level_scores")
_RATIO_CLIPPED: Final = frozenset(("vanilla", "gspo"))
"""Policy losses whose clip_ratio bounds a ratio; that of others bounds another divergence."""
_SCORES: Final = "_compute_old_log_prob"
_UPDATES: Final = "_update_actor"
_NO_ENTROPIES: Final = (
    "no entropys were given (in bypass mode verl computes none): nothing is recorded of tokens, "
    "only of completions"
)


class VerlTap:
    """Writes what verl's driver knows of each training step to a log.

    It holds no model: log-probabilities, entropies and advantages are verl's own, as they stand on
    the driver, at the rollout's temperature. One line in ``fit``, before the step is logged::

        tap.observe(batch, entropys=entropys, metrics=metrics, step=self.global_steps)

    Args:
        run_dir: Where the log goes.
        config: verl's own settings, a mapping or a DictConfig: kept in the manifest, and read for
            clip bounds and the length limit.
        correct_from: Reward from which a completion is correct; None is not known.
        record_text: Keep prompts and completions: all of a step are decoded, on the driver.
        tokenizer: Decodes, and says which token ends a completion.
        **lens: Other arguments of `entropylens.Lens`: ``preset``, ``max_overhead``, ...

    Raises:
        ValueError: Text is to be kept without a tokenizer, or as `entropylens.Lens` says.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        config: Any = None,
        correct_from: float | None = 1.0,
        record_text: bool = False,
        tokenizer: Any = None,
        **lens: Any,
    ) -> None:
        if record_text and tokenizer is None:
            raise ValueError("VerlTap: expected a tokenizer with record_text=True, got None")
        self._correct_from, self._record_text = correct_from, record_text
        self._tokenizer, self._config = tokenizer, _plain(config)
        self._has_noted = False
        decode = {"decode": lambda token: tokenizer.decode([token])} if record_text else {}
        self.lens = el.Lens(run_dir=run_dir, **{"config": self._config, **decode, **lens})
        self.lens.watch.expect("policy", "rollout")

    def observe(
        self,
        batch: Any,
        entropys: Tensor | None = None,
        metrics: Mapping[str, Any] | None = None,
        step: int | None = None,
        seconds: float | None = None,
    ) -> None:
        """Show one training step, once, any time after its advantages are computed.

        Args:
            batch: The driver's DataProto; nothing in it is changed or kept.
            entropys: ``[B, C]``, what ``fit`` takes out of the recomputed log-probabilities under
                this name, nats. Without them nothing is recorded of tokens.
            metrics: verl's own, written as ``framework/NAME``; validation's with phase eval.
            step: verl's ``global_steps``; by default one more than the last.
            seconds: Wall time of generating and scoring.

        Raises:
            ValueError: In the first step only: fields are missing or have other shapes.
        """
        number = self.lens.last_step + 1 if step is None else step
        show = functools.partial(self._show, batch, entropys, number, seconds)
        self.lens.aside("verl", show, raises=True)
        self.lens.step(step=number)
        if metrics:
            self.lens.aside("verl metrics", lambda: self._log(metrics))

    def close(self, state: str = "finished", reason: str = "") -> None:
        """Write everything and seal the log; a second call does nothing."""
        self.lens.close(state, reason)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.lens.__exit__(kind, error, traceback)

    # -- within ------------------------------------------------------------------------------

    def _show(
        self, batch: Any, entropys: Tensor | None, number: int, seconds: float | None
    ) -> None:
        found, names = _tensors(batch, entropys), batch.non_tensor_batch
        due = self.lens.watch.due
        of_completions = self._of_completions(found)
        group = _groups(names.get("uid"), found["responses"].device)
        if "rollout" in due:
            parts = _components(batch, found["responses"].device)
            self._show_rollout(found, of_completions, parts, group, number, seconds)
        if entropys is None:
            self._note_missing_entropies()
        elif "tokens" in due or "policy" in due:
            self._show_policy(found, of_completions, group, names.get("uid"))

    def _of_completions(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``[B]`` reward and correctness, in the batch's rows; without the unknown."""
        scores = found.get("token_level_scores")
        if scores is None:
            return {}
        reward = scores.float().sum(-1)
        if self._correct_from is None:
            return {"reward": reward}
        correct = (reward >= self._correct_from).float()
        return {"reward": reward, "correct": correct.masked_fill(reward.isnan(), torch.nan)}

    def _show_rollout(
        self,
        found: Mapping[str, Tensor],
        of_completions: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        group: Tensor | None,
        number: int,
        seconds: float | None,
    ) -> None:
        """Show completions, with their groups standing together where these are of one size."""
        size = _common_size(group)
        known = {"token_id": found["responses"], "mask": _generated(found), **of_completions}
        truncated = self._truncated(known["token_id"], known["mask"])
        if truncated is not None:
            known["truncated"] = truncated
        if group is not None and size is not None:
            order = group.argsort(stable=True)
            known = {name: values[order] for name, values in {"group": group, **known}.items()}
            parts = {name: values[order] for name, values in parts.items()}
        self.lens.observe_rollout(group_size=size, rewards=parts, seconds=seconds, **known)

    def _truncated(self, token_id: Tensor, mask: Tensor) -> Tensor | None:
        """``[B]`` bool: reached the length limit without an end; None where ends are not known."""
        end = getattr(self._tokenizer, "eos_token_id", None)
        if end is None:
            return None
        ends = torch.as_tensor(end, device=token_id.device)
        limit = _setting(self._config, "data.max_response_length") or token_id.shape[1]
        length = mask.sum(1)
        last = token_id.gather(1, (length - 1).clamp(min=0)[:, None])[:, 0]
        return (length >= limit) & ~torch.isin(last, ends)

    def _show_policy(
        self,
        found: Mapping[str, Tensor],
        of_completions: Mapping[str, Tensor],
        group: Tensor | None,
        uid: Sequence[Any] | None,
    ) -> None:
        known: dict[str, Any] = dict(of_completions)
        if group is not None:
            known["group"] = group
            if "correct" in known:
                known["pass_rate"] = _pass_rate(known["correct"], group)
        if self._record_text and "policy" in self.lens.watch.due:
            known |= self._texts(found)
        self.lens.observe_policy(
            advantage=found["advantages"],
            logprob=found["old_log_probs"],
            entropy=found["entropys"],
            token_ids=found["responses"],
            mask=found["response_mask"],
            sample_id=None if uid is None else [str(name) for name in uid],
            sampler_logprob=found.get("rollout_log_probs"),
            reference_logprob=found.get("ref_log_prob"),
            clip=_clip(self._config),
            **known,
        )

    def _texts(self, found: Mapping[str, Tensor]) -> dict[str, list[str]]:
        decode = functools.partial(self._tokenizer.batch_decode, skip_special_tokens=True)
        masked = zip(found["responses"], _generated(found), strict=True)
        texts = {"completions": decode([row[kept].tolist() for row, kept in masked])}
        if "prompts" in found:
            texts["prompts"] = decode(found["prompts"].tolist())
        return texts

    def _note_missing_entropies(self) -> None:
        if not self._has_noted:
            self._has_noted = True
            self.lens.event("capture", _NO_ENTROPIES)

    def _log(self, metrics: Mapping[str, Any]) -> None:
        numbers = {n: v.item() if isinstance(v, np.generic) else v for n, v in metrics.items()}
        evaluated = {name for name in numbers if name.startswith("val-")}
        for phase in ("train", "eval"):
            kept = {n: v for n, v in numbers.items() if (n in evaluated) == (phase == "eval")}
            self.lens.log(loggable(kept), phase=phase, source="framework")


def attach(trainer: Any, run_dir: str | Path, **options: Any) -> VerlTap:
    """Let a `VerlTap` watch a RayPPOTrainer: one line before ``trainer.fit()``.

    Two of its methods, of this one object, are wrapped: ``_compute_old_log_prob(batch)``, whose
    result has the entropies, and ``_update_actor(batch)``, which is given the advantages; ``fit``
    ends the log. verl 0.7.0 to 0.9.0 have both. 0.6.1 and older do not, and the V1 trainers
    (``trainer.use_v1``, the default from 0.9.0) keep their batch elsewhere: both are refused. Steps
    of a critic's warm-up, in which the policy is not updated, are not seen, and neither are verl's
    own metrics: for those call `VerlTap.observe`.

    Args:
        trainer: A RayPPOTrainer; its ``config`` and ``tokenizer`` are used unless given.
        run_dir: Where the log goes.
        **options: As of `VerlTap`.

    Returns:
        The tap.

    Raises:
        ValueError: The trainer has no such methods, or they take other arguments.
    """
    unknown = [name for name in (_SCORES, _UPDATES) if not _takes_a_batch(trainer, name)]
    if unknown or not callable(getattr(trainer, "fit", None)):
        raise ValueError(
            f"attach: expected a RayPPOTrainer with {_SCORES}(batch), {_UPDATES}(batch) and fit, "
            f"as verl 0.7.0 to 0.9.0 have it, got {type(trainer).__name__} without "
            f"{' and '.join(unknown) or 'fit'} of that form; call VerlTap.observe where its "
            f"padded batch is at hand"
        )
    settings = {name: getattr(trainer, name, None) for name in ("config", "tokenizer")}
    tap = VerlTap(run_dir, **{**settings, **options})
    driver = _Driver(trainer, tap)
    setattr(trainer, _SCORES, driver.watched_scoring(getattr(trainer, _SCORES)))
    setattr(trainer, _UPDATES, driver.watched_update(getattr(trainer, _UPDATES)))
    trainer.fit = driver.watched_fit(trainer.fit)
    return tap


class _Driver:
    """What one trainer's methods show on their way, put together for a tap."""

    def __init__(self, trainer: Any, tap: VerlTap) -> None:
        self._trainer, self._tap = trainer, tap
        self._scored: Any = None
        self._has_seen = False

    def watched_scoring(self, score: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(score)
        def watched(*args: Any, **kwargs: Any) -> Any:
            result = score(*args, **kwargs)
            self._tap.lens.aside("verl entropys", lambda: self._keep(result))
            return result

        return watched

    def watched_update(self, update: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(update)
        def watched(batch: Any, *args: Any, **kwargs: Any) -> Any:
            self._has_seen = True
            entropys: list[Tensor | None] = [None]
            lens = self._tap.lens
            lens.aside("verl entropys", lambda: entropys.insert(0, self._entropys_of(batch)))
            step = getattr(self._trainer, "global_steps", None)
            self._tap.observe(batch, entropys[0], step=step)
            return update(batch, *args, **kwargs)

        return watched

    def watched_fit(self, fit: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fit)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._tap:
                result = fit(*args, **kwargs)
                if not self._has_seen:
                    self._complain()
            return result

        return watched

    def _keep(self, result: Any) -> None:
        # The entropies are taken out of this very object before it joins the batch.
        held = (result[0] if isinstance(result, tuple) else result).batch
        self._scored = (held["old_log_probs"], held["entropys"])

    def _entropys_of(self, batch: Any) -> Tensor | None:
        """The kept entropies, if the batch still has their rows: PF-PPO draws rows anew."""
        scored, self._scored = self._scored, None
        if scored is None:
            return None
        logprob, entropys = scored
        return entropys if torch.equal(batch.batch["old_log_probs"], logprob) else None

    def _complain(self) -> None:
        message = (
            f"{type(self._trainer).__name__}.fit ended without a call of {_UPDATES}: nothing was "
            f"recorded; call VerlTap.observe in its loop"
        )
        log.warning("entropylens: %s", message)
        self._tap.lens.event("capture", message, severity="warning")


def _takes_a_batch(trainer: Any, name: str) -> bool:
    """Whether a trainer has such a method that needs nothing but a batch."""
    method = getattr(trainer, name, None)
    if not callable(method):
        return False
    try:
        inspect.signature(method).bind(None)
    except TypeError:
        return False
    return True


# -- a DataProto -----------------------------------------------------------------------------------


def _tensors(batch: Any, entropys: Tensor | None) -> dict[str, Tensor]:
    """The fields of a batch that are used, ``[B, C]`` where they are of tokens.

    Raises:
        ValueError: It is no such batch, or fields are missing or of other shapes.
    """
    held = getattr(batch, "batch", None)
    if held is None or getattr(batch, "non_tensor_batch", None) is None:
        raise ValueError(
            f"VerlTap.observe: expected a DataProto with batch and non_tensor_batch, got "
            f"{type(batch).__name__}; read from {_READ_FROM}"
        )
    present = set(held.keys())
    found = {n: held[n] for n in (*_NEEDED, *_OF_TOKENS, *_OPTIONAL) if n in present}
    if "response_mask" not in found and {"responses", "attention_mask"} <= found.keys():
        found["response_mask"] = _generated(found)
    missing = [name for name in _NEEDED if name not in found]
    if missing:
        raise ValueError(
            f"VerlTap.observe: expected {', '.join(_NEEDED)} in the batch, got one without "
            f"{', '.join(missing)} (it has {', '.join(sorted(map(str, present))) or 'nothing'}); "
            f"call it after compute_advantage; fields are those of {_READ_FROM}"
        )
    if entropys is not None:
        found["entropys"] = entropys
    shape = _shape(found["responses"])
    for name in (*_NEEDED, *_OF_TOKENS, "entropys"):
        if name in found and _shape(found[name]) != shape:
            raise ValueError(
                f"VerlTap.observe: expected {name} [B, C] padded as responses {shape}, got "
                f"{_shape(found[name])}"
            )
    return found


def _shape(tensor: Tensor) -> tuple[int, ...] | str:
    return "nested" if tensor.is_nested else tuple(tensor.shape)


def _generated(found: Mapping[str, Tensor]) -> Tensor:
    """``[B, C]`` bool: the completion, as verl counts its length.

    Not ``response_mask``, in which tool output is 0 and so is what rejection sampling takes out.
    """
    width = found["responses"].shape[1]
    attention = found.get("attention_mask")
    mask = found["response_mask"] if attention is None else attention[:, -width:]
    return mask.bool()


def _groups(uid: Sequence[Any] | None, device: torch.device) -> Tensor | None:
    """``[B]`` index of each row's prompt, by first appearance; None where it is not told."""
    if uid is None:
        return None
    numbers: dict[Any, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in uid], device=device)


def _common_size(group: Tensor | None) -> int | None:
    """Completions of each prompt, if all have as many."""
    if group is None:
        return None
    sizes = set(Counter(group.tolist()).values())
    return sizes.pop() if len(sizes) == 1 else None


def _pass_rate(correct: Tensor, group: Tensor) -> Tensor:
    """``[B]`` share of right completions in each row's group; NaN where one is not known."""
    sums = torch.zeros_like(correct).index_add(0, group, correct)
    counts = torch.zeros_like(correct).index_add(0, group, torch.ones_like(correct))
    return (sums / counts)[group]


def _components(batch: Any, device: torch.device) -> dict[str, Tensor]:
    """``[B]`` numbers that the reward function told beside the reward, by name."""
    names = (getattr(batch, "meta_info", None) or {}).get("reward_extra_keys", ())
    told = {name: batch.non_tensor_batch.get(name) for name in names}
    parts = {}
    for name, values in told.items():
        if values is not None and all(_is_number(value) for value in values):
            numbers = [torch.nan if value is None else float(value) for value in values]
            parts[str(name)] = torch.tensor(numbers, device=device)
    return parts


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | np.bool_ | np.number)


def _plain(config: Any) -> dict[str, Any]:
    """Settings as a dictionary, of a DictConfig too."""
    omegaconf = sys.modules.get("omegaconf")
    if omegaconf is not None and omegaconf.OmegaConf.is_config(config):
        config = omegaconf.OmegaConf.to_container(config, resolve=True)
    return dict(config or {})


def _setting(config: Mapping[str, Any], path: str) -> Any:
    """A setting by its dotted path; None where it is not set."""
    found: Any = config
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found


def _clip(config: Mapping[str, Any]) -> tuple[float, float] | None:
    """``(low, high)`` of a loss that clips ratios; ``clip_ratio`` stands in for what is unset."""
    actor = _setting(config, "actor_rollout_ref.actor") or {}
    mode = _setting(actor, "policy_loss.loss_mode") or "vanilla"
    if mode not in _RATIO_CLIPPED:
        return None
    both = [_setting(actor, f"clip_ratio_{side}") for side in ("low", "high")]
    low, high = (_setting(actor, "clip_ratio") if one is None else one for one in both)
    return None if low is None or high is None else (float(low), float(high))
