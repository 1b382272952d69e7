"""Tiny random models of transformers in float64, so that only ties are free, and drafters."""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

VOCAB = 29
# Kinds of positions, and a seed whose text is varied.
KINDS = {"rope": 3, "learned": 4, "alibi": 6, "alibi_mask": 2, "sliding": 9, "mixed": 1}


@functools.cache
def model(kind: str = "rope", seed: int | None = None, vocab: int = VOCAB) -> Any:
    """A causal language model in evaluation mode without ids of its own for the end of a text."""
    import transformers as tf

    torch.manual_seed(KINDS[kind] if seed is None else seed)
    ids: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    ids |= {"tie_word_embeddings": False, "vocab_size": vocab}
    size: dict[str, Any] = ids | {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
    }
    if kind == "rope":
        net = tf.LlamaForCausalLM(tf.LlamaConfig(**size))
    elif kind == "learned":
        config = tf.GPT2Config(**ids, n_embd=16, n_layer=2, n_head=2, n_positions=128)
        net = tf.GPT2LMHeadModel(config)
    elif kind == "alibi":
        config = tf.MptConfig(**ids, d_model=16, n_heads=2, n_layers=2, max_seq_len=256)
        net = tf.MptForCausalLM(config)
    elif kind == "alibi_mask":
        net = tf.BloomForCausalLM(tf.BloomConfig(**ids, hidden_size=16, n_layer=2, n_head=2))
    elif kind == "sliding":
        net = tf.MistralForCausalLM(tf.MistralConfig(**size, sliding_window=5))
    else:
        config = tf.Gemma2Config(**size, sliding_window=5, head_dim=4)
        config._attn_implementation = "eager"
        net = tf.Gemma2ForCausalLM(config)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.normal_(0, 0.8 if p.dim() > 1 else 0.1).add_(p.dim() == 1 and "bias" not in name)
    net.generation_config.eos_token_id = None
    net.generation_config.pad_token_id = 0
    return net.double().eval()


@functools.cache
def perturbed(amount: float, kind: str = "rope") -> Any:
    """A model that often agrees with `model(kind)`, the less the larger the amount."""
    net = copy.deepcopy(model(kind))
    torch.manual_seed(5)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(amount * torch.randn_like(p) * p.std())
    return net


def permuted(net: Any, order: Sequence[int]) -> Any:
    """The model of the same text in other ids: order[i] instead of i."""
    net = copy.deepcopy(net)
    place = torch.tensor(order)
    with torch.no_grad():
        for weight in {net.get_input_embeddings().weight, net.get_output_embeddings().weight}:
            old = weight.clone()
            weight[place] = old
    return net


def plain(net: Any, prompt: Tensor, count: int, eos: Sequence[int] = ()) -> list[int]:
    """Greedy decoding of one prompt without any cache: the definition."""
    tokens = prompt.tolist()
    for _ in range(count):
        with torch.no_grad():
            logits = net(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
        if tokens[-1] in eos:
            break
    return tokens[len(prompt) :]


def prompts(lengths: Sequence[int], seed: int = 0, vocab: int = VOCAB) -> list[Tensor]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab, (length,), generator=generator) for length in lengths]


class Oracle:
    """Drafts what is known to follow, except for a share of wrong guesses; a draft function.

    Args:
        texts: prompts and their texts.
        accuracy: share of right guesses.
        vocab: wrong guesses are below it.
    """

    def __init__(
        self, texts: Sequence[list[int]], accuracy: float, seed: int = 0, vocab: int = VOCAB
    ) -> None:
        self.texts = texts
        self.accuracy = accuracy
        self.vocab = vocab
        self.random = random.Random(seed)

    def __call__(self, tokens: Tensor, lengths: Tensor, k: int) -> Tensor:
        rows = []
        for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True):
            text = next((t for t in self.texts if t[:length] == row[:length]), [])
            right = [*text[length : length + k], *[0] * k][:k]
            rows.append([self._guess(token) for token in right])
        return torch.tensor(rows)

    def _guess(self, right: int) -> int:
        if self.random.random() < self.accuracy:
            return right
        return (right + self.random.randrange(1, self.vocab)) % self.vocab


def texts(
    net: Any, given: Sequence[Tensor], count: int, eos: Sequence[int] = ()
) -> list[list[int]]:
    """What follows each prompt by definition."""
    return [plain(net, prompt, count, eos) for prompt in given]


def oracle(
    given: Sequence[Tensor], following: Sequence[list[int]], accuracy: float, seed: int = 0
) -> Oracle:
    """An oracle for these prompts and texts."""
    known = [p.tolist() + t for p, t in zip(given, following, strict=True)]
    return Oracle(known, accuracy, seed)


def generated(out: Any, given: Sequence[Tensor]) -> list[list[int]]:
    """What `speculative_generate(..., return_stats=True)` has generated behind a list."""
    columns = max(len(prompt) for prompt in given)
    return [
        row[columns : columns + length - len(prompt)]
        for row, length, prompt in zip(
            out.sequences.tolist(), out.lengths.tolist(), given, strict=True
        )
    ]
