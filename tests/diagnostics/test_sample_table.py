import pytest
import torch
from readings import tokens

from entropylens.diagnostics.sample_table import (
    HIGHEST_LOSS,
    LONGEST,
    SampleTable,
    mean_by_sequence,
)


def test_the_samples_of_highest_mean_loss_are_named() -> None:
    reading = tokens(rows=8, columns=40)
    (block,), _ = SampleTable().measure(reading, None)
    mean = -reading.logprob.view(8, 40).mean(1)
    worst = mean.argsort(descending=True)[:HIGHEST_LOSS]
    assert block.columns["sequence"][:HIGHEST_LOSS].tolist() == worst.tolist()
    assert block.columns["loss"][:HIGHEST_LOSS].tolist() == pytest.approx(mean[worst].tolist())
    assert reading.sample_ids is not None
    names = [reading.sample_ids[i] for i in block.columns["sample_id"].index]
    assert names[:HIGHEST_LOSS] == [f"sample {i}" for i in worst.tolist()]


def test_the_longest_are_by_scored_tokens_and_a_sample_without_any_is_left_out() -> None:
    reading = tokens(rows=3, columns=40)
    reading.sequence_tokens[:] = torch.tensor([10, 40, 0])
    reading.present[80:] = False
    (block,), _ = SampleTable().measure(reading, None)
    assert block.columns["sequence"][-LONGEST:].tolist() == [1, 0]
    assert block.columns["present"].tolist() == [True, True, False, True, True]


def test_a_sample_whose_loss_is_not_a_number_ranks_first() -> None:
    reading = tokens(rows=3, columns=40)
    reading.logprob[45] = torch.nan
    (block,), _ = SampleTable().measure(reading, None)
    assert block.columns["sequence"][0] == 1


def test_means_by_sequence_ignore_what_is_not_present() -> None:
    values = torch.tensor([1.0, 2.0, torch.nan, 7.0])
    present = torch.tensor([True, True, False, True])
    means, counts = mean_by_sequence(values, present, torch.tensor([0, 0, 0, 2]), 3)
    assert means[[0, 2]].tolist() == [1.5, 7.0]
    assert means[1].isnan()
    assert counts.tolist() == [2.0, 0.0, 1.0]
