"""What `hardware_check.py` found, as markdown, and what of it was not right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def failures(found: dict[str, Any]) -> list[str]:
    """What was not right: kernels that differ from f32, and parts with checks that did not end."""
    wrong = []
    for section, part in found["sections"].items():
        if section.startswith("check") and part["outcome"] != "done":
            wrong.append(f"{section}: {part['outcome']}")
        for one in part["records"]:
            if one.get("passed") is False and one.get("implementation"):
                told = (
                    one.get("problem")
                    or f"error {None if one['error'] is None else format(one['error'], '.1e')},"
                    f" allowed {one['limit']:.1e}"
                )
                wrong.append(
                    f"{section}: {one['case']}, {one['dtype']},"
                    f" {one.get('variant', one['implementation'])}: {told}"
                )
    return wrong


def rows_of(heads: str, rows: list[list[str]]) -> Iterator[str]:
    """A markdown table, nothing without rows."""
    if rows:
        yield f"| {' | '.join(heads.split('; '))} |"
        yield "|" + "---|" * len(heads.split("; "))
        yield from (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
        yield ""


def markdown(found: dict[str, Any]) -> Iterator[str]:
    device = found["device"] or {}
    yield (
        f"# {'Dry run, no measurement' if found['settings']['dry'] else 'Hardware check'}:"
        f" {device.get('kind', 'no device answered')}"
    )
    yield ""
    told = [
        found["date"],
        found["driver"],
        device.get("runtime"),
        found["revision"] and f"revision {found['revision']}",
    ]
    yield "; ".join(
        [
            *filter(None, told),
            ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
        ]
    )
    yield ""
    wrong = failures(found)
    yield (
        "\n".join(f"- FAILED: {line}" for line in wrong)
        if wrong
        else "Every check that ran passed."
    )
    yield ""
    yield from rows_of(
        "part; outcome; seconds",
        [
            [name, one["outcome"], f"{one['seconds']:.0f}"]
            for name, one in found["sections"].items()
        ],
    )
    records = {name: one["records"] for name, one in found["sections"].items()}
    goals = [one for part in records.values() for one in part if "target" in one]
    yield from rows_of(
        "goal; ours; against; its seconds over ours; at least; met",
        [
            [
                one["target"],
                one["ours"],
                one["against"],
                f"{one['ratio']:.2f}",
                f"{one['least']:.2f}",
                "yes" if one["ratio"] >= one["least"] else "no",
            ]
            for one in goals
        ],
    )
    for section, part in records.items():
        table = list(table_of(section, part))
        if table:
            yield f"## {section}"
            yield ""
            yield from (
                f"Measured on this device: {one['rates']['matrix'] / 1e12:,.1f} TFLOP/s,"
                f" {one['rates']['copy'] / 1e9:,.0f} GB/s.\n"
                for one in part
                if "rates" in one
            )
            yield from table


def table_of(section: str, records: list[dict]) -> Iterator[str]:
    cases = [one for one in records if "case" in one and "target" not in one]
    missed = [one for one in cases if "left_out" in one or "problem" in one]
    ran = [one for one in cases if "left_out" not in one and "problem" not in one]

    def error(one: dict) -> str:
        return (
            "-" if "error" not in one else "NaN" if one["error"] is None else f"{one['error']:.1e}"
        )

    if section.startswith("check"):
        yield from rows_of(
            "case; dtype; implementation; error; allowed; right; twice the same",
            [
                [
                    one["case"],
                    one["dtype"],
                    one["implementation"],
                    error(one),
                    f"{one['limit']:.1e}",
                    "yes" if one["passed"] else "NO",
                    str(one.get("repeats", "-")),
                ]
                for one in ran
            ],
        )
    elif section.startswith("time"):
        yield from rows_of(
            "case; variant; ms (least to most); TFLOP/s; of the matrix rate; GB/s; temporary MiB;"
            " error",
            [
                [
                    one["case"],
                    one["variant"],
                    f"{1e3 * one['seconds']:.3f} ({1e3 * one['least']:.3f} to"
                    f" {1e3 * one['most']:.3f})" + ", the host's" * one["host_bound"],
                    f"{one['flops'] / 1e12:.1f}",
                    f"{one['of_matrix_rate']:.0%}",
                    f"{one['bytes'] / 1e9:,.0f}",
                    "-" if one["temporary"] is None else f"{one['temporary'] / 2**20:,.0f}",
                    error(one),
                ]
                for one in ran
            ],
        )
    elif section == "step":
        yield from rows_of(
            "run; ms; of the floor; examples/s; real tokens/s; MFU; of the datasheet; remat; peak"
            " MiB; compiling, s; first loss",
            [
                [
                    one["case"],
                    f"{1e3 * one['seconds']:.1f}",
                    f"{one['share_of_floor']:.0%}",
                    f"{one['examples_per_second']:.1f}",
                    f"{one['tokens_per_second']:,.0f}",
                    f"{one['mfu']:.1%}",
                    f"{one['mfu_datasheet']:.1%}" if one["mfu_datasheet"] else "-",
                    one["remat"],
                    f"{one['peak_memory'] / 2**20:,.0f}",
                    f"{one['compile_seconds']:.1f}",
                    f"{one['first_loss']:.5f}",
                ]
                for one in ran
            ],
        )
    else:
        yield from rows_of(
            "setting; prompt; side; examples/s; x the first; real tokens/s; examples an update;"
            " peak MiB; loss differs by",
            [
                [
                    one["case"],
                    one["prompt"],
                    one["side"],
                    f"{one['examples_per_second']:.2f}",
                    f"{one['ratio']:.2f}",
                    f"{one['tokens_per_second']:,.0f}",
                    f"{one['examples_per_update']:.1f}",
                    f"{one['peak_bytes'] / 2**20:,.0f}",
                    f"{one['relative']:.0e}",
                ]
                for one in ran
            ],
        )
    reasons: dict[str, list[str]] = {}
    for one in missed:
        reasons.setdefault(one.get("problem") or one["left_out"], []).append(
            f"{one['case']} {one.get('variant', one.get('implementation', ''))}".strip()
        )
    yield from (
        f"- not run: {', '.join(dict.fromkeys(names))}: {reason}"
        for reason, names in reasons.items()
    )
    if missed:
        yield ""
