"""Up to 50 runs over one another: what differs in them, and what came of it."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Final

import dash_ag_grid as dag
import dash_mantine_components as dmc
from dash import Dash, Input, Output, State, dcc, html

from entropylens.analysis.compare import final_value, interval
from entropylens.analysis.overview import number
from entropylens.analysis.settings import differences, seed_groups
from entropylens.errors import EntropyLensError
from entropylens.figures.panels import Panel, Shown
from entropylens.store.reader import Run
from entropylens_dashboard.components import control
from entropylens_dashboard.desk import Desk, looked
from entropylens_dashboard.pages.panels import MOST_RUNS, SLOW_MILLISECONDS, controls, frame, spread
from entropylens_dashboard.readings import PHASES
from entropylens_dashboard.sheet import Ask, Sheet, View, mapping, texts

__all__ = ["layout", "register", "sheet"]

MOST_NAMES: Final = 12
FIRST: Final = ("loss/mean", "reward/mean", "entropy/token/mean", "gradient/norm/before_clip")
_NEWEST: Final = 5
"""Runs that are chosen where nobody chose."""


def layout(desk: Desk, query: Mapping[str, Any]) -> Any:
    """The page."""
    entries = [entry for entry in desk.library.entries() if entry.run is not None]
    known = {entry.id for entry in entries}
    asked = [run_id for run_id in texts(query.get("runs"), (), MOST_RUNS) if run_id in known]
    chosen = (asked or [entry.id for entry in entries[:_NEWEST]])[:MOST_RUNS]
    names = texts(query.get("names"), FIRST, MOST_NAMES)
    choices = [{"value": entry.id, "label": entry.name} for entry in entries]
    baseline = query.get("baseline", "")
    more = [
        control(
            "names",
            "series",
            dmc.MultiSelect(
                data=sorted({*names, *FIRST}),
                value=names[:MOST_NAMES],
                searchable=True,
                maxValues=MOST_NAMES,
                size="xs",
                w=380,
            ),
        ),
        control(
            "baseline",
            "ratio to",
            dmc.Select(
                data=choices,
                value=baseline if baseline in known else None,
                placeholder="no baseline",
                clearable=True,
                searchable=True,
                size="xs",
                w=170,
            ),
        ),
    ]
    picked = dmc.MultiSelect(
        data=choices,
        value=chosen,
        searchable=True,
        maxValues=MOST_RUNS,
        size="xs",
        w="min(100%, 1200px)",
        styles={"pillsList": {"maxHeight": 58, "overflowY": "auto"}},
    )
    spec = {"page": "compare", "runs": chosen, "many": True}
    return [
        dcc.Interval(id="slow-clock", interval=SLOW_MILLISECONDS),
        dcc.Store(id="slow-beat"),
        *frame(spec, {**query, "names": names, "baseline": baseline}),
        html.Div(
            [html.H1("Compare"), html.Div(id="compare-legend", className="row")],
            className="row head",
        ),
        control("runs", "runs", picked),
        controls(query, more),
        spread(wide=True),
        html.H2("What came of it"),
        html.P(
            "Mean of the last 5 % of the steps. Runs whose settings differ only in a seed are one "
            "row, with the 95 % interval of Student's t over them.",
            className="soft",
        ),
        _table("outcome"),
        html.H2("What differs in their settings"),
        _table("settings"),
    ]


def sheet(desk: Desk, spec: Mapping[str, Any], view: View, chosen: Mapping[str, Any]) -> Sheet:
    """One panel for each series, a line for each run, in the run's own colour."""
    found = desk.find(texts(chosen.get("runs"), texts(spec.get("runs"), (), MOST_RUNS), MOST_RUNS))
    panels = []
    for name in texts(chosen.get("names"), FIRST, MOST_NAMES):
        asks = []
        for run_id, entry in found.items():
            colour, dash = desk.colour(run_id)
            asks += [
                Ask(run_id, Shown(name, entry.name, colour, phase=phase), dash=dash)
                for phase in PHASES
            ]
        panels.append((Panel(name, name, tuple(ask.shown for ask in asks)), asks))
    runs = {run_id: entry.run for run_id, entry in found.items() if entry.run is not None}
    base = chosen.get("baseline")
    base = base if isinstance(base, str) else None
    if base is not None and base not in runs:  # divided by, though not drawn
        runs |= {i: entry.run for i, entry in desk.find([base]).items() if entry.run is not None}
    return Sheet(runs, panels, view, hours=True, baseline=base if base in runs else None)


def register(app: Dash, desk: Desk) -> None:
    """Fill the tables."""

    @app.callback(
        Output("outcome", "columnDefs"),
        Output("outcome", "rowData"),
        Output("settings", "columnDefs"),
        Output("settings", "rowData"),
        Output("compare-legend", "children"),
        Input("view", "data"),
        Input("slow-beat", "data"),
        State("spec", "data"),
    )
    def tables(view: Any, beat: Any, spec: Any) -> Any:
        chosen, spec = mapping(view), mapping(spec)
        found = desk.find(
            texts(chosen.get("runs"), texts(spec.get("runs"), (), MOST_RUNS), MOST_RUNS)
        )
        entries = [entry for entry in found.values() if entry.run is not None]
        runs = [entry.run for entry in entries if entry.run is not None]
        labels = [entry.name for entry in entries]
        names = texts(chosen.get("names"), FIRST, MOST_NAMES)
        legend = [
            html.Span(
                [html.Span(className=f"line {dash}", style={"borderColor": colour}), " ", e.name],
                className="soft",
            )
            for i, e in found.items()
            for colour, dash in (desk.colour(i),)
        ]
        return (*_outcome(desk, runs, names), *_settings(runs, labels), legend)

    @app.callback(
        Output({"control": "names"}, "data"),
        Input({"control": "runs"}, "value"),
        State({"control": "names"}, "data"),
    )
    def choices(ids: Any, known: Any) -> Any:
        names = set(texts(known, (), 999))
        for entry in desk.find(texts(ids, (), _NEWEST)).values():
            if entry.run is not None:
                with suppress(EntropyLensError):
                    names |= set(desk.readings.names(entry.run))
        return sorted(names)


def _outcome(desk: Desk, runs: Sequence[Run], names: Sequence[str]) -> tuple[Any, Any]:
    columns = [{"field": "runs", "flex": 1, "minWidth": 220}, {"field": "seeds", "width": 90}]
    columns += [
        {"field": f"value{at}", "headerName": name, "minWidth": 190, "flex": 1}
        for at, name in enumerate(names)
    ]
    finals = [_finals(desk, run, names) for run in runs]
    rows = []
    for group in seed_groups(runs) if runs else []:
        row: dict[str, Any] = {"runs": group.label, "seeds": len(group.members)}
        for at, name in enumerate(names):
            values = [v for m in group.members if (v := finals[m].get(name)) is not None]
            row[f"value{at}"] = _interval(values)
        rows.append(row)
    return [c for c in columns if not rows or any(row[str(c["field"])] for row in rows)], rows


def _finals(desk: Desk, run: Run, names: Sequence[str]) -> dict[str, float | None]:
    try:
        found = looked(desk, run, names)
    except EntropyLensError:
        return {}
    return {name: final_value(s.steps, s.values).value for name, s in found.items()}


def _interval(values: Sequence[float]) -> str:
    if not values:
        return ""
    found = interval(values)
    if found.low is None or found.high is None:
        return number(found.mean)
    return f"{found.mean:.4g}  [{found.low:.4g}, {found.high:.4g}]"


def _settings(runs: Sequence[Run], labels: Sequence[str]) -> tuple[Any, Any]:
    columns: list[dict[str, Any]] = [{"field": "setting", "pinned": "left", "width": 260}]
    columns += [
        {"field": f"run{at}", "headerName": label, "minWidth": 130, "flex": 1}
        for at, label in enumerate(labels)
    ]
    rows = [
        {"setting": one.key, **{f"run{at}": str(value) for at, value in enumerate(one.values)}}
        for one in (differences(runs) if len(runs) > 1 else [])
    ]
    return columns, rows


def _table(name: str) -> Any:
    return dag.AgGrid(
        id=name,
        columnDefs=[],
        rowData=[],
        defaultColDef={"sortable": True, "resizable": True, "suppressHeaderMenuButton": True},
        dashGridOptions={"rowHeight": 28, "domLayout": "autoHeight", "animateRows": False},
        className="ag-theme-quartz",
        style={"height": None},
    )
