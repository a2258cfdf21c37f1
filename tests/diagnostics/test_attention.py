from math import log

import numpy as np
import pytest
import torch
from torch import Tensor

from entropylens.diagnostics._attention import row_entropy, rows_of_logits, rows_of_query_key

QUERIES, HEADS, KEYS, DEPTH = 12, 3, 12, 8


def drawn(*shape: int, seed: int = 0, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def causal(length: int = KEYS) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def masked(logits: Tensor, by: float = -torch.inf) -> Tensor:
    return logits.masked_fill(~causal(logits.shape[-1])[:, None], by)


def reference(logits: np.ndarray) -> dict[str, float]:
    """Of the logits of one query that are not masked."""
    p = np.exp(logits - logits.max())
    p /= p.sum()
    return {
        "entropy": -sum(q * np.log(q) for q in p if q > 0),
        "largest": logits.max(),
        "partition": np.log(np.exp(logits - 5).sum()) + 5,
    }


def test_rows_equal_a_loop_over_the_keys_in_reach() -> None:
    logits = drawn(QUERIES, HEADS, KEYS)
    rows = rows_of_logits(masked(logits))
    assert rows.reach.tolist() == list(range(1, KEYS + 1))
    for query in range(QUERIES):
        for head in range(HEADS):
            expected = reference(logits[query, head, : query + 1].double().numpy())
            found = {
                "entropy": rows.entropy[query, head].item(),
                "largest": rows.largest_logit[query, head].item(),
                "partition": rows.log_partition[query, head].item(),
            }
            assert found == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_entropy_is_that_of_the_eager_maps(dtype: torch.dtype) -> None:
    logits = masked(drawn(64, HEADS, 64, scale=4).to(dtype), torch.finfo(dtype).min)
    maps = logits.float().softmax(-1).double()
    expected = -torch.where(maps > 0, maps * maps.clamp(min=1e-300).log(), 0.0).sum(-1)
    assert (row_entropy(logits) - expected).abs().max() < 1e-5
    assert rows_of_logits(logits).reach.tolist() == list(range(1, 65))


def test_uniform_causal_attention_has_the_mean_of_log_i() -> None:
    rows = rows_of_logits(masked(torch.full((128, 1, 128), 3.0)))
    assert rows.entropy.mean().item() == pytest.approx(np.log(np.arange(1, 129)).mean(), rel=1e-6)
    assert rows.entropy.mean().item() == pytest.approx(3.878, abs=5e-4)
    assert rows.log_partition[:, 0].tolist() == pytest.approx(np.log(np.arange(1, 129)) + 3)


def test_uniform_one_hot_and_tempered_attention_are_at_the_ends() -> None:
    assert row_entropy(torch.full((2, 9), -7.0)).tolist() == pytest.approx([log(9)] * 2)
    one_hot = torch.zeros(9)
    one_hot[4] = 1e4
    assert row_entropy(one_hot).item() == 0.0
    logits = drawn(5, 9, scale=10)
    assert row_entropy(logits / 1e5).tolist() == pytest.approx([log(9)] * 5, rel=1e-6)
    assert row_entropy(logits * 1e5).tolist() == pytest.approx([0.0] * 5, abs=1e-6)


def test_large_logits_lose_no_digits() -> None:
    logits = drawn(5, 9)
    shifted = (logits + 2.0**14).double() - 2.0**14
    assert row_entropy(logits + 2.0**14).tolist() == pytest.approx(
        row_entropy(shifted).tolist(), rel=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_every_way_to_mask_is_the_same(dtype: torch.dtype) -> None:
    logits = drawn(KEYS, HEADS, KEYS).to(dtype)
    expected = rows_of_logits(masked(logits))
    added = logits + masked(torch.zeros_like(logits), torch.finfo(dtype).min)
    for other in (masked(logits, torch.finfo(dtype).min), added):
        found = rows_of_logits(other)
        for name, value in vars(expected).items():
            assert torch.equal(getattr(found, name), value), name


def test_float64_logits_may_carry_the_mask_of_float32() -> None:
    logits = masked(drawn(KEYS, HEADS, KEYS).double(), torch.finfo(torch.float32).min)
    assert rows_of_logits(logits).reach.tolist() == list(range(1, KEYS + 1))


def test_a_query_that_sees_nothing_has_no_reach_and_no_nan() -> None:
    logits = drawn(4, HEADS, KEYS)
    logits[1] = -torch.inf
    logits[2] = torch.finfo(torch.float32).min
    rows = rows_of_logits(logits)
    assert rows.reach.tolist() == [KEYS, 0, 0, KEYS]
    for values in (rows.entropy, rows.largest_logit, rows.log_partition):
        assert values[1:3].tolist() == [[0.0] * HEADS] * 2


def test_reach_is_that_of_the_head_that_sees_most() -> None:
    logits = drawn(1, 2, 6)
    logits[0, 0, 2:] = -torch.inf
    logits[0, 1, 4:] = -torch.inf
    assert rows_of_logits(logits).reach.tolist() == [4]
    logits[0, 0] = -torch.inf
    rows = rows_of_logits(logits)
    assert rows.reach.tolist() == [4]
    assert rows.entropy[0, 0] == 0
    assert rows.entropy[0, 1] > 0


def test_a_logit_that_is_nan_shows() -> None:
    logits = drawn(2, 1, 5)
    logits[0, 0, 3] = torch.nan
    rows = rows_of_logits(logits)
    assert rows.entropy.isnan().tolist() == [[True], [False]]
    assert rows.reach.tolist() == [5, 5]


def test_queries_and_keys_give_what_their_logits_give() -> None:
    query, key = drawn(QUERIES, HEADS, DEPTH, seed=1), drawn(HEADS, KEYS, DEPTH, seed=2)
    bias = drawn(QUERIES, 1, KEYS, seed=3)
    logits = np.zeros((QUERIES, HEADS, KEYS))
    for m, h, t in np.ndindex(*logits.shape):
        product = float(query[m, h].double() @ key[h, t].double())
        logits[m, h, t] = 0.3 * product + float(bias[m, 0, t])
    expected = rows_of_logits(masked(torch.from_numpy(logits)))
    found = rows_of_query_key(query, key, scale=0.3, bias=bias, visible=causal())
    carried = rows_of_query_key(
        query, key, scale=0.3, bias=masked(bias, torch.finfo(torch.float32).min)
    )
    for rows in (found, carried):
        assert rows.reach.tolist() == expected.reach.tolist()
        for name in ("entropy", "largest_logit", "log_partition"):
            value = getattr(rows, name)
            assert value.dtype == torch.float32
            assert value.numpy() == pytest.approx(getattr(expected, name).numpy(), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_mask_hides_keys_of_any_precision(dtype: torch.dtype) -> None:
    query, key = drawn(QUERIES, HEADS, DEPTH).to(dtype), drawn(HEADS, KEYS, DEPTH, seed=2).to(dtype)
    bias = masked(torch.zeros(QUERIES, 1, KEYS, dtype=dtype), torch.finfo(dtype).min)
    found = rows_of_query_key(query, key, scale=0.3, bias=bias)
    expected = rows_of_query_key(query.float(), key.float(), scale=0.3, visible=causal())
    assert found.reach.tolist() == expected.reach.tolist()
    assert torch.equal(found.entropy, expected.entropy)


def test_what_stands_at_masked_keys_and_under_autocast_changes_nothing() -> None:
    query, key = drawn(QUERIES, HEADS, DEPTH, seed=1), drawn(HEADS, KEYS, DEPTH, seed=2)
    visible = causal()
    visible[:, 7:] = False
    visible[3] = False
    expected = rows_of_query_key(query, key, scale=0.5, visible=visible)
    query, key = query.clone(), key.clone()
    query[3], key[:, 7], key[:, 8:] = torch.nan, torch.nan, torch.inf
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = rows_of_query_key(query, key, scale=0.5, visible=visible)
    assert found.reach.tolist() == [1, 2, 3, 0, 5, 6, 7, 7, 7, 7, 7, 7]
    for name, value in vars(expected).items():
        assert torch.equal(getattr(found, name), value), name


def test_it_equals_fused_attention_of_a_transformer_layer() -> None:
    query, key = drawn(QUERIES, HEADS, DEPTH, seed=1), drawn(HEADS, KEYS, DEPTH, seed=2)
    fused = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), key, torch.eye(KEYS).expand(HEADS, -1, -1), is_causal=True
    )
    rows = rows_of_query_key(query, key, scale=DEPTH**-0.5, visible=causal())
    expected = torch.special.entr(fused.double()).sum(-1).T
    assert (rows.entropy - expected).abs().max() < 1e-5
