from dataclasses import replace
from typing import Any

import torch
from readings import policy

from entropylens.diagnostics.completions import COMPLETIONS, Completions
from entropylens.transfer import Stamp, Transfer


def written(reading: Any) -> list[dict[str, Any]]:
    arrived: list[dict[str, Any]] = []
    transfer = Transfer(lambda table, columns: arrived.append(columns))
    blocks, _ = Completions().measure(reading, None)
    for block in blocks:
        transfer.add(block, Stamp(1, 0.0, "train"))
    transfer.flush(wait=True)
    if not arrived:
        return []
    count = len(arrived[0]["text"])
    whole = {k: v for k, v in arrived[0].items() if not isinstance(v, str | int | float)}
    return [{name: column[row] for name, column in whole.items()} for row in range(count)]


def test_whole_completions_come_with_their_own_numbers() -> None:
    reading = policy(rows=8, columns=5)
    tokens = replace(reading.tokens, present=reading.tokens.position < 3)
    reading = replace(reading, tokens=tokens)
    rows = written(reading)
    assert len(rows) == COMPLETIONS
    assert reading.completions
    assert reading.prompts
    assert reading.reward is not None
    for row in rows:
        at = reading.completions.index(row["text"])
        assert row["prompt"] == reading.prompts[at]
        assert row["group"] == str(at // 4)
        assert row["reward"] == reading.reward[at]
        own = (reading.tokens.sequence == at) & tokens.present
        assert row["advantage"] == reading.advantage[own][0]
        assert row["token_entropies"].tolist() == tokens.entropy[own].tolist()
        gaps = (-tokens.logprob - tokens.entropy)[own]
        assert row["surprisal_gaps"].tolist() == gaps.tolist()
        assert row["sample_id"] == f"sample {at}"


def test_the_choice_follows_the_keys_and_not_the_content() -> None:
    reading = policy(rows=8, columns=5)
    key = torch.full((8, 5), 0.9)
    key[6, 0], key[2, 0] = 0.1, 0.2
    chosen = replace(reading, tokens=replace(reading.tokens, key=key.flatten()))
    assert [row["text"] for row in written(chosen)] == ["completion 6", "completion 2"]


def test_without_text_or_with_sampled_rows_nothing_is_written() -> None:
    reading = policy()
    assert written(replace(reading, completions=None)) == []
    assert written(replace(reading, tokens=replace(reading.tokens, grids=None))) == []
