"""`routing-replay rollout`: generate from a file of prompts, and store what a trainer needs."""

import json
import shutil
import time
from dataclasses import dataclass, field

from routing_replay.cli.prompts import PromptFile, load_prompts
from routing_replay.cli.provenance import versions
from routing_replay.cli.resources import check_new_folder
from routing_replay.cli.rollout_options import RolloutOptions
from routing_replay.cli.sources import SampleSource
from routing_replay.errors import RoutingReplayError

__all__ = ["RolloutOptions", "run_rollout"]


@dataclass(slots=True)
class _Tally:
    """What has been stored so far, and what could not be captured."""

    num_samples: int = 0
    num_tokens: int = 0
    failures: dict[str, str] = field(default_factory=dict[str, str])

    def fail(self, key: str, error: RoutingReplayError) -> None:
        """Note a completion that failed."""
        self.failures[key] = str(error)


def _source(options: RolloutOptions, prompts: PromptFile) -> SampleSource:
    if options.engine == "routing-replay":
        from routing_replay.cli.own_engine import own_engine

        return own_engine(options, prompts)
    from routing_replay.cli.engines import foreign_engine

    return foreign_engine(options, prompts)


def _store(
    source: SampleSource, options: RolloutOptions, prompts: PromptFile, tally: _Tally
) -> None:
    """Generate into the output folder, counting as samples come to be there."""
    from routing_replay.trace import RolloutWriter

    facts = {
        **source.facts,
        "prompts": str(options.prompts),
        "num_prompts": len(prompts.names),
        "versions": versions("torch", "numpy"),
    }
    with RolloutWriter(options.output, facts=facts, codec=options.codec) as writer:
        for sample in source.samples(tally.fail):
            writer.append(sample)
            tally.num_samples += 1
            tally.num_tokens += len(sample.token_ids)


def run_rollout(options: RolloutOptions) -> int:
    """Generate and store.

    Args:
        options: What to run.

    Returns:
        0, or 1 if the routing of a completion could not be captured; the others are stored.

    Raises:
        ConfigError: An option or a prompt is not accepted; nothing has been written.
        CaptureError: The canary of the engine failed; nothing has been written.
        IntegrationError: The engine is missing, does not answer, or is of an unknown version.
    """
    prompts = load_prompts(options.prompts)
    check_new_folder(options.output)
    started = time.perf_counter()
    source = _source(options, prompts)
    tally = _Tally()
    try:
        _store(source, options, prompts, tally)
    except RoutingReplayError:
        if not tally.num_samples and options.output.exists():
            shutil.rmtree(options.output)  # it was new or empty, and nothing worth keeping is in it
        raise
    finally:
        source.close()
    _report(options, tally, time.perf_counter() - started)
    return 1 if tally.failures else 0


def _report(options: RolloutOptions, tally: _Tally, seconds: float) -> None:
    if options.json:
        summary = {
            "output": str(options.output),
            "num_samples": tally.num_samples,
            "num_tokens": tally.num_tokens,
            "num_failed": len(tally.failures),
            "failures": tally.failures,
            "seconds": round(seconds, 3),
        }
        print(json.dumps(summary))
        return
    print(
        f"{tally.num_samples} samples, {tally.num_tokens} tokens in {seconds:.1f} s -> {options.output}"
    )
    for key, reason in tally.failures.items():
        print(f"FAILED {key}: {reason}")
    print(f"next: routing-replay audit {options.output} --model {options.model}")
