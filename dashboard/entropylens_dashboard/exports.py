"""Figures to take along: every value as CSV, the figure as a page that needs no network."""

import csv
import io
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, Final

import plotly.graph_objects as go
from dash import Dash
from flask import Response, abort, request
from plotly.io import to_html

from entropylens_dashboard.desk import Desk
from entropylens_dashboard.pages.panels import MOST_RUNS, MakeSheet
from entropylens_dashboard.sheet import Picture, Sheet, View, texts

__all__ = ["register"]


_FORMULAS: Final = tuple("=+-@＝＋－＠")


def register(app: Dash, desk: Desk, sheets: Mapping[str, MakeSheet]) -> None:
    """Serve ``export/figure.csv`` and ``export/figure.html``."""

    @app.server.route(f"{desk.prefix}export/figure.<kind>")
    def export(kind: str) -> Response:
        sheet = _asked_for(desk, sheets)
        if sheet is None or kind not in ("csv", "html"):
            abort(404)
        name = _file_name(sheet)
        if kind == "csv":
            return _download(_csv(desk, sheet), "text/csv; charset=utf-8", f"{name}.csv")
        return _download(_page(desk, sheet), "text/html; charset=utf-8", f"{name}.html")


def _asked_for(desk: Desk, sheets: Mapping[str, MakeSheet]) -> Sheet | None:
    query: dict[str, Any] = request.args.to_dict()
    make = sheets.get(query.get("page", ""))
    if make is None:
        return None
    spec = {"page": query["page"], "runs": texts(query.get("runs"), (), MOST_RUNS)}
    query |= {name: request.args.getlist(name) for name in ("names", "more") if name in query}
    within = query.get("within", "").split("~")
    sheet = make(desk, spec, View.parse(query, within), query)
    sheet.panels = [panel for panel in sheet.panels if panel[0].key == query.get("panel")]
    return sheet if sheet.panels and sheet.runs else None


def _file_name(sheet: Sheet) -> str:
    """What is in a file, of plain letters."""
    words = [*(run.name for run in list(sheet.runs.values())[:2]), sheet.panels[0][0].key]
    return re.sub(r"[^A-Za-z0-9.-]+", "-", " ".join(words)).strip("-.")[:80] or "figure"


def _download(body: Any, kind: str, name: str) -> Response:
    answer = Response(body, mimetype=kind)
    answer.headers["Content-Disposition"] = f'attachment; filename="{name}"'
    return answer


def _csv(desk: Desk, sheet: Sheet) -> Iterator[str]:
    """Every value of the panel's series, whatever is in view."""
    yield "run,name,module,phase,step,time,value\r\n"
    for run_id, run in sheet.runs.items():
        keys = [ask.key for _, asks in sheet.panels for ask in asks if ask.run_id == run_id]
        found, _ = desk.readings.look(run, keys, is_whole=True)
        for key, stretch in found.items():
            text = io.StringIO()
            rows = csv.writer(text)
            start = [_cell(run.name), _cell(key.name), _cell(key.module), _cell(key.phase)]
            columns = stretch.steps.tolist(), stretch.times.tolist(), stretch.values.tolist()
            for step, time, value in zip(*columns, strict=True):
                rows.writerow([*start, step, time, value])
                if text.tell() > 1 << 16:
                    yield text.getvalue()
                    text.seek(0)
                    text.truncate()
            yield text.getvalue()


def _cell(text: str) -> str:
    """Text that no spreadsheet takes for a formula."""
    return f"'{text}" if text.strip()[:1] in _FORMULAS or text[:1].isspace() else text


def _page(desk: Desk, sheet: Sheet) -> str:
    sheet.read(desk.readings)
    pictures = list(sheet.pictures())
    if not pictures:
        abort(404)
    document = _dressed(pictures[0], ", ".join(run.name for run in sheet.runs.values()))
    for trace in document["data"]:
        trace.pop("meta", None)
    return to_html(go.Figure(document), include_plotlyjs=True, config={"displaylogo": False})


def _dressed(picture: Picture, runs: str) -> dict[str, Any]:
    """A figure that stands alone: with a title, a unit and a ground of its own."""
    document = picture.figure
    layout = document["layout"]
    layout |= {"height": 560, "paper_bgcolor": "white", "plot_bgcolor": "white"}
    layout["title"] = {"text": escape(f"{picture.panel.title} · {runs}", quote=False)}
    layout["margin"] = {"l": 70, "r": 20, "t": 90, "b": 60}
    layout["yaxis"]["title"] = {"text": escape(picture.unit, quote=False)}
    layout["xaxis"]["gridcolor"] = layout["yaxis"]["gridcolor"] = "#e3e6eb"
    layout.pop("meta", None)
    return document
