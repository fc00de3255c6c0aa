"""`--verify` reads every tensor back and compares it, and removes a folder that differs."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
from refusals import refusal
from rich.console import Console
from safetensors.numpy import load_file, save_file
from tiny_decoders import CONFIGS, build
from tiny_runs import LORA, bits

from jaxre.checkpoints.convert import convert, verification_table
from jaxre.checkpoints.source import open_model
from jaxre.models.lora import scale_of


def printed(conversion, width: int = 120) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(verification_table(conversion))
    return console.export_text()


@pytest.mark.parametrize(("source", "to"), [("hf", "jaxre"), ("jaxre", "hf"), ("adapter", "peft")])
def test_pure_conversion_verifies_as_bit_identical(run, tiny_base, tmp_path, source, to):
    convert(tiny_base, tmp_path / "ours", "jaxre")
    done = convert(
        {"hf": tiny_base, "jaxre": tmp_path / "ours", "adapter": run}[source],
        tmp_path / "target",
        to,
        verify=True,
    )
    # an adapter's two targets: a stack and a last layer of A and B
    tensors = 3 * 2 * 2 - 4 if to == "peft" else len(bits(tiny_base))
    assert len(done.differences) == tensors and not any(done.differences.values())
    lines = printed(done).splitlines()
    assert "verified: bit-identical" in lines[0] and [
        cell.strip() for cell in lines[-2].split("│")[1:4]
    ] == ["all", str(tensors), "0"]
    assert convert(tiny_base, tmp_path / "again", "jaxre").differences is None


def test_title_of_the_verification_is_true_for_what_was_asked(run, tiny_base, tmp_path):
    build(CONFIGS["one layer"], tmp_path / "half", dtype="bfloat16")
    for number, (source, merge, dtype, title) in enumerate(
        [
            (tiny_base, False, None, "bit-identical"),
            (tiny_base, False, "float32", "bit-identical"),
            (tiny_base, False, "bfloat16", "rounded to bfloat16"),
            (tmp_path / "half", False, "float32", "every value kept, as float32"),
            (run, True, None, "bit-identical to W + scale A B"),
            (run, True, "bfloat16", "rounded to bfloat16"),
        ]
    ):
        done = convert(
            source, tmp_path / str(number), "jaxre", merge=merge, dtype=dtype, verify=True
        )
        assert verification_table(done).title == f"verified: {title}"


def test_names_are_whole_in_a_narrow_table(tiny_base, tmp_path):
    done = convert(tiny_base, tmp_path / "ours", "jaxre", dtype="bfloat16", verify=True)
    lines = printed(done, width=60).splitlines()
    cells = "".join(line.split("│")[1].strip() for line in lines if line.count("│") == 5)
    for name in done.differences:
        assert re.sub(r"\.\d+\.", ".*.", name) in cells
    worst = max(done.differences, key=done.differences.get)
    assert worst in "".join(line.split("│")[4].strip() for line in lines if line.count("│") == 5)


def test_every_block_of_a_tensor_is_compared(run, tmp_path, monkeypatch):
    """Detects a fault in the last of many blocks, and the largest difference over all."""
    from jaxre.checkpoints import convert as module

    whole = convert(run, tmp_path / "whole", "hf", merge=True, dtype="bfloat16", verify=True)
    monkeypatch.setattr(module, "BLOCK", 100)
    done = convert(run, tmp_path / "blocks", "hf", merge=True, dtype="bfloat16", verify=True)
    assert done.differences == whole.differences and any(done.differences.values())
    write = module.write_base

    def damaging(folder, *arguments, **keywords):
        write(folder, *arguments, **keywords)
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-1] ^= 1
        (folder / "model.safetensors").write_bytes(data)

    monkeypatch.setattr(module, "write_base", damaging)
    assert "1 of" in refusal(
        lambda: convert(run, tmp_path / "target", "hf", merge=True, verify=True)
    )


def test_values_that_are_no_numbers_verify_by_their_bits(tmp_path, monkeypatch):
    from jaxre.checkpoints import convert as module

    build(CONFIGS["one layer"], tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][:3] = np.nan, np.inf, -np.inf
    save_file(tensors, path)
    done = convert(tmp_path / "hf", tmp_path / "half", "jaxre", dtype="bfloat16", verify=True)
    assert np.isfinite(done.differences["model.norm.weight"])
    write, name = module.write_base, "model.layers.0.mlp.up_proj.weight"

    def damaging(folder, *arguments, **keywords):
        write(folder, *arguments, **keywords)
        save_file(
            {**tensors, name: np.full_like(tensors[name], np.nan)}, folder / "model.safetensors"
        )

    monkeypatch.setattr(module, "write_base", damaging)
    convert(tmp_path / "hf", tmp_path / "ours", "jaxre")
    assert "up_proj.weight by inf" in refusal(
        lambda: convert(tmp_path / "ours", tmp_path / "back", "hf", verify=True)
    )


def test_rounding_is_reported_tensor_by_tensor(run, tiny_base, tmp_path):
    done = convert(run, tmp_path / "merged", "hf", merge=True, dtype="bfloat16", verify=True)
    loaded = open_model(run, None)
    written, base = (
        load_file(tmp_path / "merged/model.safetensors"),
        load_file(tiny_base / "model.safetensors"),
    )
    assert done.differences.keys() == written.keys() == base.keys()
    # the reference is formed in f32 in another order
    for name, value in written.items():
        exact = base[name]
        if "q_proj" in name or "down_proj" in name:
            layer, module = int(name.split(".")[2]), "q" if "q_proj" in name else "down"
            pair = (
                loaded.factors["last"][module]
                if layer == 2
                else {k: v[layer] for k, v in loaded.factors["layers"][module].items()}
            )
            exact = exact + scale_of(LORA) * (pair["a"] @ pair["b"]).T
        expected = np.abs(value.astype(np.float64) - exact).max()
        assert 0 < done.differences[name] < 2.0**-8 * np.abs(exact).max()
        assert abs(done.differences[name] - expected) < 1e-5
    worst = max(done.differences, key=done.differences.get)
    assert (
        "verified: rounded to bfloat16" in printed(done)
        and f"{done.differences[worst]:.3g} │ {worst}" in printed(done).splitlines()[-2]
    )


def swapped(folder: Path) -> None:
    """Swaps two layers of one projection: every shape still fits."""
    if (folder / "weights").is_dir():
        one, other = (folder / f"weights/layers.q/c/{layer}/0/0" for layer in (0, 1))
        data = one.read_bytes()
        one.write_bytes(other.read_bytes())
        other.write_bytes(data)
        return
    path = next(folder.glob("*.safetensors"))
    tensors = load_file(path)
    names = [name for name in tensors if "q_proj" in name][:4]
    names = names if len(names) == 3 else names[::2]
    tensors[names[0]], tensors[names[1]] = tensors[names[1]], tensors[names[0]]
    save_file(tensors, path)


def flipped(folder: Path) -> None:
    """Flips one bit, the lowest of a mantissa."""
    path = next(folder.rglob("layers.q/c/0/0/0"), None) or next(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-5 if path.suffix else 0] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [swapped, flipped])
@pytest.mark.parametrize(
    ("to", "writer"),
    [("hf", "write_base"), ("jaxre", "write_native"), ("peft", "save_adapter")],
    ids=["hf", "jaxre", "peft"],
)
def test_folder_that_does_not_read_back_is_refused_and_removed(
    run, tmp_path, monkeypatch, to, writer, damage
):
    from jaxre.checkpoints import convert as module

    write = getattr(module, writer)

    def damaging(folder, *arguments, **keywords):
        write(folder, *arguments, **keywords)
        damage(folder)

    monkeypatch.setattr(module, writer, damaging)
    message = refusal(
        lambda: convert(run, tmp_path / "target", to, merge=to != "peft", verify=True)
    )
    if (to, damage) == ("jaxre", flipped):
        assert "the store cannot be read" in message  # the checksum of the chunk
    else:
        assert (
            f"{tmp_path / 'target'}: {2 if damage is swapped and to != 'peft' else 1} of" in message
        )
        assert "do not read back as written" in message
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    # and without --verify it would have passed
    convert(run, tmp_path / "target", to, merge=to != "peft")
