"""These tests run on hosts of their own, and are skipped where there can be none."""

from collections.abc import Iterator

import pytest

from tests.cluster.fleet import Fleet
from tests.hosts import unavailable


@pytest.fixture(scope="session", autouse=True)
def _hosts() -> None:
    reason = unavailable()
    if reason:
        # These tests need what only root on Linux can make. `make test-cluster` asks the same question first and ends
        # with the reason, so that a nightly run never passes by skipping; `pytest` alone shows it and goes on.
        pytest.skip(reason)


@pytest.fixture(scope="session")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """One cluster for all faults: they take hosts from it."""
    with Fleet(tmp_path_factory.mktemp("fleet")) as fleet:
        yield fleet


@pytest.fixture
def whole(fleet: Fleet) -> Fleet:
    """The cluster with three workers again."""
    fleet.replace_lost()
    return fleet
