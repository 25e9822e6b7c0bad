"""What ingest saw on one rank: the figures of the log, and the limit on samples that cannot be used."""

import logging
from dataclasses import dataclass

from pipeline.errors import UserError
from pipeline.ingest.augment import Outcome
from pipeline.ingest.sources import Sample

log = logging.getLogger(__name__)

MAX_SKIPPED_SHARE = 0.01
"""A larger share of samples that cannot be decoded stops the run."""
_TOLERATED = 10


@dataclass
class IngestStats:
    """Sums since the start of this attempt; written by the training loop's thread alone."""

    samples: int = 0
    skipped: int = 0
    """Samples of which no pixel counts, as their bytes are no image that can be used."""
    encoded: int = 0
    """Bytes of the samples, as stored."""
    decoding: float = 0.0
    """CPU seconds spent on decoding and views, wherever that was."""
    retries: int = 0
    """How often the storage had to be asked again (beside what its client does by itself)."""
    stalled: float = 0.0
    """Seconds that the training loop waited for batches."""

    def count(self, sample: Sample, outcome: Outcome) -> None:
        """Counts a sample; one that was skipped is named.

        Raises:
            UserError: too many are skipped.
        """
        self.samples += 1
        self.encoded += sum(len(part) for part in (sample.image, sample.mask, sample.label) if part is not None)
        self.decoding += outcome.seconds
        if not outcome.problem:
            return
        self.skipped += 1
        log.warning("sample %s is damaged and left out: %s", sample.id, outcome.problem)
        if self.skipped > max(_TOLERATED, MAX_SKIPPED_SHARE * self.samples):
            raise UserError(
                f"{self.skipped} of {self.samples} samples are damaged, the last one {sample.id} ({outcome.problem})"
            )
