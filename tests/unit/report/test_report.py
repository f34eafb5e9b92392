"""The page stands alone, escapes what it shows, and reads well in a real browser, light and dark."""

import html
import io
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from routing_replay.replay import Interval
from routing_replay.report import (
    AuditDetails,
    AuditResult,
    AuditSample,
    Comparison,
    audit_tables,
    render_html,
)
from routing_replay.report.figures import ratio_histogram, worst_tokens
from routing_replay.trace import RoutingTrace

LAYERS, EXPERTS, TOP_K = 3, 200, 4
HOSTILE = "<script>alert(1)</script>&\"'"


def _comparison(scale: float) -> Comparison:
    return Comparison(
        kl_k3=1e-6 * scale, kl_k1=-1e-6 * scale, f2=0.0, mean_abs_dlogp=1e-4 * scale, mean_abs_dp=1e-5 * scale,
        token_mult_prob_error=1 + 1e-4 * scale, mismatch_pairs=0.07 * scale, mismatch_tokens=0.4 * scale,
        mismatch_per_layer=tuple(0.01 * scale * (slot + 1) for slot in range(LAYERS)),
    )  # fmt: skip


def _result() -> AuditResult:
    rng = np.random.default_rng(0)
    samples: list[AuditSample] = []
    for length in (30, 40):
        tokens = tuple(rng.integers(0, 90, length).tolist())
        ids = rng.random((length - 1, LAYERS, EXPERTS)).argsort(-1)[..., :TOP_K]
        trace = RoutingTrace.from_rows(
            ids, token_ids=tokens, layer_ids=(1, 2, 4), num_layers=5, num_experts=EXPERTS
        )
        logprobs = -rng.random(length - 10)
        samples.append(
            AuditSample(
                token_ids=tokens, num_prompt_tokens=10, rollout_logprobs=logprobs, trace=trace
            )
        )
    rollout = np.concatenate([sample.rollout_logprobs for sample in samples])
    details = AuditDetails(
        samples=tuple(samples),
        sample_index=np.repeat([0, 1], [20, 30]),
        position=np.concatenate([np.arange(10, 30), np.arange(10, 40)]),
        rollout_logprobs=rollout,
        native_logprobs=rollout + rng.normal(0, 0.1, 50),
        replayed_logprobs=rollout + rng.normal(0, 0.01, 50),
        num_other_layers=rng.integers(0, LAYERS, 50),
        expert_load=rng.integers(0, 30, (LAYERS, EXPERTS)),
        layer_ids=(1, 2, 4),
    )
    return AuditResult(
        num_response_tokens=50, num_rows=68, native=_comparison(1.0), replayed=_comparison(0.0),
        control=_comparison(0.0), kl_ratio=Interval(value=0.5, low=0.4, high=0.6), kl_wrong_rows=1.0, coverage=1.0,
        num_wrong_ids=0, details=details,
    )  # fmt: skip


def _page(result: AuditResult | None = None) -> str:
    return render_html(
        result or _result(),
        title=HOSTILE,
        facts={"model": HOSTILE},
        decode=lambda ids: HOSTILE + "".join(f" t{token}" for token in ids),
    )


def test_page_needs_nothing_from_outside():
    page = _page()
    assert not re.findall(r"(?:src|href)\s*=|url\(|@import|<script|<link|<iframe", page)
    assert "http" not in page.replace("http-equiv", "")


def test_page_escapes_everything_that_it_is_given():
    page = _page()
    assert HOSTILE not in page
    assert (
        page.count(html.escape("<script>")) >= 2 + 3 * 12
    )  # title, fact, and three texts for each worst token


def test_page_says_when_replay_was_not_exact():
    assert ">exact<" in _page()
    assert ">not exact<" in _page(replace(_result(), num_wrong_ids=1))
    assert ">not exact<" in _page(replace(_result(), coverage=0.999))


def test_worst_tokens_are_those_with_the_largest_difference():
    details = _result().details
    assert details is not None
    worst = worst_tokens(details, None, count=5)
    difference = np.abs(details.native_logprobs - details.rollout_logprobs)
    expected = np.argsort(-difference)[:5]
    assert [(token.sample, token.position) for token in worst] == [
        (int(details.sample_index[i]), int(details.position[i])) for i in expected
    ]
    first = worst[0]
    tokens = details.samples[first.sample].token_ids
    assert first.token.strip() == str(tokens[first.position])
    assert first.before.split()[-1:] == [str(tokens[first.position - 1])]


def test_histogram_counts_every_token_once():
    details = _result().details
    assert details is not None
    histogram = ratio_histogram(details)
    assert (histogram.native.sum(), histogram.replayed.sum()) == (50, 50)
    assert histogram.replayed[15:26].sum() > histogram.native[15:26].sum()
    same = replace(
        details,
        native_logprobs=details.rollout_logprobs,
        replayed_logprobs=details.rollout_logprobs,
    )
    assert ratio_histogram(same).native[20] == 50  # no difference at all: the middle bin


def test_tables_say_the_same_in_a_terminal():
    console = Console(width=80, record=True, file=io.StringIO())
    for table in audit_tables(_result(), lambda ids: "".join(f" t{token}" for token in ids)):
        console.print(table)
    text = console.export_text()
    for wanted in ("7.00%", "KL (k3)", "most used expert", "1.00%", "replayed"):
        assert wanted in text
    assert "…" not in text.split("log probability ratio")[0]


def test_figures_are_json_without_the_details():
    figures = _result().figures()
    assert "details" not in figures
    assert json.loads(json.dumps(figures))["native"]["mismatch_pairs"] == 0.07


PROBE = """<script>document.title = JSON.stringify({
  width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth,
  page: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
  rects: document.querySelectorAll('svg rect').length,
  loaded: performance.getEntriesByType('resource').length})</script>"""


def _luminance(color: str) -> float:
    channels = [int(value) / 255 for value in re.findall(r"\d+", color)[:3]]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [500, 1200])
def test_page_in_a_real_browser(tmp_path: Path, scheme: str, width: int):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on PATH; on Debian: apt-get install chromium")
    path = tmp_path / "report.html"
    path.write_text(_page().replace("</body>", PROBE + "</body>"), encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", f"--window-size={width},900",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert seen["overflow"] <= 0
    assert seen["width"] == width
    assert seen["rects"] > 100
    assert seen["loaded"] == 0
    assert "CONSOLE" not in done.stderr
    page, ink = _luminance(seen["page"]), _luminance(seen["ink"])
    assert (page > ink) is (scheme == "light")
    assert (max(page, ink) + 0.05) / (min(page, ink) + 0.05) > 7
