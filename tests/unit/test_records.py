"""Readers of the program's own JSON files: right ones come back, damaged ones are one line, whatever the damage."""

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest

from pipeline import checkpoint
from pipeline.checkpoint import Progress, Score
from pipeline.config.schema import Config
from pipeline.datasets.pools.pool import Generation, PoolInfo, open_pool
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.datasets.prepared.pseudo import LabelsInfo, open_labels
from pipeline.errors import UserError
from pipeline.methods import OPTIONS
from pipeline.records import read_record
from pipeline.report.runs import read_run

SCORE = Score(3, {"student": 0.5}, [None, 0.25])


def damaged(text: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out or doubled, or the end missing: what disks, editors and merges do."""
    data = bytearray(text)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            del data[at : at + rng.randint(1, 20)]
        elif kind == 2:
            data[at:at] = data[at : at + rng.randint(1, 20)]
        elif kind == 3:
            del data[at:]
        else:
            data[at : at + 1] = rng.choice([b"null", b"[", b"{}", b"1e999", b'"', b"-1", b"\xff\xfe", b"true"])
    return bytes(data)


def dataset(folder: Path, shapes: str) -> tuple[Path, Callable[[], object]]:
    file = folder / "dataset.json"
    file.write_bytes((Path(shapes) / "dataset.json").read_bytes())
    (folder / "index.parquet").write_bytes((Path(shapes) / "index.parquet").read_bytes())
    return file, lambda: open_dataset(str(folder)).info.unseen("train")


def pool(folder: Path, shapes: str) -> tuple[Path, Callable[[], object]]:
    file = folder / "pool.json"
    generations = (Generation(rows=3, shards=1, bytes=9, digest="0"),)
    info = PoolInfo(
        name="p", source="tar", root="/x", kind="links", group_rows=4, groups_per_shard=2, generations=generations
    )
    file.write_text(info.to_json())
    return file, lambda: open_pool(str(folder)).summary


def labels(folder: Path, shapes: str) -> tuple[Path, Callable[[], object]]:
    opened, file = open_dataset(shapes), folder / "labels.json"
    info = LabelsInfo(digest="0", index_hash=opened.info.index_hash, images=3, shards=("shards/a",))
    file.write_text(json.dumps(asdict(info)))
    return file, lambda: open_labels(str(folder), opened)


def meta(folder: Path, shapes: str) -> tuple[Path, Callable[[], object]]:
    checkpoint.save(folder, Config(), {"classes": ["a"]}, {"labeled": 3}, Progress(3, SCORE, SCORE))
    return folder / "checkpoint.json", lambda: checkpoint.read_meta(str(folder))


def summary(folder: Path, shapes: str) -> tuple[Path, Callable[[], object]]:
    file = folder / "summary.json"
    file.write_text(json.dumps(asdict(Progress(3, SCORE, SCORE))))
    return file, lambda: checkpoint.read_summary(str(file))


def metrics(folder: Path, shapes: str) -> tuple[Path, Callable[[], object]]:
    file = folder / "metrics.jsonl"
    lines = [{"kind": "train", "step": 2, "total": 0.5}, {"kind": "eval", **asdict(SCORE)}]
    file.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    (folder / "config.yaml").write_text(f"method: suponly\ndata:\n  root: {shapes}\n")

    def read() -> object:
        run = read_run(str(folder), OPTIONS)
        return run.progress, run.scores()

    return file, read


@pytest.mark.parametrize("kind", [dataset, pool, labels, meta, summary, metrics])
def test_damage_is_one_line_that_names_the_file(kind, shapes, tmp_path, rounds):
    file, read = kind(tmp_path, shapes)
    text, rng, lines = file.read_bytes(), random.Random(0), []
    read()
    for _ in rounds:
        file.write_bytes(damaged(text, rng))
        try:
            read()  # some damage leaves a right file of other content
        except UserError as error:
            lines.append(str(error))
    assert len(lines) > len(rounds) / 3
    assert [line for line in lines if str(tmp_path) not in line or "\n" in line] == []


def test_what_is_read_is_what_was_written():
    assert read_record(Score, json.dumps(asdict(SCORE))) == SCORE
    for text, words in (
        ('{"step": "3", "miou": {}, "iou": []}', "step: Input should be a valid integer"),
        ('{"step": 3, "iou": []}', "miou: Field required"),
        ('{"step": 3, "miou": {"a": 1}, "iou": ["b"]}', "iou.0: Input should be a valid number"),
        ('{"step": 3, "miou": {}, "iou": []}', "no mIoU"),
        ("[" * 100_000, "recursion limit"),
    ):
        with pytest.raises(ValueError, match=words):
            read_record(Score, text)
