"""Features of pixels on a plane: some of each class, with the keys of a memory bank, by PCA and by t-SNE."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.schema import Config
from pipeline.errors import UserError
from pipeline.inference.evaluate import Sample, eval_mode
from pipeline.inference.load import autocast
from pipeline.inference.logits import at_scale
from pipeline.methods import Method
from pipeline.models import SegmentationModel
from pipeline.ops.grid import shrink

PIXELS = 1200
"""Pixels on the plane, an equal part for each class."""
KEYS = 600
"""Keys of a memory bank there."""
LEAST = 10
"""Points without which there is no plane."""
PERPLEXITY = 30.0
"""About how many neighbours t-SNE keeps together, as is usual."""


class Points(NamedTuple):
    """Features of pixels, and keys of a memory bank if the method has one."""

    features: Tensor
    """float32 [n,D], of length 1, as the contrast compares them."""
    label: Tensor
    """int64 [n], the true class of a pixel, or the class of which a key is a negative."""
    stored: Tensor
    """bool [n], whether the point is a key of the memory bank."""


@torch.no_grad()
def points(method: Method, samples: Sequence[Sample], config: Config) -> Points:
    """Pixels of each true class, and keys of each class's queue, both evenly chosen.

    The features are those of the method's result: of its representation head, or of the encoder's last stage where it
    has none.

    Raises:
        UserError: the images show hardly a pixel with a class.
    """
    network = next(iter(method.networks().values()))
    device = next(network.parameters()).device
    each = max(1, PIXELS // method.num_classes)
    found: list[list[Tensor]] = [[] for _ in range(method.num_classes)]
    with eval_mode(network):
        for sample in samples:
            image = torch.from_numpy(np.ascontiguousarray(sample.image)).permute(2, 0, 1)[None].to(device)
            with autocast(device, config.run):
                features = _features(network, at_scale(image, config.eval.scale))[0].float().cpu()
            mask = shrink(torch.from_numpy(sample.mask.copy())[None], (features.shape[1], features.shape[2]))[0]
            for c, of_class in enumerate(found):
                of_class.append(_evenly(features[:, mask == c].T, each))
    groups = [(_evenly(torch.cat(of_class), each), c, False) for c, of_class in enumerate(found)]
    stored = method.stored_keys() or []
    groups += [(_evenly(keys.float().cpu(), max(1, KEYS // len(stored))), c, True) for c, keys in enumerate(stored)]
    if sum(len(rows) for rows, _, stored in groups if not stored) < LEAST:
        raise UserError(f"the images show fewer than {LEAST} pixels with a class: name others, or take more of them")
    return Points(
        F.normalize(torch.cat([rows for rows, _, _ in groups]), dim=1),
        torch.cat([torch.full((len(rows),), c) for rows, c, _ in groups]),
        torch.cat([torch.full((len(rows),), stored) for rows, _, stored in groups]),
    )


def _features(network: SegmentationModel, image: Tensor) -> Tensor:
    """Features, float [B,D,h,w], of uint8 [B,3,H,W]."""
    maps = network.encode(image)
    features = network.decode(maps).features
    return maps.high if features is None else features


def _evenly(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows, from everywhere among them."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).long()]


def pca(features: Tensor) -> tuple[Tensor, list[float]]:
    """The plane that holds most of the variance.

    Args:
        features: float32 [n,D], n and D at least 2.

    Returns:
        Places float32 [n,2], and the share of the variance that each axis holds. The larger entries of an axis are
        positive, so that the same features give the same picture.
    """
    centred = features - features.mean(0)
    _, lengths, axes = torch.linalg.svd(centred, full_matrices=False)
    largest = axes.gather(1, axes.abs().argmax(1, keepdim=True))
    shares = lengths.square() / lengths.square().sum().clamp_min(1e-12)
    return centred @ (axes * largest.sign())[:2].T, shares[:2].tolist()


def tsne(features: Tensor, steps: int = 500) -> Tensor:
    """t-SNE (van der Maaten and Hinton, JMLR 2008) with all pairs, from the places of PCA: nothing in it is random.

    Two thousand points take some seconds. The libraries that do it for many more bring SciPy and scikit-learn along,
    which nothing else here needs.

    Args:
        features: float32 [n,D], n at least `LEAST`.
        steps: of the descent; in the first quarter neighbours are pulled harder (early exaggeration).

    Returns:
        Places float32 [n,2] around 0.
    """
    count = len(features)
    wanted = affinities(features, min(PERPLEXITY, (count - 1) / 3))
    start = pca(features)[0]
    place = 1e-4 * start / start[:, 0].std().clamp_min(1e-12)
    velocity, gain, rate = torch.zeros_like(place), torch.ones_like(place), max(count / 48, 50.0)
    for step in range(steps):
        early = step < steps // 4
        near = 1 / (1 + _squared(place))
        near.fill_diagonal_(0)
        pull = ((12 if early else 1) * wanted - near / near.sum()) * near
        gradient = 4 * (pull.sum(1, keepdim=True) * place - pull @ place)
        gain = torch.where(gradient.sign() == velocity.sign(), gain * 0.8, gain + 0.2).clamp_min(0.01)
        velocity = (0.5 if early else 0.8) * velocity - rate * gain * gradient
        place = place + velocity
    return place - place.mean(0)


def affinities(features: Tensor, perplexity: float) -> Tensor:
    """How close each pair is, float32 [n,n] that sums to 1: Gaussian, each point's as wide as its perplexity asks."""
    distance = _squared(features).fill_diagonal_(torch.inf)
    low, high = torch.full((len(features), 1), 1e-6), torch.full((len(features), 1), 1e6)
    for _ in range(60):  # halves the range of the exponent of each point's precision
        precision = (low * high).sqrt()
        share = (-distance * precision).softmax(1)
        wide = torch.special.entr(share).sum(1, keepdim=True) > np.log(perplexity)
        low, high = torch.where(wide, precision, low), torch.where(wide, high, precision)
    share = (-distance * (low * high).sqrt()).softmax(1)
    return (share + share.T) / (2 * len(features))


def _squared(places: Tensor) -> Tensor:
    """Squared distances of all pairs, float32 [n,n]."""
    return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist").square()
