"""Pure tensor functions that run compiled where a compiler is at hand, and as they stand elsewhere.

Compiled, a chain of small operations becomes one pass over memory. It is one switch for the process, as compilation
pays at some sizes and not at others: see `activate`.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

log = logging.getLogger(__name__)
_active = False


_ONE_PASS: dict[str, Any] = {"realize_opcount_threshold": 1 << 16, "realize_reads_threshold": 1 << 16}
"""Keeps the compiler from storing intermediate results of long expressions."""


def kernel(*, one_pass: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Marks a function of tensors and constants, without side effects, as worth compiling as a whole.

    Args:
        one_pass: whether intermediate results are better computed anew for each use than kept in memory.
    """

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        compiled = torch.compile(function, fullgraph=True, dynamic=False, options=_ONE_PASS if one_pass else None)

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            return (compiled if _active else function)(*args, **kwargs)

        return run

    return mark


def activate(device: torch.device) -> bool:
    """Switches compilation on for this process, if `device` has a compiler; else says so and changes nothing."""
    global _active
    if not _active:
        problem = _problem(device)
        if problem:
            log.warning("no compiler for %s (%s): the losses run uncompiled, right but slower", device.type, problem)
        _active = not problem
    return _active


def is_active() -> bool:
    """Whether kernels run compiled."""
    return _active


@contextmanager
def inactive() -> Iterator[None]:
    """Kernels run as they stand inside; for comparisons."""
    global _active
    before, _active = _active, False
    try:
        yield
    finally:
        _active = before


@functools.cache
def _problem(device: torch.device) -> str:
    """Why the smallest of functions does not compile on `device`; empty if it does."""
    try:
        torch.compile(torch.square, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
    return ""
