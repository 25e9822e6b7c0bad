"""YAML as people mean it: PyYAML's reader without the conversions of YAML 1.1 that spoil names of splits."""

from typing import Any

import yaml

from pipeline.errors import UserError

MAX_YAML_BYTES = 1 << 20


class _Yaml12Loader(yaml.SafeLoader):
    """YAML 1.1 reads the unquoted `1_2` as the integer 12; as YAML 1.2 does, this loader reads it as a string."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Refuses aliases: a few lines of them can stand for gigabytes."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"aliases like *{self.peek_event().anchor} are not allowed")
        return super().compose_node(parent, index)


_Yaml12Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.rpartition(":")[2] in ("bool", "null")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Reads a YAML mapping; numbers stay strings until a field says what they are, so `1_2` stays a split.

    Raises:
        UserError: not YAML, not a mapping, or larger than 1 MiB.
    """
    if len(text) > MAX_YAML_BYTES:
        raise UserError(f"{where}: larger than 1 MiB; this is no config file")
    try:
        values = yaml.load(text, Loader=_Yaml12Loader)
    except yaml.YAMLError as error:
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{where}: nested too deeply; this is no config file") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: expected keys and values at the top")
    return values
