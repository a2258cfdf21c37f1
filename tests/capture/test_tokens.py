import pytest
import torch

from entropylens.capture.tokens import Grid, LogitTokens, TokenSlice, join_slices


def logits_and_targets(
    batch: int = 4, length: int = 30, vocabulary: int = 11
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(batch, length, vocabulary, generator=generator) * 2
    targets = torch.randint(0, vocabulary, (batch, length), generator=generator)
    present = torch.rand(batch, length, generator=generator) < 0.6
    return logits, targets, present


def read_tokens(
    logits: torch.Tensor,
    targets: torch.Tensor,
    present: torch.Tensor,
    *,
    rows: int | None,
    generator: torch.Generator,
    documents: torch.Tensor | None = None,
) -> TokenSlice:
    grid = Grid(targets=targets, present=present, documents=documents)
    return LogitTokens(logits=logits, grid=grid).measure(rows, generator, 1.0)


def own() -> torch.Generator:
    return torch.Generator().manual_seed(9)


def test_a_complete_reading_holds_every_scored_token_once() -> None:
    logits, targets, present = logits_and_targets()
    found = read_tokens(logits, targets, present, rows=None, generator=own())
    logp = logits.double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    assert torch.equal(found.present, present.flatten())
    assert torch.allclose(found.entropy[found.present].double(), entropy[present], atol=1e-5)
    picked = logp.gather(-1, targets[..., None])[..., 0]
    assert torch.allclose(found.logprob[found.present].double(), picked[present], atol=1e-5)
    assert found.entropy[~found.present].isnan().all()
    assert found.weight.sum() == present.sum()
    assert found.grid == (4, 30)


def test_positions_count_scored_tokens_on_either_padding_side() -> None:
    logits = torch.zeros(2, 5, 3)
    present = torch.tensor([[True, True, True, False, False], [False, False, True, True, True]])
    found = read_tokens(logits, torch.zeros(2, 5, dtype=torch.long), present, rows=None,
                        generator=own())  # fmt: skip
    position = found.position.view(2, 5)
    assert position[0, :3].tolist() == position[1, 2:].tolist() == [0, 1, 2]


def test_a_sample_stands_for_all_and_is_drawn_from_the_scored_tokens_only() -> None:
    logits, targets, present = logits_and_targets()
    found = read_tokens(logits, targets, present, rows=20, generator=own())
    assert found.present.all()
    assert len(found.present) == 20
    assert found.weight.sum().item() == pytest.approx(present.sum().item())
    chosen = found.sequence * 30 + _columns(found, logits)
    assert len(set(chosen.tolist())) == 20
    assert found.grid is None


def _columns(found: object, logits: torch.Tensor) -> torch.Tensor:
    """Where each measured token stood, found again by its entropy."""
    logp = logits.double().log_softmax(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    rows = entropy[found.sequence]  # type: ignore[attr-defined]
    return (rows - found.entropy[:, None].double()).abs().argmin(1)  # type: ignore[attr-defined]


def test_every_scored_token_is_sampled_equally_often() -> None:
    logits, targets, present = logits_and_targets(batch=2, length=10)
    generator, counts, trials = own(), torch.zeros(20), 1500
    for _ in range(trials):
        found = read_tokens(logits, targets, present, rows=4, generator=generator)
        counts[found.sequence * 10 + _columns(found, logits)] += 1
    flat = present.flatten()
    expected = trials * 4 / flat.sum().item()
    assert (counts[~flat] == 0).all()
    assert ((counts[flat] - expected).abs() < 5 * expected**0.5).all()


def test_the_sampled_mean_is_unbiased() -> None:
    logits, targets, present = logits_and_targets(batch=8, length=40)
    complete = read_tokens(logits, targets, present, rows=None, generator=own())
    exact = complete.entropy[complete.present].mean()
    generator = own()
    means = torch.stack(
        [
            (found.entropy * found.weight).sum() / found.weight.sum()
            for found in (
                read_tokens(logits, targets, present, rows=16, generator=generator)
                for _ in range(400)
            )
        ]
    )
    assert abs(means.mean() - exact) < 4 * means.std() / 20


def test_fewer_scored_tokens_than_rows_leaves_slots_empty() -> None:
    logits, targets, _ = logits_and_targets()
    present = torch.zeros(4, 30, dtype=torch.bool)
    present[1, 3:6] = True
    found = read_tokens(logits, targets, present, rows=10, generator=own())
    assert found.present.sum() == 3
    assert found.weight.sum() == 3
    assert set(found.sequence[found.present].tolist()) == {1}


def test_an_all_zero_mask_measures_nothing() -> None:
    logits, targets, _ = logits_and_targets()
    nothing = torch.zeros(4, 30, dtype=torch.bool)
    for rows in (None, 10):
        found = read_tokens(logits, targets, nothing, rows=rows, generator=own())
        assert not found.present.any()
        assert found.weight.sum() == 0


def test_the_trainings_random_numbers_are_not_touched() -> None:
    before = torch.get_rng_state()
    logits, targets, present = logits_and_targets()
    read_tokens(logits, targets, present, rows=7, generator=own())
    assert torch.equal(torch.get_rng_state(), before)


def test_micro_batches_are_joined_and_their_sequences_numbered_on() -> None:
    logits, targets, present = logits_and_targets()
    parts = [
        read_tokens(logits[:1], targets[:1], present[:1], rows=None, generator=own()),
        read_tokens(logits[1:], targets[1:], present[1:], rows=5, generator=own()),
    ]
    joined = join_slices(parts, [["a"], ["b", "c", "d"]])
    assert joined.weight.sum().item() == pytest.approx(present.sum().item())
    assert joined.sample_ids == ["a", "b", "c", "d"]
    assert joined.sequence_tokens.tolist() == present.sum(1).tolist()
    assert set(joined.sequence[:30].tolist()) == {0}
    assert joined.sequence[30:].min() >= 1
    assert joined.grids is None
    assert join_slices(parts, [["a"], None]).sample_ids is None


def test_packed_documents_are_sequences_of_their_own_with_positions_from_zero() -> None:
    """As padded rows of the same documents: same positions, same tokens by sequence."""
    logits, targets, _ = logits_and_targets(batch=2, length=6)
    documents = torch.tensor([[0, 0, 0, 1, 1, 1], [2, 2, 3, 3, 3, 3]])
    present = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 1, 0, 1, 1, 1]]).bool()
    arguments = {"generator": own(), "documents": documents}
    found = read_tokens(logits, targets, present, rows=None, **arguments)  # type: ignore[arg-type]
    assert found.position[found.present].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 2]
    assert found.sequence[found.present].tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert found.sequence_tokens.tolist() == [2, 2, 2, 3] + [0] * 8
    sampled = read_tokens(logits, targets, present, rows=5, **arguments)  # type: ignore[arg-type]
    places = dict(zip(found.entropy.tolist(), zip(found.sequence.tolist(),
                      found.position.tolist(), strict=True), strict=True))  # fmt: skip
    again = zip(sampled.sequence.tolist(), sampled.position.tolist(), strict=True)
    assert [places[e] for e in sampled.entropy.tolist()] == list(again)


def test_classification_is_one_column() -> None:
    found = LogitTokens.of(torch.zeros(6, 4), torch.tensor([0, 1, -100, 3, 2, 1]))
    assert found.logits.shape == (6, 1, 4)
    assert found.grid.present[:, 0].tolist() == [True, True, False, True, True, True]
    assert found.grid.targets.shape == (6, 1)


def test_shapes_that_do_not_fit_are_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"expected logits \[..., vocabulary\] .* got shape \(5,\)"
    ):
        LogitTokens.of(torch.zeros(5), torch.zeros(()))
    with pytest.raises(ValueError, match=r"targets of shape \(2, 3\) .* got \(2, 4\); shift"):
        LogitTokens.of(torch.zeros(2, 3, 7), torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match=r"a mask of the targets' shape \(2, 3\), got \(2,\)"):
        LogitTokens.of(torch.zeros(2, 3, 7), torch.zeros(2, 3, dtype=torch.long), torch.ones(2))


def test_a_target_beyond_the_vocabulary_is_masked_and_poisons_nothing() -> None:
    source = LogitTokens.of(torch.zeros(1, 3, 5), torch.tensor([[0, 4, 255]]))
    assert source.grid.present.tolist() == [[True, True, False]]
    found = source.measure(None, own(), 1.0)
    assert (found.entropy * found.weight)[found.present].isfinite().all()


def test_sequences_of_no_length_are_no_tokens() -> None:
    source = LogitTokens.of(torch.zeros(2, 0, 5), torch.zeros(2, 0, dtype=torch.long))
    assert source.logits.shape == (2, 0, 5)
    assert source.measure(None, own(), 1.0).sequence_tokens.tolist() == [0, 0]
