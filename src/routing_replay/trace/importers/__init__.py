"""Routing in the forms of engines and trainers, bound to tokens and a model, and diagnosed.

Depends on numpy alone. `docs/interop.md` shows each engine, and lists every finding.
"""

from routing_replay.errors import RoutingDiagnosisError
from routing_replay.trace.importers._bind import TokenIds, diagnose
from routing_replay.trace.importers._finding import Finding
from routing_replay.trace.importers._shared_rows import find_shared_rows
from routing_replay.trace.importers._wire import Wire
from routing_replay.trace.importers.response import ImportedChoice, import_response
from routing_replay.trace.importers.sglang import import_sglang
from routing_replay.trace.importers.trainers import (
    import_megatron,
    import_nemo_rl,
    import_prime_rl,
)
from routing_replay.trace.importers.vllm import import_vllm, import_vllm_split

__all__ = [
    "Finding",
    "ImportedChoice",
    "RoutingDiagnosisError",
    "TokenIds",
    "Wire",
    "diagnose",
    "find_shared_rows",
    "import_megatron",
    "import_nemo_rl",
    "import_prime_rl",
    "import_response",
    "import_sglang",
    "import_vllm",
    "import_vllm_split",
]
