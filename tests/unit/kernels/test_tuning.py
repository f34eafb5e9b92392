"""The tuner without a device: candidates, selection with a fake timer, ranges and budget."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from routing_replay.errors import ConfigError, RoutingReplayError
from routing_replay.kernels.experts.choosing import choose_config
from routing_replay.kernels.experts.config import ExpertsConfig, ExpertsShape
from routing_replay.kernels.experts.limits import (
    accumulators,
    config_problem,
    shared_memory_bytes,
    shared_memory_limit,
)
from routing_replay.kernels.experts.tables import (
    ConfigTable,
    ConfigTables,
    Device,
    LayerShape,
    ShapeEntries,
    write_table,
)
from routing_replay.kernels.experts.tuning import TunedTokens, select, table_entries, tune_layer
from routing_replay.kernels.experts.tuning_candidates import (
    candidates,
    in_order,
    with_other_tile,
)

QWEN = LayerShape(
    hidden_size=2048, intermediate_size=768, num_experts=128, num_local_experts=128, top_k=8
)
SMALL = LayerShape(
    hidden_size=32, intermediate_size=16, num_experts=8, num_local_experts=8, top_k=2
)
H100 = Device(name="A", capability=(9, 0), num_sms=132)
SHAPE = QWEN.with_tokens(256)
CANDIDATES = candidates(SHAPE, H100.capability)


class FakeClock:
    """Time that passes only when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class FakeWorkload:
    """Times that follow from the configuration; compiling and sampling take time of the clock."""

    def __init__(
        self,
        true_us: Callable[[ExpertsConfig], float],
        clock: FakeClock | None = None,
        *,
        refuse: Callable[[ExpertsConfig], bool] = lambda config: False,
        seconds: float = 0.0,
    ) -> None:
        self.true_us, self.clock, self.refuse, self.seconds = true_us, clock or FakeClock(), refuse, seconds  # fmt: skip
        self.held: set[ExpertsConfig] = set()
        self.compiled: list[ExpertsConfig] = []
        self.sampled: list[ExpertsConfig] = []

    def refusal(self, config: ExpertsConfig) -> str | None:
        if self.refuse(config):
            return "a wrong result"
        if config not in self.held:
            self.clock.now += self.seconds
            self.held.add(config)
            self.compiled.append(config)
        return None

    def sample_us(self, config: ExpertsConfig, num_samples: int) -> Sequence[float]:
        assert config in self.held, "timed without having been checked"
        self.sampled.append(config)
        # One sample of many is an outlier, as on a machine that does something else as well.
        noise = [1e6 if len(self.sampled) % 11 == 0 and num_samples > 2 else 0.0]
        return [self.true_us(config) + n for n in (noise + [0.0] * num_samples)[:num_samples]]

    def release(self, config: ExpertsConfig) -> None:
        self.held.discard(config)


def _cost(config: ExpertsConfig) -> float:
    """Separable, so that the best is known; no two alike."""
    tiles = sum(
        weight * (abs(tile.rows - 128) / 64 + abs(tile.stages - 6) / 3 + tile.depth / 1000)
        for weight, tile in ((2.0, config.gemm1), (3.0, config.gemm2))
    )
    return 50.0 + tiles + config.tile_tokens / 16 + (config.engine == "portable") * 20


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0)])
@pytest.mark.parametrize("num_tokens", [1, 64, 256, 512, 4096])
@pytest.mark.parametrize("layer", [QWEN, SMALL, replace(QWEN, is_gated=False)], ids=["qwen", "small", "plain"])  # fmt: skip
def test_candidates_are_within_limits(
    capability: tuple[int, int], num_tokens: int, layer: LayerShape
):
    shape = layer.with_tokens(num_tokens)
    found = candidates(shape, capability)
    rule = choose_config(shape, capability=capability, tables=ConfigTables())
    assert found[0] == rule
    assert 10 <= len(found) == len(set(found)) <= 120
    assert found == candidates(shape, capability)
    for config in (*found, *with_other_tile(rule, "gemm1", shape, capability)):
        assert config_problem(config, shape, capability) is None
        assert config.engine != "hopper" or capability == (9, 0)
        if config.engine == "vector":
            continue
        for tile in (config.gemm1, config.gemm2):
            assert shared_memory_bytes(
                config.tile_tokens, tile, 2, capability
            ) <= shared_memory_limit(capability)
            assert accumulators(config.tile_tokens, tile) <= 128
    by_tile = "hopper" if capability == (9, 0) and layer.hidden_size >= 128 else "portable"
    engines = {config.engine for config in found}
    assert engines == ({by_tile, "vector"} if num_tokens <= 8 else {by_tile})


def test_with_other_tile_varies_one_gemm_only():
    start = CANDIDATES[3]
    for gemm, other in (("gemm1", "gemm2"), ("gemm2", "gemm1")):
        found = with_other_tile(start, gemm, SHAPE, H100.capability)
        assert found[0] == start
        assert len({getattr(config, gemm) for config in found}) == len(found) > 5
        assert {getattr(config, other) for config in found} == {getattr(start, other)}
        assert {(c.engine, c.tile_tokens) for c in found} == {(start.engine, start.tile_tokens)}


def test_order_follows_the_seed_and_keeps_the_first():
    one, two = in_order(CANDIDATES, 1), in_order(CANDIDATES, 2)
    assert one == in_order(CANDIDATES, 1)
    assert one != two
    assert one[0] == two[0] == CANDIDATES[0]
    assert set(one) == set(two) == set(CANDIDATES)


def test_select_finds_the_fastest_and_frees_the_others():
    workload = FakeWorkload(_cost)
    chosen = select(CANDIDATES, workload, deadline=1e9, clock=workload.clock)
    assert chosen.best == min(CANDIDATES, key=_cost)
    assert chosen.num_timed == len(CANDIDATES)
    assert chosen.refused == ()
    assert workload.held == {chosen.best}


def test_select_takes_turns_and_times_the_better_half_longer():
    workload = FakeWorkload(_cost)
    select(CANDIDATES[:4], workload, deadline=1e9, clock=workload.clock)
    assert workload.sampled[:8] == [*CANDIDATES[:4], *CANDIDATES[:4]]
    counts = {config: workload.sampled.count(config) for config in CANDIDATES[:4]}
    ranked = sorted(CANDIDATES[:4], key=_cost)
    assert [counts[config] for config in ranked] == [6, 6, 3, 3]


def test_select_never_gives_what_was_refused():
    fastest = min(CANDIDATES, key=_cost)
    workload = FakeWorkload(_cost, refuse=lambda config: config == fastest)
    chosen = select(CANDIDATES, workload, deadline=1e9, clock=workload.clock)
    assert chosen.refused == ((fastest, "a wrong result"),)
    assert chosen.best == min((c for c in CANDIDATES if c != fastest), key=_cost)
    assert fastest not in workload.sampled


def test_select_without_anything_that_works_is_an_error():
    workload = FakeWorkload(_cost, refuse=lambda config: True)
    with pytest.raises(RoutingReplayError, match=r"none of 2 configurations.*a wrong result"):
        select(CANDIDATES[:2], workload, deadline=1e9, clock=workload.clock)


def test_select_stops_compiling_before_the_deadline():
    clock = FakeClock()
    workload = FakeWorkload(_cost, clock, seconds=1.0)
    chosen = select(CANDIDATES, workload, deadline=clock() + 8.0, clock=clock)
    assert workload.compiled == list(CANDIDATES[:6])  # three quarters of the time
    assert chosen.best == min(CANDIDATES[:6], key=_cost)


def test_select_with_no_time_left_still_tries_the_first():
    workload = FakeWorkload(_cost)
    chosen = select(CANDIDATES, workload, deadline=0.0, clock=workload.clock)
    assert (chosen.best, chosen.num_timed) == (CANDIDATES[0], 1)


def _tune(tokens: Sequence[int], workload: FakeWorkload, **options: float) -> list[TunedTokens]:
    arguments = {"budget_seconds": 1e6, "seed": 0, **options}
    return list(
        tune_layer(
            QWEN, tokens, H100, lambda num_tokens: workload, clock=workload.clock, **arguments
        )  # type: ignore[arg-type]
    )


def test_tune_layer_improves_on_configurations_that_cut_both_gemms_alike():
    def cost(config: ExpertsConfig) -> float:
        return _cost(config) + 6.0 * (config.gemm2.rows != 64)

    (tuned,) = _tune([256], FakeWorkload(cost))
    alike = min(map(cost, CANDIDATES))
    assert tuned.microseconds == cost(tuned.config) < alike
    assert tuned.config.gemm1 != tuned.config.gemm2
    assert tuned.rule_config == CANDIDATES[0]
    assert tuned.rule_microseconds == cost(CANDIDATES[0])
    assert tuned.num_timed > len(CANDIDATES)


def test_tune_layer_keeps_the_rule_where_nothing_is_clearly_faster():
    def cost(config: ExpertsConfig) -> float:
        return 100.0 if config == CANDIDATES[0] else 99.5

    (tuned,) = _tune([256], FakeWorkload(cost))
    assert (tuned.config, tuned.microseconds) == (CANDIDATES[0], 100.0)
    (faster,) = _tune([256], FakeWorkload(lambda c: 100.0 if c == CANDIDATES[0] else 98.5))
    assert faster.config != CANDIDATES[0]


def test_tune_layer_names_what_was_refused():
    (tuned,) = _tune([256], FakeWorkload(_cost, refuse=lambda c: c.gemm1.warps == 8))
    assert {config.gemm1.warps for config, _ in tuned.refused} == {8}
    assert tuned.config.gemm1.warps == 4


def test_tune_layer_fails_where_the_rule_is_wrong():
    with pytest.raises(RoutingReplayError, match="cannot be used: a wrong result"):
        _tune([256], FakeWorkload(_cost, refuse=lambda config: config == CANDIDATES[0]))


def test_tune_layer_shares_the_budget():
    clock = FakeClock()
    workload = FakeWorkload(_cost, clock, seconds=1.0)
    started = clock()
    assert len(_tune([1, 16, 256, 4096], workload, budget_seconds=80.0)) == 4
    assert 60.0 < clock() - started < 90.0


@pytest.mark.parametrize("seed", [0, 1])
def test_tune_layer_is_the_same_for_the_same_seed(seed: int):
    def compiled() -> list[ExpertsConfig]:
        workload = FakeWorkload(_cost, seconds=1.0)
        _tune([64, 256], workload, seed=seed, budget_seconds=60.0)
        return workload.compiled

    assert compiled() == compiled()


@pytest.mark.parametrize("tokens", [[], [0], [4, 4], [8, 1]])
def test_tune_layer_refuses_numbers_that_do_not_ascend(tokens: list[int]):
    with pytest.raises(ConfigError, match=r"tokens=\["):
        _tune(tokens, FakeWorkload(_cost))


@pytest.mark.parametrize("budget", [0.0, -1.0, float("nan")])
def test_tune_layer_refuses_a_budget_without_time(budget: float):
    with pytest.raises(ConfigError, match="budget_seconds="):
        _tune([1], FakeWorkload(_cost), budget_seconds=budget)


def _ranges(*tokens: int) -> list[tuple[int, int]]:
    entries = table_entries(_tune(tokens, FakeWorkload(_cost)))
    assert [entry.measured_tokens for entry in entries] == list(tokens)
    return [(entry.min_tokens, entry.max_tokens) for entry in entries]


def test_ranges_meet_at_the_geometric_mean_and_leave_gaps():
    assert _ranges(1, 2, 4, 8, 16) == [(1, 1), (2, 2), (3, 5), (6, 11), (12, 32)]
    assert _ranges(1, 2, 3) == [(1, 1), (2, 2), (3, 6)]
    assert _ranges(1, 1024) == [(1, 2), (512, 2048)]
    assert _ranges(7) == [(4, 14)]


def test_tuned_table_is_what_choose_config_reads(tmp_path: Path):
    tuned = _tune([4, 8, 256], FakeWorkload(_cost))
    measured = ShapeEntries(
        shape=QWEN, commit="c", versions=("torch 2.11.0",), seed=0, entries=table_entries(tuned)
    )
    write_table(tmp_path / "t.json", ConfigTable(device=H100, shapes=(measured,)))
    tables = ConfigTables.from_file(tmp_path / "t.json")
    for item in tuned:
        shape = QWEN.with_tokens(item.num_tokens)
        chosen = choose_config(shape, capability=(9, 0), device_name="A", tables=tables)
        assert chosen == item.config
        assert chosen != choose_config(shape, capability=(9, 0), tables=ConfigTables())
    nothing = QWEN.with_tokens(64)
    assert choose_config(nothing, capability=(9, 0), tables=tables) == choose_config(
        nothing, capability=(9, 0), tables=ConfigTables()
    )


def test_shapes_of_a_layer_and_its_tokens_are_one():
    shape = QWEN.with_tokens(7)
    assert isinstance(shape, ExpertsShape)
    assert (LayerShape.of(shape), shape.num_tokens) == (QWEN, 7)
