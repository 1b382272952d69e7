"""The report of a trace as a page and in a terminal, without index and tokenizer."""

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from alignops.spans import _html, _shades
from alignops.spans.report import (
    IndexIdentity,
    Source,
    TracedCompletion,
    TracedSpan,
    TraceReport,
)

HOSTILE = (
    "<script>alert(1)</script></style></article>\" onload='x' &amp; \x1b[31mred\x00 \u202e"
    ' <img src="https://example.org/x.png"> $title'
)
VOID = {"meta", "br", "img", "link", "rect"}


def span(start: int, end: int, score: float, state: str, **changes: object) -> TracedSpan:
    sources = [
        Source(7, 120, {"source": "/docs/a.txt", "line": 3}, "before ", "the match", " after", 512),
        Source(9, 4, {}, "", "the match", ""),
    ]
    made = TracedSpan(start, end, 5, score, score - 9.5, score, "fraud", state, sources)
    return replace(made, **changes)  # type: ignore[arg-type]


def report(completions: list[TracedCompletion] | None = None) -> TraceReport:
    words = [" one", " two", " three", " four", " five", " six", " seven", " eight", " nine"]
    first = TracedCompletion(
        "First",
        words,
        2,
        [span(2, 5, 60.0, "flagged"), span(4, 7, 30.0, "excused"), span(8, 9, 4.0, "below")],
        {"fraud": 60.0, "other": 0.0},
        refused=True,
        omitted=3,
        note="A note.",
    )
    index = IndexIdentity("fraud", "/i", "a-uuid", 1000, 10, 2, 300, "sha256:ab", severity=2.0)
    return TraceReport(
        "The title", [first] if completions is None else completions, 20.0, {"kind": "bci"},
        [index], "2026-11-25",
    )  # fmt: skip


def hostile() -> TraceReport:
    source = Source(1, 2, {"source": HOSTILE}, HOSTILE, HOSTILE, HOSTILE)
    bad = span(0, 2, 50.0, "flagged", category=HOSTILE, sources=[source])
    completion = TracedCompletion(
        HOSTILE, [HOSTILE, HOSTILE], 1, [bad], {HOSTILE: 50.0}, True, HOSTILE, 0, HOSTILE
    )
    index = IndexIdentity(HOSTILE, HOSTILE, HOSTILE, 1, 1, 1, 2, HOSTILE)
    return TraceReport(
        HOSTILE, [completion], 20.0, {HOSTILE: HOSTILE}, [index], HOSTILE, note=HOSTILE
    )


class Page(HTMLParser):
    """Elements of a page, and its text as a reader without style sheets meets it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.inside: dict[str, list[str]] = {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.inside.setdefault(tag, []).append(data)
        if "style" not in self.open and data.strip():
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_page_is_well_formed_and_loads_nothing() -> None:
    for made in (report(), hostile(), report([])):
        text = made.html()
        page = Page(text)
        names = {tag for tag, _ in page.elements}
        assert not names & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
        for _, attributes in page.elements:
            assert not [name for name in attributes if name.startswith("on") or name == "src"]
            assert attributes.get("href", "#").startswith("#")
        style = "".join(page.inside["style"])
        assert not re.search(r"url\(|@import|https?:|//", style)
        assert "default-src 'none'" in text


def test_links_have_targets_and_ids_are_unique() -> None:
    page = Page(report([report().completions[0]] * 3).html())
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {a["href"][1:] for _, a in page.elements if "href" in a}
    labels = {a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a}
    assert links | labels <= set(ids)


def test_text_reads_in_order_without_style() -> None:
    text = Page(report().html()).text
    parts = [
        "The title",
        "1. First",
        "▲ refused",
        "A note.",
        "one two three four five six seven eight nine",
        "Risk per category",
        "fraud 60.0 above 20",
        "Spans",
        "three four five 3 5 60.0 +50.5 fraud flagged",
        "nine 1 5 4.0 -5.5 fraud below",
        "3 more of smaller BCI.",
        "Documents",
        "/docs/a.txt, line 3 (document 7, token 120, byte 512)",
        "before the match after",
        "document 9",
        "3 more places",
        "kind bci",
        "1,000 tokens in 10 documents, 2 shards",
        "UUID a-uuid",
    ]
    place = 0
    for part in parts:
        found = text.find(part, place)
        assert found >= 0, (part, text)
        place = found


def test_every_span_is_shaded_listed_and_explained() -> None:
    page = Page(report().html())
    segments = [a for tag, a in page.elements if tag == "a" and "seg" in a.get("class", "")]
    classes = [a["class"].split() for a in segments]
    assert classes == [
        ["seg", "v3", "s0", "flagged-span"],
        ["seg", "v3", "s0", "s1", "flagged-span"],
        ["seg", "v2", "s1", "excused-span"],
        ["seg", "v0", "s2"],
    ]
    assert [a["href"] for a in segments] == ["#c1s0", "#c1s0", "#c1s1", "#c1s2"]
    assert segments[0]["data-tip"].startswith("BCI 60.0 nats · 3 tokens · 5 times · lift +50.5")
    assert "before ⟦the match⟧ after" in segments[0]["data-tip"]
    details = [a for tag, a in page.elements if tag == "details"]
    assert ["open" in a for a in details] == [True, False, False]
    assert "".join(page.inside["mark"]) == "the match" * 6


def test_hostile_text_is_only_text() -> None:
    made = hostile()
    page = Page(made.html())
    shown = _shades.visible(HOSTILE)
    assert page.text.count(" ".join(shown.split())) >= 8
    for character in "\x1b\x00\u202e":
        assert character not in made.html()


def test_segments_cut_at_spans_and_prompt() -> None:
    completion = report().completions[0]
    assert _shades.segments(completion) == [
        (0, 2, []), (2, 4, [0]), (4, 5, [0, 1]), (5, 7, [1]), (7, 8, []), (8, 9, [2]),
    ]  # fmt: skip
    assert _shades.segments(TracedCompletion("", [], 0, [], {}, None)) == []


@pytest.mark.parametrize(("score", "level"), [(0, 0), (10, 0), (10.1, 1), (20.1, 2), (1000, 5)])
def test_level(score: float, level: int) -> None:
    assert _shades.level(score, 20.0) == level


def test_without_verdict_nothing_is_judged() -> None:
    found = [span(0, 3, 60.0, "found")]
    completion = TracedCompletion("t", [" a", " b", " c"], 0, found, {"docs": 60.0}, None)
    text = Page(report([completion]).html()).text
    assert "refused" not in text.partition("1. t")[2]
    assert "passed" not in text
    assert "Risk" not in text
    assert "traced" in text


def test_save_replaces_the_file_or_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")
    monkeypatch.setattr(_html, "render", lambda report: "half \ud800")
    with pytest.raises(UnicodeEncodeError):
        report().save(path)
    assert path.read_text() == "old"
    monkeypatch.undo()
    report().save(path)
    assert path.read_text(encoding="utf-8") == report().html()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_terminal_shows_spans_risk_and_documents() -> None:
    rich = pytest.importorskip("rich.console", reason="needs the extra [cli]")
    console = rich.Console(width=120, record=True, force_terminal=True, color_system="truecolor")
    with console.capture() as capture:
        console.print(report())
    styled = capture.get()
    plain = re.sub(r"\x1b\[[0-9;]*m", "", styled)
    assert " one two three four five six seven eight nine" in plain
    assert "▲ refused" in plain
    assert re.search(r"risk +fraud 60\.0 +other 0\.0 +threshold 20", plain)
    assert re.search(r"three four five +3 +5 +60\.0 +\+50\.5 +flagged fraud +/docs/a\.txt, ", plain)
    assert "3 more of smaller BCI" in plain
    flagged = next(
        code
        for code, text in re.findall(r"\x1b\[([0-9;]+)m([^\x1b]*)", styled)
        if text == " three four"
    )
    assert flagged.startswith("4;30;48;2;")  # underlined, black on a shade


def test_terminal_output_cannot_be_steered() -> None:
    rich = pytest.importorskip("rich.console", reason="needs the extra [cli]")
    console = rich.Console(width=200, force_terminal=False)
    with console.capture() as capture:
        console.print(hostile())
    assert "\x1b" not in capture.get()
    assert "␛[31mred" in capture.get()
