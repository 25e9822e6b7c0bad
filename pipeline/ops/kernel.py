"""Pure tensor functions that run compiled if compilation was switched on (`activate`), and eagerly otherwise.

Compiled, a chain of small operations becomes one pass over memory. There is one switch for the process, as compilation
pays at some sizes and not at others. A function that fails compiled is said once and runs as it is written; a failure
of its backward pass is not caught.
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


_CONTRACT: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}
"""Lets a multiplication and an addition become one instruction, rounded once."""
_ONE_PASS: dict[str, Any] = {"realize_opcount_threshold": 1 << 16, "realize_reads_threshold": 1 << 16}
"""Keeps the compiler from storing intermediate results of long expressions."""


def kernel(*, one_pass: bool = False, contract: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Marks a function of tensors and constants, without side effects, as worth compiling as a whole.

    Args:
        one_pass: whether to compute intermediate results anew for each use instead of storing them.
        contract: whether a * b + c may be one instruction that rounds once. Then equal expressions of a function may
            differ in the last bit.
    """

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        options = (_ONE_PASS if one_pass else {}) | (_CONTRACT if contract else {})

        @functools.cache
        def compiled() -> Callable[P, R]:
            known = torch._inductor.list_options()  # they differ between releases of torch
            chosen = {name: value for name, value in options.items() if name in known}
            return torch.compile(function, fullgraph=True, dynamic=False, options=chosen)

        fails = False

        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            nonlocal fails
            if not _active or fails:
                return function(*args, **kwargs)
            try:
                return compiled()(*args, **kwargs)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                result = function(*args, **kwargs)  # raises what is no fault of the compiler
                fails = True
                log.warning("%s runs uncompiled, right but slower: %s", function.__name__, problem_of(error))
                return result

        return run

    return mark


def activate(device: torch.device) -> bool:
    """Switches compilation on for this process if `device` has a compiler; else warns and changes nothing.

    Returns:
        Whether kernels run compiled now.
    """
    global _active
    if not _active:
        _active = compiles(device)
    return _active


@contextmanager
def as_written() -> Iterator[None]:
    """Inside, kernels run uncompiled: on tensors without values there is nothing to compile for."""
    global _active
    before, _active = _active, False
    try:
        yield
    finally:
        _active = before


def is_active() -> bool:
    """Whether kernels run compiled."""
    return _active


@functools.cache
def compiles(device: torch.device) -> bool:
    """Whether a trivial function compiles on `device`; if it does not, a warning says why, the first time."""
    try:
        torch.compile(torch.square, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        log.warning(
            "no compiler for %s (%s): the losses run uncompiled, right but slower", device.type, problem_of(error)
        )
        return False
    return True


def problem_of(error: Exception) -> str:
    """An error of a compiler in one line: what its backend met, where it says so."""
    error = getattr(error, "inner_exception", error)
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
