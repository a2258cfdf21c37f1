"""`write_report`: one self-contained page of what happened in a run."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template
from typing import Any, Final

from plotly.offline import get_plotlyjs
from plotly.utils import PlotlyJSONEncoder

import entropylens
from entropylens.analysis.entropy_change import ESTIMATES, Part
from entropylens.analysis.entropy_change_words import (
    change_figures,
    change_rows,
    change_sentences,
)
from entropylens.analysis.entropy_law import law_figures, law_sentences, score_rows
from entropylens.analysis.overview import (
    Overview,
    number,
    read_overview,
    sentences,
    started,
)
from entropylens.analysis.rank_divergence import EQUAL, Parting
from entropylens.dictionary import definitions
from entropylens.figures.axes import Axis
from entropylens.figures.drawing import Drawn, Span, draw, figure
from entropylens.figures.panels import PANELS, Panel, unit_of
from entropylens.store.layout import write_atomically
from entropylens.store.reader import Run

__all__ = ["write_report"]

_TEMPLATE: Final = Path(__file__).with_name("report.html")
_EVENTS: Final = 40
_SHOWN: Final = ("question", "formula", "unit", "estimator", "high", "low", "source")


def write_report(run: Run, path: str | Path) -> Path:
    """Write the report of a run: one HTML file that opens offline, in light and dark.

    Loss, entropy band, learning rate, gradient norm, throughput, what happened in sentences, why
    the entropy moved, what the reward owes to it, the tokens that changed most, the highest-loss
    samples, and the log's events.

    Args:
        run: Finished or still being written.
        path: The file; an older one is replaced, at once and whole.

    Returns:
        The file's path.
    """
    found = read_overview(run)
    figures = dict(_figures(found))
    changes = {} if found.changes is None else change_figures(found.changes)
    laws = {} if found.policy is None else law_figures(found.policy)
    sections = [*_ranks(found), *_pictures(figures)]
    sections += [*_changes(found, changes), *_policy(found, laws)]
    pictures = {key: picture for key, (_, _, picture) in figures.items()}
    page = Template(_TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"{run.name}: entropylens report"),
        name=escape(run.name),
        state=escape(found.state),
        facts=_facts(found),
        sentences="".join(f"<li>{escape(sentence)}</li>" for sentence in sentences(found)),
        sections="\n".join([*sections, *_tables(found)]),
        footer=escape(
            f"Written by entropylens {entropylens.__version__} from {run.path} "
            f"(run {run.run_id[:8]}). Everything on this page is in the log beside it."
        ),
        plotly=get_plotlyjs(),
        figures=_as_script(pictures | changes | laws),
    )
    target = Path(path)
    write_atomically(target, page.encode("utf-8", "replace"))
    return target


Picture = tuple[str, Sequence[str], dict[str, Any]]
"""A title, the metrics drawn, and the figure."""


def _figures(found: Overview) -> Iterator[tuple[str, Picture]]:
    spans = _spans(found)
    axis = Axis(within=(0, found.last_step * 1.01))
    for panel in PANELS:
        drawn = list(_drawn(found, panel))
        if drawn:
            names = list(dict.fromkeys(one.shown.name for one in drawn))
            picture = figure(
                drawn,
                unit=unit_of(names[-1]),
                axis=axis,
                logarithmic=panel.logarithmic,
                reference=panel.reference,
                spans=spans,
            )
            picture["layout"]["height"] = 300
            yield panel.key, (panel.title, names, picture)


def _drawn(found: Overview, panel: Panel) -> Iterator[Drawn]:
    for shown in panel.series:
        curves = found.curves_of(shown.phase)
        if shown.name in curves:
            curve = curves[shown.name]
            yield draw(shown, curve.steps, curve.values, key=shown.name)


def _spans(found: Overview) -> list[Span]:
    worst = sorted(found.spikes, key=lambda s: s.start)[:12]
    return [
        Span(s.start - 0.5, (s.end or found.last_step) + 0.5, "loss out of range") for s in worst
    ]


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


def _ranks(found: Overview) -> Iterator[str]:
    if found.ranks is None or not found.ranks.partings:
        return
    note = (
        "Norms that are the same on all ranks where each holds the whole model. Spread is the "
        "largest (max - min) / |median| of a step; above 1e-4 ranks differ."
    )
    heads = ["norm", "since step", "same up to", "ranks that are off", "spread", "steps"]
    heads.append("values in the first of them")
    rows = [_parting(one) for one in found.ranks.partings]
    yield _table("Norms that differ between ranks", note, heads, rows)


def _parting(one: Parting) -> list[str]:
    values = [f"{rank}:&nbsp;{value:.6g}" for rank, value in sorted(one.values.items())]
    return [
        escape(f"{EQUAL[one.name]} {one.module}".strip()),
        f"{one.since:,}",
        "never" if one.agreed is None else f"{one.agreed:,}",
        ", ".join(map(str, one.ranks)) or "unknown",
        number(one.spread),
        f"{one.differing:,} of {one.compared:,}",
        ", ".join([*values[:8], *["…"] * (len(values) > 8)]),
    ]


def _changes(found: Overview, figures: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    changes = found.changes
    if changes is None:
        return
    names = [name for name, _ in ESTIMATES.values()]
    names = ["entropy/change/measured", *(name for name in names if name in found.curves)]
    yield _section("Why the entropy moved", change_sentences(changes), figures, _explained(names))
    heads = ["estimate", "steps", "correlation", "95 %", "rank correlation", "slope", "95 %"]
    heads += ["y = x explains", "over states"]
    note = (
        "Measured change of the entropy in a step against each estimate's mean over the step. "
        "exact is the derivative along the whole update, at the states that are measured; the "
        "others know each token's own numbers only, are means over the tokens learned from, and "
        "have a unit of their own: nats per unit logit step. natural_gradient, clip_b and "
        "token_covariance are covariance/within, policy_gradient and total, with the sign turned, "
        "without clipping and importance ratio. The last column correlates the states of one step, "
        "median."
    )
    rows = [[escape(cell).replace(" ", "&nbsp;") for cell in row] for row in change_rows(changes)]
    yield _table("What foretells the change of the entropy", note, heads, rows)
    kinds = (("Tokens", "token", changes.tokens), ("Samples", "sample", changes.samples))
    for title, kind, parts in kinds:
        if parts:
            note = (
                f"Predicted changes of the entropy where the {kind} stands, summed over the up to "
                f"16 states of each measured update that it changes most: a selection of extremes, "
                f"not a share of the whole."
            )
            heads = [kind, "sum, nats", "a state", "states"]
            yield _table(f"{title} where updates move the entropy most", note, heads, _rows(parts))


def _rows(parts: Sequence[Part]) -> list[list[str]]:
    return [
        [
            _code(part.name),
            f"{part.change:+.3g}",
            f"{part.change / part.count:+.2g}",
            f"{part.count:,}",
        ]
        for part in parts
    ]


def _policy(found: Overview, laws: Mapping[str, dict[str, Any]]) -> Iterator[str]:
    if found.policy is None:
        return
    yield _section("Entropy and reward", law_sentences(found.policy), laws)
    heads = ["known", "forecast", "interval", "happened", "inside", "error (steps)"]
    heads += ["if it stayed as it was", "by a straight line"]
    rows = [[escape(cell) for cell in row] for row in score_rows(found.policy)]
    if rows:
        note = (
            "The run replayed: when would entropy have been expected to fall below 0.1 nats, from "
            "what was known then? Errors in steps, counted up to the end of the run; the last two "
            "columns are the errors of rivals that know less."
        )
        yield _table("Forecasts of the end of entropy", note, heads, rows)


def _section(title: str, said: Sequence[str], keys: Iterable[str], more: str = "") -> str:
    """A section of sentences and figures; ``more`` is HTML."""
    words = "".join(f"<p>{escape(sentence)}</p>" for sentence in said)
    plots = "".join(f'<figure><div class="plot" id="{key}"></div></figure>' for key in keys)
    return f"<section><h2>{escape(title)}</h2>{words}{plots}{more}</section>"


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


def _as_script(figures: Mapping[str, dict[str, Any]]) -> str:
    """Figures as JSON that may stand in a script: no tag can begin or end in it."""
    text = json.dumps(figures, cls=PlotlyJSONEncoder, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
