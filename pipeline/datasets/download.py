"""Fetches raw trees from their authors, as far as torchvision can; other sets are behind a registration."""

from collections.abc import Callable
from http.client import HTTPException
from pathlib import Path

from pipeline import storage
from pipeline.errors import UserError


def download_voc(folder: str) -> str:
    """Fetches PASCAL VOC 2012 (2 GB) into the local `folder`, unless that is done.

    Returns:
        The folder that holds JPEGImages.

    Raises:
        UserError: `folder` is not on a disk, the server does not give the file, or it is damaged.
    """
    from torchvision.datasets import VOCSegmentation

    _once(folder, "VOC2012", lambda root: VOCSegmentation(root, "2012", "train", download=True))
    return storage.join(folder, "VOCdevkit", "VOC2012")


def download_sbd(folder: str) -> str:
    """Fetches SBD (1.4 GB) into the local `folder`, unless that is done.

    Returns:
        The folder that holds cls.

    Raises:
        UserError: as `download_voc`, a tree is there already, or scipy is not installed.
    """
    from torchvision.datasets import SBDataset

    def fetch(root: str) -> None:
        if (Path(root) / "cls").exists():  # torchvision would fetch it all and then refuse
            raise UserError(f"{root}/cls: is there already; use it without --download, or remove {root} first")
        SBDataset(root, "train", "segmentation", download=True)

    _once(folder, "SBD", fetch)
    return folder


def _once(folder: str, name: str, fetch: Callable[[str], object]) -> None:
    """Calls `fetch` and leaves a mark when it is done. An archive that came whole is not fetched again."""
    if not storage.is_local(folder):
        raise UserError(f"{folder}: --download unpacks to a disk; name a local folder that all nodes share")
    root = Path(storage.absolute(folder))
    mark = root / f".{name}.complete"
    if mark.exists():
        return
    try:
        root.mkdir(parents=True, exist_ok=True)
        fetch(str(root))
        mark.touch()
    except (OSError, RuntimeError, HTTPException) as error:  # what urllib, tarfile and torchvision raise
        text = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} could not be downloaded to {root} ({text}); try again, or fetch it by hand") from error
