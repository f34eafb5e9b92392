"""Sampling from logits: a token, its logprob and its rank for every row, with bits that no other row can change."""

from routing_replay.kernels.sampling.op import choose_tokens, log_softmax, sample_plain
from routing_replay.kernels.sampling.reference import (
    PlainSamples,
    choose_reference,
    inverse_cdf,
    sample_plain_reference,
)

__all__ = [
    "PlainSamples",
    "choose_reference",
    "choose_tokens",
    "inverse_cdf",
    "log_softmax",
    "sample_plain",
    "sample_plain_reference",
]
