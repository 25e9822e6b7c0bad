import dataclasses
import io
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.config.schema import EvalConfig
from pipeline.datasets.prepared.dataset import OLDER_INDEX, SHARD_SCHEMA, Dataset, DatasetInfo
from pipeline.errors import UserError
from pipeline.inference import evaluate as module
from pipeline.inference.class_table import counted
from pipeline.inference.evaluate import ahead, batches, eval_mode, evaluate, read_samples, scored_groups

CPU = torch.device("cpu")
SIZES = [(20, 24)] * 5 + [(24, 20)] * 2 + [(20, 24)] * 4


def _png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def _rows() -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for number, (height, width) in enumerate(SIZES):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        mask = rng.choice(np.array([0, 1, 2, 255], dtype=np.uint8), (height, width))
        rows.append({"id": f"v{number}", "image": _png(image), "mask": _png(mask), "height": height, "width": width})
    return rows


def _dataset(root, rows: list[dict], group: int = 3) -> Dataset:
    """Two train rows without masks, then `rows` as val; the second shard is written in groups of `group`."""
    train = [{**row, "id": f"t{i}", "mask": None} for i, row in enumerate(rows[:2])]
    index = []
    for name, subset, members in (("shards/train.parquet", "train", train), ("shards/val.parquet", "val", rows)):
        (root / "shards").mkdir(exist_ok=True)
        table = pa.Table.from_pylist(members, schema=SHARD_SCHEMA)
        pq.write_table(table, root / name, row_group_size=group, compression="none", write_page_checksum=True)
        for i, row in enumerate(members):
            sizes = {"image_bytes": len(row["image"]), "mask_bytes": len(row["mask"] or b"")}
            place = {"subset": subset, "shard": name, "row_group": i // group, "row": i % group}
            index.append({"id": row["id"], **place, **sizes, "height": row["height"], "width": row["width"]})
    info = DatasetInfo(
        name="t", classes=("a", "b", "c"), palette=((0, 0, 0),) * 3, counts={"train": 2, "val": len(rows)},
        evaluation="whole", protocol="", index_hash="", shards={},
    )  # fmt: skip
    return Dataset(str(root), info, pa.Table.from_pylist(index, schema=OLDER_INDEX))


@pytest.fixture
def dataset(tmp_path) -> Dataset:
    return _dataset(tmp_path, _rows())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.Conv2d(8, 3, 1))
        self.batches: list[tuple[int, ...]] = []

    def forward(self, image: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        self.batches.append(tuple(image.shape))
        return self.layers(image.float() / 255)


def test_counts_each_image_once(dataset):
    net = Net()
    matrix = evaluate(net, dataset, EvalConfig(), CPU).matrix
    scored = 0
    for group in scored_groups(dataset):
        scored += sum(int((sample.mask != 255).sum()) for sample in read_samples(dataset, group))
    assert matrix.sum() == scored
    assert net.batches == [
        (3, 3, 20, 24),
        (2, 3, 20, 24),
        (1, 3, 24, 20),
        (1, 3, 24, 20),
        (2, 3, 20, 24),
        (2, 3, 20, 24),
    ]


@pytest.mark.parametrize("world", [2, 3, 7])
def test_does_not_depend_on_the_world(dataset, world):
    whole = evaluate(Net(), dataset, EvalConfig(), CPU).matrix
    parts = [evaluate(Net(), dataset, EvalConfig(), CPU, rank, world).matrix for rank in range(world)]
    assert torch.equal(sum(parts), whole)  # type: ignore[arg-type]


def test_equals_a_plain_loop(dataset):
    net = Net()
    expected = np.zeros((3, 3), dtype=np.int64)
    with eval_mode(net), torch.no_grad():
        for group in scored_groups(dataset):
            for sample in read_samples(dataset, group):
                logits = net(torch.from_numpy(sample.image).permute(2, 0, 1).unsqueeze(0))
                logits = nn.functional.interpolate(logits, sample.mask.shape, mode="bilinear", align_corners=True)
                keep = sample.mask != 255
                np.add.at(expected, (sample.mask[keep], logits[0].argmax(0).numpy()[keep]), 1)
    assert evaluate(net, dataset, EvalConfig(), CPU).matrix.tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("stored", "mode", "windows"),
    [
        ("whole", "dataset", False),
        ("sliding", "dataset", True),
        ("sliding", "whole", False),
        ("whole", "sliding", True),
    ],
)
def test_the_dataset_says_how_unless_told(dataset, stored, mode, windows):
    data = dataclasses.replace(dataset, info=dataclasses.replace(dataset.info, evaluation=stored))
    net = Net()
    evaluate(net, data, EvalConfig(mode=mode, window=(12, 12)), CPU)
    assert (net.batches[0][2:] == (12, 12)) == windows


def test_modes_are_restored_one_by_one(dataset):
    net = Net().train()
    net.layers[1].eval()
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    evaluate(net, dataset, EvalConfig(), CPU)
    assert net.training
    assert not net.layers[1].training
    assert net.layers[2].training
    assert all(torch.equal(tensor, state[key]) for key, tensor in net.state_dict().items())


def test_of_train_the_images_with_a_mask_are_scored(tmp_path):
    with pytest.raises(UserError, match="no train images with a mask"):
        scored_groups(_dataset(tmp_path, _rows()), "train")


def test_no_validation_images(tmp_path):
    with pytest.raises(UserError, match="no validation images"):
        evaluate(Net(), _dataset(tmp_path, []), EvalConfig(), CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"mask": None}, "v4 has no mask"), ({"image": b"no image"}, "image v4: "), ({"mask": b"x"}, "v4: ")],
)
def test_a_bad_image_is_named_and_not_left_out(tmp_path, change, message):
    rows = _rows()
    rows[4] |= change
    net = Net().train()
    with pytest.raises(UserError, match=message):
        evaluate(net, _dataset(tmp_path, rows), EvalConfig(), CPU)
    assert net.training


def test_batches_are_bounded(dataset, monkeypatch):
    samples = [sample for group in scored_groups(dataset) for sample in read_samples(dataset, group)]
    assert [len(batch) for batch in batches(samples)] == [5, 2, 4]
    monkeypatch.setattr(module, "MAX_IMAGES", 3)
    assert [len(batch) for batch in batches(samples)] == [3, 2, 2, 3, 1]
    monkeypatch.setattr(module, "MAX_PIXELS", 2 * 20 * 24)
    assert [len(batch) for batch in batches(samples)] == [2, 2, 1, 2, 2, 2]
    monkeypatch.setattr(module, "MAX_PIXELS", 1)
    assert [len(batch) for batch in batches(samples)] == [1] * 11
    assert [len(batch) for batch in batches(samples, 4)] == [4, 1, 2, 4]
    assert list(batches([])) == []


def test_ahead_keeps_the_order_and_reads_one_ahead():
    started = []
    second = threading.Event()

    def load(item: int) -> int:
        started.append(item)
        if item == 1:
            second.set()
        return item * 10

    results = ahead(load, range(4))
    assert next(results) == 0
    assert second.wait(10)
    assert started == [0, 1]
    assert list(results) == [10, 20, 30]
    assert list(ahead(load, [])) == []


def test_ahead_raises_what_loading_raised():
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda item: 1 // item, [1, 0]))


def test_a_mean_over_fewer_classes_says_so():
    assert counted([0.5, 0.25]) == ""
    assert counted([1.0, None]) == " over 1 of 2 classes"
