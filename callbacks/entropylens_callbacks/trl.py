"""What TRL's GRPO and RLOO trainers know of a rollout and of the tokens they learn from."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from entropylens.capture.policy import PolicyBatch, delimited
from entropylens.registry import RolloutReading
from entropylens_callbacks.sampling import draws_whole

if TYPE_CHECKING:
    from entropylens_callbacks.transformers import EntropyLensCallback

__all__ = ["PolicyWatch", "RolloutOptions"]

_TRAINERS: Final = frozenset(("GRPOTrainer", "RLOOTrainer"))
_GENERATES: Final = "_generate_and_score_completions"
_SCORES: Final = "_get_per_token_logps_and_entropies"
_REWARDS: Final = "_calculate_rewards"
_ROW: Final = "entropylens_row"
_CLIPPED_LOSSES: Final = frozenset(("grpo", "bnpo", "dr_grpo", "dapo", "luspo"))
_TESTED: Final = "1.16"
_THINKING_END: Final = "</think>"
_TEXT_ROW: Final = "entropylens_text_row"
_LONGEST_NAME: Final = 80


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """What has to be told about completions.

    Args:
        correct_from: Reward from which a completion is correct.
        correct_by: Reward function whose reward that is. None is the only one there is; where there
            are several, nothing is known to be correct.
        thinking_end: Text that ends the thinking. The default counts only where the tokenizer has
            one token for it: a model that thinks knows it. None is no thinking.
        answer_of: What in a completion is its answer, for counting different ones; None is the text
            behind ``thinking_end``, or all of it.
        record_text: Keep prompts and completions.
    """

    correct_from: float = 1.0
    correct_by: str | None = None
    thinking_end: str | None = _THINKING_END
    answer_of: Callable[[str], str] | None = None
    record_text: bool = False


@dataclass(frozen=True, kw_only=True)
class _Rollout:
    """This rank's completions of the last generation, in the order they were generated in."""

    columns: Mapping[str, Tensor]
    """On the device: reward, correct, pass_rate and group, ``[B]`` each."""
    prompts: Sequence[str]
    completions: Sequence[str]
    noted: Sequence[Tensor]
    """Log-probabilities computed while generating: RLOO's old ones, then a reference's."""


class PolicyWatch:
    """Reads one GRPO or RLOO trainer: its rollouts while groups stand together, and its batches.

    TRL shuffles completions after scoring them. Two columns with the row's number, one on the
    device and one on the host, are therefore put beside the trainer's own before it shuffles, and
    every micro-batch tells by them which rollouts it holds; the loss reads only columns that it
    knows. Rewards, and RLOO's log-probabilities, are noted as the trainer computes them.

    Args:
        trainer: One that `suits`.
        options: What has to be told about completions.
    """

    def __init__(self, trainer: Any, options: RolloutOptions) -> None:
        self._trainer, self._options = trainer, options
        self._rollout: _Rollout | None = None
        self._scored: list[Any] | None = None
        self._rewards: Tensor | None = None
        """``[completions of all ranks, functions]`` of the generation in progress."""
        self._groups = 0
        self._names: list[str] = []
        self._draws_whole = False
        self._is_rloo = any(parent.__name__ == "RLOOTrainer" for parent in type(trainer).__mro__)
        needed = (_GENERATES, _SCORES, _REWARDS, "_logs")
        self.missing = [name for name in needed if not hasattr(trainer, name)]
        """Private names that this version of TRL lacks: without them rollouts are unseen."""
        tokenizer: Any = getattr(trainer, "_tokenizer", getattr(trainer, "processing_class", None))
        self._delimiter = _token_ids(tokenizer, options.thinking_end)
        self._tokenizer = tokenizer
        names = getattr(trainer, "reward_func_names", ())
        if options.correct_by is not None and options.correct_by not in names:
            raise ValueError(
                f"attach: expected correct_by to be a reward function of the trainer "
                f"({', '.join(names)}), got {options.correct_by!r}"
            )

    @staticmethod
    def suits(trainer: Any) -> bool:
        """Whether a trainer generates completions and learns from their advantages."""
        return any(parent.__name__ in _TRAINERS for parent in type(trainer).__mro__)

    @property
    def complaint(self) -> str:
        """What to say about `missing`."""
        left = "entropies" if self._is_rloo else "what the loss is shown"
        return (
            f"attach: expected {type(self._trainer).__name__} to have {', '.join(self.missing)}, "
            f"as TRL {_TESTED} has it; this version does not, so rewards, groups and text are not "
            f"recorded, only {left}; install trl=={_TESTED}.* or report it"
        )

    def join(self, callback: EntropyLensCallback) -> None:
        """See each generation, once it is scored and before it is shuffled."""
        trainer = self._trainer
        if self.missing:
            return
        generate = getattr(trainer, _GENERATES)

        @functools.wraps(generate)
        def watched(inputs: Any) -> Any:
            lens = callback.lens
            if lens is None or not trainer.model.training:
                return generate(inputs)
            began, self._scored = perf_counter(), []
            try:
                output = generate(inputs)
            finally:
                scored, self._scored = self._scored, None
            seconds = perf_counter() - began
            lens.aside("rollout", lambda: self._take(lens, output, scored or [], seconds))
            return output

        setattr(trainer, _GENERATES, watched)
        setattr(trainer, _REWARDS, self._noting_rewards(getattr(trainer, _REWARDS)))
        if self._is_rloo:
            setattr(trainer, _SCORES, self._noting(getattr(trainer, _SCORES)))

    def begin(self) -> None:
        """Look at what does not change while training: how tokens are drawn."""
        self._draws_whole = draws_whole(self._trainer)

    def _noting(self, score: Any) -> Any:
        """Have log-probabilities that are computed while generating noted: RLOO hands none on."""

        @functools.wraps(score)
        def noting(*args: Any, **kwargs: Any) -> Any:
            found = score(*args, **kwargs)
            if self._scored is not None:
                self._scored.append(found)
            return found

        return noting

    def _noting_rewards(self, calculate: Any) -> Any:
        """Have rewards noted by function: logs have them by name, which two may share."""

        @functools.wraps(calculate)
        def noting(*args: Any, **kwargs: Any) -> Any:
            self._rewards = calculate(*args, **kwargs)
            return self._rewards

        return noting

    # -- a generation ------------------------------------------------------------------------

    def _take(self, lens: Any, output: Any, scored: Sequence[Any], seconds: float) -> None:
        trainer, options = self._trainer, self._options
        self._rollout = None
        ids = output["completion_ids"]
        rows = ids.shape[0]
        index, size = trainer.accelerator.process_index, trainer.num_generations
        logs, names = trainer._logs, _apart(trainer.reward_func_names)
        rewards, self._rewards = self._rewards, None
        assert rewards is not None
        table = rewards.detach().float().T
        device = table.device
        weights = _moved(trainer.reward_weights, device)[:, None]
        total = (table * weights).nansum(0).masked_fill(table.isnan().all(0), torch.nan)
        is_known = len(names) == 1 or options.correct_by is not None
        judged = total if is_known else torch.full_like(total, torch.nan)
        if options.correct_by is not None:
            judged = table[names.index(options.correct_by)]
        correct = (judged >= options.correct_from).float().masked_fill(judged.isnan(), torch.nan)
        prompts, completions = (
            [_text(one) for one in logs[name]] for name in ("prompt", "completion")
        )
        own = slice(index * rows, (index + 1) * rows)
        count = len(total) // size
        group = torch.arange(len(total), device=device) // size + self._groups
        numbers = range(self._groups, self._groups + count)
        self._groups += count
        pass_rate = correct.view(-1, size).mean(1).repeat_interleave(size)
        known = {"reward": total, "correct": correct, "pass_rate": pass_rate, "group": group}
        self._rollout = _Rollout(
            columns={name: column[own] for name, column in known.items()},
            prompts=prompts[own],
            completions=completions[own],
            noted=[found[0] for found in scored],
        )
        output[_ROW] = torch.arange(rows, device=device)
        output[_TEXT_ROW] = [*range(rows)]
        self._names = [
            self._name(numbers[own.start // size + at // size], prompt)
            for at, prompt in enumerate(prompts[own], start=own.start % size)
        ]
        whole = rows % size == 0
        kept = own if whole else slice(None)
        told: dict[str, Any] = {}
        if whole or index == 0:
            seen = dict[str, int]()
            answers = [self._answer(text) for text in completions[kept]]
            answer = [seen.setdefault(text, len(seen)) for text in answers]
            told = {
                "group_size": size,
                "group": group[kept],
                "reward": total[kept],
                "rewards": {n: column[kept] for n, column in zip(names, table, strict=True)},
                "answer": _moved(torch.tensor(answer), device),
            }
            if is_known:
                told["correct"] = correct[kept]
        lens.watch.take_rollout(RolloutReading(**told, **self._of_tokens(output), seconds=seconds))

    def _name(self, group: int, prompt: str) -> str:
        """What a completion's tokens are called in the log: its prompt, where text is kept."""
        return prompt[:_LONGEST_NAME] if self._options.record_text else f"group {group}"

    def names(self, inputs: Mapping[str, Any]) -> list[str] | None:
        """What the completions of a micro-batch are called; None where that is not known."""
        places = inputs.get(_TEXT_ROW)
        return None if places is None else [self._names[at] for at in places]

    def _answer(self, completion: str) -> str:
        options = self._options
        if options.answer_of is not None:
            return str(options.answer_of(completion))
        end = options.thinking_end
        return completion.rpartition(end)[2].strip() if end else completion.strip()

    def _of_tokens(self, output: Mapping[str, Any]) -> dict[str, Any]:
        """Lengths and ends of this rank's completions; unknown where the mask hides some."""
        if getattr(self._trainer, "mask_truncated_completions", False):
            return {}
        token_id, mask = output["completion_ids"], output["completion_mask"].bool()
        tokenizer = self._tokenizer
        ends = [*getattr(self._trainer, "eos_token_ids", [tokenizer.eos_token_id])]
        ends.append(tokenizer.pad_token_id)
        last = token_id.gather(1, (mask.sum(1, keepdim=True) - 1).clamp(min=0))[:, 0]
        truncated = torch.stack([last != end for end in ends]).all(0)
        return {"token_id": token_id, "mask": mask, "truncated": truncated & mask.any(1)}

    # -- a micro-batch -----------------------------------------------------------------------

    def batch(self, inputs: Mapping[str, Any]) -> PolicyBatch | None:
        """What the loss is about to learn from; None where ``inputs`` are no policy's."""
        advantage = inputs.get("advantages")
        token_id = inputs.get("completion_ids")
        if advantage is None or token_id is None:
            return None
        trainer = self._trainer
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        known: dict[str, Any] = self._pull(inputs)
        if self._delimiter:
            thoughts, answers = delimited(token_id, mask, self._delimiter)
            known |= {"thoughts": thoughts, "answers": answers}
        known |= self._of_rollout(inputs)
        if self._is_rloo and "old_logprob" not in known:
            return None
        level = getattr(trainer, "importance_sampling_level", "token")
        return PolicyBatch(
            advantage=advantage,
            mask=mask,
            sampler_logprob=inputs.get("sampling_per_token_logps"),
            clip=self._clip(),
            ratio_level="product" if self._is_rloo else level,
            is_own_sample=self._is_own_sample(inputs),
            **known,
        )

    def _of_rollout(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        known: dict[str, Any] = {}
        if not self._is_rloo:
            known = {
                "old_logprob": inputs.get("old_per_token_logps"),
                "reference_logprob": inputs.get("ref_per_token_logps"),
            }
        rollout, row = self._rollout, inputs.get(_ROW)
        if rollout is None or row is None:
            return known
        known |= {name: column[row] for name, column in rollout.columns.items()}
        if self._is_rloo:
            names = ("old_logprob", "reference_logprob")
            known |= {n: found[row] for n, found in zip(names, rollout.noted, strict=False)}
        if self._options.record_text:
            places = inputs[_TEXT_ROW]
            known["prompts"] = [rollout.prompts[at] for at in places]
            known["completions"] = [rollout.completions[at] for at in places]
        return known

    def _pull(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """What GRPO's loss multiplies a token's term with beside ratio and advantage."""
        trainer = self._trainer
        if self._is_rloo:
            return {}
        corrects = getattr(trainer, "use_vllm", False) and getattr(
            trainer, "vllm_importance_sampling_correction", False
        )
        return {
            "is_pull_known": (
                getattr(trainer, "loss_type", "") in _CLIPPED_LOSSES
                and getattr(trainer, "top_entropy_quantile", 1.0) >= 1.0
                and getattr(trainer, "off_policy_mask_threshold", None) is None
                and getattr(trainer.args, "delta", None) is None
            ),
            "loss_weight": inputs.get("importance_sampling_ratio") if corrects else None,
        }

    def _clip(self) -> tuple[float, float] | None:
        trainer = self._trainer
        if not self._is_rloo and getattr(trainer, "loss_type", "") not in _CLIPPED_LOSSES:
            return None
        low, high = getattr(trainer, "epsilon_low", None), getattr(trainer, "epsilon_high", None)
        return None if low is None or high is None else (float(low), float(high))

    def _is_own_sample(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the model that is trained drew these tokens now, from all of its distribution."""
        args = self._trainer.args
        every = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
        is_now = args.gradient_accumulation_steps % every == 0
        return self._draws_whole and is_now and "tool_mask" not in inputs


def _apart(names: Sequence[str]) -> list[str]:
    """Names of reward functions; one that was there before has its number behind it."""
    return [name if name not in names[:at] else f"{name}_{at + 1}" for at, name in enumerate(names)]


def _moved(column: Tensor, device: torch.device) -> Tensor:
    """A column of the host on a device, for which the host does not wait."""
    if column.device == device:
        return column
    if device.type == "cuda":
        return column.pin_memory().to(device, non_blocking=True)
    return column.to(device)


def _token_ids(tokenizer: Any, text: str | None) -> list[int]:
    """The tokens of a delimiter; none where the tokenizer has none for it."""
    if text is None or not hasattr(tokenizer, "encode"):
        return []
    found = tokenizer.encode(text, add_special_tokens=False)
    unknown = {getattr(tokenizer, "unk_token_id", None), getattr(tokenizer, "pad_token_id", None)}
    is_spelt = text == _THINKING_END and len(found) > 1
    return [] if is_spelt or unknown & {*found} else [*found]


def _text(message: Any) -> str:
    """A prompt or completion as one text: a conversation is its messages, one below the other."""
    if isinstance(message, str):
        return message
    if isinstance(message, Mapping):
        return _text(message.get("content") or message.get("text") or "")
    if isinstance(message, Sequence):
        return "\n".join(_text(one) for one in message)
    return str(message)
