"""What every method promises; a new one in `METHODS` is covered without a line here."""

import copy
import dataclasses
import io

import pytest
import torch
import torchvision

from pipeline.batch import Batch, Views
from pipeline.config.methods import OPTIONS, SPECS, check_frozen
from pipeline.errors import UserError
from pipeline.methods import METHODS, Losses, Method
from pipeline.models.norm import freeze_batchnorm
from pipeline.training.optim import Optimizer, build_optimizer
from tests.controls import HALVED, OFF
from tests.unit.methods.conftest import CLASSES, SIZE, batch, step, train_step, views

NAMES = sorted(METHODS)
STEPS = (0, 1, 2, 3, 19)
"""Before, at and after the end of U2PL's warm-up, and the last step of the run."""


def test_each_has_options_and_the_tables_have_one_order():
    assert list(METHODS) == list(OPTIONS)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_declared(name):
    assert METHODS[name].__module__.startswith("pipeline.methods.")
    assert dataclasses.is_dataclass(OPTIONS[name][name])
    assert OPTIONS[name][name].__doc__


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


@pytest.mark.parametrize("bands", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_on_images_of_any_number_of_bands(name, bands, build):
    """Bands that repeat the first one: what else a method makes of them has as many, too."""

    def repeated(side: Views) -> Views:
        image, *strong = (each[:, :1].repeat(1, bands, 1, 1) for each in (side.image, *side.strong))
        return dataclasses.replace(side, image=image, strong=tuple(strong))

    method = build(name, data={"mean": [100.0] * bands, "std": [60.0] * bands})
    for index in STEPS:
        on = batch(seed=index)
        assert on.unlabeled is not None
        terms = train_step(method, index, Batch(repeated(on.labeled), repeated(on.unlabeled)))
        assert all(value.isfinite() for value in terms.values())
    logits = method.predictor()(torch.zeros(1, bands, 40, 40, dtype=torch.uint8))
    assert logits.shape[:2] == (1, CLASSES)


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


JOINABLE = [name for name in NAMES if hasattr(OPTIONS[name][name], "batch_norm")]
"""Methods that may pass labeled and unlabeled images through the network in one batch or apart."""


def test_every_method_with_two_sides_says_how_they_share_batch_statistics():
    apart = {name for name in NAMES if SPECS[name].views.unlabeled} - set(JOINABLE)
    assert apart == {"u2pl_ael"}, "it has `ael`'s option"


@pytest.mark.parametrize("kind", ["joint", "separate"])
@pytest.mark.parametrize("name", [name for name in JOINABLE if name != "self_training"])
def test_the_labeled_loss_knows_unlabeled_images_by_joint_statistics_alone(name, kind, build):
    losses = []
    for seed in (0, 7):
        torch.manual_seed(0)
        on = Batch(batch(seed=0).labeled, batch(seed=seed).unlabeled)
        losses.append(build(name, batch_norm=kind)(on, step(5)).terms["supervised"].detach())
    assert torch.equal(*losses) == (kind == "separate")


def test_a_background_that_is_no_class_is_refused(build):
    with pytest.raises(UserError, match=r"data\.background 5: there are classes 0 to 4"):
        build("suponly", data={"background": "5"})


LOSSES = {
    "class weights": {"class_weights": [1.0, 0.5, 2.0, 1.0, 3.0]},
    "focal": {"focal": 2.0},
    "dice": {"dice": 0.5},
    "all": {"class_weights": [1.0, 0.5, 2.0, 1.0, 3.0], "focal": 1.0, "dice": 1.0},
    "ohem and dice": {"supervised": "ohem", "dice": 1.0},
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=list(LOSSES))
@pytest.mark.parametrize("name", ["suponly", "u2pl"])
def test_it_trains_with_other_supervised_losses(name, loss, build):
    plain, other = (build(name, aux=0.4, supervised=each) for each in ({}, loss))
    values = [float(method(batch(), step(0)).terms["supervised"].detach()) for method in (plain, other)]
    assert values[0] != values[1]
    first, *_, last = [train_step(other, index, batch(), lr=0.05)["supervised"] for index in range(12)]
    assert last < first
    assert other.state_dict().keys() == plain.state_dict().keys()


def test_class_weights_of_another_number_of_classes_are_refused(build):
    with pytest.raises(UserError, match=r"loss\.class_weights: 2 numbers for 5 classes; give one for each"):
        build("suponly", supervised={"class_weights": [1.0, 2.0]})


@pytest.mark.parametrize("name", OFF)
def test_with_its_unlabeled_side_switched_off_a_method_trains_as_suponly_does(name, build):
    """With statistics of its own for each side. Dropout is off: other passes before it would take its numbers."""
    quiet = {"dropout": 0.0}
    alone, other = build("suponly", model=quiet), build(name, model=quiet, batch_norm="separate", **OFF[name])
    student = other.trained()[0]
    student.load_state_dict(alone.student.state_dict(), strict=False)
    for index in range(5):
        train_step(alone, index, lr=0.01)
        train_step(other, index, lr=0.02 if name in HALVED else 0.01)
    mine = dict(student.named_parameters())
    for key, parameter in alone.student.named_parameters():
        torch.testing.assert_close(mine[key], parameter, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")


def test_frozen_statistics_stay_those_of_the_weights(tmp_path, build):
    torch.manual_seed(3)
    weights = torchvision.models.resnet18().state_dict()
    for key, value in weights.items():
        if "running_var" in key:
            value.uniform_(0.1, 0.9)
    torch.save(weights, tmp_path / "weights.pth")
    model = {"backbone": "resnet18", "weights": str(tmp_path / "weights.pth"), "width": 8}
    method = build("cutmix_seg", batch_norm="frozen", model=model)
    before = {name: value.clone() for name, value in method.student.state_dict().items()}
    for index in range(2):
        train_step(method, index)
        method.train()  # as after an evaluation
    moved = {name for name, value in method.student.state_dict().items() if not torch.equal(value, before[name])}
    assert not [name for name in moved if name.startswith("encoder.") and "running" in name]
    assert [name for name in moved if name.startswith("decoder.") and "running" in name]
    assert [name for name in moved if name.startswith("encoder.") and "bn" in name], "its scale and shift learn"
    with pytest.raises(UserError, match=r"cutmix_seg\.batch_norm frozen: model\.weights none brings no statistics"):
        check_frozen(build("cutmix_seg", batch_norm="frozen").config)
    check_frozen(method.config)


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


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_in_half_precision(name, precision, build):
    method = build(name)
    for index in (0, 5):
        with torch.autocast("cpu", precision):
            losses = method(batch(), step(index))
        total = torch.stack(list(losses.terms.values())).sum()
        total.backward()
        assert total.isfinite()
        assert total.dtype == torch.float32


# ---- other networks ---------------------------------------------------------------------------------------------

VIT = {"backbone": "vit_tiny"}
TIMM = {"backbone": "timm/resnet10t", "output_stride": 8, "width": 8}


def _adam(method: Method) -> Optimizer:
    return build_optimizer(method, dataclasses.replace(method.config.optim, optimizer="adamw", lr=1e-3))


def _optimised(method: Method, optimizer: Optimizer, on: Batch, indices: range) -> list[dict[str, torch.Tensor]]:
    """Steps as the trainer makes them; returns their loss terms."""
    found = []
    for index in indices:
        torch.manual_seed(index)
        terms = method(on, step(index)).terms
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
        method.after_step(step(index))
        found.append({name: value.detach() for name, value in terms.items()})
    return found


@pytest.mark.parametrize("model", [VIT, TIMM], ids=["vit", "timm"])
@pytest.mark.parametrize("name", NAMES)
def test_it_trains_other_networks_and_goes_on_bit_for_bit(name, model, build):
    """20 steps; state, without which no resume is exact, is carried over in between, and bf16 gives a finite loss."""
    if model is TIMM:
        pytest.importorskip("timm")
    method, on = build(name, model=model), batch()
    optimizer = _adam(method)
    terms = _optimised(method, optimizer, on, range(16))
    other = build(name, model=model)
    other.load_state_dict(method.state_dict())
    resumed = _adam(other)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    last = _optimised(method, optimizer, on, range(16, 20))
    assert last == _optimised(other, resumed, on, range(16, 20))
    assert all(value.isfinite() for each in terms + last for value in each.values())
    assert last[-1]["supervised"] < 0.9 * terms[0]["supervised"]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.stack(list(method(on, step(5)).terms.values())).sum().isfinite()


@pytest.mark.parametrize("index", STEPS)
@pytest.mark.parametrize("name", NAMES)
def test_every_step_gives_every_parameter_of_a_transformer_a_gradient(name, index, build):
    method = build(name, model=VIT, aux=0.4)
    torch.stack(list(method(batch(), step(index)).terms.values())).sum().backward()
    assert [key for key, each in method.named_parameters() if (each.grad is None) == each.requires_grad] == []


# ---- micro-batches ----------------------------------------------------------------------------------------------


def _passed(method: Method) -> tuple[Losses, dict[str, torch.Tensor]]:
    """Losses and gradients of a step of four and four images; no batch norm looks at the others of a batch."""
    freeze_batchnorm(method)
    losses = method(batch(4), step(5))
    torch.stack(list(losses.terms.values())).sum().backward()
    return losses, {key: p.grad for key, p in method.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_have_the_losses_the_gradients_and_the_state_of_one_pass(name, build):
    """Thresholds, normalisers, draws and memory banks are those of all images."""
    whole, parts = build(name), build(name, optim={"accumulate": 2})
    (losses, gradients), (others, sums) = _passed(whole), _passed(parts)
    torch.testing.assert_close(others.terms, losses.terms, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(others.logs, losses.logs, rtol=1e-5, atol=1e-6)
    assert sums.keys() == gradients.keys()
    for key, gradient in gradients.items():
        torch.testing.assert_close(sums[key], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))
    torch.testing.assert_close(parts.state_dict(), whole.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_it_trains_in_micro_batches(name, build):
    method, on = build(name, optim={"accumulate": 2}), batch(4)
    losses = [float(train_step(method, index, on, lr=0.05)["supervised"]) for index in range(20)]
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("name", NAMES)
def test_what_it_makes_of_pixels_fits_them(name, build):
    """Which pixels are reliable and why, each method's own tests say."""
    method = build(name)
    found, stored = method.partition(3 * torch.randn(50, CLASSES), step(5)), method.stored_keys()
    if found is not None:
        assert (found.reliable.dtype, found.reliable.shape) == (torch.bool, (50,))
    if found is not None and found.negative is not None:
        assert (found.negative.dtype, found.negative.shape) == (torch.bool, (50, CLASSES))
    assert stored is None or len(stored) == CLASSES


@pytest.mark.parametrize("name", ["fixmatch", "unimatch", "unimatch_v2"])
def test_confident_pixels_are_reliable(name, build):
    logits = 3 * torch.randn(200, CLASSES)
    found = build(name, threshold=0.8).partition(logits, step(5))
    assert found.reliable.equal((logits.softmax(1) >= 0.8).any(1))
    assert 0 < found.reliable.sum() < 200
