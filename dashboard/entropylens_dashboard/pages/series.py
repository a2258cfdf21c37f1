"""Every series of a run, each layer's too: found, sorted, laid over one another."""

from collections.abc import Mapping
from typing import Any, Final

import dash_ag_grid as dag
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update

from entropylens.errors import EntropyLensError
from entropylens.figures.colours import of_run
from entropylens.figures.panels import Panel, Shown
from entropylens_dashboard.components import state_badge
from entropylens_dashboard.desk import Desk
from entropylens_dashboard.library import Entry
from entropylens_dashboard.pages.panels import controls, frame, spread
from entropylens_dashboard.sheet import LONGEST, Ask, Sheet, View

__all__ = ["layout", "register", "sheet"]

MOST_DRAWN: Final = 24
_BETWEEN: Final = "\n"


def layout(desk: Desk, entry: Entry, query: Mapping[str, str]) -> Any:
    """The page of one run's series."""
    number = {"type": "rightAligned", "filter": "agNumberColumnFilter", "width": 110}
    columns = [
        {"field": "name", "flex": 2, "minWidth": 220},
        {"field": "module", "flex": 3, "minWidth": 220},
        {"field": "phase", "width": 100},
        {"field": "last", **number, "width": 130},
        {"field": "last_step", "headerName": "at step", **number},
        {"field": "count", "headerName": "values", **number},
    ]
    grid = dag.AgGrid(
        id="series",
        columnDefs=columns,
        rowData=[],
        defaultColDef={"sortable": True, "filter": True, "floatingFilter": True, "resizable": True},
        dashGridOptions={
            "rowHeight": 28,
            "rowSelection": {"mode": "multiRow", "headerCheckbox": False},
            "animateRows": False,
        },
        getRowId="params.data.id",
        className="ag-theme-quartz grid short",
        style={"height": None},
    )
    spec = {"page": "series", "runs": [entry.id]}
    drawn = dcc.Input(id={"control": "lines"}, type="hidden", value=query.get("lines", ""))
    title = [html.Span(className="dot", style={"background": desk.colour(entry.id)[0]})]
    title += [
        html.H1(entry.name),
        state_badge(entry.state),
        html.Span(id="series-count", className="soft"),
    ]
    links = [dcc.Link("vital signs", href=desk.href(entry)), html.B("all series")]
    return [
        *frame(spec, query),
        html.Div([*title, html.Nav(links, className="row end")], className="row head"),
        html.P(f"Choose up to {MOST_DRAWN} rows: they are drawn below.", className="soft"),
        grid,
        drawn,
        controls(query, []),
        spread(wide=True),
    ]


def sheet(desk: Desk, spec: Mapping[str, Any], view: View, chosen: Mapping[str, Any]) -> Sheet:
    """One panel for each metric name that was chosen, a line for each of its modules."""
    found = desk.find(spec["runs"][:1])
    by_name: dict[str, list[tuple[str, str]]] = {}
    for line in _lines(chosen):
        by_name.setdefault(line[0], []).append((line[1], line[2]))
    panels = []
    for name, places in by_name.items():
        asks = []
        for at, (module, phase) in enumerate(places):
            colour, dash = of_run(at)
            label = " · ".join(part for part in (module, phase if phase != "train" else "") if part)
            shown = Shown(name, label or name, colour, phase=phase)
            asks += [Ask(run_id, shown, module, dash) for run_id in found]
        panels.append((Panel(name, name, tuple(ask.shown for ask in asks)), asks))
    runs = {run_id: entry.run for run_id, entry in found.items() if entry.run is not None}
    return Sheet(runs, panels, view)


def register(app: Dash, desk: Desk) -> None:
    """Fill the table, and have the chosen rows drawn."""

    @app.callback(
        Output("series", "rowData"),
        Output("series", "selectedRows"),
        Output("series-count", "children"),
        Input("spec", "data"),
        State({"control": "lines"}, "value"),
    )
    def rows(spec: Any, lines: Any) -> Any:
        entry = desk.asked(spec)
        if entry is None or entry.run is None:
            return no_update, no_update, ""
        try:
            found = desk.readings.series(entry.run)
        except EntropyLensError as error:
            return no_update, no_update, str(error)
        shown = [
            {
                "id": _BETWEEN.join(facts.key),
                "name": facts.key.name,
                "module": facts.key.module,
                "phase": facts.key.phase,
                "last": _plain(facts.last),
                "last_step": facts.last_step,
                "count": facts.count,
            }
            for facts in found
            if sum(map(len, facts.key)) <= LONGEST
        ]
        left = len(found) - len(shown)
        more = f"; {left} with a name of more than {LONGEST:,} characters left out" if left else ""
        ids = [_BETWEEN.join(line) for line in _lines({"lines": lines})]
        return shown, {"ids": ids}, f"{len(shown):,} series{more}"

    app.clientside_callback(
        ClientsideFunction("entropylens", "lines"),
        Output({"control": "lines"}, "value"),
        Input("series", "selectedRows"),
        prevent_initial_call=True,
    )


def _lines(chosen: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    found = []
    for line in str(chosen.get("lines") or "").split("\t"):
        parts = line.split(_BETWEEN)
        if len(parts) == 3:
            found.append((parts[0], parts[1], parts[2]))
    return found[:MOST_DRAWN]


def _plain(value: float) -> float | str:
    return float(f"{value:.7g}") if abs(value) < float("inf") else str(value)
