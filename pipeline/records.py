"""JSON that this program has written and reads again: one typed reader, as files come back damaged or from others."""

from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")


def read_record(kind: type[T], text: bytes | str) -> T:
    """Reads a JSON text as a value of the type `kind`.

    Args:
        kind: a dataclass, or another type that pydantic knows; keys that it does not know are left out.
        text: UTF-8.

    Raises:
        ValueError: no JSON, a key is missing, or a value is of another type; one line that names the key.
    """
    from pydantic import ValidationError

    try:
        return _adapter(kind).validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error


@lru_cache(maxsize=64)
def _adapter(kind: type[Any]) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
