"""What a comparison comes to, in a sentence or two for each split."""

from pipeline.report.compare import Comparison, MethodRow, Spread, spread


def answers(comparison: Comparison) -> list[str]:
    """The subject against its baseline with how far that can be trusted, and the best row if it is another one."""
    said = [_answer(comparison, split) for split in comparison.splits]
    return [*filter(None, said)] or ["No run is finished yet."]


def _answer(comparison: Comparison, split: str) -> str:
    done = [(row, last) for row in comparison.rows if (last := row.last(split))]
    if not done:
        return ""
    subject = comparison.subject(split)
    row = subject or done[0][0]
    said = _against(comparison, row, split)
    if not said:
        lack = f"; no finished {comparison.baseline} with the same budget and seeds to compare with" if subject else ""
        said = f"{_scored(row, dict(done)[row])} with {_labels(row, split)}{lack}."
    best, top = max(done, key=lambda each: each[1].mean)
    return said if best is row else f"{said} Best of all: {_scored(best, top)}."


def _against(comparison: Comparison, row: MethodRow, split: str) -> str:
    """Both means over the seeds that both have, and the gain; empty if there are none."""
    pairs, gain = comparison.pairs(row, split), comparison.gain(row, split)
    own, base = spread([mine for mine, _ in pairs]), spread([over for _, over in pairs])
    if not (own and base and gain):
        return ""
    scores = f"{row.label} {own.mean:.2f} against {base.mean:.2f} of {comparison.baseline}"
    return f"{scores}: {gain.mean:+.2f} points of mIoU with {_labels(row, split)} ({_sure(gain)})."


def _labels(row: MethodRow, split: str) -> str:
    counts = {run.about.labeled for run in row.finished(split)}
    return f"{counts.pop()} labeled images" if len(counts) == 1 and None not in counts else f"split {split}"


def _scored(row: MethodRow, last: Spread) -> str:
    seeds = "one seed" if last.sd is None else f"± {last.sd:.2f}, {last.seeds} seeds"
    return f"{row.label} {last.mean:.2f} mIoU ({seeds})"


def _sure(gain: Spread) -> str:
    """How far a gain can be trusted."""
    if gain.margin is None:
        return "one seed: another one may say otherwise"
    low, high = gain.mean - gain.margin, gain.mean + gain.margin
    doubt = ": it holds 0, so more seeds are needed" if low <= 0 <= high else ""
    return f"{gain.seeds} seeds, 95 % interval {low:+.2f} to {high:+.2f}{doubt}"
