"""verl: what the driver knows of a step's completions and tokens, by `VerlTap` or `attach`.

verl itself is never imported: its batch is read by the names of its fields.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import torch
from torch import Tensor

import entropylens as el
from entropylens_callbacks import loggable, with_tokens_at_each_step
from entropylens_callbacks.verl_batches import (
    clip_bounds,
    common_size,
    generated_mask,
    groups_of,
    length_limit,
    pass_rate,
    plain_settings,
    reward_components,
    tensors_of,
)

__all__ = ["VerlTap", "attach"]

log = logging.getLogger("entropylens")

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
        config: verl's own settings, a mapping or a DictConfig: kept in the manifest as they were
            written, without secrets, and read for clip bounds and the length limit.
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
        self._tokenizer, self._has_noted = tokenizer, False
        self._clip, self._longest = clip_bounds(config), length_limit(config)
        decode = {"decode": lambda token: tokenizer.decode([token])} if record_text else {}
        options = {"config": plain_settings(config), **decode, **with_tokens_at_each_step(lens)}
        self.lens = el.Lens(run_dir=run_dir, **options)
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
        show = functools.partial(self._show, batch, entropys, seconds)
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

    def _show(self, batch: Any, entropys: Tensor | None, seconds: float | None) -> None:
        found, names = tensors_of(batch, entropys), batch.non_tensor_batch
        due = self.lens.watch.due
        of_completions = self._of_completions(found)
        group = groups_of(names.get("uid"), found["responses"].device)
        if "rollout" in due:
            parts = reward_components(batch, found["responses"].device)
            self._show_rollout(found, of_completions, parts, group, seconds)
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
        seconds: float | None,
    ) -> None:
        """Show completions, with their groups standing together where these are of one size."""
        size = common_size(group)
        known = {"token_id": found["responses"], "mask": generated_mask(found), **of_completions}
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
        limit, length = self._longest or token_id.shape[1], mask.sum(1)
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
                known["pass_rate"] = pass_rate(known["correct"], group)
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
            clip=self._clip,
            **known,
        )

    def _texts(self, found: Mapping[str, Tensor]) -> dict[str, list[str]]:
        decode = functools.partial(self._tokenizer.batch_decode, skip_special_tokens=True)
        masked = zip(found["responses"], generated_mask(found), strict=True)
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
    ends the log. What is wrong with a batch is a warning and an event here, and never ends the
    training. verl 0.7.0 to 0.9.0 have both. 0.6.1 and older do not, and the V1 trainers
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
            self._observe(batch, entropys[0])
            return update(batch, *args, **kwargs)

        return watched

    def watched_fit(self, fit: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fit)
        def watched(*args: Any, **kwargs: Any) -> Any:
            with self._tap:
                result = fit(*args, **kwargs)
                if not self._has_seen:
                    self._complain(
                        f"{type(self._trainer).__name__}.fit ended without a call of {_UPDATES}: "
                        f"nothing was recorded; call VerlTap.observe in its loop"
                    )
            return result

        return watched

    def _observe(self, batch: Any, entropys: Tensor | None) -> None:
        """Show a step; a rollout was paid for, so not even a setup error ends the training."""
        lens, number = self._tap.lens, getattr(self._trainer, "global_steps", None)
        try:
            self._tap.observe(batch, entropys, step=number)
        except (TypeError, ValueError) as error:
            self._complain(f"nothing is recorded of what {_UPDATES} was given: {error}")
            lens.aside("verl step", lambda: lens.step(step=number))

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

    def _complain(self, message: str) -> None:
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
