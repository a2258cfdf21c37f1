"""What TRL's GRPO and RLOO trainers know of a rollout and of the tokens they learn from."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from entropylens.capture.policy import PolicyBatch, delimited
from entropylens.registry import RolloutReading

if TYPE_CHECKING:
    from entropylens_callbacks.transformers import EntropyLensCallback

__all__ = ["PolicyWatch", "RolloutOptions", "with_tokens_at_each_step"]

_TRAINERS: Final = frozenset(("GRPOTrainer", "RLOOTrainer"))
_GENERATES: Final = "_generate_and_score_completions"
_SCORES: Final = "_get_per_token_logps_and_entropies"
_ROW: Final = "entropylens_row"
_CLIPPED_LOSSES: Final = frozenset(("grpo", "bnpo", "dr_grpo", "dapo", "luspo"))
_TESTED: Final = "1.16"


@dataclass(frozen=True, kw_only=True)
class RolloutOptions:
    """What has to be told about completions.

    Args:
        correct_from: Reward from which a completion is correct.
        correct_by: Reward function whose reward that is; None is the weighted total.
        thinking_end: Text that ends the thinking; None, or text that the tokenizer makes several
            tokens of with unknown ones among them, is no such text.
        record_text: Keep prompts and completions.
    """

    correct_from: float = 1.0
    correct_by: str | None = None
    thinking_end: str | None = "</think>"
    record_text: bool = False


def with_tokens_at_each_step(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a Lens that measures entropies as often as it measures a policy.

    A step of reinforcement learning holds a generation and a few seconds of training at the least:
    the statistics of its tokens, which TRL computes anyway, are cheap beside it.

    Args:
        options: Arguments as the user gave them, which come first.
    """
    every = {"fast": 10, "balanced": 1}.get(options.get("preset", "balanced"), 1)
    tokens = dict.fromkeys(("token_entropy", "surprisal"), every)
    return {**options, "diagnostics": {**tokens, **(options.get("diagnostics") or {})}}


@dataclass(frozen=True, kw_only=True)
class _Rollout:
    """This rank's completions of the last generation, in the order they were generated in."""

    reward: Tensor
    correct: Tensor
    pass_rate: Tensor
    group: Tensor
    prompts: Sequence[str]
    completions: Sequence[str]
    noted: Sequence[Tensor]
    """Log-probabilities computed while generating: RLOO's old ones, then a reference's."""


class PolicyWatch:
    """Reads one GRPO or RLOO trainer: its rollouts while groups stand together, and its batches.

    TRL shuffles completions after scoring them. A column with the row's number is therefore put
    beside the trainer's own before it shuffles, and every micro-batch tells by it which rollouts it
    holds; the loss reads only columns that it knows. Nothing else of the trainer is changed.

    Args:
        trainer: One that `suits`.
        options: What has to be told about completions.
    """

    def __init__(self, trainer: Any, options: RolloutOptions) -> None:
        self._trainer, self._options = trainer, options
        self._rollout: _Rollout | None = None
        self._scored: list[Tensor] | None = None
        needed = (_GENERATES, _SCORES, "_logs")
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
        return (
            f"attach: expected {type(self._trainer).__name__} to have {', '.join(self.missing)}, "
            f"as TRL {_TESTED} has it; this version does not, so rewards, groups and text are not "
            f"recorded, only what the loss is shown; install trl=={_TESTED}.* or report it"
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
        setattr(trainer, _SCORES, self._noting(getattr(trainer, _SCORES)))

    def _noting(self, score: Any) -> Any:
        """Have log-probabilities that are computed while generating noted: RLOO hands none on."""

        @functools.wraps(score)
        def noting(*args: Any, **kwargs: Any) -> Any:
            found = score(*args, **kwargs)
            if self._scored is not None:
                self._scored.append(found[0])
            return found

        return noting

    # -- a generation ------------------------------------------------------------------------

    def _take(self, lens: Any, output: Any, scored: Sequence[Tensor], seconds: float) -> None:
        trainer, options = self._trainer, self._options
        self._rollout = None
        rows = output["completion_ids"].shape[0]
        index, size = trainer.accelerator.process_index, trainer.num_generations
        logs = trainer._logs
        rewards = {name: torch.tensor([*values]) for name, values in logs["rewards"].items()}
        weights = trainer.reward_weights.tolist()
        table = torch.stack([rewards[name] for name in trainer.reward_func_names], 1)
        total = (table * torch.tensor(weights)).nansum(1)
        total = total.masked_fill(table.isnan().all(1), torch.nan)
        judged = total if options.correct_by is None else rewards[options.correct_by]
        correct = (judged >= options.correct_from).float().masked_fill(judged.isnan(), torch.nan)
        prompts, completions = (
            [_text(one) for one in logs[name]] for name in ("prompt", "completion")
        )
        own = slice(index * rows, (index + 1) * rows)
        pass_rate = correct.view(-1, size).mean(1).repeat_interleave(size)
        group = torch.arange(len(total)) // size
        self._rollout = _Rollout(
            reward=total[own],
            correct=correct[own],
            pass_rate=pass_rate[own],
            group=group[own],
            prompts=prompts[own],
            completions=completions[own],
            noted=scored,
        )
        output[_ROW] = torch.arange(rows)
        whole = rows % size == 0
        kept = own if whole else slice(None)
        known: dict[str, Any] = {}
        if whole or index == 0:
            device, answers = output["completion_ids"].device, dict[str, int]()
            answer = [answers.setdefault(text.strip(), len(answers)) for text in completions[kept]]
            known = {
                "group": (group[kept] - group[kept][0]).to(device),
                "group_size": size,
                "reward": total[kept].to(device),
                "rewards": {name: values[kept].to(device) for name, values in rewards.items()},
                "correct": correct[kept].to(device),
                "answer": torch.tensor(answer).to(device),
            }
        lens.watch.take_rollout(
            lambda: RolloutReading(**known, **self._of_tokens(output), seconds=seconds)
        )

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
        known: dict[str, Any] = {}
        if self._delimiter:
            thoughts, answers = delimited(token_id, mask, self._delimiter)
            known = {"thoughts": thoughts, "answers": answers}
        is_rloo = "old_logps" in inputs
        known |= self._of_rollout(inputs, is_rloo)
        if is_rloo and "old_logprob" not in known:
            return None
        level = "product" if is_rloo else getattr(trainer, "importance_sampling_level", "token")
        return PolicyBatch(
            advantage=advantage,
            mask=mask,
            sampler_logprob=inputs.get("sampling_per_token_logps"),
            clip=self._clip(is_rloo),
            ratio_level=level,
            is_own_sample=self._is_own_sample(inputs),
            **known,
        )

    def _of_rollout(self, inputs: Mapping[str, Any], is_rloo: bool) -> dict[str, Any]:
        known: dict[str, Any] = {}
        if not is_rloo:
            known = {
                "old_logprob": inputs.get("old_per_token_logps"),
                "reference_logprob": inputs.get("ref_per_token_logps"),
            }
        rollout, row = self._rollout, inputs.get(_ROW)
        if rollout is None or row is None:
            return known
        known |= {n: getattr(rollout, n)[row] for n in ("reward", "correct", "pass_rate", "group")}
        if is_rloo:
            names = ("old_logprob", "reference_logprob")
            known |= {n: t[row.to(t.device)] for n, t in zip(names, rollout.noted, strict=False)}
        if self._options.record_text:
            places = row.tolist()
            known["prompts"] = [rollout.prompts[at] for at in places]
            known["completions"] = [rollout.completions[at] for at in places]
        return known

    def _clip(self, is_rloo: bool) -> tuple[float, float] | None:
        trainer = self._trainer
        if not is_rloo and getattr(trainer, "loss_type", "") not in _CLIPPED_LOSSES:
            return None
        low, high = getattr(trainer, "epsilon_low", None), getattr(trainer, "epsilon_high", None)
        return None if low is None or high is None else (float(low), float(high))

    def _is_own_sample(self, inputs: Mapping[str, Any]) -> bool:
        """Whether the model that is trained drew these tokens now, from all of its distribution."""
        trainer, args = self._trainer, self._trainer.args
        every = getattr(args, "steps_per_generation", 1) * getattr(args, "num_iterations", 1)
        is_plain = (
            not getattr(trainer, "use_vllm", False)
            and getattr(trainer, "top_p", 1.0) in (None, 1.0)
            and getattr(trainer, "top_k", 0) in (None, 0)
            and not getattr(trainer, "min_p", None)
            and getattr(trainer, "repetition_penalty", 1.0) in (None, 1.0)
            and not getattr(args, "generation_kwargs", None)
            and not getattr(trainer, "mask_truncated_completions", False)
            and "tool_mask" not in inputs
        )
        is_now = args.gradient_accumulation_steps % every == 0
        return is_plain and is_now and not _has_dropout(trainer.model)


def _has_dropout(model: nn.Module) -> bool:
    """Whether two forwards of a training model differ: what drew a token is not what scores it."""
    found = (value for module in model.modules() for value in _dropouts(module))
    return any(value > 0 for value in found)


def _dropouts(module: nn.Module) -> list[float]:
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return [module.p]
    named = (v for n, v in vars(module).items() if n.endswith(("dropout", "dropout_p")))
    return [float(v) for v in named if isinstance(v, int | float)]


def _token_ids(tokenizer: Any, text: str | None) -> list[int]:
    """The tokens of a delimiter; none where the tokenizer does not know it."""
    if text is None or not hasattr(tokenizer, "encode"):
        return []
    found = tokenizer.encode(text, add_special_tokens=False)
    unknown = {getattr(tokenizer, "unk_token_id", None), getattr(tokenizer, "pad_token_id", None)}
    return [] if unknown & {*found} else [*found]


def _text(message: Any) -> str:
    """A prompt or completion as one text: a conversation is its messages, one below the other."""
    if isinstance(message, str):
        return message
    if isinstance(message, Mapping):
        return _text(message.get("content") or message.get("text") or "")
    if isinstance(message, Sequence):
        return "\n".join(_text(one) for one in message)
    return str(message)
