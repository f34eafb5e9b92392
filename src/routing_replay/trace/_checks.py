"""What makes arrays and numbers a well-formed trace: cheap structure, and content."""

from typing import Protocol, cast

import numpy as np
import numpy.typing as npt

from routing_replay.errors import TraceFormatError
from routing_replay.trace._dtype import (
    DigestArray,
    IdArray,
    IntArray,
    ValidArray,
    WeightArray,
    trace_id_dtype,
)
from routing_replay.trace._runs import MAX_INT, WeightsVersion, check_runs, is_int

# Bounds the temporary of the distinctness check; a trace of a long request has 1e7 to 1e8 ids.
_CHUNK_IDS = 1 << 20

# Comparing all pairs of columns beats sorting (11 times at top_k 8, 2.6 times at 22), but its cost
# is quadratic in top_k.
_MAX_PAIRWISE_TOP_K = 32


class TraceFields(Protocol):
    """The fields of a trace, as the checks read them."""

    @property
    def ids(self) -> IdArray: ...
    @property
    def valid(self) -> ValidArray: ...
    @property
    def start(self) -> int: ...
    @property
    def layer_ids(self) -> tuple[int, ...]: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k(self) -> int: ...
    @property
    def ordered(self) -> bool: ...
    @property
    def token_digest(self) -> DigestArray: ...
    @property
    def weights_version(self) -> WeightsVersion: ...
    @property
    def weights(self) -> WeightArray | None: ...


def check_layout(
    *, layer_ids: object, num_layers: object, num_experts: object, top_k: object, start: object
) -> None:
    """Check the numbers that describe a trace, before any array is looked at.

    Raises:
        TraceFormatError: A value has the wrong type or lies outside its range.
    """
    named = {"num_layers": num_layers, "num_experts": num_experts, "top_k": top_k, "start": start}
    for name, value in named.items():
        low = 0 if name == "start" else 1
        if not is_int(value, low=low):
            raise TraceFormatError(
                f"{name} = {value!r} ({type(value).__name__}) is not accepted; it must be an int in"
                f" [{low}, {MAX_INT}]"
            )
    experts, slots = cast("int", num_experts), cast("int", top_k)
    trace_id_dtype(experts)
    if slots > experts:
        raise TraceFormatError(
            f"top_k = {slots} exceeds num_experts = {experts}; the experts of a row are distinct"
        )
    _check_layer_ids(layer_ids, num_layers=cast("int", num_layers))


def _check_layer_ids(layer_ids: object, *, num_layers: int) -> None:
    """Check that layer ids strictly increase inside [0, num_layers)."""
    if not isinstance(layer_ids, tuple) or not layer_ids:
        raise TraceFormatError(
            f"layer_ids = {layer_ids!r} is not accepted; it must be a non-empty tuple with the"
            f" decoder layer of each MoE layer"
        )
    previous = -1
    for slot, layer_idx in enumerate(cast("tuple[object, ...]", layer_ids)):
        if not is_int(layer_idx, low=previous + 1, high=num_layers - 1):
            raise TraceFormatError(
                f"layer_ids[{slot}] = {layer_idx!r} is not accepted; layer_ids must strictly"
                f" increase and lie in [0, num_layers = {num_layers})"
            )
        previous = cast("int", layer_idx)


def check_structure(trace: TraceFields) -> None:
    """Check types, dtypes, shapes and memory order; the cost does not depend on the rows.

    Raises:
        TraceFormatError: A field is not of the form that `RoutingTrace` documents.
    """
    check_layout(
        layer_ids=trace.layer_ids,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        start=trace.start,
    )
    if type(trace.ordered) is not bool:
        raise TraceFormatError(f"ordered = {trace.ordered!r} is not accepted; it must be a bool")
    id_dtype = trace_id_dtype(trace.num_experts)
    _check_array("ids", trace.ids, dtypes=(id_dtype,), shape=(-1, *_row_shape(trace)))
    rows = len(trace.ids)
    _check_array("valid", trace.valid, dtypes=(np.dtype(np.bool_),), shape=(rows,))
    _check_array("token_digest", trace.token_digest, dtypes=(np.dtype(np.uint32),), shape=(rows,))
    if trace.weights is not None:
        floats = (np.dtype(np.float16), np.dtype(np.float32))
        _check_array("weights", trace.weights, dtypes=floats, shape=(rows, *_row_shape(trace)))
    if trace.start + rows > MAX_INT:
        raise TraceFormatError(f"start = {trace.start} plus {rows} rows exceeds {MAX_INT}")
    check_runs(trace.weights_version, start=trace.start, num_rows=rows)


def _row_shape(trace: TraceFields) -> tuple[int, int]:
    """Return [L, K]."""
    return (len(trace.layer_ids), trace.top_k)


def _check_array(
    name: str, value: object, *, dtypes: tuple[np.dtype[np.generic], ...], shape: tuple[int, ...]
) -> None:
    """Check one array against its dtypes and its shape, where -1 stands for any number of rows."""
    # Subclasses (masked arrays, matrices) carry meaning that a trace would lose.
    if type(value) is not np.ndarray:
        raise TraceFormatError(f"{name} is a {type(value).__name__}; it must be a numpy.ndarray")
    array = cast("npt.NDArray[np.generic]", value)
    if array.dtype not in dtypes:
        accepted = " or ".join(str(dtype) for dtype in dtypes)
        raise TraceFormatError(
            f"{name} has dtype {array.dtype}; it must be {accepted} in native byte order"
        )
    fits = array.ndim == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, array.shape, strict=True)
    )
    if not fits:
        wanted = ", ".join("rows" if want == -1 else str(want) for want in shape)
        raise TraceFormatError(f"{name} has shape {list(array.shape)}; it must be [{wanted}]")
    if not array.flags.c_contiguous:
        raise TraceFormatError(
            f"{name} with strides {array.strides} is not contiguous in C order; pass"
            f" numpy.ascontiguousarray({name})"
        )


def check_content(trace: TraceFields) -> None:
    """Check every id and weight of a structurally sound trace.

    Raises:
        TraceFormatError: An id is out of range or repeated in its row and layer, an invalid row
            does not hold arange(K) (and weights of 0), or a weight is not finite.
    """
    _check_missing_rows(trace)
    chunk_rows = max(1, _CHUNK_IDS // (len(trace.layer_ids) * trace.top_k))
    for first in range(0, len(trace.ids), chunk_rows):
        _check_ids(trace, trace.ids[first : first + chunk_rows], first_row=first)
    if trace.weights is not None and not np.isfinite(trace.weights).all():
        row, slot, rank = _first_index(~np.isfinite(trace.weights))
        raise TraceFormatError(
            f"weights[{row}, {slot}, {rank}] = {trace.weights[row, slot, rank]} (token index"
            f" {trace.start + row}) is not finite; capture the weights again, or drop them"
        )


def _check_missing_rows(trace: TraceFields) -> None:
    """Check that rows marked invalid hold the one filler that a trace allows."""
    missing = np.flatnonzero(~trace.valid)
    if missing.size == 0:
        return
    filler = np.arange(trace.top_k, dtype=trace.ids.dtype)
    other = (trace.ids[missing] != filler).any(axis=(1, 2))
    if other.any():
        row = int(missing[int(np.argmax(other))])
        raise TraceFormatError(
            f"row {row} (token index {trace.start + row}) is marked invalid but does not hold"
            f" arange({trace.top_k}) in every layer; build traces with RoutingTrace.from_rows"
        )
    if trace.weights is not None and trace.weights[missing].any():
        row = int(missing[int(np.argmax(trace.weights[missing].any(axis=(1, 2))))])
        raise TraceFormatError(
            f"row {row} (token index {trace.start + row}) is marked invalid but has weights other"
            f" than 0; build traces with RoutingTrace.from_rows"
        )


def _check_ids(trace: TraceFields, ids: IdArray, *, first_row: int) -> None:
    """Check range and distinctness of some rows, which start at `first_row` of the trace."""
    # The maximum first: it costs a tenth of the comparison, which only a bad trace needs.
    if int(ids.max()) >= trace.num_experts:
        row, slot, rank = _first_index(ids >= trace.num_experts)
        raise TraceFormatError(
            f"ids[{first_row + row}, {slot}, {rank}] = {ids[row, slot, rank]} (token index"
            f" {trace.start + first_row + row}, decoder layer {trace.layer_ids[slot]}) is outside"
            f" [0, {trace.num_experts}); check num_experts, or mark the row in valid"
        )
    repeated = repeats_expert(ids)
    if repeated.any():
        row, slot = _first_index(repeated)
        raise TraceFormatError(
            f"ids[{first_row + row}, {slot}] = {ids[row, slot].tolist()} (token index"
            f" {trace.start + first_row + row}, decoder layer {trace.layer_ids[slot]}) repeats an"
            f" expert; the experts of a row and layer are distinct"
        )


def repeats_expert(ids: IntArray) -> ValidArray:
    """Tell for every row and layer whether an expert occurs twice."""
    top_k = ids.shape[2]
    if top_k > _MAX_PAIRWISE_TOP_K:
        ranked = np.sort(ids, axis=-1)
        return (ranked[..., 1:] == ranked[..., :-1]).any(axis=-1)
    columns = np.ascontiguousarray(np.moveaxis(ids, -1, 0))
    repeated = np.zeros(ids.shape[:2], dtype=np.bool_)
    for rank in range(1, top_k):
        for earlier in range(rank):
            repeated |= columns[rank] == columns[earlier]
    return repeated


def _first_index(mask: npt.NDArray[np.bool_]) -> tuple[int, ...]:
    """Return the position of the first true element in C order."""
    return tuple(int(idx) for idx in np.unravel_index(int(np.argmax(mask)), mask.shape))
