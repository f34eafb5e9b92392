"""The trace store: thousands of traces in one folder, appended safely, read at random, also while it grows."""

from routing_replay.trace._store_reader import TraceStoreReader
from routing_replay.trace._store_writer import TraceStoreWriter

__all__ = ["TraceStoreReader", "TraceStoreWriter"]
