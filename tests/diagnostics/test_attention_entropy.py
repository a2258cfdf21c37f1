from collections.abc import Mapping
from math import log

import numpy as np
import pytest
import torch
from torch import Tensor

from entropylens.diagnostics._attention import rows_of_logits
from entropylens.diagnostics.attention_entropy import (
    AttentionEntropy,
    entropy_bands,
    head_entropy,
    normalised_head_entropy,
)
from entropylens.registry import AttentionReading, AttentionRows

LENGTH, HEADS = 20, 4
BANDS = [f"attention/bands/{band}" for band in ("first", "second", "third", "fourth")]
Found = dict[str, dict[str, float]]


def measured(layers: Mapping[str, AttentionRows]) -> Found:
    """By module, then by metric; what carries no weight is left out."""
    blocks, _ = AttentionEntropy().measure(AttentionReading(layers=layers), None)
    found: Found = {}
    for block in blocks:
        names, modules = block.columns["name"], block.columns["module"]
        modules = [modules] * len(names) if isinstance(modules, str) else modules
        values, weights = block.columns["value"].tolist(), block.columns["weight"].tolist()
        for name, module, value, weight in zip(names, modules, values, weights, strict=True):
            if weight > 0:
                assert name not in found.setdefault(module, {})
                found[module][name] = value
    return found


def weights_of(layers: Mapping[str, AttentionRows], module: str) -> dict[str, float]:
    blocks, _ = AttentionEntropy().measure(AttentionReading(layers=layers), None)
    (found,) = (
        dict(zip(block.columns["name"], block.columns["weight"].tolist(), strict=True))
        for block in blocks
        if block.columns["module"] == module and BANDS[0] in block.columns["name"]
    )
    return found


def causal(sharpness: Tensor, seed: int = 0, length: int = LENGTH) -> AttentionRows:
    """A layer whose heads multiply random logits by their sharpness."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(length, len(sharpness), length, generator=generator)
    hidden = ~torch.ones(length, length, dtype=torch.bool).tril()
    return rows_of_logits((logits * sharpness[:, None]).masked_fill(hidden[:, None], -torch.inf))


def rows_of(entropy: list[list[float]], reach: list[int]) -> AttentionRows:
    values = torch.tensor(entropy)
    nothing = torch.zeros_like(values)
    return AttentionRows(
        entropy=values, reach=torch.tensor(reach), largest_logit=nothing, log_partition=nothing
    )


def two_layers() -> dict[str, AttentionRows]:
    return {
        "first": causal(torch.tensor([0.1, 1.0, 5.0, 400.0])),
        "second": causal(torch.tensor([2.0, 3.0, 4.0]), seed=1),
    }


def test_layers_and_heads_equal_a_loop_over_queries() -> None:
    layers = two_layers()
    found = measured(layers)
    heads: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for name, rows in layers.items():
        entropy = rows.entropy.double().numpy()
        heads[name] = [float(np.mean(entropy[:, h])) for h in range(entropy.shape[1])]
        shares[name] = [
            float(np.mean([entropy[t, h] / log(t + 1) for t in range(1, LENGTH)]))
            for h in range(entropy.shape[1])
        ]
        for h, (nats, share) in enumerate(zip(heads[name], shares[name], strict=True)):
            assert found[f"{name}.head.{h}"] == pytest.approx(
                {"attention/head_entropy": nats, "attention/head_entropy_normalised": share}
            )
        assert found[name]["attention/entropy/mean"] == pytest.approx(np.mean(heads[name]))
        assert found[name]["attention/entropy/normalised/mean"] == pytest.approx(
            np.mean(shares[name])
        )
    largest = max(map(max, heads.values()))
    everyone = {name: (heads[name], shares[name]) for name in layers}
    everyone[""] = (heads["first"] + heads["second"], shares["first"] + shares["second"])
    for module, (nats_of, shares_of) in everyone.items():
        quarters = [min(int(4 * nats / largest), 3) for nats in nats_of]
        narrow = [share < 0.1 for share in shares_of]
        expected = {name: np.mean([q == at for q in quarters]) for at, name in enumerate(BANDS)}
        expected["attention/collapsed/share"] = np.mean(narrow)
        expected["attention/overloaded/share"] = np.mean(
            [q == 3 and not low for q, low in zip(quarters, narrow, strict=True)]
        )
        assert {name: found[module][name] for name in expected} == pytest.approx(expected)
    assert 0 < found[""]["attention/collapsed/share"] < 0.5
    assert 0 < found[""]["attention/bands/second"] < 1


def test_uniform_causal_attention_is_below_log_t_in_nats_and_1_normalised() -> None:
    found = measured({"m": causal(torch.zeros(2), length=128)})
    assert found["m"]["attention/entropy/mean"] == pytest.approx(np.log(np.arange(1, 129)).mean())
    assert found["m"]["attention/entropy/mean"] / log(128) == pytest.approx(0.80, abs=2e-3)
    assert found["m"]["attention/entropy/normalised/mean"] == pytest.approx(1, abs=1e-6)
    assert found["m"]["attention/bands/fourth"] == 1
    assert found[""]["attention/overloaded/share"] == 1
    assert found[""]["attention/collapsed/share"] == 0


def test_uniform_full_attention_has_log_t() -> None:
    found = measured({"m": rows_of_logits(torch.zeros(5, 2, 30))})
    assert found["m.head.1"]["attention/head_entropy"] == pytest.approx(log(30))
    assert found["m.head.1"]["attention/head_entropy_normalised"] == pytest.approx(1)


def test_one_hot_attention_has_collapsed_and_no_bands() -> None:
    logits = 1e4 * torch.eye(6)[:, None].expand(6, HEADS, 6)
    found = measured({"m": rows_of_logits(logits)})
    assert found["m"]["attention/entropy/mean"] == 0
    assert found[""]["attention/collapsed/share"] == 1
    assert found[""]["attention/overloaded/share"] == 0
    assert not set(BANDS) & (set(found[""]) | set(found["m"]))


def test_heads_that_collapsed_alike_are_in_the_fourth_band_but_not_overloaded() -> None:
    found = measured({"m": rows_of([[0.01, 0.011], [0.01, 0.011]], [50, 50])})[""]
    assert found["attention/bands/fourth"] == 1
    assert found["attention/overloaded/share"] == 0
    assert found["attention/collapsed/share"] == 1


def test_bands_begin_at_quarters_of_the_largest_and_the_largest_is_in_the_last() -> None:
    largest = torch.tensor(3.7)
    below = torch.nextafter(largest * torch.tensor([0.25, 0.5, 0.75]), torch.tensor(0.0))
    edges = largest * torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    assert entropy_bands(edges, largest).argmax(0).tolist() == [0, 1, 2, 3, 3]
    assert entropy_bands(below, largest).argmax(0).tolist() == [0, 1, 2]
    assert entropy_bands(edges, largest).sum(0).tolist() == [1.0] * 5


def test_bands_of_a_layer_are_relative_to_the_widest_head_of_the_model() -> None:
    layers = {"wide": rows_of([[4.0, 3.2]], [99]), "narrow": rows_of([[0.9, 1.1]], [99])}
    found = measured(layers)
    assert [found["narrow"][band] for band in BANDS] == [0.5, 0.5, 0, 0]
    assert [found["wide"][band] for band in BANDS] == [0, 0, 0, 1]
    assert [found[""][band] for band in BANDS] == [0.25, 0.25, 0, 0.5]
    assert found[""]["attention/overloaded/share"] == 0.5
    assert [measured({"m": layers["narrow"]})["m"][band] for band in BANDS] == [0, 0, 0, 1]


def test_the_order_of_layers_heads_and_queries_changes_no_share() -> None:
    layers = two_layers()
    turned = {
        name: AttentionRows(
            entropy=rows.entropy.flip(0, 1),
            reach=rows.reach.flip(0),
            largest_logit=rows.largest_logit,
            log_partition=rows.log_partition,
        )
        for name, rows in reversed(layers.items())
    }
    found, other = measured(layers), measured(turned)
    for module in ("", *layers):
        assert other[module] == pytest.approx(found[module], rel=1e-6)
    assert other["first.head.0"] == pytest.approx(found["first.head.3"], rel=1e-6)


@pytest.mark.parametrize("filler", [torch.nan, torch.inf, -7.0])
def test_queries_that_see_nothing_do_not_count(filler: float) -> None:
    alone = rows_of([[1.0, 0.2], [3.0, 0.4]], [9, 40])
    padded = rows_of([[1.0, 0.2], [filler] * 2, [3.0, 0.4]], [9, 0, 40])
    assert measured({"m": padded}) == measured({"m": alone})
    assert weights_of({"m": padded}, "m")[BANDS[0]] == 2


def test_a_query_that_sees_one_key_counts_in_nats_only() -> None:
    rows = rows_of([[0.0], [2.0], [3.0]], [1, 9, 40])
    assert head_entropy(rows).item() == pytest.approx(5 / 3)
    expected = (2 / log(9) + 3 / log(40)) / 2
    assert normalised_head_entropy(rows).item() == pytest.approx(expected)
    weight = weights_of({"m": rows}, "")
    assert weight[BANDS[0]] == 3
    assert weight["attention/collapsed/share"] == 2


def test_what_no_query_shows_is_absent() -> None:
    assert measured({}) == {}
    assert measured({"m": rows_of([[torch.nan, 1.0]], [0])}) == {}
    first_only = measured({"m": rows_of([[0.0, 0.0]], [1])})
    assert first_only["m"] == {"attention/entropy/mean": 0.0}
    assert "" not in first_only
    seen = rows_of([[1.0, 2.0]], [9])
    both = measured({"m": seen, "unseen": rows_of([[9.0, 9.0]], [0])})
    assert "unseen" not in both
    assert both == measured({"m": seen})


def test_a_head_that_is_nan_shows_in_its_layer_and_in_all_bands() -> None:
    layers = {"broken": rows_of([[torch.nan, 1.0]], [9]), "whole": rows_of([[2.0, 1.0]], [9])}
    found = measured(layers)
    assert found["whole"]["attention/entropy/mean"] == 1.5
    assert np.isnan(found["broken"]["attention/entropy/mean"])
    assert np.isnan(found["broken.head.0"]["attention/head_entropy"])
    assert found["broken.head.1"]["attention/head_entropy"] == 1
    assert np.isnan([found[""][band] for band in BANDS]).all()
    assert np.isnan(found[""]["attention/collapsed/share"])
    assert found["whole"]["attention/collapsed/share"] == 0


def test_what_ranks_write_makes_the_mean_of_all_their_queries() -> None:
    rows = causal(torch.tensor([0.1, 1.0]))
    parts = [
        AttentionRows(**{name: value[at] for name, value in vars(rows).items()})
        for at in (slice(0, 6), slice(6, None))
    ]
    ranks, whole = [measured({"m": part})["m.head.1"] for part in parts], measured({"m": rows})
    nats = [rank["attention/head_entropy"] for rank in ranks]
    assert np.average(nats, weights=[6, 14]) == pytest.approx(
        whole["m.head.1"]["attention/head_entropy"]
    )
    shares = [rank["attention/head_entropy_normalised"] for rank in ranks]
    assert np.average(shares, weights=[5, 14]) == pytest.approx(
        whole["m.head.1"]["attention/head_entropy_normalised"]
    )
