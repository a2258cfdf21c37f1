import io
from pathlib import Path

import pytest

from benchmarks.dashboard_parts import logs
from entropylens.store.compact import compact

SIZE = logs.Size(steps=2500, metrics=60, runs=2)


def rows_of(path: Path) -> bytes:
    (file,) = (path / "metrics").glob("*.parquet")
    content = file.read_bytes()
    return content[: -8 - int.from_bytes(content[-8:-4], "little")]


def test_a_merged_run_is_made_byte_for_byte_as_merging_leaves_it(tmp_path: Path) -> None:
    assert SIZE.steps * SIZE.metrics > 1 << 17  # more than a row group
    logs.write_merged(tmp_path / "made", 0, SIZE)
    logs.write_unmerged(tmp_path / "merged", 0, SIZE)
    compact(tmp_path / "merged")
    assert rows_of(tmp_path / "made") == rows_of(tmp_path / "merged")
    logs.check(tmp_path / "made", 0, SIZE)


def test_events_are_byte_for_byte_those_of_tensorboards_own_writer() -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto import event_pb2, summary_pb2
    from tensorboard.summary.writer.record_writer import RecordWriter

    from benchmarks.dashboard_parts.events import records

    size = logs.Size(steps=140, metrics=3, runs=1)
    theirs = io.BytesIO()
    writer, times = RecordWriter(theirs), logs.times(size.steps) / 1e6
    columns = [logs.values(0, at, size.steps) for at in range(size.metrics)]
    for step in range(size.steps):
        for name, column in zip(size.names, columns, strict=True):
            value = summary_pb2.Summary.Value(tag=name, simple_value=column[step])
            summary = summary_pb2.Summary(value=[value])
            event = event_pb2.Event(wall_time=times[step], step=step, summary=summary)
            writer.write(event.SerializeToString())
    assert b"".join(chunk.tobytes() for chunk in records(0, size)) == theirs.getvalue()
