"""`write_report`: one self-contained page of what happened in a run."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, Final

import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

import entropylens
from entropylens.analysis.overview import (
    Curve,
    Overview,
    number,
    read_overview,
    sentences,
    started,
)
from entropylens.dictionary import definitions
from entropylens.figures.series import Line, Span, band_figure, line_figure
from entropylens.store.layout import write_atomically
from entropylens.store.reader import Run

__all__ = ["write_report"]

_TEMPLATE: Final = Path(__file__).with_name("report.html")
_EVENTS: Final = 40
_SHOWN: Final = ("question", "formula", "unit", "estimator", "high", "low", "source")


def write_report(run: Run, path: str | Path) -> Path:
    """Write the report of a run: one HTML file that opens offline, in light and dark.

    Loss, entropy band, learning rate, gradient norm, throughput, what happened in sentences, the
    tokens that changed most, the highest-loss samples, and the log's events.

    Args:
        run: Finished or still being written.
        path: The file; an older one is replaced, at once and whole.

    Returns:
        The file's path.
    """
    found = read_overview(run)
    figures = dict(_figures(found))
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{run.name}: entropylens report"),
        name=escape(run.name),
        state=escape(found.state),
        facts=_facts(found),
        sentences="".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(found)),
        sections="\n".join([*_pictures(figures), *_tables(found)]),
        footer=escape(
            f"Written by entropylens {entropylens.__version__} from {run.path} "
            f"(run {run.run_id[:8]}). Everything on this page is in the log beside it."
        ),
        plotly=get_plotlyjs(),
        figures=_as_script({key: figure for key, (_, _, figure) in figures.items()}),
    )
    target = Path(path)
    write_atomically(target, page.encode("utf-8", "replace"))
    return target


Picture = tuple[str, Sequence[str], go.Figure]
"""A title, the metrics drawn, and the figure."""


def _figures(found: Overview) -> Iterator[tuple[str, Picture]]:
    curves, spans = found.curves, _spans(found)

    def lines(*wanted: tuple[str, str, str]) -> list[Line]:
        return [
            Line(label, curves[name], colour, points=_is_sparse(curves[name], found.last_step))
            for name, label, colour in wanted
            if name in curves
        ]

    def plain(
        title: str, unit: str, *wanted: tuple[str, str, str], logarithmic: bool = False
    ) -> Picture | None:
        drawn = lines(*wanted)
        names = [name for name, _, _ in wanted if name in curves]
        if not drawn:
            return None
        return title, names, line_figure(drawn, unit=unit, spans=spans, logarithmic=logarithmic)

    pictures = {
        "loss": _loss_picture(found, spans),
        "entropy": _entropy_picture(found, spans),
        "rate": plain("Learning rate", "1", ("learning_rate", "learning rate", "green")),
        "gradient": plain(
            "Gradient norm",
            "1",
            ("gradient/norm/before_clip", "before clipping", "blue"),
            ("gradient/norm/after_clip", "after clipping", "orange"),
            logarithmic=True,
        ),
        "surprise": plain(
            "Surprisal gap: is the model more surprised than it expects to be?",
            "nats",
            ("surprisal_gap/mean", "mean of -log p - H", "purple"),
        ),
        "update": plain(
            "Size of an update against the weights",
            "1",
            ("update/relative_norm", "update norm / weight norm", "blue"),
            logarithmic=True,
        ),
        "speed": plain(
            "Throughput",
            "tokens/s",
            ("throughput/tokens_per_second", "tokens per second", "green"),
        ),
        "cost": plain(
            "What the monitor takes of wall time",
            "1",
            ("overhead/fraction", "share of wall time", "grey"),
        ),
    }
    for key, picture in pictures.items():
        if picture is not None:
            picture[2].update_xaxes(range=[0, found.last_step * 1.01])
            yield key, picture


def _loss_picture(found: Overview, spans: Sequence[Span]) -> Picture | None:
    if "loss/mean" not in found.curves:
        return None
    drawn = [Line("training loss", found.curves["loss/mean"], "blue")]
    if "loss/mean" in found.evaluation:
        drawn.append(Line("evaluation loss", found.evaluation["loss/mean"], "orange", points=True))
    return "Loss", ["loss/mean"], line_figure(drawn, unit="nats", spans=spans)


def _entropy_picture(found: Overview, spans: Sequence[Span]) -> Picture | None:
    mean = found.curves.get("entropy/token/mean")
    if mean is None:
        return None
    levels = ("p05", "p25", "p50", "p75", "p95")
    names = {level: f"entropy/token/{level}" for level in levels}
    quantiles = {k: found.curves[name] for k, name in names.items() if name in found.curves}
    figure = band_figure(quantiles, mean, unit="nats", label="mean entropy", spans=spans)
    return "Token entropy", ["entropy/token/mean", "entropy/token/p05"], figure


def _spans(found: Overview) -> list[Span]:
    worst = sorted(found.spikes, key=lambda s: s.start)[:12]
    return [Span(s.start, s.end or found.last_step, "loss out of range") for s in worst]


def _is_sparse(curve: Curve, last_step: int) -> bool:
    return len(curve.steps) < 60 or len(curve.steps) * 5 < last_step


def _facts(found: Overview) -> str:
    run = found.run
    began = started(run)
    seen = found.curves.get("tokens/seen")
    facts = [
        None if began is None else f"started {began:%Y-%m-%d %H:%M} UTC",
        f"{found.last_step:,} steps",
        None if seen is None else f"{number(seen.values[-1])} tokens",
        f"{len(run.attempts)} attempts" if len(run.attempts) > 1 else None,
        f"preset {run.config['preset']}" if "preset" in run.config else None,
        run.config.get("model"),
        run.config.get("optimizer"),
    ]
    return escape(" · ".join(str(fact) for fact in facts if fact))


def _pictures(figures: Mapping[str, Picture]) -> Iterator[str]:
    for key, (title, names, _) in figures.items():
        yield (
            f'<section><h2>{escape(title)}</h2><figure><div class="plot" id="{key}"></div></figure>'
            f"{_explained(names)}</section>"
        )


def _explained(names: Sequence[str]) -> str:
    known = definitions()
    parts = []
    for name in names:
        if name in known:
            fields = "".join(
                f"<dt>{field}</dt><dd>{escape(getattr(known[name], field))}</dd>"
                for field in _SHOWN
            )
            parts.append(f"<p><code>{escape(name)}</code></p><dl>{fields}</dl>")
    return f"<details><summary>What is this?</summary>{''.join(parts)}</details>" if parts else ""


def _tables(found: Overview) -> Iterator[str]:
    if found.compared is not None:
        before, after = found.compared
        note = (
            f"Mean surprisal (-log p, nats) of single tokens in steps {before[0]} to {before[1]} "
            f"and {after[0]} to {after[1]}, from the uniform sample in the tokens table; at least "
            f"5 observations on either side, changes beyond two standard errors only."
        )
        rows = [
            [
                _code(repr(token.text) if token.text is not None else f"id {token.token_id}"),
                number(token.before),
                number(token.after),
                f"{'+' if token.change > 0 else ''}{number(token.change)} ± {number(token.error)}",
                f"{token.counts[0]}, {token.counts[1]}",
            ]
            for token in found.tokens
        ]
        heads = ["token", "before", "after", "change ± standard error", "observations"]
        yield _table("Tokens that changed most", note, heads, rows)
    if found.samples:
        heads = ["sample", "step", "loss", "entropy", "tokens measured"]
        rows = [
            [
                _code(str(s["sample_id"] or f"sequence {s['sequence']} of the step")),
                str(s["step"]),
                number(float(str(s["loss"]))),
                number(float(str(s["entropy"]))),
                f"{s['measured_tokens']} of {s['tokens']}",
            ]
            for s in found.samples
        ]
        where = "while the loss was out of range" if found.worst else "in the last third of the run"
        yield _table("Samples with the highest loss", f"Of those named {where}.", heads, rows)
    shown = found.events[-_EVENTS:]
    rows = [[str(e["step"]), _code(str(e["kind"])), escape(str(e["message"]))] for e in shown]
    left = len(found.events) - len(shown)
    note = f"The last {_EVENTS}; {left:,} earlier ones are in the log." if left else ""
    yield _table("Events", note, ["step", "kind", "message"], rows)


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _table(title: str, note: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A section with a table; cells are HTML, columns of numbers stand to the right."""
    if not rows:
        return (
            f"<section><h2>{escape(title)}</h2><p class='note'>{escape(note)}</p>"
            f"<p>None.</p></section>"
        )
    numeric = [all(cell[:1] in "0123456789-+N" for cell in column) for column in zip(*rows)]  # noqa: B905
    marks = [' class="n"' if is_number else "" for is_number in numeric]
    head = "".join(
        f"<th{mark}>{escape(text)}</th>" for mark, text in zip(marks, heads, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{mark}>{cell}</td>" for mark, cell in zip(marks, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return (
        f"<section><h2>{escape(title)}</h2><p class='note'>{escape(note)}</p><div class='wide'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></section>"
    )


def _as_script(figures: Mapping[str, go.Figure]) -> str:
    """Figures as JSON that may stand in a script: no tag can begin or end in it."""
    plain: dict[str, Any] = {key: json.loads(figure.to_json()) for key, figure in figures.items()}
    for figure in plain.values():
        figure["layout"].pop("template", None)
    text = json.dumps(plain, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
