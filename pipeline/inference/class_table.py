"""Scores as text; no torch is imported, as drivers print them."""

from collections.abc import Sequence

ABSENT = "-"


def class_table(
    classes: Sequence[str], last: Sequence[float | None], best: Sequence[float | None] | None = None
) -> str:
    """IoU by class in percent, one class a line, and below it their mean.

    Args:
        classes: names by class id.
        last: IoU 0..1 by class of the last evaluation; None: the class was absent, and the mean leaves it out.
        best: the same of the best evaluation; None: no such column.

    Returns:
        Aligned lines without a last newline.
    """
    columns = {"last": last} if best is None else {"last": last, "best": best}
    width = max(map(len, [*classes, "class"]))
    head = _line("class", list(columns), width)
    rows = [
        _line(name, [percent(values[index]) for values in columns.values()], width)
        for index, name in enumerate(classes)
    ]
    mean = _line("mIoU", [percent(mean_of(values)) for values in columns.values()], width)
    return "\n".join([head, "-" * len(head), *rows, "-" * len(head), mean])


def counted(iou: Sequence[float | None]) -> str:
    """How many classes a mean IoU is over, to stand behind it; empty if it is over all of them."""
    present = sum(value is not None for value in iou)
    return "" if present == len(iou) else f" over {present} of {len(iou)} classes"


def _line(name: str, cells: Sequence[str], width: int) -> str:
    return name.ljust(width) + "".join(cell.rjust(8) for cell in cells)


def percent(value: float | None) -> str:
    """A share in percent, with two decimals; `ABSENT` for None."""
    return ABSENT if value is None else f"{100 * value:.2f}"


def mean_of(values: Sequence[float | None]) -> float | None:
    """The mean of the numbers among `values`; None if there is none."""
    present = [value for value in values if value is not None]
    return sum(present) / len(present) if present else None
