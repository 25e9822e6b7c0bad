"""A trained method back from its checkpoint, and its score."""

from dataclasses import replace

import torch

from pipeline import checkpoint
from pipeline.config import Config, RunConfig
from pipeline.datasets.format import Dataset, open_dataset
from pipeline.errors import UserError
from pipeline.inference.evaluate import evaluate
from pipeline.inference.metrics import Scores
from pipeline.methods import METHODS, Method, Predictor, build_method
from pipeline.typed import build


def restore(uri: str, device: torch.device) -> tuple[Config, Method]:
    """Builds the method that a checkpoint holds, with its weights and all its state.

    Args:
        uri: a checkpoint folder, or a run directory, whose newest checkpoint is taken.
        device: where to put it.

    Raises:
        UserError: there is no checkpoint, it is damaged, or its networks are not those of this version.
    """
    place = checkpoint.find(uri)
    meta = checkpoint.read_meta(place)
    values = {**meta["config"], "methods": {k: v for k, v in meta["config"]["methods"].items() if k in METHODS}}
    config: Config = build(Config, values)
    bare = replace(config, model=replace(config.model, weights="none"))  # the checkpoint has them all
    method = build_method(bare, len(meta["data"]["classes"]))
    state = checkpoint.read_state(place)["method"]
    try:
        method.load_state_dict(state)
    except RuntimeError as error:  # torch lists every key; one line is enough
        raise UserError(f"{place}: made by another version, whose {config.method} has other networks") from error
    return config, method.to(device).eval()


def score(uri: str, data: str | None, device: torch.device) -> tuple[Dataset, dict[str, Scores]]:
    """Scores every network of a checkpoint as the training loop does.

    Args:
        uri: checkpoint folder or run directory.
        data: prepared dataset; None: the one of the run.
        device: where to compute.

    Returns:
        The dataset, and the scores by network; the first network is the method's result.

    Raises:
        UserError: checkpoint or dataset cannot be used, or they have different classes.
    """
    config, method = restore(uri, device)
    dataset = open_dataset(data or str(config.data.root))
    if len(dataset.info.classes) != method.num_classes:
        raise UserError(f"{dataset.root} has {len(dataset.info.classes)} classes, the checkpoint {method.num_classes}")
    scores = {}
    for name, network in method.networks().items():
        with autocast(device, config.run):
            scores[name] = evaluate(Predictor(network), dataset, config.eval, device).scores()
    return dataset, scores


def autocast(device: torch.device, config: RunConfig) -> torch.autocast:
    """The precision of a forward pass."""
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
