"""Services beside TensorBoard: Weights & Biases, and MLflow. Numbers and pictures go there from a thread of their own.

A service that fails never ends a training, and never holds it up: it costs one warning, and nothing more is sent to it.
"""

import importlib.util
import logging
import os
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from PIL import Image

from pipeline import checkpoint, storage
from pipeline.checkpoint import PICTURES
from pipeline.config.schema import Config, identity
from pipeline.errors import UserError

log = logging.getLogger(__name__)
PROJECT = "u2pl"
"""Where runs go unless the service's own variable says it: WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME."""
END_SECONDS = 60.0
"""For which the end of a run waits for what is not sent yet."""
_TAG = "u2pl.run"


class Service(ABC):
    """One run at a service; all its methods are called from one thread."""

    @abstractmethod
    def begin(self, config: Config, token: str) -> None:
        """Begins the run of this token, or goes on with it."""

    @abstractmethod
    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """Sends numbers by name."""

    @abstractmethod
    def show(self, step: int, page: Image.Image) -> None:
        """Sends the pictures of an evaluation."""

    @abstractmethod
    def end(self) -> None:
        """Closes the run."""


class Wandb(Service):
    """Weights & Biases; WANDB_MODE, WANDB_API_KEY and its other variables hold. Offline it writes to RUN/wandb."""

    def begin(self, config: Config, token: str) -> None:
        """The token is the run's id there."""
        import wandb

        out = str(config.out)
        self._run = wandb.init(
            id=token,
            resume="allow",
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=_name(out),
            config=identity(config),
            dir=storage.resolve(out)[1] if storage.is_local(out) else gettempdir(),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """`step` is a number like the others: a resumed run may repeat some, which the service's own count forbids."""
        self._run.log({"step": step, **scalars})

    def show(self, step: int, page: Image.Image) -> None:
        """One image, called `pictures`."""
        import wandb

        self._run.log({"step": step, "pictures": wandb.Image(page)})

    def end(self) -> None:
        """Waits until all is sent."""
        self._run.finish()


class Mlflow(Service):
    """MLflow at MLFLOW_TRACKING_URI."""

    def begin(self, config: Config, token: str) -> None:
        """The token is a tag, as the server chooses the id."""
        from mlflow import MlflowClient

        self._client = client = MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        known = client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else client.create_experiment(name)
        found = client.search_runs([experiment], f"tags.`{_TAG}` = '{token}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            return
        self._id = client.create_run(experiment, run_name=_name(str(config.out)), tags={_TAG: token}).info.run_id
        for key, value in _flat(identity(config)):
            client.log_param(self._id, key, value)

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        """All numbers of a step in one request."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(name, value, now, step) for name, value in scalars.items()])

    def show(self, step: int, page: Image.Image) -> None:
        """One artifact a step, called as in the run directory."""
        self._client.log_image(self._id, page, artifact_file=f"{PICTURES}/{checkpoint.name(step)}.png")

    def end(self) -> None:
        """Marks the run as finished; a resume opens it again."""
        self._client.set_terminated(self._id)


SERVICES: dict[str, type[Service]] = {"wandb": Wandb, "mlflow": Mlflow}
"""By name of the key of `run`, of the module, and of the package's extra."""


class Sender:
    """Hands numbers to a service without waiting for it."""

    def __init__(self, name: str, config: Config, token: str) -> None:
        """Begins at once.

        Args:
            name: a key of `SERVICES`.
            config: of the run.
            token: by which the service knows the run again.
        """
        self._name, self._calls = name, queue.SimpleQueue[Callable[[], None] | None]()
        self._given_up = False
        service = SERVICES[name]()
        self._service = service
        self._calls.put(lambda: service.begin(config, token))
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()

    def add(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of a record."""
        numbers = dict(scalars(kind, values))
        self._calls.put(lambda: self._service.add(step, numbers))

    def show(self, step: int, page: Image.Image) -> None:
        """The pictures of an evaluation; `page` must not change afterwards."""
        self._calls.put(lambda: self._service.show(step, page))

    def close(self) -> None:
        """Waits `END_SECONDS` for what is not sent yet."""
        self._calls.put(self._service.end)
        self._calls.put(None)
        self._thread.join(END_SECONDS)
        if self._thread.is_alive():
            self._given_up = True
            log.warning("run.%s: not all was sent within %g s; the run is whole without it", self._name, END_SECONDS)

    def _work(self) -> None:
        while call := self._calls.get():
            if self._given_up:
                continue  # what is still handed over must not pile up
            try:
                call()
            except Exception as error:  # whatever it is, it is no reason to end a training
                why = " ".join(str(error).split())[:200] or type(error).__name__
                if not self._given_up:
                    log.warning("run.%s: nothing more is sent, the training goes on: %s", self._name, why)
                self._given_up = True


def check_services(config: Config) -> None:
    """Refuses a service whose package is not installed.

    Raises:
        UserError: it is not; names the extra.
    """
    for name in chosen(config):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"run.{name}: not installed; pip install 'u2pl-ray[{name}]'")


def chosen(config: Config) -> list[str]:
    """The services that a config asks for."""
    return [name for name in SERVICES if getattr(config.run, name)]


def scalars(kind: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The single numbers of a record, named `kind/name` or `kind/name/label`; lists are left out."""
    for name, value in values.items():
        for label, number in value.items() if isinstance(value, dict) else [("", value)]:
            if isinstance(number, int | float):
                yield f"{kind}/{name}{label and '/' + label}", number


def _name(out: str) -> str:
    return Path(out).name


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Nested values by dotted key, as text."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", str(value)
