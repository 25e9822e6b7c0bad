"""The files that GitHub, pre-commit and citation tools read: sound by their schemas, and true of this project."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import pipeline

ROOT = Path(__file__).parents[2]
WORKFLOWS = ("ci.yml", "nightly.yml")
PYTHONS = ["3.10", "3.13"]
RUNTIME = ("ray", "torch", "torchvision")
"""What the nightly run replaces by the newest releases."""
toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")  # pytest brings the latter
PROJECT = toml.loads((ROOT / "pyproject.toml").read_text())["project"]


def _text(name: str) -> str:
    return (ROOT / name).read_text()


def _workflow(name: str) -> str:
    return _text(f".github/workflows/{name}")


def _by_schema(schema: str, text: str, folder: Path) -> str:
    """What a schema that check-jsonschema holds finds wrong; it fetches nothing."""
    file = folder / "file.yml"
    file.write_text(text)
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, str(file)]
    return subprocess.run(command, capture_output=True, text=True).stdout.replace("ok -- validation done\n", "")


def _requirement(text: str) -> str:
    """`ray[data]` of `ray[data]>=2.60,<2.61`."""
    return re.split(r"[<>=!~; ]", text, maxsplit=1)[0]


# ---- workflows --------------------------------------------------------------------------------------------------


def _commands(job: dict[str, Any]) -> Iterator[list[str]]:
    """The commands of a job, without what only changes who runs them and with which environment."""
    for script in (step["run"] for step in job["steps"] if "run" in step):
        for line in script.splitlines():
            words = shlex.split(line, comments=True)
            while words and (words[0] in ("sudo", "env") or re.match(r"[A-Z_]+=", words[0])):
                words.pop(0)
            if words:
                yield words


def _command_faults(words: list[str]) -> Iterator[str]:
    """Why a command cannot work in this project."""
    program, *rest = words
    if program == "make":
        targets = re.findall(r"^([\w-]+):(?!=)", _text("Makefile"), re.MULTILINE)
        yield from (f"make {word}: no such target" for word in rest if "=" not in word and word not in targets)
    ours = program.startswith(".") and not program.startswith(".venv/")
    if ours and not os.access(ROOT / program, os.X_OK):
        yield f"{program}: not there, or not executable"
    for ignored in (word.partition("=")[2] for word in rest if word.startswith("--ignore=")):
        if not (ROOT / ignored).exists():
            yield f"{ignored}: not there"
    if "camvid" in " ".join(words):
        yield "camvid: its images are not there"


def _faults(text: str) -> list[str]:
    """What a schema does not see in a workflow."""
    workflow = yaml.safe_load(text)
    found = [] if workflow.get("permissions") == {"contents": "read"} else ["permissions: more than reading"]
    found += [] if "concurrency" in workflow else ["concurrency: missing"]
    for job in workflow["jobs"].values():
        found += [] if "timeout-minutes" in job else ["timeout-minutes: missing"]
        found += [] if "permissions" not in job else ["permissions: a job's own"]
        found += ["continue-on-error: hides a failure"] * ("continue-on-error" in str(job))
        for step in job["steps"]:
            uses, options = step.get("uses"), step.get("with", {})
            if uses and not re.fullmatch(r"actions/[\w-]+@v\d+", uses):
                found.append(f"uses: {uses} is not a major version of GitHub's own")
            if uses and "checkout" in uses and options.get("persist-credentials") is not False:
                found.append("persist-credentials: the token stays on the disk")
            python = str(options.get("python-version", PYTHONS[0]))
            if python not in (*PYTHONS, "${{ matrix.python }}"):
                found.append(f"python-version: {python}")
        for words in _commands(job):
            found += _command_faults(words)
    return found


def _run(text: str) -> list[list[str]]:
    return [words for job in yaml.safe_load(text)["jobs"].values() for words in _commands(job)]


def _triggers(text: str) -> dict[str, Any]:
    return yaml.safe_load(text)[True]  # `on` is a truth value to YAML 1.1


def _ci_faults(text: str) -> list[str]:
    (job,) = yaml.safe_load(text)["jobs"].values()
    told = {
        "on": _triggers(text) == {"pull_request": None, "push": {"branches": ["main"]}},
        "matrix": job["strategy"]["matrix"]["python"] == PYTHONS,
        "fail-fast": job["strategy"]["fail-fast"] is False,
        "timeout-minutes": job["timeout-minutes"] == 90,
        ".ci/run": [".ci/run"] in _run(text),
    }
    return [name for name, kept in told.items() if not kept]


def _nightly_faults(text: str) -> list[str]:
    run = _run(text)
    upgrades = [words for words in run if "--upgrade" in words]
    allowed = {_requirement(each) for each in PROJECT["dependencies"] if each.startswith(RUNTIME)}
    told = {
        "on": set(_triggers(text)) == {"schedule", "workflow_dispatch"},
        "test-cluster": ["make", "test-cluster"] in run,
        "as root": 'sudo env "PATH=$PATH" make test-cluster' in text,
        "packages": any({"iproute2", "openssh-server", "rsync"} <= set(words) for words in run),
        "newest": [set(words[words.index("--upgrade") + 1 :]) for words in upgrades] == [allowed],
        "pytest": any(words[1:3] == ["-m", "pytest"] for words in run),
    }
    return [name for name, kept in told.items() if not kept]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_a_workflow_is_sound(name: str, tmp_path: Path) -> None:
    assert _by_schema("vendor.github-workflows", _workflow(name), tmp_path) == ""
    assert _faults(_workflow(name)) == []


def test_no_other_workflow_goes_unchecked() -> None:
    assert sorted(file.name for file in (ROOT / ".github" / "workflows").iterdir()) == sorted(WORKFLOWS)


def test_what_the_workflows_promise() -> None:
    assert _ci_faults(_workflow("ci.yml")) == []
    assert _nightly_faults(_workflow("nightly.yml")) == []
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_a_slip_in_a_workflow_is_caught_by_the_schema(tmp_path: Path) -> None:
    spoiled = _workflow("ci.yml").replace("runs-on:", "run-on:")
    assert "run-on" in _by_schema("vendor.github-workflows", spoiled, tmp_path)


@pytest.mark.parametrize(
    ("name", "old", "new", "told"),
    [
        ("ci.yml", "contents: read", "contents: write", "permissions: more"),
        ("ci.yml", "runs-on:", "permissions: write-all\n    runs-on:", "permissions: a job's"),
        ("ci.yml", "concurrency:", "concurrent:", "concurrency"),
        ("ci.yml", "timeout-minutes:", "timeout:", "timeout-minutes"),
        ("ci.yml", "checkout@v6", "checkout@main", "uses"),
        ("ci.yml", "actions/setup", "someone/setup", "uses"),
        ("ci.yml", "persist-credentials: false", "persist-credentials: true", "persist-credentials"),
        ("ci.yml", ".ci/run", ".ci/ran", ".ci/ran: not there"),
        ("ci.yml", ".ci/run", "./README.md", "./README.md: not there, or not executable"),
        ("nightly.yml", "timeout-minutes", "continue-on-error: true\n    timeout-minutes", "continue-on-error"),
        ("nightly.yml", 'python-version: "3.13"', 'python-version: "3.9"', "python-version: 3.9"),
        ("nightly.yml", "make install", "make instal", "make instal: no such"),
        ("nightly.yml", "make test-cluster", "make test-clusters", "make test-clusters: no such"),
        ("nightly.yml", "test_dockerfile.py", "test_docker.py", "test_docker.py: not there"),
        ("nightly.yml", "-m pytest", "-m pytest -m camvid", "camvid"),
    ],
)
def test_a_slip_in_a_workflow_is_caught(name: str, old: str, new: str, told: str) -> None:
    text = _workflow(name)
    assert old in text
    assert told in "\n".join(_faults(text.replace(old, new)))


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  pull_request:", "  pull_request_target:", "on"),
        ("[main]", "[master]", "on"),
        ('"3.10", ', "", "matrix"),
        ("fail-fast: false", "fail-fast: true", "fail-fast"),
        ("timeout-minutes: 90", "timeout-minutes: 9", "timeout-minutes"),
        (".ci/run", "make test", ".ci/run"),
    ],
)
def test_a_broken_promise_of_ci_is_caught(old: str, new: str, told: str) -> None:
    text = _workflow("ci.yml")
    assert old in text
    assert _ci_faults(text.replace(old, new)) == [told]


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("  workflow_dispatch:", "  pull_request:", "on"),
        ('sudo env "PATH=$PATH" make test-cluster', "make test-cluster", "as root"),
        (" rsync", "", "packages"),
        ("torch torchvision", "torch", "newest"),
        ("ray[default,train,data,tune]", "ray[default]", "newest"),
        ("-m pytest", "-m unittest", "pytest"),
    ],
)
def test_a_broken_promise_of_the_nightly_run_is_caught(old: str, new: str, told: str) -> None:
    text = _workflow("nightly.yml")
    assert old in text
    assert _nightly_faults(text.replace(old, new)) == [told]


# ---- citation ---------------------------------------------------------------------------------------------------


def _citation_faults(text: str) -> list[str]:
    cited = yaml.safe_load(text)
    (paper,) = cited["references"]
    told = {
        "version": cited["version"] == pipeline.__version__ == PROJECT["version"],
        "license": cited["license"] == PROJECT["license"],
        "title": _text("README.md").startswith(f"# {cited['title']}\n"),
        "paper": paper["url"] in _text("README.md"),
    }
    return [name for name, kept in told.items() if not kept]


def test_the_citation_is_sound(tmp_path: Path) -> None:
    assert _by_schema("vendor.citation-file-format", _text("CITATION.cff"), tmp_path) == ""
    assert _citation_faults(_text("CITATION.cff")) == []


def test_a_slip_in_the_citation_is_caught_by_the_schema(tmp_path: Path) -> None:
    spoiled = _text("CITATION.cff").replace("\nauthors:", "\nauthor:")
    assert "author" in _by_schema("vendor.citation-file-format", spoiled, tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("version: 0.1.0", "version: 0.1.1", "version"),
        ("Apache-2.0", "MIT", "license"),
        ("title: U2PL on Ray", "title: U2PL", "title"),
        ("2203.03884", "2203.03885", "paper"),
    ],
)
def test_a_slip_in_the_citation_is_caught(old: str, new: str, told: str) -> None:
    text = _text("CITATION.cff")
    assert old in text
    assert _citation_faults(text.replace(old, new)) == [told]


# ---- pre-commit -------------------------------------------------------------------------------------------------


def _hook_faults(text: str) -> list[str]:
    """What would make a hook another check than `make lint`, or a second place of versions."""
    programs = {_requirement(each) for each in PROJECT["optional-dependencies"]["dev"]}
    lint = _text("Makefile").partition("\nlint:")[2].partition("\n\n")[0].replace("$(BIN)", ".venv/bin")
    found, seen = [], []
    for repo in yaml.safe_load(text)["repos"]:
        if repo["repo"] != "local" or "rev" in repo:
            found.append(f"{repo['repo']}: has versions of its own")
        for hook in repo["hooks"]:
            program, *rest = hook["entry"].split()
            command = " ".join([program, *(word for word in rest if not word.startswith("--"))])
            seen.append(command)
            if hook["language"] != "system" or program.removeprefix(".venv/bin/") not in programs:
                found.append(f"{hook['id']}: {program} is no program of the dev extra")
            if hook["id"] != hook["name"].replace(" ", "-") or hook["name"] != command.removeprefix(".venv/bin/"):
                found.append(f"{hook['id']}: runs {command}")
            if command not in lint:
                found.append(f"{command}: not part of make lint")
    return found + [
        f"{line.strip()}: no hook" for line in lint.splitlines()[1:] if not line.strip().startswith(tuple(seen))
    ]


def test_the_hooks_are_sound() -> None:
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(ROOT / ".pre-commit-config.yaml")]
    assert subprocess.run(command, capture_output=True, text=True).stdout == ""
    assert _hook_faults(_text(".pre-commit-config.yaml")) == []


def test_a_slip_in_the_hooks_is_caught_by_pre_commit(tmp_path: Path) -> None:
    (tmp_path / "hooks.yaml").write_text(_text(".pre-commit-config.yaml").replace("language:", "languages:"))
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(tmp_path / "hooks.yaml")]
    assert "Missing required key: language" in subprocess.run(command, capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("repo: local", "repo: https://github.com/astral-sh/ruff-pre-commit\n    rev: v0.17.6", "versions of its own"),
        ("language: system", "language: python", "no program of the dev extra"),
        (".venv/bin/pyright", ".venv/bin/mypy", "no program of the dev extra"),
        (".venv/bin/ruff", "ruff-of-the-shell", "no program of the dev extra"),
        ("id: pyright", "id: ruff-format", "ruff-format: runs .venv/bin/pyright"),
        ("ruff format --force-exclude", "ruff clean", "ruff clean: not part of make lint"),
        ("ruff format --force-exclude", "ruff check", "ruff format --check .: no hook"),
    ],
)
def test_a_slip_in_the_hooks_is_caught(old: str, new: str, told: str) -> None:
    text = _text(".pre-commit-config.yaml")
    assert old in text
    assert told in "\n".join(_hook_faults(text.replace(old, new)))
