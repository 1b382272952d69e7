"""What stands in for the rejection samplers of vLLM, on tensors as the engine makes them."""

import inspect
import subprocess
import sys
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from alignops.integrations import _vllm_v1, vllm
from alignops.integrations._engines import Case, self_test_cases
from alignops.reference import speculative as reference
from tests.speculative.engine_signatures import RECORDED, modules, stand_in
from tests.speculative.test_vllm_v1 import SamplerOutput, params

PLACES = [place for place in RECORDED if place.startswith("vllm")]


def config(**options: Any) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=options.pop("stages", 1)),
        speculative_config=SimpleNamespace(
            rejection_sample_method=options.pop("method", "strict"),
            num_speculative_tokens=3,
        ),
        model_config=SimpleNamespace(max_model_len=options.pop("longest", 64)),
        additional_config={"alignops": options} if options else None,
    )


def expected(case: Case, row: int, rule: str, **parameters: Any) -> reference.Outcome:
    begin = int((case.counts[:row] + 1).sum())
    count = int(case.counts[row])
    laws = [reference.law(r) for r in case.target[begin : begin + count + 1].numpy()]
    proposals = [reference.law(r) for r in case.draft[row, :count].numpy()]
    state = parameters.pop("state", 0)
    return reference.verify(
        reference.Row(
            laws,
            case.drafts[row, :count].tolist(),
            proposals,
            int(case.seeds[row]) & (2**64 - 1),
            int(case.positions[row]),
            state=state,
        ),
        rule,
        **parameters,
    )


def rows_of(step: tuple[Tensor, Tensor]) -> list[list[int]]:
    tokens, number = step
    assert tokens.dtype == torch.int64
    assert number.dtype == torch.int32
    rows = [row[:n] for row, n in zip(tokens.tolist(), number.tolist(), strict=True)]
    assert all(t == -1 for row, n in zip(tokens, number, strict=True) for t in row[n:])
    return rows


# The newer runner


def test_self_test() -> None:
    vllm.self_test()


def test_requests_have_rules_of_their_own() -> None:
    """Slots as in `_newer_step`: request r of R is in slot R - r."""
    rules: list[tuple[str, dict[str, Any]]] = [
        ("lossless", {}),
        ("typical", {"eps": 0.2}),
        ("relaxed", {"m": 2, "r": 0.3}),
        ("rsd", {"p_th": 0.05, "top_n": 5}),
        ("block", {}),
        ("coupled", {}),
        ("typical", {"eps": 0.01, "delta": 0.1}),
    ]
    kinds = set()
    for number, case in enumerate(self_test_cases("lossless", 60)):
        verifier = vllm.Verifier()
        rows = len(case.counts)
        chosen = [rules[(number + r) % len(rules)] for r in range(rows)]
        for r, (rule, parameters) in enumerate(chosen):
            verifier.add_request(rows - r, params(rule=rule, **parameters))
        got = rows_of(vllm._newer_step(case, verifier, "cpu"))
        for r, (rule, parameters) in enumerate(chosen):
            if case.temperature[r] == 0:
                rule, parameters = "greedy", {}
            elif case.counts[r] == 0:
                rule, parameters = "lossless", {}
            kinds.add(rule)
            assert got[r] == expected(case, r, rule, **parameters).tokens, (number, r, rule)
    assert len(kinds) == 7


def test_a_slot_that_is_taken_again_has_the_new_rule() -> None:
    case = next(c for c in self_test_cases("lossless", 1000) if c.counts.tolist() == [4])
    case.temperature[0] = 1
    case.drafts[0] = case.target.argmax(-1)[:4]
    verifier = vllm.Verifier()
    for rule, eps, count in (("typical", 1.0, None), ("typical", 0.0, 5), ("lossless", None, None)):
        parameters = {} if eps is None else {"eps": eps, "delta": 100.0}
        verifier.add_request(1, params(rule=rule, **parameters))
        got = rows_of(vllm._newer_step(case, verifier, "cpu"))[0]
        assert got == expected(case, 0, rule, **parameters).tokens
        assert count is None or len(got) == count


def test_nudge_keeps_its_state_between_rounds() -> None:
    options = vllm.Options(word_start=range(0, 60, 3), eos_ids=[2])
    seen = set()
    for number, case in enumerate(self_test_cases("lossless", 40)):
        if len(case.counts) != 1 or case.counts[0] == 0 or case.target.shape[1] < 3:
            continue
        case.temperature[0] = 1
        starts = vllm.Options(word_start=range(0, case.target.shape[1], 3), eos_ids=options.eos_ids)
        verifier = vllm.Verifier(starts)
        verifier.add_request(1, params(rule="nudge", gamma=0.5, eos_lookahead=2))
        words = [i % 3 == 0 for i in range(case.target.shape[1])]
        state = 0
        for _ in range(3):
            wanted = expected(
                case,
                0,
                "nudge",
                state=state,
                gamma=0.5,
                eos_lookahead=2,
                word_start=words,
                eos_ids=[2],
            )
            assert rows_of(vllm._newer_step(case, verifier, "cpu"))[0] == wanted.tokens, number
            seen.add((state, wanted.state))
            state = wanted.state
        verifier.add_request(1, params(rule="nudge"))
        assert verifier._state is not None
        assert verifier._state[1] == 0
    assert {(0, 0), (0, 1)} <= seen


def test_a_drafter_with_more_ids_than_the_target() -> None:
    case = next(iter(self_test_cases("lossless")))
    wide = Case(**vars(case) | {"draft": nn.functional.pad(case.draft, (0, 3))})
    assert rows_of(vllm._newer_step(wide, vllm.Verifier(), "cpu")) == rows_of(
        vllm._newer_step(case, vllm.Verifier(), "cpu")
    )


def test_bad_logits_are_an_error_of_the_next_step() -> None:
    case = next(c for c in self_test_cases("lossless") if len(c.counts) > 1)
    verifier = vllm.Verifier()
    good = case.target.clone()
    case.target[0] = float("nan")
    got = rows_of(vllm._newer_step(case, verifier, "cpu"))
    assert got[0] == []
    assert got[1:] == case.tokens[1:]
    case.target.copy_(good)
    with pytest.raises(ValueError, match="row 0: logits hold NaN"):
        vllm._newer_step(case, verifier, "cpu")
    assert rows_of(vllm._newer_step(case, verifier, "cpu")) == case.tokens


@pytest.mark.parametrize("name", ["synthetic_conditional_rates", "contexts"])
def test_what_the_rules_do_not_serve_is_refused(name: str) -> None:
    one = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"vllm: {name} must not be given"):
        vllm.Verifier().rejection_sample(
            torch.zeros(1, 4),
            None,
            one,
            torch.tensor([0, 1]),
            one,
            one,
            one,
            one,
            torch.ones(1),
            one,
            2,
            **{name: torch.ones(2)},
        )


# Requests and options


def test_rule_of_a_request() -> None:
    assert vllm.RequestRule.of(params()) == vllm.RequestRule("lossless")
    assert vllm.RequestRule.of(SimpleNamespace(), vllm.RequestRule("block")).name == "block"
    other = SimpleNamespace(extra_args={"temperature_of_somebody": 3})
    assert vllm.RequestRule.of(other) == vllm.RequestRule("lossless")
    # Arguments of a web request may come as text.
    assert vllm.RequestRule.of(params(rule="relaxed", m="4")).params == (("m", 4),)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"rule": "best"}, "alignops_rule must be one of lossless, .*, got 'best'"),
        ({"rule": "typical", "m": 3}, "alignops_m must be a parameter of the rule 'typical'"),
        ({"eps": 0.1}, r"alignops_eps must be a parameter of the rule 'lossless' \(it has none\)"),
        ({"rule": "relaxed", "m": "many"}, "invalid literal"),
    ],
)
def test_bad_arguments_of_a_request(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vllm.RequestRule.of(params(**extra))


@pytest.mark.parametrize("name", ["structured_outputs", "guided_decoding"])
def test_structured_output_needs_an_exact_rule(name: str) -> None:
    request = params(rule="typical")
    setattr(request, name, object())
    with pytest.raises(ValueError, match="with structured output, got 'typical'"):
        vllm.RequestRule.of(request)
    request.extra_args["alignops_rule"] = "block"
    assert vllm.RequestRule.of(request).name == "block"


def test_nudge_needs_the_ids_that_begin_a_word() -> None:
    with pytest.raises(ValueError, match="must have word_start"):
        vllm.Verifier().add_request(0, params(rule="nudge"))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"stages": 2}, "pipeline_parallel_size must be 1, got 2"),
        ({"method": "synthetic"}, "rejection_sample_method must not be 'synthetic'"),
        ({"rule": "typical"}, "rule must be one of lossless, block, coupled for a whole engine"),
        ({"rules": "block"}, "unknown options of alignops: rules"),
    ],
)
def test_engines_that_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vllm.Options.of(config(**given))


def test_options() -> None:
    assert vllm.Options.of(config()) == vllm.Options()
    assert vllm.Options.of(config(rule="coupled")).rule == "coupled"
    assert vllm.Options.of(config(method="block")).rule == "block"
    assert vllm.Options.of(config(method="block", rule="lossless")).rule == "lossless"


# The proposer


@pytest.mark.parametrize("as_tensor", [False, True])
def test_proposer(as_tensor: bool) -> None:
    proposer = vllm.PromptLookupProposer(config(longest=12))
    texts = [[5, 6, 7, 8, 5, 6], [1, 2, 3, 4, 5, 6], [9, 9, 9], [], [4, 5] * 6, [4, 5] * 5 + [4]]
    table = np.zeros((8, 12), np.int32)
    for row, text in enumerate(texts):
        table[row, : len(text)] = text
    lengths = np.array([len(t) for t in texts])
    sampled = [[6], [6], [9], [5], [5], [4]]
    tokens: Any = torch.from_numpy(table) if as_tensor else table
    drafts = proposer.propose(sampled, lengths, tokens)
    # Found; nothing to find; repeats itself; no text; no room; room for one.
    assert drafts == [[7, 8, 5], [], [9, 9, 9], [], [], [5]]
    assert proposer.propose([[], [6]], lengths[:2], tokens) == [[], []]
    assert proposer.propose([[], []], lengths[:2], tokens, slot_mappings=None) == [[], []]
    proposer.load_model("whatever")


# Installation


def engine(
    monkeypatch: pytest.MonkeyPatch, extra: dict[str, str] | None = None, drop: Sequence[str] = ()
) -> dict[str, Any]:
    """Modules of the engine with classes and functions that have the recorded parameters."""
    v1, newer = "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"
    sampler_module = "vllm.v1.worker.gpu.spec_decode.rejection_sampler"
    found: dict[str, Any] = modules(
        v1, newer, sampler_module, *(p.partition(":")[0] for p in PLACES)
    )
    found["vllm"].__version__ = "0.99"
    for place in PLACES:
        module, _, path = place.partition(":")
        owner, _, name = path.rpartition(".")
        function = stand_in(place, extra=(extra or {}).get(name, ""))
        if owner:
            if not hasattr(found[module], owner):
                setattr(found[module], owner, type(owner, (), {"__module__": module}))
            setattr(getattr(found[module], owner), name, function)
        else:
            setattr(found[module], name, function)
    sampling = found["vllm.v1.sample.rejection_sampler"]
    sampling.SamplerOutput = SamplerOutput
    found[v1].RejectionSampler = sampling.RejectionSampler
    utils = found["vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils"]
    found[sampler_module].rejection_sample = utils.rejection_sample

    def init(self: Any, vllm_config: Any, device: str) -> None:
        self.rejection_sampler = found[v1].RejectionSampler()
        self.requests = {"a": SimpleNamespace(sampling_params=params(rule="typical"))}
        self.input_batch = SimpleNamespace(req_ids=["a"])

    found[v1].GPUModelRunner = type("GPUModelRunner", (), {"__init__": init, "__module__": v1})
    found[newer].GPUModelRunner = type(
        "GPUModelRunner",
        (),
        {"__init__": lambda self, vllm_config, device: None, "__module__": newer},
    )
    for name in drop:
        parent, _, last = name.rpartition(".")
        del found[name]
        delattr(found[parent], last)
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    return found


def test_signatures_are_those_recorded() -> None:
    assert set(vllm.SIGNATURES) == set(PLACES)
    for place, names in vllm.SIGNATURES.items():
        recorded = [n.rstrip("=") for n in RECORDED[place][2].split()]
        assert recorded[: len(names)] == list(names)
    ours = inspect.signature(vllm.Verifier().rejection_sample).parameters
    place = "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils:rejection_sample"
    assert [n.rstrip("=") for n in RECORDED[place][2].split()] == list(ours)[:-1]
    forward = "vllm.v1.sample.rejection_sampler:RejectionSampler.forward"
    assert RECORDED[forward][2].split() == list(
        inspect.signature(_vllm_v1.PackedSampler.forward).parameters
    )


def test_install_v1(monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine(monkeypatch)
    module = found["vllm.v1.worker.gpu_model_runner"]
    base = module.RejectionSampler
    assert vllm.install() == ["V1", "newer"]
    assert vllm.install() == ["V1", "newer"]  # once for every process, and harmless twice
    runner = module.GPUModelRunner(config(rule="block"), "cpu")
    sampler = runner.rejection_sampler
    assert isinstance(sampler, base)
    assert isinstance(sampler, _vllm_v1.PackedSampler)
    assert sampler.verifier.options.rule == "block"
    assert [r.name for r in sampler._rules()] == ["typical"]
    assert sampler._engine() is found["vllm.v1.sample.rejection_sampler"]
    assert module.RejectionSampler is base
    plain = SimpleNamespace(speculative_config=None)
    assert type(module.GPUModelRunner(plain, "cpu").rejection_sampler) is base
    with pytest.raises(ValueError, match="pipeline_parallel_size must be 1"):
        module.GPUModelRunner(config(stages=4), "cpu")
    assert module.RejectionSampler is base


def test_install_newer(monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine(monkeypatch)
    vllm.install()
    module = found["vllm.v1.worker.gpu.spec_decode.rejection_sampler"]
    before = module.rejection_sample
    runner = found["vllm.v1.worker.gpu.model_runner"].GPUModelRunner
    with pytest.raises(ValueError, match="must be one of lossless, block, coupled"):
        runner(config(rule="rsd"), "cpu")
    assert module.rejection_sample is before
    sampler = found["vllm.v1.worker.gpu.sample.sampler"].Sampler
    for rule in ("coupled", "block"):
        runner(config(rule=rule), "cpu")
        verifier = module.rejection_sample.__self__
        assert verifier.options.rule == rule
        sampler().add_request(3, 10, params(rule="typical"))
        assert verifier._by_slot == {3: vllm.RequestRule("typical")}
        with pytest.raises(ValueError, match="alignops_rule must be one of"):
            sampler().add_request(4, 10, params(rule="best"))


def test_an_engine_with_one_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    engine(monkeypatch, drop=["vllm.v1.worker.gpu_model_runner"])
    assert vllm.install() == ["newer"]


def test_an_engine_without_a_known_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    engine(
        monkeypatch,
        drop=["vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.model_runner"],
    )
    with pytest.raises(RuntimeError, match="must have a model runner that is known"):
        vllm.install()


@pytest.mark.parametrize("name", ["rejection_sample", "forward", "add_request"])
def test_an_unknown_version_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = engine(monkeypatch, {name: "* another"})
    runners = [
        found[f"vllm.v1.worker.{n}"].GPUModelRunner
        for n in ("gpu_model_runner", "gpu.model_runner")
    ]
    before = [r.__init__ for r in runners]
    with pytest.raises(RuntimeError, match=r"vllm 0.99: .* must have the parameters .*another"):
        vllm.install()
    assert [r.__init__ for r in runners] == before
    engine(monkeypatch, {name: "another="})
    vllm.install()


def test_nothing_is_replaced_if_the_self_test_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine(monkeypatch)
    runner = found["vllm.v1.worker.gpu_model_runner"].GPUModelRunner
    before, honest = runner.__init__, vllm.verify
    monkeypatch.setattr(
        vllm, "verify", lambda *a, **kw: honest(*a, **kw | {"positions": kw["positions"] + 1})
    )
    with pytest.raises(RuntimeError, match=r"vllm: case \d+ of the self-test must give"):
        vllm.install()
    assert runner.__init__ is before


def test_the_plugin_is_switched_on_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ALIGNOPS_VLLM", raising=False)
    vllm.register()
    monkeypatch.setenv("ALIGNOPS_VLLM", "1")
    with pytest.raises(ImportError):
        vllm.register()
    found = engine(monkeypatch)
    vllm.register()
    assert hasattr(found["vllm.v1.worker.gpu_model_runner"].GPUModelRunner.__init__, "alignops")


def test_importing_the_adapters_imports_no_engine() -> None:
    code = (
        "import sys, alignops.integrations.vllm, alignops.integrations.sglang\n"
        "print(*sorted({'vllm', 'sglang', 'sgl_kernel', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
