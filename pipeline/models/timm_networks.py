"""timm's convolutional networks, hierarchies and plain transformers as encoders, with its names: `timm/NAME`.

timm is an optional package; it is imported when one of its networks, or its weights, are asked for.
"""

from collections.abc import Mapping
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from pipeline.config.backbones import TIMM, find_decoder
from pipeline.config.parse import suggest
from pipeline.config.schema import ModelConfig
from pipeline.errors import UserError
from pipeline.models.parts import Encoder, FeatureMaps, Levels, at_multiple
from pipeline.models.weights import load_weights


class TimmEncoder(Encoder):
    """Four levels of a network of timm's: low, between, mid and high.

    Args:
        network: has `forward_intermediates`; what lies behind the last level is cut off.
        levels: which of its `feature_info`.
        plain: whether it is a plain transformer: of one stride, to whose multiples images are resized, and with a
            last norm that all levels pass through.
    """

    has_blocks = False  # timm's own way of recomputing moves the statistics of batch norm twice

    def __init__(self, network: Any, levels: list[int], *, plain: bool) -> None:
        super().__init__()
        known = [network.feature_info[level] for level in levels]
        self.channels = _levels([level["num_chs"] for level in known])
        self.strides = _levels([level["reduction"] for level in known])
        own = [name for name, _ in network.named_parameters(recurse=False)]  # of class, position and registers
        self.embeddings = tuple(f"network.{name}" for name in own)
        network.prune_intermediate_layers(levels, prune_norm=not plain, prune_head=True)
        _separate_norms(network)
        self.network, self.taken, self.plain = network, levels, plain

    def forward(self, x: Tensor) -> FeatureMaps:
        """The four maps."""
        if self.plain:
            x = at_multiple(x, self.strides.low)
        low, between, mid, high = self.network.forward_intermediates(
            x, indices=self.taken, norm=self.plain, intermediates_only=True
        )
        return FeatureMaps(low, mid, high, between)

    def layers(self) -> list[list[nn.Parameter]]:
        """By the network's own parts, embeddings and stem first; of parts that are lists of stages, each for itself."""
        parts: list[nn.Module] = []
        for child in self.network.children():
            parts += child if isinstance(child, nn.Sequential | nn.ModuleList) else [child]
        own = list(self.network.parameters(recurse=False))
        return [found for found in [own, *(list(part.parameters()) for part in parts)] if found]


def build(config: ModelConfig) -> TimmEncoder:
    """The encoder that `config` names, with its weights; with deeplab dilated to the output stride.

    Raises:
        UserError: timm is not there, has no such network, or one that does not fit; or the weights do not.
    """
    timm, name = _timm(), config.backbone.removeprefix(TIMM)
    if name.partition(".")[0] not in timm.list_models():
        raise UserError(f"model.backbone: timm has no {name}{suggest(name, timm.list_models())}")
    decoder = find_decoder(config.decoder, config.backbone)
    options = {"deeplab": {"output_stride": config.output_stride}, "dpt": {"dynamic_img_size": True}}
    try:
        network = timm.create_model(name, **options.get(decoder, {}))
        levels = _chosen(network, decoder)
    except (TypeError, AssertionError, NotImplementedError, LookupError) as error:  # timm's, each of other networks
        raise UserError(f"model.backbone {config.backbone}: {MISFITS[decoder]}") from error
    unused = tuple(f"{each}." for each in _names(network.default_cfg.get("classifier")))
    digest = load_weights(network, name, config.weights, unused, {"timm": download})
    encoder = TimmEncoder(network, levels, plain=decoder == "dpt")
    encoder.weights_digest = digest
    return encoder


MISFITS = {
    "deeplab": "cannot be dilated to model.output_stride; pass --model.decoder segformer, or dpt for a plain ViT",
    "segformer": "has no four levels of falling resolution for images of any size; take another one",
    "tiny": "has no four levels of falling resolution for images of any size; take another one",
    "dpt": "is no plain transformer for images of any size; pass --model.decoder auto",
}
"""What is said where a network does not fit a decoder."""


def _chosen(network: Any, decoder: str) -> list[int]:
    """Which of a network's levels to take: of a plain transformer each quarter's last block, else the last four.

    Raises:
        LookupError: they are not what the decoder takes.
    """
    strides = [level["reduction"] for level in getattr(network, "feature_info", ())]
    fixed = network.default_cfg.get("fixed_input_size") and decoder != "dpt"
    fits = len(set(strides)) == 1 if decoder == "dpt" else len(set(strides[-4:])) >= (2 if decoder == "deeplab" else 4)
    if fixed or not fits or not hasattr(network, "forward_intermediates"):
        raise LookupError(decoder)
    count = len(strides)
    return [(part + 1) * count // 4 - 1 for part in range(4)] if decoder == "dpt" else [*range(count - 4, count)]


def download(name: str) -> Mapping[str, Tensor]:
    """The state dict of a pretrained network of timm's.

    Raises:
        UserError: timm is not there, has no weights of that name, or cannot fetch them.
    """
    timm = _timm()
    try:
        return timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # of whatever program fetches it
        why = " ".join(str(error).split())[:200]
        raise UserError(
            f"model.weights timm: cannot fetch {name} ({why}); fetch its file elsewhere and pass that as model.weights"
        ) from error


def _separate_norms(module: nn.Module) -> None:
    """Makes two layers of each batch norm that is an activation, too: whoever replaces batch norms knows plain ones."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d) and type(child) is not nn.BatchNorm2d:
            norm = nn.BatchNorm2d(child.num_features, child.eps, child.momentum)
            norm.load_state_dict(child.state_dict(), strict=False)  # an activation may have parameters of its own
            setattr(module, name, nn.Sequential(norm, child.get_submodule("drop"), child.get_submodule("act")))
        else:
            _separate_norms(child)


def _timm() -> ModuleType:
    try:
        import timm
    except ImportError as error:
        raise UserError("timm is not installed; pip install 'u2pl-ray[timm]'") from error
    return timm


def _names(classifier: Any) -> list[str]:
    """The classifiers of a network: timm names one, several, or none."""
    return [classifier] if isinstance(classifier, str) else list(classifier or ())


def _levels(numbers: list[int]) -> Levels:
    low, between, mid, high = numbers
    return Levels(low, mid, high, between)
