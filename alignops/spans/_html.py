"""The page of a trace: one file without scripts and without anything from elsewhere.

All of it is readable without style sheets, in the order of the source. Everything that came from a
model, a document or a file name is escaped; a content security policy forbids scripts and requests
all the same. Pointing at a span uses CSS alone: `:hover` shows what is known about it, a link opens
the `<details>` of its documents.
"""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from alignops.spans._shades import LEVELS, level, segments, visible

if TYPE_CHECKING:
    from alignops.spans.report import (
        IndexIdentity,
        Source,
        TracedCompletion,
        TracedSpan,
        TraceReport,
    )

_TIP = 200  # characters of text in the panel that appears under the pointer


def render(report: TraceReport) -> str:
    """The page as text."""
    template = Template(
        resources.files("alignops.spans").joinpath("report.html").read_text(encoding="utf-8")
    )
    most = max((len(c.spans) for c in report.completions), default=0)
    linked = ", ".join(
        f"article:has(.s{i}:hover, .s{i}:focus-visible, .s{i} :target) .seg.s{i}"
        for i in range(most)
    )
    return template.substitute(
        title=_escape(report.title),
        lede=_escape(report.note) or _lede(report),
        linked=linked or ".none",
        facts=_facts(report),
        contents="\n".join(_contents(c, n, report) for n, c in enumerate(report.completions, 1)),
        legend=_legend(report.threshold),
        completions="\n".join(
            _completion(c, n, report.threshold) for n, c in enumerate(report.completions, 1)
        ),
        parameters=_table("Parameters", (), ((k, str(v)) for k, v in report.parameters.items())),
        indexes=_table("Indexes", (), _index_rows(report.indexes)),
        footer=f"Written by alignops, {_escape(report.created)}. This file loads nothing.",
    )


def _escape(text: str) -> str:
    return html.escape(visible(text))


def _lede(report: TraceReport) -> str:
    return (
        "Shaded words occur one after another in the indexed documents. The stronger the shade, "
        "the less likely that is by chance. Point at a span for its figures, click it for its "
        "documents."
    )


def _verdict(completion: TracedCompletion) -> str:
    if completion.refused is None:
        return '<span class="verdict clear">traced</span>'
    if completion.refused:
        return '<span class="verdict flagged"><span aria-hidden="true">▲</span> refused</span>'
    return '<span class="verdict clear"><span aria-hidden="true">○</span> passed</span>'


def _facts(report: TraceReport) -> str:
    completions = report.completions
    tokens = sum(len(c.pieces) - c.prompt for c in completions)
    covered = sum(
        end - start for c in completions for start, end, over in segments(c) if over
    ) / max(tokens, 1)
    highest = max((r for c in completions for r in c.risk.values()), default=0.0)
    indexed = sum(index.tokens for index in report.indexes)
    facts = {
        "completions": str(len(completions)),
        "refused": str(sum(bool(c.refused) for c in completions)),
        "tokens traced": f"{tokens:,}",
        "of them in spans": f"{min(covered, 1):.0%}",
        "highest risk": f"{highest:.1f}",
        "threshold": f"{report.threshold:g}",
        "tokens indexed": f"{indexed:,}",
    }
    return "\n".join(f"<div><dt>{k}</dt><dd>{v}</dd></div>" for k, v in facts.items())


def _strip(completion: TracedCompletion, threshold: float) -> str:
    """The completion as a line of shades, a token per unit; flagged spans are underlined."""
    size = max(len(completion.pieces) - completion.prompt, 1)
    parts = []
    for start, end, over in segments(completion):
        if over and start >= completion.prompt:
            span = completion.spans[over[0]]
            x, width = start - completion.prompt, end - start
            shade = level(span.score, threshold)
            parts.append(f'<rect class="v{shade}" x="{x}" width="{width}" height="10"/>')
            if any(completion.spans[i].state == "flagged" for i in over):
                style = "fill:var(--flag)"
                parts.append(f'<rect style="{style}" x="{x}" y="8" width="{width}" height="2"/>')
    return (
        f'<svg class="strip" viewBox="0 0 {size} 10" preserveAspectRatio="none" '
        f'shape-rendering="crispEdges" aria-hidden="true">{"".join(parts)}</svg>'
    )


def _contents(completion: TracedCompletion, number: int, report: TraceReport) -> str:
    return (
        f'<li><a href="#c{number}"><b>{number}. {_escape(completion.title)}</b>'
        f"{_strip(completion, report.threshold)}{_verdict(completion)}</a></li>"
    )


def _legend(threshold: float) -> str:
    bounds = [f"{bound * threshold:g}" for bound in LEVELS]
    names = [f"≤ {bounds[0]}", *(f"&gt; {bound}" for bound in bounds)]
    keys = "".join(
        f'<li><span class="key v{shade}">{name}</span></li>' for shade, name in enumerate(names)
    )
    return (
        f"<span>Score of a span (BCI, nats)</span><ul>{keys}</ul><ul>"
        '<li><span class="key flagged-span">solid line</span> flagged</li>'
        '<li><span class="key excused-span">dotted line</span> above the threshold, '
        "not flagged</li>"
        "</ul>"
    )


def _completion(completion: TracedCompletion, number: int, threshold: float) -> str:
    cards = "\n".join(_card(completion, i, number, threshold) for i in range(len(completion.spans)))
    omitted = f"<p>{completion.omitted} more of smaller BCI.</p>" if completion.omitted else ""
    risk = ""
    if completion.refused is not None:
        risk = f"""<section class="risk"><h3>Risk per category</h3>
{_risk(completion.risk, threshold)}
</section>"""
    note = f'<p class="note">{_escape(completion.note)}</p>' if completion.note else ""
    reason = f" ({_escape(completion.reason)})" if completion.reason else ""
    rows = (_span_row(completion, i, number, threshold) for i in range(len(completion.spans)))
    heads = ("span", "tokens", "count", "BCI", "lift", "category", "verdict")
    table = (
        _table("", heads, rows, numbers=(1, 2, 3, 4), raw=True)
        if completion.spans
        else ("<p>No span of the minimum length occurs in the indexed documents.</p>")
    )
    return f"""<article id="c{number}" aria-labelledby="t{number}">
<header><h2 id="t{number}">{number}. {_escape(completion.title)}</h2>
<div>{_verdict(completion)}{reason}</div></header>
{note}
<div class="columns">
<div>
<h3>Completion</h3>
<p class="text" dir="auto">{_text(completion, number, threshold)}</p>
{risk}
<section><h3>Spans</h3>
<div class="scroll">{table}</div>{omitted}
</section>
</div>
<section class="side" aria-label="Documents of the spans"><h3>Documents</h3>
{cards or "<p>None.</p>"}
</section>
</div>
</article>"""


def _text(completion: TracedCompletion, number: int, threshold: float) -> str:
    parts = []
    for start, end, over in segments(completion):
        text = _escape("".join(completion.pieces[start:end]))
        if over:
            span = completion.spans[over[0]]
            states = {completion.spans[i].state for i in over}
            marks = ["seg", f"v{level(span.score, threshold)}", *(f"s{i}" for i in over)]
            marks += [f"{s}-span" for s in ("flagged", "excused") if s in states][:1]
            text = (
                f'<a class="{" ".join(marks)}" href="#c{number}s{over[0]}" '
                f'data-tip="{_escape(_tip(span))}">{text}</a>'
            )
        parts.append(f'<span class="prompt">{text}</span>' if start < completion.prompt else text)
    return "".join(parts)


def _tip(span: TracedSpan) -> str:
    lines = [
        f"BCI {span.bci:.1f} nats · {span.end - span.start} tokens · {_times(span.count)} · "
        f"lift {span.lift:+.1f} · {span.category} · {span.state}"
    ]
    if span.sources:
        source = span.sources[0]
        around = f"{source.before[-_TIP // 2 :]}⟦{source.match[:_TIP]}⟧{source.after[: _TIP // 2]}"
        lines += [source.name, f"… {' '.join(around.split())} …"]
    return "\n".join(lines)


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count:,} times"


def _risk(risk: dict[str, float], threshold: float) -> str:
    most = 1.1 * max([threshold, *risk.values()], default=1.0) or 1.0
    rows = []
    for category, value in risk.items():
        over = value > threshold
        bar = (
            f'<span class="bar" role="img" aria-label="{value:.1f} of threshold {threshold:g}">'
            f'<i class="{"over" if over else ""}" style="width:{100 * value / most:.2f}%"></i>'
            f'<u style="left:{100 * threshold / most:.2f}%"></u></span>'
        )
        side = "above" if over else "not above"
        rows.append((_escape(category), bar, f"{value:.1f}", f"{side} {threshold:g}"))
    return _table("", ("category", "", "risk", "threshold"), rows, numbers=(2,), raw=True)


def _span_row(
    completion: TracedCompletion, index: int, number: int, threshold: float
) -> tuple[str, ...]:
    span = completion.spans[index]
    words = " ".join("".join(completion.pieces[span.start : span.end]).split())
    return (
        f'<a href="#c{number}s{index}">{_escape(words)}</a>',
        str(span.end - span.start),
        f"{span.count:,}",
        f'<span class="key v{level(span.score, threshold)}">{span.bci:.1f}</span>',
        f"{span.lift:+.1f}",
        _escape(span.category),
        span.state,
    )


def _card(completion: TracedCompletion, index: int, number: int, threshold: float) -> str:
    span = completion.spans[index]
    first = index == max(
        range(len(completion.spans)), key=lambda i: completion.spans[i].score, default=0
    )
    text = _escape("".join(completion.pieces[span.start : span.end]).strip("\n"))
    sources = "\n".join(_source(source) for source in span.sources)
    shown = len(span.sources)
    more = f"<p class=figures>{span.count - shown:,} more places.</p>" if span.count > shown else ""
    figures = (
        f"BCI <b>{span.bci:.1f}</b>",
        f"{span.end - span.start} tokens",
        _times(span.count),
        f"lift {span.lift:+.1f}",
        _escape(span.category),
        f'<span class="{span.state}">{span.state}</span>',
    )
    return f"""<details class="card s{index}"{" open" if first else ""}>
<summary><q class="v{level(span.score, threshold)}">{text}</q>
<span class="figures">{" ".join(f"<span>{figure}</span>" for figure in figures)}</span></summary>
<div class="docs" id="c{number}s{index}">
{sources}{more}
</div>
</details>"""


def _source(source: Source) -> str:
    place = f"document {source.document}, token {source.offset:,}"
    if source.byte_offset is not None:
        place += f", byte {source.byte_offset:,}"
    return (
        f"<figure><figcaption>{_escape(source.name)} <small>({place})</small></figcaption>"
        f'<blockquote dir="auto">{_escape(source.before)}<mark>{_escape(source.match)}</mark>'
        f"{_escape(source.after)}</blockquote></figure>"
    )


def _index_rows(indexes: Iterable[IndexIdentity]) -> Iterable[tuple[str, str]]:
    for index in indexes:
        facts = [
            f"{index.tokens:,} tokens in {index.documents:,} documents, {index.shards} shards, "
            f"{index.vocab_size:,} ids",
            f"UUID {index.uuid}",
            f"tokenizer {index.fingerprint or 'unknown'}",
            index.path,
        ]
        if index.severity != 1:
            facts.insert(0, f"severity {index.severity:g}")
        yield index.role, "\n".join(facts)


def _table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[str]],
    numbers: Sequence[int] = (),
    raw: bool = False,
) -> str:
    """A table; the first cell of a row heads it if there are no column heads.

    Args:
        caption: "" for none.
        heads: of the columns, possibly none.
        rows: cells: text, or HTML if `raw`.
        numbers: columns that are set flush right.
        raw: do not escape the cells.
    """

    def cell(column: int, content: str, tag: str) -> str:
        if not raw:
            content = _escape(content).replace("\n", "<br>")
        kind = ' class="n"' if column in numbers else ""
        if not kind and heads and heads[column] == "span" and tag == "td":
            kind = ' class="quote"'
        scope = {"th": ' scope="row"', "td": ""}[tag]
        return f"<{tag}{kind}{scope}>{content}</{tag}>"

    lines = [f"<caption>{_escape(caption)}</caption>"] if caption else []
    if heads:
        cells = (
            f'<th scope="col"{" class=n" if i in numbers else ""}>{_escape(name)}</th>'
            for i, name in enumerate(heads)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    for row in rows:
        tags = ["td" if heads or i else "th" for i in range(len(row))]
        cells = (cell(i, text, tag) for i, (text, tag) in enumerate(zip(row, tags, strict=True)))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table>{''.join(lines)}</table>"
