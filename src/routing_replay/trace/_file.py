"""Traces as files: written in one step, or not at all."""

import os
import secrets
from pathlib import Path

from routing_replay.errors import TraceFormatError
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace._wire import MAX_DECODED_BYTES, decode_trace, encode_trace


def save_trace(trace: RoutingTrace, path: str | os.PathLike[str], *, codec: str = "raw") -> None:
    """Write a trace to a file, replacing what was there in one step.

    The bytes go to a temporary file in the same folder, are flushed to the disk, and take the name
    only then: a reader, or a machine that lost power, sees the old file or the whole new one.

    Args:
        trace: A trace with valid content.
        path: The file, customarily `*.rrt`; its folder must exist.
        codec: As for `encode_trace`.

    Raises:
        TraceFormatError: The content is not valid; nothing is written.
        OSError: The file system refuses; the old file, if any, is as it was.
    """
    data = encode_trace(trace, codec=codec)
    target = Path(path)
    temporary = target.with_name(f".rrt-{secrets.token_hex(8)}.tmp")
    try:
        # Not the tempfile module: its files are private to the user whatever the umask says.
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(target.parent)


def load_trace(
    path: str | os.PathLike[str], *, max_decoded_bytes: int = MAX_DECODED_BYTES
) -> RoutingTrace:
    """Read a trace from a file and check it.

    Args:
        path: A file that holds one trace.
        max_decoded_bytes: As for `decode_trace`.

    Returns:
        The trace.

    Raises:
        TraceFormatError: The file does not hold a valid trace; see `decode_trace`.
        OSError: The file cannot be read.
    """
    source = Path(path)
    data = source.read_bytes()
    try:
        return decode_trace(data, max_decoded_bytes=max_decoded_bytes)
    except TraceFormatError as err:
        raise TraceFormatError(f"{source}: {err}") from err


def flush_folder(folder: Path) -> None:
    """Make a rename in a folder last through a loss of power."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
