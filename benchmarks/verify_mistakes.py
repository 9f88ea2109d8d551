"""What `potamos verify` says of mistakes that parallel trainers have made, planted one at a time.

Each is a control of tests/parallel/test_controls.py, which has the code of it. A row holds the layout, the verdict, the
largest errors and the first words of the refusal; an honest run of the same layout stands above.

    python benchmarks/verify_mistakes.py [--out benchmarks/results/verify_mistakes.csv]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from machine import load_from_tests, stamp, write_table

RESULTS = Path(__file__).parent / "results" / "verify_mistakes.csv"


def judged(controls: ModuleType, control: Any, *, planted: bool) -> dict[str, Any]:
    """The certificate of a control's layout as a row, with its mistake or without."""
    with pytest.MonkeyPatch.context() as patch:
        controls.register_systems(patch)
        controls.definition(controls.small(control.words, control.changes), "fp64")  # by an honest process
        if planted:
            control.mistake(patch)
        found = controls.certify(control.words, control.changes)
    lines = [line for line in found.lines if line.exempt is None]
    return {
        "mistake": control.mistake.__name__.replace("_", " ") if planted else "none",
        "layout": control.words,
        "verdict": "PASS" if found.passed else "FAIL",
        "gradient_error": f"{max(line.gradient_error for line in lines):.1e}",
        "norm_error": f"{found.norms.error:.1e}",
        "update_error": f"{max(line.update_error for line in lines):.1e}",
        "loss_error": f"{found.losses.error:.1e}",
        "first_words": found.failures[0] if found.failures else "",
        **stamp(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args()
    controls, rows, seen = load_from_tests("parallel_controls", "parallel/test_controls.py"), [], set()
    for control in controls.CONTROLS:
        if (control.words, control.changes) not in seen:
            seen.add((control.words, control.changes))
            rows.append(judged(controls, control, planted=False))
        rows.append(judged(controls, control, planted=True))
        print(*(rows[-1][key] for key in ("verdict", "layout", "mistake", "first_words")), sep=" | ", flush=True)
    write_table(chosen.out, rows)


if __name__ == "__main__":
    main()
