"""Sampling a token of each request, and waiting for it."""

from collections.abc import Sequence

from torch import Tensor

from routing_replay.engine.config import LogprobsMode
from routing_replay.engine.request import Request
from routing_replay.engine.sampler import SampledToken, launch_sample


def sample(
    logits: Tensor, requests: Sequence[Request], mode: LogprobsMode
) -> Sequence[SampledToken]:
    """Sample the next token of each request from float32 `[S, vocab_size]`."""
    index = [request.num_output_tokens for request in requests]
    return launch_sample(logits, None, requests, mode, output_index=index).wait()
