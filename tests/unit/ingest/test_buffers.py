import torch

from pipeline.ingest.decode import Buffers

SHAPE = (4, 3, 50, 60)


def test_memory_is_used_again_when_nobody_refers_to_it():
    buffers = Buffers(pinned=False)
    places = set()
    for _ in range(10):
        image, mask = buffers.take(SHAPE, torch.uint8), buffers.take((4, 50, 60), torch.int64)
        assert (image.shape, image.dtype, mask.shape, mask.dtype) == (SHAPE, torch.uint8, (4, 50, 60), torch.int64)
        places |= {image.data_ptr(), mask.data_ptr()}
        del image, mask
    assert len(places) == 2


def test_who_keeps_a_part_keeps_its_memory():
    """A view of a view, the same tensor on its device, an array of it."""
    buffers = Buffers(pinned=False)
    keepers = (
        lambda tensor: tensor[1:, 2].flatten(1)[0],
        lambda tensor: tensor.to(torch.device("cpu"), non_blocking=True),
        lambda tensor: tensor[3].numpy()[:, 4:],
    )
    kept = []
    for number, keep in enumerate(keepers):
        tensor = buffers.take(SHAPE, torch.uint8)
        tensor.fill_(number)
        kept.append(keep(tensor))
        del tensor
    for _ in range(5):
        buffers.take(SHAPE, torch.uint8).fill_(99)
    assert all((part == number).all() for number, part in enumerate(kept))


def test_no_more_memory_than_was_in_use_at_once():
    buffers = Buffers(pinned=False)
    places = set()
    held: list[torch.Tensor] = []
    for _ in range(40):
        held = [*held[-2:], buffers.take(SHAPE, torch.uint8)]
        places.add(held[-1].data_ptr())
    assert len(places) == 4
