"""The locks: what pyproject.toml asks for, at versions that it allows, by hashes, and from no place in particular."""

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.unit.test_community_files import PROJECT, PYTHONS

ROOT = Path(__file__).parents[2]
NODES, DEV = ROOT / "cluster" / "requirements.lock", ROOT / "requirements-dev.lock"
EXTRAS = PROJECT["optional-dependencies"]
WANTED = {
    NODES: [*PROJECT["dependencies"], *EXTRAS["aws"], *EXTRAS["gcp"]],
    DEV: [each for name, extra in EXTRAS.items() if name not in ("aws", "gcp") for each in extra],
}
HASH = "sha256:[0-9a-f]{64}"


def entries(text: str) -> list[tuple[Requirement, list[str]]]:
    """The packages of a lock, each with its hashes."""
    logical = re.sub(r" \\\n\s*", " ", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE))
    lines = (line.split(" --hash=") for line in logical.splitlines())
    return [(Requirement(first), hashes) for first, *hashes in lines]


def version(locked: list[tuple[Requirement, list[str]]], name: str, python: str) -> list[str]:
    """The versions of a package that a Python on Linux takes."""
    where = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    return [
        str(each.specifier).removeprefix("==")
        for each, _ in locked
        if canonicalize_name(each.name) == canonicalize_name(name) and (not each.marker or each.marker.evaluate(where))
    ]


def faults(nodes: str, dev: str) -> list[str]:
    """What is wrong with two locks."""
    if re.search(r"://|^-", nodes + dev, re.MULTILINE):
        return ["a place to fetch from is in it"]
    locks, found = {NODES: entries(nodes), DEV: entries(dev)}, []
    for locked in locks.values():
        for each, hashes in locked:
            found += [f"{each.name}: no version"] * (not re.fullmatch(r"==[\w.!+]+", str(each.specifier)))
            found += [f"{each.name}: no hash"] * (not hashes or not all(re.fullmatch(HASH, one) for one in hashes))
    twice = {each.name for each, _ in locks[NODES]} & {each.name for each, _ in locks[DEV]}
    found += [f"{name}: in both" for name in sorted(twice)]
    for file, wanted in WANTED.items():
        seen = locks[NODES] if file == NODES else locks[NODES] + locks[DEV]
        for each in map(Requirement, wanted):
            for python in [*PYTHONS, "3.11"]:  # 3.11: the image's
                versions = version(seen, each.name, python)
                if len(versions) != 1 or versions[0] not in each.specifier:
                    found.append(
                        f"{each.name}: {versions or 'missing'} for Python {python}, allowed is {each.specifier}"
                    )
    return found


def test_they_fit_the_project() -> None:
    assert faults(NODES.read_text(), DEV.read_text()) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (r"^ray==\S+", "ray==2.59.0", r"ray: \['2.59.0'\] for Python 3.10, allowed is <2.61,>=2.60"),
        (r"^ray==", "rayon==", "ray: missing"),
        (r"^torch==", "torch>=", "torch: no version"),
        (r"(^tqdm==\S+ )(\\\n *--hash=\S+ ?)+", r"\1\n", "tqdm: no hash"),
        (r"^numpy==\S+ ; python_full_version < '3.11'", "numpy==2.2.6", "numpy: .* for Python 3.13"),
        (r"\A", "--find-links wheels\n", "a place to fetch from"),
        (r"\A", "# made with an index at https://example.org/simple\n", "a place to fetch from"),
    ],
)
def test_a_slip_is_caught(old: str, new: str, told: str) -> None:
    text, count = re.subn(old, new, NODES.read_text(), flags=re.MULTILINE)
    assert count == 1
    found = "\n".join(faults(text, DEV.read_text()))
    assert re.search(told, found), found


def test_a_package_has_one_place() -> None:
    again = re.findall(r"^tqdm==(?:.*\\\n)+.*\n", NODES.read_text(), re.MULTILINE)
    assert faults(NODES.read_text(), DEV.read_text() + again[0]) == ["tqdm: in both"]
