"""Writes the table of implementations (`kernels/jaxre_kernels/table.json`) from a run on this
machine's accelerator.

    python tools/tune_kernels.py --out runs/tune
        # measures, within 9 minutes, and writes the table
    python tools/tune_kernels.py --from runs/tune/hardware_check.json
        # writes it from what was measured before
    python tools/tune_kernels.py --only attention --table new.json
        # the table with this op's entries, into another file

Measuring is `hardware_check --sweep` on the kernels: every implementation, with every tile size
that its dispatch lists. For each case the fastest gets an entry if it was right in every check of
its dtype and at that size, and if even its slowest round was faster than any of "xla" as it runs
without a table. A case where nothing was loses the entry it had. Arrays that no case stands for get
none. Where jaxre is not installed, PYTHONPATH=.:kernels.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hardware_check import OPS, arguments, parts_of, run_all, stopped
from jaxre_kernels.implementations import TABLE, Entry, checked, read_table, write_table

LEAST_GAIN = 1.03  # a smaller one is not worth an entry


def entries_of(found: dict[str, Any]) -> Iterator[tuple[Entry, bool]]:
    """For each case that was timed: the entry of the fastest that was right, and whether it is
    faster than "xla" without a table.
    """
    for op in OPS:
        cases: dict[tuple[str, str], list[dict]] = {}
        for one in found["sections"].get(f"time {op}", {"records": []})["records"]:
            if one.get("covers") and one["implementation"]:
                cases.setdefault((one["case"], one["dtype"]), []).append(one)
        for (_, dtype), timed in cases.items():
            plain = next((one for one in timed if one["variant"] == "xla"), None)
            if plain is None:
                continue
            right = [
                one
                for one in timed
                if one["passed"] and checks_passed(found, op, one["implementation"], dtype)
            ]
            best = min(right or [plain], key=lambda one: one["seconds"])
            gain = plain["seconds"] / best["seconds"]
            entry = Entry(
                op=op,
                device_kind=found["device"]["kind"],
                dtype=dtype,
                sizes={name: (low, high) for name, (low, high) in best["covers"].items()},
                implementation=best["implementation"],
                tiles=best["tiles"],
                date=found["date"][:10],
                gain=round(gain, 3),
                error=float(f"{best['error'] or 0:.1e}"),
            )
            yield entry, best["most"] < plain["least"] and gain >= LEAST_GAIN


def checks_passed(found: dict[str, Any], op: str, implementation: str, dtype: str) -> bool:
    """Whether an implementation was checked in this dtype, the checks all ended and none found it
    wrong.
    """
    section = found["sections"].get(f"check {op}", {"outcome": "", "records": []})
    judged = [
        one
        for one in section["records"]
        if one.get("implementation") == implementation and one.get("dtype") == dtype
    ]
    judged = [one for one in judged if "left_out" not in one]
    return section["outcome"] == "done" and bool(judged) and all(one["passed"] for one in judged)


def tuned(table: tuple[Entry, ...], found: dict[str, Any]) -> tuple[Entry, ...]:
    """The table with what was measured in place of what it said of the same arrays.

    Raises:
      ValueError: a dry run; two entries whose bounds overlap.
    """
    if found["settings"]["dry"]:
        raise ValueError("a dry run measures nothing: no table is written from it")
    measured = list(entries_of(found))
    again = {entry.arrays for entry, _ in measured}
    return checked(
        [
            *(entry for entry in table if entry.arrays not in again),
            *(entry for entry, faster in measured if faster),
        ]
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default=",".join(OPS), help=f"of {','.join(OPS)}")
    parser.add_argument(
        "--from",
        dest="found",
        type=Path,
        metavar="FILE",
        help="hardware_check.json of an earlier run",
    )
    parser.add_argument(
        "--table",
        type=Path,
        default=TABLE,
        metavar="FILE",
        help="where the table is written; the committed one is read",
    )
    options = parser.parse_args()
    options.sweep = True
    signal.signal(signal.SIGTERM, stopped)
    if options.found:
        found = json.loads(options.found.read_text(encoding="utf-8"))
    else:
        found = run_all(parts_of(parser, options.only, OPS), options)
    try:
        table = tuned(read_table(), found)
    except ValueError as error:
        sys.exit(f"tune_kernels: {error}")
    for entry, faster in entries_of(found):
        print(
            f"{entry.op}, {entry.where()}:"
            f" {entry.told() if faster else 'nothing is faster than xla'}"
        )
    write_table(options.table, table)
    print(f"{len(table)} entries written to {options.table}")


if __name__ == "__main__":
    main()
