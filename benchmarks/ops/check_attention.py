"""Check paged attention, the residual norm and the rotation on a GPU, then time them; write JSON.

python benchmarks/ops/check_attention.py --out docs/results/attention.json --commit "$(git rev-parse HEAD)"

Times are per layer of a CUDA graph that goes through layers with caches of their own, together larger than the L2 cache
(decoding), or through two layers (prefill): medians with the 20th and 80th percentile. No time is written unless every
check passes. `--sweep` times other tiles and numbers of splits as well.
"""

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, product
from pathlib import Path

import torch
import triton
from torch import Tensor

from routing_replay.kernels import add_rms_norm, norm_rotate_store, paged_attention
from routing_replay.kernels.attention import paged_attention_reference
from routing_replay.kernels.attention._triton import launch_prefill
from routing_replay.kernels.attention._triton_decode import launch_decode
from routing_replay.kernels.attention.tiles import AttentionTile
from routing_replay.kernels.norm import add_rms_norm_reference
from routing_replay.kernels.rotary import norm_rotate_store_reference

HEADS, KV_HEADS, HEAD_DIM = 32, 4, 128
COLD_BYTES = 256 * 2**20
ROUNDS = 40
# Relative L2 distance from float32: outputs and weights are rounded once each; a wrong key is far beyond it.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 2e-6}
Timing = dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of one layer; slots that hold no key are NaN."""

    query: Tensor
    kv_cache: Tensor
    block_tables: Tensor
    query_starts: Tensor
    context_lens: Tensor
    max_query_len: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the launchers take."""
        return self.query, self.kv_cache, self.block_tables, self.query_starts, self.context_lens

    def attend(self, *, batch_invariant: bool = False) -> Tensor:
        """Call the op."""
        return paged_attention(
            self.query,
            self.kv_cache,
            block_tables=self.block_tables,
            query_starts=self.query_starts,
            context_lens=self.context_lens,
            max_query_len=self.max_query_len,
            batch_invariant=batch_invariant,
        )

    def expected(self) -> Tensor:
        """Attend in float32."""
        return paged_attention_reference(
            self.query.float(),
            self.kv_cache.float(),
            block_tables=self.block_tables,
            query_starts=self.query_starts,
            context_lens=self.context_lens,
        )


def make_step(
    contexts: Sequence[int],
    rows: Sequence[int],
    *,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_dim: int = HEAD_DIM,
    block_size: int = 16,
    padding: int = 0,
    dtype: torch.dtype = torch.bfloat16,
) -> Step:
    """Return a step of sequences whose blocks lie anywhere in the cache."""
    blocks_of = [-(-context // block_size) for context in contexts]
    num_blocks = sum(blocks_of) + 1
    shape = (2, num_blocks, block_size, kv_heads, head_dim)
    kv_cache = torch.randn(shape, device="cuda", dtype=dtype)
    order = torch.randperm(num_blocks).int()
    tables = torch.full((len(contexts), max(blocks_of)), 2**30, dtype=torch.int32)
    kv_cache[:, order[-1]] = float("nan")
    for sequence, pieces in enumerate(order[:-1].split(blocks_of)):
        tables[sequence, : len(pieces)] = pieces
        if contexts[sequence] % block_size:
            kv_cache[:, pieces[-1], contexts[sequence] % block_size :] = float("nan")
    starts = torch.tensor([0, *rows]).cumsum(0).int()
    return Step(
        query=torch.randn(sum(rows) + padding, heads, head_dim, device="cuda", dtype=dtype),
        kv_cache=kv_cache,
        block_tables=tables.cuda(),
        query_starts=starts.cuda(),
        context_lens=torch.tensor(contexts, dtype=torch.int32, device="cuda"),
        max_query_len=max(rows),
    )


def check_accuracy() -> list[dict[str, object]]:
    """Compare steps of every kind with float32; raise where one is off, or where padding is not zero."""
    steps = {
        "mixed": ((640, 0, 127, 128, 129, 1, 64, 0, 300), (3, 2, 127, 1, 129, 1, 33, 0, 1), 5),
        "prefill": ((1000, 65), (1000, 65), 0),
        "chunk": ((2100, 777), (517, 700), 3),
        "decode": ((1, 63, 64, 65, 0, 640, 2048, 127, 4000), (1,) * 9, 3),
        "decode_many": (tuple(range(1, 301)), (1,) * 300, 20),
        "decode_one": ((8191,), (1,), 0),
    }
    first, others = (
        (32, 4, 128),
        ((32, 32, 64), (16, 4, 64), (28, 4, 128), (8, 1, 128), (4, 2, 256)),
    )
    kinds = [(first, *rest) for rest in product(TOLERANCE, (16, 64))]
    kinds += [(shape, torch.bfloat16, 16) for shape in others]
    kinds.append(((4, 2, 256), torch.float32, 16))
    results: list[dict[str, object]] = []
    for (heads, kv_heads, head_dim), dtype, block_size in kinds:
        for name, (contexts, rows, padding) in steps.items():
            step = make_step(
                contexts, rows, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
                block_size=block_size, padding=padding, dtype=dtype,
            )  # fmt: skip
            expected = step.expected()
            is_unused = (expected == 0).flatten(1).all(1)
            for batch_invariant in (False, True):
                out = step.attend(batch_invariant=batch_invariant)
                error = float((out.float() - expected).norm() / expected.norm())
                what = (name, heads, kv_heads, head_dim, dtype, block_size, batch_invariant)
                assert error < TOLERANCE[dtype], (what, error)
                assert (out[is_unused] == 0).all(), what
                results.append({"case": [str(part) for part in what], "relative_error": error})
    return results


def piece_of(step: Step, sequence: int, low: int, high: int) -> Step:
    """Return rows `[low, high)` of one sequence as a step."""
    first, end = step.query_starts[sequence : sequence + 2].tolist()
    context = int(step.context_lens[sequence]) - (end - first) + high
    return replace(
        step,
        query=step.query[first + low : first + high].clone(),
        block_tables=step.block_tables[sequence : sequence + 1].clone(),
        query_starts=torch.tensor([0, high - low], dtype=torch.int32, device="cuda"),
        context_lens=torch.tensor([context], dtype=torch.int32, device="cuda"),
        max_query_len=high - low,
    )


def check_invariance() -> int:
    """Compare, bit for bit, rows of whole prompts beside others with the same rows in chunks, alone, and decoded."""
    count = 0
    kinds = [((32, 4, 128), dtype) for dtype in TOLERANCE]
    kinds += [((16, 16, 64), torch.bfloat16), ((28, 4, 128), torch.bfloat16)]
    for (heads, kv_heads, head_dim), dtype in kinds:
        step = make_step(
            (1500, 40, 0, 333), (1500, 7, 1, 333), heads=heads, kv_heads=kv_heads, head_dim=head_dim, padding=4, dtype=dtype
        )  # fmt: skip
        whole = step.attend(batch_invariant=True)
        bounds_of = {
            0: ((0, 1500), (0, 1, 2, 700, 1499, 1500), tuple(range(0, 1501, 125))),
            1: (tuple(range(8)),),
            3: ((0, 64, 128, 333), (0, 63, 190, 332, 333)),
        }
        for sequence, ways in bounds_of.items():
            first = int(step.query_starts[sequence])
            for low, high in (piece for bounds in ways for piece in pairwise(bounds)):
                out = piece_of(step, sequence, low, high).attend(batch_invariant=True)
                assert torch.equal(out, whole[first + low : first + high]), (sequence, low, high)
                count += 1
        # Decoded together, as a batch of the last row of each prefix.
        lengths = torch.tensor([1, 16, 63, 64, 65, 700, 1499, 1500], device="cuda")
        batch = replace(
            step,
            query=step.query[lengths - 1].clone(),
            block_tables=step.block_tables[:1].repeat(8, 1),
            query_starts=torch.arange(9, dtype=torch.int32, device="cuda"),
            context_lens=lengths.int(),
            max_query_len=1,
        )
        assert torch.equal(batch.attend(batch_invariant=True), whole[lengths - 1])
        count += 8
    return count


def check_graph() -> int:
    """Replay captured steps with other queries, tables and contexts, some of them padding, and compare bit for bit."""
    count = 0
    for batch_invariant, batch in product((False, True), (1, 8, 128)):
        static = make_step((4096,) * batch, (1,) * batch)
        tables, lengths = static.block_tables.clone(), static.context_lens
        static.attend(batch_invariant=batch_invariant)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = static.attend(batch_invariant=batch_invariant)
        for _ in range(5):
            static.query.normal_()
            static.block_tables.copy_(tables[torch.randperm(batch, device="cuda")])
            lengths.copy_(torch.randint(0, 4097, (batch,), device="cuda"))
            graph.replay()
            expected = static.attend(batch_invariant=batch_invariant)
            assert torch.equal(out, expected), (batch_invariant, batch)
            assert (out[lengths == 0] == 0).all()
            count += 1
    return count


def check_norm_and_rotary() -> dict[str, float]:
    """Compare with plain torch on the same GPU; return the largest share of elements that differ by a last place."""
    worst = {"add_rms_norm": 0.0, "norm_rotate_store": 0.0}
    for dtype, rows in product((torch.bfloat16, torch.float16, torch.float32), (1, 17, 1000)):
        limit = {torch.bfloat16: 1e-3, torch.float16: 5e-3, torch.float32: 0.6}[dtype]
        place = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}[dtype]
        pairs: list[tuple[str, Tensor, Tensor]] = []
        for size in (2048, 5120, 7168, 96):
            x, residual = torch.randn(2, rows, size, device="cuda", dtype=dtype)
            weight = torch.randn(size, device="cuda", dtype=dtype)
            own = add_rms_norm(x, residual, weight, 1e-6)
            wanted = add_rms_norm_reference(x, residual, weight, 1e-6)
            assert torch.equal(own[1], wanted[1])
            pairs.append(("add_rms_norm", own[0], wanted[0]))
        for weights in (True, False):
            arguments = rotary_arguments(rows, dtype, has_weights=weights)
            sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS}
            cache = arguments["kv_cache"].clone()
            query = norm_rotate_store(**{**arguments, "kv_cache": cache}, **sizes)
            expected = norm_rotate_store_reference(**arguments, **sizes)
            expected_cache = arguments["kv_cache"]
            assert torch.equal(cache[1], expected_cache[1])
            if not weights:
                assert torch.equal(query, expected)
                assert torch.equal(cache, expected_cache)
            pairs.append(("norm_rotate_store", query, expected))
            pairs.append(("norm_rotate_store", cache[0], expected_cache[0]))
        for name, own, wanted in pairs:
            share = float((own != wanted).float().mean())
            # A rounding of a norm that falls the other way is carried through a rotation with its size, not its share.
            torch.testing.assert_close(own, wanted, rtol=2 * place, atol=8 * place)
            # In float32 a sum in another order can move every element of a row by its last bit.
            assert dtype is torch.float32 or share < limit, (name, dtype, rows, share)
            if dtype is torch.bfloat16:
                worst[name] = max(worst[name], share)
    return worst


def rotary_arguments(rows: int, dtype: torch.dtype, *, has_weights: bool) -> dict[str, Tensor]:
    """Return tensors of a step for `norm_rotate_store`, every seventh row not stored."""
    width = (HEADS + 2 * KV_HEADS) * HEAD_DIM
    angles = torch.randn(4096, HEAD_DIM // 2, device="cuda").repeat(1, 2)
    slots = torch.randperm(16 * (rows // 16 + 1), device="cuda")[:rows]
    slots[6::7] = -1
    weights = torch.randn(2, HEAD_DIM, device="cuda", dtype=dtype) if has_weights else (None, None)
    return {
        "qkv": torch.randn(rows, width, device="cuda", dtype=dtype),
        "q_weight": weights[0],
        "k_weight": weights[1],
        "eps": 1e-6,
        "cos": angles.cos().to(dtype),
        "sin": angles.sin().to(dtype),
        "positions": torch.randint(0, 4096, (rows,), device="cuda"),
        "kv_cache": torch.zeros(2, rows // 16 + 1, 16, KV_HEADS, HEAD_DIM, device="cuda", dtype=dtype),
        "slot_mapping": slots,
    }  # fmt: skip


def timed(calls: Sequence[Callable[[], object]]) -> Timing:
    """Time a graph of calls; microseconds of one call."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    for _ in range(3):
        graph.replay()
    times: list[float] = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / len(calls))
    cuts = statistics.quantiles(times, n=5)
    return {"us": statistics.median(times), "p20": cuts[0], "p80": cuts[3]}


def decode_layers(batch: int, context: int, block_size: int, *, ragged: bool = False) -> tuple[list[Step], int]:  # fmt: skip
    """Return steps of enough layers to fill the L2 cache several times, and the bytes that one layer must read and write."""
    contexts = [context] * batch
    if ragged:
        contexts = torch.randint(context // 4, 7 * context // 4 + 1, (batch,)).tolist()
    kv_bytes = sum(contexts) * 2 * KV_HEADS * HEAD_DIM * 2
    num_layers = min(max(-(-COLD_BYTES // kv_bytes), 2), 200)
    first = make_step(contexts, [1] * batch, block_size=block_size)
    steps = [replace(first, kv_cache=torch.randn_like(first.kv_cache)) for _ in range(num_layers)]
    return steps, kv_bytes + 2 * batch * HEADS * HEAD_DIM * 2


def time_decode() -> Iterator[dict[str, object]]:
    """Time decoding of batches over cold caches."""
    for block_size, context, batch in product((16, 64), (640, 8192), (1, 8, 32, 128)):
        for kind in ("equal", "ragged") if batch > 1 else ("equal",):
            steps, num_bytes = decode_layers(batch, context, block_size, ragged=kind == "ragged")
            for batch_invariant in (False, True):
                calls = [lambda s=step, b=batch_invariant: s.attend(batch_invariant=b) for step in steps]  # fmt: skip
                row = timed(calls)
                yield {
                    "batch": batch, "context": context, "contexts": kind, "block_size": block_size,
                    "batch_invariant": batch_invariant, "layers": len(steps), **row, "tb_per_s": num_bytes / row["us"] / 1e6,
                }  # fmt: skip
            del steps, calls
            torch.cuda.empty_cache()


def operations(contexts: Sequence[int], rows: Sequence[int]) -> float:
    """Multiplications and additions of the visible keys."""
    seen = sum(n * (context - n) + n * (n + 1) / 2 for context, n in zip(contexts, rows, strict=True))  # fmt: skip
    return 4 * HEADS * HEAD_DIM * seen


PREFILLS = {
    "8192 tokens": ((8192,), (8192,)),
    "4 x 2048 tokens": ((2048,) * 4, (2048,) * 4),
    "2048 tokens after 6144": ((8192,), (2048,)),
    "512 tokens after 512, 32 decode": ((1024, *(640,) * 32), (512, *(1,) * 32)),
}


def time_prefill() -> Iterator[dict[str, object]]:
    """Time prefill and mixed steps, the first beside torch's own attention over contiguous keys."""
    for block_size, (name, (contexts, rows)) in product((16, 64), PREFILLS.items()):
        steps = [make_step(contexts, rows, block_size=block_size) for _ in range(2)]
        work = operations(contexts, rows)
        for batch_invariant in (False, True):
            row = timed([lambda s=step, b=batch_invariant: s.attend(batch_invariant=b) for step in steps])  # fmt: skip
            yield {"step": name, "block_size": block_size, "batch_invariant": batch_invariant, **row, "tflop_per_s": work / row["us"] / 1e6}  # fmt: skip
    query = torch.randn(1, HEADS, 8192, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    key, value = torch.randn(2, 1, KV_HEADS, 8192, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    row = timed([lambda: sdpa(query, key, value, is_causal=True, enable_gqa=True)] * 2)
    work = operations((8192,), (8192,))
    yield {"step": "8192 tokens, torch's scaled_dot_product_attention, contiguous keys", **row, "tflop_per_s": work / row["us"] / 1e6}  # fmt: skip


def time_others() -> Iterator[dict[str, object]]:
    """Time the norm and the rotation of decoding and prefill steps, warm."""
    for rows in (1, 32, 128, 8192):
        x, residual = torch.randn(2, rows, 2048, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(2048, device="cuda", dtype=torch.bfloat16)
        yield {"op": "add_rms_norm", "rows": rows, **timed([partial(add_rms_norm, x, residual, weight, 1e-6)] * 20)}  # fmt: skip
        arguments = rotary_arguments(rows, torch.bfloat16, has_weights=True)
        call = partial(norm_rotate_store, **arguments, num_heads=HEADS, num_kv_heads=KV_HEADS)
        yield {"op": "norm_rotate_store", "rows": rows, **timed([call] * 20)}


def sweep() -> Iterator[dict[str, object]]:
    """Time other tiles: what the choices in tiles.py rest on."""
    scale = HEAD_DIM**-0.5 * 1.4426950408889634
    for context, batch in product((640, 8192), (1, 8, 32, 128)):
        steps, num_bytes = decode_layers(batch, context, 16)
        outs = [torch.empty_like(step.query) for step in steps]
        tiles = ((64, 2, 4), (64, 3, 4), (64, 4, 4), (128, 2, 4), (128, 2, 8), (128, 3, 4), (32, 4, 4), (32, 4, 2), (32, 6, 2))  # fmt: skip
        tried = {max(1, round(processors * 132 / (batch * KV_HEADS))) for processors in (0.5, 1, 2, 3, 4, 6)}  # fmt: skip
        for (keys, stages, warps), splits in product(tiles, sorted(tried)):
            if splits > min(context // keys, 128):
                continue
            tile = AttentionTile(rows=16, keys=keys, stages=stages, warps=warps)
            calls = [
                lambda s=step, o=out, t=tile, n=splits: launch_decode(*s.tensors, o, tile=t, splits=n, scale=scale)
                for step, out in zip(steps, outs, strict=True)
            ]  # fmt: skip
            row = timed(calls)
            yield {"kind": "decode", "batch": batch, "context": context, "tile": [keys, stages, warps], "splits": splits,
                   **row, "tb_per_s": num_bytes / row["us"] / 1e6}  # fmt: skip
        del steps, calls
        torch.cuda.empty_cache()
    step = make_step((8192,), (8192,))
    out = torch.empty_like(step.query)
    tiles = ((128, 64, 2, 8), (128, 64, 3, 8), (128, 64, 4, 8), (128, 128, 2, 8), (64, 64, 2, 4), (64, 64, 3, 4), (64, 128, 2, 4), (128, 32, 3, 8), (128, 32, 4, 8), (256, 64, 2, 8), (256, 64, 3, 16))  # fmt: skip
    for (rows, keys, stages, warps), one_loop in product(tiles, (False, True)):
        tile = AttentionTile(rows=rows, keys=keys, stages=stages, warps=warps)
        name = {"kind": "prefill", "tile": [rows, keys, stages, warps], "one_loop": one_loop}
        try:
            row = timed([lambda t=tile, o=one_loop: launch_prefill(*step.tensors, out, tile=t, one_loop=o)] * 2)  # fmt: skip
        except triton.runtime.errors.OutOfResources as error:
            yield {**name, "refused": str(error)}
            continue
        yield {**name, **row, "tflop_per_s": operations((8192,), (8192,)) / row["us"] / 1e6}


def main() -> None:
    """Check everything, then time everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    parser.add_argument("--sweep", action="store_true", help="also time other tiles")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    accuracy = check_accuracy()
    worst = max(float(str(row["relative_error"])) for row in accuracy)
    print(f"accuracy: {len(accuracy)} cases, worst relative error {worst:.2e}", flush=True)
    record: dict[str, object] = {
        "commit": arguments.commit,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"},
        "checks_passed": {
            "accuracy": len(accuracy),
            "bits_of_rows": check_invariance(),
            "graph_replays": check_graph(),
        },
        "share_of_bf16_elements_that_differ_from_torch": check_norm_and_rotary(),
        "accuracy": accuracy,
    }
    print(json.dumps({key: value for key, value in record.items() if key != "accuracy"}), flush=True)  # fmt: skip
    suites = {"decode": time_decode, "prefill": time_prefill, "others": time_others}
    if arguments.sweep:
        suites["sweep"] = sweep
    for name, suite in suites.items():
        rows: list[dict[str, object]] = []
        for row in suite():
            rows.append(row)
            print(name, json.dumps(row), flush=True)
        record[name] = rows
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
