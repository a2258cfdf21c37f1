"""How good is a policy at puzzles it has not seen, and in how many ways?"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any, Final

import torch

from sample_runs.grpo_countdown.countdown import LONGEST_ANSWER, Puzzle, is_right

__all__ = ["Answers", "evaluate", "summarise"]

SAMPLES: Final = 16
_AT_ONCE: Final = 64


@dataclass(frozen=True)
class Answers:
    """What a policy answered to one puzzle."""

    puzzle: Puzzle
    greedy: str
    sampled: tuple[str, ...]

    def figures(self) -> dict[str, float]:
        """Of this puzzle: shares of right answers, and numbers of different ones."""
        right = [answer for answer in self.sampled if is_right(answer, self.puzzle)]
        return {
            "greedy": float(is_right(self.greedy, self.puzzle)),
            "pass@1": len(right) / len(self.sampled),
            f"pass@{len(self.sampled)}": float(bool(right)),
            "distinct": float(len(set(self.sampled))),
            "distinct_right": float(len(set(right))),
        }


def evaluate(model: Any, tokenizer: Any, puzzles: Sequence[Puzzle]) -> dict[str, Any]:
    """How does a policy do, greedily and in samples at temperature 1?

    Args:
        model: The policy; is left as it was, and so are the global random numbers.
        tokenizer: Pads on the left.
        puzzles: Held out.

    Returns:
        `summarise` of its answers. The samples are the same each time for the same policy.
    """
    was_training = model.training
    model.eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        answers = list(_answers(model, tokenizer, puzzles))
    model.train(was_training)
    return summarise(answers)


def summarise(answers: Sequence[Answers]) -> dict[str, Any]:
    """What are the means over puzzles, and how sure are they?

    Args:
        answers: Of at least two puzzles.

    Returns:
        ``greedy``, ``pass@1`` and ``pass@K``, shares of right answers; ``distinct`` and
        ``distinct_right``, different answers among K samples; their standard errors over puzzles;
        and one puzzle's answers to look at.
    """
    rows = [each.figures() for each in answers]
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return {
        **{name: fmean(values) for name, values in columns.items()},
        "standard_error": {
            name: stdev(values) / math.sqrt(len(values)) for name, values in columns.items()
        },
        "puzzles": len(answers),
        "samples": len(answers[0].sampled),
        "example": asdict(answers[0]),
    }


def _answers(model: Any, tokenizer: Any, puzzles: Sequence[Puzzle]) -> Iterator[Answers]:
    for start in range(0, len(puzzles), _AT_ONCE):
        some = puzzles[start : start + _AT_ONCE]
        greedy = _generate(model, tokenizer, some, do_sample=False)
        sampled = _generate(
            model, tokenizer, some, do_sample=True, top_k=0, num_return_sequences=SAMPLES
        )
        for at, puzzle in enumerate(some):
            of_puzzle = sampled[at * SAMPLES : (at + 1) * SAMPLES]
            yield Answers(puzzle, greedy[at], tuple(of_puzzle))


def _generate(model: Any, tokenizer: Any, puzzles: Sequence[Puzzle], **how: Any) -> list[str]:
    prompts = tokenizer(
        [puzzle.prompt for puzzle in puzzles],
        return_tensors="pt",
        padding=True,
        return_token_type_ids=False,
    )
    tokens = model.generate(**prompts, max_new_tokens=LONGEST_ANSWER, **how)
    answers = tokens[:, prompts.input_ids.shape[1] :]
    return list(tokenizer.batch_decode(answers, skip_special_tokens=True))
