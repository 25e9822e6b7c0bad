"""Weights of an encoder: downloaded by torchvision or timm, or from a file or URI of its state dict."""

import hashlib
import io
import logging
import pickle
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import storage
from pipeline.config.backbones import BUILT_IN
from pipeline.errors import UserError

log = logging.getLogger(__name__)

Download = Callable[[str], Mapping[str, Any]]
"""Takes the name of an encoder and returns its state dict."""
SAFETENSORS = ".safetensors"
"""What the name of a file in that format ends with; all others are torch's."""
_NAMED_HASH = re.compile(r"-([0-9a-f]{8,64})\.pth$")
"""torchvision writes the first digits of a file's SHA-256 into its name."""


def load_weights(
    network: nn.Module, name: str, source: str, unused: tuple[str, ...], downloads: Mapping[str, Download]
) -> str:
    """Fills `network` with the weights of `source`, in place.

    Args:
        network: has the parameter names of the place where its weights are published. `fitted`, if it has it, makes
            what it can take of a state dict, such as position embeddings of its own size.
        name: of the encoder, e.g. "resnet50".
        source: "none" (it stays as initialised), a key of `downloads`, or a path or URI of a state dict.
        unused: prefixes of parameters that `source` need not hold and whose content does not matter.
        downloads: by a word of `BUILT_IN` what fetches the state dict of the encoder of a name.

    Returns:
        The digest of what was taken; empty with "none".

    Raises:
        UserError: the source cannot be read, or a parameter is missing, unexpected, of another
            shape, or not finite.
    """
    if source == "none":
        return ""
    if source in BUILT_IN and source not in downloads:
        known = ", ".join([*downloads, "none"])
        raise UserError(f"model.weights {source}: has none of {name}; choose from {known}, or pass a file")
    state = downloads[source](name) if source in downloads else read_state(source)
    state = {key: tensor for key, tensor in state.items() if not key.startswith(unused)}
    state = getattr(network, "fitted", dict)(state)
    _check(state, {key: t for key, t in network.state_dict().items() if not key.startswith(unused)}, source, name)
    network.load_state_dict(state, strict=False)  # what may be missing was decided above
    log.info("encoder %s: %d tensors from %s", name, len(state), source)
    return digest(state)


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names and values of a state dict, the first 16 digits: the same for each format of file."""
    found = hashlib.sha256()
    for key in sorted(state):
        found.update(f"{key}{list(state[key].shape)}".encode())
        found.update(state[key].float().contiguous().numpy().tobytes())
    return found.hexdigest()[:16]


def read_state(uri: str) -> dict[str, Tensor]:
    """The state dict in the file at `uri`; no code in it is executed.

    Raises:
        UserError: the file is not there, is damaged, or holds no state dict.
    """
    data = storage.read_bytes(uri)
    if uri.endswith(SAFETENSORS):
        return _read_safetensors(uri, data)
    named = _NAMED_HASH.search(uri)
    if named and not hashlib.sha256(data).hexdigest().startswith(named[1]):
        raise UserError(f"{uri}: damaged (its SHA-256 does not start with {named[1]}); fetch the file again")
    try:
        state: Any = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{uri}: not a file of weights that torch.load(weights_only=True) reads") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{uri}: holds no plain state dict (names and tensors); save model.state_dict()")
    return dict(state)


def _read_safetensors(uri: str, data: bytes) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"{uri}: damaged, or no safetensors; fetch the file again") from error


def download(name: str) -> Mapping[str, Any]:
    """Fetches torchvision's first ImageNet weights: those that published segmentation results start from."""
    import torchvision

    weights = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights torchvision: cannot download {weights.url} ({error}); "
            "fetch that file elsewhere and pass its path as model.weights"
        ) from error


def _check(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str, name: str) -> None:
    """Raises a UserError with the first key of `state` that does not fit `wanted`."""
    for key, tensor in wanted.items():
        if key.endswith("num_batches_tracked"):
            continue  # files from before 2018 lack it, and no statistics with a momentum need it
        if key not in state:
            raise UserError(f"{source}: {key} is missing; is this a state dict of {name}?")
        if state[key].shape != tensor.shape:
            shapes = f"{list(state[key].shape)}, expected {list(tensor.shape)}"
            raise UserError(f"{source}: {key} has shape {shapes}; is this a state dict of {name}?")
        if not state[key].isfinite().all():
            raise UserError(f"{source}: {key} holds values that are not finite; take other weights")
    for key in state:
        if key not in wanted:
            raise UserError(f"{source}: {key} is unexpected; is this a state dict of {name}?")
