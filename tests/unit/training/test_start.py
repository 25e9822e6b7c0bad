"""Runs that begin with the network of another one."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline import checkpoint, storage
from pipeline.checkpoint import Progress
from pipeline.config.cli import resolve
from pipeline.config.schema import Config, to_yaml
from pipeline.errors import UserError
from pipeline.inference.export import export
from pipeline.inference.load import load_model
from pipeline.inference.logits import whole
from pipeline.methods import OPTIONS, Method, Predictor, build_method
from pipeline.sweep.trials import Trial, make_trials
from pipeline.training import preflight
from pipeline.training.runtime import PlainRuntime
from pipeline.training.start import begin_with, find_start
from pipeline.training.trainer import Trainer, train
from tests.networks import train_briefly

PIXELS = torch.randint(0, 256, (1, 3, 40, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
ABOUT = {"palette": [[0, 0, 0]] * 3, "evaluation": "whole"}
SOURCE_CLASSES = ("sky", "road", "car")


@pytest.fixture(scope="module")
def source(shapes, tmp_path_factory) -> str:
    """A checkpoint that was trained on the shapes."""
    return train_briefly(shapes, str(tmp_path_factory.mktemp("source") / "run"))


def configured(data: str, out: Path | str, weights: str, method: str = "suponly", **sections: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "data": {"root": data, "crop": [32, 32], "background": "0"},
        "model": {"backbone": "tiny", "weights": weights, "feature_dim": 8},
        "optim": {"steps": 2, "batch_labeled": 2, "batch_unlabeled": 2},
        "run": {"tensorboard": False},
    }
    for name, section in sections.items():
        values[name] = {**values.get(name, {}), **section}
    return resolve({"method": method, "split": "1_4", "out": str(out), **values}, OPTIONS)


def logits(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return whole(network.eval(), PIXELS)


def made(folder: Path, classes: tuple[str, ...] = SOURCE_CLASSES, method: str = "suponly", **model: Any) -> str:
    """A checkpoint of a network as it is drawn."""
    values = {"method": method, "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8, **model}}
    config = resolve(values, OPTIONS)
    torch.manual_seed(5)
    state = build_method(config, len(classes)).state_dict()
    folder.mkdir(parents=True)
    data = {"index": "i", "split": "s", "classes": list(classes)}
    checkpoint.save(folder, config, data, ABOUT, Progress(1), method=state, optimizer={})
    return str(folder)


def fresh(method: str, classes: int, **options: Any) -> Method:
    torch.manual_seed(6)
    values = {"method": method, "model": {"backbone": "tiny", "weights": "none", "feature_dim": 8}}
    return build_method(resolve({**values, **options}, OPTIONS), classes)


@pytest.mark.parametrize("method", ["suponly", "u2pl", "mean_teacher"])
def test_with_the_same_classes_it_sees_what_the_source_sees(shapes, source, tmp_path, method, caplog):
    config = configured(shapes, tmp_path, source, method, u2pl={"warmup": 1})
    with caplog.at_level(logging.INFO):
        trainer = Trainer(config, PlainRuntime(str(tmp_path)))
    expected = logits(load_model(source).network)
    for name, network in trainer.method.networks().items():
        assert torch.equal(logits(Predictor(network)), expected), name
    anew = "; drawn anew: the representation head" if method == "u2pl" else ""
    classes = len(trainer.dataset.info.classes)
    assert f"beginning with the network of {source}: all {classes} classes taken{anew}\n" in caplog.text + "\n"
    assert "from scratch" not in caplog.text
    trainer.loader.close()


def test_an_export_is_a_start_and_a_run_is_its_newest_checkpoint(source, tmp_path):
    export(source, str(tmp_path / "model"), "safetensors")
    file = str(tmp_path / "model" / "model.safetensors")
    run = source.rpartition("/")[0]
    for named, place in ((str(tmp_path / "model"), file), (file, file), (run, source), (source, source)):
        assert find_start(named) == place
        classes = load_model(source).classes
        method = fresh("suponly", len(classes))
        begin_with(method, configured("", "", "none").model, place, classes)
        assert torch.equal(logits(method.predictor()), logits(load_model(source).network))
    for built_in in ("none", "torchvision"):
        assert find_start(built_in) is None


def test_rows_of_the_last_layer_go_by_the_names_of_the_classes(tmp_path):
    place = made(tmp_path / "c")
    method, drawn = fresh("mean_teacher", 4), fresh("mean_teacher", 4)
    model = configured("", "", "none").model
    said = begin_with(method, model, place, ("car", "tree", "sky", "person"))
    assert said == f"beginning with the network of {place}: car, sky taken; drawn anew: tree, person"
    theirs = load_model(place).network.state_dict()
    for name in ("teacher", "student"):
        mine, before = method.networks()[name].state_dict(), drawn.networks()[name].state_dict()
        for kind in ("weight", "bias"):
            rows = mine[f"decoder.classifier.{kind}"]
            old = theirs[f"model.decoder.classifier.{kind}"]
            assert torch.equal(rows[[0, 2]], old[[2, 0]])
            assert torch.equal(rows[[1, 3]], before[f"decoder.classifier.{kind}"][[1, 3]])
        others = [key for key in mine if not key.startswith("decoder.classifier.")]
        assert len(others) > 50
        assert all(torch.equal(mine[key], theirs[f"model.{key}"]) for key in others)
        assert not torch.equal(mine["encoder.low.0.0.weight"], before["encoder.low.0.0.weight"])


def test_the_heads_of_deeplab_go_by_names_too(tmp_path):
    shape = {"backbone": "resnet18", "width": 8}
    values = {"method": "suponly", "model": {**shape, "weights": "none"}, "loss": {"aux_weight": 0.4}}
    config = resolve(values, OPTIONS)
    torch.manual_seed(5)
    before = build_method(config, 3)
    data = {"index": "i", "split": "s", "classes": list(SOURCE_CLASSES)}
    checkpoint.save(tmp_path, config, data, ABOUT, Progress(1), method=before.state_dict(), optimizer={})
    torch.manual_seed(6)
    method = build_method(config, 2)
    drawn = {key: value.clone() for key, value in method.state_dict().items()}
    said = begin_with(method, config.model, str(tmp_path), ("water", "road"))
    assert said.endswith(": road taken; drawn anew: water")
    theirs, mine = before.state_dict(), method.state_dict()
    by_class = {key for key in mine if len(mine[key].shape) and mine[key].shape != theirs[key].shape}
    assert by_class == {
        f"student.decoder.{layer}.{kind}" for layer in ("classifier.4", "auxiliary.2") for kind in ("weight", "bias")
    }
    for key, value in mine.items():
        if key in by_class:
            assert torch.equal(value[1], theirs[key][1])
            assert torch.equal(value[0], drawn[key][0])
        else:
            assert torch.equal(value, theirs[key]), key


def test_of_two_networks_the_second_takes_the_encoder_alone(tmp_path):
    """As equals they would never contradict each other."""
    place = made(tmp_path / "c")
    method = fresh("cps", 3)
    begin_with(method, configured("", "", "none").model, place, SOURCE_CLASSES)
    first, second = (network.state_dict() for network in method.networks().values())
    for key, value in load_model(place).network.state_dict().items():
        key = key.removeprefix("model.")
        assert torch.equal(first[key], value)
        if key.startswith("encoder."):
            assert torch.equal(second[key], value)
    for layer in ("high.0", "mid.0", "classifier"):
        assert not torch.equal(first[f"decoder.{layer}.weight"], second[f"decoder.{layer}.weight"])


def test_another_architecture_is_refused_in_one_line(tmp_path):
    model = configured("", "", "none").model
    place = made(tmp_path / "c", method="u2pl")
    for changed, words in (
        ({"backbone": "resnet18"}, "has model.backbone tiny, this run resnet18; pass --model.backbone tiny, or other"),
        ({"output_stride": 16}, "has model.output_stride 8, this run 16; pass --model.output_stride 8"),
        ({"width": 64}, "has model.width 256, this run 64"),
        ({"feature_dim": 16}, "has model.feature_dim 8, this run 16"),
    ):
        with pytest.raises(UserError, match=words) as told:
            begin_with(fresh("u2pl", 3, u2pl={"warmup": 1}), replace(model, **changed), place, SOURCE_CLASSES)
        assert str(told.value).startswith(f"model.weights {place}: ")


def test_values_that_are_not_finite_are_refused(tmp_path):
    place = made(tmp_path / "c")
    export(place, str(tmp_path), "safetensors")
    file = tmp_path / "model.safetensors"
    state, header = load_file(file), file.read_bytes()
    known = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])["__metadata__"]
    state["model.encoder.low.0.0.weight"][0] = torch.nan
    save_file(state, file, known)
    with pytest.raises(UserError, match=r"model\.safetensors: encoder\.low\.0\.0\.weight holds values that are not"):
        begin_with(fresh("suponly", 3), configured("", "", "none").model, str(file), SOURCE_CLASSES)


def test_a_safetensors_file_of_others_holds_an_encoder(tmp_path):
    save_file({"conv1.weight": torch.zeros(1)}, tmp_path / "encoder.safetensors")
    assert find_start(str(tmp_path / "encoder.safetensors")) is None


def test_what_is_no_network_is_one_line_before_any_worker(shapes, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("no run")
    (tmp_path / "half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name, words in (
        ("gone", "gone: no such file or run; name one, or torchvision, or none"),
        ("empty", "empty: no such file or run"),
        ("other", "other: no checkpoint there"),
        ("half.safetensors", "half.safetensors: damaged, or no export of this version"),
        ("gone.safetensors", "gone.safetensors: not found"),
    ):
        with pytest.raises(UserError, match=words):
            preflight.resolve(configured(shapes, tmp_path / "run", str(tmp_path / name)))
    wrong = configured(shapes, tmp_path / "run", made(tmp_path / "c"), model={"output_stride": 16})
    with pytest.raises(UserError, match=r"has model\.output_stride 8, this run 16"):
        preflight.resolve(wrong)


def begun(config: Config) -> Config:
    """As `launch` does it, without Ray: the config that lands in the run directory, and its steps."""
    config = preflight.resolve(config).config
    preflight.check_identity(config)
    storage.write_bytes(storage.join(str(config.out), checkpoint.CONFIG_FILE), to_yaml(config).encode())
    train(config, PlainRuntime(str(config.out)))
    return config


def test_a_run_keeps_the_checkpoint_that_it_began_with_and_reads_it_once(root, shapes, source, tmp_path, caplog):
    """On a disk and through S3: the source trains on, and then goes away."""
    other, out = storage.join(root, "source"), storage.join(root, "run")
    names = ("state.pt", "checkpoint.json")
    for step in (60, 70):
        for name in names:
            data = storage.read_bytes(storage.join(source, name))
            storage.write_bytes(storage.join(other, checkpoint.name(step), name), data)
        config = configured(shapes, out, other, optim={"steps": 2}, eval={"every": 1})
        with caplog.at_level(logging.INFO):
            config = begun(config)
        assert "from scratch" not in caplog.text
        assert config.model.weights == storage.join(other, checkpoint.name(60))
    assert caplog.text.count("beginning with the network") == 1
    assert checkpoint.read_meta(checkpoint.find(out)).config["model"]["weights"] == config.model.weights
    storage.delete(other)
    storage.delete(storage.join(out, checkpoint.CONFIG_FILE))  # then the checkpoints say it
    assert begun(configured(shapes, out, other, eval={"every": 1})) == config
    with pytest.raises(UserError, match=r"model\.weights \S+step_0000060 instead of"):
        preflight.check_identity(preflight.resolve(configured(shapes, out, f"{other}/{checkpoint.name(70)}")).config)
    with pytest.raises(UserError, match="no such file or run"):
        preflight.resolve(config, fresh=True)


def test_trials_of_a_sweep_begin_with_the_same(shapes, source, tmp_path):
    run = tmp_path / "source"
    shutil.copytree(source, run / checkpoint.name(60))

    def trials() -> list[Trial]:
        base = {
            "data": {"root": shapes}, "out": str(tmp_path / "sweep"),
            "model": {"backbone": "tiny", "feature_dim": 8, "weights": str(run)},
            "optim": {"batch_labeled": 4}, "u2pl": {"warmup": 1},
        }  # fmt: skip
        return make_trials(base, ["suponly", "u2pl"], ["1_4"], 1, {})

    _, second = trials()
    storage.write_bytes(f"{second.out}/config.yaml", to_yaml(second.config).encode())
    shutil.copytree(source, run / checkpoint.name(70))
    assert [trial.config.model.weights for trial in trials()] == [str(run / checkpoint.name(60))] * 2
