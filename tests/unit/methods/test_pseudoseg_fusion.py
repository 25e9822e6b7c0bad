import torch

from pipeline.methods.pseudoseg import calibrated_fusion
from tests.unit.ops.worlds import on_ranks


def test_fusion_is_the_formula_of_the_release_over_all_ranks():
    torch.manual_seed(0)
    z, a = 5 * torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2)
    values = torch.cat([z.flatten(), a.flatten()]).tolist()
    scale = (sum(v * v for v in values) / len(values) + 1e-8) ** 0.5
    q = ((z / scale).softmax(1) + (a / scale).softmax(1)) / 2
    expected = q**2 / (q**2).sum(1, keepdim=True)  # T = 1/2
    for ranks in (1, 2):
        found = on_ranks(ranks, lambda w, n=ranks: calibrated_fusion(z.chunk(n)[w.rank], a.chunk(n)[w.rank], 0.5, w))
        torch.testing.assert_close(torch.cat(found), expected)
