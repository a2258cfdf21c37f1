"""One run on one screen: is it healthy, and if not, since when and why."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, State, dcc, html, no_update

from entropylens.errors import EntropyLensError
from entropylens.figures.axes import Axis
from entropylens.figures.drawing import marks_figure
from entropylens.figures.panels import PANELS, Panel, panel_of
from entropylens_dashboard.components import control, said, state_badge, verdict_line
from entropylens_dashboard.desk import Desk, events, facts, headlines, marks, verdict
from entropylens_dashboard.findings import findings
from entropylens_dashboard.library import Entry, without_paths
from entropylens_dashboard.pages.panels import (
    SLOW_MILLISECONDS,
    controls,
    frame,
    register_slow,
    spread,
)
from entropylens_dashboard.readings import PHASES, Stretch
from entropylens_dashboard.sheet import Ask, Sheet, View, texts

__all__ = ["layout", "register", "sheet"]

MOST_ADDED = 12
"""Series that a person may add to the screen."""


def layout(desk: Desk, entry: Entry, query: Mapping[str, str]) -> Any:
    """The page of one run."""
    if entry.run is None:
        return _cannot(entry)
    chosen = _added(query)
    more = dmc.MultiSelect(
        data=sorted({*chosen}),
        value=chosen,
        placeholder="add a series",
        searchable=True,
        size="xs",
        w=230,
        maxValues=MOST_ADDED,
    )
    spec = {"page": "vitals", "runs": [entry.id]}
    lane = dcc.Graph(
        id="lane", config={"displayModeBar": False}, responsive=True, className="graph"
    )
    tabs = html.Nav(
        [
            html.B("vital signs"),
            dcc.Link("all series", href=desk.href(entry, "/series")),
            dcc.Link("compare", href=f"{desk.prefix}compare?runs={entry.id}"),
        ],
        className="row end",
    )
    title = [html.Span(className="dot", style={"background": desk.colour(entry.id)[0]})]
    title += [html.H1(entry.name), html.Span(id="head", className="row"), tabs]
    return [
        *frame(spec, query),
        dcc.Interval(id="slow-clock", interval=SLOW_MILLISECONDS),
        dcc.Store(id="slow-beat"),
        dcc.Store(id="third-beat"),
        dcc.Store(id="words-beat"),
        html.Div(title, className="row head"),
        html.Div(id="verdict"),
        controls(query, [control("more", "", more)]),
        html.Div(
            [
                html.Div([html.Div(lane, className="marks", title="what happened"), spread()]),
                html.Aside(
                    [
                        html.H2("What happened"),
                        html.Div("Reading ...", id="findings", className="soft"),
                        html.H2("Alarms and events"),
                        html.Div(id="events", className="events soft"),
                    ]
                ),
            ],
            className="vitals",
        ),
    ]


def sheet(desk: Desk, spec: Mapping[str, Any], view: View, chosen: Mapping[str, Any]) -> Sheet:
    """The panels of vital signs, and those that were added."""
    found = desk.find(spec["runs"][:1])
    added = [_panel(name) for name in _added(chosen)]
    panels = [
        (panel, [Ask(run_id, shown) for run_id in found for shown in panel.series])
        for panel in (*PANELS, *added)
    ]
    runs = {run_id: entry.run for run_id, entry in found.items() if entry.run is not None}
    by = view.by if view.by != "tokens" else "step"
    seen = [mark for run in runs.values() for mark in marks(events(run), by)]
    return Sheet(runs, panels, view, marks=seen if by == view.by else ())


def register(app: Dash, desk: Desk) -> None:
    """Have the words and the lane of events follow the run."""
    register_slow(app)

    @app.callback(
        Output("head", "children"),
        Output("verdict", "children"),
        Output("events", "children"),
        Output("lane", "figure"),
        Output("words-beat", "data"),
        Input("third-beat", "data"),
        Input("view", "data"),
        State("within", "data"),
        State("spec", "data"),
    )
    def words(beat: Any, view: Any, within: Any, spec: Any) -> Any:
        beat = beat if isinstance(beat, int) and abs(beat) < 2**53 else no_update
        entry = desk.asked(spec)
        if entry is None or entry.run is None:
            gone = "This run is no longer in the folder: deleted, renamed beyond recognition, or "
            gone += "moved out of it. What was read stays on the screen."
            notice = html.Div(gone, className="notice")
            return state_badge("unknown"), notice, no_update, no_update, beat
        try:
            series = headlines(desk, entry.run)
        except EntropyLensError as error:
            return state_badge(entry.state), html.Div(str(error)), no_update, no_update, beat
        seen = events(entry.run)
        judged, alarms = verdict(entry, series, seen)
        line = [html.Span(facts(entry.run, series), className="soft")]
        shown = View.parse(view or {}, within)
        placed = marks(seen, shown.by, series.get("tokens/seen"))
        axis = Axis(shown.by, shown.within, _extent(series, shown.by))
        lane = marks_figure(placed, axis, shown.by)
        return (
            [state_badge(entry.state), *line],
            verdict_line(judged),
            _listed(alarms, seen),
            lane,
            beat,
        )

    app.clientside_callback(
        ClientsideFunction("entropylens", "lane"),
        Output("none", "accessKey"),
        Input("within", "data"),
        State("view", "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        ClientsideFunction("entropylens", "third"),
        Output("third-beat", "data"),
        Input("beat", "data"),
        State("third-beat", "data"),
        State("words-beat", "data"),
        prevent_initial_call=True,
    )

    @app.callback(Output("findings", "children"), Input("slow-beat", "data"), State("spec", "data"))
    def happened(count: Any, spec: Any) -> Any:
        entry = desk.asked(spec)
        if entry is None or entry.run is None:
            return no_update
        try:
            return said([without_paths(s) for s in findings(desk.readings, entry.run)])
        except EntropyLensError as error:
            return str(error)

    @app.callback(
        Output({"control": "more"}, "data"),
        Input("spec", "data"),
        State({"control": "more"}, "data"),
    )
    def choices(spec: Any, known: Any) -> Any:
        entry = desk.asked(spec)
        if entry is None or entry.run is None:
            return no_update
        return sorted({*texts(known, (), 999), *desk.readings.names(entry.run)})


def _extent(series: Mapping[str, Stretch], by: str) -> tuple[float, float] | None:
    """Where the series begin and end, so that the lane agrees with the figures below it."""
    tokens = series.get("tokens/seen")
    if by == "tokens":
        edges = [] if tokens is None else [tokens.values[0], tokens.values[-1]]
    else:
        places = [s.steps if by == "step" else s.times for s in series.values()]
        edges = [edge for place in places for edge in (place[0], place[-1])]
    return (float(min(edges)), float(max(edges))) if edges else None


def _panel(name: str) -> Panel:
    """A series that a person added, of whichever phase."""
    plain = panel_of([name])
    return replace(
        plain, series=tuple(replace(one, phase=p) for one in plain.series for p in PHASES)
    )


def _added(chosen: Mapping[str, Any]) -> list[str]:
    return texts(chosen.get("more"), (), MOST_ADDED)


def _listed(alarms: Any, seen: Any) -> list[Any]:
    lines = [
        html.P([html.B(f"{alarm.severity}: "), f"{alarm.message} (step {alarm.step:,})"])
        for alarm in alarms
    ]
    lines = lines or [html.P("No alarm is open.")]
    for event in reversed(seen[-40:]):
        lines.append(html.P(f"step {event['step']:,} · {event['kind']}: {event['message']}"))
    return lines


def _cannot(entry: Entry) -> Any:
    return [
        html.Div([html.H1(entry.name), state_badge(entry.state)], className="row head"),
        html.Div(entry.note, className="notice"),
    ]
