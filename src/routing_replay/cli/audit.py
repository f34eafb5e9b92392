"""`routing-replay audit`: recompute a rollout with Transformers, natively and replayed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from routing_replay.errors import ConfigError

__all__ = ["AuditOptions", "run_audit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditOptions:
    """Recompute a rollout with Transformers, natively and with its routing replayed, and report both.

    Example: routing-replay audit rollout/ --model tiny-moe --report report.html
    """

    rollout: Positional[Path]
    """A folder that "routing-replay rollout" wrote."""

    model: Annotated[str, arg(aliases=["-m"])]
    """The trainer: a Hugging Face folder or hub name, or tiny-moe for the embedded model."""

    dtype: str = "float32"
    """The trainer's precision, bfloat16 or float32."""

    device: str = "cpu"
    """A torch device."""

    max_samples: int | None = None
    """Audit only the first samples."""

    report: Path | None = None
    """Where to write the report, one HTML file."""

    json: bool = False
    """Print JSON instead of tables."""


def run_audit(options: AuditOptions) -> int:
    """Audit.

    Args:
        options: What to run.

    Returns:
        0 if every row was replayed and the trainer's experts received exactly the captured ids, otherwise 1.

    Raises:
        ConfigError: An option is not accepted, or the rollout has fewer than two samples.
    """
    import numpy as np
    import torch
    from rich.console import Console
    from torch import nn
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    from routing_replay.assets import tiny_moe_path
    from routing_replay.engine import load_tokenizer
    from routing_replay.models import find_model_folder
    from routing_replay.report import AuditSample, audit, audit_tables, render_html
    from routing_replay.trace import RolloutReader

    if options.dtype not in ("bfloat16", "float32"):
        raise ConfigError(f"dtype={options.dtype!r}; accepted are 'bfloat16' and 'float32'")
    with RolloutReader(options.rollout) as rollout:
        chosen = [
            sample
            for index, sample in enumerate(rollout)
            if options.max_samples is None or index < options.max_samples
        ]
        facts = rollout.facts
    samples = [
        AuditSample(
            token_ids=sample.all_token_ids,
            num_prompt_tokens=len(sample.prompt_token_ids),
            rollout_logprobs=np.asarray(sample.logprobs, np.float64),
            trace=sample.trace,
        )
        for sample in chosen
        if sample.token_ids
    ]
    if len(samples) < 2:
        raise ConfigError(
            f"{options.rollout} has {len(samples)} samples with tokens to audit; accepted are 2 or more: the audit "
            "also replays each other's rows"
        )
    folder = tiny_moe_path() if options.model == "tiny-moe" else find_model_folder(options.model)
    transformers_logging.disable_progress_bar()
    trainer: nn.Module = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, options.dtype)
    )
    trainer = nn.Module.to(trainer, options.device).eval()
    result = audit(trainer, samples)
    tokenizer = load_tokenizer(folder)
    decode = None if tokenizer is None else tokenizer.decode
    if options.report is not None:
        page = render_html(
            result,
            title=f"Routing audit of {options.rollout.name}",
            facts={
                "rollout model": str(facts.get("model")),
                "rollout dtype": str(facts.get("dtype")),
                "trainer": options.model,
                "trainer dtype": options.dtype,
                "samples": str(len(samples)),
                "torch": torch.__version__,
            },
            decode=decode,
        )
        options.report.parent.mkdir(parents=True, exist_ok=True)
        options.report.write_text(page, encoding="utf-8")
    is_exact = result.coverage == 1.0 and result.num_wrong_ids == 0
    if options.json:
        print(json.dumps({"exact": is_exact, **result.figures()}))
    else:
        console = Console()
        for table in audit_tables(result, decode):
            console.print(table)
        console.print(
            f"{'[green]exact' if is_exact else '[red]NOT EXACT'}[/]: {result.num_wrong_ids} wrong ids in "
            f"{result.num_rows} rows, coverage {result.coverage:.2%}"
        )
        if options.report is not None:
            console.print(f"report: {options.report}")
    return 0 if is_exact else 1
