"""What the pages with figures share: the controls, drawing, zooming, and what a beat adds."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import dash_mantine_components as dmc
from dash import ALL, ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update

from entropylens.errors import EntropyLensError
from entropylens_dashboard.components import card, control
from entropylens_dashboard.desk import Desk
from entropylens_dashboard.news import added
from entropylens_dashboard.sheet import Picture, Sheet, View, mapping, texts

__all__ = [
    "BEAT_MILLISECONDS",
    "MOST_RUNS",
    "SLOW_MILLISECONDS",
    "controls",
    "frame",
    "register",
    "register_slow",
    "spread",
]

BEAT_MILLISECONDS: Final = 2000
SLOW_MILLISECONDS: Final = 15_000
MOST_RUNS: Final = 50
"""Runs of a page."""

MakeSheet = Callable[[Desk, Mapping[str, Any], View, Mapping[str, Any]], Sheet]
"""From a page's specification, the view and the controls to a sheet that was not read yet."""


def controls(query: Mapping[str, Any], more: list[Any]) -> Any:
    """The row of controls; their values come from the address."""
    view = View.parse(query)
    by = dmc.SegmentedControl(data=["step", "tokens", "time"], value=view.by, size="xs")
    scales = [
        {"label": "as is", "value": "panel"},
        {"label": "linear", "value": "linear"},
        {"label": "log", "value": "log"},
    ]
    scale = {None: "panel", True: "log", False: "linear"}[view.logarithmic]
    smooth = dmc.Slider(value=view.smoothing, min=0, max=0.99, step=0.01, w=130, size="sm")
    return html.Div(
        [
            control("by", "along", by),
            control("scale", "scale", dmc.SegmentedControl(data=scales, value=scale, size="xs")),
            control("smooth", "smoothing", smooth),
            *more,
            html.Button("whole range", id="unzoom", className="metric"),
            html.Button("print", id="print", className="metric"),
        ],
        className="controls",
    )


def frame(spec: Mapping[str, Any], query: Mapping[str, Any]) -> list[Any]:
    """The stores that drawing goes by."""
    within = query.get("within", "").split("~")
    return [
        dcc.Store(id="spec", data=dict(spec)),
        dcc.Store(id="view", data=dict(query)),
        dcc.Store(id="within", data=View.parse({}, within).within),
        dcc.Store(id="ledger"),
        dcc.Store(id="rebuild", data=0),
        dcc.Store(id="again", data=0),
        dcc.Store(id="answered"),
        html.Div(id="stale", className="stale", role="status"),
        dcc.Store(id="beat"),
        dcc.Interval(id="clock", interval=BEAT_MILLISECONDS),
        html.Div(id="none", hidden=True),
    ]


def spread(wide: bool = False) -> Any:
    """Where the panels go."""
    reading = html.Div("Reading the log ...", className="loading")
    return html.Div(reading, id="panels", className="panels wide" if wide else "panels")


def register(app: Dash, desk: Desk, sheets: Mapping[str, MakeSheet]) -> None:
    """Have figures drawn, zoomed and extended.

    Args:
        app: The app.
        desk: What there is to draw.
        sheets: By page, how a sheet is made of what the page specifies.
    """
    _register_browser(app)

    def made(spec: Any, view: Any, within: Any) -> Sheet | None:
        """What a browser asks for; None where that makes no sense."""
        controls = mapping(view)
        page = mapping(spec).get("page")
        make = sheets.get(page) if isinstance(page, str) else None
        if make is None:
            return None
        asked = {**spec, "runs": texts(spec.get("runs"), (), MOST_RUNS)}
        return make(desk, asked, View.parse(controls, within), controls)

    def pictured(sheet: Sheet) -> list[Picture]:
        sheet.read(desk.readings)
        return list(sheet.pictures())

    @app.callback(
        Output("panels", "children"),
        Output("ledger", "data"),
        Input("rebuild", "data"),
        State("spec", "data"),
        State("view", "data"),
        State("within", "data"),
    )
    def draw(rebuild: Any, spec: Any, view: Any, within: Any) -> Any:
        sheet = made(spec, view, within)
        if sheet is None or (rebuild and not sheet.runs and spec["page"] != "compare"):
            return no_update, no_update  # deleted: what was read stays
        try:
            pictures = pictured(sheet)
        except EntropyLensError as error:
            return html.Div(str(error), className="notice"), {}
        return [card(one) for one in pictures] or _nothing(sheet, spec), sheet.ledger(pictures)

    @app.callback(
        Output({"graph": ALL}, "figure"),
        Output("ledger", "data", allow_duplicate=True),
        Output("rebuild", "data"),
        Input("view", "data"),
        Input("within", "data"),
        Input("again", "data"),
        State("spec", "data"),
        State("rebuild", "data"),
        prevent_initial_call=True,
    )
    def redraw(view: Any, within: Any, again: Any, spec: Any, rebuild: Any) -> Any:
        """Other figures in the frames that are there: what a person has set in them survives."""
        graphs = _graphs()
        still, anew = [no_update] * len(graphs), _count(rebuild)
        sheet = made(spec, view, within)
        if sheet is None or (not sheet.runs and graphs and spec["page"] != "compare"):
            return still, no_update, no_update
        try:
            pictures = pictured(sheet)
        except EntropyLensError:
            return still, no_update, anew
        if [one.panel.key for one in pictures] != graphs:
            return still, no_update, anew
        return [one.figure for one in pictures], sheet.ledger(pictures), no_update

    @app.callback(
        Output({"graph": ALL}, "figure", allow_duplicate=True),
        Output("ledger", "data", allow_duplicate=True),
        Output("again", "data"),
        Output("answered", "data"),
        Input("beat", "data"),
        State("spec", "data"),
        State("view", "data"),
        State("within", "data"),
        State("ledger", "data"),
        State("again", "data"),
        prevent_initial_call=True,
    )
    def beat(beat: Any, spec: Any, view: Any, within: Any, ledger: Any, again: Any) -> Any:
        graphs, answered = _graphs(), _count(beat, 0)
        still = [no_update] * len(graphs)
        sheet = made(spec, view, within)
        # Without a ledger the first drawing is under way: asking anew would put it off.
        if ledger is None or sheet is None or not sheet.runs or not sheet.has_lines():
            return still, no_update, no_update, answered
        found = added(sheet, desk.readings, ledger)
        if found is None:
            return still, no_update, _count(again), answered
        patches, kept = found
        news = no_update if kept == ledger else kept
        return [patches.get(graph, no_update) for graph in graphs], news, no_update, answered


def register_slow(app: Dash) -> None:
    """A slow beat, for what takes longer; none of a hidden page either."""
    app.clientside_callback(
        ClientsideFunction("entropylens", "awake"),
        Output("slow-beat", "data"),
        Input("slow-clock", "n_intervals"),
    )


def _graphs() -> list[str]:
    """Keys of the panels that are on the page, in order."""
    return [output["id"]["graph"] for output in ctx.outputs_list[0]]


def _count(value: Any, more: int = 1) -> int:
    """A browser's counter, and one more."""
    return (value if isinstance(value, int) and abs(value) < 2**52 else 0) + more


def _register_browser(app: Dash) -> None:
    """What the browser does by itself."""

    def local(name: str) -> ClientsideFunction:
        return ClientsideFunction("entropylens", name)

    app.clientside_callback(
        local("collect"),
        Output("view", "data"),
        Input({"control": ALL}, "value"),
        Input("within", "data"),
        State("spec", "data"),
        State("view", "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        local("zoomed"),
        Output("within", "data"),
        Input({"graph": ALL}, "relayoutData"),
        State("within", "data"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        local("unzoom"),
        Output("within", "data", allow_duplicate=True),
        Input("unzoom", "n_clicks"),
        prevent_initial_call=True,
    )
    app.clientside_callback(
        local("beat"),
        Output("beat", "data"),
        Output("stale", "children"),
        Input("clock", "n_intervals"),
        State("answered", "data"),
    )
    app.clientside_callback(
        local("take"),
        Output("none", "title"),
        Input({"take": ALL, "as": ALL}, "n_clicks"),
        State("spec", "data"),
        State("view", "data"),
        State("within", "data"),
        State("home", "data"),
        prevent_initial_call=True,
    )
    for name, pattern, output in (("larger", {"larger": ALL}, "lang"), ("print", "print", "dir")):
        app.clientside_callback(
            local(name),
            Output("none", output),
            Input(pattern, "n_clicks"),
            prevent_initial_call=True,
        )


def _nothing(sheet: Sheet, spec: Mapping[str, Any]) -> Any:
    if not sheet.runs:
        text = "No run is chosen, or none of those chosen is in the folder any more."
    elif not sheet.has_lines():
        text = "Choose rows of the table above: they are drawn here."
    elif sheet.view.within is not None:
        text = "Nothing was written in this range. The key u shows the whole."
    else:
        text = "No row of these series has been written yet. The page fills by itself."
    return html.Div(text, className="notice")
