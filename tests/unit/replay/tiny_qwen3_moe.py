"""Random tiny Qwen3-MoE models, batches in every layout, and traces to replay in them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from routing_replay.replay import Packed, Padded
from routing_replay.trace import RoutingTrace

VOCAB = 64
NUM_LAYERS = 3
LAYER_IDS = (1, 2)
SHAPES = [(8, 2), (16, 4)]
LENGTHS = (5, 9, 2)


def build_model(
    num_experts: int = 8,
    top_k: int = 2,
    *,
    experts: str = "eager",
    attention: str = "sdpa",
    dense: tuple[int, ...] = (0,),
    norm_topk_prob: bool = True,
) -> Qwen3MoeForCausalLM:
    config = Qwen3MoeConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=num_experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=norm_topk_prob,
        mlp_only_layers=list(dense),
        max_position_embeddings=128,
        use_cache=False,
        attn_implementation=attention,
        experts_implementation=experts,
    )
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # The default scale leaves the experts so weak that a wrong one hardly shows.
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
            assert "norm" in name or parameter.dim() > 1
    return model


@dataclass(frozen=True, kw_only=True)
class Batch:
    layout: Padded | Packed
    inputs: dict[str, Tensor]
    tokens: list[list[int]]
    rows: list[list[int]]
    """Router row of every token of every sequence."""

    def logits(self, model: torch.nn.Module) -> Tensor:
        return model(**self.inputs).logits

    def sequence_rows(self, per_row: Tensor, idx: int) -> Tensor:
        return per_row.reshape(-1, *per_row.shape[2:])[self.rows[idx]]


def random_tokens(lengths: tuple[int, ...] = LENGTHS, seed: int = 1) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(VOCAB, size=length).tolist() for length in lengths]


def padded_batch(tokens: list[list[int]], side: str, seq_len: int = 11) -> Batch:
    ids = torch.full((len(tokens), seq_len), 7)
    mask, positions = torch.zeros_like(ids), torch.zeros_like(ids)
    rows = []
    for idx, sequence in enumerate(tokens):
        first = seq_len - len(sequence) if side == "left" else 0
        span = slice(first, first + len(sequence))
        ids[idx, span] = torch.tensor(sequence)
        mask[idx, span] = 1
        positions[idx, span] = torch.arange(len(sequence))
        rows.append([idx * seq_len + first + step for step in range(len(sequence))])
    layout = Padded(lengths=tuple(map(len, tokens)), seq_len=seq_len, side=side)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    return Batch(layout=layout, inputs=inputs, tokens=tokens, rows=rows)


def packed_batch(tokens: list[list[int]]) -> Batch:
    rows, count = [], 0
    for sequence in tokens:
        rows.append(list(range(count, count + len(sequence))))
        count += len(sequence)
    inputs = {
        "input_ids": torch.tensor([[token for sequence in tokens for token in sequence]]),
        "position_ids": torch.cat([torch.arange(len(sequence)) for sequence in tokens])[None],
    }
    layout = Packed(lengths=tuple(map(len, tokens)))
    return Batch(layout=layout, inputs=inputs, tokens=tokens, rows=rows)


def make_batch(kind: str, lengths: tuple[int, ...] = LENGTHS) -> Batch:
    tokens = random_tokens(lengths)
    return packed_batch(tokens) if kind == "packed" else padded_batch(tokens, kind)


def random_ids(rows: int, num_experts: int, top_k: int, seed: int, layers: int = 2) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.random((rows, layers, num_experts)).argsort(axis=-1)[..., :top_k]


def make_trace(
    tokens: list[int], ids: np.ndarray, *, num_experts: int, **fields: object
) -> RoutingTrace:
    fields = {"layer_ids": LAYER_IDS, "num_layers": NUM_LAYERS} | fields
    return RoutingTrace.from_rows(ids, token_ids=tokens, num_experts=num_experts, **fields)


def random_traces(
    tokens: list[list[int]],
    num_experts: int = 8,
    top_k: int = 2,
    *,
    seed: int = 0,
    last_row: bool = False,
) -> list[RoutingTrace]:
    return [
        make_trace(
            sequence,
            random_ids(len(sequence) - 1 + last_row, num_experts, top_k, seed=seed * 100 + idx),
            num_experts=num_experts,
        )
        for idx, sequence in enumerate(tokens)
    ]


def change_one_id(trace: RoutingTrace, row: int, slot: int) -> RoutingTrace:
    """Put an expert that the row does not have in its last column, in one layer."""
    ids = trace.ids.copy()
    ids[row, slot, -1] = next(
        expert for expert in range(trace.num_experts) if expert not in ids[row, slot]
    )
    return RoutingTrace(
        ids=ids,
        valid=trace.valid,
        start=trace.start,
        layer_ids=trace.layer_ids,
        num_layers=trace.num_layers,
        num_experts=trace.num_experts,
        top_k=trace.top_k,
        token_digest=trace.token_digest,
        weights_version=trace.weights_version,
    )


def snapshot(model: nn.Module) -> dict[str, object]:
    """Every attribute of every module by identity, what its dicts hold (hooks), and torch's modes."""
    found: dict[str, object] = {"modes": torch._C._len_torch_function_stack()}
    for path, module in model.named_modules():
        found[f"{path} class"] = type(module)
        for name, value in vars(module).items():
            is_dict = isinstance(value, dict)
            items = {key: id(item) for key, item in value.items()} if is_dict else None
            found[f"{path}.{name}"] = (id(value), items)
    return found


def turn_routers(model: nn.Module) -> None:
    """Change the routers, as a step of the optimizer does, so that they pick other experts."""
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.gate.weight.data = layer.mlp.gate.weight.data.flip(0)
