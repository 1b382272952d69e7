"""vLLM: acceptance rules of alignops in place of the engine's rejection sampler. Experimental.

Written against recorded signatures of the engine and tested with tensors of the shapes that it
documents, not inside a running engine. With `ALIGNOPS_VLLM=1` in the environment, vLLM loads
`register` through its general plugins and

- the newer model runner calls `Verifier.rejection_sample`: logits of all rows, draft logits by
  request slot, a map from rows to slots, a seed per slot and a position per row;
- the V1 runner makes samplers of the class of `make_rejection_sampler`: flattened rows, cumulative
  draft counts, -1 where a draft was not accepted.

Nothing is replaced unless the engine's functions have the recorded parameters and 64 random cases
agree with the definition of the rules.

`PromptLookupProposer` is a custom proposer of the engine.

Tokens are those of the definition: in the newer runner they depend on the seed of a request and on
positions only, so the rule "coupled" repeats plain seeded sampling with any drafter that does not
sample. A request chooses its rule by extra arguments (`SamplingParams.extra_args`, `vllm_xargs`):
"alignops_rule" is one of "lossless", "block", "coupled", "typical", "relaxed", "rsd", "nudge", and
"alignops_eps" and so on are parameters of the rule; requests with temperature 0 are greedy whatever
the rule. Probabilities are those after temperature and filters, for "rsd" too. Requests without
drafts in a step follow the default rule, which is
`additional_config={"alignops": {"rule": "block"}}`; "nudge" needs the ids that begin a word there,
too: {"word_start": [...], "eos_ids": [...]}.

Shape letters: R requests of a step, S slots, N rows (a request has one more than drafts), K drafts,
V ids.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from alignops.integrations._engines import (
    Case,
    check_signature,
    find,
    self_test_cases,
    self_test_failed,
)
from alignops.integrations._vllm_proposer import PromptLookupProposer as PromptLookupProposer
from alignops.integrations._vllm_requests import EXACT
from alignops.integrations._vllm_requests import Options as Options
from alignops.integrations._vllm_requests import RequestRule as RequestRule
from alignops.integrations._vllm_v1 import PackedSampler, rows_of
from alignops.speculative import VerifyOut, verify

#: Parameters of the engine's functions that are replaced, and of the methods that these use.
SIGNATURES: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils:rejection_sample": (
        "target_logits",
        "draft_logits",
        "draft_sampled",
        "cu_num_logits",
        "pos",
        "idx_mapping",
        "expanded_idx_mapping",
        "expanded_local_pos",
        "temperature",
        "seed",
        "num_speculative_steps",
    ),
    "vllm.v1.worker.gpu.sample.sampler:Sampler.add_request": (
        "self",
        "req_idx",
        "prompt_len",
        "sampling_params",
    ),
    "vllm.v1.sample.rejection_sampler:RejectionSampler.forward": (
        "self",
        "metadata",
        "draft_probs",
        "logits",
        "sampling_metadata",
    ),
    "vllm.v1.sample.rejection_sampler:RejectionSampler.apply_logits_processors": (
        "self",
        "logits",
        "sampling_metadata",
        "metadata",
    ),
    "vllm.v1.sample.rejection_sampler:RejectionSampler._get_logprobs_tensors": (
        "self",
        "max_num_logprobs",
        "metadata",
        "logits",
        "target_logits",
        "bonus_logits",
        "sampled_token_ids",
    ),
    "vllm.v1.sample.sampler:Sampler.apply_logits_processors": (
        "self",
        "logits",
        "sampling_metadata",
        "predict_bonus_token",
    ),
}


@dataclass
class Verifier:
    """Verification of a step of the engine: rows of all requests, a rule for each.

    Row errors (NaN, ids out of range) are raised at the next step, when reading them no longer
    waits for the GPU.
    """

    options: Options = field(default_factory=Options)
    _rules: list[RequestRule] = field(default_factory=list)
    _by_slot: dict[int, RequestRule] = field(default_factory=dict)
    _rule_of_slot: Tensor | None = None
    _state: Tensor | None = None
    _words: Tensor | None = None
    _last: list[VerifyOut] = field(default_factory=list)

    def add_request(self, slot: int, sampling_params: Any) -> None:
        """Note the rule of the request that takes a slot.

        Raises:
            ValueError: see `RequestRule.of`, or "nudge" without ids that begin a word.
        """
        rule = RequestRule.of(sampling_params, RequestRule(self.options.rule))
        if rule.name == "nudge" and not self.options.word_start:
            raise ValueError(
                "vllm: additional_config['alignops'] must have word_start for the rule 'nudge'"
            )
        self._by_slot[slot] = rule
        if rule not in self._rules:
            self._rules.append(rule)
        if self._rule_of_slot is not None and slot < self._rule_of_slot.shape[0]:
            self._rule_of_slot[slot] = self._rules.index(rule)
        if self._state is not None and slot < self._state.shape[0]:
            self._state[slot] = 0

    def rejection_sample(
        self,
        target_logits: Tensor,
        draft_logits: Tensor | None,
        draft_sampled: Tensor,
        cu_num_logits: Tensor,
        pos: Tensor,
        idx_mapping: Tensor,
        expanded_idx_mapping: Tensor,
        expanded_local_pos: Tensor,
        temperature: Tensor,
        seed: Tensor,
        num_speculative_steps: int,
        synthetic_conditional_rates: Tensor | None = None,
        use_fp64: bool = False,
        use_block_verification: bool = False,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """The newer runner's `rejection_sample`. Experimental.

        Args:
            target_logits: (N, V), after temperature and filters.
            draft_logits: (S, K, V) by slot, after temperature; None: the drafts are certain.
            draft_sampled: (N,): ids of the input, the last committed token of a request and its
                drafts.
            cu_num_logits: (R + 1,): where the rows of each request begin.
            pos: (N,) positions of the input ids.
            idx_mapping: (R,) slots of the requests.
            expanded_idx_mapping: (N,), not used: `cu_num_logits` says the same.
            expanded_local_pos: (N,), not used.
            temperature: (S,); 0 is greedy, other values are already applied.
            seed: (S,).
            num_speculative_steps: K.
            synthetic_conditional_rates: must be None.
            use_fp64: not used, decisions are exact.
            use_block_verification: requests that choose no rule have "block".
            others: parameters that newer engines have, None or False.

        Returns:
            Emitted ids int64 (R, K + 1), -1 behind the last one, and how many int32 (R,).

        Raises:
            ValueError: an argument that the rules do not serve, or a row error of the last step.
        """
        given = [name for name, value in others.items() if value is not None and value is not False]
        if synthetic_conditional_rates is not None:
            given.append("synthetic_conditional_rates")
        if given:
            raise ValueError(f"vllm: {', '.join(given)} must not be given")
        begin = cu_num_logits[:-1].long()
        counts = cu_num_logits[1:].long() - begin - 1
        column = torch.arange(num_speculative_steps, device=begin.device)
        places = (begin[:, None] + 1 + column).clamp(max=draft_sampled.shape[0] - 1)
        drafts = draft_sampled.long()[places].masked_fill(column >= counts[:, None], -1)
        slots = idx_mapping.long()
        self._grow(temperature.shape[0], begin.device)
        if self._rule_of_slot is None or self._state is None:
            raise RuntimeError("vllm: tables of the slots are missing")
        q = None
        if draft_logits is not None:
            q = draft_logits[slots, :, : target_logits.shape[1]]
        default = "block" if use_block_verification else self.options.rule
        tokens, number, state = self.verify(
            target_logits,
            cu_num_logits,
            drafts,
            counts,
            q,
            self._rule_of_slot[slots],
            default,
            temperature=(temperature[slots] > 0).float(),
            seeds=seed[slots].long(),
            positions=pos.long()[begin] + 1,
            state=self._state[slots],
        )
        self._state[slots] = state
        return tokens, number

    def verify(
        self,
        target: Tensor,
        cu: Tensor,
        drafts: Tensor,
        counts: Tensor,
        draft: Tensor | None,
        rule_of_row: Tensor,
        default: str,
        state: Tensor,
        **arguments: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """All requests of a step, one call of `alignops.speculative.verify` per rule in use.

        Args:
            target: (N, V) packed logits.
            cu: (R + 1,) offsets.
            drafts: (R, K), -1 where there is none.
            counts: (R,) drafts.
            draft: (R, K, V) logits or None.
            rule_of_row: (R,), numbers of the rules that requests chose; -1: none.
            default: rule of requests without one, and "lossless" for rows without drafts.
            state: uint8 (R,) of "nudge".
            arguments: further ones of `verify`.

        Returns:
            Ids (R, K + 1), how many (R,), and the new state (R,).
        """
        self.raise_errors()
        rows, width = drafts.shape
        tokens = torch.full((rows, width + 1), -1, dtype=torch.int64, device=drafts.device)
        number = torch.zeros(rows, dtype=torch.int32, device=drafts.device)
        left = torch.ones(rows, dtype=torch.bool, device=drafts.device)
        chosen = [(i, rule) for i, rule in enumerate(self._rules) if rule.name != default]
        for i, rule in [*chosen, (None, RequestRule(default))]:
            active = left if i is None else (rule_of_row == i) & (counts > 0)
            params = dict(rule.params)
            if rule.name == "nudge":
                params["word_start"] = self._word_start(target.shape[1], target.device)
                arguments["eos_ids"] = list(self.options.eos_ids)
            out = verify(
                target,
                drafts,
                draft=draft,
                cu=cu,
                rule=rule.name,
                params=params,
                state=state,
                active=active,
                **arguments,
            )
            arguments.pop("eos_ids", None)
            tokens = torch.where(active[:, None], out.tokens, tokens)
            number = torch.where(active, out.num_emitted, number)
            state = torch.where(active, out.state, state)
            left = left & ~active
            self._last.append(out)
        return tokens, number, state

    def numbers(self, rules: Sequence[RequestRule], rows: int, device: torch.device) -> Tensor:
        """Numbers (R,) of the rules of the requests, for `verify`; none: -1."""
        for rule in rules:
            if rule not in self._rules:
                self._rules.append(rule)
        return torch.tensor([self._rules.index(r) for r in rules] or [-1] * rows, device=device)

    def raise_errors(self) -> None:
        """Raise ValueError if rows of the last step had errors."""
        last, self._last = self._last, []
        for out in last:
            out.raise_errors()

    def _grow(self, slots: int, device: torch.device) -> None:
        if self._rule_of_slot is not None and self._rule_of_slot.shape[0] == slots:
            return
        numbers = [-1] * slots
        for slot, rule in self._by_slot.items():
            numbers[slot] = self._rules.index(rule)
        self._rule_of_slot = torch.tensor(numbers, device=device)
        self._state = torch.zeros(slots, dtype=torch.uint8, device=device)

    def _word_start(self, size: int, device: torch.device) -> Tensor:
        if self._words is None or self._words.shape[0] != size:
            self._words = torch.zeros(size, dtype=torch.bool)
            self._words[torch.tensor(list(self.options.word_start))] = True
            self._words = self._words.to(device)
        return self._words


def make_rejection_sampler(base: type, verifier: Verifier) -> type:
    """A sampler class for the V1 runner, derived from the engine's. Experimental.

    `forward` takes and gives what the engine's does. Each step draws one word per request, from its
    own generator if it has a seed, and all random bits of the step follow from it. The V1 runner
    does not say where a request is, so the rules "coupled" and "nudge" are refused; min-p, which
    the engine applies to bonus tokens only, is not applied.

    Args:
        base: `vllm.v1.sample.rejection_sampler.RejectionSampler`.
        verifier: its options and its checks.

    Raises:
        ValueError: the engine's rule is "coupled".
    """
    if verifier.options.rule == "coupled":
        raise ValueError("vllm: rule must be 'lossless' or 'block' with the V1 runner")
    return type("RejectionSampler", (PackedSampler, base), {"verifier": verifier})


# Installation


def register() -> None:
    """The engine's plugin: replaces its functions if ALIGNOPS_VLLM=1. May be called repeatedly.

    Raises:
        RuntimeError: see `install`.
    """
    if os.environ.get("ALIGNOPS_VLLM") == "1":
        install()


def install() -> list[str]:
    """Have the model runners of this engine use the rules of alignops.

    Model runners that are made afterwards, one per process, read their options and refuse what the
    rules cannot serve. Without speculative decoding they stay as they are.

    Returns:
        The kinds of runners that were found: "V1", "newer".

    Raises:
        ImportError: the engine is not there.
        RuntimeError: it has neither runner, or functions with other parameters than recorded, or
            the self-test fails.
    """
    found = {name: form for name, form in _FORMS.items() if _there(form.runner)}
    if not found:
        raise RuntimeError("alignops: vllm must have a model runner that is known, got neither")
    for form in found.values():
        for place in form.uses:
            check_signature(place, SIGNATURES[place])
    self_test()
    for form in found.values():
        runner = find(form.runner)
        if not hasattr(runner.__init__, "alignops"):
            runner.__init__ = _starting(runner.__init__, form.prepare)
    return list(found)


def self_test(device: torch.device | str = "cpu") -> None:
    """Compare 64 random steps, in the form of the newer runner, with the definition.

    Raises:
        RuntimeError: they differ.

    Example:
        >>> self_test()
    """
    for rule in EXACT:
        for number, case in enumerate(self_test_cases(rule)):
            got = [t.tolist() for t in _newer_step(case, Verifier(Options(rule)), device)]
            tokens = [row[:n] for row, n in zip(*got, strict=True)]
            if tokens != case.tokens:
                raise self_test_failed("vllm", number, case.tokens, tokens)


def _newer_step(
    case: Case, verifier: Verifier, device: torch.device | str
) -> tuple[Tensor, Tensor]:
    """A case as the newer runner calls: requests in slots of their own, in reverse order."""
    rows, width = case.drafts.shape
    slots = torch.arange(rows).flip(0) + 1
    cu = torch.nn.functional.pad((case.counts + 1).cumsum(0), (1, 0))
    tables = {
        "draft_logits": case.draft.new_zeros(rows + 2, *case.draft.shape[1:]),
        "temperature": torch.ones(rows + 2),
        "seed": torch.zeros(rows + 2, dtype=torch.int64),
    }
    for name, values in zip(tables, (case.draft, case.temperature, case.seeds), strict=True):
        tables[name][slots] = values
    ids = [
        torch.cat((d.new_zeros(1), d[:n])) for d, n in zip(case.drafts, case.counts, strict=True)
    ]
    begins = (case.positions - 1).repeat_interleave(case.counts + 1)
    local = torch.cat([torch.arange(n + 1) for n in case.counts.tolist()])
    arguments = {
        "target_logits": case.target,
        "draft_sampled": torch.cat(ids),
        "cu_num_logits": cu.int(),
        "pos": begins + local,
        "idx_mapping": slots.int(),
        "expanded_idx_mapping": slots.repeat_interleave(case.counts + 1),
        "expanded_local_pos": local,
    }
    on_device: dict[str, Any] = {k: v.to(device) for k, v in (arguments | tables).items()}
    return verifier.rejection_sample(**on_device, num_speculative_steps=width)


def _there(place: str) -> bool:
    importlib.import_module(place.partition(".")[0])
    try:
        find(place)
    except (ModuleNotFoundError, AttributeError):
        return False
    return True


def _starting(
    original: Callable[..., None], prepare: Callable[[Any, Any, Verifier], Callable[[], None]]
) -> Callable[..., None]:
    """A constructor of a model runner that reads the options first."""

    def init(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        if getattr(vllm_config, "speculative_config", None) is None:
            original(self, vllm_config, *args, **kwargs)
            return
        finish = prepare(self, vllm_config, Verifier(Options.of(vllm_config)))
        try:
            original(self, vllm_config, *args, **kwargs)
        finally:
            finish()

    init.alignops = original  # type: ignore[attr-defined]
    return init


def _prepare_v1(runner: Any, vllm_config: Any, verifier: Verifier) -> Callable[[], None]:
    """The class that the runner takes for its sampler, while it is made."""
    module: Any = importlib.import_module(type(runner).__module__)
    base = module.RejectionSampler
    module.RejectionSampler = make_rejection_sampler(base, verifier)

    def finish() -> None:
        module.RejectionSampler = base
        sampler = getattr(runner, "rejection_sampler", None)
        if sampler is not None:
            sampler.requests = lambda: rows_of(runner)

    return finish


def _prepare_newer(runner: Any, vllm_config: Any, verifier: Verifier) -> Callable[[], None]:
    """The function that its sampler calls, and a note of each request's rule."""
    module: Any = importlib.import_module(_REJECTION_SAMPLER)
    module.rejection_sample = verifier.rejection_sample
    sampler = find(_ADD_REQUEST.rpartition(".")[0])
    original = getattr(sampler.add_request, "alignops", sampler.add_request)

    def add_request(self: Any, req_idx: int, prompt_len: int, sampling_params: Any) -> None:
        verifier.add_request(req_idx, sampling_params)
        original(self, req_idx, prompt_len, sampling_params)

    add_request.alignops = original  # type: ignore[attr-defined]
    sampler.add_request = add_request
    return lambda: None


@dataclass(frozen=True)
class _Form:
    runner: str
    uses: tuple[str, ...]
    prepare: Callable[[Any, Any, Verifier], Callable[[], None]]


_REJECTION_SAMPLER = "vllm.v1.worker.gpu.spec_decode.rejection_sampler"
_ADD_REQUEST = "vllm.v1.worker.gpu.sample.sampler:Sampler.add_request"
_FORMS = {
    "V1": _Form(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        tuple(place for place in SIGNATURES if place.startswith("vllm.v1.sample.")),
        _prepare_v1,
    ),
    "newer": _Form(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner",
        tuple(place for place in SIGNATURES if place.startswith("vllm.v1.worker.gpu.")),
        _prepare_newer,
    ),
}
