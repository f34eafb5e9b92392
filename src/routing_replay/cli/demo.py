"""`routing-replay demo`: the whole idea on one machine, proved or failed."""

import json
import platform
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging
from tyro.conf import arg

from routing_replay.assets import tiny_moe_path
from routing_replay.assets.arithmetic import Problem, is_solved, make_problems
from routing_replay.cli.audit import Decode, print_audit, write_report
from routing_replay.cli.provenance import versions
from routing_replay.cli.resources import EMBEDDED_MODEL, check_new_folder
from routing_replay.engine import LLM, EngineConfig, RequestOutput, SamplingParams, usable_device
from routing_replay.errors import ConfigError
from routing_replay.report import AuditResult, AuditSample, audit
from routing_replay.trace import RolloutSample, RolloutWriter, encode_trace, is_rollout

__all__ = ["Check", "DemoOptions", "demo_checks", "run_demo"]

MIN_RESPONSE_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """Sample answers with the engine, audit them with Transformers, and check that replay works.

    Example: routing-replay demo --seed 1 --output demo-results/
    """

    seed: int = 0
    """Chooses the problems and the sampled answers."""

    num_problems: int = 112
    """How many problems to solve."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The rollout's precision; the trainer's is float32."""

    device: str = "auto"
    """A torch device, of engine and trainer; auto is a GPU where torch sees one, else cpu."""

    output: Annotated[Path, arg(aliases=["-o"], metavar="DIR")] = Path("demo-results")
    """Folder for demo.json (the figures), report.html, and rollout/ (tokens, logprobs, traces); replaced."""

    json: bool = False
    """Print the figures as JSON instead of tables."""

    def __post_init__(self) -> None:
        """Check the number of problems."""
        if self.num_problems < 2:
            raise ConfigError(
                f"num_problems={self.num_problems}; accepted is 2 or more, to replay each other's rows"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One thing that must hold.

    Attributes:
        name: What must hold.
        passed: Whether it does.
        seen: The figures.
    """

    name: str
    passed: bool
    seen: str


def _sample_answers(llm: LLM, problems: Sequence[Problem], seed: int) -> list[RequestOutput]:
    conversations = [[{"role": "user", "content": problem.question}] for problem in problems]
    # Seeds are per request, so that an answer does not depend on what runs beside it.
    params = [
        SamplingParams(temperature=1.0, max_tokens=128, logprobs=0, seed=seed * 1_000_003 + index)
        for index in range(len(problems))
    ]
    return llm.chat(conversations, params)


def _as_sample(output: RequestOutput) -> AuditSample:
    completion = output.outputs[0]
    assert completion.logprobs is not None
    logprobs = [
        entry[token].logprob
        for entry, token in zip(completion.logprobs, completion.token_ids, strict=True)
    ]
    return AuditSample(
        token_ids=(*output.prompt_token_ids, *completion.token_ids),
        num_prompt_tokens=len(output.prompt_token_ids),
        rollout_logprobs=np.asarray(logprobs, np.float64),
        trace=completion.routing,
    )


def demo_checks(result: AuditResult) -> list[Check]:
    """Decide what the demo proves.

    Args:
        result: What the audit measured.

    Returns:
        One check for each claim; the demo fails if any does not hold.
    """
    return [
        Check(
            name="every row that was due was replayed",
            passed=result.coverage == 1.0,
            seen=f"coverage {result.coverage:.2%}",
        ),
        Check(
            name="the trainer's experts received exactly the captured ids",
            passed=result.num_wrong_ids == 0,
            seen=f"{result.num_wrong_ids} wrong ids in {result.num_rows} rows",
        ),
        Check(
            name="replaying another sample's rows raises the KL",
            passed=result.kl_wrong_rows > result.replayed.kl_k3,
            seen=f"{result.kl_wrong_rows:.2e} against {result.replayed.kl_k3:.2e}",
        ),
        Check(
            name=f"at least {MIN_RESPONSE_TOKENS} response tokens",
            passed=result.num_response_tokens >= MIN_RESPONSE_TOKENS,
            seen=f"{result.num_response_tokens}",
        ),
    ]


def _show(
    record: dict[str, object], result: AuditResult, checks: Sequence[Check], decode: Decode | None
) -> None:
    print(
        f"solved {record['solved']:.1%} of {record['num_problems']} problems, {result.num_response_tokens} response "
        f"tokens, {record['trace_bytes_per_token']:.1f} trace bytes a token ({record['id_bytes_per_token']} of ids)"
    )
    print_audit(result, decode)
    console = Console()
    for check in checks:
        mark = "[green]pass[/]" if check.passed else "[red]FAIL[/]"
        console.print(f"{mark} {check.name}: {check.seen}", highlight=False)
    seconds = record["seconds"]
    assert isinstance(seconds, dict)
    print("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in seconds.items()))


def run_demo(options: DemoOptions) -> int:
    """Run the demo.

    Args:
        options: What to run.

    Returns:
        0 if every check holds, otherwise 1.

    Raises:
        ConfigError: The output holds something that is not an earlier demo's.
    """
    rollout = options.output / "rollout"
    if not is_rollout(rollout):
        check_new_folder(rollout)
    transformers_logging.disable_progress_bar()
    # The model is so small that a second thread mostly waits, and on a busy machine makes all much slower.
    torch.set_num_threads(1)
    device = usable_device(options.device)
    started = time.perf_counter()
    folder = tiny_moe_path()
    problems = make_problems(options.num_problems, options.seed)
    llm = LLM(
        folder,
        dtype=options.dtype,
        device=str(device),
        enable_return_routed_experts=True,
        config=EngineConfig(max_num_seqs=128),
    )
    loaded = time.perf_counter()
    outputs = _sample_answers(llm, problems, options.seed)
    generated = time.perf_counter()
    trainer: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = nn.Module.to(trainer, device).eval()
    samples = [_as_sample(output) for output in outputs]
    result = audit(trainer, samples)
    finished = time.perf_counter()

    checks = demo_checks(result)
    texts = [output.outputs[0].text for output in outputs]
    num_rows = sum(sample.trace.num_rows for sample in samples)
    record: dict[str, object] = {
        "model": folder.name,
        "rollout_dtype": options.dtype,
        "trainer_dtype": "float32",
        "seed": options.seed,
        "num_problems": options.num_problems,
        "solved": float(np.mean([is_solved(p, t) for p, t in zip(problems, texts, strict=True)])),
        "trace_bytes_per_token": sum(len(encode_trace(s.trace)) for s in samples) / num_rows,
        "id_bytes_per_token": samples[0].trace.ids[:1].nbytes,
        **result.figures(),
        "checks": [asdict(check) for check in checks],
        "seconds": {
            "load": loaded - started,
            "generate": generated - loaded,
            "audit": finished - generated,
            "total": finished - started,
        },
        "versions": {
            name: version(name) for name in ("routing-replay", "torch", "transformers", "numpy")
        },
        "machine": {
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        },
    }
    text = json.dumps(record, indent=1)
    decode = None if llm.tokenizer is None else llm.tokenizer.decode
    _write(options, text, outputs, result, decode)
    if options.json:
        print(text)
    else:
        _show(record, result, checks, decode)
        for what, name in (
            ("report", "report.html"),
            ("figures", "demo.json"),
            ("rollout", "rollout"),
        ):
            print(f"{what}: {options.output / name}")
    return 0 if all(check.passed for check in checks) else 1


def _write(
    options: DemoOptions,
    figures: str,
    outputs: Sequence[RequestOutput],
    result: AuditResult,
    decode: Decode | None,
) -> None:
    """Write figures, report and rollout; a rollout of an earlier demo gives way."""
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "demo.json").write_text(figures + "\n")
    made_with = versions("torch", "transformers", "numpy")
    facts = {
        "rollout": f"{EMBEDDED_MODEL}, {options.num_problems} problems, {options.dtype}",
        "trainer": f"{EMBEDDED_MODEL}, Transformers, float32",
        "seed": str(options.seed),
        **made_with,
    }
    title = "Routing replay demo"
    write_report(options.output / "report.html", result, title=title, facts=facts, decode=decode)
    rollout = options.output / "rollout"
    if is_rollout(rollout):
        shutil.rmtree(rollout)
    made_by = {
        "model": EMBEDDED_MODEL,
        "dtype": options.dtype,
        "num_prompts": options.num_problems,
        "temperature": 1.0,
        "seed": options.seed,
        "versions": made_with,
    }
    with RolloutWriter(rollout, facts=made_by, codec="raw+zstd") as writer:
        for index, output in enumerate(outputs):
            completion = output.outputs[0]
            sample = _as_sample(output)
            writer.append(
                RolloutSample(
                    key=str(index),
                    prompt_token_ids=output.prompt_token_ids,
                    token_ids=completion.token_ids,
                    logprobs=tuple(sample.rollout_logprobs.tolist()),
                    trace=sample.trace,
                    text=completion.text,
                    finish_reason=completion.finish_reason,
                )
            )
