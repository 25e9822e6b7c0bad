"""Checks of a config that need no dataset; tests/integration/test_bad_input.py sees the others as users do."""

import pytest

from pipeline.datasets.prepared.splits import Split
from pipeline.errors import UserError
from pipeline.methods import make_config
from pipeline.training.preflight import check_batch


@pytest.mark.parametrize(
    ("method", "said"),
    [("u2pl", r"optim\.accumulate 3: must divide optim\.batch_unlabeled 8"), ("suponly", "")],
)
def test_micro_batches_are_equal_parts_of_what_the_method_reads(method: str, said: str) -> None:
    values = {"method": method, "optim.batch_labeled": 6, "optim.batch_unlabeled": 8, "optim.accumulate": 3}
    split = Split("1_2", tuple(map(str, range(6))), (), "")
    if not said:
        check_batch(make_config(values), split, ())
        return
    with pytest.raises(UserError, match=said):
        check_batch(make_config(values), split, ())
