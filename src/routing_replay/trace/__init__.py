"""The routing trace: which experts every token of one sequence met, with what is needed to check it.

Depends on numpy alone; torch is imported only inside `RoutingTrace.to_torch`. The file and wire
format is specified in `docs/trace_format.md`.
"""

from routing_replay.trace._codecs import CODEC_NAMES
from routing_replay.trace._digest import token_digests
from routing_replay.trace._dtype import trace_id_dtype
from routing_replay.trace._file import load_trace, save_trace
from routing_replay.trace._model_routing import ModelRouting
from routing_replay.trace._pack import PackedSequence, PackedTraces, pack_traces
from routing_replay.trace._rollout import (
    RolloutReader,
    RolloutSample,
    RolloutWriter,
    is_rollout,
)
from routing_replay.trace._store_reader import TraceStoreReader
from routing_replay.trace._store_writer import TraceStoreWriter
from routing_replay.trace._tensors import TraceTensors
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace._wire import decode_trace, encode_trace
from routing_replay.trace.export import EXPORT_FORMATS, ExportFormat, ExportParameters

__all__ = [
    "CODEC_NAMES",
    "EXPORT_FORMATS",
    "ExportFormat",
    "ExportParameters",
    "ModelRouting",
    "PackedSequence",
    "PackedTraces",
    "RolloutReader",
    "RolloutSample",
    "RolloutWriter",
    "RoutingTrace",
    "TraceStoreReader",
    "TraceStoreWriter",
    "TraceTensors",
    "decode_trace",
    "encode_trace",
    "is_rollout",
    "load_trace",
    "pack_traces",
    "save_trace",
    "token_digests",
    "trace_id_dtype",
]
