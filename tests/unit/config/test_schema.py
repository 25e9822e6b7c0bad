import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, Literal

import pytest
import yaml

from pipeline.config import schema as configs
from pipeline.config.cli import field_docs, resolve
from pipeline.config.options import U2PLOptions
from pipeline.config.parse import convert, parse_yaml
from pipeline.config.schema import as_dict, identity, merge, presets, to_yaml
from pipeline.errors import UserError
from pipeline.methods import OPTIONS

SECTIONS = [kind for _, kind in inspect.getmembers(configs, inspect.isclass) if dataclasses.is_dataclass(kind)]


def _one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


# ---- YAML -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["1_2", "1_4", "1_8", "1_16", "full", "012", "1e3"])
def test_a_split_survives_yaml_unquoted(split):
    """To YAML 1.1 and to int(), `1_2` is the number 12."""
    assert yaml.safe_load("split: 1_2")["split"] == 12
    values = parse_yaml(f"split: {split}", "file")
    assert resolve(values, OPTIONS).split == split


def test_round_trips():
    config = resolve({"split": "1_2", "data": {"crop": [65, 33], "scale": "0.5,1.5"}, "optim": {"lr": "3e-3"}}, OPTIONS)
    assert resolve(parse_yaml(to_yaml(config), "text"), OPTIONS) == config
    assert resolve(as_dict(config), OPTIONS) == config
    assert yaml.safe_load(to_yaml(config))["split"] == "1_2"  # quoted for readers of YAML 1.1
    assert config.data.crop == (65, 33)
    assert config.optim.lr == 0.003


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no UTF-8 text"):
        configs.read_file(str(tmp_path / "c.yaml"))


# ---- types ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "value", "expected"),
    [
        (int, "7", 7),
        (int, 7, 7),
        (float, "1e-3", 0.001),
        (float, 2, 2.0),
        (bool, "true", True),
        (bool, False, False),
        (str, "1_2", "1_2"),
        (str | None, "none", None),
        (str | None, None, None),
        (str | None, "x", "x"),
        (Literal[8, 16], "16", 16),
        (Literal["a", "b"], "b", "b"),
        (tuple[int, int], "5,6", (5, 6)),
        (tuple[int, int], "5x6", (5, 6)),
        (tuple[float, float], [0.5, "2"], (0.5, 2.0)),
        (tuple[str, ...], ["s3://x/a,b", "c"], ("s3://x/a,b", "c")),
        (tuple[str, ...], "s3://x", ("s3://x",)),
        (tuple[float, ...], "1,0.5,2", (1.0, 0.5, 2.0)),
        (tuple[int, ...], [], ()),
    ],
)
def test_values_become_what_the_field_says(hint, value, expected):
    found = convert(hint, value, "field")
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (int, "1_2"), (int, "1.5"), (int, "x"), (int, None), (int, True), (int, [1]), (int, -1), (int, ""),
        (float, "1_0.5"), (float, "nan"), (float, "inf"), (float, -0.1), (float, {"a": 1}), (float, None),
        (bool, "maybe"), (bool, 1), (bool, None),
        (str, None), (str, ["a"]), (str, {"a": 1}), (str | None, ["a"]),
        (Literal[8, 16], 12), (Literal["a", "b"], None),
        (tuple[int, int], "5"), (tuple[int, int], [1, 2, 3]), (tuple[int, int], 5), (tuple[int, int], "a,b"),
        (tuple[int, ...], ["a"]), (tuple[float, ...], [-1]), (tuple[str, ...], {"a": 1}), (tuple[str, ...], None),
    ],
)  # fmt: skip
def test_wrong_types_are_refused_by_name(hint, value):
    with pytest.raises(UserError, match=r"^field: ") as error:
        convert(hint, value, "field")
    _one_line(error)


@pytest.mark.parametrize(
    "path",
    [
        "optim.steps", "optim.batch_labeled", "optim.batch_unlabeled", "run.log_every", "run.checkpoint_every",
        "eval.every", "eval.scale", "model.width", "u2pl.r_l", "u2pl.queue", "u2pl.keys", "u2pl.temperature",
    ],
)  # fmt: skip
def test_what_must_be_positive_is(path):
    section, _, name = path.partition(".")
    with pytest.raises(UserError, match=f"^{path}: must be above 0, got 0"):
        resolve({section: {name: 0}}, OPTIONS)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"data": {"crop": [0, 5]}}, "data.crop: must be above 0"),
        ({"data": {"scale": [2, 1]}}, "smaller and the larger"),
        ({"data": {"hue": 0.6}}, "data.hue: must be between 0 and 0.5"),
        ({"data": {"unlabeled_pools": ["a", "a"]}}, "named twice"),
        ({"data": {"unlabeled_pools": ["a"], "pool_weights": [1]}}, "data.pool_weights: must be 2 numbers"),
        ({"data": {"unlabeled_pools": ["a"], "pool_weights": [1, 0]}}, "above 0"),
        ({"data": {"unlabeled_pools": ["a"], "pool_generations": [1, 1]}}, "one for each of 1 pools"),
        ({"data": {"unlabeled_pools": ["a"], "pool_generations": [0]}}, "data.pool_generations: must be above 0"),
        ({"model": {"dropout": 1.5}}, "model.dropout: must be between 0 and 1"),
        ({"u2pl": {"alpha_0": 1.5}}, "u2pl.alpha_0: must be between 0 and 1"),
        ({"u2pl": {"r_l": 3, "r_h": 3}}, "u2pl.r_l 3: must be below u2pl.r_h 3"),
    ],
)
def test_values_that_make_no_sense(values, words):
    with pytest.raises(UserError, match=words):
        resolve(values, OPTIONS)


# ---- sections -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optm": {}}, "'optm'; did you mean optim?"),
        ({"optim": {"lrr": 1}}, "'optim.lrr'; did you mean lr?"),
        ({"method": "u2pI"}, "method 'u2pI'; did you mean u2pl?"),
        ({"u2pl": {"lamda_c": 1}}, "'u2pl.lamda_c'; did you mean lambda_c?"),
        ({"methods": {"u2pl": {}}}, "methods: written by an older version"),
        ({"model": {"backbone": "resnet11"}}, "'resnet11' is not known; did you mean resnet101?"),
        ({"zzz": 1}, "'zzz'; choose from method, split"),
        ({"data": 5}, "data: expected keys and values, got 5"),
        ({"u2pl": 5}, "u2pl: expected keys and values, got 5"),
        ({"options": {"u2pl": {}}}, "unknown key 'options'"),
        ({"method": "cps", "u2pl": {"lamda_c": 1}}, "'u2pl.lamda_c'; did you mean lambda_c?"),
        ({"split": {"a": 1}}, "split: expected a text"),
    ],
)
def test_mistakes_name_the_nearest(values: dict[str, Any], words: str):
    with pytest.raises(UserError) as error:
        resolve(values, OPTIONS)
    assert words in _one_line(error)


@pytest.mark.parametrize("values", [{"data": None}, {"u2pl": None}, {"cps": None}])
def test_an_empty_section_holds_the_defaults(values):
    assert resolve(values, OPTIONS) == resolve({}, OPTIONS)


def test_a_config_has_the_options_of_its_method_alone():
    values = {"u2pl": {"lambda_c": "0.5"}, "ael": {"depth": 2}, "cps": {"cutmix": False}}
    of = {name: resolve({"method": name, **values}, OPTIONS) for name in ("suponly", "u2pl", "u2pl_ael")}
    assert {name: [*config.options] for name, config in of.items()} == {
        "suponly": ["suponly"], "u2pl": ["u2pl"], "u2pl_ael": ["u2pl_ael", "ael", "u2pl"]
    }  # fmt: skip
    assert of["u2pl"].options_of(U2PLOptions) == U2PLOptions(lambda_c=0.5)
    assert (of["u2pl_ael"].options["u2pl"].lambda_c, of["u2pl_ael"].options["ael"].depth) == (0.5, 2)
    assert identity(of["suponly"]) == identity(resolve({"method": "suponly"}, OPTIONS)), "nothing of other methods"
    assert as_dict(of["u2pl"]).keys() >= {"data", "u2pl"}
    assert not as_dict(of["u2pl"]).keys() & {"cps", "ael", "options"}
    with pytest.raises(KeyError, match="suponly has no U2PLOptions"):
        of["suponly"].options_of(U2PLOptions)


def test_merge():
    base = {"a": {"x": 1, "y": 2}, "b": 3, "c": 4}
    assert merge(base, {"a": {"y": 5}, "b": None}) == {"a": {"x": 1, "y": 5}, "b": None, "c": 4}
    assert merge(base, {"a": None}) == base
    assert base["a"] == {"x": 1, "y": 2}
    with pytest.raises(UserError, match="a: expected keys and values, got 7"):
        merge(base, {"a": 7})


# ---- what ships -----------------------------------------------------------------------------------------------


def test_presets_are_there():
    assert {"demo", "camvid", "voc_classic", "voc_blender", "cityscapes"} <= set(presets())
    with pytest.raises(UserError, match=r"unknown preset .voc_clasic.; did you mean voc_classic\?"):
        configs.read_preset("voc_clasic")


@pytest.mark.parametrize("name", presets())
def test_every_preset_resolves(name):
    config = resolve(configs.read_preset(name), OPTIONS)
    assert config.method in OPTIONS
    assert resolve(parse_yaml(to_yaml(config), name), OPTIONS) == config


@pytest.mark.parametrize(
    "kind", [*SECTIONS, *(OPTIONS[name][name] for name in OPTIONS)], ids=lambda kind: kind.__name__
)
def test_every_field_is_documented(kind):
    assert inspect.getdoc(kind)
    fields = {f.name for f in dataclasses.fields(kind) if not dataclasses.is_dataclass(f.default_factory)}
    assert field_docs(kind).keys() == fields


@dataclass
class Example:
    """Of the class."""

    a: int = 1
    """Of a,
    on two lines."""
    b: int = 2
    c: int = 3
    """Of c."""


def test_field_docs_belong_to_the_field_above():
    assert field_docs(Example) == {"a": "Of a, on two lines.", "c": "Of c."}


def test_identity_leaves_out_place_and_machines():
    base = resolve({}, OPTIONS)
    elsewhere = dataclasses.replace(base, out="x", scaling=dataclasses.replace(base.scaling, workers="3"))
    assert identity(base) == identity(elsewhere)
    assert identity(base) == identity(resolve({"model": {"checkpoint_activations": True}}, OPTIONS))
    assert identity(base) != identity(dataclasses.replace(base, seed=1))
    assert identity(base) != identity(resolve({"u2pl": {"lambda_c": 0.5}}, OPTIONS))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        ({"focal": -1.0}, r"loss\.focal: expected a number from 0 on, got -1\.0"),
        ({"class_weights": [1.0, -2.0]}, r"loss\.class_weights: expected a number from 0 on, got -2\.0"),
        ({"class_weights": [0.0, 0.0]}, r"loss\.class_weights .*: at least one must be above 0"),
        ({"supervised": "ohem", "focal": 2.0}, r"loss\.focal: loss\.supervised ohem picks its pixels itself"),
    ],
)
def test_supervised_losses_that_make_no_sense_are_refused(loss, words):
    with pytest.raises(UserError, match=words):
        resolve({"method": "suponly", "loss": loss}, OPTIONS)
