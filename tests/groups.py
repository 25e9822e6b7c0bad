"""Tables of groups that are all in memory, for plans of no dataset."""

from collections.abc import Iterable

import numpy as np

from pipeline.ingest.groups import Group


class GroupList(list[Group]):
    """A table of groups that are all in memory."""

    def __init__(self, groups: Iterable[Group]) -> None:
        super().__init__(groups)
        counts = np.array([len(group.rows) for group in self], np.int64)
        self.rows = int(counts.max(initial=0))
        self.short = np.flatnonzero(counts < self.rows)
        self.counts = counts[self.short]
