"""SGLang's versions of weights, as a trace keeps them."""

from collections.abc import Mapping

from routing_replay.errors import CaptureError

__all__ = ["version_runs"]


def version_runs(
    key: str, meta: Mapping[str, object], *, num_prompt_tokens: int, num_rows: int
) -> tuple[tuple[int, int], ...]:
    """Return runs `(token index, version)` of the weights that routed the rows.

    SGLang says it for each sampled token: `weight_versions` is a list of `{"version", "start", "end"}` over them, and
    `weight_version` the one at the end. The row of token t was computed in the step that sampled token t + 1.

    Args:
        key: Of the completion, for messages.
        meta: Its `meta_info`.
        num_prompt_tokens: Tokens of the prompt.
        num_rows: Rows of the trace, one or more.

    Returns:
        The runs, the first at token 0.

    Raises:
        CaptureError: A version is not a whole number, or rows were computed anew under other weights.
    """
    spans = meta.get("weight_versions")
    if not isinstance(spans, list) or not spans:
        return ((0, _number(key, meta.get("weight_version", "default"))),)
    retractions = meta.get("num_retractions")
    if len(spans) > 1 and retractions:
        raise CaptureError(
            f"completion {key!r} was retracted {retractions} times while weights changed: SGLang recorded its earlier rows "
            "anew under other weights than those that sampled its tokens; drop it"
        )
    runs: list[tuple[int, int]] = []
    for span in spans:
        version = _number(key, span.get("version"))
        token_idx = num_prompt_tokens - 1 + int(span.get("start", 0)) if runs else 0
        if token_idx < num_rows and (not runs or runs[-1][1] != version):
            runs.append((token_idx, version))
    return tuple(runs)


def _number(key: str, version: object) -> int:
    """SGLang's versions are text; until one is set, it is "default"."""
    text = str(version)
    if text == "default":
        return 0
    if not text.isdecimal():
        raise CaptureError(
            f"completion {key!r} is of weight version {text!r}; accepted are whole numbers: name versions so, or pass "
            "weights_version"
        )
    return int(text)
