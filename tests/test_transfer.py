from typing import Any

import numpy as np
import pytest
import torch

from entropylens import transfer as module
from entropylens.registry import Block, Lookup, Scalars
from entropylens.transfer import Stamp, Transfer

NOW = Stamp(7, 12.5, "train")


def landed(*blocks: Block) -> list[tuple[str, dict[str, Any]]]:
    arrived: list[tuple[str, dict[str, Any]]] = []
    transfer = Transfer(lambda table, columns: arrived.append((table, columns)))
    for block in blocks:
        transfer.add(block, NOW)
    transfer.flush()
    assert len(transfer) == 0
    return arrived


def test_values_arrive_in_order_with_their_stamp() -> None:
    first = Block.metrics(["a/x", "a/y"], torch.tensor([1.5, torch.nan]))
    second = Block.metrics(["b/x"], torch.tensor([2**40]))
    ((table, found),) = landed(first, second)
    assert table == "metrics"
    assert (found["step"], found["time"], found["phase"]) == (7, 12.5, "train")
    assert found["name"] == ["a/x", "a/y", "b/x"]
    np.testing.assert_array_equal(found["value"], np.array([1.5, np.nan, 2**40]))


def test_blocks_of_other_steps_and_modules_are_joined_row_by_row() -> None:
    arrived: list[tuple[str, dict[str, Any]]] = []
    transfer = Transfer(lambda table, columns: arrived.append((table, columns)))
    transfer.add(Block.metrics(["a", "b"], torch.tensor([1.0, 2.0]), modules="m"), NOW)
    transfer.add(Block.metrics(["a"], torch.tensor([3.0]), modules=["n"]), Stamp(8, 13.0, "eval"))
    transfer.flush()
    ((_, found),) = arrived
    assert found["step"] == [7, 7, 8]
    assert found["time"] == [12.5, 12.5, 13.0]
    assert found["phase"] == ["train", "train", "eval"]
    assert found["module"] == ["m", "m", "n"]
    assert found["value"].tolist() == [1.0, 2.0, 3.0]


def test_numbers_of_the_host_and_of_a_device_share_a_column() -> None:
    values = Scalars([0.5, torch.tensor(1.25), torch.tensor([7]), 2])
    ((_, found),) = landed(Block.metrics(["a", "b", "c", "d"], values))
    assert found["value"] == [0.5, 1.25, 7, 2]


def test_blocks_with_other_columns_are_delivered_apart() -> None:
    weighed = Block.metrics(["a"], torch.ones(1), weight=2.0)
    found = landed(weighed, Block.metrics(["b"], torch.ones(1)), weighed)
    assert [columns["name"] for _, columns in found] == [["a", "a"], ["b"]]


def test_a_metric_without_weight_behind_it_is_absent() -> None:
    block = Block.metrics(["a", "b", "c"], torch.ones(3), weight=torch.tensor([1.0, 0.0, 2.0]))
    ((_, columns),) = landed(block)
    assert columns["name"] == ["a", "c"]
    assert columns["weight"].tolist() == [1.0, 2.0]
    assert landed(Block.metrics(["a"], torch.ones(1), weight=torch.tensor(0.0))) == []


def test_a_metric_of_unknown_weight_stays() -> None:
    ((_, columns),) = landed(Block.metrics(["a"], torch.ones(1)))
    assert "weight" not in columns


def test_rows_that_are_not_present_are_left_out_of_every_column() -> None:
    block = Block(
        "tokens",
        {
            "present": torch.tensor([True, False, True]),
            "logprob": torch.tensor([1.0, 2.0, 3.0]),
            "selection": ["p", "q", "r"],
            "sample_id": Lookup(["s0", "s1", "s2"], torch.tensor([2, 1, 0])),
        },
    )
    ((_, columns),) = landed(block)
    assert columns["logprob"].tolist() == [1.0, 3.0]
    assert columns["selection"] == ["p", "r"]
    assert columns["sample_id"] == ["s2", "s0"]
    assert "present" not in columns


def test_what_arrives_does_not_change_when_the_tensor_does() -> None:
    value = torch.ones(1)
    arrived: list[Any] = []
    transfer = Transfer(lambda table, columns: arrived.append(columns["value"]))
    transfer.add(Block.metrics(["a"], value), NOW)
    transfer.flush()
    value += 5
    assert arrived[0].tolist() == [1.0]


def test_one_copy_a_dtype_however_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[torch.Tensor] = []
    original = module._Flight._copy

    def counted(self: Any, flat: torch.Tensor) -> torch.Tensor:
        copies.append(flat)
        return original(self, flat)

    monkeypatch.setattr(module._Flight, "_copy", counted)
    landed(*[Block.metrics(["a"], torch.ones(1), weight=torch.ones(())) for _ in range(50)],
           Block("tokens", {"token_id": torch.arange(3)}))  # fmt: skip
    assert [(c.dtype, len(c)) for c in copies] == [(torch.float32, 100), (torch.int64, 3)]


def test_a_copy_under_way_is_delivered_by_a_later_flush(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an accelerator, played by an event that has not passed yet."""

    class Event:
        passed = False

        def query(self) -> bool:
            return self.passed

        def synchronize(self) -> None:
            self.passed = True

    event = Event()

    def copy(self: Any, flat: torch.Tensor) -> torch.Tensor:
        self._events.append(event)
        return flat

    monkeypatch.setattr(module._Flight, "_copy", copy)
    arrived: list[str] = []
    transfer = Transfer(lambda table, columns: arrived.append(table))
    transfer.add(Block.metrics(["a"], torch.ones(1)), NOW)
    transfer.flush()
    assert arrived == []
    transfer.flush()
    assert arrived == []
    transfer.flush(wait=True)
    assert arrived == ["metrics"]
