"""Real parts for the tests: an S3 server and a Ray cluster, started once and ended by pid.

`make test` runs two test files at a time, each in a process that imports this file: servers, data and Ray's temporary
folder are made once in each.
"""

import os
import shutil
import tempfile

# Before anything imports torch or ray: one thread a process, no metadata service, nothing of the developer's shell.
os.environ.update(
    OMP_NUM_THREADS="1",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",  # an actor less for each training; the test of a notice has it
    RAY_prestart_worker_first_driver="false",  # else each Ray starts processes before any is asked for
    AWS_EC2_METADATA_DISABLED="true",
    RAY_TMPDIR=tempfile.mkdtemp(prefix="u2pl-", dir="/tmp"),  # a running cluster of the developer is not found here
)
for name in ("AWS_PROFILE", "RAY_ADDRESS", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
    os.environ.pop(name, None)

from collections.abc import Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

from tests.heads import Head  # noqa: E402
from tests.s3 import S3Server  # noqa: E402

torch.set_num_threads(1)

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=150, metavar="N", help="damaged texts of each kind of file")
    parser.addoption("--soak", type=float, default=30, metavar="MINUTES", help="of the soak test")
    parser.addoption("--camvid", metavar="DIR", help="CamVid as a VOC tree, for -m camvid (docs/data.md says how)")


def pytest_unconfigure() -> None:
    """The end of each process, also of the one that only hands out the tests."""
    shutil.rmtree(os.environ["RAY_TMPDIR"], ignore_errors=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last lines of `make test`: how many tests were skipped; `-ra` has listed why."""
    skipped = len(terminalreporter.stats.get("skipped", []))
    reasons = "; the reasons stand above, in lines that begin with SKIPPED" if skipped else ""
    terminalreporter.write_line(f"skipped: {skipped or 'none'}{reasons}")


@pytest.fixture(scope="session")
def rounds(request: pytest.FixtureRequest) -> range:
    """One for each damaged text that a reader is given: seconds by default, more at night."""
    return range(int(request.config.getoption("--fuzz") or 0))


@pytest.fixture(scope="session")
def camvid(request: pytest.FixtureRequest) -> str:
    """The tree that --camvid names."""
    folder = request.config.getoption("--camvid")
    if not folder:
        pytest.fail("-m camvid needs --camvid DIR: CamVid as a VOC tree")
    return folder


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A SeaweedFS that lives for the whole session."""
    with S3Server(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Server]:
    """The server, with this process's environment pointing at it; no client keeps the keys of another test."""
    from pipeline import storage

    for key, value in s3_server.environment().items():
        monkeypatch.setenv(key, value)
    storage.reconnect()
    yield s3_server
    storage.reconnect()


@pytest.fixture
def bucket(s3: S3Server, tmp_path: Path) -> str:
    """A folder of its own on the server."""
    return f"{s3.bucket_uri}/{tmp_path.name}"


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of its own on a disk, and one on the server: for what holds on every storage."""
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("bucket")


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[None]:
    """A private Ray of this process with two CPUs."""
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=300_000_000, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def head(s3_server: S3Server) -> Iterator[Head]:
    """A Ray of its own with a job server, which jobs join that need no other: a start costs more than a short run."""
    with (
        tempfile.TemporaryDirectory(prefix="u2pl-", dir="/tmp", ignore_cleanup_errors=True) as folder,
        Head(folder, cpus=2, **s3_server.environment()) as it,
    ):
        yield it


@pytest.fixture
def joined(head: Head, s3: S3Server) -> dict[str, str]:
    """The environment of a job that joins it."""
    return {**head.environment, **s3.environment(), "RAY_ADDRESS": head.gcs}


@pytest.fixture
def ray_folder() -> Iterator[str]:
    """A folder of Ray's own, so that no other cluster of this machine is found; short, as it holds sockets."""
    with tempfile.TemporaryDirectory(prefix="u2pl-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo dataset, prepared once."""
    from pipeline.datasets.shapes import prepare_shapes

    root = str(tmp_path_factory.mktemp("data") / "shapes")
    prepare_shapes(root)
    return root


@pytest.fixture(scope="session")
def pseudo_labels(shapes: str) -> str:
    """Pseudo-labels of its split 1_4."""
    from tests.labels import write_truth

    return write_truth(shapes, "1_4", f"{shapes}-labels")
