"""Images and tar files to make pools of, and pools as training reads them."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.datasets.pools.pool import Pool
from pipeline.ingest.groups import PoolTable
from pipeline.ingest.read import read_rows
from pipeline.patience import Patience


def photo(trees: Any, number: int, form: str = "JPEG") -> bytes:
    return trees.encode(np.full((8, 8 + number % 3, 3), number % 256, np.uint8), form)


def rows(pool: Pool, generations: int = 99) -> dict[str, bytes]:
    """Every image by id, read as training does; none twice."""
    found: list[tuple[str, bytes]] = []
    table = PoolTable(pool, generations)
    for number in range(len(table)):
        group = table[number]
        read = read_rows(group, None, Patience())
        assert read.column_names == ["id", "image"]
        assert read.num_rows == len(group.rows)
        found += zip(read["id"].to_pylist(), read["image"].to_pylist(), strict=True)
    assert len(dict(found)) == len(found)
    return dict(found)


def expected(photos: Path, suffix: str = ".jpg") -> dict[str, bytes]:
    return {str(file.relative_to(photos)): file.read_bytes() for file in photos.rglob(f"*{suffix}")}


def write_tar(path: Path, members: dict[str, bytes], mode: Any = "w", **options: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode, **options) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def everything(root: Path) -> dict[str, bytes]:
    """All files below a folder, by path."""
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}
