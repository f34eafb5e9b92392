"""The padded batch of verl, for those who build it themselves."""

import operator
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from routing_replay.errors import ConfigError
from routing_replay.trace._trace import RoutingTrace
from routing_replay.trace.export._arrays import to_verl
from routing_replay.trace.export._samples import check_one_length_each, check_one_model

__all__ = ["to_verl_batch"]


def to_verl_batch(
    traces: Sequence[RoutingTrace],
    *,
    num_prompt_tokens: Sequence[int],
    num_tokens: Sequence[int],
    prompt_length: int,
    response_length: int,
) -> npt.NDArray[np.int16]:
    """Make the batch key `routed_experts` of verl: prompts padded on the left, responses on the right.

    Padding holds zeros, as verl writes it, and never routes: the attention mask removes it, and the last token of a
    sequence keeps the trainer's own router. Where verl would cut a response that is too long, this refuses.

    Args:
        traces: Rows of each sequence, of one model.
        num_prompt_tokens: Prompt tokens of each.
        num_tokens: Tokens of prompt and response of each.
        prompt_length: Padded length of the prompts, P.
        response_length: Padded length of the responses, R.

    Returns:
        int16 `[B, P + R, num_layers, K]`.

    Raises:
        ConfigError: A prompt or response is longer than its padded length, or a number is missing or out of range.
        TraceMismatchError: As in `to_verl`, or the traces are of different models.
    """
    check_one_model(traces)
    check_one_length_each(traces, num_prompt_tokens=num_prompt_tokens, num_tokens=num_tokens)
    prompt_width, response_width = operator.index(prompt_length), operator.index(response_length)
    model = traces[0]
    shape = (len(traces), prompt_width + response_width, model.num_layers, model.top_k)
    batch = np.zeros(shape, dtype=np.int16)
    lengths = zip(traces, num_prompt_tokens, num_tokens, strict=True)
    for row, (trace, num_prompt, tokens) in enumerate(lengths):
        if not 0 <= num_prompt <= min(prompt_width, tokens) or tokens - num_prompt > response_width:
            raise ConfigError(
                f"sequence {row} has {num_prompt} prompt tokens of {tokens}; accepted are prompts of up to prompt_length="
                f"{prompt_width} and responses of up to response_length={response_width} tokens"
            )
        first = prompt_width - num_prompt
        rows = to_verl(trace, num_tokens=tokens)
        batch[row, first : first + len(rows)] = rows
    return batch
