"""The task: reach a target with three numbers, plus and minus; every right answer, and a verifier.

A prompt is ``14,5,5>14:``, a right answer ``14+5-5``. Puzzles and verifier are reasoning-gym's. A
puzzle has six right answers or so, in which a policy can be diverse without being wrong.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice, permutations, product
from typing import Any, Final

import reasoning_gym
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

__all__ = ["LONGEST_ANSWER", "Puzzle", "draw_puzzles", "is_right", "make_tokenizer", "verify"]

LONGEST_ANSWER: Final = 12
"""Tokens of an answer, the end among them: the longest right one, ``-20-20+20``, needs ten."""

_SETTINGS: Final[dict[str, Any]] = {
    "min_numbers": 3,
    "max_numbers": 3,
    "min_value": 1,
    "max_value": 20,
    "min_target": 1,
    "max_target": 60,
    "operators": ("+", "-"),
}


@dataclass(frozen=True)
class Puzzle:
    """Three numbers, and what their sum with signs should be."""

    numbers: tuple[int, ...]
    target: int

    @property
    def prompt(self) -> str:
        """What the policy reads."""
        return ",".join(map(str, self.numbers)) + f">{self.target}:"

    @property
    def key(self) -> tuple[tuple[int, ...], int]:
        """The same for puzzles that differ in the order of their numbers."""
        return tuple(sorted(self.numbers)), self.target

    def right_answers(self) -> list[str]:
        """All orders and signs of the numbers that reach the target, sorted."""
        found = set()
        for order in permutations(self.numbers):
            for signs in product((1, -1), repeat=len(order)):
                terms = [sign * number for sign, number in zip(signs, order, strict=True)]
                if sum(terms) == self.target:
                    found.add("".join(f"{term:+d}" for term in terms).removeprefix("+"))
        return sorted(found)


def draw_puzzles(count: int, seed: int, without: Collection[Puzzle] = ()) -> list[Puzzle]:
    """Which puzzles does a seed give, leaving out those that are kept for the evaluation?

    Only 5640 puzzles differ in more than the order of their numbers, so another seed alone would
    evaluate on puzzles that were trained on.

    Args:
        count: How many, repetitions among them.
        seed: Of reasoning-gym's generator.
        without: Puzzles that must not come, in whatever order their numbers stand.

    Returns:
        The puzzles, in the generator's order.
    """
    left_out = {puzzle.key for puzzle in without}
    source = reasoning_gym.create_dataset("countdown", size=2 * count + 64, seed=seed, **_SETTINGS)
    drawn = (Puzzle(tuple(e["metadata"]["numbers"]), e["metadata"]["target"]) for e in source)
    return list(islice((puzzle for puzzle in drawn if puzzle.key not in left_out), count))


def verify(answer: str, puzzle: Puzzle) -> float:
    """What reward does an answer earn?

    Args:
        answer: What the policy wrote after the prompt.
        puzzle: The puzzle.

    Returns:
        reasoning-gym's score: 1 for a right answer, 0.05 for an expression with another value or of
        other numbers, 0.01 for what is no expression.
    """
    return _score(answer.strip(), puzzle)


def is_right(answer: str, puzzle: Puzzle) -> bool:
    """Does an answer reach the target with the numbers, each used once?"""
    return verify(answer, puzzle) == 1.0


@lru_cache(maxsize=1 << 18)
def _score(answer: str, puzzle: Puzzle) -> float:
    entry = {"metadata": {"numbers": list(puzzle.numbers), "target": puzzle.target}}
    return float(reasoning_gym.get_score_answer_fn("countdown")(answer, entry))


def reward(
    completions: Sequence[str], numbers: Sequence[Any], target: Sequence[int], **_: Any
) -> list[float]:
    """The verifier as TRL calls it: columns of the training set, a row for each completion."""
    return [
        verify(answer, Puzzle(tuple(terms), goal))
        for answer, terms, goal in zip(completions, numbers, target, strict=True)
    ]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character. There is no ``*``: the verifier would compute 9**9**9**9."""
    characters = ["<pad>", "<eos>", *"0123456789+-,>:"]
    vocabulary = {character: at for at, character in enumerate(characters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
