from typing import cast

import pytest
import torch

from pipeline.methods.pc2seg import PC2Seg
from tests.unit.methods.conftest import SIZE, batch, step


def test_consistency_is_the_squared_distance_of_two_views(build):
    """sum_c (softmax S(x') - softmax S(x))^2, averaged over valid pixels; the weak view is held fixed."""
    method, on = cast("PC2Seg", build("pc2seg")), batch()
    terms = method(on, step(3)).terms
    assert on.unlabeled is not None
    weak = method.student(on.unlabeled.image).logits.softmax(1)
    strong = method.student(on.unlabeled.strong[0]).logits.softmax(1)
    size, distances = weak.shape[2:], []
    for b in range(2):
        for y in range(size[0]):
            for x in range(size[1]):
                if on.unlabeled.valid[b, y * SIZE // size[0], x * SIZE // size[1]]:
                    distances.append(((strong[b, :, y, x] - weak[b, :, y, x]) ** 2).sum())
    torch.testing.assert_close(terms["consistency"], torch.stack(distances).mean(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("option", "term"), [("consistency", "consistency"), ("contrast", "contrast")])
def test_weights_scale_their_terms(option, term, build):
    terms = [build("pc2seg", **{option: weight})(batch(), step(3)).terms for weight in (0.2, 0.6)]
    assert terms[0][term] > 0
    torch.testing.assert_close(3 * terms[0][term], terms[1][term])


def test_one_image_has_no_negatives_and_no_contrast(build):
    assert build("pc2seg")(batch(1), step(3)).terms["contrast"] == 0
