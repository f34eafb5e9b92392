"""What becomes of the tokens that a step has sampled for a request."""

from collections.abc import Sequence

from routing_replay.engine.request import Request
from routing_replay.engine.sampler import SampledToken
from routing_replay.engine.scheduler import ScheduledRequest
from routing_replay.engine.speculation import verify
from routing_replay.errors import StepError

__all__ = ["accept_samples"]


def accept_samples(part: ScheduledRequest, sampled: Sequence[SampledToken]) -> int:
    """Give a request the tokens that a step has sampled for it, up to the first that a draft missed or that ends it.

    Args:
        part: The request's part of the step.
        sampled: One token for each of its sampled rows.

    Returns:
        One past the last token of the part that the request has: keys, values and rows from there on are of drafts that
        are not its tokens.
    """
    request, num_kept = part.request, len(sampled)
    if part.drafts:
        num_kept = len(verify(part.drafts, [token.token_id for token in sampled]))
    num_new = 0
    for token in sampled[:num_kept]:
        if request.finish_reason is not None:
            break
        if not token.is_finite:
            request.fail(_poisoned(request, part.end - 1 + num_new))
            break
        request.accept(token.token_id, token.logprobs)
        num_new += 1
    request.num_pending -= len(sampled) - num_new
    if not part.drafts:
        return part.end
    # A token that has just been sampled is no input yet, be it a draft's or not.
    num_inputs = max(num_new - 1, 0)
    request.num_computed += num_inputs
    request.num_draft_tokens += len(part.drafts)
    request.num_accepted_tokens += min(num_new, num_kept - 1)
    return part.end + num_inputs


def _poisoned(request: Request, position: int) -> StepError:
    return StepError(
        f"request {request.request_id!r}: the logits after token index {position} are not finite; the weights hold NaN or "
        "infinity, or a kernel failed: check the weights, and run again with enforce_eager=True"
    )
