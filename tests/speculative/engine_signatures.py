"""Parameters of the functions of serving engines that alignops replaces or calls, as published.

Read from the public repositories at the commits named here. A parameter with "=" has a default.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

_TREE = "predicts accept_index accept_token_num candidates"
_LISTS = "retrive_index retrive_next_token retrive_next_sibling"
_COINS = "uniform_samples uniform_samples_for_final_sampling target_probs draft_probs"

#: place: (repository, commit, parameters).
RECORDED: dict[str, tuple[str, str, str]] = {
    "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils:rejection_sample": (
        "vllm-project/vllm",
        "02e318bde2ccdff60271df55b2898c839410616f",
        "target_logits draft_logits draft_sampled cu_num_logits pos idx_mapping "
        "expanded_idx_mapping expanded_local_pos temperature seed num_speculative_steps "
        "synthetic_conditional_rates= use_fp64= use_block_verification=",
    ),
    "vllm.v1.worker.gpu.sample.sampler:Sampler.add_request": (
        "vllm-project/vllm",
        "0120ce5a60f1a56090b1430eb67469f33029b86a",
        "self req_idx prompt_len sampling_params",
    ),
    "vllm.v1.sample.rejection_sampler:RejectionSampler.forward": (
        "vllm-project/vllm",
        "7f6fc1c5ce8d02f473b1b923debbfef3fa0b7a6a",
        "self metadata draft_probs logits sampling_metadata",
    ),
    "vllm.v1.sample.rejection_sampler:RejectionSampler.apply_logits_processors": (
        "vllm-project/vllm",
        "7f6fc1c5ce8d02f473b1b923debbfef3fa0b7a6a",
        "self logits sampling_metadata metadata",
    ),
    "vllm.v1.sample.rejection_sampler:RejectionSampler._get_logprobs_tensors": (
        "vllm-project/vllm",
        "7f6fc1c5ce8d02f473b1b923debbfef3fa0b7a6a",
        "self max_num_logprobs metadata logits target_logits bonus_logits sampled_token_ids",
    ),
    "vllm.v1.sample.sampler:Sampler.apply_logits_processors": (
        "vllm-project/vllm",
        "3e342658b2e9c85a30a54d19e64e5ad77b8a26a6",
        "self logits sampling_metadata predict_bonus_token",
    ),
    "sglang.srt.speculative.eagle_utils:verify_tree_greedy_func": (
        "sgl-project/sglang",
        "003ddbce039cd49b05c84568b7b357031366abf7",
        f"{_TREE} {_LISTS.replace('retrive', 'retrieve')} target_predict topk=",
    ),
    "sglang.srt.speculative.eagle_utils:build_tree_kernel_efficient": (
        "sgl-project/sglang",
        "003ddbce039cd49b05c84568b7b357031366abf7",
        "bonus_tokens parent_list top_scores_index draft_tokens seq_lens seq_lens_sum topk "
        "spec_steps num_verify_tokens tree_mask_mode= tree_mask_buf= fill_prefix_mask=",
    ),
    "sglang.kernels.ops.speculative.sampling:tree_speculative_sampling_target_only": (
        "sgl-project/sglang",
        "f0598ca9456717c0dd5248da1b3bac7c992964a7",
        f"{_TREE} {_LISTS} {_COINS} threshold_single= threshold_acc= deterministic=",
    ),
    "sglang.kernels.ops.speculative.reject_sampling:chain_speculative_sampling_triton": (
        "sgl-project/sglang",
        "1d33ae16af3c59be73feda29cb4b5351f22e93be",
        f"{_TREE} {_LISTS} {_COINS} threshold_single threshold_acc deterministic",
    ),
}


def stand_in(place: str, body: Callable[..., Any] | None = None, extra: str = "") -> Any:
    """A function with the recorded parameters, then `extra`, that calls body(**arguments)."""
    names = f"{RECORDED[place][2]} {extra}".split()
    head = ", ".join(n.replace("=", "=None") for n in names)
    scope: dict[str, Any] = {"body": body or (lambda **_: None)}
    exec(f"def function({head}):\n    return body(**locals())", scope)
    return scope["function"]


def modules(*names: str) -> dict[str, ModuleType]:
    """Empty modules of these names and of the packages that hold them, linked to each other."""
    found: dict[str, ModuleType] = {}
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts) + 1):
            full = ".".join(parts[:i])
            if full not in found:
                found[full] = ModuleType(full)
                found[full].__path__ = []
                if i > 1:
                    setattr(found[".".join(parts[: i - 1])], parts[i - 1], found[full])
    return found
