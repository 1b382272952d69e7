"""Decoding with a small language model, one token at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from alignops.demo._ablation import Block, SmallLM


class Decoder:
    """Scores of the next token, with cached keys and values.

    Called as `prov_decode` calls its model: (tokens (1, L), None) begins a text, later (tokens
    (b, 1), parents (b,)) extends row parents[i] of the last call by tokens[i].
    """

    def __init__(self, model: SmallLM) -> None:
        self.model = model
        self.cache: list[tuple[Tensor, Tensor]] = []

    @torch.inference_mode()
    def __call__(self, tokens: Tensor, parents: Tensor | None) -> Tensor:
        if parents is None:
            self.cache = []
        elif not torch.equal(parents, torch.arange(len(self.cache[0][0]))):
            self.cache = [(k[parents], v[parents]) for k, v in self.cache]
        start = self.cache[0][0].shape[2] if self.cache else 0
        x = self.model.embedding(tokens)
        x = x + self.model.position.weight[start : start + tokens.shape[1]]
        for number, block in enumerate(self.model.blocks):
            assert isinstance(block, Block)
            x = self._block(number, block, x)
        return F.linear(self.model.norm(x[:, -1]), self.model.embedding.weight)

    def _block(self, number: int, block: Block, x: Tensor) -> Tensor:
        h = block.norm_attention(x)
        q, k, v = (
            project(h).unflatten(-1, (block.heads, -1)).transpose(1, 2)
            for project in (block.q, block.k, block.v)
        )
        if number < len(self.cache):
            before = self.cache[number]
            k, v = torch.cat((before[0], k), 2), torch.cat((before[1], v), 2)
            self.cache[number] = k, v
        else:
            self.cache.append((k, v))
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if x.shape[1] > 1:
            scores = scores + block.mask[: x.shape[1], : k.shape[2]]
        x = x + block.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        h = block.norm_mlp(x)
        mixed: Tensor = block.down(F.silu(block.gate(h)) * block.up(h))
        return x + mixed


def greedy(model: SmallLM, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Most likely continuations, each with its end of text (0) if it came to it."""
    lengths: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        lengths.setdefault(len(prompt), []).append(i)
    result: list[list[int]] = [[] for _ in prompts]
    for rows in lengths.values():
        decoder = Decoder(model)
        scores = decoder(torch.tensor([prompts[i] for i in rows]), None)
        alive = torch.tensor(rows)
        for _ in range(max_new_tokens):
            chosen = scores.argmax(-1)
            for i, token in zip(alive.tolist(), chosen.tolist(), strict=True):
                result[i].append(token)
            going = chosen.nonzero().flatten()
            if not len(going):
                break
            alive = alive[going]
            scores = decoder(chosen[going, None], going)
    return result
