import pytest

from pipeline.config.parse import parse_yaml
from pipeline.errors import UserError


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "not valid YAML"),
        ("- a\n- b", "keys and values"),
        ("just words", "keys and values"),
        ("a: 1\nb: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("x: " + "[" * 5000, "nested too deeply"),
        ("a: &a [1, 1]\nb: *a", "aliases"),
        ("a: &a [*a]", "aliases"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
    ],
)
def test_what_is_no_config_is_refused(text, words):
    with pytest.raises(UserError, match=words) as error:
        parse_yaml(text, "file.yaml")
    assert str(error.value).startswith("file.yaml: ")
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_yaml_bomb_is_refused_at_once():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    with pytest.raises(UserError, match="aliases"):
        parse_yaml("\n".join([*lines, "split: *a11"]), "bomb")


def test_an_empty_file_changes_nothing():
    assert parse_yaml("", "file") == parse_yaml("# only a comment", "file") == {}
