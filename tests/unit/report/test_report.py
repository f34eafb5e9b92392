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

from routing_replay.errors import ConfigError
from routing_replay.replay import Interval
from routing_replay.report import (
    AuditDetails,
    AuditResult,
    AuditSample,
    Comparison,
    audit_notes,
    audit_tables,
    render_html,
)
from routing_replay.report.charts import heat_map, layer_chart, ratio_chart
from routing_replay.report.figures import layer_rows, ratio_histogram, worst_tokens
from routing_replay.trace import RoutingTrace

LAYERS, EXPERTS, TOP_K = 3, 200, 4
HOSTILE = "<script>alert(1)</script>&\"'"


def _comparison(scale: float) -> Comparison:
    return Comparison(
        kl_k3=1e-6 * scale, kl_k1=-1e-6 * scale, f2=0.0, mean_abs_dlogp=1e-4 * scale, mean_abs_dp=1e-5 * scale,
        token_mult_prob_error=1 + 1e-4 * scale, mismatch_pairs=0.07 * scale, mismatch_tokens=0.4 * scale,
        mismatch_per_layer=tuple(0.01 * scale * (slot + 1) for slot in range(LAYERS)),
        overlap_per_layer=tuple(1 - 0.01 * scale * slot for slot in range(LAYERS)),
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
        differs=rng.random((50, LAYERS)) < 0.5,
        expert_load=rng.integers(0, 30, (LAYERS, EXPERTS)),
        layer_ids=(1, 2, 4),
    )
    return AuditResult(
        num_response_tokens=50, num_rows=68, native=_comparison(1.0), replayed=_comparison(0.0),
        control=_comparison(0.0), kl_ratio=Interval(value=0.5, low=0.4, high=0.6), kl_wrong_rows=1.0, coverage=1.0,
        fallback=0.0, num_wrong_ids=0, details=details,
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
    for token, index in zip(worst, expected, strict=True):
        differing = [
            layer for layer, no in zip((1, 2, 4), details.differs[index], strict=True) if no
        ]
        assert list(token.other_layers) == differing


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
    for wanted in ("7.00%", "k3, nats a token", "most used", "1.00%", "replayed", "99.00%"):
        assert wanted in text
    assert "…" not in text.split("tokens with the largest")[0]
    assert max(map(len, text.splitlines())) <= 80


def test_terminal_shows_markup_in_a_prompt_as_it_is():
    console = Console(width=80, record=True, file=io.StringIO())
    for table in audit_tables(_result(), lambda ids: "[red]x[/]"):
        console.print(table)
    assert "[red]x[/]" in console.export_text()


def test_notes_say_what_a_reader_must_know():
    result = _result()
    assert "0 wrong ids" in audit_notes(result)[0]
    assert not any("sets" in note for note in audit_notes(result))
    unordered = replace(result, ordered=False)
    assert any("as sets" in note for note in audit_notes(unordered))
    assert "as sets" in _page(unordered)
    without_ratio = replace(result, kl_ratio=None)
    assert any("the native KL is 0" in note for note in audit_notes(without_ratio))
    assert "no ratio" in _page(without_ratio)


def test_charts_keep_their_numbers():
    result = _result()
    details = result.details
    assert details is not None
    chart = layer_chart(layer_rows(result, details))
    native = [bar for bar in chart.bars if bar.series == "native"]
    assert [round(bar.height / native[0].height, 6) for bar in native] == [1, 2, 3]
    assert [bar.height for bar in chart.bars if bar.series == "replayed"] == [0, 0, 0]
    assert [tick.label for tick in chart.x_ticks] == ["1", "2", "4"]
    assert chart.y_ticks[-1].label == "5 %"  # the next round number above 3 %
    ratios = ratio_chart(ratio_histogram(details))
    counts = [int(bar.title.split()[1]) for bar in ratios.bars if bar.series == "native"]
    assert sum(counts) == 50
    tallest = max(ratios.bars, key=lambda bar: bar.height)
    assert tallest.height == pytest.approx(ratios.height)
    assert not ratios.marks  # no token is off by a factor of 2
    far = replace(details, native_logprobs=details.rollout_logprobs - 1.0)
    assert [mark.label for mark in ratio_chart(ratio_histogram(far)).marks] == ["½", "2 x"]


def test_heat_map_tells_more_from_less_and_never_from_balanced():
    details = _result().details
    assert details is not None
    load = np.full((LAYERS, EXPERTS), 10)
    load[1, 0:2] = 80
    load[2, 198:200] = 0
    heat = heat_map(replace(details, expert_load=load))
    assert heat.experts_per_cell == 2
    cells = {cell.title.split(":")[0]: cell for cell in heat.cells}
    assert len(cells) == LAYERS * EXPERTS / 2
    more, less = cells["layer 2, experts 0 to 1"], cells["layer 4, experts 198 to 199"]
    assert (more.side, more.share) == ("over", 1.0)
    assert (less.side, less.share) == ("under", 1.0)
    assert cells["layer 1, experts 4 to 5"].share == 0
    assert heat.reach == pytest.approx(80 / 10.7)


def test_page_of_many_layers_and_experts_is_drawn():
    result = _result()
    details = result.details
    assert details is not None
    many = tuple(range(94))
    comparison = replace(
        _comparison(1.0), mismatch_per_layer=(0.1,) * 94, overlap_per_layer=(0.9,) * 94
    )
    wide = replace(
        details,
        layer_ids=many,
        expert_load=np.ones((94, 1000), np.int64),
        differs=np.zeros((50, 94), np.bool_),
    )
    page = _page(replace(result, native=comparison, replayed=comparison, details=wide))
    assert page.count("<rect") > 94 * 100
    assert "8 experts" in page


def test_page_needs_details():
    with pytest.raises(ConfigError, match="details is None"):
        _page(replace(_result(), details=None))


def test_figures_are_json_without_the_details():
    figures = _result().figures()
    assert "details" not in figures
    assert json.loads(json.dumps(figures))["native"]["mismatch_pairs"] == 0.07


# What a browser sees, written where --dump-dom shows it. Contrast: every text against what is painted behind it.
PROBE = """<script>
const parse = color => color.match(/[0-9.]+/g).map(Number);
const light = color => { const [r, g, b] = parse(color).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const behind = node => { for (; node; node = node.parentElement) {
  const color = getComputedStyle(node).backgroundColor; const parts = parse(color);
  if (parts.length < 4 || parts[3] > 0) return color; } return 'rgb(255, 255, 255)'; };
const contrasts = [...document.querySelectorAll('body *')]
  .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && !/^(SCRIPT|STYLE|title)$/.test(e.tagName))
  .map(e => { const style = getComputedStyle(e); const ink = light(e.tagName === 'text' ? style.fill : style.color);
    const page = light(behind(e)); return (Math.max(ink, page) + .05) / (Math.min(ink, page) + .05); });
top.document.title = JSON.stringify({
  width: innerWidth, overflow: document.documentElement.scrollWidth - innerWidth,
  dark: light(behind(document.body)) < light(getComputedStyle(document.body).color),
  contrast: Math.min(...contrasts), texts: contrasts.length,
  rects: document.querySelectorAll('svg rect').length,
  unnamed: [...document.querySelectorAll('svg')].filter(e => !e.getAttribute('aria-label')).length,
  loaded: performance.getEntriesByType('resource').length})</script>"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1200])
def test_page_in_a_real_browser(tmp_path: Path, scheme: str, width: int):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no chromium on PATH; on Debian: apt-get install chromium")
    # A window of Chromium is at least 500 wide; a frame can be as narrow as a telephone.
    page = html.escape(_page().replace("</body>", PROBE + "</body>"))
    frame = f'<iframe style="width: {width}px; height: 3000px; border: 0" srcdoc="{page}"></iframe>'
    path = tmp_path / "frame.html"
    path.write_text(f"<!DOCTYPE html><title></title><body>{frame}", encoding="utf-8")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--window-size=1400,900",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    found = re.search(r"<title>(.*?)</title>", done.stdout)
    assert found is not None
    seen = json.loads(html.unescape(found[1]))
    assert seen["width"] == width
    assert seen["overflow"] <= 0
    assert seen["rects"] > 100
    assert (seen["loaded"], seen["unnamed"]) == (0, 0)
    assert "CONSOLE" not in done.stderr
    assert seen["dark"] is (scheme == "dark")
    assert seen["texts"] > 100
    assert seen["contrast"] >= 4.5
