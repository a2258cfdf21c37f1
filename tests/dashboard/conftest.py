from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from runs_to_show import fill

from entropylens.store.writer import RunWriter


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the runs are."""
    place = tmp_path / "runs"
    place.mkdir()
    return place


@pytest.fixture
def make(folder: Path) -> Iterator[Any]:
    """Start a run in the folder; those left open are closed at the end."""
    writers: list[RunWriter] = []

    def started(name: str, steps: int = 300, seed: int = 0, **user: Any) -> RunWriter:
        config = {"preset": "balanced", "user": {"seed": seed, **user}}
        writer = RunWriter(folder / name, config=config, name=name, flush_seconds=0.05)
        writers.append(writer)
        if steps:
            fill(writer, 1, steps, seed)
        writer.flush()
        return writer

    yield started
    for writer in writers:
        writer.close()
