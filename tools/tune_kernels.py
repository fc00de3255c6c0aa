"""Writes the table of implementations (`kernels/jaxre_kernels/table.json`) from a run on this
machine's accelerator.

    python tools/tune_kernels.py --out runs/tune
        # measures, within 9 minutes, and writes the table
    python tools/tune_kernels.py --from runs/tune/hardware_check.json
        # writes it from an earlier measurement
    python tools/tune_kernels.py --only attention --table new.json
        # writes the table with this op's entries to another file

Measures with `hardware_check --sweep`: every implementation, with every tile size that its dispatch
lists. The fastest implementation of a case gets an entry if it passed every check of its dtype and
at that size, and if even its slowest round was faster than the fastest of "xla" as it runs without
a table. A case without such an implementation loses its entry. Arrays outside of all cases get
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


def entries_of(results: dict[str, Any]) -> Iterator[tuple[Entry, bool]]:
    """For each case that was timed: the entry of the fastest correct implementation, and whether it
    is faster than "xla" without a table.
    """
    for op in OPS:
        cases: dict[tuple[str, str], list[dict]] = {}
        for record in results["sections"].get(f"time {op}", {"records": []})["records"]:
            if record.get("covers") and record["implementation"]:
                cases.setdefault((record["case"], record["dtype"]), []).append(record)
        for (_, dtype), timed in cases.items():
            plain = next((record for record in timed if record["variant"] == "xla"), None)
            if plain is None:
                continue
            right = [
                record
                for record in timed
                if record["passed"] and checks_passed(results, op, record["implementation"], dtype)
            ]
            best = min(right or [plain], key=lambda record: record["seconds"])
            gain = plain["seconds"] / best["seconds"]
            entry = Entry(
                op=op,
                device_kind=results["device"]["kind"],
                dtype=dtype,
                sizes={name: (low, high) for name, (low, high) in best["covers"].items()},
                implementation=best["implementation"],
                tiles=best["tiles"],
                date=results["date"][:10],
                gain=round(gain, 3),
                error=float(f"{best['error'] or 0:.1e}"),
            )
            yield entry, best["most"] < plain["least"] and gain >= LEAST_GAIN


def checks_passed(results: dict[str, Any], op: str, implementation: str, dtype: str) -> bool:
    """Returns whether an implementation was checked in this dtype and passed all checks."""
    section = results["sections"].get(f"check {op}", {"outcome": "", "records": []})
    passed = [
        record["passed"]
        for record in section["records"]
        if record.get("implementation") == implementation
        and record.get("dtype") == dtype
        and "left_out" not in record
    ]
    return section["outcome"] == "done" and bool(passed) and all(passed)


def tuned(table: tuple[Entry, ...], results: dict[str, Any]) -> tuple[Entry, ...]:
    """The table with its entries replaced by new measurements of the same arrays.

    Raises:
      ValueError: a dry run; two entries whose bounds overlap.
    """
    if results["settings"]["dry"]:
        raise ValueError("a dry run measures nothing: no table is written from it")
    measured = list(entries_of(results))
    replaced = {entry.arrays for entry, _ in measured}
    return checked(
        [
            *(entry for entry in table if entry.arrays not in replaced),
            *(entry for entry, faster in measured if faster),
        ]
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--only", default=",".join(OPS), help=f"of {','.join(OPS)}")
    parser.add_argument(
        "--from",
        dest="earlier",
        type=Path,
        metavar="FILE",
        help="hardware_check.json of an earlier run",
    )
    parser.add_argument(
        "--table",
        type=Path,
        default=TABLE,
        metavar="FILE",
        help="file to write; the committed table is read",
    )
    options = parser.parse_args()
    options.sweep = True
    signal.signal(signal.SIGTERM, stopped)
    if options.earlier:
        results = json.loads(options.earlier.read_text(encoding="utf-8"))
    else:
        results = run_all(parts_of(parser, options.only, OPS), options)
    try:
        table = tuned(read_table(), results)
    except ValueError as error:
        sys.exit(f"tune_kernels: {error}")
    for entry, faster in entries_of(results):
        print(
            f"{entry.op}, {entry.where()}:"
            f" {entry.described() if faster else 'nothing is faster than xla'}"
        )
    write_table(options.table, table)
    print(f"{len(table)} entries written to {options.table}")


if __name__ == "__main__":
    main()
