"""What the pages with figures share: the controls, drawing, zooming, and what a beat adds."""

from collections.abc import Callable, Mapping
from typing import Any, Final

import dash_mantine_components as dmc
from dash import ALL, ClientsideFunction, Dash, Input, Output, State, ctx, dcc, html, no_update

from entropylens.errors import EntropyLensError
from entropylens_dashboard.components import card, control, export_links
from entropylens_dashboard.desk import Desk
from entropylens_dashboard.news import added
from entropylens_dashboard.sheet import Sheet, View, texts

__all__ = ["BEAT_MILLISECONDS", "MOST_RUNS", "controls", "frame", "register", "spread"]

BEAT_MILLISECONDS: Final = 2000
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
        dcc.Store(id="again", data=0),
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
        controls = view if isinstance(view, Mapping) else {}
        page = spec.get("page") if isinstance(spec, Mapping) else None
        make = sheets.get(page) if isinstance(page, str) else None
        if make is None:
            return None
        asked = {**spec, "runs": texts(spec.get("runs"), (), MOST_RUNS)}
        return make(desk, asked, View.parse(controls, within), controls)

    @app.callback(
        Output("panels", "children"),
        Output("ledger", "data"),
        Input("view", "data"),
        Input("within", "data"),
        Input("again", "data"),
        State("spec", "data"),
    )
    def draw(view: Any, within: Any, again: Any, spec: Any) -> Any:
        sheet = made(spec, view, within)
        if sheet is None:
            return no_update, no_update
        try:
            sheet.read(desk.readings)
        except EntropyLensError as error:
            return html.Div(str(error), className="notice"), {}
        pictures = list(sheet.pictures())
        if not pictures and ctx.triggered_id == "again":  # being deleted: what was read stays
            return no_update, no_update
        query = {"page": spec["page"], **_known(sheet, view)}
        shown = [card(p, export_links(desk.prefix, query, p.panel.key)) for p in pictures]
        return shown or _nothing(sheet), sheet.ledger(pictures)

    @app.callback(
        Output({"graph": ALL}, "figure"),
        Output("ledger", "data", allow_duplicate=True),
        Output("again", "data"),
        Input("beat", "data"),
        State("spec", "data"),
        State("view", "data"),
        State("within", "data"),
        State("ledger", "data"),
        State("again", "data"),
        running=[(Output("clock", "disabled"), True, False)],
        prevent_initial_call=True,
    )
    def beat(beat: Any, spec: Any, view: Any, within: Any, ledger: Any, again: Any) -> Any:
        graphs = [output["id"]["graph"] for output in ctx.outputs_list[0]]
        still = [no_update] * len(graphs)
        if ledger is None:  # the first drawing is under way: asking anew would put it off
            return still, no_update, no_update
        anew = still, no_update, (again if isinstance(again, int) else 0) + 1
        sheet = made(spec, view, within)
        if not ledger or sheet is None:
            return anew
        if not any(asks for _, asks in sheet.panels):
            return still, no_update, no_update
        if not sheet.runs:  # gone: what was read stays on the screen
            return still, no_update, no_update
        found = added(sheet, desk.readings, ledger)
        if found is None:
            return anew
        patches, kept = found
        news = no_update if kept == ledger else kept
        return [patches.get(graph, no_update) for graph in graphs], news, no_update


def _known(sheet: Sheet, view: Any) -> dict[str, str]:
    """What is known of a view, as the address of an export carries it."""
    given = view if isinstance(view, Mapping) else {}
    logarithmic = {None: "panel", True: "log", False: "linear"}[sheet.view.logarithmic]
    lists = {name: ",".join(texts(given.get(name), (), MOST_RUNS)) for name in ("names", "more")}
    lines = "\t".join(texts(str(given.get("lines") or "").split("\t"), (), MOST_RUNS))
    return {
        "runs": ",".join(sheet.runs),
        "by": sheet.view.by,
        "smooth": str(sheet.view.smoothing),
        "scale": logarithmic,
        "within": "~".join(map(str, sheet.view.within or ())),
        "baseline": sheet.baseline or "",
        "lines": lines,
        **lists,
    }


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
    app.clientside_callback(local("beat"), Output("beat", "data"), Input("clock", "n_intervals"))
    for name, pattern in (("png", {"png": ALL}), ("larger", {"larger": ALL}), ("print", "print")):
        app.clientside_callback(
            local(name),
            Output("none", "title" if name == "png" else "lang" if name == "larger" else "dir"),
            Input(pattern, "n_clicks"),
            prevent_initial_call=True,
        )


def _nothing(sheet: Sheet) -> Any:
    if not sheet.runs:
        text = "None of these runs is in the folder any more: deleted, or moved out of it."
    else:
        text = "No row of these series has been written yet. The page fills by itself."
    return html.Div(text, className="notice")
