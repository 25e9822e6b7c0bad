import numpy as np
import pytest
import torch

from pipeline.config.cli import resolve
from pipeline.datasets.prepared.dataset import open_dataset
from pipeline.errors import UserError
from pipeline.inference import plane
from pipeline.inference.evaluate import read_images, spread
from pipeline.inference.plane import affinities, pca, points, tsne
from pipeline.methods import OPTIONS, build_method
from pipeline.ops.grid import shrink
from pipeline.ops.world import World


def _clusters(count: int = 25, apart: float = 6.0, dim: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Four groups of points, and which group each belongs to."""
    torch.manual_seed(0)
    centres = apart * torch.eye(dim)[:4]
    return torch.cat([centre + torch.randn(count, dim) for centre in centres]), torch.arange(4).repeat_interleave(count)


def test_pca_is_that_of_the_covariance():
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(3)) * torch.tensor([1, 5, 1, 2, 1, 1])
    places, shares = pca(features)
    values, vectors = np.linalg.eigh(np.cov(features.numpy().T))
    np.testing.assert_allclose(shares, values[::-1][:2] / values.sum(), rtol=1e-4)
    expected = (features - features.mean(0)).numpy() @ vectors[:, ::-1][:, :2]
    np.testing.assert_allclose(places.abs().numpy(), np.abs(expected), atol=1e-3)
    assert pca(features.clone())[0].equal(places)
    np.testing.assert_allclose(pca(features.flip(0))[0], places.flip(0), atol=1e-3)


def test_affinities_have_the_perplexity():
    features, perplexity = _clusters(8)[0], 5.0
    distance = ((features[:, None] - features) ** 2).sum(2).double().numpy()
    expected = np.zeros_like(distance)
    for i, row in enumerate(distance):
        low, high, weights = 1e-9, 1e9, row
        for _ in range(200):
            weights = np.exp(-(row - np.delete(row, i).min()) * np.sqrt(low * high))
            weights[i] = 0
            weights /= weights.sum()
            shares = weights[weights > 0]
            if -(shares * np.log(shares)).sum() > np.log(perplexity):
                low = np.sqrt(low * high)
            else:
                high = np.sqrt(low * high)
        expected[i] = weights
    found = affinities(features, perplexity)
    np.testing.assert_allclose(found, (expected + expected.T) / (2 * len(features)), atol=1e-6)
    assert float(found.sum()) == pytest.approx(1, abs=1e-5)


def _divergence(wanted: torch.Tensor, place: torch.Tensor) -> float:
    """KL(P || Q) of t-SNE's definition."""
    near = 1 / (1 + ((place[:, None] - place) ** 2).sum(2))
    near.fill_diagonal_(0)
    inside = wanted > 0
    return float((wanted * (wanted / (near / near.sum())).log())[inside].sum())


def test_tsne_keeps_neighbours_together_better_than_pca():
    features, group = _clusters()
    place = tsne(features)
    near = torch.cdist(place, place).fill_diagonal_(torch.inf).argmin(1)
    assert (group[near] == group).float().mean() > 0.97
    wanted = affinities(features, plane.PERPLEXITY)
    flat = pca(features)[0]
    assert _divergence(wanted, place) < 0.7 * min(_divergence(wanted, flat * scale) for scale in (0.1, 0.3, 1, 3, 10))
    assert place.mean(0).abs().max() < 1e-3
    assert tsne(features).equal(place), "nothing in it is random"


def test_few_or_equal_points_have_places():
    for features in (torch.randn(10, 4), torch.ones(12, 3)):
        assert tsne(features).isfinite().all()
        assert pca(features)[0].isfinite().all()


@pytest.mark.parametrize("name", ["u2pl", "suponly"])
def test_points_are_features_of_their_class_and_keys_of_its_queue(shapes, monkeypatch, name):
    monkeypatch.setattr(plane, "PIXELS", 120)
    monkeypatch.setattr(plane, "KEYS", 30)
    dataset = open_dataset(shapes)
    classes = len(dataset.info.classes)
    values = {"method": name, "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8}}
    values |= {"u2pl": {"queue": 10, "queue_background": 10}} if name == "u2pl" else {}
    torch.manual_seed(0)
    method = build_method(resolve(values, OPTIONS), classes).train()
    bank = getattr(method, "bank", None)
    keys, valid = torch.randn(classes, 13, 8), torch.arange(13) < torch.arange(classes)[:, None]
    valid[-1] = True
    if bank is not None:  # of class c only c keys, more than fit of the last one
        bank.push(keys, valid, World())
    samples = read_images(dataset, spread(dataset, 3))
    found = points(method, samples, method.config)
    assert method.training
    assert found.features.norm(dim=1).allclose(torch.ones(len(found.features)))

    network = next(iter(method.networks().values())).eval()
    with torch.no_grad():
        images = torch.stack([torch.from_numpy(sample.image.copy()).permute(2, 0, 1) for sample in samples])
        of_head = network(images).features
        maps = network.encode(images).high if of_head is None else of_head
    rows = torch.nn.functional.normalize(maps.permute(0, 2, 3, 1).flatten(0, 2), dim=1)
    masks = torch.stack([torch.from_numpy(sample.mask.copy()) for sample in samples])
    truth = shrink(masks, (maps.shape[2], maps.shape[3])).flatten()
    for c in range(classes):
        pixels = found.features[(found.label == c) & ~found.stored]
        of_class = rows[truth == c]
        assert len(pixels) == min(len(of_class), 120 // classes)
        assert not len(pixels) or (torch.cdist(pixels, of_class).amin(1) < 1e-3).all()
        stored = found.features[(found.label == c) & found.stored]
        if bank is None:
            assert not len(stored)
        else:
            given = torch.nn.functional.normalize(keys[c, valid[c]][-10:], dim=1)
            assert len(stored) == min(len(given), 30 // classes)
            assert not len(stored) or (torch.cdist(stored, given).amin(1) < 1e-3).all()


def test_images_without_a_class_have_no_plane(shapes):
    dataset = open_dataset(shapes)
    values = {"method": "suponly", "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8}}
    method = build_method(resolve(values, OPTIONS), len(dataset.info.classes))
    (sample,) = read_images(dataset, spread(dataset, 1))
    blank = sample._replace(mask=np.full_like(sample.mask, 255))
    with pytest.raises(UserError, match="fewer than 10 pixels with a class: name others, or take more of them"):
        points(method, [blank], method.config)
