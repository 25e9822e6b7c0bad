"""Runs a command of the package that lies beside this folder, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pipeline.__main__ import run

__all__ = ["run"]
