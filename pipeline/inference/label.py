"""Labels the unlabeled images of a dataset with a trained network, on Ray Data: each task labels one shard."""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch

from pipeline import checkpoint, storage
from pipeline.cluster import tasks
from pipeline.datasets.images import DecodeError, decode_image, encode_png
from pipeline.datasets.prepared import pseudo
from pipeline.datasets.prepared.dataset import IGNORE_INDEX, SCHEMA_VERSION, Dataset, open_dataset
from pipeline.datasets.prepared.pseudo import LABEL_SCHEMA, LabelsInfo
from pipeline.datasets.prepared.splits import Split
from pipeline.errors import UserError
from pipeline.inference.evaluate import scorer
from pipeline.inference.load import autocast, restore, task_device
from pipeline.inference.logits import averaged
from pipeline.ingest.groups import Group, select_groups
from pipeline.ingest.read import read_rows
from pipeline.ops.entropy import entropy
from pipeline.patience import Patience

SCALES = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Scales that probabilities are averaged over (ST++ release, base.py)."""


@dataclass(frozen=True)
class Labeling:
    """The network and the options that pseudo-labels are made with."""

    root: str
    """The dataset."""
    checkpoint: str
    """Folder of the network that labels."""
    tta: bool
    """Average over `SCALES` and mirrored images."""
    keep: float
    """Share of each image's pixels that get a label, those of the smallest entropy."""

    def digest(self, dataset: Dataset) -> str:
        """Hash of all that the labels depend on."""
        sha = checkpoint.read_meta(self.checkpoint).sha256
        values = [SCHEMA_VERSION, dataset.info.index_hash, sha, self.tta, self.keep]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()


class ShardJob(NamedTuple):
    """One shard to label."""

    out: str
    digest: str
    groups: list[Group]
    """Its row groups, with the images to label alone."""


def label_unlabeled(recipe: Labeling, split: Split, out: str) -> LabelsInfo:
    """Labels the unlabeled images of a split, and writes the labels; nothing is done if they are labeled already.

    Interrupted, it goes on with the shards that are missing.

    Args:
        recipe: network and options.
        split: whose unlabeled side to label.
        out: where to write the set of labels.

    Raises:
        UserError: other labels are there, or the storage refuses.
    """
    dataset = open_dataset(recipe.root)
    digest = f"{recipe.digest(dataset)}-{hashlib.sha256(repr(sorted(split.unlabeled)).encode()).hexdigest()[:12]}"
    if storage.exists(storage.join(out, pseudo.LABELS_FILE)):
        info = pseudo.open_labels(out, dataset)
        if info.digest != digest:
            raise UserError(f"{out} holds labels of another network or by other options; use --fresh or another --out")
        return info
    jobs: dict[str, ShardJob] = {}
    for group in select_groups(dataset, split.unlabeled):
        jobs.setdefault(group.shard, ShardJob(out, digest, [])).groups.append(group)
    todo = [(recipe, job) for job in jobs.values()]
    for _ in tasks.run(_label, todo, len(todo), "label: %d of %d shards", on_gpus=True):
        pass
    info = LabelsInfo(
        digest=digest, index_hash=dataset.info.index_hash, images=len(split.unlabeled), shards=tuple(jobs)
    )
    pseudo.write_info(out, info)
    return info


def _label(task: tuple[Labeling, ShardJob]) -> None:
    """Labels one shard; runs in a Ray worker."""
    recipe, job = task
    _labeler(recipe).label(job)


@lru_cache(maxsize=1)
def _labeler(recipe: Labeling) -> "Labeler":
    """The network, loaded once per worker process."""
    return Labeler(recipe, task_device())


class Labeler:
    """A network that labels shards. Knows nothing of Ray."""

    def __init__(self, recipe: Labeling, device: torch.device) -> None:
        """Loads the network.

        Raises:
            UserError: the checkpoint or the dataset cannot be used.
        """
        self._recipe, self._device = recipe, device
        self._config, method = restore(recipe.checkpoint, device)
        self._patience = Patience(self._config.run.storage_patience)
        self._logits = scorer(method.predictor().eval(), open_dataset(recipe.root), self._config.eval)

    def label(self, job: ShardJob) -> None:
        """Labels and writes one shard, unless an earlier attempt did."""
        shard = job.groups[0].shard
        if pseudo.has_labels(job.out, shard, job.digest):
            return
        tables = {group.row_group: self._table(group) for group in job.groups}
        pseudo.write_labels(job.out, shard, tables, job.digest, self._patience)

    def _table(self, group: Group) -> pa.Table:
        """The labels of one row group, as PNG files beside the images' ids."""
        images = read_rows(group, None, self._patience)["image"]
        labels = [encode_png(self.classes(memoryview(image.as_buffer()))) for image in images]
        return pa.table([pa.array(group.ids, pa.string()), pa.array(labels, pa.binary())], LABEL_SCHEMA)

    @torch.no_grad()
    def classes(self, encoded: bytes | memoryview) -> np.ndarray:
        """The network's labels of an image.

        Args:
            encoded: a JPEG or PNG file.

        Returns:
            uint8 [H,W]: the most probable class; 255 where the entropy is above the `keep` quantile of the image. A
            damaged image is one ignored pixel: training leaves it out.
        """
        try:
            pixels = decode_image(encoded)
        except DecodeError:
            return np.full((1, 1), IGNORE_INDEX, np.uint8)
        image = torch.from_numpy(pixels).permute(2, 0, 1).unsqueeze(0).to(self._device)
        scales = [self._config.eval.scale * scale for scale in (SCALES if self._recipe.tta else (1.0,))]
        with autocast(self._device, self._config.run):
            probability = averaged(self._logits, image, scales, mirror=self._recipe.tta)
        label = probability.argmax(1)
        if self._recipe.keep < 1:
            values = entropy(probability.clamp_min(1e-30).log())
            label[values > _quantile(values, self._recipe.keep)] = IGNORE_INDEX
        return label[0].byte().cpu().numpy()


def _quantile(values: torch.Tensor, share: float) -> torch.Tensor:
    """The value that `share` of all values do not exceed (torch.quantile refuses more than 16 million)."""
    rank = max(1, round(share * values.numel()))
    return values.flatten().kthvalue(rank).values
