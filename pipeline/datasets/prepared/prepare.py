"""Makes a dataset: checks the samples, plans the shards, writes each in a task on the cluster, and finishes."""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial

from pipeline import storage
from pipeline.cluster import tasks
from pipeline.datasets.files import counts_of
from pipeline.datasets.prepared import shards, splits
from pipeline.datasets.prepared.dataset import IGNORE_INDEX, SCHEMA_VERSION, SUBSETS, DatasetInfo
from pipeline.datasets.prepared.shards import Folder, Part, Row, Slot
from pipeline.datasets.raw.layouts import RawSample
from pipeline.datasets.raw.masks import canonical_mask, check_palette, class_lookup, mask_size
from pipeline.datasets.raw.photos import BadSampleError, PhotoRules, canonical_photo
from pipeline.datasets.specs import DatasetSpec
from pipeline.errors import UserError
from pipeline.patience import retried

PART_VERSION = 4
"""Of what is known of a shard: what other versions have begun is begun anew."""


@dataclass(frozen=True)
class ShardPlan:
    """All that a task needs to write one shard."""

    root: str
    slot: Slot
    samples: tuple[RawSample, ...]
    spec: DatasetSpec
    rules: PhotoRules
    skip_bad: bool

    @property
    def digest(self) -> str:
        """Hash of what the shard will hold; a shard of the same plan need not be written again.

        Of files on a disk it holds size and time, as people mend files and give the same command again.
        """
        stamps = [storage.stamp(uri) for each in self.samples for uri in (each.image_uri, each.mask_uri) if uri]
        version = (SCHEMA_VERSION, PART_VERSION)
        values = asdict(self) | {"root": None, "skip_bad": None, "version": version, "stamps": stamps}
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def carry_out(plan: ShardPlan) -> Part:
    """Reads and checks the samples of one shard and writes it, unless an earlier attempt did.

    If samples are bad and may not be skipped, nothing is written.
    """
    digest = plan.digest  # before the files are read: one that changes meanwhile is read again the next time
    done = shards.read_part(plan.root, plan.slot.shard, digest)
    if done is not None and (plan.skip_bad or not done.bad):
        return done
    rows: list[Row] = []
    bad: dict[str, str] = {}
    facts = _Facts()
    for sample in plan.samples:
        try:
            rows.append(read_row(sample, plan.spec, plan.rules, facts))
        except BadSampleError as error:
            bad[sample.id] = str(error)
    if bad and not plan.skip_bad:
        unknown = tuple(sorted(facts.unknown))
        return Part(digest, plan.slot.subset, plan.slot.shard, 0, [], bad, {}, unknown=unknown)
    return shards.write_shard(
        plan.root, plan.slot, rows, digest, bad=bad, notes=dict(facts.notes), palette=facts.palette
    )


class _Facts:
    """What is learnt of a shard's files on the way."""

    def __init__(self) -> None:
        self.notes: Counter[str] = Counter()
        self.unknown: set[str] = set()
        self.palette: dict[str, tuple[int, str]] = {}


def read_row(sample: RawSample, spec: DatasetSpec, rules: PhotoRules, facts: _Facts | None = None) -> Row:
    """Reads and checks one sample.

    Args:
        sample: its files.
        spec: what masks hold.
        rules: for its image.
        facts: takes up what is worth telling.

    Raises:
        BadSampleError: the message begins with the URI of the bad file.
        UserError: the storage refuses.
    """
    facts = facts or _Facts()
    image = retried(partial(storage.read_bytes, sample.image_uri))
    raw = None if sample.mask_uri is None else retried(partial(storage.read_bytes, sample.mask_uri))
    uri, photo = sample.image_uri, None
    try:
        photo = canonical_photo(image, None if raw is None else mask_size(raw), rules)
        mask = None
        if raw is not None:
            uri = str(sample.mask_uri)
            lookup = class_lookup(len(spec.classes), spec.label_ids if sample.label_ids else None)
            mask = canonical_mask(raw, photo.size, lookup, spec.label_colors)
            if spec.colored_masks and not sample.label_ids:
                check_palette(mask.palette, spec.palette)
            elif not sample.label_ids:
                _same_palette(facts.palette, mask.palette, uri)
    except BadSampleError as error:
        facts.unknown.update(getattr(error, "values", ())[: 2 * SHOWN_VALUES])
        exif = "; the image carries an EXIF rotation, see --exif" if photo and "EXIF" in " ".join(photo.notes) else ""
        raise BadSampleError(f"{uri}: {error}{exif}") from error
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Pillow raises almost anything where a file contradicts itself
        raise BadSampleError(f"{uri}: unreadable ({str(error) or type(error).__name__})") from error
    facts.notes.update(photo.notes)
    pixels = () if mask is None else tuple(mask.pixels.tolist())
    return Row(sample.id, photo.data, mask.data if mask else None, *photo.size, pixels, photo.moments)


def _same_palette(known: dict[str, tuple[int, str]], found: Mapping[int, int], uri: str) -> None:
    """Compares the palette of the mask at `uri` with those before it, and adds what is new."""
    for index, color in found.items():
        before, other = known.setdefault(str(index), (color, uri))
        if before != color:
            raise BadSampleError(
                f"its palette gives {index} the colour #{color:06x}, that of {other} #{before:06x}: renumbered; "
                "say what counts: --values 0=0,1=1,... for the indices, --values '#000000=0,...' for the colours"
            )


PROBES = 16
"""Images whose size is looked at to plan row groups."""
SHOWN_VALUES = 60
"""So many values without a class are told."""
NAMED = 5
"""So many classes are named, the others counted."""
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
    rules: PhotoRules | None = None,
    inputs: Sequence[str] = (),
    overwrite: bool = False,
    skip_bad: bool = False,
    workers: int | None = None,
) -> DatasetInfo:
    """Checks `samples` and writes them as a dataset.

    Started again with the same arguments after an interruption it keeps the shards that are there, but those
    of which a file on a disk was changed; of files in an object store it does not notice that.

    Args:
        samples: what a reader found.
        out: path or URI of the dataset.
        name: what to call it.
        spec: its classes.
        seed: of the row order and of the generated split lists.
        release: folder and protocol of published split lists.
        rules: for images that can be read in two ways.
        inputs: absolute places that are read; they may lie in `out`.
        overwrite: replace a finished dataset, which stays until the new one is whole.
        skip_bad: leave bad samples out instead of stopping.
        workers: tasks at a time; None: as many as the cluster has CPUs for.

    Raises:
        UserError: a dataset or something else is there already, bad samples (the first is named, the others counted),
            no images to score, masks without a pixel of a class, or the storage refuses.
    """
    root, rules = storage.absolute(out), rules or PhotoRules()
    old = shards.refuse_existing(root, overwrite)
    check_samples(samples)
    if release is not None:  # wrong lists should show now and not hours later
        splits.read_release(*release, {each.id: _role(each) for each in samples})
    mean_bytes = _mean_bytes(samples, seed)
    wanted = [[asdict(each) for each in samples], asdict(spec), asdict(rules), seed, old.index_hash if old else ""]
    digest = hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()
    protocols = [*splits.GENERATED, *([release[1]] if release else [])]
    folder = shards.begin(root, digest, overwrite=overwrite, inputs=inputs, protocols=protocols)
    plans = plan_shards(samples, root, spec, rules, seed, skip_bad, mean_bytes, folder)
    parts = run(plans, workers)
    bad = sorted(text for part in parts for text in part.bad.values())
    if bad and not skip_bad:
        least = "at least " if len(parts) < len(plans) else ""
        more = f"; {least}{len(bad) - 1} more bad samples" if len(bad) > 1 else ""
        unknown = sorted({value for part in parts for value in part.unknown})
        values = (
            f"; all values without a class in the masks looked at: {_shortened(unknown)}" if len(unknown) > 1 else ""
        )
        raise UserError(f"{bad[0]}{values}{more}; fix them or pass --skip_bad")
    for text in bad:
        print(f"skipped {text}", file=sys.stderr)
    check_parts(parts)
    check_pixels(parts)
    palette: dict[str, tuple[int, str]] = {}
    source = ""
    try:
        for part in parts:
            for index, (color, uri) in part.palette.items():
                _same_palette(palette, {int(index): color}, source := uri)
    except BadSampleError as error:
        raise UserError(f"{source}: {error}") from error
    for note, count in sum((Counter(part.notes) for part in parts), Counter()).items():
        print(f"{note}: {count}", file=sys.stderr)
    return shards.finish(root, parts, name=name, spec=spec, seed=seed, release=release, bands=rules.bands)


def check_parts(parts: Sequence[Part]) -> None:
    """Refuses what is left if bad samples were left out: see `check_samples`.

    Raises:
        UserError: no train image is left, or no val image where there is something to learn.
    """
    rows = [row for part in parts for row in part.index]
    if not any(row["subset"] == "train" for row in rows):
        raise UserError("all train images are bad and were left out: there is nothing to train on")
    if any(row["mask_bytes"] for row in rows) and not any(row["subset"] == "val" for row in rows):
        raise UserError("all validation images are bad and were left out: there is nothing to score")


def check_pixels(parts: Sequence[Part]) -> None:
    """Refuses masks in which nothing can be learnt or scored.

    Raises:
        UserError: all pixels of the train or of the val masks are ignored.
    """
    for subset, use in (("train", "learn from"), ("val", "score")):
        values = {value for part in parts if part.subset == subset for value in part.pixels}
        if values == {str(IGNORE_INDEX)}:
            raise UserError(
                f"every pixel of the {subset} masks is {IGNORE_INDEX}, which is ignored: there is nothing to {use}; "
                f"if {IGNORE_INDEX} is a class, say so: --values 0=0,{IGNORE_INDEX}=1"
            )


def warnings(info: DatasetInfo) -> list[str]:
    """What is odd about the classes of a dataset, a line each."""
    unseen = info.unseen(*SUBSETS)
    if not unseen:
        return []
    ids = ",".join(f"{index}={index}" for index, name in enumerate(info.classes) if name not in unseen)
    told, ignored = f"no mask has a pixel of {_listing(unseen)}", info.ignored(*SUBSETS)
    if ignored:
        told += f"; {100 * ignored:.0f} % of the pixels are {IGNORE_INDEX}, which is ignored"
    if ignored and len(unseen) == 1:
        told += (
            f"; if {IGNORE_INDEX} stands for {unseen[0]}: --values {ids},{IGNORE_INDEX}={info.classes.index(unseen[0])}"
        )
    return [told]


def _shortened(values: Sequence[str]) -> str:
    """The values, up to a number that a table can have; a photo in the place of a mask has thousands."""
    more = f" and {len(values) - SHOWN_VALUES} more: is it a mask?" if len(values) > SHOWN_VALUES else ""
    return ", ".join(values[:SHOWN_VALUES]) + more


def _listing(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)} classes ({', '.join(names[:NAMED])}{more})" if len(names) > 1 else f"class {names[0]}"


def summary(info: DatasetInfo, passed: Mapping[str, int]) -> str:
    """What was made: images, masks, what was left out, and what was passed over, by suffix or reason."""
    told = f"{info.counts['train']} train ({info.masked['train']} with a mask), {info.counts['val']} val"
    told += f", {info.skipped} skipped"
    kinds = counts_of(passed)
    return told + (f"; passed over: {kinds}" if kinds else "")


def check_samples(samples: Sequence[RawSample]) -> None:
    """Checks what needs no look into files.

    Raises:
        UserError: no train images, duplicate ids, or masks to learn from but no val images to score.
    """
    double = next((key for key, count in Counter(sample.id for sample in samples).items() if count > 1), None)
    if double is not None:
        found = [sample for sample in samples if sample.id == double]
        files = sorted({sample.image_uri for sample in found})
        where = f"{' and '.join(files)}; rename one" if len(files) > 1 else f"{files[0]} is in train and in val; choose"
        raise UserError(f"duplicate id {double}: {where}: every image has an id of its own and is in one subset")
    train = [sample for sample in samples if sample.subset == "train"]
    if not train:
        raise UserError("no train images found; check --root and --source")
    if len(train) == len(samples) and any(sample.mask_uri for sample in train):
        raise UserError("no validation images found; only a pool without any mask needs none")


def _role(sample: RawSample) -> str:
    return "val" if sample.subset == "val" else "masked" if sample.mask_uri else "bare"


def _mean_bytes(samples: Sequence[RawSample], seed: int) -> float:
    """About what a sample takes; also shows that the files can be read."""
    by_id = {sample.id: sample for sample in samples}
    probes = splits.ranked(by_id, f"rows/{seed}")[:PROBES]
    return max(1.0, sum(len(storage.read_bytes(by_id[key].image_uri)) for key in probes) / len(probes))


def plan_shards(
    samples: Sequence[RawSample],
    root: str,
    spec: DatasetSpec,
    rules: PhotoRules,
    seed: int,
    skip_bad: bool,
    mean_bytes: float,
    folder: Folder,
) -> list[ShardPlan]:
    """Shuffles the samples by `seed` and cuts them into shards, train before val."""
    by_id = {sample.id: sample for sample in samples}
    order = splits.ranked(by_id, f"rows/{seed}")
    members = {subset: [by_id[key] for key in order if by_id[key].subset == subset] for subset in SUBSETS}
    pieces = shards.cut(members, mean_bytes, folder)
    return [ShardPlan(root, slot, tuple(found), spec, rules, skip_bad) for slot, found in pieces]


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
