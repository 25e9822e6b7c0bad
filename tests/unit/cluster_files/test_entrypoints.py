"""The command lines that the files in cluster/ and their pages show are taken by the jobs."""

import re
import shlex
from pathlib import Path

import pytest

from pipeline.config import cli
from pipeline.methods import OPTIONS
from tests.cluster_rules import CLUSTER, ROOT, load
from tests.docs import blocks

PAGES = sorted((ROOT / "docs" / "cluster").glob("*.md"))


def shown(page: Path) -> list[str]:
    """The commands of a page that train."""
    lines = [line for block in blocks(page) for line in block.commands]
    return [line for line in lines if "jobs/train.py " in line or "slurm.sbatch --" in line]


COMMANDS = [
    load("kuberay/rayjob.yaml")["spec"]["entrypoint"],
    *re.findall(r"^#   (sbatch .*)", (CLUSTER / "slurm.sbatch").read_text(), re.MULTILINE),
    *[line for page in PAGES for line in shown(page)],
]


@pytest.mark.parametrize("command", COMMANDS)
def test_its_flags_are_known(command: str) -> None:
    flags = re.split(r"jobs/train\.py|slurm\.sbatch", command)[1]
    config, _ = cli.parse_config(shlex.split(flags), "test", OPTIONS)
    assert str(config.data.root).startswith(("s3://", "/", "gs://"))


def test_every_page_shows_one() -> None:
    assert {page.stem for page in PAGES} == {"aws", "gcp", "kuberay", "own-machines", "slurm"}
    assert [page.stem for page in PAGES if page.stem != "kuberay" and not shown(page)] == []
