"""A rollout on disk: tokens and logprobs as JSON lines, their routing in a trace store beside them."""

import json
import operator
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from routing_replay.errors import ConfigError, TraceFormatError
from routing_replay.trace._closing import Closing
from routing_replay.trace._codecs import chosen_codec
from routing_replay.trace._store_reader import TraceStoreReader
from routing_replay.trace._store_writer import TraceStoreWriter
from routing_replay.trace._trace import RoutingTrace

__all__ = ["RolloutReader", "RolloutSample", "RolloutWriter", "is_rollout"]

_FACTS = "rollout.json"
_SAMPLES = "samples.jsonl"
_TRACES = "traces.rrs"
_SAMPLES_PER_FLUSH = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RolloutSample:
    """One completion with its routing.

    Attributes:
        key: Unique in the rollout.
        prompt_token_ids: The prompt.
        token_ids: The completion.
        logprobs: The engine's logprob of each completion token.
        trace: Rows of prompt and completion, one for every token but the last.
        text: The completion's text.
        finish_reason: Why it ended.
    """

    key: str
    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    trace: RoutingTrace
    text: str = ""
    finish_reason: str = ""

    @property
    def all_token_ids(self) -> tuple[int, ...]:
        """Prompt and completion."""
        return (*self.prompt_token_ids, *self.token_ids)

    def truncate(self, num_tokens: int) -> "RolloutSample":
        """Cut completion, logprobs and routing together.

        The trace keeps one row for every token but the last, as that of a completion that ended here. The text cannot
        be cut by tokens, so that a shorter sample has none.

        Args:
            num_tokens: Tokens that stay, prompt included: all of the prompt at least.

        Returns:
            The shorter sample, with `finish_reason` "length", or this one where nothing is cut.

        Raises:
            ConfigError: `num_tokens` cuts the prompt, or leaves no row of a trace that starts later.
        """
        kept = operator.index(num_tokens)
        num_prompt = len(self.prompt_token_ids)
        if kept < max(num_prompt, 1):
            raise ConfigError(
                f"truncate({kept}) cuts the prompt of sample {self.key!r}, which has {num_prompt} tokens; pass "
                f"num_tokens >= {max(num_prompt, 1)}"
            )
        if kept >= num_prompt + len(self.token_ids):
            return self
        return replace(
            self,
            token_ids=self.token_ids[: kept - num_prompt],
            logprobs=self.logprobs[: kept - num_prompt],
            trace=self.trace.slice(self.trace.start, min(kept - 1, self.trace.end)),
            text="",
            finish_reason="length",
        )


class RolloutWriter(Closing):
    """Writes a rollout sample by sample; what was appended survives a kill.

    Args:
        folder: A folder that does not exist, or is empty.
        facts: What made the rollout (model, settings, versions), JSON values.
        codec: Codec of the traces.

    Raises:
        ConfigError: The folder holds something already, or there is no such codec.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, facts: Mapping[str, object], codec: str = "raw"
    ) -> None:
        self.folder = Path(folder)
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(
                f"{self.folder} holds something already; choose a folder that does not exist, or remove it first"
            )
        chosen_codec(codec)  # before anything is made
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / _FACTS).write_text(json.dumps(dict(facts), indent=2) + "\n")
        self._store = TraceStoreWriter(self.folder / _TRACES, codec=codec)
        self._samples = (self.folder / _SAMPLES).open("a", encoding="utf-8")
        self._num_since_flush = 0

    def append(self, sample: RolloutSample) -> None:
        """Add a sample: its trace first, then the line that makes it part of the rollout.

        Args:
            sample: A sample whose trace belongs to its tokens.

        Raises:
            ConfigError: The key is in use already, or there is not one logprob for each token.
            TraceMismatchError: The trace belongs to other tokens.
        """
        if len(sample.logprobs) != len(sample.token_ids):
            raise ConfigError(
                f"sample {sample.key!r} has {len(sample.logprobs)} logprobs for {len(sample.token_ids)} tokens; "
                "pass one for each"
            )
        sample.trace.validate(sample.all_token_ids)
        self._store.append(sample.key, sample.trace)
        line = {
            "key": sample.key,
            "prompt_token_ids": sample.prompt_token_ids,
            "token_ids": sample.token_ids,
            "logprobs": sample.logprobs,
            "text": sample.text,
            "finish_reason": sample.finish_reason,
        }
        self._samples.write(json.dumps(line) + "\n")
        self._samples.flush()
        self._num_since_flush += 1
        if self._num_since_flush == _SAMPLES_PER_FLUSH:
            self.flush()

    def flush(self) -> None:
        """Bring everything to the disk, so that it outlives a loss of power; `append` does so now and then."""
        self._store.flush()
        self._samples.flush()
        os.fsync(self._samples.fileno())
        self._num_since_flush = 0

    def close(self) -> None:
        """Bring everything to the disk and close the files."""
        if not self._samples.closed:
            self.flush()
            self._samples.close()
        self._store.close()


class RolloutReader(Closing):
    """Reads a rollout, also one that is still being written.

    Args:
        folder: A folder that `RolloutWriter` made.

    Raises:
        ConfigError: The folder holds no rollout.
        TraceFormatError: A file of it is damaged.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not is_rollout(self.folder):
            raise ConfigError(
                f"{self.folder} holds no rollout; pass a folder with {_FACTS}, {_SAMPLES} and {_TRACES}, as "
                "'routing-replay rollout' writes it"
            )
        self.facts: dict[str, object] = self._object((self.folder / _FACTS).read_text(), _FACTS)
        self._lines = self._read_lines()
        self.traces = TraceStoreReader(self.folder / _TRACES)

    def __len__(self) -> int:
        return len(self._lines)

    def __iter__(self) -> Iterator[RolloutSample]:
        for line in self._lines:
            yield self._sample(line)

    def close(self) -> None:
        """Close the store."""
        self.traces.close()

    def _read_lines(self) -> list[dict[str, object]]:
        # A line without its end was cut off by a kill: it never became part of the rollout.
        whole = (self.folder / _SAMPLES).read_text(encoding="utf-8").split("\n")[:-1]
        return [
            self._object(line, f"{_SAMPLES} line {number}")
            for number, line in enumerate(whole, start=1)
        ]

    def _object(self, text: str, where: str) -> dict[str, object]:
        try:
            value = json.loads(text)
        except ValueError as err:
            raise TraceFormatError(
                f"{self.folder / where} is not JSON ({err}); the file is damaged"
            ) from err
        if not isinstance(value, dict):
            raise TraceFormatError(
                f"{self.folder / where} is not a JSON object; the file is damaged"
            )
        return value

    def _sample(self, line: dict[str, object]) -> RolloutSample:
        try:
            key = str(line["key"])
            sample = RolloutSample(
                key=key,
                prompt_token_ids=_integers(line["prompt_token_ids"]),
                token_ids=_integers(line["token_ids"]),
                logprobs=_numbers(line["logprobs"]),
                trace=self.traces[key],
                text=str(line["text"]),
                finish_reason=str(line["finish_reason"]),
            )
        except (KeyError, TypeError) as err:
            raise TraceFormatError(
                f"{self.folder / _SAMPLES}: a sample lacks {err} or its trace; the rollout is damaged"
            ) from err
        sample.trace.validate(sample.all_token_ids)
        return sample


def is_rollout(folder: Path) -> bool:
    """Return whether a folder looks like a rollout."""
    return all((folder / name).exists() for name in (_FACTS, _SAMPLES, _TRACES))


def _integers(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise TypeError("token ids")
    return tuple(value)


def _numbers(value: object) -> tuple[float, ...]:
    if not isinstance(value, list) or not all(isinstance(item, int | float) for item in value):
        raise TypeError("logprobs")
    return tuple(float(item) for item in value)
