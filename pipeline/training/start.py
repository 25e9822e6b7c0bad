"""A run that begins with the network of another one, which `model.weights` names.

It is a start and no resume: optimiser, step and what the method keeps beside its networks begin anew. Once the run has
a checkpoint, nothing of this is read again.
"""

from collections.abc import Sequence

import torch

from pipeline import storage
from pipeline.config.backbones import BUILT_IN
from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.inference.load import describe, find_network, is_described, is_export, load_model
from pipeline.methods import Method, Predictor
from pipeline.models.transfer import HEADS, has_head, take_over

ARCHITECTURE = ("backbone", "decoder", "output_stride", "width")
"""Keys of `model` in which the two networks must agree."""


def find_start(weights: str) -> str | None:
    """The place of the trained network that `model.weights` names; None if that is built in, or a file of an encoder.

    Raises:
        UserError: there is nothing of that name.
    """
    if weights in BUILT_IN or (storage.exists(weights) and not (is_export(weights) and is_described(weights))):
        return None
    if not is_export(weights) and not storage.list_files(weights):
        raise UserError(f"model.weights {weights}: no such file or run; name one, or torchvision, or none")
    return find_network(weights)


def check_start(place: str, model: ModelConfig) -> None:
    """Refuses a trained network that this run's could not begin with; its weights are not read.

    Args:
        place: from `find_start`.
        model: of this run.

    Raises:
        UserError: it is of another architecture, or cannot be read.
    """
    _check_same(place, describe(place).config.model, model, ARCHITECTURE)


def begin_with(method: Method, model: ModelConfig, place: str, classes: Sequence[str]) -> str:
    """Fills the networks of a method with the trained network at `place`.

    Encoder and decoder are taken over, and of the last layers the rows of the classes that have the same name; other
    rows, and heads that the trained network lacks, stay as they were drawn. Where a method trains several networks,
    which must not begin as equals, the others take the encoder alone.

    Args:
        method: newly built.
        model: of this run.
        place: from `find_start`.
        classes: names by class id, of this run.

    Returns:
        One line: what was taken.

    Raises:
        UserError: it is of another architecture, damaged, or holds values that are not finite.
    """
    found = load_model(place)
    assert isinstance(found.network, Predictor)
    source, (first, *others) = found.network.model, method.trained()
    _check_same(place, found.config.model, model, ARCHITECTURE)
    if has_head(source, "representation") and has_head(first, "representation"):
        _check_same(place, found.config.model, model, ("feature_dim",))
    for key, value in source.state_dict().items():
        if not torch.isfinite(value).all():
            raise UserError(f"{place}: {key} holds values that are not finite; take other weights")
    rows = [found.classes.index(name) if name in found.classes else None for name in classes]
    for network in method.networks().values():
        take_over(network, source, rows, encoder_only=any(network is other for other in others))
    anew = [name for name, row in zip(classes, rows, strict=True) if row is None]
    anew += [f"the {name} head" for name in HEADS if has_head(first, name) and not has_head(source, name)]
    taken = [name for name in classes if name in found.classes]
    shown = f"all {len(classes)} classes" if len(taken) == len(classes) else ", ".join(taken) or "no class"
    rest = f"; drawn anew: {', '.join(anew)}" if anew else ""
    return f"beginning with the network of {place}: {shown} taken{rest}"


def _check_same(place: str, theirs: ModelConfig, ours: ModelConfig, keys: Sequence[str]) -> None:
    for key in keys:
        before, now = getattr(theirs, key), getattr(ours, key)
        if before != now:
            raise UserError(
                f"model.weights {place}: its network has model.{key} {before}, this run {now}; "
                f"pass --model.{key} {before}, or other weights"
            )
