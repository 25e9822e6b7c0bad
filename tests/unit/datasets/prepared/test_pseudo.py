import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import storage
from pipeline.datasets.prepared import pseudo
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.pseudo import LABEL_SCHEMA, open_labels, read_labels, write_labels
from pipeline.errors import UserError
from tests.labels import write_truth

SHARD = "shards/train-00000.parquet"


def _table(*ids: str) -> pa.Table:
    return pa.table([pa.array(ids, pa.string()), pa.array([name.encode() for name in ids], pa.binary())], LABEL_SCHEMA)


def test_labels_come_back_in_the_order_asked_for(tmp_path):
    write_labels(str(tmp_path), SHARD, {0: _table("a", "b", "c"), 2: _table("d")}, "x")
    assert read_labels(str(tmp_path), SHARD, 0, ["c", "a"]).to_pylist() == [b"c", b"a"]
    assert read_labels(str(tmp_path), SHARD, 2, ["d"]).to_pylist() == [b"d"]
    file = pq.ParquetFile(tmp_path / SHARD)
    assert [file.metadata.row_group(i).num_rows for i in range(3)] == [3, 0, 1]


def test_an_image_without_a_label_is_named(tmp_path):
    write_labels(str(tmp_path), SHARD, {0: _table("a")}, "x")
    with pytest.raises(UserError, match="no pseudo-label of b"):
        read_labels(str(tmp_path), SHARD, 0, ["a", "b"])


def test_a_shard_counts_as_done_for_the_same_network_alone(tmp_path):
    assert not pseudo.has_labels(str(tmp_path), SHARD, "x")
    write_labels(str(tmp_path), SHARD, {0: _table("a")}, "x")
    assert pseudo.has_labels(str(tmp_path), SHARD, "x")
    assert not pseudo.has_labels(str(tmp_path), SHARD, "y")


def test_a_set_is_one_only_when_it_is_finished_and_fits(shapes, tmp_path):
    dataset, root = open_dataset(shapes), str(tmp_path / "labels")
    write_truth(shapes, "1_4", root)
    info = open_labels(root, dataset)
    assert info.images == 300
    assert set(info.shards) == set(dataset.subset("train")["shard"].to_pylist())
    storage.write_bytes(f"{root}/labels.json", b'{"digest": "x"}')
    with pytest.raises(UserError, match="not readable"):
        open_labels(root, dataset)
    pseudo.write_info(root, pseudo.LabelsInfo(digest="x", index_hash="other", images=1, shards=()))
    with pytest.raises(UserError, match="other images"):
        open_labels(root, dataset)
    pseudo.delete_labels(root)
    assert storage.list_files(root) == []
    with pytest.raises(UserError, match=r"labels\.json is missing"):
        open_labels(root, dataset)
