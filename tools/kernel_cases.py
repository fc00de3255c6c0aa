"""Cases of `hardware_check` and `tune_kernels.py`: for each op the plain formula, our
implementations and opponents.

Implementations, their tile sizes (`TILES`) and what they refuse come from the op's own dispatch, so
new ones are included automatically. Needs jax and numpy; measures tokamax if it is installed, cuDNN
on a GPU, splash attention on a TPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from bench_sides import written_down
from jaxre_kernels import attention as attention_op
from jaxre_kernels import cross_entropy as cross_entropy_op
from jaxre_kernels import lora as lora_op
from jaxre_kernels import nf4 as nf4_op
from jaxre_kernels.attention import blockwise, masked_attention, visible_mask
from jaxre_kernels.cross_entropy import dense_cross_entropy
from jaxre_kernels.implementations import implementations_of, kernels_of, runs_on
from kernel_timing import CLOSE, Case, Variant, missing, normal, only_on, ours

# Heads, key heads, channels of a head, embedding, feed-forward, vocabulary and the study's LoRA
# rank.
MODELS = {
    "Qwen2.5-0.5B": (14, 2, 64, 896, 4864, 151936, 32),
    "Qwen2.5-3B": (16, 2, 128, 2048, 11008, 151936, 64),
    "tiny": (4, 2, 16, 64, 96, 500, 4),
}
DROPOUT, SCALE = 0.05, 2.0

# ---- packed attention ----------------------------------------------------------------------------


def packed(
    rows: int, length: int, mean: int, longest: int, prefix: int, pads: int, seed: int
) -> tuple[np.ndarray, ...]:
    """Rows of examples of about `mean` tokens behind a shared prefix, pads at the end.

    Returns:
      visible_until [B, T]; starts [B, M + 1] and lengths [B, M] of the examples, -1 beyond the
      last: cuDNN's form. All int32.
    """
    draw, shortest = np.random.default_rng(seed), max(1, mean // 2)
    most = length // shortest + 1
    until = np.tile(np.arange(1, length + 1, dtype=np.int32), (rows, 1))
    starts, lengths = np.full((rows, most + 1), -1, np.int32), np.full((rows, most), -1, np.int32)
    for row in range(rows):
        place, number, end = prefix, 0, length - pads
        until[row, :prefix] = end
        while place < end:
            size = min(int(np.clip(draw.normal(mean, mean / 4), shortest, longest)), end - place)
            until[row, place : place + size] = place + size
            starts[row, number], lengths[row, number] = place, size
            place, number = place + size, number + 1
    return until, starts, lengths


def attended(attend: Callable) -> Callable:
    def run(q, k, v, dout, visible_until, *_):
        out, back = jax.vjp(lambda q, k, v: attend(q, k, v, visible_until), q, k, v)
        return out, *back(dout)

    return run


def dense_attention(q, k, v, visible_until):
    return masked_attention(q, k, v, visible_mask(visible_until))


def as_on_a_cpu(run: Callable) -> Callable:
    """Blockwise attention of one block after another, each of which looks back no further than it
    must.
    """
    orders = blockwise._orders

    def patched(*inputs):  # forward and backward are traced in here
        with mock.patch.object(blockwise, "_orders", lambda q, blocks: orders(q, blocks)[:1] * 2):
            return run(*inputs)

    return patched


def cudnn_masked(q, k, v, visible_until):
    return jax.nn.dot_product_attention(
        q, k, v, mask=visible_mask(visible_until)[:, None], implementation="cudnn"
    )


def cudnn_packed(q, k, v, dout, visible_until, starts, lengths):
    """cuDNN's own packed form, behind a private call of JAX: examples one after another, without a
    shared prefix.
    """
    from jax._src.cudnn.fused_attention_stablehlo import MaskType, dot_product_attention

    def attend(q, k, v):
        layout = {
            "q_seqlen": lengths,
            "kv_seqlen": lengths,
            "q_offsets": starts,
            "kv_offsets": starts,
        }
        return dot_product_attention(
            q, k, v, **layout, scale=q.shape[-1] ** -0.5, mask_type=MaskType.PADDING_CAUSAL
        )

    out, back = jax.vjp(attend, q, k, v)
    return out, *back(dout)


def tokamax_attention(q, k, v, visible_until):
    import tokamax

    return tokamax.dot_product_attention(q, k, v, mask=visible_mask(visible_until)[:, None])


def splash_attention(q, k, v, visible_until, interpret=False):
    """Splash attention; the ends of examples serve as segment ids."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

    length, heads = q.shape[1:3]
    causal = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    kernel = splash.make_splash_mha(causal, head_shards=1, q_seq_shards=1, interpret=interpret)
    k, v = (jnp.repeat(array, heads // array.shape[2], axis=2) for array in (k, v))
    q, k, v = (array.swapaxes(1, 2) for array in ((q * q.shape[-1] ** -0.5).astype(q.dtype), k, v))
    return jax.vmap(lambda q, k, v, ids: kernel(q, k, v, segment_ids=splash.SegmentIds(ids, ids)))(
        q, k, v, visible_until
    ).swapaxes(1, 2)


def with_copy_engine(bounds: dict[str, int]) -> dict[str, Variant]:
    """The kernels for older GPUs with the copy engine, on Hopper; not selectable."""
    if not runs_on("pallas_gpu", jax.devices()[0]):
        return {}
    kernels = partial(kernels_of("attention", "pallas_gpu_sm80").with_copy_engine, **bounds)
    return {"pallas_gpu_sm80, copy engine": Variant(attended(kernels))}


def attention_case(
    model: str,
    dtype: str,
    rows: int,
    length: int,
    mean: int,
    longest: int,
    prefix: int = 0,
    pads: int = 0,
    *,
    opponents: bool = False,
    sweep: bool = False,
    covers: dict[str, tuple[int, int]] | None = None,
    targets: dict[str, float] | None = None,
) -> Case:
    H, K, C, *_ = MODELS[model]
    bounds = {"prefix": prefix, "span": longest}

    def inputs(seed):
        q, k, v, dout = (
            normal(seed, number, (rows, length, heads, C), dtype)
            for number, heads in enumerate((H, K, K, H))
        )
        return (
            q,
            k,
            v,
            dout,
            *map(jnp.asarray, packed(rows, length, mean, longest, prefix, pads, seed)),
        )

    variants = ours(
        "attention", partial(attention_op.attention, **bounds), attended, sweep
    ) | with_copy_engine(bounds)
    if opponents:
        half = None if dtype == "bfloat16" else "takes bfloat16 alone"
        alone = None if not prefix else "knows no shared prefix"
        variants |= {
            "xla, as on a CPU": Variant(as_on_a_cpu(variants["xla"].run)),
            "dense mask": Variant(attended(dense_attention)),
            "cuDNN, dense mask": Variant(attended(cudnn_masked), left_out=only_on("gpu", half)),
            "cuDNN, packed": Variant(cudnn_packed, left_out=only_on("gpu", half or alone)),
            "splash": Variant(attended(splash_attention), left_out=only_on("tpu", alone)),
            "tokamax, dense mask": Variant(
                attended(tokamax_attention), left_out=missing("tokamax")
            ),
        }
    until = packed(rows, length, mean, longest, prefix, pads, 0)[0]
    pairs = int((until - np.arange(length)).sum())
    if covers is not None:
        covers = {
            "prefix": (0, 0),
            **covers,
            "heads": (H, H),
            "kv_heads": (K, K),
            "channels": (C, C),
        }
    description = (
        f"{model}, {rows} x {length:,}, examples of about {mean}"
        + (f" behind {prefix}" if prefix else "")
        + (", pads" if pads else "")
    )
    return Case(
        "attention",
        description,
        dtype,
        inputs,
        attended(dense_attention),
        variants,
        covers,
        flops=12.0 * C * H * pairs,
        moved=6.0 * rows * length * (H + K) * C * jnp.dtype(dtype).itemsize,
        targets=targets or {},
    )


def attention_checks(dry: bool) -> Iterator[Case]:
    # model, rows, length, mean, longest, prefix, pads
    layouts = [
        ("Qwen2.5-0.5B", 2, 512, 70, 112, 0, 0),
        ("Qwen2.5-3B", 2, 1024, 150, 240, 200, 24),
        ("Qwen2.5-0.5B", 1, 640, 600, 640, 0, 40),
        ("Qwen2.5-3B", 3, 384, 5, 8, 128, 0),
    ]
    for dtype in CLOSE:
        for layout in [("tiny", 2, 320, 50, 100, 40, 8)] if dry else layouts:
            yield attention_case(layout[0], dtype, *layout[1:])


def attention_timings(dry: bool, sweep: bool) -> Iterator[Case]:
    if dry:
        yield attention_case(
            "tiny",
            "float32",
            1,
            384,
            60,
            100,
            opponents=True,
            sweep=sweep,
            targets={"dense mask": 15.0},
        )
        return
    make = partial(attention_case, dtype="bfloat16", opponents=True)
    short = {"length": (4096, 16384), "span": (129, 384)}
    # Goals: 15 times as fast as a dense mask, and faster than cuDNN's packed form.
    targets = {"dense mask": 15.0, "cuDNN, packed": 1.0}
    for model in ("Qwen2.5-0.5B", "Qwen2.5-3B"):
        yield make(
            model,
            rows=2,
            length=8192,
            mean=150,
            longest=240,
            covers=short,
            targets=targets,
            sweep=sweep,
        )
    shared = {"length": (1024, 4095), "prefix": (128, 1024), "span": (65, 384)}
    yield make(
        "Qwen2.5-0.5B",
        rows=8,
        length=2048,
        mean=80,
        longest=208,
        prefix=352,
        covers=shared,
        sweep=sweep,
    )
    longer = {"length": (4096, 16384), "span": (385, 2048)}
    yield make(
        "Qwen2.5-0.5B", rows=2, length=8192, mean=1000, longest=1600, covers=longer, sweep=sweep
    )


# ---- linear cross-entropy ------------------------------------------------------------------------


def cross_entropy_case(
    model: str,
    dtype: str,
    tokens: tuple[int, ...],
    trained: bool,
    *,
    opponents: bool = False,
    sweep: bool = False,
    covers: dict[str, tuple[int, int]] | None = None,
    targets: dict[str, float] | None = None,
) -> Case:
    D, V, count = MODELS[model][3], MODELS[model][5], int(np.prod(tokens))

    def inputs(seed):
        head = normal(seed, 1, (V, D), dtype, D**-0.5)
        chosen = jax.random.randint(jax.random.key(seed + 1), tokens, 0, V)
        # tokamax does not support weights, so they are equal where it is measured.
        weights = (
            jnp.full(tokens, 1 / count)
            if opponents
            else jax.random.bernoulli(jax.random.key(seed), 0.7, tokens) / count
        )
        return (
            normal(seed, 0, (*tokens, D), dtype),
            head,
            chosen.astype(jnp.int32),
            weights.astype(jnp.float32),
        )

    def both(loss):
        def run(x, head, targets, weights):
            return jax.value_and_grad(loss, (0, 1) if trained else (0,))(x, head, targets, weights)

        return run

    def products(x, head, targets, weights):
        # Without the barrier the three matrices could be multiplied in another order.
        logits = jax.lax.optimization_barrier(x @ head.T)
        return logits @ head, jnp.einsum("...v,...d->vd", logits, x) if trained else None

    def tokamax_loss(x, head, targets, weights):
        import tokamax

        return (
            tokamax.linear_softmax_cross_entropy_loss(x.reshape(-1, D), targets.reshape(-1), head.T)
            / count
        )

    variants = ours("cross_entropy", cross_entropy_op.linear_cross_entropy, both, sweep)
    if opponents:
        variants |= {
            "all logits": Variant(both(dense_cross_entropy)),
            "bare product": Variant(products, compared=False),
            "tokamax": Variant(both(tokamax_loss), left_out=missing("tokamax")),
        }
    if covers is not None:
        covers = {**covers, "vocabulary": (V, V), "channels": (D, D)}
    size = jnp.dtype(dtype).itemsize
    return Case(
        "cross_entropy",
        f"{model}, {' x '.join(map(str, tokens))} tokens, head"
        f" {'trained' if trained else 'frozen'}",
        dtype,
        inputs,
        both(dense_cross_entropy),
        variants,
        covers,
        flops=(6.0 if trained else 4.0) * count * V * D,
        moved=size * (2.0 * count * D + (2.0 if trained else 1.0) * V * D),
        targets=targets or {},
    )


def cross_entropy_checks(dry: bool) -> Iterator[Case]:
    for dtype in CLOSE:
        if dry:
            yield cross_entropy_case("tiny", dtype, (2, 700), True)
            continue
        yield cross_entropy_case("Qwen2.5-0.5B", dtype, (2, 37), False)
        yield cross_entropy_case("Qwen2.5-3B", dtype, (3, 512), True)


def cross_entropy_timings(dry: bool, sweep: bool) -> Iterator[Case]:
    if dry:
        yield cross_entropy_case(
            "tiny",
            "float32",
            (2, 32),
            False,
            opponents=True,
            sweep=sweep,
            targets={"bare product": 1 / 1.1},
        )
        return
    make = partial(cross_entropy_case, dtype="bfloat16", opponents=True)
    for model in ("Qwen2.5-0.5B", "Qwen2.5-3B"):
        # Goal: within a tenth of the bare product. The head is frozen, as in LoRA; the table does
        # not distinguish trained heads.
        yield make(
            model,
            tokens=(16, 256),
            trained=False,
            covers={"tokens": (2048, 16384)},
            targets={"bare product": 1 / 1.1},
            sweep=sweep,
        )
    yield make(
        "Qwen2.5-0.5B", tokens=(8, 128), trained=False, covers={"tokens": (256, 2047)}, sweep=sweep
    )
    yield make("Qwen2.5-0.5B", tokens=(16, 256), trained=True, sweep=sweep)


# ---- the LoRA projections of one input -----------------------------------------------------------


def groups_of(model: str) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name -> (inputs, outputs of each projection) of the four groups of a layer."""
    H, K, C, D, F, *_ = MODELS[model]
    return {
        "qkv": (D, (H * C, K * C, K * C)),
        "o": (H * C, (D,)),
        "gate_up": (D, (F, F)),
        "down": (F, (D,)),
    }


def lora_case(
    model: str,
    group: str,
    dtype: str,
    tokens: int,
    rate: float = DROPOUT,
    *,
    nf4: bool = False,
    opponents: bool = False,
    sweep: bool = False,
) -> Case:
    rank, (inner, outer) = MODELS[model][-1], groups_of(model)[group]

    def dense(seed):
        return [
            normal(seed, 10 + i, (inner, width), dtype, inner**-0.5)
            for i, width in enumerate(outer)
        ]

    # All sets share NF4 weights: quantising is slow, and the cache is flushed between calls anyway.
    # Each implementation gets them in its own form, as in training.
    forms = {}
    if nf4:
        forms["xla"] = [
            jax.tree.map(jnp.asarray, nf4_op.quantise(np.asarray(weight.T, np.float32)))
            for weight in dense(0)
        ]
        for name in implementations_of("lora"):
            if name != "xla" and runs_on(name, jax.devices()[0]):
                forms[name] = [lora_op.stored(weight, name) for weight in forms["xla"]]

    def inputs(seed):
        factors = [
            lora_op.Factors(
                normal(seed, 20 + i, (inner, rank), "float32", inner**-0.5),
                normal(seed, 30 + i, (rank, width), "float32", rank**-0.5),
            )
            for i, width in enumerate(outer)
        ]
        words = jax.random.bits(jax.random.key(seed), (tokens,), jnp.uint32)
        dys = [normal(seed, 40 + i, (tokens, width), dtype) for i, width in enumerate(outer)]
        x = normal(seed, 0, (tokens, inner), dtype)
        return (
            (x, forms, factors, words, dys, dense(0))
            if nf4
            else (x, dense(seed), factors, words, dys)
        )

    def both(projected):
        def run(x, weights, factors, words, dys, *_):
            if isinstance(weights, dict):
                weights = weights[getattr(projected, "keywords", {}).get("implementation", "xla")]
            outputs, back = jax.vjp(
                lambda x, factors: projected(x, weights, factors, words, SCALE, rate), x, factors
            )
            return outputs, *back(dys)

        return run

    def products(x, weights, factors, words, dys):
        return [x @ weight for weight in weights], sum(
            dy @ weight.T for dy, weight in zip(dys, weights, strict=True)
        )

    def with_dense(x, weights, factors, words, dys, dense):
        return both(lora_op.lora_group)(x, dense, factors, words, dys)

    def weights_alone(x, weights, *_):
        return [nf4_op.dequantise(weight, x.dtype) for weight in weights["xla"]]

    base = 4.0 * tokens * inner * sum(outer)
    low = 6.0 * tokens * rank * (len(outer) * inner + sum(outer))
    variants = ours("lora", lora_op.lora_group, both, sweep)
    targets = {}
    if opponents and nf4:
        variants |= {
            "dense weights": Variant(with_dense, compared=False),
            "dequantising alone": Variant(weights_alone, compared=False),
        }
        # Goal: a step within 15% of one with dense weights, applied here to a group.
        targets = {"dense weights": 1 / 1.15}
    elif opponents:
        variants |= {
            "autodiff": Variant(both(written_down)),
            "base product": Variant(products, compared=False),
        }
        # Goal: at most 5% over the base product times 1 + LoRA's share of FLOPs.
        targets = {"base product": 1 / (1.05 * (1 + low / base))}
    sizes = {"inputs": inner, "outputs": sum(outer), "projections": len(outer), "rank": rank}
    weights_moved = inner * sum(outer) * (4.127 / 8 if nf4 else jnp.dtype(dtype).itemsize)
    return Case(
        "nf4" if nf4 else "lora",
        f"{model}, {group}, {tokens:,} tokens, rank {rank}",
        dtype,
        inputs,
        both(written_down),
        variants,
        {"tokens": (4096, 65536)} | {name: (size, size) for name, size in sizes.items()},
        flops=base + low,
        moved=jnp.dtype(dtype).itemsize * 2.0 * tokens * (inner + sum(outer)) + weights_moved,
        targets=targets,
    )


def lora_checks(dry: bool) -> Iterator[Case]:
    for dtype in CLOSE:
        if dry:
            yield lora_case("tiny", "qkv", dtype, 48)
            continue
        for model in ("Qwen2.5-0.5B", "Qwen2.5-3B"):
            yield lora_case(model, "qkv", dtype, 512)
        yield lora_case("Qwen2.5-0.5B", "gate_up", dtype, 333, 0.0)
        yield lora_case("Qwen2.5-0.5B", "down", dtype, 256)


def lora_timings(dry: bool, sweep: bool) -> Iterator[Case]:
    for model in ("tiny",) if dry else ("Qwen2.5-0.5B", "Qwen2.5-3B"):
        for group in ("qkv",) if dry else groups_of(model):
            dtype, tokens = ("float32", 64) if dry else ("bfloat16", 16384)
            yield lora_case(model, group, dtype, tokens, opponents=True, sweep=sweep)


# ---- the same with NF4 weights -------------------------------------------------------------------


def nf4_checks(dry: bool) -> Iterator[Case]:
    for dtype in CLOSE:
        for model, group, tokens in (
            [("tiny", "qkv", 32)]
            if dry
            else [("Qwen2.5-0.5B", "qkv", 256), ("Qwen2.5-3B", "o", 300)]
        ):
            yield lora_case(model, group, dtype, tokens, nf4=True)


def nf4_timings(dry: bool, sweep: bool) -> Iterator[Case]:
    if dry:
        yield lora_case("tiny", "qkv", "float32", 32, nf4=True, opponents=True, sweep=sweep)
        return
    for model, group in (
        ("Qwen2.5-0.5B", "gate_up"),
        ("Qwen2.5-3B", "gate_up"),
        ("Qwen2.5-3B", "qkv"),
    ):
        yield lora_case(model, group, "bfloat16", 16384, nf4=True, opponents=True, sweep=sweep)


def dequantised_bits() -> dict[str, Any]:
    """Compares `dequantise` with the f32 bits of IEEE arithmetic: product, sum and product, each
    rounded.
    """
    from jaxre_kernels.nf4.weight import BLOCK, DYNAMIC, NESTED_BLOCK, NF4

    matrix = np.random.default_rng(0).standard_normal((192, 320), np.float32)
    weight = nf4_op.quantise(matrix)
    nested = np.repeat(weight.nested_absmax, NESTED_BLOCK)[: weight.absmax.size]
    scales = DYNAMIC[weight.absmax] * nested + weight.offset
    codes = np.stack([weight.codes >> 4, weight.codes & 15], axis=-1).reshape(-1)
    exact = (NF4[codes] * np.repeat(scales, BLOCK)).reshape(matrix.shape)
    values = np.asarray(
        jax.jit(partial(nf4_op.dequantise, dtype=jnp.float32))(jax.tree.map(jnp.asarray, weight))
    )
    error = float(np.abs(values - exact).max() / np.abs(exact).max())
    return {
        "error": error,
        "limit": 1e-6,
        "passed": error <= 1e-6,
        "bits_equal": bool((values == exact).all()),
    }


CHECKS = {
    "attention": attention_checks,
    "cross_entropy": cross_entropy_checks,
    "lora": lora_checks,
    "nf4": nf4_checks,
}
TIMINGS = {
    "attention": attention_timings,
    "cross_entropy": cross_entropy_timings,
    "lora": lora_timings,
    "nf4": nf4_timings,
}
