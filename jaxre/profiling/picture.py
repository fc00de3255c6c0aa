"""A profile as a picture: the roofline of the device with the run on it, and where the time of an update goes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure


def draw(found: dict[str, Any], path: Path) -> None:
    """Writes the picture of `profile.profile`'s result as PNG."""
    ledger, timing = found["ledger"], found["measured"]
    figure = Figure(figsize=(11, 4), layout="constrained")
    roof, bars = figure.subplots(1, 2)

    # ---- roofline (Williams et al. 2009): attainable rate against FLOPs per byte of the least traffic
    rate, bandwidth = ledger["matrix_rate"], ledger["copy_rate"]
    ridge, intensity = rate / bandwidth, ledger["flops"]["total"] / ledger["traffic"]
    across = np.geomspace(min(ridge, intensity) / 8, max(ridge, intensity) * 8, 64)
    roof.loglog(across, np.minimum(rate, across * bandwidth) / 1e12, color="black", label="measured rates")
    if ledger["datasheet_rate"]:
        roof.axhline(ledger["datasheet_rate"] / 1e12, color="grey", linestyle=":", label="datasheet")
    roof.loglog(intensity, timing["model_flops_per_second"] / 1e12, "o", color="tab:red", label=f"this run, MFU {timing['mfu']:.0%}")
    roof.set_xlabel("FLOPs needed per byte of weights and state")
    roof.set_ylabel("TFLOP/s")
    roof.set_title(found["device"])
    roof.legend(loc="lower right")

    # ---- time: the floor by part of the model, and the update as it was measured
    flops = ledger["flops"]
    floor = {part: value / rate for part, value in flops.items() if part != "total" and value}
    measured = {name.replace("_", " "): value for name, value in timing["split"].items()}
    colours = iter(("tab:blue", "tab:cyan", "tab:green", "tab:olive", "tab:grey", "tab:orange", "tab:red"))
    for place, (name, parts) in enumerate((("floor, by part", floor), ("measured", measured))):
        left = 0.0
        for part, seconds in parts.items():
            bars.barh(place, seconds * 1e3, left=left, color=next(colours), label=f"{part} {seconds * 1e3:.3g} ms")
            left += seconds * 1e3
        bars.text(left, place, f" {name}", va="center")
    bars.set_yticks([])
    bars.margins(x=0.25)
    bars.set_xlabel("ms an update")
    bars.set_title(found["config"]["name"])
    bars.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=4, fontsize="small")
    figure.savefig(path, dpi=120)
