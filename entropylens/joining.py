"""Which run a Lens writes to: where the ranks agree on, or what a checkpoint goes on with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from entropylens.errors import EntropyLensError
from entropylens.meeting import rank_and_world, run_dir_of_rank_zero
from entropylens.store.manifest import load_manifest
from entropylens.store.reader import open_run
from entropylens.store.writer import RunWriter

__all__ = ["open_writer", "place_of", "tokens_seen"]


def open_writer(
    run_dir: str | Path, rank: int | None, world_size: int | None, **settings: Any
) -> RunWriter:
    """Open the run where all ranks agree that it is; rank 0 chooses."""
    if rank is not None or world_size is not None:
        return RunWriter(Path(run_dir), rank=rank or 0, world_size=world_size or 1, **settings)
    rank, world_size = rank_and_world()
    with run_dir_of_rank_zero(run_dir, rank=rank, world_size=world_size) as meeting:
        writer = RunWriter(meeting.run_dir, rank=rank, world_size=world_size, **settings)
        meeting.run_dir = writer.run_dir
    return writer


def place_of(state: Mapping[str, Any], asked: Path) -> Path | None:
    """Where the run of a checkpoint is, if that is what ``asked`` means; None asks for a new one.

    A directory that was moved together with its checkpoints is found where it is asked for.
    """
    places = [asked]
    if str(asked.absolute()) == state.get("asked"):
        places.append(Path(state.get("run_dir", asked)))
    for place in places:
        try:
            if load_manifest(place)["run_id"] == state.get("run_id"):
                return place
        except EntropyLensError:
            continue
    return None


def tokens_seen(writer: RunWriter, step: int) -> int | None:
    """Tokens that this rank had seen at a step, as its log says; None where it does not."""
    rows = open_run(writer.run_dir).metrics("tokens/seen", steps=(step, step)).to_arrow()
    seen = [row["value"] for row in rows.to_pylist() if row["rank"] == writer.rank]
    return int(seen[0]) if seen else None
