import numpy as np
import pandas as pd
import pytest

from entropylens.analysis.tokens import changed_tokens, worst_samples


def rows(token: int, step: int, logprobs: list[float], selection: str = "uniform") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "step": step,
            "phase": "train",
            "token_id": token,
            "text": f"t{token}",
            "logprob": logprobs,
            "selection": selection,
        }
    )


def test_changes_are_differences_of_means_with_welchs_error() -> None:
    one, other = [-1.0, -1.2, -0.8, -1.1, -0.9], [-3.0, -3.4, -2.6, -3.1, -2.9, -3.0]
    (change,) = changed_tokens(pd.concat([rows(7, 5, one), rows(7, 50, other)]), (1, 10), (50, 60))
    assert (change.token_id, change.text, change.counts) == (7, "t7", (5, 6))
    assert change.change == pytest.approx(2.0)
    expected = np.sqrt(np.var(one, ddof=1) / 5 + np.var(other, ddof=1) / 6)
    assert change.error == pytest.approx(expected)


def test_extreme_rows_rare_tokens_and_small_changes_are_left_out() -> None:
    table = pd.concat(
        [
            rows(1, 5, [-1.0] * 9 + [-1.1]),
            rows(1, 50, [-1.0] * 9 + [-1.2]),
            rows(2, 5, [-1.0] * 4),
            rows(2, 50, [-9.0] * 9),
            rows(3, 5, [-1.0, -1.1] * 5, "largest"),
            rows(3, 50, [-5.0, -5.1] * 5, "largest"),
            rows(4, 5, [-1.0, -1.1] * 5),
            rows(4, 50, [-4.0, -np.inf, -4.1] * 5),
        ]
    )
    assert [change.token_id for change in changed_tokens(table, (1, 10), (50, 60))] == [4]


def test_the_largest_change_comes_first_whatever_its_sign() -> None:
    parts = []
    for token, after in ((1, -2.0), (2, -0.1), (3, -9.0)):
        parts += [rows(token, 1, [-3.0, -3.1] * 4), rows(token, 9, [after, after - 0.1] * 4)]
    found = changed_tokens(pd.concat(parts), (1, 1), (9, 9))
    assert [change.token_id for change in found] == [3, 2, 1]
    assert found[1].change < 0


def test_worst_samples_are_named_within_their_steps() -> None:
    table = pd.DataFrame(
        {
            "step": [1, 2, 2, 3],
            "sample_id": ["a", "b", "c", "d"],
            "sequence": [0, 1, 2, 3],
            "loss": [9.0, 2.0, 3.0, 8.0],
            "entropy": 1.0,
            "tokens": 4,
            "measured_tokens": 4,
            "selection": ["highest_loss", "highest_loss", "highest_loss", "longest"],
        }
    )
    assert [row["sample_id"] for row in worst_samples(table, (2, 3))] == ["c", "b"]


def test_a_sample_without_a_name_has_none() -> None:
    table = pd.DataFrame(
        {
            "step": 1,
            "sample_id": pd.Series(["a", None], dtype="str"),
            "sequence": [0, 1],
            "loss": [1.0, 2.0],
            "entropy": 1.0,
            "tokens": 4,
            "measured_tokens": 4,
            "selection": "highest_loss",
        }
    )
    assert [row["sample_id"] for row in worst_samples(table, (1, 1))] == [None, "a"]
