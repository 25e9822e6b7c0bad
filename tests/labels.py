"""Pseudo-labels for tests: the truth, as if a perfect network had made them."""

import pyarrow as pa

from pipeline.datasets.prepared import pseudo
from pipeline.datasets.prepared.dataset import open_dataset, read_group
from pipeline.datasets.prepared.pseudo import LABEL_SCHEMA, LabelsInfo
from pipeline.datasets.prepared.splits import load_split
from pipeline.ingest.groups import select_groups


def write_truth(root: str, split: str, out: str) -> str:
    """Writes the masks of the unlabeled images of a split as their pseudo-labels; returns `out`."""
    dataset = open_dataset(root)
    shards: dict[str, dict[int, pa.Table]] = {}
    for group in select_groups(dataset, load_split(dataset, split).unlabeled):
        masks = read_group(root, group.shard, group.row_group, ["id", "mask"]).take(list(group.rows))
        shards.setdefault(group.shard, {})[group.row_group] = pa.table(masks.columns, LABEL_SCHEMA)
    for shard, groups in shards.items():
        pseudo.write_labels(out, shard, groups, "truth")
    count = sum(len(table) for groups in shards.values() for table in groups.values())
    info = LabelsInfo(digest="truth", index_hash=dataset.info.index_hash, images=count, shards=tuple(shards))
    pseudo.write_info(out, info)
    return out
