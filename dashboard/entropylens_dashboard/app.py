"""`create_app`: the Dash app over one folder of runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl

import dash_mantine_components as dmc
from dash import ClientsideFunction, Dash, Input, Output, dcc, html

from entropylens.figures.panels import PANELS
from entropylens.store.points import Key
from entropylens_dashboard import exports, findings
from entropylens_dashboard.desk import HEADLINES, Desk
from entropylens_dashboard.library import Library
from entropylens_dashboard.pages import compare, panels, runs, series, vitals
from entropylens_dashboard.readings import PHASES, Readings

__all__ = ["create_app"]

_ASSETS: Final = Path(__file__).with_name("assets")
_SHEETS: Final = {"vitals": vitals.sheet, "compare": compare.sheet, "series": series.sheet}
_KEYS: Final = (
    ("r", "the list of runs"),
    ("c", "compare runs"),
    ("/", "filter, or the first field"),
    ("u", "show the whole range again"),
    ("d", "dark or light"),
    ("p", "print"),
    ("?", "this help"),
    ("Tab, Enter", "from one control to the next, and use it"),
)


def create_app(folder: str | Path, *, prefix: str = "/") -> Dash:
    """The dashboard of one folder of runs, as a WSGI app in ``app.server``.

    Nothing on which an answer depends is kept between requests, so that any number of processes
    may serve the same folder. Use `entropylens_dashboard.create_server` to have it guarded.

    Args:
        folder: Holds the runs, in folders below too; is only read.
        prefix: Path that the app lives under, with a slash at both ends.

    Returns:
        The app.

    Raises:
        EntropyLensError: There is no such folder.
    """
    common = [Key(shown.name, "", shown.phase) for panel in PANELS for shown in panel.series]
    common += [Key(name, "", phase) for phase in PHASES for name in HEADLINES]
    common += [Key(name, "", "train") for name in findings.NAMES]
    desk = Desk(Library(folder), Readings(common=dict.fromkeys(common)), prefix)
    app = _App(
        "entropylens",
        assets_folder=str(_ASSETS),
        requests_pathname_prefix=prefix,
        routes_pathname_prefix=prefix,
        suppress_callback_exceptions=True,
        serve_locally=True,
        title="entropylens",
        update_title="",
        add_log_handler=False,
    )
    app.layout = _shell(desk, Path(folder))
    _register_routes(app, desk)
    _register_title(app)
    panels.register(app, desk, _SHEETS)
    for page in (runs, vitals, compare, series):
        page.register(app, desk)
    exports.register(app, desk, _SHEETS)
    return app


class _App(Dash):  # type: ignore[misc]
    """Tells a browser no versions: they help nobody but an attacker."""

    def _config(self) -> dict[str, Any]:
        told = {"dash_version", "python_version", "plotly_version", "ddk_version"}
        return {name: v for name, v in super()._config().items() if name not in told}


def _shell(desk: Desk, folder: Path) -> Any:
    links = html.Nav(
        [
            dcc.Link("Runs", href=desk.prefix, id="to-runs"),
            dcc.Link("Compare", href=f"{desk.prefix}compare", id="to-compare"),
        ]
    )
    toggle = dmc.ColorSchemeToggle(
        lightIcon="☀",
        darkIcon="☾",
        id="theme-toggle",
        variant="subtle",
        **{"aria-label": "dark or light"},
    )
    keys = html.Dl(
        [part for key, what in _KEYS for part in (html.Dt(html.Kbd(key)), html.Dd(what))]
    )
    helped = dmc.Popover(
        [
            dmc.PopoverTarget(html.Button("?", id="help-button", className="menu", title="Keys")),
            dmc.PopoverDropdown(keys),
        ],
        withArrow=True,
    )
    bar = html.Header(
        [
            html.A("skip to the page", href="#page", className="skip"),
            dcc.Link("entropylens", href=desk.prefix, className="brand"),
            links,
            html.Span(folder.name or "runs", className="soft place"),
            toggle,
            helped,
        ],
        className="bar",
    )
    tags = dcc.Store(id="tags", storage_type="local", data={})
    page = html.Main(id="page", tabIndex="-1")
    home = dcc.Store(id="home", data=desk.prefix)
    whole = [dcc.Location(id="url"), tags, home, bar, page, html.Div(id="titled", hidden=True)]
    return dmc.MantineProvider(whole, defaultColorScheme="auto")


def _register_routes(app: Dash, desk: Desk) -> None:
    @app.callback(Output("page", "children"), Input("url", "pathname"), Input("url", "search"))
    def page(path: Any, search: Any) -> Any:
        query = _query_of(search)
        place = (
            (path if isinstance(path, str) else "/")
            .removeprefix(desk.prefix.rstrip("/"))
            .strip("/")
            .split("/")
        )
        return _laid_out(desk, place, query)


def _register_title(app: Dash) -> None:
    app.clientside_callback(
        ClientsideFunction("entropylens", "title"),
        Output("titled", "title"),
        Input("page", "children"),
    )


def _query_of(search: Any) -> dict[str, Any]:
    """What an address carries; names, which may hold commas, each for itself."""
    pairs = parse_qsl(search.removeprefix("?")) if isinstance(search, str) else []
    lists = {key: [v for k, v in pairs if k == key] for key in ("names", "more")}
    return {**dict(pairs), **{key: values for key, values in lists.items() if values}}


def _laid_out(desk: Desk, place: list[str], query: Mapping[str, Any]) -> Any:
    if place == [""]:
        return runs.layout(desk, query)
    if place == ["compare"]:
        return compare.layout(desk, query)
    if place[0] == "run" and len(place) in (2, 3):
        entry = desk.library.find(place[1])
        pages = {"": vitals.layout, "series": series.layout}
        page = pages.get(place[2] if len(place) == 3 else "")
        if entry is not None and page is not None:
            return page(desk, entry, query)
    return [
        html.H1("Not here"),
        html.Div(
            "No run of this folder has that address: it was deleted, moved out of the folder, or "
            "never there.",
            className="notice",
        ),
        dcc.Link("All runs", href=desk.prefix),
    ]
