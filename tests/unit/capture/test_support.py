"""What cannot be captured exactly is refused by name, and so is what nobody has tried."""

import pytest

from routing_replay.capture import REFUSED, SUPPORTED, Refusal, check_capture_support
from routing_replay.engine import EngineConfig
from routing_replay.engine.config import capture_features
from routing_replay.errors import ConfigError


@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.feature)
def test_refused_feature_is_named_with_its_reason(refusal: Refusal):
    with pytest.raises(ConfigError, match=refusal.feature) as caught:
        check_capture_support({refusal.feature, *SUPPORTED})
    assert refusal.reason in str(caught.value)
    assert "; " in refusal.reason  # the reason, and the way out


@pytest.mark.parametrize("feature", sorted(SUPPORTED))
def test_supported_feature_passes(feature: str):
    check_capture_support([feature])
    assert feature not in {refusal.feature for refusal in REFUSED}


def test_unknown_feature_is_refused():
    with pytest.raises(ConfigError, match=r"'time_travel'.*does not know"):
        check_capture_support(["time_travel"])


def test_every_engine_configuration_is_made_of_known_features():
    for config in (
        EngineConfig(),
        EngineConfig(enable_prefix_caching=False, batch_invariant=True),
        EngineConfig(speculative_config={"method": "ngram"}),
        EngineConfig(speculative_config={"method": "mtp"}),
    ):
        check_capture_support(capture_features(config))
    assert "prefix_caching" not in capture_features(EngineConfig(enable_prefix_caching=False))
    assert "batch_invariant" in capture_features(EngineConfig(batch_invariant=True))
    speculating = EngineConfig(speculative_config={"method": "ngram"})
    assert capture_features(speculating) - capture_features(EngineConfig()) == {"ngram_speculation"}
