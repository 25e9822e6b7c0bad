"""The images to label next as one page: a contact sheet of photos and overlays."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

import numpy as np

from pipeline import storage
from pipeline.inference.pictures import side_by_side
from pipeline.inference.predictions import Job, records, shown
from pipeline.inference.ranking import Ranked, Uncertainty, as_csv, diversified, rank
from pipeline.patience import retried
from pipeline.report.render import render

SHOWN = 48
"""Images on the page."""
SIDE = 256
"""The longer side of a thumbnail, pixels."""
MEANING = {
    "entropy": "mean entropy of the pixels, 1 where all classes are equally likely",
    "margin": "mean of 1 - (p1 - p2), the probabilities of the two likeliest classes of a pixel",
    "unreliable": "share of pixels among the fifth of all images' pixels that has the highest entropy",
}
"""What each score is."""


def write_ranking(job: Job, by: str, diverse: int = 0) -> None:
    """Writes ranking.csv and ranking.html beside the masks of a job that has measured its images.

    Args:
        job: carried out, with the option `RANK`.
        by: the score, out of `SCORES`.
        diverse: so many at the top also differ from each other, for which the job has the option `DIVERSE`.
    """
    shows: dict[str, tuple[float, ...]] = {}

    def measured() -> Iterator[tuple[str, Uncertainty]]:
        for record in records(job):
            for each in record.masks:
                assert each.uncertainty is not None
                yield each.name, each.uncertainty
                if each.fingerprint is not None:
                    shows[each.name] = each.fingerprint

    ranking = rank(measured(), by)
    if diverse:
        ranking = diversified(ranking, by, np.array([shows[each.name] for each in ranking], np.float32), diverse)
    pictures = shown(job, {each.name for each in ranking[:SHOWN]})
    page = as_page(ranking, by, pictures, list(zip(job.classes, job.palette, strict=True)), diverse)
    for name, text in (("ranking.csv", as_csv(ranking, by)), ("ranking.html", page)):
        retried(partial(storage.write_bytes, storage.join(job.out, name), text.encode()))


def as_page(
    ranking: Sequence[Ranked],
    by: str,
    pictures: Iterable[tuple[str, np.ndarray, np.ndarray]],
    classes: Sequence[tuple[str, tuple[int, int, int]]],
    diverse: int = 0,
) -> str:
    """One HTML file with everything in it.

    Args:
        ranking: all images, in order.
        by: the score.
        pictures: name, photo as uint8 [H,W,3], class ids as uint8 [H,W]; of the first `SHOWN`, in any order.
        classes: names and colours by class id.
        diverse: so many at the top were chosen to differ, too.
    """
    also = f" The first {diverse} also differ in what they show, so their scores do not fall one by one." * bool(
        diverse
    )
    palette = [color for _, color in classes]
    pairs = {name: side_by_side(photo, [mask], palette, SIDE, over=True) for name, photo, mask in pictures}
    return render(
        "ranking.html",
        title=f"{min(SHOWN, len(ranking))} of {len(ranking)} images to label next, by {by}",
        meaning=f"{by}: {MEANING[by]}.{also}",
        classes=classes,
        images=[
            {"rank": number, "name": each.name, "score": getattr(each, by), "pixels": pairs[each.name]}
            for number, each in enumerate(ranking[:SHOWN], start=1)
        ],
    )
