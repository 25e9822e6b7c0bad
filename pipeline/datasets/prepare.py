"""Makes a prepared dataset of raw images, in parallel on Ray: one task reads, checks and writes one shard.

The driver holds names only. Tasks get URIs and open the storage themselves: no credential travels through Ray.
"""

import sys
from collections import Counter
from collections.abc import Sequence

from pipeline import storage
from pipeline.datasets import shards, splits, tasks
from pipeline.datasets.facts import Facts
from pipeline.datasets.format import SUBSETS, DatasetInfo
from pipeline.datasets.readers import RawSample
from pipeline.datasets.shards import Part
from pipeline.datasets.work import ShardPlan, carry_out
from pipeline.errors import UserError

PROBES = 16
"""Images whose size is looked at to plan row groups."""
MAX_BAD = 100
"""So many bad samples are a mistake in the arguments: stop instead of reading the rest."""


def prepare(
    samples: Sequence[RawSample],
    out: str,
    *,
    name: str,
    facts: Facts,
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
        facts: its classes.
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
    shards.claim(root, overwrite)
    check_samples(samples)
    if release is not None:  # wrong lists should show now and not hours later
        splits.read_release(*release, {each.id: _role(each) for each in samples})
    plans = plan_shards(samples, root, facts, seed, skip_bad)
    parts = run(plans, workers)
    bad = sorted(text for part in parts for text in part.bad.values())
    if bad and not skip_bad:
        least = "at least " if len(parts) < len(plans) else ""
        more = f"; {least}{len(bad) - 1} more bad samples" if len(bad) > 1 else ""
        raise UserError(f"{bad[0]}{more}; fix them or pass --skip_bad")
    for text in bad:
        print(f"skipped {text}", file=sys.stderr)
    return shards.finish(root, parts, name=name, facts=facts, seed=seed, release=release)


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


def plan_shards(samples: Sequence[RawSample], root: str, facts: Facts, seed: int, skip_bad: bool) -> list[ShardPlan]:
    """Shuffles the samples by `seed` and cuts them into shards, train before val."""
    by_id = {sample.id: sample for sample in samples}
    order = splits.ranked(by_id, f"rows/{seed}")
    members = {subset: [by_id[key] for key in order if by_id[key].subset == subset] for subset in SUBSETS}
    probes = [len(storage.read_bytes(by_id[key].image_uri)) for key in order[:PROBES]]
    pieces = shards.cut(members, max(1.0, sum(probes) / len(probes)))
    return [ShardPlan(root, slot, tuple(found), facts, skip_bad) for slot, found in pieces]


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
