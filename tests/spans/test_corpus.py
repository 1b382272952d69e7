"""Text files to token documents: formats, offsets, tokenizers, errors; and on to an index."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers", reason="needs the extra [corpus]")

import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from alignops.spans import corpus
from alignops.spans.corpus import TextDocument
from alignops.spans.tokenizer import (
    ByteTokenizer,
    FastTokenizer,
    TextTokenizer,
    load_tokenizer,
    word_starts,
)

TEXT = "naïve 龍 rivers run to the 🌊 sea.\r\n\nNo\ttabs!"


def byte_level(texts: list[str] | None = None) -> tokenizers.Tokenizer:
    """A small BPE over bytes, such as GPT-2 and SmolLM2 have."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts or [TEXT, "to the sea, to the rivers"], trainer)
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """A small unigram model with marked spaces, such as Llama 2 and T5 have."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    tokenizer.decoder = tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False
    )
    tokenizer.train_from_iterator(["rivers run to the sea, to the rivers run the seas"], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def lossless(request: pytest.FixtureRequest) -> TextTokenizer:
    return ByteTokenizer() if request.param == "bytes" else FastTokenizer(byte_level())


# Tokenizers


@given(text=st.text())
def test_pieces_join_to_the_text(lossless: TextTokenizer, text: str) -> None:
    encoded = lossless.encode([text], byte_offsets=True)[0]
    pieces = lossless.pieces(encoded.ids.tolist())
    assert len(pieces) == len(encoded.ids)
    assert "".join(pieces) == text == lossless.decode(encoded.ids.tolist())


@given(text=st.text())
def test_byte_offsets_point_into_the_text(lossless: TextTokenizer, text: str) -> None:
    ids, offsets = lossless.encode([text], byte_offsets=True)[0]
    assert offsets is not None
    raw = text.encode()
    assert offsets.dtype == np.uint32
    assert (np.diff(offsets.astype(int)) >= 0).all()
    assert all(o < len(raw) for o in offsets)
    assert lossless.encode([text])[0].ids.tolist() == ids.tolist()


def test_byte_offsets_of_words() -> None:
    tokenizer = FastTokenizer(byte_level())
    ids, offsets = tokenizer.encode([TEXT], byte_offsets=True)[0]
    assert offsets is not None
    place = TEXT.encode().index(b"rivers")
    token = int(np.searchsorted(offsets, place, "right")) - 1
    assert "".join(tokenizer.pieces(ids.tolist())[token:]).lstrip().startswith("rivers")


def test_pieces_of_slices_begin_with_their_space() -> None:
    tokenizer = FastTokenizer(metaspace())
    ids = tokenizer.encode(["to the rivers"])[0].ids.tolist()
    pieces = tokenizer.pieces(ids)
    assert "".join(pieces) == "to the rivers"
    assert [piece for piece in pieces if piece.startswith(" ")] != []


def test_pieces_of_broken_characters_end() -> None:
    tokenizer = ByteTokenizer()
    assert "".join(tokenizer.pieces([0xE2, 0x82])) == "\ufffd"
    bpe = FastTokenizer(byte_level())
    half = bpe.encode(["ж"])[0].ids.tolist()[:1]
    assert "".join(bpe.pieces(half * 9)).count("\ufffd") == 9


def test_fingerprint_is_of_the_vocabulary_only(tmp_path: Path) -> None:
    tokenizer = byte_level()
    first = FastTokenizer(tokenizer)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    assert FastTokenizer(tokenizer).fingerprint == first.fingerprint
    assert first.fingerprint.startswith("sha256:")
    assert len(first.encode([TEXT])[0].ids) > 4
    first.save(tmp_path / "tokenizer.json")
    for source in (tmp_path, tmp_path / "tokenizer.json", str(tmp_path)):
        assert load_tokenizer(source).fingerprint == first.fingerprint
    assert load_tokenizer(first) is first
    tokenizer.add_tokens(["new"])
    assert FastTokenizer(tokenizer).fingerprint != first.fingerprint
    assert FastTokenizer(tokenizer).vocab_size == first.vocab_size + 1


def test_tokenizer_of_transformers() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    backend = byte_level()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert load_tokenizer(fast).fingerprint == FastTokenizer(backend).fingerprint


def test_byte_level_is_kept_in_a_file(tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "tokenizer.json")
    assert isinstance(load_tokenizer(tmp_path), ByteTokenizer)
    assert isinstance(load_tokenizer("bytes"), ByteTokenizer)


def test_what_is_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="is no tokenizer"):
        load_tokenizer(tmp_path)
    with pytest.raises(TypeError, match="got int"):
        load_tokenizer(3)


def test_word_starts() -> None:
    assert word_starts([]).tolist() == []
    assert word_starts(["a", "b", "", " c", "-", "d", "é"]).tolist() == [
        True, False, True, True, True, True, False,
    ]  # fmt: skip


# Files


def test_find_files_in_order_and_once(tmp_path: Path) -> None:
    for name in ("b/x.txt", "b/a/y.md", "a.jsonl", "c.bin"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [str(p.relative_to(tmp_path)) for p in corpus.find_files([tmp_path])]
    assert names == ["a.jsonl", "b/a/y.md", "b/x.txt"]
    explicit = corpus.find_files([tmp_path / "c.bin", tmp_path / "c.bin", f"{tmp_path}/**/*.txt"])
    assert [p.name for p in explicit] == ["c.bin", "x.txt"]
    assert [p.name for p in corpus.find_files([tmp_path], ["*.bin"])] == ["c.bin"]
    for missing in (tmp_path / "none", f"{tmp_path}/*.none"):
        with pytest.raises(FileNotFoundError, match="names no file"):
            list(corpus.find_files([missing]))
    with pytest.raises(FileNotFoundError, match=r"that matches \*\.c"):
        list(corpus.find_files([tmp_path], ["*.c"]))


def read(path: Path, **options: str) -> list[TextDocument]:
    return list(corpus.read_documents([path], **options))  # type: ignore[arg-type]


def test_text_as_file_paragraphs_and_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\n\n \n\nthree\x0c3\n")
    source = str(path)
    assert read(path) == [TextDocument("one\r\ntwo\n\n \n\nthree\x0c3\n", {"source": source})]
    assert read(path, split="paragraph") == [
        TextDocument("one\r\ntwo", {"source": source, "line": 1}),
        TextDocument("three\x0c3", {"source": source, "line": 6}),
    ]
    assert read(path, split="line") == [
        TextDocument("one", {"source": source, "line": 1}),
        TextDocument("two", {"source": source, "line": 2}),
        TextDocument("three\x0c3", {"source": source, "line": 6}),
    ]
    with gzip.open(tmp_path / "a.txt.gz", "wb") as file:
        file.write(path.read_bytes())
    assert read(tmp_path / "a.txt.gz")[0].text == read(path)[0].text
    path.write_text(" \n")
    assert read(path) == []


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.txt"
    path.write_bytes("naïve".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.txt: not UTF-8: byte 2"):
        read(path)
    assert read(path, errors="skip") == []
    assert read(path, errors="replace")[0].text == "na\ufffdve"


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"body": "one", "url": "u", "n": 1}, {"body": "", "n": None}]
    path.write_text("\n\n".join(map(json.dumps, lines)))
    found = list(corpus.read_documents([path], field="body", meta_fields=["url", "n"]))
    assert found == [
        TextDocument("one", {"source": str(path), "line": 1, "url": "u", "n": 1}),
        TextDocument("", {"source": str(path), "line": 3, "n": None}),
    ]
    for content, message in (
        ('{"text": "a"}\n{"text"', "a.jsonl:2: not JSON"),
        ('{"text": 3}', "a.jsonl:1: no text in the field 'text'"),
        ("[1]", "a.jsonl:1: no text in the field 'text'"),
        ('{"text": "\\ud800"}', "a.jsonl:1: the text holds half a surrogate pair"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            read(path)
    assert read(path, errors="skip") == []
    assert read(path, errors="replace")[0].text == "\ufffd"


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow", reason="needs the extra [corpus]")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs the extra [corpus]")
    path = tmp_path / "a.parquet"
    texts = [f"text {i}" for i in range(3000)]
    parquet.write_table(arrow.table({"text": texts, "n": list(range(3000))}), path)
    found = list(corpus.read_documents([path], meta_fields=["n", "none"]))
    assert [d.text for d in found] == texts
    assert found[2999].meta == {"source": str(path), "row": 2999, "n": 2999}
    with pytest.raises(ValueError, match="no column 'body' among text, n"):
        read(path, field="body")
    with pytest.raises(ValueError, match="row 0: no text in the column 'n'"):
        read(path, field="n")
    path.write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"a\.parquet: not a Parquet file"):
        read(path)


@pytest.mark.parametrize("name", ["format", "split", "errors"])
def test_unknown_choices(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'x'"):
        list(corpus.read_documents([], **{name: "x"}))  # type: ignore[arg-type]


def test_tokenise_streams_in_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_BATCH", 10)
    taken = []

    def documents() -> "corpus.Iterator[TextDocument]":
        for i in range(9):
            taken.append(i)
            yield TextDocument("abcd", {"n": i})

    stream = corpus.tokenise(documents(), ByteTokenizer(), byte_offsets=True)
    first = next(stream)
    assert taken == [0, 1, 2]
    assert first.ids.tolist() == [97, 98, 99, 100]
    assert first.byte_offsets is not None
    assert first.byte_offsets.tolist() == [0, 1, 2, 3]
    assert [d.meta["n"] for d in stream] == list(range(1, 9))


def test_build_corpus_keeps_text_metadata_and_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text("to the sea")
    tokenizer = FastTokenizer(byte_level())
    documents = corpus.read_documents(corpus.find_files([tmp_path]))
    report = corpus.build_corpus(documents, tmp_path / "index", tokenizer, byte_offsets=True)
    assert report.n_docs == 2
    assert load_tokenizer(report.path).fingerprint == tokenizer.fingerprint


def test_build_corpus_stops_at_a_number_of_tokens(tmp_path: Path) -> None:
    documents = [TextDocument("abcd", {"n": i}) for i in range(9)]
    report = corpus.build_corpus(documents, tmp_path / "index", ByteTokenizer(), max_tokens=10)
    assert (report.n_docs, report.n_tokens) == (3, 12)
