"""Every run of the folder: what state it is in, whether it is healthy, and since when."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

import dash_ag_grid as dag
import dash_mantine_components as dmc
import numpy as np
from dash import ClientsideFunction, Dash, Input, Output, Patch, State, dcc, html, no_update

from entropylens.analysis.summary import last_step
from entropylens.errors import EntropyLensError
from entropylens_dashboard.components import STATES
from entropylens_dashboard.desk import Desk, age, events, headlines, verdict
from entropylens_dashboard.library import Entry
from entropylens_dashboard.readings import Stretch
from entropylens_dashboard.sheet import mapping, texts

__all__ = ["layout", "register"]

BEAT_MILLISECONDS: Final = 3000
_LOOK_SECONDS: Final = 0.6
"""How long one request goes on reading series of runs that were not looked at yet."""
_SPARK: Final = 60

_CELLS: Final = ("loss", "entropy", "gradient")


def layout(desk: Desk, query: Mapping[str, str]) -> Any:
    """The page."""
    grid = dag.AgGrid(
        id="runs",
        columnDefs=_columns(),
        rowData=[_facts(desk, entry) for entry in desk.library.entries()],
        defaultColDef={
            "sortable": True,
            "filter": True,
            "resizable": True,
            "suppressHeaderMenuButton": True,
            "suppressHeaderFilterButton": True,
        },
        dashGridOptions={
            "rowHeight": 42,
            "rowSelection": {"mode": "multiRow", "headerCheckbox": True},
            "animateRows": False,
            "quickFilterText": query.get("filter", ""),
        },
        getRowId="params.data.id",
        dangerously_allow_code=False,
        className="ag-theme-quartz grid",
        style={"height": None},
        persistence=True,
        persisted_props=["filterModel"],
    )
    find = dmc.TextInput(
        id="filter",
        placeholder="filter by any word",
        value=query.get("filter", ""),
        size="xs",
        w=260,
    )
    return [
        dcc.Interval(id="runs-clock", interval=BEAT_MILLISECONDS),
        dcc.Store(id="runs-beat"),
        dcc.Store(id="answered"),
        html.Div(id="stale", className="stale", role="status"),
        dcc.Store(id="looked", data={}),
        html.Div(
            [
                html.H1("Runs"),
                html.Span(id="runs-count", className="soft"),
                find,
                html.Button("compare the chosen", id="compare", className="metric"),
                html.Span("tags are kept in this browser", className="soft end"),
            ],
            className="row head",
        ),
        grid,
        html.Div(id="runs-none", hidden=True),
    ]


def register(app: Dash, desk: Desk) -> None:
    """Keep the list in step with the folder."""

    @app.callback(
        Output("runs", "rowTransaction"),
        Output("looked", "data"),
        Output("runs-count", "children"),
        Output("answered", "data"),
        Input("runs-beat", "data"),
        Input("looked", "data"),
        State("tags", "data"),
    )
    def refresh(beat: Any, looked: Any, tags: Any) -> Any:
        entries = {entry.id: entry for entry in desk.library.entries()}
        known = {i: told for i, told in mapping(looked).items() if _is_told(told)}
        rows = {i: _facts(desk, entry, mapping(tags)) for i, entry in entries.items()}
        fresh = _look(desk, entries, rows, known)
        told = {i: [now, _told(rows[i])] for i, now in fresh.items()}
        for run_id in set(rows) - set(fresh):
            told[run_id] = known.get(run_id, [0.0, ""])
        change = _change(rows, set(fresh), known)
        unread = sum(not seen for seen, _ in told.values())
        count = f"{len(entries)} in the folder" + (f", {unread} still to be read" if unread else "")
        is_news = any(change[kind] for kind in ("add", "update", "remove"))
        answered = beat if isinstance(beat, int) and abs(beat) < 2**53 else no_update
        kept = (change, told) if is_news else (no_update, no_update)
        return *kept, count, answered

    @app.callback(Output("runs", "dashGridOptions"), Input("filter", "value"))
    def narrow(text: Any) -> Any:
        options = Patch()
        options["quickFilterText"] = next(iter(texts([text], (), 1)), "")
        return options

    app.clientside_callback(
        ClientsideFunction("entropylens", "beat"),
        Output("runs-beat", "data"),
        Output("stale", "children"),
        Input("runs-clock", "n_intervals"),
        State("answered", "data"),
    )
    app.clientside_callback(
        ClientsideFunction("entropylens", "filtered"),
        Output("runs-none", "lang"),
        Input("filter", "value"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("entropylens", "tagged"),
        Output("tags", "data"),
        Input("runs", "cellValueChanged"),
        State("tags", "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        f"(n, rows) => window.dash_clientside.entropylens.toCompare(n, rows, {desk.prefix!r})",
        Output("runs-none", "title"),
        Input("compare", "n_clicks"),
        State("runs", "selectedRows"),
        prevent_initial_call=True,
    )


def _columns() -> list[dict[str, Any]]:
    spark = {"cellRenderer": "Spark", "sortable": False, "filter": False, "width": 112}
    number = {"type": "rightAligned", "filter": "agNumberColumnFilter"}
    grouped = {"function": "params.value == null ? '' : params.value.toLocaleString()"}
    began = {"function": "nodeA.data.began < nodeB.data.began ? -1 : 1"}
    speed = {"field": "speed", "headerName": "tokens/s", "width": 88, "valueFormatter": grouped}
    return [
        {"field": "name", "cellRenderer": "RunName", "pinned": "left", "width": 170},
        {"field": "state", "cellRenderer": "Marked", "width": 104},
        {
            "field": "verdict",
            "cellRenderer": "Verdict",
            "flex": 1,
            "minWidth": 250,
            "wrapText": True,
        },
        {"field": "alarms", **number, "width": 72},
        {"field": "steps", **number, "width": 96, "valueFormatter": grouped},
        {**number, **speed},
        {"field": "loss", "headerName": "loss or reward", **spark},
        {"field": "entropy", "headerName": "entropy", **spark},
        {"field": "gradient", "headerName": "gradient norm", **spark},
        {"field": "age", "width": 92, "comparator": began},
        {"field": "tags", "editable": True, "width": 90},
    ]


def _facts(desk: Desk, entry: Entry, tags: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What is known of a run without reading its series."""
    run = entry.run
    return {
        "id": entry.id,
        "name": entry.name,
        "folder": entry.folder,
        "href": desk.href(entry),
        "colour": desk.colour(entry.id)[0],
        "state": f"{STATES.get(entry.state, STATES['unknown'])[1]} {entry.state}",
        "state_title": entry.note or STATES.get(entry.state, STATES["unknown"])[2],
        "steps": None if run is None else last_step(run),
        "age": "" if run is None else age(run).removeprefix("started "),
        "began": "" if run is None else run.created,
        "tags": (tags or {}).get(entry.id) or _own_tags(entry),
    }


def _told(row: Mapping[str, Any]) -> str:
    """What changes when a run has news; its age does, but is none."""
    return f"{row['name']} {row['state']} {row['state_title']} {row['steps']} {row['tags']}"


def _own_tags(entry: Entry) -> str:
    user = {} if entry.run is None else entry.run.config.get("user")
    tags = user.get("tags") if isinstance(user, Mapping) else None
    if isinstance(tags, str):
        return tags
    return ", ".join(map(str, tags)) if isinstance(tags, Sequence) else ""


def _look(
    desk: Desk,
    entries: Mapping[str, Entry],
    rows: dict[str, dict[str, Any]],
    known: Mapping[str, Any],
) -> dict[str, float]:
    """Look at series of runs that have changed, the one that waits longest first, for a while.

    Returns:
        When each was looked at; its row has all its cells now, for a grid takes rows as a whole.
    """
    until = time.monotonic() + _LOOK_SECONDS
    changed = [i for i in entries if i not in known or known[i][1] != _told(rows[i])]
    found: dict[str, float] = {}
    for run_id in sorted(changed, key=lambda i: known[i][0] if i in known else 0.0):
        rows[run_id] |= _cells(desk, entries[run_id])
        found[run_id] = time.time()
        if time.monotonic() > until:
            break
    return found


def _change(
    rows: Mapping[str, Mapping[str, Any]], fresh: set[str], known: Mapping[str, Any]
) -> dict[str, Any]:
    # A row that was in the page from its start is known to the grid before it is to us.
    new = {run_id for run_id in rows if run_id not in known} if known else set()
    return {
        "add": [rows[run_id] for run_id in new],
        "update": [rows[run_id] for run_id in fresh - new],
        "remove": [{"id": run_id} for run_id in known if run_id not in rows],
        "async": False,
    }


def _is_told(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], int | float)


def _cells(desk: Desk, entry: Entry) -> dict[str, Any]:
    if entry.run is None:
        return {"verdict": "unknown", "reason": entry.note, "alarms": 0}
    try:
        series, seen = headlines(desk, entry.run), events(entry.run)
    except EntropyLensError as error:
        return {"verdict": "unknown", "reason": str(error), "alarms": 0}
    judged, alarms = verdict(entry, series, seen)
    first = next((n for n in ("reward/mean", "framework/reward", "loss/mean") if n in series), "")
    sparks = {
        "loss": first,
        "entropy": "entropy/token/mean",
        "gradient": "gradient/norm/before_clip",
    }
    speed = series.get("throughput/tokens_per_second")
    return {
        "verdict": judged.level,
        "reason": judged.reason,
        "alarms": len(alarms),
        "speed": None
        if speed is None or not np.isfinite(speed.values[-1])
        else round(speed.values[-1]),
        **{cell: _spark(series.get(name)) for cell, name in sparks.items()},
    }


def _spark(stretch: Stretch | None) -> list[float | None]:
    """At most 60 values: of each part the smallest and largest, or None where one is no number."""
    if stretch is None or not len(stretch.steps):
        return []
    if len(stretch.values) <= _SPARK:
        parts = [stretch.values[at : at + 1] for at in range(len(stretch.values))]
    else:
        parts = np.array_split(stretch.values, _SPARK // 2)
    shown: list[float | None] = []
    for part in parts:
        ends = sorted({int(np.argmin(part)), int(np.argmax(part))})
        finite = np.isfinite(part).all()
        shown += [float(f"{part[end]:.4g}") for end in ends] if finite else [None]
    return shown
