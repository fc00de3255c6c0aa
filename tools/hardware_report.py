"""The results of `hardware_check.py` as markdown, and the list of failures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def failures(results: dict[str, Any]) -> list[str]:
    """Lists failures: kernels that differ from f32, and parts with checks that did not end."""
    wrong = []
    for section, result in results["sections"].items():
        if section.startswith("check") and result["outcome"] != "done":
            wrong.append(f"{section}: {result['outcome']}")
        for record in result["records"]:
            if record.get("passed") is False and record.get("implementation"):
                error = None if record.get("error") is None else f"{record['error']:.1e}"
                reason = record.get("problem") or f"error {error}, allowed {record['limit']:.1e}"
                wrong.append(
                    f"{section}: {record['case']}, {record['dtype']},"
                    f" {record.get('variant', record['implementation'])}: {reason}"
                )
    return wrong


def rows_of(heads: str, rows: list[list[str]]) -> Iterator[str]:
    """A markdown table; nothing without rows."""
    if rows:
        yield f"| {' | '.join(heads.split('; '))} |"
        yield "|" + "---|" * len(heads.split("; "))
        yield from (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
        yield ""


def markdown(results: dict[str, Any]) -> Iterator[str]:
    device = results["device"] or {}
    yield (
        f"# {'Dry run, no measurement' if results['settings']['dry'] else 'Hardware check'}:"
        f" {device.get('kind', 'no device answered')}"
    )
    yield ""
    about = [
        results["date"],
        results["driver"],
        device.get("runtime"),
        results["revision"] and f"revision {results['revision']}",
    ]
    yield "; ".join(
        [
            *filter(None, about),
            ", ".join(f"{name} {number}" for name, number in results["versions"].items()),
        ]
    )
    yield ""
    wrong = failures(results)
    yield (
        "\n".join(f"- FAILED: {line}" for line in wrong)
        if wrong
        else "Every check that ran passed."
    )
    yield ""
    yield from rows_of(
        "part; outcome; seconds",
        [
            [name, section["outcome"], f"{section['seconds']:.0f}"]
            for name, section in results["sections"].items()
        ],
    )
    records = {name: section["records"] for name, section in results["sections"].items()}
    goals = [record for part in records.values() for record in part if "target" in record]
    yield from rows_of(
        "goal; ours; against; its seconds over ours; at least; met",
        [
            [
                goal["target"],
                goal["ours"],
                goal["against"],
                f"{goal['ratio']:.2f}",
                f"{goal['least']:.2f}",
                "yes" if goal["ratio"] >= goal["least"] else "no",
            ]
            for goal in goals
        ],
    )
    for section, part in records.items():
        table = list(table_of(section, part))
        if table:
            yield f"## {section}"
            yield ""
            yield from (
                f"Measured on this device: {record['rates']['matrix'] / 1e12:,.1f} TFLOP/s,"
                f" {record['rates']['copy'] / 1e9:,.0f} GB/s.\n"
                for record in part
                if "rates" in record
            )
            yield from table


def table_of(section: str, records: list[dict]) -> Iterator[str]:
    cases = [record for record in records if "case" in record and "target" not in record]
    missed = [record for record in cases if "left_out" in record or "problem" in record]
    ran = [record for record in cases if "left_out" not in record and "problem" not in record]

    def error(record: dict) -> str:
        if "error" not in record:
            return "-"
        return "NaN" if record["error"] is None else f"{record['error']:.1e}"

    if section.startswith("check"):
        yield from rows_of(
            "case; dtype; implementation; error; allowed; right; twice the same",
            [
                [
                    record["case"],
                    record["dtype"],
                    record["implementation"],
                    error(record),
                    f"{record['limit']:.1e}",
                    "yes" if record["passed"] else "NO",
                    str(record.get("repeats", "-")),
                ]
                for record in ran
            ],
        )
    elif section.startswith("time"):
        yield from rows_of(
            "case; variant; ms (least to most); TFLOP/s; of the matrix rate; GB/s; temporary MiB;"
            " error",
            [
                [
                    record["case"],
                    record["variant"],
                    f"{1e3 * record['seconds']:.3f} ({1e3 * record['least']:.3f} to"
                    f" {1e3 * record['most']:.3f})" + ", the host's" * record["host_bound"],
                    f"{record['flops'] / 1e12:.1f}",
                    f"{record['of_matrix_rate']:.0%}",
                    f"{record['bytes'] / 1e9:,.0f}",
                    "-" if record["temporary"] is None else f"{record['temporary'] / 2**20:,.0f}",
                    error(record),
                ]
                for record in ran
            ],
        )
    elif section == "step":
        yield from rows_of(
            "run; ms; of the floor; examples/s; real tokens/s; MFU; of the datasheet; remat; peak"
            " MiB; compiling, s; first loss",
            [
                [
                    record["case"],
                    f"{1e3 * record['seconds']:.1f}",
                    f"{record['share_of_floor']:.0%}",
                    f"{record['examples_per_second']:.1f}",
                    f"{record['tokens_per_second']:,.0f}",
                    f"{record['mfu']:.1%}",
                    f"{record['mfu_datasheet']:.1%}" if record["mfu_datasheet"] else "-",
                    record["remat"],
                    f"{record['peak_memory'] / 2**20:,.0f}",
                    f"{record['compile_seconds']:.1f}",
                    f"{record['first_loss']:.5f}",
                ]
                for record in ran
            ],
        )
    else:
        yield from rows_of(
            "setting; prompt; side; examples/s; x the first; real tokens/s; examples an update;"
            " peak MiB; loss differs by",
            [
                [
                    record["case"],
                    record["prompt"],
                    record["side"],
                    f"{record['examples_per_second']:.2f}",
                    f"{record['ratio']:.2f}",
                    f"{record['tokens_per_second']:,.0f}",
                    f"{record['examples_per_update']:.1f}",
                    f"{record['peak_bytes'] / 2**20:,.0f}",
                    f"{record['relative']:.0e}",
                ]
                for record in ran
            ],
        )
    reasons: dict[str, list[str]] = {}
    for record in missed:
        reasons.setdefault(record.get("problem") or record["left_out"], []).append(
            f"{record['case']} {record.get('variant', record.get('implementation', ''))}".strip()
        )
    yield from (
        f"- not run: {', '.join(dict.fromkeys(names))}: {reason}"
        for reason, names in reasons.items()
    )
    if missed:
        yield ""
