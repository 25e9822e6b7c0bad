"""Runs on a host and looks at the storage for the tests, which cannot reach it: a request a line, an answer a line."""

import base64
import json
import sys

from pipeline import storage
from tests.s3 import is_ready


def answer(do: str, uri: str) -> object:
    if do == "ready":
        return is_ready(uri)
    if do == "list":
        return storage.list_files(uri)
    return base64.b64encode(storage.read_bytes(uri)).decode() if storage.exists(uri) else None


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(answer(**json.loads(line))), flush=True)
