"""Makes a dataset: checks the samples, plans the shards, writes each in a task on the cluster, and finishes."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.cluster import tasks
from pipeline.datasets.prepared import shards, splits
from pipeline.datasets.prepared.dataset import SCHEMA_VERSION, SUBSETS, DatasetInfo
from pipeline.datasets.prepared.shards import Part, Row, Slot
from pipeline.datasets.raw.layouts import RawSample
from pipeline.datasets.raw.masks import BadSampleError, canonical_mask, check_image, class_lookup
from pipeline.datasets.specs import DatasetSpec
from pipeline.errors import UserError


@dataclass(frozen=True)
class ShardPlan:
    """All that a task needs to write one shard."""

    root: str
    slot: Slot
    samples: tuple[RawSample, ...]
    spec: DatasetSpec
    skip_bad: bool

    @property
    def digest(self) -> str:
        """Hash of what the shard will hold; a shard of the same plan need not be written again."""
        values = asdict(self) | {"root": None, "skip_bad": None, "version": SCHEMA_VERSION}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def carry_out(plan: ShardPlan) -> Part:
    """Reads and checks the samples of one shard and writes it, unless an earlier attempt did.

    If samples are bad and may not be skipped, nothing is written.
    """
    done = shards.read_part(plan.root, plan.slot.shard, plan.digest)
    if done is not None and (plan.skip_bad or not done.bad):
        return done
    rows: list[Row] = []
    bad: dict[str, str] = {}
    lookups = {
        False: class_lookup(len(plan.spec.classes)),
        True: class_lookup(len(plan.spec.classes), plan.spec.label_ids),
    }
    for sample in plan.samples:
        try:
            rows.append(read_row(sample, lookups[sample.label_ids], plan.spec.label_colors))
        except BadSampleError as error:
            bad[sample.id] = str(error)
    if bad and not plan.skip_bad:
        return Part(plan.digest, plan.slot.subset, plan.slot.shard, 0, [], bad)
    return shards.write_shard(plan.root, plan.slot, rows, plan.digest, bad)


def read_row(sample: RawSample, lookup: NDArray[np.int16], colors: Mapping[int, int] | None = None) -> Row:
    """Reads and checks one sample; `lookup` and `colors` are those of `raw.masks.canonical_mask`.

    Raises:
        BadSampleError: the message begins with the URI of the bad file.
        UserError: the storage refuses.
    """
    uri = sample.image_uri
    try:
        image = storage.retried(partial(storage.read_bytes, uri))
        height, width = check_image(image)
        mask = None
        if sample.mask_uri is not None:
            uri = sample.mask_uri
            data = storage.retried(partial(storage.read_bytes, uri))
            mask = canonical_mask(data, (height, width), lookup, colors)
    except BadSampleError as error:
        raise BadSampleError(f"{uri}: {error}") from error
    return Row(sample.id, image, mask, height, width)


PROBES = 16
"""Images whose size is looked at to plan row groups."""
MAX_BAD = 100
"""So many bad samples are a mistake in the arguments: stop instead of reading the rest."""


def prepare(
    samples: Sequence[RawSample],
    out: str,
    *,
    name: str,
    spec: DatasetSpec,
    seed: int = 0,
    release: tuple[str, str] | None = None,
    overwrite: bool = False,
    skip_bad: bool = False,
    workers: int | None = None,
) -> DatasetInfo:
    """Checks `samples` and writes them as a dataset.

    Started again with the same arguments after an interruption it keeps the shards that are there; it does
    not notice source files that were changed in between.

    Args:
        samples: what a reader found.
        out: path or URI of the dataset.
        name: what to call it.
        spec: its classes.
        seed: of the row order and of the generated split lists.
        release: folder and protocol of published split lists.
        overwrite: replace a finished dataset.
        skip_bad: leave bad samples out instead of stopping.
        workers: tasks at a time; None: as many as the cluster has CPUs for.

    Raises:
        UserError: a dataset is there already, bad samples (the first is named, the others counted), no images
            to score, or the storage refuses.
    """
    root = storage.absolute(out)
    shards.clear(root, overwrite)
    check_samples(samples)
    if release is not None:  # wrong lists should show now and not hours later
        splits.read_release(*release, {each.id: _role(each) for each in samples})
    plans = plan_shards(samples, root, spec, seed, skip_bad)
    parts = run(plans, workers)
    bad = sorted(text for part in parts for text in part.bad.values())
    if bad and not skip_bad:
        least = "at least " if len(parts) < len(plans) else ""
        more = f"; {least}{len(bad) - 1} more bad samples" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; fix them or pass --skip_bad")
    for text in bad:
        print(f"skipped {text}", file=sys.stderr)
    return shards.finish(root, parts, name=name, spec=spec, seed=seed, release=release)


def check_samples(samples: Sequence[RawSample]) -> None:
    """Checks what needs no look into files.

    Raises:
        UserError: no train images, duplicate ids, or masks to learn from but no val images to score.
    """
    double = next((key for key, count in Counter(sample.id for sample in samples).items() if count > 1), None)
    if double is not None:
        files = " and ".join(sample.image_uri for sample in samples if sample.id == double)
        raise UserError(f"duplicate id {double}: {files}; every image needs an id of its own and is in one subset")
    train = [sample for sample in samples if sample.subset == "train"]
    if not train:
        raise UserError("no train images found; check --root and --source")
    if len(train) == len(samples) and any(sample.mask_uri for sample in train):
        raise UserError("no validation images found; only a pool without any mask needs none")


def _role(sample: RawSample) -> str:
    return "val" if sample.subset == "val" else "masked" if sample.mask_uri else "bare"


def plan_shards(
    samples: Sequence[RawSample], root: str, spec: DatasetSpec, seed: int, skip_bad: bool
) -> list[ShardPlan]:
    """Shuffles the samples by `seed` and cuts them into shards, train before val."""
    by_id = {sample.id: sample for sample in samples}
    order = splits.ranked(by_id, f"rows/{seed}")
    members = {subset: [by_id[key] for key in order if by_id[key].subset == subset] for subset in SUBSETS}
    probes = [len(storage.read_bytes(by_id[key].image_uri)) for key in order[:PROBES]]
    pieces = shards.cut(members, max(1.0, sum(probes) / len(probes)))
    return [ShardPlan(root, slot, tuple(found), spec, skip_bad) for slot, found in pieces]


def run(plans: Sequence[ShardPlan], workers: int | None = None) -> list[Part]:
    """Carries out the plans on Ray; returns a part for each, in their order.

    Fewer parts come back if it stopped early because of many bad samples.
    """
    parts: dict[str, Part] = {}
    for part in tasks.run(carry_out, plans, len(plans), "prepare: %d of %d shards", workers):
        parts[part.shard] = part
        if sum(len(done.bad) for done in parts.values()) > MAX_BAD and not plans[0].skip_bad:
            break
    return [parts[plan.slot.shard] for plan in plans if plan.slot.shard in parts]
