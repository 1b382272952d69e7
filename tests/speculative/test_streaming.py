"""Streams: what a streamer is called with, for callables and for streamers of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from alignops.speculative.streaming import Stream

PROMPTS = [torch.tensor([1, 2, 3]), torch.tensor([4])]


def test_nothing_comes_after_the_end() -> None:
    calls: list[tuple[int, list[int], bool]] = []
    stream = Stream(lambda *new: calls.append(new), PROMPTS)
    stream.emit(1, [5, 6])
    stream.emit(0, [7], finished=True)
    stream.emit(0, [8])
    stream.emit(0, [], finished=True)
    stream.emit(1, [])
    stream.emit(1, [], finished=True)
    assert calls == [(1, [5, 6], False), (0, [7], True), (1, [], True)]


@pytest.mark.parametrize("k", [0, 1, 5])
def test_streamer_of_transformers_hears_what_generate_says(k: int) -> None:
    pytest.importorskip("transformers")
    from alignops.speculative import PromptLookup, speculative_generate
    from tests.speculative.models import model, plain

    net, prompt = model(), torch.tensor([[3, 1, 4, 1, 3, 1]])
    text = plain(net, prompt[0], 20)
    eos = text[11]
    expected, recorder = Recorder(), Recorder()
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": eos, "pad_token_id": eos}
    net.generate(prompt, streamer=expected, do_sample=False, **options)
    speculative_generate(
        net, PromptLookup(2), prompt, num_draft_tokens=k, streamer=recorder, **options
    )
    heard = [token for value in recorder.values for token in value]
    said = [token for value in expected.values for token in torch.tensor(value).flatten().tolist()]
    assert heard == said
    assert heard[-1] == eos
    assert recorder.ends == expected.ends == 1


class Recorder:
    """A streamer of transformers."""

    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ends = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.tolist())

    def end(self) -> None:
        self.ends += 1


def test_streamer_of_transformers_gets_the_prompt_first_and_one_end() -> None:
    recorder = Recorder()
    stream = Stream(recorder, PROMPTS[:1])
    stream.emit(0, [5, 6])
    stream.emit(0, [7], finished=True)
    stream.emit(0, [8], finished=True)
    assert recorder.values == [[1, 2, 3], [5, 6], [7]]
    assert recorder.ends == 1


def test_text_streamer_prints_the_text_once(capsys: pytest.CaptureFixture[str]) -> None:
    transformers = pytest.importorskip("transformers")

    class Letters:
        def decode(self, ids: list[int] | int, **_: object) -> str:
            return "".join(chr(i) for i in ([ids] if isinstance(ids, int) else ids))

    stream = Stream(
        transformers.TextStreamer(Letters(), skip_prompt=True), [torch.tensor([ord("?")])]
    )
    stream.emit(0, [ord(c) for c in "one t"])
    stream.emit(0, [ord(c) for c in "wo"], finished=True)
    stream.emit(0, [ord("!")], finished=True)
    assert capsys.readouterr().out == "one two\n"


def test_streamer_of_transformers_takes_one_sequence() -> None:
    with pytest.raises(ValueError, match=r"Stream: streamer must be a callable .* for 2 sequences"):
        Stream(Recorder(), PROMPTS)


def test_other_things_are_refused() -> None:
    with pytest.raises(TypeError, match=r"Stream: streamer must be a callable .* got int"):
        Stream(3, PROMPTS)  # type: ignore[arg-type]
