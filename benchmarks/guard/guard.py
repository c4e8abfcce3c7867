"""Does an operator cost more than when it was last recorded? Counts, not times: they repeat.

``python benchmarks/guard/guard.py`` compares with benchmarks/guard/*.json within 3 %;
``--record`` writes these files anew, to be committed with the change that explains them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping

from measures import ROOT, Instructions, Missing, Registers

from beft_ext.files import whole_file

TOLERANCE = 0.03
MEASURES = {"instructions": Instructions, "registers": Registers}
FOLDER = ROOT / "benchmarks" / "guard"
ANEW = "record anew with 'python benchmarks/guard/guard.py --record'"


def differences(recorded: Mapping[str, int], found: Mapping[str, int]) -> list[str]:
    """A line for each count that is new, gone, or off by more than TOLERANCE."""
    lines = []
    for name in sorted(recorded.keys() | found.keys()):
        if name not in found or name not in recorded:
            lines.append(f"{name}: {'gone' if name in recorded else 'not recorded yet'}")
            continue
        was, now = recorded[name], found[name]
        if abs(now - was) > TOLERANCE * was:
            change = f", {(now - was) / was:+.1%}" if was else ""
            lines.append(f"{name}: {was:,} recorded, {now:,} now{change}")
    return lines


def check(name: str) -> list[str]:
    """What is wrong, a line each; prints why where nothing can be compared here."""
    recorded = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    versions = MEASURES[name].versions()
    if versions != recorded["versions"]:
        raise Missing(f"recorded with {recorded['versions']}, here is {versions}")
    found = MEASURES[name].counts()
    lines = differences(recorded["counts"], found)
    if not lines:
        print(f"guard: {name}: {len(found)} counts within {TOLERANCE:.0%} of the record")
    return lines


def record(name: str) -> list[str]:
    kept = {"versions": MEASURES[name].versions(), "counts": MEASURES[name].counts()}
    with whole_file(FOLDER / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    print(f"guard: {name}: {len(kept['counts'])} counts recorded")
    return []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true", help="write the counts, compare nothing")
    run = record if parser.parse_args().record else check
    wrong: list[str] = []
    for name in MEASURES:
        try:
            wrong += run(name)
        except Missing as reason:
            print(f"guard: {name}: skipped, {reason}")
    for line in wrong:
        print(f"guard: {line}", file=sys.stderr)
    if wrong:
        print(f"guard: where the change is meant, {ANEW} and commit it", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
