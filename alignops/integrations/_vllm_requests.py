"""What requests and an engine of vLLM ask for: a rule and its parameters, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PREFIX = "alignops_"
EXACT = ("lossless", "block", "coupled")
#: Parameters of each rule that a request may choose.
PARAMETERS: dict[str, dict[str, type]] = {
    **{rule: {} for rule in EXACT},
    "typical": {"eps": float, "delta": float},
    "relaxed": {"m": int, "r": float, "delta": float},
    "rsd": {"p_th": float, "top_n": int, "trials": int, "retry": str},
    "nudge": {"gamma": float, "eos_lookahead": int},
}


@dataclass(frozen=True)
class RequestRule:
    """A rule and its parameters, as a request chose them."""

    name: str = "lossless"
    params: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, sampling_params: Any, default: RequestRule | None = None) -> RequestRule:
        """The rule in the extra arguments of a request; `default` if they name none.

        Args:
            sampling_params: the engine's SamplingParams.
            default: the engine's rule.

        Raises:
            ValueError: an unknown rule or parameter, or structured output with a rule that is not
                exact.

        Example:
            >>> from types import SimpleNamespace
            >>> extra = {"alignops_rule": "typical", "alignops_eps": 0.1}
            >>> RequestRule.of(SimpleNamespace(extra_args=extra))
            RequestRule(name='typical', params=(('eps', 0.1),))
        """
        extra = {
            key.removeprefix(PREFIX): value
            for key, value in (getattr(sampling_params, "extra_args", None) or {}).items()
            if key.startswith(PREFIX)
        }
        name = extra.pop("rule", None)
        rule = (default or cls()) if name is None else cls(name)
        if rule.name not in PARAMETERS:
            raise ValueError(
                f"vllm: {PREFIX}rule must be one of {', '.join(PARAMETERS)}, got {rule.name!r}"
            )
        known = PARAMETERS[rule.name]
        for key in extra:
            if key not in known:
                raise ValueError(
                    f"vllm: {PREFIX}{key} must be a parameter of the rule {rule.name!r} "
                    f"({', '.join(known) or 'it has none'})"
                )
        structured = any(
            getattr(sampling_params, name, None) is not None
            for name in ("structured_outputs", "guided_decoding")
        )
        if structured and rule.name not in EXACT:
            raise ValueError(
                f"vllm: {PREFIX}rule must be one of {', '.join(EXACT)} with structured output, got "
                f"{rule.name!r}"
            )
        if not extra:
            return rule
        return cls(rule.name, tuple(sorted((k, known[k](v)) for k, v in extra.items())))


@dataclass(frozen=True)
class Options:
    """What an engine is configured with, `additional_config["alignops"]`.

    Args:
        rule: of requests that choose none: "lossless", "block" or "coupled".
        word_start: ids that begin a word, for "nudge".
        eos_ids: end of text, for "nudge".

    Raises:
        ValueError: the rule is not exact.
    """

    rule: str = "lossless"
    word_start: Sequence[int] = ()
    eos_ids: Sequence[int] = ()

    def __post_init__(self) -> None:
        if self.rule not in EXACT:
            raise ValueError(
                f"vllm: rule must be one of {', '.join(EXACT)} for a whole engine, got "
                f"{self.rule!r}"
            )

    @classmethod
    def of(cls, vllm_config: Any) -> Options:
        """Read them; refuse what the rules cannot serve.

        Raises:
            ValueError: pipeline parallelism, synthetic acceptance, or unknown options.
        """
        stages = vllm_config.parallel_config.pipeline_parallel_size
        if stages != 1:
            raise ValueError(f"vllm: pipeline_parallel_size must be 1, got {stages}")
        method = getattr(vllm_config.speculative_config, "rejection_sample_method", None)
        if method == "synthetic":
            raise ValueError("vllm: rejection_sample_method must not be 'synthetic'")
        given = dict((getattr(vllm_config, "additional_config", None) or {}).get("alignops", {}))
        unknown = set(given) - {"rule", "word_start", "eos_ids"}
        if unknown:
            raise ValueError(f"vllm: unknown options of alignops: {', '.join(sorted(unknown))}")
        if method == "block":
            given.setdefault("rule", "block")
        return cls(**given)
