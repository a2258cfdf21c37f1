"""The command line: look at runs, ask them, take rows out; nothing heavy before a verb needs it.

Every verb that reads has ``--json``: one JSON document on standard output. JSON has no NaN, so the
strings "NaN", "Infinity" and "-Infinity" stand for what is not finite. An error is one line on
standard error and exit status 2.
"""

import json
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from entropylens import __version__
from entropylens.errors import EntropyLensError, unknown_name

if TYPE_CHECKING:
    import pyarrow as pa

    from entropylens.store.reader import Run

__all__ = ["app", "main"]


class _Verbs(TyperGroup):
    """Says what went wrong in one line, and lets a reader of the output go."""

    def invoke(self, ctx: Any) -> Any:
        """Run the verb."""
        try:
            with _warnings_in_one_line():
                result = super().invoke(ctx)
                sys.stdout.flush()
            return result
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except (EntropyLensError, ValueError, OSError) as error:
            _complain("error", error)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_Verbs,
    help="See that a training run is about to fail, why, and what it did.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunPath = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help='Print one JSON document; "NaN", "Infinity", "-Infinity" are strings in it.'
    ),
]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="Where to write.")]


def main() -> None:
    """Run the command line; the entry point of ``entropylens``."""
    app(prog_name="entropylens")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"entropylens {__version__}")
        raise typer.Exit()


@app.callback()
def _entropylens(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print it."),
    ] = False,
) -> None:
    pass


@app.command()
def ls(
    folder: Annotated[Path, typer.Argument(help="Where to look, in folders below too.")] = Path(),
    as_json: Json = False,
) -> None:
    """List the runs in a folder, newest first."""
    from entropylens.analysis.summary import last_loss, last_step
    from entropylens.figures.terminal import age, print_table, to_console
    from entropylens.store.reader import list_runs

    found: list[dict[str, Any]] = [
        {
            "name": run.name,
            "state": run.state(),
            "steps": last_step(run),
            "last_loss": last_loss(run),
            "age": age(run.created),
            "attempts": len(run.attempts),
            "path": str(run.path),
        }
        for run in list_runs(folder)
    ]
    if as_json:
        _print_json({"runs": found})
        return
    console = to_console()
    columns = ["name", "state", "steps", "last_loss", "age", "attempts", "path"]
    if console.is_terminal and all(one["name"] == Path(one["path"]).name for one in found):
        columns.remove("path")
    print_table(console, columns, [[one[column] for column in columns] for one in found])


@app.command()
def show(run: RunPath, as_json: Json = False) -> None:
    """Summarise a run: what happened, main series, worst samples, last events."""
    from entropylens.analysis.summary import summary
    from entropylens.figures.terminal import print_summary, to_console
    from entropylens.store.reader import open_run

    found = summary(open_run(run))
    if not as_json:
        print_summary(to_console(), found)
        return
    for one in found["series"]:
        del one["values"]
    _print_json(found)


@app.command()
def get(
    run: RunPath,
    names: Annotated[
        list[str] | None, typer.Argument(help="Metric names or patterns with * and ?; all.")
    ] = None,
    phase: Annotated[str | None, typer.Option(help="train, eval or rollout.")] = None,
    steps: Annotated[str | None, typer.Option(metavar="A:B", help="First and last step.")] = None,
    since: Annotated[str | None, typer.Option(help="The cursor of an earlier --json.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the last so many rows.")] = None,
    as_json: Json = False,
) -> None:
    """Print rows of the metrics table, ordered by step.

    With --json also a cursor: --since CURSOR then gives only what came later, or all rows again
    where "restarted" says so.
    """
    from entropylens.figures.terminal import print_table, to_console
    from entropylens.store.reader import open_run

    opened = open_run(run)
    found = opened.metrics(names, phases=phase, steps=_parsed(steps), since=since)
    if found.table.num_rows == 0 and since is None:
        _check_names(opened, names or [])
    keys = ("step", "phase", "name", "module", "rank", "time")
    table = found.table.sort_by([(key, "ascending") for key in keys])
    rows = table.slice(max(table.num_rows - limit, 0) if limit else 0)
    if as_json:
        facts = {"omitted": table.num_rows - rows.num_rows, "restarted": found.restarted}
        facts |= {"cursor": str(found.cursor), "warnings": found.warnings}
        _print_json({"rows": rows.to_pylist(), **facts})
        return
    console = to_console()
    columns = rows.column_names
    if console.is_terminal:
        columns = ["step", "phase", "name", *_varying(rows, ("module", "rank", "attempt"))]
        columns += ["value", "weight"]
    print_table(console, columns, _cells(rows.select(columns)))


@app.command()
def query(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    sql: Annotated[str, typer.Option(help="One SELECT; each table has a column run.")],
    as_json: Json = False,
) -> None:
    """Answer one SELECT over metrics, tokens, samples, completions, spectra and events."""
    from entropylens.figures.terminal import print_table, to_console
    from entropylens.store.query import select
    from entropylens.store.reader import open_run

    found = select([open_run(run) for run in runs], sql)
    if as_json:
        _print_json({"rows": found.to_pylist()})
    else:
        print_table(to_console(), found.column_names, _cells(found))


@app.command()
def export(
    run: RunPath,
    output: Output,
    to: Annotated[str, typer.Option(help="csv, parquet or json.")],
    table: Annotated[str, typer.Option(help="metrics, tokens, samples, events, ...")] = "metrics",
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    as_json: Json = False,
) -> None:
    """Write a table of a run to one file, every digit kept."""
    from entropylens.records import SCHEMAS
    from entropylens.store.export import WRITERS
    from entropylens.store.layout import publish, temporary
    from entropylens.store.reader import open_run

    if to not in WRITERS:
        raise ValueError(unknown_name("export", "format", to, WRITERS))
    if table not in SCHEMAS:
        raise ValueError(unknown_name("export", "table", table, SCHEMAS))
    if output.exists() and not force:
        raise ValueError(f"export: expected {output} to be free, got a file; use --force")
    rows = open_run(run).rows(table).to_arrow()
    try:
        WRITERS[to](rows, temporary(output))
        publish(output)
    finally:
        temporary(output).unlink(missing_ok=True)
    _done(output, as_json, f"{rows.num_rows} rows of {table}", rows=rows.num_rows)


@app.command()
def explain(
    metric: Annotated[str, typer.Argument(help="A name in the log.")], as_json: Json = False
) -> None:
    """Say what a metric means: question, formula, unit, estimator, source."""
    from dataclasses import asdict

    from entropylens.dictionary import definition
    from entropylens.figures.terminal import print_facts, to_console

    found = asdict(definition(metric))
    if as_json:
        _print_json({"metric": metric, **found})
    else:
        print_facts(to_console(), {"metric": metric, "defined as": found.pop("name"), **found})


@app.command()
def report(run: RunPath, output: Output, as_json: Json = False) -> None:
    """Write the report of a run: one HTML file that needs no network."""
    from entropylens.analysis.report import write_report
    from entropylens.store.reader import open_run

    written = write_report(open_run(run), output)
    _done(written, as_json, "the report")


@app.command()
def spectra(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint: file, folder or adapter.")],
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="These matrices, with * and ?; may be repeated."),
    ] = None,
    sort: Annotated[
        str, typer.Option(help="deficit, kappa-to-null, kappa (worst first) or name.")
    ] = "deficit",
    limit: Annotated[int | None, typer.Option(min=1, help="Only so many, of the sorted.")] = None,
    permuted: Annotated[
        bool, typer.Option("--permuted", help="Beside each, its entries in random places.")
    ] = False,
    base: Annotated[
        Path | None, typer.Option(help="The model that an adapter is for: their sum is shown, too.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Write the rows as CSV instead."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    as_json: Json = False,
) -> None:
    """Say how well conditioned the weight matrices of a checkpoint are.

    Beside what a random matrix of the same shape would have: a condition number alone mostly tells
    the shape. Needs no run and runs nothing that is in the checkpoint.
    """
    try:
        from entropylens.checkpoints import open_checkpoint
        from entropylens.spectra import SORTS, in_order, spectra_of
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise EntropyLensError(
            "spectra: expected torch to be installed, got none; pip install 'entropylens[torch]'"
        ) from None
    if sort not in SORTS:
        raise ValueError(unknown_name("spectra", "sort key", sort, SORTS))
    if output is not None and output.exists() and not force:
        raise ValueError(f"spectra: expected {output} to be free, got a file; use --force")
    if output is not None:
        _check_place(output)
    opened = open_checkpoint(checkpoint, base)
    rows, refused = spectra_of(opened, only or (), with_permuted=permuted, track=_progress)
    if only and not rows and not refused:
        raise EntropyLensError(f"spectra: expected a matrix that matches {only}, found none")
    shown = in_order(rows, sort)[:limit]
    facts = {"omitted": len(rows) - len(shown), "refused": refused}
    if output is not None:
        _write_rows(shown, output)
    if as_json:
        named = {"rows": shown} if output is None else {"file": str(output), "rows": len(shown)}
        _print_json({**named, **facts})
    elif output is not None:
        _done(output, False, f"{len(shown)} matrices")
        for name, reason in refused.items():
            _complain("refused", f"{name}: {reason}")
    else:
        _print_spectra(shown, len(rows), refused)


@app.command()
def compact(run: RunPath, as_json: Json = False) -> None:
    """Merge the segments of a run that has ended."""
    from entropylens.store.compact import compact as merge

    counts = merge(run)
    if as_json:
        _print_json({table: {"before": a, "after": b} for table, (a, b) in counts.items()})
        return
    for table, (before, after) in counts.items():
        typer.echo(f"{table}: {before} -> {after} segments")


@app.command()
def dashboard(
    folder: Annotated[Path, typer.Argument(help="The runs, in folders below too.")] = Path(),
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The next free one where it is taken.")] = 8050,
    token: Annotated[
        str | None,
        typer.Option(help="Asked of visitors; other users see it here, not in ENTROPYLENS_TOKEN."),
    ] = None,
    url_prefix: Annotated[str, typer.Option(help="Path that all addresses begin with.")] = "/",
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Another name it may be called by; may be repeated."),
    ] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page.")] = False,
) -> None:
    """Serve the live dashboard of a folder of runs, until Ctrl-C.

    Only this machine can reach it, unless --host says otherwise; it then demands a token, and
    makes and prints one if none is given.
    """
    try:
        import entropylens_dashboard.app  # noqa: F401 - needs more packages than serving does
        from entropylens_dashboard.serving import serve
    except ModuleNotFoundError as error:
        raise EntropyLensError(
            f"dashboard: expected the dashboard's packages, found no {error.name}; "
            f"pip install 'entropylens[dashboard]'"
        ) from None
    serve(
        folder,
        host=host,
        port=port,
        token=token,
        prefix=url_prefix,
        allowed_hosts=allowed_host or (),
        open_browser=open_browser,
    )


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="The run directory.")] = Path("runs/demo"),
    steps: Annotated[int | None, typer.Option(help="Optimiser steps; 300.")] = None,
) -> None:
    """Train a small model with a learning-rate spike and report on it."""
    from entropylens.demo import run_demo

    raise typer.Exit(run_demo(out, steps=steps))


# -- what the verbs print -------------------------------------------------------------------------


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: _complain("warning", message)
        yield


def _complain(kind: str, message: object) -> None:
    from entropylens.figures.terminal import plain

    typer.echo(f"{kind}: {plain(' '.join(str(message).splitlines()))}", err=True)


def _print_json(document: Mapping[str, Any]) -> None:
    ascii_only = (sys.stdout.encoding or "").lower().replace("-", "") != "utf8"
    from entropylens.store.export import as_json

    text = json.dumps(as_json(document), allow_nan=False, ensure_ascii=ascii_only)
    sys.stdout.write(text + "\n")


def _done(output: Path, as_json: bool, what: str, **facts: Any) -> None:
    if as_json:
        _print_json({"file": str(output), **facts})
    else:
        typer.echo(f"{output}: {what}")


def _cells(table: "pa.Table") -> list[tuple[Any, ...]]:
    return list(zip(*(column.to_pylist() for column in table.columns), strict=True))


def _varying(rows: "pa.Table", columns: Sequence[str]) -> list[str]:
    return [column for column in columns if len(rows[column].unique()) > 1]


def _progress(groups: Sequence[Any]) -> Iterator[Any]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    hidden = not console.is_terminal
    yield from track(groups, "tensors", console=console, transient=True, disable=hidden)


def _check_place(output: Path) -> None:
    """What cannot be written is better known before anything is computed."""
    if output.is_dir():
        raise ValueError(f"spectra: expected a file as --output, got the folder {output}; name one")
    if not output.parent.is_dir():
        raise ValueError(
            f"spectra: expected a folder for --output at {output.parent}, found none; make it first"
        )


def _write_rows(rows: Sequence[Mapping[str, Any]], output: Path) -> None:
    import pyarrow as pa

    from entropylens.store.export import WRITERS
    from entropylens.store.layout import publish, temporary

    try:
        WRITERS["csv"](pa.Table.from_pylist([*rows]), temporary(output))
        publish(output)
    finally:
        temporary(output).unlink(missing_ok=True)


def _print_spectra(
    rows: Sequence[Mapping[str, Any]], count: int, refused: Mapping[str, str]
) -> None:
    from entropylens.figures.terminal import print_table, to_console
    from entropylens.spectra import in_brief

    console = to_console()
    shown = [in_brief(row) for row in rows] if console.is_terminal else rows
    if shown:
        print_table(console, [*shown[0]], [[*row.values()] for row in shown])
    else:
        typer.echo("no matrices")
    if console.is_terminal and rows:
        typer.echo(
            f"{len(rows)} of {count} matrices. deficit: nats above a random matrix of the shape; "
            f"> where storage hides the rest."
        )
    if refused:
        typer.echo()
        print_table(console, ["refused", "reason"], [*refused.items()])


def _parsed(steps: str | None) -> tuple[int | None, int | None]:
    if steps is None:
        return None, None
    first, colon, last = steps.partition(":")
    try:
        low, high = (int(text) if text else None for text in (first, last))
    except ValueError:
        raise ValueError(f"get: expected --steps as A:B, A:, :B or A, got {steps!r}") from None
    return low, high if colon else low


def _check_names(run: "Run", wanted: Sequence[str]) -> None:
    """An empty answer is fine, a name that the run does not have is a mistake."""
    from entropylens.store.query import select

    known = select(run, "SELECT DISTINCT name FROM metrics")["name"].to_pylist()
    for name in wanted:
        if known and not set("*?") & set(name) and name not in known:
            raise EntropyLensError(unknown_name("get", "metric of this run", name, known))


if __name__ == "__main__":
    main()
