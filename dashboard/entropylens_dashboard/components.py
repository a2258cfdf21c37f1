"""Pieces that several pages show: states, definitions, the frame of a figure."""

from collections.abc import Sequence
from typing import Any, Final

import dash_mantine_components as dmc
from dash import dcc, html

from entropylens.analysis.verdict import Verdict
from entropylens.dictionary import definition
from entropylens.errors import EntropyLensError
from entropylens_dashboard.sheet import Picture

__all__ = ["STATES", "card", "control", "said", "state_badge", "verdict_line"]

STATES: Final = {
    "running": ("blue", "●", "training goes on"),
    "starting": ("blue", "○", "no row has been written yet"),
    "finished": ("teal", "✓", "the training ended as it should"),
    "stalled": ("yellow", "◐", "the process lives, but its step has not moved for ten minutes"),
    "terminated": ("yellow", "■", "the process was told to end"),
    "crashed": ("red", "✕", "the process is gone without a word"),
    "failed": ("red", "✕", "the training raised an error"),
    "half-written": ("gray", "?", "there is no readable run.json"),
    "newer": ("gray", "?", "written by a newer entropylens"),
    "unknown": ("gray", "?", "no process has said anything of itself"),
}
"""Colour, mark and meaning: colour alone says nothing."""

LEVELS: Final = {
    "healthy": ("teal", "✓"),
    "watch": ("yellow", "!"),
    "failing": ("red", "✕"),
    "unknown": ("gray", "?"),
}

_GRAPH: Final = {
    "displayModeBar": False,  # it would lie over the legend of a small figure
    "doubleClick": "autosize",
}
_FIELDS: Final = (
    ("formula", "formula"),
    ("unit", "unit"),
    ("taken over", "estimator"),
    ("high", "high"),
    ("low", "low"),
    ("cost", "cost"),
    ("source", "source"),
)


def state_badge(state: str) -> Any:
    """The state of a run, with what it means as a title."""
    colour, mark, meaning = STATES.get(state, STATES["unknown"])
    badge = dmc.Badge(f"{mark} {state}", color=colour, variant="light", tt="none")
    return html.Span(badge, title=meaning)


def verdict_line(verdict: Verdict) -> Any:
    """Healthy or not, and why."""
    colour, mark = LEVELS[verdict.level]
    badge = dmc.Badge(f"{mark} {verdict.level}", color=colour, variant="filled", tt="none")
    return html.Div([badge, html.Span(verdict.reason)], className="verdict")


def said(sentences: Sequence[str]) -> Any:
    """Sentences about a run."""
    return html.Ul([html.Li(sentence) for sentence in sentences], className="said")


def control(name: str, label: str, component: Any) -> Any:
    """A control whose value is part of the view, and of the address."""
    component.id = {"control": name}
    words = html.Label(label, htmlFor=f'{{"control":"{name}"}}', className="soft")
    return html.Div([words, component], className="control")


def card(picture: Picture) -> Any:
    """A figure with its title, the definitions of what it shows, and ways to take it along."""
    panel = picture.panel
    lines_first = sorted(picture.asks, key=lambda ask: ask.shown.role != "line")
    names = list(dict.fromkeys(ask.shown.name for ask in lines_first))
    graph = dcc.Graph(
        id={"graph": panel.key},
        figure=picture.figure,
        config=_GRAPH,
        responsive=True,
        className="graph",
    )
    head = html.Div(
        [
            html.H3(panel.title, title=panel.title),
            html.Span(picture.unit, className="soft unit"),
            _definitions(names),
            _menu(panel.key),
        ],
        className="panel-head",
    )
    return html.Section([head, graph], className="panel", **{"aria-label": panel.title})


def _definitions(names: Sequence[str]) -> Any:
    label = f"What is {', '.join(names)}?"
    target = dmc.PopoverTarget(
        html.Button("?", className="metric", title=label, **{"aria-label": label})
    )
    words = [part for name in names for part in _definition(name)]
    dropdown = dmc.PopoverDropdown(html.Div(words, className="definition"))
    return dmc.Popover(
        [target, dropdown], width=380, withArrow=True, shadow="md", trapFocus=True, returnFocus=True
    )


def _definition(name: str) -> list[Any]:
    try:
        found = definition(name)
    except EntropyLensError:
        said = "No diagnostic of entropylens writes this name."
        return [html.Code(name), html.P(said)]
    else:
        terms = [
            part
            for label, attribute in _FIELDS
            for part in (html.Dt(label), html.Dd(getattr(found, attribute)))
        ]
    return [html.Code(name), html.P(found.question, className="question"), html.Dl(terms)]


def _menu(key: str) -> Any:
    items = [
        dmc.MenuItem(label, id={"take": key, "as": kind})
        for kind, label in (
            ("png", "Picture (PNG)"),
            ("csv", "Every value (CSV)"),
            ("html", "Figure (HTML)"),
        )
    ]
    items.append(dmc.MenuItem("Larger or smaller", id={"larger": key}))
    button = html.Button("⋯", className="menu", **{"aria-label": "Export this figure"})
    return dmc.Menu([dmc.MenuTarget(button), dmc.MenuDropdown(items)], position="bottom-end")
