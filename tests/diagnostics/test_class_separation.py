from collections.abc import Sequence

import numpy as np
import pytest
import torch
from readings import representation
from torch import Tensor

from entropylens.diagnostics.class_separation import (
    ClassSeparation,
    nearest_class_mean_accuracy,
    within_between_ratio,
    within_between_trace_ratio,
)
from entropylens.registry import RepresentationReading


def measured(
    states: Tensor, labels: Sequence[int] | None, are_tokens: bool = False
) -> dict[str, float]:
    """What is written of one layer; metrics with weight 0 are left out, as in the log."""
    reading = RepresentationReading(states={"a": states}, labels=labels, are_tokens=are_tokens)
    found = {}
    for block in ClassSeparation().measure(reading, None)[0]:
        names, values, weight = (block.columns[key] for key in ("name", "value", "weight"))
        for name, value, w in zip(names, values.tolist(), weight.tolist(), strict=True):
            if w > 0:
                found[name.removeprefix("representation/")] = value
    return found


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(classes: int, members: int, columns: int, width: float) -> tuple[Tensor, list[int]]:
    labels = [i % classes for i in range(classes * members)]
    centres = normal(classes, columns, seed=1)
    return centres[labels] + width * normal(classes * members, columns), labels


def slow(states: Tensor, labels: Sequence[int]) -> dict[str, float]:
    """Straight from the definitions, with a pseudo-inverse of D x D and means made anew."""
    x, y = states.numpy().astype(np.float64), np.array(labels)
    mean, n, d = x.mean(0), *x.shape
    within, between = np.zeros((d, d)), np.zeros((d, d))
    for label in set(labels):
        members = x[y == label]
        off = members.mean(0) - mean
        between += len(members) / n * np.outer(off, off)
        for row in members - members.mean(0):
            within += np.outer(row, row) / n
    right, noise = 0, np.trace(within) * n / (n - len(set(labels)))
    for i in range(n):
        others = {label: x[(y == label) & (np.arange(n) != i)] for label in sorted(set(labels))}
        distance = {
            label: ((x[i] - other.mean(0)) ** 2).sum() - noise / len(other)
            for label, other in others.items()
        }
        right += min(distance, key=distance.__getitem__) == y[i]
    ratio = np.trace(within @ np.linalg.pinv(between, rcond=1e-10)) / len(set(labels))
    return {
        "within_between_ratio": ratio,
        "within_between_trace_ratio": np.trace(within) / np.trace(between),
        "nearest_class_mean_accuracy": right / n,
    }


@pytest.mark.parametrize("columns", [2, 7, 30])
@pytest.mark.parametrize("width", [0.1, 1.0])
def test_it_agrees_with_the_definitions_in_any_width(columns: int, width: float) -> None:
    states, labels = clusters(4, 9, columns, width)
    kept = slice(0, 29)
    found = measured(states[kept] + 3, labels[kept])
    assert found == pytest.approx(slow(states[kept], labels[kept]), rel=1e-4)


def test_two_classes_on_a_line_have_the_ratio_of_their_variances() -> None:
    states = torch.tensor([[3.0, 0.5], [5.0, 0.5], [-3.0, 0.5], [-5.0, 0.5]])
    found = measured(states, [7, 7, -1, -1])
    assert found["within_between_ratio"] == pytest.approx(1 / 16 / 2)
    assert found["within_between_trace_ratio"] == pytest.approx(1 / 16)
    assert found["nearest_class_mean_accuracy"] == 1


def test_width_across_the_class_means_is_seen_by_the_traces_alone() -> None:
    across = torch.tensor([[4.0, 1.0], [4.0, -1.0], [-4.0, 1.0], [-4.0, -1.0]])
    found = measured(across, [0, 0, 1, 1])
    assert found["within_between_ratio"] == 0
    assert found["within_between_trace_ratio"] == pytest.approx(1 / 16)


def test_collapsed_classes_have_no_width() -> None:
    states, labels = clusters(5, 6, 12, 0)
    found = measured(states, labels)
    assert found["within_between_ratio"] == pytest.approx(0, abs=1e-10)
    assert found["within_between_trace_ratio"] == pytest.approx(0, abs=1e-10)
    assert found["nearest_class_mean_accuracy"] == 1


def test_a_class_mean_that_depends_on_the_others_adds_no_direction_of_rounding() -> None:
    """Means on a line: the pseudo-inverse has rank 1 although there are three classes."""
    line = torch.tensor([-1.0, 0.0, 1.0]).repeat(8)[:, None] * torch.tensor([0.1, 0.7, 0.3])
    noise = normal(4, 3)
    noise = torch.cat([noise, -noise]).repeat_interleave(3, 0)
    labels = [0, 1, 2] * 8
    found = measured(line + 0.1 * noise, labels)
    assert found["within_between_ratio"] == pytest.approx(
        slow(line + 0.1 * noise, labels)["within_between_ratio"], rel=1e-3
    )
    assert found["within_between_ratio"] < 1


def test_random_labels_are_sorted_about_as_well_as_by_guessing() -> None:
    """A mean that holds the row itself would sort most rows, plain leave-one-out next to none."""
    labels = [i % 10 for i in range(40)]
    accuracies = [measured(normal(40, 64, seed=seed), labels) for seed in range(100)]
    mean = np.mean([found["nearest_class_mean_accuracy"] for found in accuracies])
    assert 0.08 < mean < 0.16


def test_the_noise_of_means_is_judged_by_the_unbiased_variance_within_classes() -> None:
    # The first row: 4 - 2/1 from its fellow and 1.8^2 - 2/2 from the others; with a variance of 1
    # it would be wrong. The inner two rows are.
    found = measured(torch.tensor([[0.0], [2.0], [0.8], [2.8]]), [0, 0, 1, 1])
    assert found["nearest_class_mean_accuracy"] == 0.5


def test_class_means_that_differ_by_rounding_alone_give_no_ratio() -> None:
    states = 1000 + 3e-5 * normal(40, 5)
    assert set(measured(states, [0, 1] * 20)) == {"nearest_class_mean_accuracy"}


def test_a_tie_counts_by_the_share_of_the_classes_in_it() -> None:
    assert measured(torch.ones(6, 3) * 0.1, [0, 1, 2] * 2) == {
        "nearest_class_mean_accuracy": pytest.approx(1 / 3)
    }
    pair = torch.tensor([[0.0], [0.0], [5.0]] * 2)
    assert measured(pair, [0, 1, 2] * 2)["nearest_class_mean_accuracy"] == pytest.approx(2 / 3)


def test_it_does_not_change_with_scale_rotation_shift_order_or_names_of_classes() -> None:
    states, labels = clusters(3, 8, 6, 0.7)
    turn = torch.linalg.qr(normal(6, 6, seed=4)).Q
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    moved = (1e-3 * states @ turn + 0.01)[order]
    renamed = [100 - 7 * labels[i] for i in order]
    assert measured(moved, renamed) == pytest.approx(measured(states, labels), rel=1e-4)


def test_classes_with_one_member_are_left_out() -> None:
    states, labels = clusters(3, 5, 6, 0.7)
    alone = torch.cat([torch.full((1, 6), 50.0), states, torch.full((1, 6), torch.nan)])
    assert measured(alone, [8, *labels, 9]) == measured(states, labels)
    reading = RepresentationReading(states={"a": alone}, labels=[8, *labels, 9])
    (block,), _ = ClassSeparation().measure(reading, None)
    assert block.columns["weight"].tolist() == [15.0] * 3


@pytest.mark.parametrize("labels", [None, [0, 0, 0, 0], [0, 1, 2, 3], [0, 0, 1, 2]])
def test_without_two_classes_of_two_it_writes_nothing(labels: list[int] | None) -> None:
    assert measured(normal(4, 3), labels) == {}


def test_positions_of_sequences_have_no_classes() -> None:
    states, labels = clusters(3, 5, 6, 0.7)
    assert measured(states, labels, are_tokens=True) == {}


def test_a_layer_with_a_state_that_is_not_finite_writes_nothing() -> None:
    states, labels = clusters(3, 5, 6, 0.7)
    states[2, 1] = torch.inf
    assert measured(states, labels) == {}
    numbers = torch.tensor(labels)
    for measure in (within_between_ratio, within_between_trace_ratio, nearest_class_mean_accuracy):
        assert measure(states, numbers, 3).isnan()


def test_classes_that_part_from_layer_to_layer_have_a_falling_ratio() -> None:
    first, second = ClassSeparation().measure(representation(), None)[0]
    assert [first.columns["module"], second.columns["module"]] == ["layers.0", "layers.1"]
    assert (second.columns["value"][:2] < first.columns["value"][:2]).all()
    assert second.columns["value"][2] > first.columns["value"][2]
