"""The jobs as modules: they are scripts, not a package."""

import importlib.util
from pathlib import Path
from types import ModuleType

JOBS = Path(__file__).parents[1] / "jobs"


def load(name: str) -> ModuleType:
    """The module of jobs/NAME.py."""
    spec = importlib.util.spec_from_file_location(f"job_{name}", JOBS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
