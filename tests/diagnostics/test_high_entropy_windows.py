from typing import Any

import numpy as np
import pytest
import torch

from entropylens.diagnostics.high_entropy_windows import (
    HighEntropyWindows,
    entropy_threshold,
    window_means,
)
from entropylens.registry import PolicyReading, TokenReading


def reading(
    entropy: torch.Tensor,
    present: torch.Tensor,
    sequence: torch.Tensor | None = None,
    **known: Any,
) -> PolicyReading:
    rows, columns = entropy.shape
    n = entropy.numel()
    sequence = torch.arange(n).view(rows, columns) // columns if sequence is None else sequence
    sequences = int(sequence.max()) + 1
    kept = present.flatten()
    tokens = TokenReading(
        logprob=-entropy.flatten(),
        entropy=entropy.flatten(),
        present=kept,
        weight=kept.float(),
        position=torch.zeros(n, dtype=torch.long),
        sequence=sequence.flatten(),
        token_id=torch.zeros(n, dtype=torch.long),
        key=torch.linspace(0, 1, n),
        sequence_tokens=torch.zeros(sequences, dtype=torch.long).index_add(
            0, sequence.flatten(), kept.long()
        ),
        vocabulary=100,
        grids=[(rows, columns)],
    )
    return PolicyReading(tokens=tokens, advantage=torch.zeros(n), **known)


def measured(found: PolicyReading) -> dict[str, tuple[float, float]]:
    """Value and weight of each metric, its module behind its name."""
    blocks, _ = HighEntropyWindows().measure(found, None)
    rows = {}
    for block in blocks:
        names = block.columns["name"]
        modules = block.columns["module"] or [""] * len(names)
        columns = block.columns["value"].tolist(), block.columns["weight"].tolist()
        for name, module, value, weight in zip(names, modules, *columns, strict=True):
            rows[f"{name} {module}".removeprefix("window/").strip()] = (value, weight)
    return rows


def assert_same(
    first: dict[str, tuple[float, float]], second: dict[str, tuple[float, float]]
) -> None:
    assert first.keys() == second.keys()
    np.testing.assert_allclose([*first.values()], [*second.values()], rtol=1e-6)


def random_grid(seed: int, rows: int = 7, columns: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    level = 3 * torch.rand(rows, columns // 5, generator=generator).repeat_interleave(5, 1)
    entropy = level + 0.3 * torch.rand(rows, columns, generator=generator)
    length = torch.randint(2, columns, (rows, 1), generator=generator)
    present = torch.arange(columns) < length
    present[0, 1] = False
    return torch.where(present, entropy, torch.nan), present


def test_everything_equals_a_loop_over_sequences() -> None:
    entropy, present = random_grid(0)
    present[6] = False
    correct = torch.tensor([1.0, 0.0, 1.0, torch.nan, 0.0, 1.0, 1.0])
    pass_rate = torch.tensor([2 / 3, 0.9, 1 / 3, 0.5, 0.2, torch.nan, 1.0])
    found = measured(reading(entropy, present, correct=correct, pass_rate=pass_rate))
    values = entropy.double().numpy()
    kept = [values[row][present[row].numpy()] for row in range(6)]
    tau = np.mean([np.quantile(one, 0.95) for one in kept])
    counts, windows = [], 0
    for row in range(6):
        high = 0
        for start in range(40 - 3):
            if present[row, start : start + 4].all():
                windows += 1
                high += values[row, start : start + 4].sum() / 4 > tau
        counts.append(high)
    assert sum(counts) > 0

    def mean(of: list[int]) -> Any:
        return pytest.approx((np.mean([counts[i] for i in of]), len(of)), rel=1e-6)

    assert found["threshold"] == pytest.approx((tau, 6), rel=1e-6)
    assert found["high/share"] == pytest.approx((sum(counts) / windows, windows), rel=1e-6)
    assert found["high/count/mean"] == mean([0, 1, 2, 3, 4, 5])
    assert found["high/correct/mean"] == mean([0, 2, 5])
    assert found["high/wrong/mean"] == mean([1, 4])
    assert found["high/difficulty/mean easy"] == mean([0, 1])
    assert found["high/difficulty/mean medium"] == mean([2, 3])
    assert found["high/difficulty/mean hard"] == mean([4])


@pytest.mark.parametrize("window", [1, 3, 4, 8])
def test_window_means_equal_differences_of_a_running_sum(window: int) -> None:
    generator = torch.Generator().manual_seed(1)
    entropy = torch.rand(5, 50, generator=generator)
    everything = torch.ones(5, 50, dtype=torch.bool)
    rows = torch.arange(5)[:, None].expand(5, 50)
    means, complete = window_means(entropy, everything, rows, window=window)
    running = np.concatenate([np.zeros((5, 1)), entropy.double().numpy().cumsum(1)], 1)
    expected = (running[:, window:] - running[:, :-window]) / window
    assert means[:, : 51 - window].numpy() == pytest.approx(expected, rel=1e-6)
    assert complete.sum(1).tolist() == [51 - window] * 5
    assert complete[:, : 51 - window].all()


def test_a_block_of_undecided_tokens_is_counted_by_the_windows_that_lie_in_it() -> None:
    entropy = torch.full((1, 200), 0.1)
    entropy[0, 50:60] = 2.0
    found = measured(reading(entropy, torch.ones(1, 200, dtype=torch.bool)))
    assert found["threshold"] == pytest.approx((np.quantile(entropy.numpy(), 0.95), 1.0))
    assert found["high/count/mean"] == (13.0, 1.0)
    assert found["high/share"] == pytest.approx((13 / 197, 197))


def test_windows_that_run_over_the_end_or_a_hole_are_not_counted() -> None:
    entropy = torch.full((2, 60), 0.1)
    entropy[1] = 0.3
    entropy[0, 27:30] = 50.0
    present = torch.arange(60).expand(2, 60) < 30
    found = measured(reading(entropy, present))
    assert found["threshold"][0] == pytest.approx((50 + 0.3) / 2)
    assert found["high/count/mean"] == (0.5, 2.0)
    present[0, 26] = False
    assert measured(reading(entropy, present))["high/count/mean"] == (0.0, 2.0)


def test_windows_do_not_reach_into_the_next_sequence_of_a_packed_row() -> None:
    generator = torch.Generator().manual_seed(2)
    parts = [3 * torch.rand(length, generator=generator).sort().values for length in (9, 3, 12)]
    packed = torch.cat(parts)[None]
    index = torch.repeat_interleave(torch.arange(3), torch.tensor([9, 3, 12]))[None]
    rows = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=torch.nan)
    correct = torch.tensor([1.0, 0.0, 1.0])
    together = reading(packed, torch.ones_like(packed, dtype=torch.bool), index, correct=correct)
    apart = reading(rows, ~rows.isnan(), correct=correct)
    assert_same(measured(together), measured(apart))
    assert measured(together)["high/count/mean"][0] > 0
    assert measured(together)["high/share"][1] == 6 + 0 + 9


def test_micro_batches_of_other_widths_make_the_same_as_one() -> None:
    entropy, present = random_grid(3)
    whole = reading(entropy, present)
    wide = torch.nn.functional.pad(entropy[:3], (0, 5), value=torch.nan)
    first = reading(wide, torch.nn.functional.pad(present[:3], (0, 5))).tokens
    second = reading(entropy[3:], present[3:]).tokens
    joined = {
        name: torch.cat([value, getattr(second, name) + 3 * (name == "sequence")])
        for name, value in vars(first).items()
        if isinstance(value, torch.Tensor) and value.dtype != torch.bool
    }
    joined["present"] = torch.cat([first.present, second.present])
    tokens = TokenReading(**{**vars(first), **joined, "grids": [(3, 45), (4, 40)]})
    both = PolicyReading(tokens=tokens, advantage=torch.zeros(len(tokens.entropy)))
    assert_same(measured(both), measured(whole))


def test_thresholds_weigh_sequences_not_tokens_and_equal_numpys_quantiles() -> None:
    parts = [np.linspace(0, 1, 41), np.array([5.0]), np.array([3.0, 1.0])]
    order = np.random.default_rng(0).permutation(44)
    entropy = torch.from_numpy(np.concatenate(parts)[order]).float()
    index = torch.from_numpy(np.repeat([0, 3, 1], [41, 1, 2])[order])
    for level in (0.0, 0.5, 0.95, 1.0):
        found = entropy_threshold(entropy, torch.ones(44, dtype=torch.bool), index, 4, level=level)
        expected = np.mean([np.quantile(part, level) for part in parts])
        assert found.item() == pytest.approx(expected, rel=1e-6)


def test_windows_say_how_tokens_cluster_and_the_threshold_how_undecided_they_are() -> None:
    entropy, present = random_grid(5)
    found, collapsed = (measured(reading(e, present)) for e in (entropy, 0.01 * entropy))
    assert found["high/share"][0] > 0
    for name in ("high/share", "high/count/mean"):
        assert collapsed[name] == found[name]
    assert collapsed["threshold"][0] == pytest.approx(0.01 * found["threshold"][0])


def test_equal_entropies_are_never_high() -> None:
    found = measured(reading(torch.full((2, 30), 0.3), torch.ones(2, 30, dtype=torch.bool)))
    assert found["high/count/mean"] == (0.0, 2.0)
    assert found["high/share"] == (0.0, 54.0)


def test_a_token_without_an_entropy_makes_unknown_not_zero() -> None:
    entropy = torch.rand(2, 30, generator=torch.Generator().manual_seed(4))
    entropy[1, 7] = torch.nan
    found = measured(reading(entropy, torch.ones(2, 30, dtype=torch.bool)))
    assert all(np.isnan(value) for value, _ in found.values())


def test_short_and_empty_sequences_and_sampled_rows() -> None:
    short = reading(torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool))
    found = measured(short)
    assert found["high/share"][1] == 0
    assert found["high/count/mean"] == (0.0, 2.0)
    nothing = measured(reading(torch.rand(2, 9), torch.zeros(2, 9, dtype=torch.bool)))
    assert {weight for _, weight in nothing.values()} == {0.0}
    sampled = TokenReading(**{**vars(short.tokens), "grids": None})
    assert not measured(PolicyReading(tokens=sampled, advantage=torch.zeros(6)))
