"""`alignops spans` on small corpora of every format."""

import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="needs the extra [cli]")
pytest.importorskip("tokenizers", reason="needs the extra [corpus]")

from alignops.__main__ import command
from tests.spans.test_corpus import byte_level


def alignops(*arguments: str | Path, ok: bool = True) -> str:
    """What the command prints, run in this process."""
    output, code = io.StringIO(), None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["alignops", *map(str, arguments)])
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            try:
                command()
            except SystemExit as end:
                code = end.code
                print(code if isinstance(code, str) else "", end="\n" * isinstance(code, str))
    assert (not code) == ok, output.getvalue()
    return output.getvalue()


SENTENCE = "the wide river runs down to the old grey sea"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    for i in range(3):
        (folder / f"{i}.txt").write_text(f"Document {i}: {SENTENCE}, number {i}.\n")
    lines = [{"body": f"{SENTENCE} {i}", "id": i} for i in range(4)]
    (folder / "lines.jsonl").write_text("\n".join(map(json.dumps, lines)))
    byte_level([SENTENCE]).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def index(texts: Path) -> Path:
    output = alignops("spans", "build", texts, "--out", texts / "index", "--glob", "*.txt",
                      "--tokenizer", texts / "tokenizer.json", "--byte-offsets")  # fmt: skip
    assert re.search(r"index: \d+ tokens, 3 documents, 1 shard, ", output), output
    return texts / "index"


def one_line(output: str, start: str) -> None:
    """The output is one line that begins like this, and no traceback."""
    assert re.match(rf"alignops: {start}", output), output
    assert output.count("\n") == 1


def test_build_json_lines_as_bytes(texts: Path, tmp_path: Path) -> None:
    alignops("spans", "build", texts / "lines.jsonl", "--out", tmp_path / "index",
             "--tokenizer", "bytes", "--field", "body", "--meta", "id")  # fmt: skip
    facts = json.loads(alignops("spans", "info", tmp_path / "index", "--json"))
    assert (facts["documents"], facts["fingerprint"]) == (4, "bytes")
    entries = json.loads(alignops("spans", "count", tmp_path / "index", "grey sea 3", "--json"))
    assert (entries[0]["count"], entries[0]["tokens"]) == (1, 10)


def test_remove(texts: Path, tmp_path: Path) -> None:
    folder = tmp_path / "index"
    alignops("spans", "build", texts / "lines.jsonl", "--out", folder,
             "--tokenizer", "bytes", "--field", "body", "--meta", "id")  # fmt: skip
    size = len(f"{SENTENCE} 0")
    output = alignops("spans", "remove", folder, "1", "--meta", "id=3", "--dry-run")
    assert f"2 documents of {2 * size} tokens would be removed" in output
    assert json.loads(alignops("spans", "info", folder, "--json"))["removed_documents"] == 0
    output = alignops("spans", "remove", folder, "1", "--meta", "id=3")
    assert f"removed 2 documents of {2 * size} tokens; 2 are removed in all" in output
    facts = json.loads(alignops("spans", "info", folder, "--json"))
    assert (facts["documents"], facts["removed_documents"]) == (4, 2)
    assert facts["tokens"] == 2 * size
    entries = json.loads(alignops("spans", "count", folder, SENTENCE, "sea 3", "--json"))
    assert [entry["count"] for entry in entries] == [2, 0]
    assert "intact" in alignops("spans", "verify", folder)
    assert "removed 0 documents of 0 tokens" in alignops("spans", "remove", folder, "1")
    for arguments, text in (
        ((), "nothing to remove"),
        (("4",), "none is 4"),
        (("--meta", "id"), "takes KEY=VALUE"),
        (("--meta", "id=3"), "no document has id=3"),
    ):
        assert text in alignops("spans", "remove", folder, *arguments, ok=False)


def test_build_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra [corpus]")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [corpus]")
    parquet.write_table(arrow.table({"text": [SENTENCE, SENTENCE]}), tmp_path / "a.parquet")
    alignops("spans", "build", f"{tmp_path}/*.parquet", "--out", tmp_path / "index",
             "--tokenizer", "bytes", "--shard-tokens", "60")  # fmt: skip
    facts = json.loads(alignops("spans", "info", tmp_path / "index", "--json"))
    assert (facts["documents"], facts["shards"]) == (2, 2)


def test_info_verify_and_count(index: Path) -> None:
    info = alignops("spans", "info", index)
    assert re.search(r"fingerprint +sha256:", info)
    assert "index: intact, " in alignops("spans", "verify", index)
    output = alignops("spans", "count", index, " river runs", " river rins")
    assert re.search(r"^ +3  \d tokens, BCI \d+\.\d nats  ' river runs'$", output, re.M)
    assert re.search(r"^ +0  \d tokens, .*; the first \d occur  ' river rins'$", output, re.M)


def test_module_is_the_same_command(index: Path) -> None:
    module = [sys.executable, "-m", "alignops.spans", "info", index]
    result = subprocess.run(module, capture_output=True, text=True, check=True)
    assert result.stdout == alignops("spans", "info", index)


def test_errors_are_one_line(index: Path, texts: Path, tmp_path: Path) -> None:
    tokenizer = ("--tokenizer", "bytes")
    build = ("spans", "build", texts, "--out")
    one_line(alignops(*build, index, *tokenizer, ok=False), r"\[Errno 17\]")
    source = ("spans", "build", tmp_path / "none", "--out", tmp_path / "x")
    one_line(alignops(*source, *tokenizer, ok=False), "find_files: .*none names no file")
    one_line(alignops(*build, tmp_path / "x", "--tokenizer", texts / "0.txt", ok=False), "load_tok")
    one_line(alignops(*build, tmp_path / "x", *tokenizer, "--format", "xml", ok=False), "read_doc")
    one_line(alignops("spans", "info", tmp_path / "none", ok=False), r"\[Errno 2\]")
    one_line(alignops("spans", "count", texts, "a", ok=False), ".*index.json is missing")
    one_line(alignops("spans", "count", index, "a", *tokenizer, ok=False), ".*fingerprint must be")


def test_damaged_index_is_one_line(texts: Path, tmp_path: Path) -> None:
    alignops("spans", "build", texts / "0.txt", "--out", tmp_path / "i", "--tokenizer", "bytes")
    (tmp_path / "i" / "tokenizer.json").unlink()
    one_line(alignops("spans", "count", tmp_path / "i", "a", ok=False), ".*built from token ids")
    data = bytearray((tmp_path / "i" / "suf.0").read_bytes())
    data[4096 + 5] ^= 1
    (tmp_path / "i" / "suf.0").write_bytes(data)
    one_line(alignops("spans", "verify", tmp_path / "i", ok=False), r".*suf\.0")


@pytest.fixture(scope="module")
def traced(index: Path, texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two completions as JSON lines: one that repeats a document, one that does not."""
    lines = [
        {"prompt": "Tell me about it.", "completion": f"Well, {SENTENCE}, number 2.", "title": "A"},
        {"completion": "q x z j"},
    ]
    path = tmp_path_factory.mktemp("trace") / "completions.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_trace_prints_and_writes_a_page_and_data(index: Path, traced: Path, tmp_path: Path) -> None:
    page, data = tmp_path / "report.html", tmp_path / "report.json"
    output = alignops("spans", "trace", f"rivers={index}:2", traced, "--tau", "4", "--min-len",
                      "4", "--html", page, "--json", data)  # fmt: skip
    assert "rivers" in output
    assert f"{page} has the documents" in output.replace("\n", "")
    first, second = json.loads(data.read_text())["completions"]
    assert (first["title"], first["refused"], second["refused"]) == ("A", True, False)
    (span,) = (s for s in first["spans"] if s["state"] == "flagged")
    text = "".join(first["pieces"][span["start"] : span["end"]])
    assert f"{SENTENCE}, number 2." in text
    assert span["sources"][0]["meta"]["source"].endswith("2.txt")
    assert span["category"] == "rivers"
    assert span["score"] == pytest.approx(2 * span["bci"])
    assert not second["spans"]
    assert SENTENCE in page.read_text()


def test_trace_of_a_text_on_the_command_line(index: Path) -> None:
    words = ("spans", "trace", index, "--text", f"{SENTENCE}, number 1.", "--tau", "4")
    assert "refused" in alignops(*words, "--min-len", "4")
    assert "refused" not in alignops(*words, "--min-len", "4", "--no-verdict")
    assert "refused" not in alignops(*words, "--min-len", "4", "--allow", index)


def test_errors_of_trace_are_one_line(index: Path, tmp_path: Path) -> None:
    output = alignops("spans", "trace", index, ok=False)
    assert "nothing to trace" in output
    one_line(alignops("spans", "trace", tmp_path / "none", "--text", "a", ok=False), r"\[Errno 2\]")
    one_line(alignops("spans", "trace", index, "--text", "a", "--tau", "-1", ok=False), "TraceSh")
