from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from entropylens.diagnostics.entropy_split import EntropySplit, pear_penalty, split_entropy
from entropylens.registry import PolicyReading, TokenReading


def reading(
    entropy: torch.Tensor, present: torch.Tensor, advantage: torch.Tensor, **known: Any
) -> PolicyReading:
    """Rows of sequences, all tokens measured."""
    rows, columns = entropy.shape
    n = entropy.numel()
    tokens = TokenReading(
        logprob=-entropy.flatten(),
        entropy=entropy.flatten(),
        present=present.flatten(),
        weight=present.flatten().float(),
        position=(present.cumsum(1) - 1).clamp(min=0).flatten(),
        sequence=torch.arange(n) // columns,
        token_id=torch.zeros(n, dtype=torch.long),
        key=torch.linspace(0, 1, n),
        sequence_tokens=present.sum(1),
        vocabulary=100,
        grids=[(rows, columns)],
    )
    by_token = {"thoughts", "answers"}
    return PolicyReading(
        tokens=tokens,
        advantage=advantage.flatten(),
        **{name: v.flatten() if name in by_token else v for name, v in known.items()},
    )


def measured(found: PolicyReading) -> dict[str, tuple[float, float]]:
    """Value and weight of each metric."""
    blocks, _ = EntropySplit().measure(found, None)
    return {
        name.removeprefix("entropy/"): (float(value), float(weight))
        for block in blocks
        for name, value, weight in zip(
            block.columns["name"],
            block.columns["value"],
            block.columns["weight"].expand(len(block.columns["name"])),
            strict=True,
        )
    }


def thinking(sequences: list[str], entropies: list[list[float]]) -> PolicyReading:
    """Sequences spelled out: t a thinking token, D the delimiter, a an answer's, . padding."""
    letters = np.array([list(sequence) for sequence in sequences])
    entropy = torch.tensor(entropies)
    return reading(
        entropy,
        torch.from_numpy(letters != "."),
        torch.zeros_like(entropy),
        thoughts=torch.from_numpy(letters == "t"),
        answers=torch.from_numpy(letters == "a"),
    )


def test_every_mean_equals_a_loop_over_the_present_tokens() -> None:
    generator = torch.Generator().manual_seed(1)
    rows, columns = 6, 30
    entropy = 3 * torch.rand(rows, columns, generator=generator)
    present = torch.rand(rows, columns, generator=generator) < 0.7
    entropy[~present] = torch.nan
    advantage = torch.randint(-1, 2, (rows, columns), generator=generator).float()
    correct = torch.tensor([1.0, 0.0, torch.nan, 1.0, 0.0, 0.0])
    place = torch.arange(columns).expand(rows, columns)
    found = measured(
        reading(
            entropy, present, advantage, correct=correct, thoughts=place < 12, answers=place > 12
        )
    )
    kept: dict[str, list[float]] = {}
    for row in range(rows):
        for column in range(columns):
            if not present[row, column]:
                continue
            value = float(entropy[row, column])
            sign = {1.0: "positive", -1.0: "negative", 0.0: "zero"}[float(advantage[row, column])]
            outcome = {1.0: "correct", 0.0: "wrong"}.get(float(correct[row]))
            phase = "thinking" if column < 12 else "answer" if column > 12 else None
            for kind, name in (("advantage", sign), ("outcome", outcome), ("phase", phase)):
                if name:
                    kept.setdefault(f"{kind}/{name}/mean", []).append(value)
    assert len(kept) == 7
    for name, values in kept.items():
        assert found[name] == pytest.approx((np.mean(values), len(values)), rel=1e-6), name


def test_pears_worked_example_has_a_penalty_of_one_half() -> None:
    found = measured(thinking(["ttDa"], [[1.0, 1.0, 9.0, 0.5]]))
    assert found["phase/penalty"] == (0.5, 1.0)
    assert found["phase/thinking/mean"] == (1.0, 2.0)
    assert found["phase/answer/mean"] == (0.5, 1.0)
    assert found["phase/answer/missing/share"] == (0.0, 1.0)


def test_a_completion_without_an_answer_is_penalised_for_all_its_entropy() -> None:
    found = measured(
        thinking(
            ["ttDa.", "tttt.", "tDaa.", "tttD."],
            [[1.0, 2, 9, 1, 7], [2.0, 2, 1, 1, 7], [1.0, 9, 2, 4, 7], [0.5, 0.5, 0.5, 9, 7]],
        )
    )
    assert found["phase/penalty"] == pytest.approx(((0.5 + 1.5 + 0 + 0.5) / 4, 4))
    assert found["phase/answer/missing/share"] == (0.5, 4.0)


def test_the_penalty_is_that_of_right_answers_where_they_are_known() -> None:
    given = thinking(["tDa"] * 4, [[1.0, 0, 0.5], [3.0, 0, 0.5], [2.0, 0, 0.0], [9.0, 0, 0.0]])
    known = replace(given, correct=torch.tensor([1.0, 0.0, 1.0, torch.nan]))
    assert measured(known)["phase/penalty"] == (1.25, 2.0)
    assert measured(known)["phase/answer/missing/share"] == (0.0, 4.0)
    wrong = replace(given, correct=torch.zeros(4))
    assert measured(wrong)["phase/penalty"][1] == 0
    assert measured(given)["phase/penalty"] == pytest.approx(((0.5 + 2.5 + 2 + 9) / 4, 4))


def test_completions_that_do_not_think_are_not_counted() -> None:
    found = measured(thinking(["aaa", "tDa", "...", "Daa"], [[1.0, 1.0, 1.0]] * 4))
    assert found["phase/answer/missing/share"] == (0.0, 1.0)
    assert found["phase/penalty"] == (0.0, 1.0)
    assert measured(thinking(["aaa"], [[1.0, 1.0, 1.0]]))["phase/penalty"][1] == 0
    assert measured(thinking(["..."], [[1.0, 1.0, 1.0]]))["phase/thinking/mean"][1] == 0


def test_what_needs_every_token_is_absent_where_some_were_not_measured() -> None:
    whole = thinking(["tttaa", "ttttt"], [[1.0] * 5] * 2)
    tokens = whole.tokens
    chosen = torch.tensor([0, 2, 4, 6, 9])
    picked = {
        name: value[chosen]
        for name, value in vars(tokens).items()
        if isinstance(value, torch.Tensor) and name != "sequence_tokens"
    }
    picked["weight"] = 2 * picked["weight"]
    assert whole.thoughts is not None
    assert whole.answers is not None
    sampled = PolicyReading(
        tokens=TokenReading(**{**vars(tokens), **picked, "grids": None}),
        advantage=torch.zeros(5),
        thoughts=whole.thoughts[chosen],
        answers=whole.answers[chosen],
    )
    found = measured(sampled)
    assert found["phase/penalty"][1] == found["phase/answer/missing/share"][1] == 0
    assert found["phase/thinking/mean"] == (1.0, 8.0)
    assert measured(whole)["phase/penalty"][1] == 2


def test_rows_without_a_token_may_name_a_sequence_that_is_not_there() -> None:
    entropy = torch.tensor([[1.0, torch.nan], [3.0, torch.inf]])
    present = torch.tensor([[True, False], [True, False]])
    found = reading(entropy, present, torch.ones(2, 2), correct=torch.tensor([1.0, 0.0]))
    found.tokens.sequence[1::2] = 1000
    values = measured(found)
    assert values["outcome/correct/mean"] == (1.0, 1.0)
    assert values["outcome/wrong/mean"] == (3.0, 1.0)


def test_a_kind_without_tokens_has_no_weight_and_what_is_unknown_is_not_written() -> None:
    found = measured(
        reading(torch.ones(1, 3), torch.ones(1, 3, dtype=torch.bool), torch.full((1, 3), torch.nan))
    )
    assert {name: weight for name, (_, weight) in found.items()} == {
        "advantage/positive/mean": 0,
        "advantage/negative/mean": 0,
        "advantage/zero/mean": 0,
    }


def test_a_weight_counts_like_that_many_tokens() -> None:
    kinds = torch.tensor([[True, True, True], [False, False, True]])
    entropy, weight = torch.tensor([1.0, 4.0, 7.0]), torch.tensor([2.0, 1.0, 0.0])
    means, weights = split_entropy(entropy, weight, kinds)
    assert means[0] == 2.0
    assert means[1].isnan()
    assert weights.tolist() == [3.0, 0.0]


def test_the_penalty_saturates_at_zero_and_follows_alpha() -> None:
    think, answer = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0.8, 1.2, torch.nan])
    assert pear_penalty(think, answer).tolist() == pytest.approx([0.2, 0.0, 2.0])
    assert pear_penalty(think, answer, alpha=0.5).tolist() == pytest.approx([0.6, 0.4, 2.0])
    assert pear_penalty(torch.tensor([torch.nan]), answer[:1]).isnan()
