"""Rules of the health section name value, rule and remedy."""

import pytest

from janus_mega.config.schema import HealthConfig
from janus_mega.config.validate_health import health_rules


def test_defaults_and_usual_values_pass() -> None:
    assert list(health_rules(HealthConfig())) == []
    assert list(health_rules(HealthConfig(spike_sigmas=6.0, hang_timeout_s=0.0, max_rewinds=0))) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_skips_in_a_row", 0),
        ("max_rewinds", -1),
        ("spike_sigmas", -1.0),
        ("spike_sigmas", 1.5),
        ("spike_window", 7),
        ("hang_timeout_s", 0.5),
        ("hang_timeout_s", -1.0),
    ],
)
def test_each_rule_speaks(field: str, value: float) -> None:
    (message,) = health_rules(HealthConfig(**{field: value}))
    assert message.startswith(f"health.{field} {value:g}")
