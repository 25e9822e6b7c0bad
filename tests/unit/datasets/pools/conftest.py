from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.datasets.pools import make
from tests.unit.datasets.pools.reading import photo


@pytest.fixture(autouse=True)
def _without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(task: Callable[[Any], Any], items: Iterable[Any], total: int, *_: Any) -> Iterator[Any]:
        return map(task, items)

    monkeypatch.setattr(make.tasks, "run", run)


@pytest.fixture
def photos(trees: Any, tmp_path: Path) -> Path:
    """300 plain JPEGs in three folders, and what is none."""
    root = tmp_path / "photos"
    for number in range(300):
        trees.put(root / f"{number % 3}" / f"{number:03d}.jpg", photo(trees, number))
    trees.put(root / "readme.txt", "no picture")
    return root


@pytest.fixture
def few(trees: Any, tmp_path: Path) -> Path:
    """Twenty JPEGs in a folder."""
    for number in range(20):
        trees.put(tmp_path / "few" / f"{number}.jpg", photo(trees, number))
    return tmp_path / "few"
