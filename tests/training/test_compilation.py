"""Memory policies change no result, the first that fits is taken, nothing is compiled twice, a
second run reads what the first compiled.
"""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.array import ArrayImpl
from jax.experimental.compilation_cache import compilation_cache
from refusals import refusal
from rich.console import Console
from tiny import tiny_config, write_tiny_model
from tiny_decoders import random_factors, relative
from tiny_encoders import encoder_config, write_tiny_encoder

from jaxre.compilation_cache import use_compilation_cache
from jaxre.config import Config
from jaxre.data.dataset import make_plan
from jaxre.data.loader import updates
from jaxre.data.rows import fill_update
from jaxre.errors import DoesNotFit
from jaxre.models.sharding import make_mesh, put_rows, row_sharding
from jaxre.objectives import load_dataset
from jaxre.objectives.sft import Validation
from jaxre.training import loop, setup
from jaxre.training.compilation import POLICIES, CompiledUpdates, compile_updates, memory_limit
from jaxre.training.initial import initial_state
from jaxre.training.log import read_log
from jaxre.training.loop import train
from jaxre.training.step import make_optimiser


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of many narrow layers, so that the backward pass takes most of the memory."""
    return write_tiny_model(
        tmp_path_factory.mktemp("deep"), num_hidden_layers=8, hidden_size=32, intermediate_size=64
    )


def compilation_inputs(config: Config, model: Path) -> tuple:
    """Arguments of `compile_updates`, with nonzero LoRA factors, and rows of the first update."""
    optimiser, mesh, dataset = (
        make_optimiser(config, 4),
        make_mesh(config.mesh),
        load_dataset(config, model),
    )
    plan, tokens = make_plan(config, dataset.train.tokens, shards=1), dataset.train.tokens
    initial = initial_state(config, np.dtype(np.float32), optimiser, mesh, dataset)
    if config.train.method == "lora":
        drawn = random_factors(initial.architecture, config.lora)
        for leaf, old in zip(
            jax.tree.leaves(drawn), jax.tree.leaves(initial.state.trainable), strict=True
        ):
            assert leaf.shape == old.shape
        initial.state.trainable.update(jax.tree.map(jnp.asarray, drawn))
    rows = put_rows(fill_update(tokens, plan.prefixes, plan.updates[0]), row_sharding(mesh))
    return (config, plan, initial, optimiser, mesh), rows


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[Path]:
    """Sets a fresh cache folder, as JAX_COMPILATION_CACHE_DIR does."""
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", True)
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
    compilation_cache.reset_cache()
    yield tmp_path / "xla"
    jax.config.update("jax_compilation_cache_dir", before[0])
    jax.config.update("jax_enable_compilation_cache", before[1])
    compilation_cache.reset_cache()


@pytest.mark.parametrize(
    "kind",
    [
        "lora",
        *(
            pytest.param(one, marks=pytest.mark.slow)
            for one in ("full", "lora, accumulated", "encoder")
        ),
    ],
)
def test_loss_and_gradients_are_those_of_no_policy(deep: Path, tmp_path: Path, kind: str) -> None:
    """The moments after one update are the clipped gradients, up to a factor; the learning rate of
    the first is zero.
    """
    results, memory = {}, []
    model = (
        write_tiny_encoder(tmp_path / "encoder", num_hidden_layers=6) if kind == "encoder" else deep
    )
    for remat in POLICIES:
        # Norms below the bound are not clipped, so an error in one gradient cannot hide in the
        # scale of all.
        settings = {"remat": remat, "clip_norm": 1e6}
        if kind == "encoder":
            config = encoder_config(tmp_path, model, train=settings)
        else:
            settings |= {"row_length": 128, "batch_tokens": 512, "method": kind.partition(",")[0]}
            config = tiny_config(
                tmp_path, model, train=settings | {"accumulation": 2 if "acc" in kind else 1}
            )
        inputs, rows = compilation_inputs(config, model)
        compiled = compile_updates(*inputs)
        assert compiled.remat == remat and list(compiled.tried) == [remat]
        memory.append(compiled.memory[1])
        _, plan, initial, *_ = inputs
        state, metrics = compiled.updates[plan.updates[0].shape](initial.state, initial.base, rows)
        results[remat] = jax.tree_util.tree_leaves_with_path((metrics, state.optimiser))
    # f32, other fusions, small gradients: 1.4e-5 to 9.8e-5 measured, by processor and JAX version.
    for remat in POLICIES[1:]:
        for (path, ours), (_, reference) in zip(results[remat], results["none"], strict=True):
            # A bias of the keys shifts all scores of a query equally: its gradient is rounding.
            name = jax.tree_util.keystr(path)
            if np.abs(reference).max() > 0 and "k_bias" not in name:
                if ".nu" in name:  # a square has twice the relative error of its gradient
                    ours, reference = np.sqrt(ours), np.sqrt(reference)
                assert relative(ours, reference) < 3e-4, (remat, name)
    assert memory == sorted(memory, reverse=True) and len(set(memory)) == len(POLICIES), memory


@pytest.mark.once
def test_the_first_policy_that_fits_is_taken_and_reported(
    deep: Path, tmp_path: Path, cache: Path
) -> None:
    use_compilation_cache(print)  # each of the programs below is compiled once
    settings = {"row_length": 128, "batch_tokens": 512}
    (config, *inputs), _ = compilation_inputs(tiny_config(tmp_path, deep, train=settings), deep)

    def compiled_with(**changes: object) -> CompiledUpdates:
        return compile_updates(
            config.model_copy(update={"train": config.train.model_copy(update=changes)}), *inputs
        )

    sizes = {remat: sum(compiled_with(remat=remat).memory) for remat in POLICIES}
    for remat in POLICIES[::2]:
        compiled = compiled_with(memory_gb=sizes[remat] / 2**30)
        assert compiled.remat == remat and compiled.tried == {
            one: sizes[one] for one in list(sizes)[: len(compiled.tried)]
        }
        assert (
            list(compiled.tried)[-1] == remat
            and f"{remat} (of {sizes[remat] / 2**20:,.0f} MiB a device"
            in compiled.described_remat()
        )

    # Nothing fits: the advised setting does, and no run folder remains that would refuse it.
    settings |= {"max_steps": 1}
    config = tiny_config(
        tmp_path,
        deep,
        data={"validation": None},
        train=settings | {"memory_gb": 0.999 * sizes["block"] / 2**30},
    )
    said = refusal(lambda: train(config))
    assert (
        all(f"MiB with train.remat={remat}" in said for remat in POLICIES)
        and "rows of 4 x 128 take" in said
    )
    accumulation = int(said.rpartition("set train.accumulation=")[2])
    assert (
        f"the largest that fits is {4 // accumulation} x 128" in said
        and not (tmp_path / "runs").exists()
    )
    train(
        config.model_copy(
            update={"train": config.train.model_copy(update={"accumulation": accumulation})}
        )
    )

    config = tiny_config(tmp_path, deep, name="none", train=settings | {"memory_gb": 1e-6})
    assert "not even 1 x 128 fits with train.remat=block: lower train.row_length" in refusal(
        lambda: train(config)
    )
    with pytest.raises(DoesNotFit):  # so that a sweep goes on
        compiled_with(memory_gb=1e-6)


def test_a_twentieth_of_what_a_device_reports_is_left_free_and_a_setting_is_taken_as_it_is() -> (
    None
):
    devices = [
        SimpleNamespace(memory_stats=lambda size=size: {"bytes_limit": size})
        for size in (200 * 2**30, 100 * 2**30)
    ]
    assert memory_limit(None, SimpleNamespace(local_devices=devices)) == 95 * 2**30
    assert memory_limit(100.0, SimpleNamespace(local_devices=devices)) == 100 * 2**30
    # a CPU
    assert (
        memory_limit(
            None, SimpleNamespace(local_devices=[SimpleNamespace(memory_stats=lambda: None)])
        )
        is None
    )


def test_a_compilation_inside_the_loop_is_reported_and_the_run_goes_on(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def foreign(loss: jax.Array) -> jax.Array:
        return loss + 1

    def compiles(losses: list, step: int, run: Path) -> None:
        if step == 2:
            jax.jit(foreign)(losses[0].loss)

    monkeypatch.setattr(loop, "check_finite", compiles)
    config = tiny_config(
        tmp_path, tiny_model, train={"max_steps": 4, "batch_tokens": 512, "row_length": 128}
    )
    console = Console(file=io.StringIO(), width=200)
    late = [one for one in read_log(train(config, console)) if one["kind"] == "compiled"]
    assert [one["step"] for one in late] == [2] and "foreign" in late[0]["programs"][0]
    assert "step 2: jit(foreign) was compiled during training" in console.file.getvalue()


@pytest.mark.slow
def test_nothing_is_compiled_after_the_first_validation(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three validations and checkpoints: the guard above lets only the first of each compile."""
    # An earlier test may have compiled the same programs; the first count must not be zero.
    jax.clear_caches()
    counts, run = [], Validation.run

    def counted(self: Validation, *given: object) -> dict[str, float]:
        with loop.Compilations() as compilations:
            found = run(self, *given)
        counts.append(len(compilations.names))
        return found

    monkeypatch.setattr(Validation, "run", counted)
    train(tiny_config(tmp_path, tiny_model, train={"epochs": 3, "batch_tokens": 1024}))
    assert len(counts) == 3 and counts[0] > 0 and counts[1:] == [0, 0]


@dataclasses.dataclass
class Watched:
    """A number on the device that calls `on_wait` whenever the host reads it or waits for it."""

    value: jax.Array
    on_wait: Callable[[], None]

    def __array__(self, dtype: object = None, copy: object = None) -> np.ndarray:
        self.on_wait()
        return np.asarray(self.value)

    def __float__(self) -> float:
        return float(np.asarray(self))

    item = tolist = __float__

    def block_until_ready(self) -> Watched:
        self.on_wait()
        return self


@pytest.mark.once
def test_the_device_is_waited_for_at_log_steps_only(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records, for each wait of the loop for a metric or the state, the number of updates begun."""
    waits, begun = [], 0

    def observe() -> None:
        # other threads prepare rows and write checkpoints
        if threading.current_thread() is threading.main_thread():
            waits.append(begun)

    @dataclasses.dataclass
    class Update:
        compiled: jax.stages.Compiled

        def __call__(self, *given: object) -> tuple:
            nonlocal begun
            state, metrics = self.compiled(*given)
            begun += 1
            return state, loop.Metrics(*(Watched(value, observe) for value in metrics))

        def memory_analysis(self) -> object:
            return self.compiled.memory_analysis()

    def watched_updates(*given: object) -> CompiledUpdates:
        compiled = compile_updates(*given)
        return dataclasses.replace(
            compiled, updates={shape: Update(update) for shape, update in compiled.updates.items()}
        )

    ready, all_ready, value = ArrayImpl.block_until_ready, jax.block_until_ready, ArrayImpl._value
    monkeypatch.setattr(ArrayImpl, "block_until_ready", lambda array: (observe(), ready(array))[1])
    monkeypatch.setattr(jax, "block_until_ready", lambda tree: (observe(), all_ready(tree))[1])
    monkeypatch.setattr(
        ArrayImpl, "_value", property(lambda array: (observe(), value.fget(array))[1])
    )
    monkeypatch.setattr(setup, "compile_updates", watched_updates)
    settings = {
        "epochs": 1,
        "batch_tokens": 512,
        "row_length": 128,
        "log_every": 4,
        "max_steps": 10,
        "evaluate_every": 99,
    }
    run = train(tiny_config(tmp_path, tiny_model, data={"validation": None}, train=settings))
    assert begun == 10 and set(waits) - {0} == {4, 8, 10}
    assert [record["step"] for record in read_log(run) if record["kind"] == "train"] == list(
        range(1, 11)
    )


def test_updates_come_in_order_and_on_the_device(tiny_model: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, tiny_model, train={"batch_tokens": 512})
    (_, plan, _, _, mesh), _ = compilation_inputs(config, tiny_model)
    tokens = load_dataset(config, tiny_model).train.tokens
    sharding = row_sharding(mesh)
    found = list(updates(tokens, plan, 3, put=lambda rows: put_rows(rows, sharding)))
    assert len(found) == len(plan.updates) - 3 > 4
    for ours, update in zip(found, plan.updates[3:], strict=True):
        assert all(isinstance(array, jax.Array) and array.sharding == sharding for array in ours)
        jax.tree.map(
            np.testing.assert_array_equal, ours, fill_update(tokens, plan.prefixes, update)
        )


# ---- the persistent cache ----------------------------------------------------------------------


def short(folder: Path, model: Path, name: str) -> tuple[list[float], str]:
    """Losses of three updates, and what was printed."""
    console = Console(file=io.StringIO(), width=300)
    config = tiny_config(
        folder,
        model,
        name,
        data={"validation": None},
        train={"max_steps": 3, "batch_tokens": 512, "row_length": 128, "epochs": 1},
    )
    run = train(config, console)
    return [
        record["loss"] for record in read_log(run) if record["kind"] == "train"
    ], console.file.getvalue()


@pytest.mark.slow
def test_a_second_run_reads_what_the_first_compiled(
    tiny_model: Path, tmp_path: Path, cache: Path
) -> None:
    first, said = short(tmp_path, tiny_model, "first")
    assert f"{cache}: 0 read, 1 written" in said and any(cache.iterdir())
    second, said = short(tmp_path, tiny_model, "second")
    assert f"{cache}: 1 read, 0 written" in said and second == first

    # Damaged by a process that was killed while writing: compiled again, reported once, and the
    # losses are the same.
    for entry in cache.glob("*-cache"):
        entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2])
    third, said = short(tmp_path, tiny_model, "third")
    assert (
        third == first
        and said.count("has entries that cannot be read") == 1
        and "remove the folder" in said
    )


def test_a_cache_that_cannot_be_written_is_reported_once_and_not_used(
    tiny_model: Path, tmp_path: Path, cache: Path
) -> None:
    cache.write_text("a file, not a folder")
    losses, said = short(tmp_path, tiny_model, "without")
    assert (
        len(losses) == 3
        and "off (" in said
        and said.count("set JAX_COMPILATION_CACHE_DIR to a folder that can") == 1
    )


def test_the_cache_has_one_switch_and_a_place_by_default(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert use_compilation_cache(print) == str(cache)
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert use_compilation_cache(print) == str(tmp_path / ".cache/jaxre/xla")
    jax.config.update("jax_enable_compilation_cache", False)
    assert (
        use_compilation_cache(print) == "off (JAX_ENABLE_COMPILATION_CACHE=false)"
        and capsys.readouterr().out == ""
    )
