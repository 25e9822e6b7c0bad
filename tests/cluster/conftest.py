"""These tests run on hosts of their own, and are skipped where there can be none."""

import pytest

from tests.hosts import unavailable


@pytest.fixture(scope="session", autouse=True)
def _hosts() -> None:
    reason = unavailable()
    if reason:
        pytest.skip(reason)
