"""Pools of any size of which only the parts that are read exist: links to one file."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipeline.datasets.pools.pool import BYTES_SCHEMA, POOL_FILE, Generation, PoolInfo
from pipeline.datasets.prepared.dataset import WRITE_OPTIONS
from pipeline.ingest.groups import Group

GROUP_ROWS, GROUPS_PER_SHARD = 64, 8
ROWS_PER_SHARD = GROUP_ROWS * GROUPS_PER_SHARD


def write_part(file: Path, height: int, width: int) -> int:
    """A part whose images are smooth pictures of this size, pixels; returns the bytes of the images."""
    images = []
    for number in range(ROWS_PER_SHARD):
        coarse = Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8))
        buffer = io.BytesIO()
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(buffer, "JPEG")
        images.append(buffer.getvalue())
    columns = [[f"{number:04d}.jpg" for number in range(ROWS_PER_SHARD)], images]
    pq.write_table(pa.table(columns, schema=BYTES_SCHEMA), file, row_group_size=GROUP_ROWS, **WRITE_OPTIONS)
    return sum(map(len, images))


def write_pool(root: Path, rows: int, part_bytes: int) -> str:
    """A pool without parts; `part_bytes` is what `write_part` returned."""
    root.mkdir(parents=True)
    shards = -(-rows // ROWS_PER_SHARD)
    generation = Generation(rows=rows, shards=shards, bytes=rows * part_bytes // ROWS_PER_SHARD, digest=str(rows))
    info = PoolInfo(
        name=str(rows), source="images", root=str(root), kind="bytes", group_rows=GROUP_ROWS,
        groups_per_shard=GROUPS_PER_SHARD, generations=(generation,),
    )  # fmt: skip
    (root / POOL_FILE).write_text(info.to_json())
    return str(root)


def link_parts(part: Path, groups: Iterable[Group]) -> None:
    """Makes the parts that hold these groups."""
    for group in groups:
        place = Path(group.root) / group.shard
        place.parent.mkdir(exist_ok=True)
        if not place.exists():
            place.symlink_to(part)
