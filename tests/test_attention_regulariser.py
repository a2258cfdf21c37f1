from math import log

import numpy as np
import pytest
import torch
from torch import Tensor

from entropylens.attention_regulariser import AttentionEntropyRegulariser, row_entropies

BATCH, HEADS, LENGTH = 3, 2, 7


def logits_of(
    batch: int = BATCH, length: int = LENGTH, scale: float = 3.0, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(batch, HEADS, length, length, generator=generator).double()


def maps_of(logits: Tensor, causal: bool = True) -> Tensor:
    hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
    return (logits.masked_fill(hidden, -torch.inf) if causal else logits).softmax(-1)


def regulariser(layers: int = 1, **settings: object) -> AttentionEntropyRegulariser:
    return AttentionEntropyRegulariser(layers, HEADS, **{"strength": 1.0, **settings}).double()  # type: ignore[arg-type]


def published(
    maps: list[Tensor], thresholds: np.ndarray, tolerance: float, normalise: str
) -> float:
    """Algorithm 1 line by line, for each sequence, and by row where asked."""
    whole = []
    for b in range(maps[0].shape[0]):
        of_layers = 0.0
        for layer, attention in enumerate(maps):
            length, of_layer = attention.shape[-1], 0.0
            for h in range(attention.shape[1]):
                a = attention[b, h].numpy()
                entropy = [-sum(x * np.log(x) for x in row if x > 0) for row in a]
                if normalise == "row":
                    shares = [entropy[i] / log(i + 1) for i in range(1, length)]
                    mean = log(length) * np.mean(shares)
                else:
                    mean = np.mean(entropy)
                deviation = mean - thresholds[layer, h] * log(length)
                if abs(deviation) > tolerance * log(length):
                    of_layer += deviation**2
            of_layers += of_layer / attention.shape[1]
        whole.append(of_layers / len(maps))
    return float(np.mean(whole))


@pytest.mark.parametrize("normalise", ["row", "log_t"])
def test_it_is_algorithm_1_line_by_line(normalise: str) -> None:
    found = regulariser(2, tolerance=0.1, strength=0.3, normalise=normalise)
    thresholds = np.array([[0.1, 0.3], [0.5, 0.9]])
    found.threshold.data = torch.from_numpy(thresholds)
    maps = [maps_of(logits_of(seed=seed, scale=2.0)) for seed in range(2)]
    expected = 0.3 * published(maps, thresholds, 0.1, normalise)
    assert expected > 0
    assert found(maps).item() == pytest.approx(expected, rel=1e-12)


def test_uniform_causal_attention_reaches_log_t_by_row_and_not_as_published() -> None:
    uniform = maps_of(torch.zeros(2, HEADS, 128, 128).double())
    by_row = regulariser(threshold=0.5)([uniform]).item()
    assert by_row == pytest.approx((0.5 * log(128)) ** 2)
    mean = np.log(np.arange(1, 129)).mean()
    assert mean == pytest.approx(3.878, abs=5e-4)
    as_published = regulariser(threshold=0.5, normalise="log_t")([uniform]).item()
    assert as_published == pytest.approx((mean - 0.5 * log(128)) ** 2)


@pytest.mark.parametrize("normalise", ["row", "log_t"])
def test_uniform_full_and_one_hot_attention_are_at_the_ends(normalise: str) -> None:
    found = regulariser(threshold=0.25, causal=False, normalise=normalise)
    uniform = torch.full((1, HEADS, 9, 9), 1 / 9).double()
    one_hot = torch.eye(9).double().expand(1, HEADS, 9, 9)
    assert found([uniform]).item() == pytest.approx((0.75 * log(9)) ** 2)
    assert found([one_hot]).item() == pytest.approx((0.25 * log(9)) ** 2)


def test_within_the_tolerance_there_is_no_penalty_and_beyond_it_the_whole_deviation() -> None:
    uniform = torch.full((1, HEADS, 9, 9), 1 / 9).double()
    within = regulariser(threshold=0.81, causal=False)
    beyond = regulariser(threshold=0.79, causal=False)
    assert within([uniform]).item() == 0
    assert beyond([uniform]).item() == pytest.approx((0.21 * log(9)) ** 2)


def test_its_size_does_not_depend_on_the_batch_or_the_length() -> None:
    """The released code adds over both."""
    for length in (8, 64):
        for batch in (1, 5):
            uniform = maps_of(torch.zeros(batch, HEADS, length, length).double())
            assert regulariser()([uniform]).item() / log(length) ** 2 == pytest.approx(0.25)
    maps = maps_of(logits_of())
    assert regulariser()([maps.repeat(4, 1, 1, 1)]).item() == pytest.approx(
        regulariser()([maps]).item()
    )


@pytest.mark.parametrize("normalise", ["row", "log_t"])
@pytest.mark.parametrize("causal", [True, False])
def test_its_gradients_are_those_of_finite_differences(normalise: str, causal: bool) -> None:
    found = regulariser(tolerance=0.01, threshold=0.2, normalise=normalise, causal=causal)
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [False] * 2 + [True] * 3])

    def term(logits: Tensor, threshold: Tensor) -> Tensor:
        maps = maps_of(logits, causal)
        return torch.func.functional_call(found, {"threshold": threshold}, ([maps], mask))

    inputs = (logits_of(length=5).requires_grad_(), found.threshold)
    assert torch.autograd.gradcheck(term, inputs)
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(term(*inputs), inputs))


def test_probabilities_of_zero_leave_no_nan_in_the_gradient() -> None:
    logits = (1e4 * torch.eye(5)).expand(1, HEADS, 5, 5).clone().requires_grad_()
    maps = maps_of(logits)
    assert (maps == 0).any()
    regulariser()([maps]).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()


def test_a_nan_in_a_row_that_counts_shows() -> None:
    maps = maps_of(logits_of())
    maps[0, 1, 3, 2] = torch.nan
    assert regulariser()([maps]).isnan()


@pytest.mark.parametrize("normalise", ["row", "log_t"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str, normalise: str) -> None:
    logits = logits_of()
    alone = regulariser(normalise=normalise)([maps_of(logits)])
    at = slice(4, None) if side == "left" else slice(0, LENGTH)
    wide = torch.full((BATCH, HEADS, LENGTH + 4, LENGTH + 4), -torch.inf).double()
    wide[..., at, at] = logits
    mask = torch.zeros(BATCH, LENGTH + 4, dtype=torch.long)
    mask[:, at] = 1
    wide.requires_grad_()
    maps = maps_of(wide)
    padding = maps[mask[:, None].expand(-1, HEADS, -1) == 0]
    assert side == "right" or padding.isnan().all()
    padded = regulariser(normalise=normalise)([maps], mask)
    assert padded.item() == pytest.approx(alone.item(), rel=1e-12)


def test_nan_in_padded_rows_reaches_no_gradient() -> None:
    maps = maps_of(logits_of())
    maps[:, :, 5:] = torch.nan
    maps.requires_grad_()
    mask = (torch.arange(LENGTH) < 5).expand(BATCH, -1)
    regulariser()([maps], mask).backward()
    assert maps.grad is not None
    assert maps.grad.isfinite().all()
    assert maps.grad[:, :, 1:5].abs().max() > 0
    assert maps.grad[:, :, 5:].abs().max() == 0


def test_sequences_of_fewer_than_two_tokens_do_not_count() -> None:
    maps, mask = maps_of(logits_of()), torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 1:], mask[2] = False, False
    assert regulariser()([maps], mask).item() == pytest.approx(regulariser()([maps[:1]]).item())
    mask[0] = False
    nothing = regulariser()
    nothing([maps], mask).backward()
    assert nothing.threshold.grad is not None
    assert nothing.threshold.grad.abs().max() == 0


def test_thresholds_learn_where_their_heads_are() -> None:
    maps = [torch.cat([maps_of(logits_of(scale=s))[:, :1] for s in (0.1, 20.0)], 1)]
    found = regulariser()
    optimizer = torch.optim.SGD(found.parameters(), lr=0.2)
    first = found(maps).item()
    for _ in range(30):
        optimizer.zero_grad()
        found(maps).backward()
        optimizer.step()
    assert first > 0.1
    assert found(maps).item() == 0
    assert found.threshold[0, 0] > 0.7
    assert found.threshold[0, 1] < 0.3


def test_a_step_against_the_gradient_narrows_heads_that_are_too_wide() -> None:
    logits = (0.1 * logits_of()).requires_grad_()
    everything = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    before = row_entropies(maps_of(logits), everything).mean()
    regulariser()([maps_of(logits)]).backward()
    assert logits.grad is not None
    after = row_entropies(maps_of(logits - 10 * logits.grad), everything).mean()
    assert after < before - 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_maps_of_any_precision_give_a_float32_term(dtype: torch.dtype) -> None:
    maps = maps_of(logits_of())
    term = AttentionEntropyRegulariser(1, HEADS, strength=1.0)([maps.to(dtype)])
    assert term.dtype == torch.float32
    assert term.item() == pytest.approx(regulariser()([maps]).item(), rel=3e-2)


def test_it_takes_what_transformers_gives() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=HEADS, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    tokens = torch.arange(10).reshape(2, 5)
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    outputs = model(tokens, attention_mask=mask, output_attentions=True)
    found = AttentionEntropyRegulariser(2, HEADS, strength=1.0)
    term = found(outputs.attentions, mask)
    term.backward()
    assert term.item() > 0
    # The maps of nearly uniform attention: half of log T is missing in each sequence.
    assert term.item() == pytest.approx(np.mean([(0.5 * log(n)) ** 2 for n in (5, 3)]), rel=0.05)
    gradients = [layer.self_attn.q_proj.weight.grad for layer in model.model.layers]
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients)


def test_what_it_cannot_use_is_refused() -> None:
    maps = maps_of(logits_of())
    found = regulariser(2)
    with pytest.raises(ValueError, match='None; load the model with attn_implementation="eager"'):
        found((None, maps))
    with pytest.raises(ValueError, match="expected attention maps"):
        found([])
    with pytest.raises(ValueError, match="expected maps of 2 layers, got 1"):
        found([maps])
    with pytest.raises(ValueError, match=r"shape \[B, 2, T, T\], got \(3, 2, 7, 5\)"):
        found([maps, maps[..., :5]])
    with pytest.raises(ValueError, match=r"got \(3, 1, 7, 7\)"):
        found([maps, maps[:, :1]])
    with pytest.raises(ValueError, match="expected normalise to be one of row, log_t, got 'none'"):
        regulariser(normalise="none")
    with pytest.raises(ValueError, match="of at least 1, got 0 and 2"):
        regulariser(0)
