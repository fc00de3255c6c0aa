"""`jaxre doctor` reports the default implementation of each op on this machine, and its
measurement.
"""

from __future__ import annotations

from jaxre_kernels import implementations
from jaxre_kernels.implementations import Entry

from jaxre.profiling.doctor import diagnose


def report() -> dict[str, str]:
    names, values = diagnose().columns
    return dict(zip(names.cells, values.cells, strict=True))


def test_doctor_reports_the_table_of_implementations_for_this_device(monkeypatch):
    monkeypatch.setattr(implementations, "read_table", tuple)
    before = report()
    for op in ("attention", "linear cross-entropy", "fused LoRA", "NF4"):
        assert before[op].startswith("xla: ") and before[op].endswith("nothing was measured on cpu")
    entry = Entry(
        "lora",
        "cpu",
        "float32",
        {"tokens": (1, 2048)},
        "xla",
        {"block": 8},
        "2026-11-22",
        1.5,
        1e-6,
    )
    monkeypatch.setattr(implementations, "read_table", lambda: (entry,))
    after = report()
    assert (
        "float32, tokens 1 to 2,048: xla (block 8), measured on cpu on 2026-11-22: 1.50 x xla"
        in after["fused LoRA"]
    )
    assert after["attention"] == before["attention"]
