"""`routing-replay audit`: recompute a rollout with Transformers, natively and replayed."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from routing_replay.cli.provenance import versions
from routing_replay.cli.resources import model_folder
from routing_replay.errors import ConfigError
from routing_replay.trace import RolloutReader

if TYPE_CHECKING:
    from routing_replay.report import AuditResult, AuditSample

__all__ = ["AuditOptions", "load_samples", "print_audit", "run_audit", "write_report"]

Decode = Callable[[Sequence[int]], str]

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
             "seed")  # fmt: skip

# The values that leave the model's own distribution as it is.
_NEUTRAL: Mapping[str, float] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
            "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOptions:
    """Recompute a rollout with Transformers, natively and with its routing replayed, and report both.

    Example: routing-replay audit rollout/ --model tiny-moe --report report.html
    """

    rollout: Positional[Annotated[Path, arg(metavar="DIR")]]
    """A folder that "routing-replay rollout" wrote."""

    model: Annotated[str, arg(aliases=["-m"], metavar="MODEL")]
    """The trainer: a Hugging Face folder or hub name, or tiny-moe for the embedded model."""

    dtype: Literal["bfloat16", "float32"] = "float32"
    """The trainer's precision."""

    device: str = "auto"
    """A torch device; auto is a GPU where torch sees one, else cpu."""

    max_samples: int | None = None
    """Audit only the first samples."""

    report: Annotated[Path | None, arg(metavar="FILE")] = None
    """Where to write the report, one HTML page."""

    json: bool = False
    """Print JSON instead of tables."""


def load_samples(
    folder: Path, max_samples: int | None
) -> tuple[list["AuditSample"], Mapping[str, object]]:
    """Read the samples of a rollout that have tokens to compare.

    Args:
        folder: A rollout.
        max_samples: Take this many; None for all.

    Returns:
        The samples, and the facts of the rollout.

    Raises:
        ConfigError: There is no rollout, or its logprobs are not those of the model's own distribution.
        TraceFormatError: The rollout is damaged.
    """
    import numpy as np

    from routing_replay.report import AuditSample

    with RolloutReader(folder) as rollout:
        mode = rollout.facts.get("logprobs_mode", "raw_logprobs")
        if mode != "raw_logprobs":
            raise ConfigError(
                f"{folder} has logprobs_mode={mode!r}; accepted is 'raw_logprobs': the trainer computes the model's own "
                "distribution"
            )
        samples = [
            AuditSample(
                token_ids=sample.all_token_ids,
                num_prompt_tokens=len(sample.prompt_token_ids),
                rollout_logprobs=np.asarray(sample.logprobs, np.float64),
                trace=sample.trace,
            )
            for sample in islice((s for s in rollout if s.token_ids), max_samples)
        ]
        return samples, rollout.facts


def sampling_caveats(rollout: Mapping[str, object]) -> list[str]:
    """Say where tokens were drawn from another distribution than the one that logprobs are of.

    Args:
        rollout: The facts of a rollout.

    Returns:
        A sentence, or nothing where every token was drawn from the model's own distribution.
    """
    changed = [
        f"{name} {rollout[name]}"
        for name, neutral in _NEUTRAL.items()
        if rollout.get(name, neutral) != neutral
    ]
    if not changed:
        return []
    return [
        f"the tokens were sampled with {', '.join(changed)}, while logprobs are those of the model's own distribution on "
        "both sides: KL and F(2) then weigh the tokens that this sampling prefers"
    ]


def _facts(options: AuditOptions, rollout: Mapping[str, object]) -> dict[str, str]:
    """What the page says about the run."""
    made_by = rollout.get("versions")
    settings = ", ".join(f"{name} {rollout[name]}" for name in _SAMPLING if name in rollout)
    facts = {
        "rollout model": str(rollout.get("model", "unknown")),
        "rollout dtype": str(rollout.get("dtype", "unknown")),
        "sampling": settings or "unknown",
        "rollout made with": _joined(made_by) if isinstance(made_by, dict) else "unknown",
        "trainer": f"{options.model}, Transformers",
        "trainer dtype": options.dtype,
        "audited with": _joined(versions("torch", "transformers", "numpy")),
    }
    return facts


def _joined(found: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in found.items())


def write_report(
    path: Path,
    result: "AuditResult",
    *,
    title: str,
    facts: Mapping[str, str],
    decode: Decode | None,
    caveats: Sequence[str] = (),
) -> None:
    """Write the page of an audit, making its folder.

    Args:
        path: Where to.
        result: The audit.
        title: Heading of the page.
        facts: What was audited.
        decode: Text of tokens.
        caveats: What to know about the rollout.
    """
    from routing_replay.report import render_html

    page = render_html(result, title=title, facts=facts, decode=decode, caveats=caveats)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def print_audit(result: "AuditResult", decode: Decode | None, caveats: Sequence[str] = ()) -> None:
    """Print the tables of an audit, and what to know about them.

    Args:
        result: The audit.
        decode: Text of tokens.
        caveats: What to know about the rollout.
    """
    from rich.console import Console

    from routing_replay.report import audit_notes, audit_tables

    console = Console()
    for table in audit_tables(result, decode):
        console.print(table)
    for note in (*audit_notes(result), *caveats):
        console.print(note, markup=False, highlight=False)


def run_audit(options: AuditOptions) -> int:
    """Audit.

    Args:
        options: What to run.

    Returns:
        0 if every row was replayed and the trainer's experts received exactly the captured ids, otherwise 1.

    Raises:
        ConfigError: An option is not accepted, or the rollout has fewer than two samples.
        TraceFormatError: The rollout is damaged.
        TraceMismatchError: The rollout is of another model.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from routing_replay.engine import load_tokenizer, usable_device
    from routing_replay.report import audit

    if options.max_samples is not None and options.max_samples < 2:
        raise ConfigError(f"max_samples={options.max_samples}; accepted is 2 or more")
    device = usable_device(options.device)
    samples, rollout = load_samples(options.rollout, options.max_samples)
    folder = model_folder(options.model)
    transformers_logging.disable_progress_bar()
    trainer: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, options.dtype)
    )
    result = audit(nn.Module.to(trainer, device).eval(), samples)
    tokenizer = load_tokenizer(folder)
    decode = None if tokenizer is None else tokenizer.decode
    caveats = sampling_caveats(rollout)
    if options.report is not None:
        title = f"Routing audit of {options.rollout.resolve().name}"
        facts = _facts(options, rollout)
        write_report(
            options.report, result, title=title, facts=facts, decode=decode, caveats=caveats
        )
    if options.json:
        print(json.dumps({"exact": result.is_exact, "caveats": caveats, **result.figures()}))
    else:
        print_audit(result, decode, caveats)
        print(
            "exact"
            if result.is_exact
            else "NOT EXACT: the trainer did not replay what it was given"
        )
        if options.report is not None:
            print(f"report: {options.report}")
    return 0 if result.is_exact else 1
