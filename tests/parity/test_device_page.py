"""docs/scaling.md says what a step asks of a GPU: waits, copies, messages and memory, as counted with ResNet-101."""

from pathlib import Path

import pytest

from benchmarks.device_step import GPU_PRESETS, case, trace
from pipeline.config.schema import as_dict
from pipeline.methods import METHODS

PAGE = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.splitlines()
    if line.startswith(tuple(f"| {preset} |" for preset in GPU_PRESETS))
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: " ".join(row[:3]))
def test_a_row_is_what_is_counted(row: list[str]):
    preset, method, gpus, *said = row
    found, where = trace(case(method, preset), GPU_PRESETS[preset], int(gpus))
    waits, copies, collectives, sent, gradients, saved = map(float, said)
    assert (waits, copies) == (0, 0)
    assert (found.waits, found.copies, found.collectives) == (0, 0, collectives), dict(where)
    assert found.sent / 1e6 == pytest.approx(sent, abs=0.006)
    assert found.gradients / 1e6 == pytest.approx(gradients, abs=0.6)
    assert found.saved / 2**30 == pytest.approx(saved, rel=0.02)


def test_the_presets_for_voc_differ_in_nothing_that_a_step_sees():
    classic, blender = (as_dict(case("u2pl", preset)) for preset in ("voc_classic", "voc_blender"))
    for section, keys in {"data": ["protocol"], "optim": ["steps"], "eval": ["every"]}.items():
        for values in (classic, blender):
            for key in keys:
                del values[section][key]
    assert classic == blender


def test_every_method_and_every_kind_of_network_is_there():
    assert {row[1] for row in ROWS} == set(METHODS)
    assert {(row[0], row[2]) for row in ROWS if row[1] == "u2pl"} >= {
        ("voc_classic", "1"), ("voc_classic", "4"), ("voc_classic", "8"), ("cityscapes", "8")
    }  # fmt: skip
