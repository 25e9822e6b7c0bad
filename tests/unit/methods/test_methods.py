"""What every method promises; a new one in `METHODS` is covered without a line here."""

import dataclasses
import io

import pytest
import torch

from pipeline.batch import Batch, Views
from pipeline.methods import METHODS, OPTIONS
from tests.unit.methods.conftest import CLASSES, SIZE, batch, step, train_step, views

NAMES = sorted(METHODS)
STEPS = (0, 1, 2, 3, 19)
"""Before, at and after the end of U2PL's warm-up, and the last step of the run."""


@pytest.mark.parametrize("name", NAMES)
def test_it_is_declared(name):
    assert dataclasses.is_dataclass(OPTIONS[name])
    assert OPTIONS[name] is METHODS[name].Options
    assert OPTIONS[name].__doc__
    assert METHODS[name].views.unlabeled in (True, False)


@pytest.mark.parametrize("aux", [0.0, 0.4])
@pytest.mark.parametrize("index", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_every_step_gives_every_trained_parameter_a_gradient(name, index, aux, build):
    """Otherwise DDP's ranks would wait for each other for ever."""
    method = build(name, aux=aux)
    losses = method(batch(), step(index))
    torch.stack(list(losses.terms.values())).sum().backward()
    trained = {id(p) for group in method.param_groups() for p in group["params"]}
    for key, parameter in method.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad == (id(parameter) in trained), key
    assert any(p.grad.any() for p in method.parameters() if p.grad is not None)
    assert all(value.dim() == 0 and value.requires_grad for value in losses.terms.values())
    assert not any(value.requires_grad for value in losses.logs.values())


def _ignored(on: Batch) -> Batch:
    mask = torch.full_like(on.labeled.mask, 255) if on.labeled.mask is not None else None
    return Batch(dataclasses.replace(on.labeled, mask=mask), on.unlabeled)


def _invalid(on: Batch) -> Batch:
    assert on.unlabeled is not None
    return Batch(on.labeled, dataclasses.replace(on.unlabeled, valid=torch.zeros_like(on.unlabeled.valid)))


def _one_class(on: Batch) -> Batch:
    assert on.labeled.mask is not None
    return Batch(
        dataclasses.replace(on.labeled, mask=on.labeled.mask.clamp_min(2).where(on.labeled.mask == 255, 2)),
        on.unlabeled,
    )


def _flat(on: Batch) -> Batch:
    def same(side: Views) -> Views:
        flat = torch.full_like(side.image, 120)
        return dataclasses.replace(side, image=flat, strong=(flat,) * len(side.strong))

    assert on.unlabeled is not None
    return Batch(same(on.labeled), same(on.unlabeled))


CASES = {
    "no label": (2, _ignored),
    "no unlabeled pixel": (2, _invalid),
    "neither": (2, lambda on: _invalid(_ignored(on))),
    "one class": (2, _one_class),
    "one image": (1, lambda on: on),
    "three images": (3, lambda on: on),
    "one colour": (2, _flat),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", NAMES)
def test_losses_and_parameters_stay_finite(name, case, build):
    count, change = CASES[case]
    method = build(name)
    for index in range(6):
        terms = train_step(method, index, change(batch(count, seed=index)))
        assert all(value.isfinite() for value in terms.values()), (index, terms)
    assert all(value.isfinite().all() for value in method.state_dict().values())


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trips_and_goes_on_bit_for_bit(name, build):
    one, two = build(name), build(name)
    for index in range(4):
        train_step(one, index)
    buffer = io.BytesIO()
    torch.save(one.state_dict(), buffer)
    buffer.seek(0)
    two.load_state_dict(torch.load(buffer, weights_only=True))
    for index in (4, 5):
        assert train_step(one, index) == train_step(two, index)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key]), key


@pytest.mark.parametrize("name", NAMES)
def test_predictor_is_the_first_network(name, build):
    method = build(name)
    for index in range(4):
        train_step(method, index)
    predictor = method.predictor().eval()
    image = views(2, masked=False).image
    with torch.no_grad():
        logits = predictor(image)
        first = next(iter(method.networks().values()))
        assert torch.equal(logits, first(image).logits)
    assert logits.shape[:2] == (2, CLASSES)
    assert logits.shape[2] <= SIZE
    assert logits.is_floating_point()


@pytest.mark.parametrize("name", NAMES)
def test_networks_share_no_storage_after_any_step(name, build):
    method = build(name)
    for index in range(4):
        train_step(method, index)
        places = [
            tensor.untyped_storage().data_ptr()
            for network in method.networks().values()
            for tensor in [*network.parameters(), *network.buffers()]
        ]
        assert len(set(places)) == len(places)


@pytest.mark.parametrize("name", NAMES)
def test_unlabeled_masks_are_not_looked_at(name, build):
    on = batch()
    assert on.unlabeled is not None
    masked = Batch(on.labeled, dataclasses.replace(on.unlabeled, mask=torch.zeros(2, SIZE, SIZE, dtype=torch.long)))
    torch.manual_seed(0)
    one = build(name)(on, step(5)).terms
    torch.manual_seed(0)
    assert build(name)(masked, step(5)).terms == one


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_a_batch_lacks(name, build):
    method, on = build(name), batch()
    lacking = [Batch(dataclasses.replace(on.labeled, mask=None), on.unlabeled)]
    if method.views.unlabeled:
        lacking.append(Batch(on.labeled, None))
    if method.views.strong:
        assert on.unlabeled is not None
        lacking.append(Batch(on.labeled, dataclasses.replace(on.unlabeled, strong=())))
    if method.views.pseudo:
        assert on.unlabeled is not None
        lacking.append(Batch(on.labeled, dataclasses.replace(on.unlabeled, pseudo=None)))
    for less in lacking:
        with pytest.raises(ValueError, match=r"needs labels|has masks"):
            method(less, step(0))


@pytest.mark.parametrize("name", NAMES)
def test_the_supervised_loss_falls(name, build):
    method, on = build(name), batch()
    losses = [float(train_step(method, index, on, lr=0.05)["supervised"]) for index in range(20)]
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_in_bfloat16(name, build):
    method = build(name)
    for index in (0, 5):
        with torch.autocast("cpu", torch.bfloat16):
            losses = method(batch(), step(index))
        total = torch.stack(list(losses.terms.values())).sum()
        total.backward()
        assert total.isfinite()
        assert total.dtype == torch.float32
