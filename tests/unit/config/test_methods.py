"""What is known of the methods before they are built."""

from typing import Any

import pytest

from pipeline.config.cli import resolve
from pipeline.config.methods import OPTIONS, SPECS, check_durations
from pipeline.errors import UserError

DURATIONS = sorted({key for spec in SPECS.values() for key in spec.durations} | {"optim.warmup"})


@pytest.mark.parametrize("key", DURATIONS)
def test_a_warm_up_or_start_beyond_the_run_is_refused(key):
    section, _, name = key.partition(".")
    method = next((each for each in SPECS if key in SPECS[each].durations), "suponly")
    for value, fits in ((0, True), (0.3, True), (19, True), (20, False), (0.99, False), (11400, False)):
        values: dict[str, Any] = {"method": method, "optim": {"steps": 20}}
        values.setdefault(section, {})[name] = value
        config = resolve(values, OPTIONS)
        if fits:
            check_durations(config)
        else:
            with pytest.raises(UserError, match=rf"{key} {value}: the run ends after 20 steps .* share of the run"):
                check_durations(config)
