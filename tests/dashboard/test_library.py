import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from entropylens.errors import EntropyLensError
from entropylens.store.reader import Run
from entropylens.store.writer import RunWriter
from entropylens_dashboard import library
from entropylens_dashboard.library import Entry, Library


def write(path: Path, *, rows: int = 1, state: str = "finished", reason: str = "") -> str:
    writer = RunWriter(path, flush_seconds=0.01)
    for step in range(rows):
        row = {"name": "loss/mean", "module": "", "phase": "train", "step": step, "value": [1.0]}
        writer.write("metrics", row)
    writer.close(state, reason)
    return str(json.loads((path / "run.json").read_text())["run_id"])


def change(path: Path, **facts: Any) -> None:
    manifest = json.loads((path / "run.json").read_text())
    (path / "run.json").write_text(json.dumps({**manifest, **facts}))


def change_status(path: Path, **facts: Any) -> None:
    file = path / "status" / "rank-000.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))


def only(folder: Path) -> Entry:
    (entry,) = Library(folder).entries()
    return entry


# -- what is there --------------------------------------------------------------------------------


def test_runs_of_all_depths_come_newest_first(tmp_path: Path) -> None:
    ids = [write(tmp_path / name) for name in ("a", "deep/er/b", ".hidden/c")]
    change(tmp_path / "a", created="2020-01-01T00:00:00+00:00")
    entries = Library(tmp_path).entries()
    assert [(e.id, e.name, e.folder, e.state) for e in entries] == [
        (ids[1][:12], "b", "deep/er/b", "finished"),
        (ids[0][:12], "a", "a", "finished"),
    ]
    assert all(entry.run is not None and entry.note == "" for entry in entries)


def test_the_folder_may_be_a_run_itself(tmp_path: Path) -> None:
    run_id = write(tmp_path)
    inner = write(tmp_path / "inner")
    entries = {entry.id: entry.folder for entry in Library(tmp_path).entries()}
    assert entries == {run_id[:12]: ".", inner[:12]: "inner"}


def test_an_empty_folder_has_none_and_a_missing_one_is_an_error(tmp_path: Path) -> None:
    assert Library(tmp_path).entries() == []
    with pytest.raises(EntropyLensError, match="Library: expected a folder of runs, found none at"):
        Library(tmp_path / "nowhere")


def test_a_folder_that_is_removed_later_has_none(tmp_path: Path) -> None:
    run_id = write(tmp_path / "runs" / "a")
    found = Library(tmp_path / "runs", ttl=0)
    assert found.find(run_id[:12])
    shutil.rmtree(tmp_path / "runs")
    wait_for_next_scan(found)
    assert found.entries() == []
    assert found.find(run_id[:12]) is None


def test_links_lead_nowhere(tmp_path: Path) -> None:
    write(tmp_path / "secret")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "runs" / "circle").symlink_to(tmp_path / "runs")
    assert Library(tmp_path / "runs").entries() == []


def test_folders_too_deep_are_not_entered(tmp_path: Path) -> None:
    write(tmp_path.joinpath(*["d"] * (library.DEEPEST + 1)))
    assert Library(tmp_path).entries() == []


# -- states ---------------------------------------------------------------------------------------


def test_a_run_without_rows_is_starting_and_then_running(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.01)
    writer.flush()
    assert (only(tmp_path).state, only(tmp_path).note) == ("starting", library._NOTES["starting"])
    row = {"name": "loss/mean", "module": "", "phase": "train", "step": 1, "value": [1.0]}
    writer.write("metrics", row)
    writer.flush()
    deadline = time.monotonic() + 10
    while only(tmp_path).state == "starting" and time.monotonic() < deadline:
        time.sleep(0.02)
    assert (only(tmp_path).state, only(tmp_path).note) == ("running", "")
    change_status(tmp_path / "run", step_time=0)
    assert (only(tmp_path).state, only(tmp_path).note) == ("stalled", library._NOTES["stalled"])
    change_status(tmp_path / "run", heartbeat=0)
    assert (only(tmp_path).state, only(tmp_path).note) == ("crashed", library._NOTES["crashed"])
    writer.close()


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "\x00\x01", "[" * 100_000, "{}"])
def test_a_damaged_manifest_is_half_written(tmp_path: Path, damage: str) -> None:
    write(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(damage)
    entry = only(tmp_path)
    assert (entry.state, entry.name, entry.run) == ("half-written", "run", None)
    assert "can still be read with pyarrow" in entry.note
    assert str(tmp_path) not in entry.note


def test_a_missing_manifest_is_half_written_and_its_id_goes_on_when_it_comes(
    tmp_path: Path,
) -> None:
    run_id = write(tmp_path / "run")
    (tmp_path / "run" / "run.json").rename(tmp_path / "kept")
    found = Library(tmp_path, ttl=0)
    early = found.entries()[0].id
    (tmp_path / "kept").rename(tmp_path / "run" / "run.json")
    wait_for_next_scan(found)
    later = found.find(early)
    assert later is not None
    assert (later.state, later.id) == ("finished", run_id[:12])


def test_a_manifest_that_is_no_file_or_too_large_is_never_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    os.mkfifo(tmp_path / "run" / "run.json")
    assert only(tmp_path).state == "half-written"
    write(tmp_path / "large")
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(library, "LARGEST_MANIFEST", 10)
    assert only(tmp_path).state == "half-written"


def test_a_newer_format_is_named_as_such(tmp_path: Path) -> None:
    run_id = write(tmp_path / "run")
    change(tmp_path / "run", format_version=999)
    entry = only(tmp_path)
    assert (entry.state, entry.run, entry.id) == ("newer", None, run_id[:12])
    assert "Upgrade entropylens" in entry.note
    change(tmp_path / "run", attempts="gone from the newer format")
    assert only(tmp_path).state == "newer"


def test_folders_of_other_programs_are_no_runs(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "run.json").write_text('{"state": "done"}')
    (tmp_path / "mine" / "metrics").mkdir(parents=True)
    (tmp_path / "mine" / "metrics" / "accuracy.csv").write_text("1")
    assert Library(tmp_path).entries() == []


def test_a_lone_manifest_is_a_run_whose_processes_said_nothing(tmp_path: Path) -> None:
    write(tmp_path / "run")
    for name in ("status", "metrics", "events"):
        shutil.rmtree(tmp_path / "run" / name, ignore_errors=True)
    assert (only(tmp_path).state, only(tmp_path).note) == ("unknown", library._NOTES["unknown"])


@pytest.mark.parametrize(
    ("reason", "shown"),
    [
        ("out of memory", "out of memory"),
        ("[Errno 2] '/home/me/secret/data.bin'", "[Errno 2] '…/data.bin'"),
        ("cannot open:/etc/passwd, stopped", "cannot open:…/passwd, stopped"),
        ("file:///home/me/x.py and https://a.b/c", "…/x.py and https://a.b/c"),
        ("3 and/or 1/2", "3 and/or 1/2"),
        ("a\x1b[31m\u202eb\ud800", "a [31m b?"),
    ],
)
def test_the_reason_of_an_end_is_shown_without_paths(
    tmp_path: Path, reason: str, shown: str
) -> None:
    write(tmp_path / "run", state="failed")
    change_status(tmp_path / "run", reason=reason)
    assert (only(tmp_path).state, only(tmp_path).note) == ("failed", shown)


@pytest.mark.parametrize(
    "facts",
    [
        {"attempt": "x"},
        {"state": "running", "pid": 10**30},
        {"state": "running", "heartbeat": "late"},
        {"rows": 3, "state": "running", "heartbeat": 9e99},
        {"state": ["a"]},
    ],
)
def test_a_hostile_status_hides_no_run(tmp_path: Path, facts: dict[str, Any]) -> None:
    write(tmp_path / "run")
    write(tmp_path / "other")
    change_status(tmp_path / "run", **facts)
    states = {entry.name: entry.state for entry in Library(tmp_path).entries()}
    assert states["run"] in ("unknown", "crashed", "finished")
    assert states["other"] == "finished"


# -- identifiers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "id", ["", "../../etc", "ABCDEF012345", "a" * 41, "a" * 7, "a/b", "0123456789ab\n", None, 3]
)
def test_a_malformed_id_is_no_run_and_touches_no_file(
    tmp_path: Path, id: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Library(tmp_path)

    def scan() -> None:
        raise AssertionError("scanned")

    monkeypatch.setattr(found, "_scan", scan)
    assert found.find(id) is None
    with pytest.raises(AssertionError, match="scanned"):
        found.find("0123456789ab")


@pytest.mark.parametrize(
    "run_id", ["../../etc/passwd", "<script>", "x" * 10**6, 7, None, ["a"], "\ud800", "A" * 32, ""]
)
def test_a_hostile_run_id_becomes_a_plain_one(tmp_path: Path, run_id: Any) -> None:
    write(tmp_path / "run")
    change(tmp_path / "run", run_id=run_id)
    found = Library(tmp_path)
    (entry,) = found.entries()
    assert library._ID.fullmatch(entry.id)
    assert len(entry.id) == 12
    assert found.find(entry.id) == entry


def test_a_hostile_name_is_printable_and_short(tmp_path: Path) -> None:
    write(tmp_path / "run")
    change(tmp_path / "run", name="<b>\x00\u202e\ud800" + "x" * 10**6, created=["now"])
    name = only(tmp_path).name
    assert name.startswith("<b>  ?x")
    assert len(name) == library.LONGEST_NAME
    assert name.isprintable()
    name.encode()
    change(tmp_path / "run", name="\n\n")
    assert only(tmp_path).name == "?"


def test_a_renamed_directory_keeps_its_id(tmp_path: Path) -> None:
    run_id = write(tmp_path / "old")
    found = Library(tmp_path, ttl=0)
    assert [entry.folder for entry in found.entries()] == ["old"]
    (tmp_path / "old").rename(tmp_path / "new")
    wait_for_next_scan(found)
    entry = found.find(run_id[:12])
    assert entry is not None
    assert entry.folder == "new"
    assert entry.run is not None
    assert entry.run.metrics().table.num_rows == 1


@pytest.mark.parametrize("copy", ["a-copy", "z-copy"])
def test_a_copy_never_takes_over_an_id_that_was_handed_out(tmp_path: Path, copy: str) -> None:
    run_id = write(tmp_path / "m-original")
    found = Library(tmp_path, ttl=0)
    assert [entry.id for entry in found.entries()] == [run_id[:12]]
    time.sleep(0.02)
    shutil.copytree(tmp_path / "m-original", tmp_path / copy)
    time.sleep(0.02)
    change(tmp_path / "m-original", name="m-original, resumed")
    ids = {entry.folder: entry.id for entry in seen(found)}
    assert ids["m-original"] == run_id[:12]
    assert ids[copy].startswith(f"{run_id[:12]}-")
    assert len(ids[copy]) == 19
    assert library._ID.fullmatch(ids[copy])
    assert {entry.folder: entry.id for entry in Library(tmp_path).entries()} == ids
    shutil.rmtree(tmp_path / "m-original")
    assert [entry.id for entry in seen(found)] == [run_id[:12]]
    for id in (ids[copy], run_id[:12]):
        entry = found.find(id)
        assert entry is not None
        assert entry.folder == copy


def test_runs_that_share_their_first_digits_are_told_apart(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"run{number}")
        change(tmp_path / f"run{number}", run_id=f"{'0' * 31}{number}")
    found = Library(tmp_path)
    entries = found.entries()
    assert len({entry.id for entry in entries}) == 3
    assert all(found.find(entry.id) == entry for entry in entries)


# -- keeping --------------------------------------------------------------------------------------


def wait_for_next_scan(found: Library) -> None:
    found._good_until = 0.0


def seen(found: Library) -> list[Entry]:
    wait_for_next_scan(found)
    return found.entries()


def test_open_runs_are_kept_and_follow_their_manifest(tmp_path: Path) -> None:
    write(tmp_path / "run")
    found = Library(tmp_path)
    first = found.entries()[0].run
    assert seen(found)[0].run is first
    change(tmp_path / "run", attempts=[{"attempt": 0}, {"attempt": 1}])
    assert seen(found)[0].run is first
    assert first is not None
    assert len(first.attempts) == 2
    shutil.rmtree(tmp_path / "run")
    assert seen(found) == []
    assert found._runs == {}
    other = write(tmp_path / "run")
    (entry,) = seen(found)
    assert entry.run is not first
    assert entry.id == other[:12]


def test_another_run_in_the_same_place_is_opened_anew(tmp_path: Path) -> None:
    write(tmp_path / "run")
    found = Library(tmp_path)
    first = found.entries()[0].run
    change(tmp_path / "run", run_id="0" * 32)
    (entry,) = seen(found)
    assert entry.run is not first
    assert entry.id == "0" * 12


def test_one_scan_serves_all_threads_until_it_is_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run")
    found = Library(tmp_path, ttl=60)
    scans: list[int] = []
    real = found._scan

    def slow() -> Any:
        scans.append(1)
        time.sleep(0.1)
        return real()

    monkeypatch.setattr(found, "_scan", slow)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(len(found.entries()))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [1] * 8
    assert len(scans) == 1
    wait_for_next_scan(found)
    scanning = threading.Thread(target=found.entries)
    scanning.start()
    time.sleep(0.03)
    start = time.monotonic()
    assert len(found.entries()) == 1  # what was there before, at once
    assert time.monotonic() - start < 0.05
    scanning.join()
    assert len(scans) == 2


def test_a_scan_reads_no_metrics_and_a_thousand_runs_are_quick(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "run0")
    for number in range(1, 1_000):
        shutil.copytree(tmp_path / "run0", tmp_path / f"group{number % 10}" / f"run{number}")

    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("read rows")

    for name in ("rows", "metrics", "snapshot"):
        monkeypatch.setattr(Run, name, read)
    found = Library(tmp_path)
    start = time.monotonic()
    entries = found.entries()
    assert time.monotonic() - start < 5.0  # 0.13 s on two idle cores
    assert len({entry.id for entry in entries}) == 1_000
    assert {entry.state for entry in entries} == {"finished"}
