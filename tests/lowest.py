"""Prints the lowest versions that pyproject.toml allows, for pip; torch's is left out."""

import tomllib
from pathlib import Path

project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
bounds = [d.replace(">=", "==") for d in project["dependencies"] if ">=" in d]
print(*(b for b in bounds if not b.startswith("torch")))
