"""The Dockerfile: what it is made of, that nothing else gets in, and that it runs as a user of few rights."""

import fnmatch
import re
from pathlib import Path

import pytest
import ray

from tests.cluster_rules import CLUSTER, ROOT, STOP_WAIT

Lines = list[tuple[str, str]]


def instructions(text: str) -> Lines:
    joined = re.sub(r"\\\n", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word
    ]


def faults(text: str) -> list[str]:
    """What is wrong with a Dockerfile."""
    lines = instructions(text)
    values: dict[str, list[str]] = {}
    for word, rest in lines:
        values.setdefault(word, []).append(rest)
    found = []
    base = rf"BASE=rayproject/ray:{re.escape(ray.__version__)}-py3\d+\$\{{VARIANT\}}"
    if lines[0] != ("ARG", 'VARIANT=""') or lines[2] != ("FROM", "${BASE}") or not re.fullmatch(base, lines[1][1]):
        found.append("FROM: not pinned, or without BASE and VARIANT")
    if not values.get("USER") or values["USER"][-1].split(":")[0] in ("root", "0"):
        found.append("USER: root")
    for each in values.get("RUN", []):
        if "pip install" in each and "--require-hashes --requirement cluster/requirements.lock" not in each:
            found.append("RUN: packages without hashes")
    for each in values.get("COPY", []) + values.get("ADD", []):
        *sources, _ = [word for word in each.split() if not word.startswith("--")]
        found += [f"COPY: {source} is not there" for source in sources if not (ROOT / source).exists()]
        found += [f"COPY: {source} is too much" for source in sources if source in (".", "./", "tests", ".git")]
    found += ["ENV: no " + STOP_WAIT] * (STOP_WAIT not in " ".join(values.get("ENV", [])))
    found += [f"ENV: {each}" for each in values.get("ENV", []) if re.search("KEY|SECRET|TOKEN|PASSWORD", each)]
    return found


DOCKERFILE = (CLUSTER / "Dockerfile").read_text()


def test_it_is_sound() -> None:
    assert faults(DOCKERFILE) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("2.60.0-py311${VARIANT}", "latest", "FROM"),
        ("${VARIANT}", "", "FROM"),
        ("${BASE}", "rayproject/ray:2.60.0-py311", "FROM"),
        ("USER 1000:100", "USER root", "USER"),
        ("USER 1000:100", "", "USER"),
        ("--requirement cluster/requirements.lock", "ray torch", "RUN"),
        ("--require-hashes ", "", "RUN"),
        ("pipeline pipeline", "pipelin pipeline", "COPY: pipelin is not there"),
        ("pipeline pipeline", ". .", "COPY: . is too much"),
        ("RAY_JOB_STOP_WAIT_TIME_S=120", "", "ENV: no RAY_JOB_STOP_WAIT_TIME_S=120"),
        ("RAY_USAGE_STATS_ENABLED=0", "AWS_SECRET_ACCESS_KEY=x", "ENV"),
    ],
)
def test_a_slip_is_caught(old: str, new: str, told: str) -> None:
    assert old in DOCKERFILE
    assert told in "\n".join(faults(DOCKERFILE.replace(old, new)))


def test_the_builder_is_sent_only_what_the_image_takes() -> None:
    patterns = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert patterns[0] == "*"
    kept = {pattern[1:] for pattern in patterns if pattern.startswith("!")}
    sources = {
        word.split("/")[0] for word, rest in instructions(DOCKERFILE) if word == "COPY" for word in rest.split()[1:-1]
    }
    assert kept == sources
    secret = [pattern for pattern in patterns if pattern.startswith("**/")]
    assert any(fnmatch.fnmatch(str(Path("pipeline/.env")), pattern) for pattern in secret)
