"""What the released code does in place of the paper's rules, for comparison with published numbers.

Numbered as in `docs/u2pl.md`: the one-hot of a batch (D1), the negatives (D2), the pairing of classes (D3). Plain and
dense: nobody trains with it for speed.
"""

import torch
from torch import Tensor

from pipeline.methods.u2pl.fast import kth_largest
from pipeline.methods.u2pl.reference import Candidates, Draws, Pixels, Positives, Rule, Sets
from pipeline.ops.entropy import IGNORE
from pipeline.ops.selection import Members, rows


def one_hot(label: Tensor, classes: int) -> Tensor:
    """The release's one-hot (D1): the labels of all images land in the first one, the others get none.

    Pixels that are ignored in an image other than the first count as class 0 there; those ignored in the first are
    cleared.

    Args:
        label: integer [B,h,w], 255 ignored.
        classes: C.

    Returns:
        bool [B,C,h,w].
    """
    ids = torch.arange(classes, device=label.device).view(-1, 1, 1)
    first = (label.masked_fill(label == IGNORE, 0).unsqueeze(1) == ids).any(0) & (label[0] != IGNORE)
    return torch.cat([first[None], torch.zeros_like(first).expand(len(label) - 1, -1, -1, -1)])


def masks(pixels: Pixels, own: Tensor, rule: Rule) -> Sets:
    """The release's sets of each class (D2); arguments as for `candidates`."""
    logits = pixels.logits.detach().float()
    positive = own & pixels.may_be_anchor.unsqueeze(1)
    anchor = positive & (logits.softmax(1) > rule.delta_p)
    likely, possible = (
        (logits >= kth_largest(logits, min(k, logits.shape[1])).unsqueeze(1)) for k in (rule.r_l, rule.r_h)
    )
    unlabeled = torch.arange(len(own), device=own.device).view(-1, 1, 1) >= pixels.labeled
    negative = own & (pixels.may_be_negative & unlabeled).unsqueeze(1) & possible & ~likely
    return Sets(*(mask.transpose(0, 1).flatten(1) for mask in (anchor, positive, negative)))


def candidates(pixels: Pixels, own: Tensor, rule: Rule, draws: Draws) -> Candidates:
    """As `reference.candidates`, by the release's rules: a negative of class c must also carry label c (D2).

    So labeled pixels are never negatives. `own`, bool [B,C,h,w], says which labels each pixel carries; see `one_hot`.
    """
    sets = masks(pixels, own, rule)
    anchors, negatives = Members(sets.anchor), Members(sets.negative)
    keys, valid = negatives.stratified(draws.keys)
    features = rows(pixels.teacher.detach()).float()
    return Candidates(
        anchors.draw(draws.anchors),
        anchors.count,
        sets.positive.float() @ features,
        sets.positive.sum(1),
        keys,
        valid,
        negatives.count,
    )


def positives(found: Candidates) -> Positives:
    """Prototypes of this worker's pixels alone, as each process of the release makes them; weight 1 with anchors."""
    count = found.positive_count.float()
    mean = found.positive_sum / count.clamp_min(1)[:, None]
    return Positives(mean, count, (found.anchor_count > 0).float())


def mispaired(found: Candidates, positive: Positives) -> tuple[Candidates, Positives]:
    """The release's pairing (D3): anchors and prototype of class i meet the bank of the i-th class present.

    So with V classes present, only those with ids below V are trained, mostly against another class's negatives.
    """
    present = positive.pixels > 0
    source = (present.cumsum(0) - 1).clamp_min(0)  # by the class whose bank is used
    weight = positive.weight[source] * present
    return found._replace(anchors=found.anchors[source]), positive._replace(mean=positive.mean[source], weight=weight)
