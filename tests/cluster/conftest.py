"""These tests run on hosts of their own, and are skipped where there can be none."""

from collections.abc import Iterator

import pytest

from tests.cluster.fleet import Fleet
from tests.hosts import unavailable


@pytest.fixture(scope="session", autouse=True)
def _hosts() -> None:
    reason = unavailable()
    if reason:
        pytest.skip(reason)  # no root, no namespaces in this kernel, or a program that is named with its package


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
