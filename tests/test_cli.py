import csv
import json
import math
import os
import struct
import subprocess
import sys
import types
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import entropylens
from entropylens.analysis.summary import MAIN_SERIES, summary
from entropylens.cli import app
from entropylens.errors import EntropyLensError
from entropylens.figures.terminal import (
    age,
    plain,
    print_facts,
    print_summary,
    print_table,
    short,
    sparkline,
)
from entropylens.store.export import WRITERS
from entropylens.store.reader import open_run
from entropylens.store.writer import RunWriter

NAN, INF = math.nan, math.inf
AWKWARD = [0.1 + 0.2, 1 / 3, -0.0, 5e-324, 1.7976931348623157e308, NAN, INF, -INF, 2.0**53 + 2]
READ_VERBS = {
    "ls": ["ls", "{folder}"],
    "show": ["show", "{run}"],
    "get": ["get", "{run}", "loss/*"],
    "query": ["query", "{run}", "--sql", "SELECT step, value FROM metrics"],
    "explain": ["explain", "loss/mean"],
    "export": ["export", "{run}", "--to", "csv", "-o", "{out}", "--force"],
    "report": ["report", "{run}", "-o", "{out}"],
}
HEAVY = ("torch", "transformers", "lightning", "pandas", "pyarrow", "duckdb", "ibis", "plotly")


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def output(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 0, result.output
    return str(result.stdout)


def document(*arguments: str | Path) -> Any:
    """What ``--json`` prints, by a parser that knows no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(output(*arguments, "--json"), parse_constant=refuse)


def error(*arguments: str | Path) -> str:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return str(result.stderr)


def write(path: Path, values: Mapping[str, list[float]], **opening: Any) -> RunWriter:
    writer = RunWriter(path, flush_seconds=0.01, **opening)
    for name, series in values.items():
        steps = list(range(1, len(series) + 1))
        row = {"name": name, "module": "", "phase": "train", "step": steps}
        writer.write("metrics", {**row, "value": series})
        writer.step = max(writer.step, len(series))
    return writer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose loss spikes once, and an older one that failed."""
    root = tmp_path_factory.mktemp("runs")
    older = write(root / "older", {"loss/mean": [3.0, NAN]})
    older.fault("disk", RuntimeError("it is [bold]full[/bold]"))
    older.close("failed", "out of \x1b[31mmemory")
    manifest = root / "older" / "run.json"
    facts = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**facts, "created": "2020-01-01T00:00:00+00:00"}))
    loss = [3.0 + 27.0 / step for step in range(1, 101)]
    loss[59] = 20.0
    values = {name: [0.5 + step / 7 for step in range(100)] for name in MAIN_SERIES}
    newer = write(root / "newer", {**values, "loss/mean": loss, "user/x": AWKWARD})
    for step in (1, 60, 100):
        losses = [1.0, loss[step - 1] + 1, NAN] if step == 60 else [9.0, 8.0, 7.0]
        names = [f"file{sample}.py\x1b[2J" for sample in range(3)]
        sample = {"sample_id": names, "sequence": [0, 1, 2], "tokens": 9, "measured_tokens": 9}
        sample |= {"loss": losses, "entropy": 0.1, "selection": "highest_loss"}
        newer.write("samples", {**sample, "step": step, "phase": "train"})
    for step in range(7):
        newer.event("budget", f"[red]event {step}[/red]", step=step, severity="warning")
    newer.close()
    return root


# -- verbs ----------------------------------------------------------------------------------------


def test_ls_lists_newest_first_and_names_what_it_cannot_read(folder: Path) -> None:
    lines = output("ls", folder).splitlines()
    assert lines[0].split("\t")[:5] == ["name", "state", "steps", "last_loss", "age"]
    assert [line.split("\t")[:2] for line in lines[1:]] == [
        ["newer", "finished"],
        ["older", "failed"],
    ]
    newer, older = document("ls", folder)["runs"]
    assert (newer["steps"], newer["last_loss"], newer["attempts"]) == (100, 3.27, 1)
    assert (older["last_loss"], older["path"]) == ("NaN", str(folder / "older"))
    assert older["age"].endswith(" d")


def test_ls_weighs_the_last_loss_over_ranks(tmp_path: Path) -> None:
    writers = [
        RunWriter(tmp_path / "run", rank=rank, world_size=2, flush_seconds=0.01)
        for rank in range(2)
    ]
    for writer, value, weight in zip(writers, (1.0, 4.0), (300.0, 100.0), strict=True):
        row = {"name": "loss/mean", "module": "", "phase": "train", "step": 900}
        writer.write("metrics", {**row, "value": [value], "weight": weight})
        writer.close()
    assert document("ls", tmp_path)["runs"][0]["last_loss"] == 1.75
    RunWriter(tmp_path / "empty", flush_seconds=0.01).close()
    assert document("ls", tmp_path / "empty")["runs"][0]["last_loss"] is None


def test_show_says_what_happened(folder: Path) -> None:
    text = output("show", folder / "newer")
    assert text.startswith("newer: finished\n")
    for name in MAIN_SERIES:
        assert f"\n{name} " in text
    assert "\n1 more series: entropylens get" in text
    assert "- At step 60 the loss left its range" in text
    assert "\nSamples with the highest loss" in text
    assert "Last 5 of 9 events" in text
    assert "[red]event 6[/red]" in text
    assert "\x1b" not in text
    assert all(len(line) <= 80 for line in text.splitlines())
    loss = next(line for line in text.splitlines() if line.startswith("loss/mean"))
    assert loss.split()[1].count("█") == loss.split()[1].count("▅") == 1


def test_show_is_honest_about_failure_and_nan(folder: Path) -> None:
    text = output("show", folder / "older")
    assert "reason    out of \\x1b[31mmemory" in text
    assert "faults    ! disk: RuntimeError (x1)" in text
    row = next(line for line in text.splitlines() if line.startswith("loss/mean"))
    assert row.split()[1:] == ["▄×", "3", "NaN", "3", "3", "1"]
    assert "×: steps whose value is NaN or infinite" in text
    assert "more series" not in text
    assert "- The loss was not a finite number in 1 steps" in text
    assert "Samples with the highest loss" not in text


def test_show_draws_a_few_modules_and_says_how_many_more(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.01)
    for module in ("[red]0", "[/]1", "a", "b", "c"):
        row = {"name": "learning_rate", "module": module, "phase": "eval", "step": 1}
        writer.write("metrics", {**row, "value": [0.1]})
    writer.close()
    text = output("show", tmp_path / "run")
    assert text.count("\nlearning_rate [") == 3
    assert "learning_rate [[red]0] (eval) " in text
    assert "\n2 more series" in text


def test_show_as_json_holds_the_same(folder: Path) -> None:
    found = document("show", folder / "newer")
    assert (found["state"], found["steps"], found["more_series"]) == ("finished", 100, 1)
    assert [one["name"] for one in found["series"]] == list(MAIN_SERIES)
    assert (found["series"][0]["first"], found["series"][0]["min"]) == (30.0, 3.27)
    assert {sample["step"] for sample in found["samples"]} == {60}
    assert [sample["loss"] for sample in found["samples"]] == ["NaN", 21.0, 1.0]
    assert document("show", folder / "older")["series"][0]["last"] == "NaN"


def test_show_works_on_a_run_that_has_only_begun(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.01)
    writer.flush()
    assert output("show", tmp_path / "run").startswith("run: running\n")
    assert document("show", tmp_path / "run")["series"] == []
    writer.close()


def test_get_prints_every_digit_tab_separated(folder: Path) -> None:
    header, *lines = output("get", folder / "newer", "user/x").splitlines()
    place = header.split("\t").index("value")
    found = [float(line.split("\t")[place]) for line in lines]
    assert bits(found) == bits(AWKWARD)


def test_get_filters_by_step_phase_and_number(folder: Path) -> None:
    found = document("get", folder / "newer", "loss/mean", "--steps", "58:61", "--limit", "2")
    assert [(row["step"], row["value"]) for row in found["rows"]] == [(60, 20.0), (61, 3 + 27 / 61)]
    assert found["omitted"] == 2
    for steps, count in {"60": 1, "99:": 2, ":3": 3}.items():
        rows = document("get", folder / "newer", "loss/*", "--steps", steps)["rows"]
        assert len(rows) == count, steps
    assert document("get", folder / "newer", "loss/mean", "--phase", "eval")["rows"] == []
    values = [row["value"] for row in document("get", folder / "newer", "user/x")["rows"]]
    assert values[5:8] == ["NaN", "Infinity", "-Infinity"]


def test_get_goes_on_from_a_cursor(tmp_path: Path) -> None:
    writer = write(tmp_path / "run", {"loss/mean": [1.0]})
    writer.flush()
    first = document("get", tmp_path / "run")
    writer.write("metrics", {"name": "loss/mean", "module": "", "step": 2, "value": [2.0]})
    writer.flush()
    later = document("get", tmp_path / "run", "--since", first["cursor"])
    assert [row["step"] for row in later["rows"]] == [2]
    assert later["restarted"] is False
    assert document("get", tmp_path / "run", "--since", later["cursor"])["rows"] == []
    writer.close()


def test_query_answers_over_several_runs(folder: Path) -> None:
    sql = "SELECT run, max(value) AS worst FROM metrics WHERE name = 'loss/mean' GROUP BY run"
    found = document("query", folder / "newer", folder / "older", "--sql", sql)["rows"]
    assert sorted(found, key=lambda row: row["run"]) == [
        {"run": "newer", "worst": 30.0},
        {"run": "older", "worst": "NaN"},
    ]
    assert output("query", folder / "newer", "--sql", "SELECT 1 AS a, NULL AS b") == "a\tb\n1\t\n"


def test_explain_says_what_a_metric_means(folder: Path) -> None:
    text = output("explain", "user/reward")
    assert "defined as  user/*" in text
    assert all(len(line) <= 80 for line in output("explain", "entropy/token/mean").splitlines())
    found = document("explain", "entropy/token/mean")
    assert (found["unit"], found["metric"]) == ("nats", "entropy/token/mean")


def test_export_to_csv_keeps_every_bit(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.csv"
    output("export", folder / "newer", "--to", "csv", "-o", file)
    with open(file, newline="") as opened:
        rows = list(csv.DictReader(opened))
    assert bits([float(r["value"]) for r in rows if r["name"] == "user/x"]) == bits(AWKWARD)
    assert len(rows) == len(MAIN_SERIES) * 100 + len(AWKWARD)
    assert rows[0]["weight"] == ""


def test_export_to_parquet_and_json_keeps_rows_as_they_are(folder: Path, tmp_path: Path) -> None:
    run = open_run(folder / "newer")
    output("export", folder / "newer", "--to", "parquet", "-o", tmp_path / "x", "--table", "events")
    assert pq.read_table(tmp_path / "x").equals(run.events().table)
    facts = document("export", folder / "newer", "--to", "json", "-o", tmp_path / "y.json")
    rows = json.loads((tmp_path / "y.json").read_text())
    assert facts == {"file": str(tmp_path / "y.json"), "rows": len(rows)}
    values = [row["value"] for row in rows if row["name"] == "user/x"]
    assert bits([float(value) for value in values]) == bits(AWKWARD)
    output("export", folder / "older", "--to", "json", "-o", tmp_path / "z", "--table", "spectra")
    assert json.loads((tmp_path / "z").read_text()) == []


def test_export_writes_lists_as_json_in_csv(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.01)
    writer.write("spectra", {"step": 1, "module": "a", "kind": "k", "values": [[1.5, NAN], None]})
    writer.close()
    output(
        "export", tmp_path / "run", "--to", "csv", "-o", tmp_path / "x.csv", "--table", "spectra"
    )
    with open(tmp_path / "x.csv", newline="") as opened:
        assert [row["values"] for row in csv.DictReader(opened)] == ['[1.5, "NaN"]', ""]


def test_export_replaces_a_file_only_when_forced_and_leaves_no_part(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "out.csv"
    file.write_text("mine")
    verb: list[str | Path] = ["export", folder / "newer", "--to", "csv", "-o", file]
    assert "to be free, got a file; use --force" in error(*verb)

    def fails_half_way(rows: Any, path: Path) -> None:
        path.write_text("half")
        raise ZeroDivisionError

    monkeypatch.setitem(WRITERS, "csv", fails_half_way)
    assert isinstance(invoke(*verb, "--force").exception, ZeroDivisionError)
    assert file.read_text() == "mine"
    assert os.listdir(tmp_path) == ["out.csv"]
    monkeypatch.undo()
    output(*verb, "--force")
    assert file.read_text().startswith('"rank"')
    assert os.listdir(tmp_path) == ["out.csv"]


def test_report_and_demo_hand_over(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module: Any = types.ModuleType("report")
    module.write_report = lambda run, path: path.with_suffix(f".{run.name}")
    monkeypatch.setitem(sys.modules, "entropylens.analysis.report", module)
    out = tmp_path / "report.html"
    assert output("report", folder / "newer", "-o", out) == f"{tmp_path}/report.newer: the report\n"
    assert document("report", folder / "newer", "-o", out) == {"file": f"{tmp_path}/report.newer"}
    seen: list[Any] = []

    def run_demo(out: Path, steps: int | None) -> int:
        seen.append((out, steps))
        return 0

    monkeypatch.setattr("entropylens.demo.run_demo", run_demo)
    output("demo", "--out", tmp_path, "--steps", "30")
    assert seen == [(tmp_path, 30)]


def test_dashboard_hands_over(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def serve(folder: Path, **options: Any) -> None:
        seen.append((folder, options))

    monkeypatch.setattr("entropylens_dashboard.serving.serve", serve)
    output("dashboard", folder)
    names = ["--allowed-host", "a.example", "--allowed-host", "b.example"]
    where = ["--host", "0.0.0.0", "--port", "9000", "--url-prefix", "lab"]
    output("dashboard", folder, "--token", "secret", "--open", *where, *names)
    usual = {"host": "127.0.0.1", "port": 8050, "token": None, "prefix": "/"}
    other = {"host": "0.0.0.0", "port": 9000, "token": "secret", "prefix": "lab"}
    assert seen == [
        (folder, {**usual, "allowed_hosts": (), "open_browser": False}),
        (folder, {**other, "allowed_hosts": ["a.example", "b.example"], "open_browser": True}),
    ]


def test_compact_says_what_it_merged(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", flush_seconds=0.01, seal_rows=1)
    for step in range(3):
        writer.write("metrics", {"name": "a", "module": "", "step": step, "value": [1.0]})
        writer.flush()
    assert "in use" in error("compact", tmp_path / "run")
    writer.close()
    assert "metrics: 3 -> 1 segments\n" in output("compact", tmp_path / "run")
    assert document("compact", tmp_path / "run")["metrics"] == {"before": 1, "after": 1}


# -- what goes wrong ------------------------------------------------------------------------------


def test_errors_are_one_line_and_status_2(folder: Path, tmp_path: Path) -> None:
    run, out = folder / "newer", tmp_path / "x"
    assert "expected a run directory with run.json" in error("show", tmp_path / "no\nrun")
    assert "expected a folder, found none" in error("ls", tmp_path / "nowhere")
    assert "did you mean 'loss/mean'" in error("get", run, "loss/meen")
    assert "expected --steps as A:B, A:, :B or A, got 'x:'" in error("get", run, "--steps", "x:")
    assert "expected the text of a cursor" in error("get", run, "--since", "later")
    assert "expected one SELECT" in error("query", run, "--sql", "COPY metrics TO 'x'")
    assert "did you mean 'entropy/token/mean'" in error("explain", "entropy/token/meen")
    assert "did you mean 'metrics'" in error(
        "export", run, "--to", "csv", "-o", out, "--table", "metric"
    )
    assert "expected a format (csv, json, parquet)" in error("export", run, "--to", "x", "-o", out)
    assert "No such file" in error("export", run, "--to", "csv", "-o", tmp_path / "no" / "file")


def test_the_dashboard_says_why_it_does_not_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ENTROPYLENS_TOKEN", raising=False)
    assert "expected a folder of runs, found none at" in error("dashboard", tmp_path / "nowhere")
    assert "of at least 16 characters, got 5" in error("dashboard", folder, "--token", "short")
    assert "expected a port from 0 to 65535" in error("dashboard", folder, "--port", "70000")
    assert "expected a URL prefix such as /lab/" in error("dashboard", folder, "--url-prefix", "..")
    assert "expected an address of this machine to listen at, got 192.0.2.1:8050" in error(
        "dashboard", folder, "--host", "192.0.2.1"
    )
    for name in [name for name in sys.modules if name.startswith("entropylens_dashboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "dash", None)
    assert error("dashboard", folder) == (
        "error: dashboard: expected the dashboard's packages, found no dash; "
        "pip install 'entropylens[dashboard]'\n"
    )


def test_a_name_without_rows_in_an_empty_run_is_no_mistake(tmp_path: Path) -> None:
    RunWriter(tmp_path / "run", flush_seconds=0.01).close()
    assert document("get", tmp_path / "run", "loss/mean")["rows"] == []


def test_files_that_are_skipped_are_named_in_one_line_each(folder: Path, tmp_path: Path) -> None:
    writer = write(tmp_path / "run", {"loss/mean": [1.0]})
    writer.close()
    (tmp_path / "run" / "metrics" / "notes.txt").write_text("mine")
    (tmp_path / "run" / "metrics" / "000-000009.parquet").write_text("not parquet")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.json").write_text("{")
    result = invoke("get", tmp_path / "run", "--json")
    assert len(json.loads(result.stdout)["warnings"]) == 2
    lines = result.stderr.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("warning: skipped: ") for line in lines)
    listed = invoke("ls", tmp_path)
    assert any(
        line.startswith("warning: left out: open_run: expected a manifest")
        for line in listed.stderr.splitlines()
    )


@pytest.mark.parametrize("rows", [1, 20_000])
def test_a_reader_that_goes_away_is_no_error(tmp_path: Path, rows: int) -> None:
    write(tmp_path / "run", {"loss/mean": [float(step) for step in range(rows)]}).close()
    read_end, write_end = os.pipe()
    os.close(read_end)
    command = [sys.executable, "-m", "entropylens.cli", "get", str(tmp_path / "run")]
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    found = subprocess.run(
        command, stdout=write_end, stderr=subprocess.PIPE, text=True, env=buffered
    )
    os.close(write_end)
    assert (found.returncode, found.stderr) == (1, "")


# -- how light it is ------------------------------------------------------------------------------


def test_no_read_verb_loads_torch_and_help_loads_nothing_heavy(
    folder: Path, tmp_path: Path
) -> None:
    places = {"folder": folder, "run": folder / "newer", "out": tmp_path / "out"}
    verbs = [[word.format(**places) for word in verb] for verb in READ_VERBS.values()]
    verbs += [[*verb, "--json"] for verb in verbs]
    code = f"""
import sys
from typer.testing import CliRunner
from entropylens.cli import app
assert CliRunner().invoke(app, ["--help"]).exit_code == 0
assert CliRunner().invoke(app, ["--version"]).exit_code == 0
assert not set(sys.modules) & {set(HEAVY)!r}, set(sys.modules) & {set(HEAVY)!r}
for verb in {verbs!r}:
    result = CliRunner().invoke(app, verb)
    assert result.exit_code == 0, (verb, result.output)
    loaded = set(sys.modules) & {{"torch", "transformers", "lightning", "dash"}}
    assert not loaded, (verb, loaded)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_version_is_the_package_s() -> None:
    assert output("--version") == f"entropylens {entropylens.__version__}\n"


# -- figures of the terminal ----------------------------------------------------------------------


def bits(values: list[float]) -> list[bytes]:
    return [struct.pack("<d", NAN if math.isnan(value) else value) for value in values]


def terminal(width: int = 80) -> Console:
    return Console(
        file=StringIO(), force_terminal=True, width=width, highlight=False, markup=False,
        color_system=None,
    )  # fmt: skip


def printed(console: Console) -> list[str]:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue().splitlines()


def test_a_spike_of_one_step_shows_whatever_the_width() -> None:
    values = np.ones(12_345)
    for place in (0, 6_000, 12_344):
        for spike, block in ((9.0, "█"), (-9.0, "▁")):
            line = sparkline([*values[:place], spike, *values[place + 1 :]], 19)
            assert line.count(block) == 1
            assert len(line) <= 19


def test_what_is_not_finite_shows_as_such() -> None:
    values = np.ones(10_000)
    values[5_000] = NAN
    assert sparkline(list(values), 20).count("×") == 1
    assert sparkline([NAN, INF, -INF], 20) == "×××"
    assert sparkline([], 20) == ""
    assert sparkline([1e308, -1e308, 0.0], 20) == "█▁▅"
    assert sparkline([2.0, 2.0], 20) == "▄▄"


def test_numbers_are_short() -> None:
    numbers = [999.96, -0.000123, 1e308, 5e-324, 12_345.6, 0.0, NAN, -INF, None]
    texts = ["1000", "-0.000123", "1e308", "4.94e-324", "12346", "0", "NaN", "-inf", ""]
    assert [short(number) for number in numbers] == texts


def test_ages_are_in_one_unit() -> None:
    assert age("2020-01-01T00:00:00+00:00").endswith(" d")
    assert age("9999-01-01T00:00:00+00:00") == "0 s"
    assert age("long ago") == "?"


def test_control_characters_are_shown_and_not_obeyed() -> None:
    assert plain("a\x1b[2Jb\r\u202ec") == "a\\x1b[2Jb\\r\\u202ec"
    assert plain("naïve 数据 ▁") == "naïve 数据 ▁"


def test_a_table_on_a_terminal_fits_and_one_too_wide_goes_row_by_row() -> None:
    console = terminal()
    print_table(console, ["name", "value"], [["[b]x[/b] " * 30, 1 / 3], ["y\x1b", None]])
    lines = printed(console)
    assert all(len(line) <= 80 for line in lines)
    assert "0.333" in lines[2]
    assert "[b]x[/b]" in lines[2]
    assert "y\\x1b" in lines[-1]
    console = terminal()
    print_table(console, [f"column{number:02d}" for number in range(20)], [list(range(20))])
    assert printed(console)[:2] == ["column00  0", "column01  1"]
    console = terminal(30)
    print_facts(console, {"formula": "a sum of many words over all tokens"})
    assert printed(console) == ["formula  a sum of many words", "         over all tokens"]


def test_the_summary_fits_a_terminal_of_any_width(folder: Path) -> None:
    for width in (80, 200):
        console = terminal(width)
        print_summary(console, summary(open_run(folder / "newer")))
        lines = printed(console)
        assert max(map(len, lines)) <= width
        assert max(len(line.split()[1]) for line in lines if line.startswith("loss/mean")) <= 60


def test_torch_s_absence_is_said_by_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(out: Path, steps: int | None) -> int:
        raise EntropyLensError("demo: expected torch; pip install 'entropylens[hf]'")

    monkeypatch.setattr("entropylens.demo.run_demo", missing)
    assert "pip install 'entropylens[hf]'" in error("demo")
