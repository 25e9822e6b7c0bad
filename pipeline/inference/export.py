"""A trained network on its own: as weights, or as a program that needs nothing of this package.

    OUT/model.pt2           torch.export: `torch.export.load("model.pt2").module()(images)`, with torch alone
    OUT/model.onnx          ONNX, of any number of images of any size
    OUT/model.safetensors   the weights, with what `load_model` needs to build the network again
    OUT/classes.json        names and colours by class id
    OUT/README.md           the model's card: data, scores, how it was trained

A program takes uint8 images [B,3,H,W], RGB, at their own size, and gives float32 logits [B,C,H,W] at that size, or
class ids uint8 [B,H,W]: resizing and normalising are in it, but for ONNX, which gets images as large as the network
shall see them.
"""

import json
import math
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import checkpoint, storage
from pipeline.checkpoint import Meta
from pipeline.config.backbones import find_decoder
from pipeline.config.schema import Config, ModelConfig
from pipeline.errors import RunError, UserError
from pipeline.inference.load import WEIGHTS_FILE, restore
from pipeline.inference.logits import whole
from pipeline.models import SegmentationModel

FORMATS = {"torch_export": "model.pt2", "onnx": "model.onnx", "safetensors": WEIGHTS_FILE}
"""The file of each format."""
SMALLEST, LARGEST = 64, 8192
"""Sides of the images that a program takes, in pixels as the network sees them."""
CHECKED = ((1, 64, 64), (2, 97, 131), (1, 200, 121))
"""Batch, height and width that a program is compared with PyTorch at; the sides are divided by the run's scale."""
TOLERANCE = 1e-3
"""Largest difference of logits that is taken for rounding: another program adds up in another order."""


class Program(nn.Module):
    """A network with what belongs around it."""

    def __init__(self, network: nn.Module, scale: float, *, classes: bool) -> None:
        """Args: network: uint8 [B,3,H,W] -> logits; scale: resize before it; classes: give ids instead of logits."""
        super().__init__()
        self.network, self.scale, self.classes = network, scale, classes

    def forward(self, image: Tensor) -> Tensor:
        """uint8 [B,3,H,W] to float32 [B,C,H,W], or uint8 [B,H,W]."""
        logits = whole(self.network, image, self.scale)
        return logits.argmax(1).to(torch.uint8) if self.classes else logits


def export(run: str, out: str, form: str, *, classes: bool = False, half: bool = False) -> str:
    """Writes the network that a run has trained, after a comparison with PyTorch.

    Args:
        run: run directory (its newest checkpoint is taken) or checkpoint folder.
        out: folder to write into; files of an earlier export of the same format are replaced.
        form: a key of `FORMATS`.
        classes: the program gives class ids instead of logits; not for safetensors.
        half: weights in bfloat16, which halves the file; not for ONNX, whose programs know it too rarely.

    Returns:
        One line: the file, and what the comparison gave.

    Raises:
        UserError: there is no checkpoint, or an option does not fit the format.
        RunError: what was written gives other results.
    """
    if form == "safetensors" and classes:
        raise UserError("--classes: safetensors holds weights and no program; leave it out")
    if form == "onnx" and half:
        raise UserError("--half: programs that run ONNX know bfloat16 too rarely; leave it out")
    found = checkpoint.find(run)
    config, method = restore(found, torch.device("cpu"))
    meta = checkpoint.read_meta(found)
    network = method.predictor().eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / FORMATS[form]
        if form == "safetensors":
            said = _write_weights(network, meta, file, half=half)
        else:
            program = Program(network.bfloat16() if half else network, _scale(config, form), classes=classes).eval()
            said = _compared(program, _WRITERS[form](program, file))
        place = storage.join(out, file.name)
        storage.write_bytes(place, file.read_bytes())
    about = {"classes": meta.data["classes"], "palette": meta.about.get("palette")}
    storage.write_bytes(storage.join(out, "classes.json"), json.dumps(about, indent=1).encode())
    storage.write_bytes(storage.join(out, "README.md"), _card(config, meta, form, classes=classes, half=half).encode())
    return f"{place}: {said}"


def _scale(config: Config, form: str) -> float:
    """The resizing that is part of a program: ONNX has another one than torch, and leaves it to its user."""
    return 1.0 if form == "onnx" else config.eval.scale


# ---- formats ----------------------------------------------------------------------------------------------------


def _write_torch(program: Program, file: Path) -> Callable[[Tensor], Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about weights that are parts of others; they are whole
        exported = torch.export.export(program, (_image(CHECKED[1], program),), dynamic_shapes=_shapes(program))
        torch.export.save(exported, file)
        return torch.export.load(file).module()


def _write_onnx(program: Program, file: Path) -> Callable[[Tensor], Tensor]:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("--format onnx: not installed; pip install 'u2pl-ray[onnx]'") from error
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            program, (_image(CHECKED[1], program),), file, dynamo=True, external_data=False,
            dynamic_shapes=_shapes(program), input_names=["image"],
            output_names=["classes" if program.classes else "logits"],
        )  # fmt: skip
    session = onnxruntime.InferenceSession(file)
    return lambda image: torch.from_numpy(session.run(None, {"image": image.numpy()})[0])


_WRITERS = {"torch_export": _write_torch, "onnx": _write_onnx}


def _write_weights(network: nn.Module, meta: Meta, file: Path, *, half: bool) -> str:
    from safetensors.torch import load_file, save_file

    state = {
        name: value.to(torch.bfloat16) if half and value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }
    known = {"config": meta.config, "classes": meta.data["classes"], "about": meta.about}
    save_file({name: value.contiguous() for name, value in state.items()}, file, {"u2pl": json.dumps(known)})
    read = load_file(file)
    if read.keys() != state.keys() or not all(torch.equal(read[name], state[name]) for name in state):
        raise RunError(f"{file.name}: other weights are read than were written")
    return f"{len(state)} tensors read back, all equal"


def _shapes(program: Program) -> dict[str, dict[int, Any]]:
    least, most = (math.ceil(side / program.scale) for side in (SMALLEST, LARGEST))
    sides = {axis: torch.export.Dim(name, min=least, max=most) for axis, name in ((2, "height"), (3, "width"))}
    return {"image": {0: torch.export.Dim("batch", min=1, max=1024), **sides}}


def _image(size: tuple[int, int, int], program: Program) -> Tensor:
    batch, *sides = size
    bands = next(len(each.mean) for each in program.network.modules() if isinstance(each, SegmentationModel))
    generator = torch.Generator().manual_seed(sum(size))
    shape = (batch, bands, *(math.ceil(side / program.scale) for side in sides))
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


@torch.no_grad()
def _compared(program: Program, exported: Callable[[Tensor], Tensor]) -> str:
    """Compares the file with PyTorch.

    Raises:
        RunError: logits differ by more than rounding, or classes where it is no close call.
    """
    worst = 0.0
    bare = Program(program.network, program.scale, classes=False).eval()
    for size in CHECKED:
        image = _image(size, program)
        logits, found = bare(image), exported(image)
        top = logits.topk(2, dim=1).values
        sure = top[:, 0] - top[:, 1] > 2 * TOLERANCE
        ids = found if program.classes else found.argmax(1)
        if not program.classes:
            worst = max(worst, float((found - logits).abs().max()))
        if worst > TOLERANCE or bool((ids != logits.argmax(1))[sure].any()):
            raise RunError(f"the exported program gives other results than PyTorch on images of {size[1:]}")
    sizes = ", ".join(f"{batch} of {height}x{width}" for batch, height, width in CHECKED)
    logits_say = "" if program.classes else f", logits within {worst:.1g}"
    return f"the classes of PyTorch on images ({sizes}){logits_say}"


# ---- the card ---------------------------------------------------------------------------------------------------


def _source(weights: str) -> str:
    """Where the weights came from, without the folders above: a file, or `RUN/step_0000900`."""
    *_, folder, name = ["", *weights.split("/")]
    return f"{folder}/{name}" if checkpoint.is_name(name) or name == WEIGHTS_FILE else name


def _network(model: ModelConfig) -> str:
    """Encoder and decoder, and of the one that can be dilated the output stride."""
    decoder = find_decoder(model.decoder, model.backbone)
    return f"{model.backbone} with {decoder}" + (f" at stride {model.output_stride}" if decoder == "deeplab" else "")


def _kind(config: Config, about: Mapping[str, Any]) -> str:
    """Shape and bands of the images that a program takes."""
    if "bands" not in about:
        return "[B,3,H,W], RGB"
    pairs = zip(about["bands"], about["ranges"], strict=True)
    bands = ", ".join(f"{band} ({low:g}..{high:g})" for band, (low, high) in pairs)
    return f"[B,{len(config.data.mean)},H,W], bands {bands} as 0..255"


def _card(config: Config, meta: Meta, form: str, *, classes: bool, half: bool) -> str:
    """The model's card, in Markdown."""
    about, last = meta.about, meta.last
    score = f"{100 * last.value:.2f} % after step {last.step}" if last else "not evaluated"
    takes = "weights for `pipeline.load_model`" if form == "safetensors" else (
        f"takes uint8 images {_kind(config, about)}, of any size from "
        f"{math.ceil(SMALLEST / _scale(config, form))} pixels"
        + (f", resized by {config.eval.scale:g}; gives " if _scale(config, form) != config.eval.scale else "; gives ")
        + ("class ids, uint8 [B,H,W]" if classes else "logits, float32 [B,C,H,W]")
    )  # fmt: skip
    rows = [
        ("file", f"`{FORMATS[form]}`, {'bfloat16' if half else 'float32'}: {takes}"),
        ("classes", ", ".join(f"{index} {name}" for index, name in enumerate(meta.data["classes"]))),
        ("network", f"{_network(config.model)}, scale {config.eval.scale:g}"),
        ("method", f"{config.method}, {meta.step} of {config.optim.steps} steps"),
        ("data", f"{about.get('dataset')}, split {config.split}: {about.get('labeled')} labeled and "
                 f"{about.get('unlabeled')} unlabeled images, list {meta.data.get('split')}"),
        ("val mIoU", score),
        ("made with", f"u2pl-ray {meta.version}, torch {about.get('torch')}, on {about.get('device')}"),
        ("weights begun with", _source(config.model.weights)),
        ("licence", "that of the images, and of the weights it began with, may bind the use of this model"),
    ]  # fmt: skip
    return "# Model\n\n| | |\n|---|---|\n" + "".join(f"| {name} | {text} |\n" for name, text in rows)
