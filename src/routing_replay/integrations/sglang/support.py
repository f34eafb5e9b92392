"""Which SGLang this library knows, which of its options lose rows in silence, and what to do about findings."""

from collections.abc import Mapping
from dataclasses import dataclass

from routing_replay.errors import CaptureError
from routing_replay.integrations.versions import EngineVersion

__all__ = [
    "SERVE_COMMAND",
    "SGLANG_REMEDIES",
    "SGLANG_UNSUPPORTED",
    "SGLANG_VERSIONS",
    "UnsupportedOption",
    "check_server_options",
]

SERVE_COMMAND = "python -m sglang.launch_server --model-path MODEL --enable-return-routed-experts"

SGLANG_VERSIONS = (
    EngineVersion(series="0.5.23", note="read, and tested with recorded responses; never run here"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnsupportedOption:
    """An option with which SGLang returns wrong rows without saying so.

    Attributes:
        name: As `/server_info` names it.
        accepted: The values with which rows are right.
        reason: What goes wrong with any other.
        upstream: Where it was met; empty where it was found by reading the source.
    """

    name: str
    accepted: tuple[object, ...]
    reason: str
    upstream: tuple[str, ...] = ()


SGLANG_UNSUPPORTED = (
    UnsupportedOption(
        name="enable_return_routed_experts",
        accepted=(True,),
        reason="nothing is captured",
    ),
    UnsupportedOption(
        name="pp_size",
        accepted=(1,),
        reason="each pipeline stage fills its own layers and the others stay zero",
        upstream=("sglang#12162",),
    ),
    UnsupportedOption(
        name="enable_hierarchical_cache",
        accepted=(False,),
        reason="KV that comes back from the host has another request's rows",
        upstream=("sglang#26975",),
    ),
    UnsupportedOption(
        name="disaggregation_mode",
        accepted=("null", None),
        reason="the decode side returns stale rows for the prompt",
        upstream=("sglang#22916",),
    ),
    UnsupportedOption(
        name="speculative_eagle_topk",
        accepted=(None, 1),
        reason="the accepted path of a tree is moved without its rows",
    ),
    UnsupportedOption(
        name="enable_two_batch_overlap",
        accepted=(False,),
        reason="the second half of a batch overwrites the rows of the first",
    ),
)
"""An option that a server does not report is taken to be at its default, with which rows are right."""


def check_server_options(info: Mapping[str, object]) -> None:
    """Refuse a server that is known to return wrong rows.

    Args:
        info: Its `/server_info`.

    Raises:
        CaptureError: An option has a value with which rows are wrong.
    """
    for option in SGLANG_UNSUPPORTED:
        if option.name not in info or info[option.name] in option.accepted:
            continue
        known = f" ({', '.join(option.upstream)})" if option.upstream else ""
        accepted = " or ".join(repr(value) for value in option.accepted)
        raise CaptureError(
            f"this SGLang server runs with {option.name}={info[option.name]!r}: {option.reason}{known}; start it with "
            f"{option.name}={accepted}: {SERVE_COMMAND}"
        )


_NOT_CAPTURED = (
    "choose another --moe-runner-backend: SGLang captures nothing where the kernel itself routes (flashinfer_trtllm, "
    "flashinfer_mxfp4, triton_kernel)"
)
_MOVED = "switch off what moves KV (hierarchical cache, disaggregation, tree speculation): rows stay behind"
_CONFIG = "pass the config.json of the model that SGLang serves"

SGLANG_REMEDIES: Mapping[str, str] = {
    "all_zero": _NOT_CAPTURED,
    "zero_layers": _NOT_CAPTURED,
    "zero_cells": _NOT_CAPTURED,
    "zero_rows": _MOVED,
    "zero_front_rows": _MOVED,
    "frozen_rows": _NOT_CAPTURED,
    "rows_of_another_request": _MOVED,
    "ids_out_of_range": _CONFIG,
    "layer_axis": _CONFIG,
    "top_k": _CONFIG,
    "": "use another version of SGLang, and report this with the canary's message",
}
"""By the code of a finding; `""` for every other."""
