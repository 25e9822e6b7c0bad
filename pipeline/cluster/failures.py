"""What Ray says of a failure, as one line with a remedy."""

import re
from collections.abc import Mapping

from pipeline.errors import UserError

_NODE_MEMORY = re.compile(r"Memory on the node \(IP: ([^,]+),.*?\) was ([\d.]+)GB(?: used)? / ([\d.]+)GB", re.DOTALL)
"""Words of Ray's memory monitor, which ends processes before the node's own system would."""
_REFUSED = ("CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED")
"""What CUDA's libraries say that get no memory for themselves."""


def explained(error: BaseException) -> str:
    """One line about a worker that was lost: out of memory with its remedy, else the last line that Ray says."""
    found = _NODE_MEMORY.search(str(error))
    if found:
        node, used, total = found.groups()
        return (
            f"node {node} ran out of memory ({used} of {total} GB used): lower optim.batch_labeled, "
            "optim.batch_unlabeled or data.crop, raise optim.accumulate, or put fewer workers on a node "
            "(scaling.cpus_per_worker)"
        )
    line = next((line for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)
    return line.strip()[:200]


def traceback_of(failures: Mapping[int, BaseException]) -> str:
    """What the first worker printed that met a fault of the program, or an empty string if all were lost."""
    return next((str(error) for _, error in sorted(failures.items()) if hasattr(error, "cause")), "")


def out_of_memory(error: RuntimeError | MemoryError, device: str) -> UserError | None:
    """What to do about an error that says that memory cannot be had; None if it is about something else.

    Args:
        error: torch.OutOfMemoryError of a GPU, what torch's allocator of the CPU raises, what CUDA's libraries say
            where they get none, or Python's and NumPy's MemoryError.
        device: name of the worker's device.
    """
    text = " ".join(str(error).split())
    refused = next((code for code in _REFUSED if code in text), None)
    if isinstance(error, MemoryError):
        said = text[:200] or "MemoryError"
    elif refused is not None:
        said = refused
    elif "out of memory" in text:  # "... GPU 0 has a total capacity of 79.2 GiB of which 1.5 GiB is free. ..."
        said = text.partition(" is free.")[0].removeprefix("CUDA out of memory. ")
    elif "can't allocate memory" in text:
        said = text.partition("can't allocate memory: ")[2].partition(". Error code")[0]
    else:
        return None
    remedy = (
        "raise optim.accumulate, pass --model.checkpoint_activations true or --run.precision bf16, take more workers, "
        "which share the batch, or lower optim.batch_labeled, optim.batch_unlabeled or data.crop"
    )
    return UserError(f"{device} is out of memory ({said}): {remedy}")
