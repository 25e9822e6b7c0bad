"""What one task of prepare does: read and check the samples of one shard, and write it. Knows nothing of Ray."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from pipeline import storage
from pipeline.datasets import shards
from pipeline.datasets.facts import Facts
from pipeline.datasets.format import SCHEMA_VERSION
from pipeline.datasets.images import BadSampleError, canonical_mask, check_image, class_lookup
from pipeline.datasets.readers import RawSample
from pipeline.datasets.shards import Part, Row, Slot


@dataclass(frozen=True)
class ShardPlan:
    """All that a task needs to write one shard."""

    root: str
    slot: Slot
    samples: tuple[RawSample, ...]
    facts: Facts
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
        False: class_lookup(len(plan.facts.classes)),
        True: class_lookup(len(plan.facts.classes), plan.facts.label_ids),
    }
    for sample in plan.samples:
        try:
            rows.append(read_row(sample, lookups[sample.label_ids], plan.facts.label_colors))
        except BadSampleError as error:
            bad[sample.id] = str(error)
    if bad and not plan.skip_bad:
        return Part(plan.digest, plan.slot.subset, plan.slot.shard, 0, [], bad)
    return shards.write_shard(plan.root, plan.slot, rows, plan.digest, bad)


def read_row(sample: RawSample, lookup: NDArray[np.int16], colors: Mapping[int, int] | None = None) -> Row:
    """Reads and checks one sample; `lookup` and `colors` are those of `images.canonical_mask`.

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
