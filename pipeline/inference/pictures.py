"""What trained networks see: input, truth, predictions, entropy, and which pixels U2PL would rely on."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.config import EvalConfig
from pipeline.datasets.format import Dataset, open_dataset
from pipeline.errors import UserError
from pipeline.inference.evaluate import Sample, read_samples, val_groups
from pipeline.inference.predict import whole
from pipeline.inference.restore import restore
from pipeline.ops.entropy import entropy
from pipeline.report.panels import RELIABILITY_LEGEND, colour_mask, heat, panel, reliability

UNRELIABLE_SHARE = 0.2
"""Share of the shown pixels that counts as unreliable: alpha_0 of U2PL."""


def compare_networks(runs: Mapping[str, str], count: int) -> np.ndarray:
    """What the networks of some runs see; see `draw`.

    Args:
        runs: run directories by title; dataset and scale are the last one's.
        count: number of validation images.

    Raises:
        UserError: there is no run, or a checkpoint or the dataset cannot be opened.
    """
    if not runs:
        raise UserError("no run is finished")
    restored = {title: restore(uri, torch.device("cpu")) for title, uri in runs.items()}
    config, _ = list(restored.values())[-1]
    networks = {title: method.predictor() for title, (_, method) in restored.items()}
    return draw(networks, open_dataset(str(config.data.root)), config.eval, count)


def draw(networks: Mapping[str, nn.Module], dataset: Dataset, config: EvalConfig, count: int) -> np.ndarray:
    """Draws a grid with one row per validation image.

    Args:
        networks: predictors by title (uint8 [B,3,H,W] -> logits); entropy and reliability are the last one's.
        dataset: its classes and palette; images are taken evenly over the validation set.
        config: the scale at which the networks see the images.
        count: number of rows.

    Returns:
        uint8 [h,w,3].
    """
    samples = _spread(dataset, count)
    logits = {title: [_logits(network, sample, config) for sample in samples] for title, network in networks.items()}
    uncertain = [entropy(each)[0].cpu().numpy() for each in list(logits.values())[-1]]
    threshold = float(np.quantile(np.concatenate([values.ravel() for values in uncertain]), 1 - UNRELIABLE_SHARE))
    palette = dataset.info.palette
    rows = []
    for index, sample in enumerate(samples):
        seen = {title: each[index].argmax(1)[0].cpu().numpy() for title, each in logits.items()}
        rows.append(
            {
                "input": sample.image,
                "truth": colour_mask(sample.mask, palette),
                **{title: colour_mask(prediction, palette) for title, prediction in seen.items()},
                "entropy": heat(uncertain[index] / np.log(len(palette))),
                "reliable": reliability(uncertain[index], threshold),
            }
        )
    legend = [*zip(dataset.info.classes, palette, strict=True), *RELIABILITY_LEGEND[:2]]
    return np.asarray(panel(rows, list(rows[0]), legend))


def _spread(dataset: Dataset, count: int) -> Sequence[Sample]:
    groups = val_groups(dataset)
    chosen = np.linspace(0, len(groups) - 1, min(count, len(groups))).astype(int)
    return [read_samples(dataset, groups[i])[0] for i in chosen]


@torch.no_grad()
def _logits(network: nn.Module, sample: Sample, config: EvalConfig) -> Tensor:
    image = torch.from_numpy(np.ascontiguousarray(sample.image)).permute(2, 0, 1).unsqueeze(0)
    return whole(network, image, config.scale).float()
