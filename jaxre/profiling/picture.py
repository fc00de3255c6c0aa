"""Draws a profile: the device's roofline with the run on it, the FLOPs that each saving leaves, and
the time of an update by part.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def draw(profile: dict[str, Any], path: Path) -> None:
    """Writes a picture of `profile_run`'s result as PNG."""
    ledger, timing = profile["ledger"], profile["measured"]
    figure = Figure(figsize=(17, 4), layout="constrained")
    roof, steps, bars = figure.subplots(1, 3)

    # ---- roofline (Williams et al. 2009): attainable rate against FLOPs per byte of the least
    # traffic
    rate, bandwidth = ledger["matrix_rate"], ledger["copy_rate"]
    ridge, intensity = rate / bandwidth, ledger["flops"]["total"] / ledger["traffic"]
    across = np.geomspace(min(ridge, intensity) / 8, max(ridge, intensity) * 8, 64)
    roof.loglog(
        across, np.minimum(rate, across * bandwidth) / 1e12, color="black", label="measured rates"
    )
    if ledger["datasheet_rate"]:
        roof.axhline(
            ledger["datasheet_rate"] / 1e12, color="grey", linestyle=":", label="datasheet"
        )
    roof.loglog(
        intensity,
        timing["model_flops_per_second"] / 1e12,
        "o",
        color="tab:red",
        label=f"this run, MFU {timing['mfu']:.0%}",
    )
    roof.set_xlabel("FLOPs needed per byte of weights and state")
    roof.set_ylabel("TFLOP/s")
    roof.set_title(profile["device"])
    roof.legend(loc="lower right")

    # ---- savings: the FLOPs left after each, cumulative from the top
    savings = ledger["savings"]
    remaining = [savings[0]["before"], *(saving["after"] for saving in savings)]
    drawn = steps.barh(
        ["padded", *(saving["name"] for saving in savings)],
        [flops / 1e9 for flops in remaining],
        color="tab:blue",
    )
    steps.bar_label(drawn, ["", *(f"{-saving['removed']:+.1%}" for saving in savings)], padding=3)
    steps.invert_yaxis()
    steps.margins(x=0.2)
    steps.set_xlabel("GFLOPs an update")
    steps.set_title("what each saving leaves")

    # ---- time: the floor by part of the model, and the measured update
    flops = ledger["flops"]
    floor = {part: value / rate for part, value in flops.items() if part != "total" and value}
    measured = {name.replace("_", " "): value for name, value in timing["split"].items()}
    colours = iter(
        ("tab:blue", "tab:cyan", "tab:green", "tab:olive", "tab:grey", "tab:orange", "tab:red")
    )
    for place, (name, parts) in enumerate((("floor, by part", floor), ("measured", measured))):
        left = 0.0
        for part, seconds in parts.items():
            bars.barh(
                place,
                seconds * 1e3,
                left=left,
                color=next(colours),
                label=f"{part} {seconds * 1e3:.3g} ms",
            )
            left += seconds * 1e3
        bars.text(left, place, f" {name}", va="center")
    bars.set_yticks([])
    bars.margins(x=0.25)
    bars.set_xlabel("ms an update")
    bars.set_title(profile["config"]["name"])
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
