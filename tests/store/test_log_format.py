"""`docs/log-format.md` is a contract: its tables and its code hold."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from store.killing import kill

from entropylens.records import FORMAT_VERSION, SCHEMAS
from entropylens.store.compact import compact
from entropylens.store.reader import open_run
from entropylens.store.writer import RunWriter

PAGE = (Path(__file__).parents[2] / "docs" / "log-format.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def section(title: str) -> str:
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", PAGE, re.DOTALL | re.MULTILINE)
    assert found is not None, title
    return found[1]


def rows_of(text: str) -> list[list[str]]:
    """Cells of the first table in ``text``, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def keys_of(title: str) -> list[str]:
    """What the first column of a section's table names."""
    return [key for row in rows_of(section(title)) for key in names(row[0])]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A killed run: two segments and a tail."""
    monkeypatch.chdir(tmp_path)
    writer = RunWriter("runs/mine", flush_seconds=3600, seal_rows=3, config={"user": {"lr": 1}})
    for first in (1, 4, 7):
        steps = list(range(first, first + (3 if first < 7 else 2)))
        writer.write("metrics", {"name": "loss/mean", "value": steps, "step": steps})
        writer.flush()
    kill(writer)
    return tmp_path / "runs" / "mine"


def run_code(space: dict[str, Any]) -> dict[str, Any]:
    for block in CODE:
        exec(compile(block, "docs/log-format.md", "exec"), space)
    return space


def test_the_code_reads_a_run_as_it_says(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_code({})
    assert len(CODE) == 5
    assert found["table"]["value"].to_pylist() == [1, 2, 3, 4, 5, 6]
    assert found["loss"]["value"].tolist() == [1, 2, 3, 4, 5, 6]
    assert found["last"].to_dict("records") == [{"name": "loss/mean", "last": 6.0, "rows": 6}]
    run = open_run(run_dir)
    assert capsys.readouterr().out.splitlines() == [
        "runs/mine/metrics/000.tail.arrows 2",
        f"{run.run_id} [0]",
    ]
    tail_of, tail = found["tail_of"], run_dir / "metrics" / "000.tail.arrows"
    assert tail_of(tail, found["files"])["value"].to_pylist() == [7, 8]
    content = tail.read_bytes()
    tail.write_bytes(content[:-1])
    assert tail_of(tail, found["files"]).num_rows == 0
    tail.write_bytes(content)
    RunWriter(run_dir, resume_step=9).close()
    tail.write_bytes(content)  # as in the moment after sealing
    files = sorted(run_dir.glob("metrics/*.parquet"))
    assert tail_of(tail, files).num_rows == 0
    assert open_run(run_dir).metrics().table.num_rows == 8


@pytest.mark.parametrize("table", SCHEMAS)
def test_every_table_is_described_with_its_columns_and_types(table: str) -> None:
    described = rows_of(section("Tables")) + rows_of(section(table))
    columns = [(names(name)[0], kind) for name, kind, _ in described]
    assert columns == [(field.name, str(field.type)) for field in SCHEMAS[table]]
    assert f"{table}/" in PAGE


def test_every_key_and_every_kind_of_file_is_described(run_dir: Path) -> None:
    assert f"format version {FORMAT_VERSION}" in PAGE
    manifest = json.loads((run_dir / "run.json").read_text())
    assert set(keys_of("run.json")) == manifest.keys()
    attempt = next(row for row in rows_of(section("run.json")) if row[0] == "`attempts`")
    assert set(names(attempt[1])) == manifest["attempts"][0].keys()
    status = json.loads((run_dir / "status" / "rank-000.json").read_text())
    assert set(keys_of("status/rank-NNN.json")) == status.keys()
    footer = pq.read_metadata(run_dir / "metrics" / "000-000000.parquet").metadata
    ours = {key.decode() for key in footer if key.startswith(b"entropylens.")}
    assert set(keys_of("Segments, tails and ordinals")) == ours
    compact(run_dir)
    pyramid = pq.read_schema(run_dir / "pyramid" / "metrics.parquet")
    assert keys_of("pyramid/metrics.parquet") == pyramid.names
    assert {path.name for path in run_dir.iterdir()} <= set(re.findall(r"[a-z]+(?:\.json)?", PAGE))
