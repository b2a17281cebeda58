"""Timing of alternating calls, and of the rates for a machine's roofline, measured in the same rounds."""

import time
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Call = Callable[[], Any]
Calls = Mapping[str, Call]
READ = 1 << 29  # bytes that the bandwidth probe reads: more than any cache holds


class Product(NamedTuple):
    """x · weightᵀ: [rows, inputs] times [outputs, inputs]."""

    rows: int
    inputs: int
    outputs: int

    @property
    def flops(self) -> int:
        return 2 * self.rows * self.inputs * self.outputs


def alternate(calls: Calls, repeats: int) -> dict[str, float]:
    """Runs the calls alternately, `repeats` rounds after an untimed one; returns the median seconds of each call.

    Other load on the machine then affects all calls equally. A call returns the arrays to wait for.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(1 + repeats):
        for name, call in calls.items():
            started = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - started)
    return {name: float(np.median(taken[1:])) for name, taken in seconds.items()}


def product_calls(products: Iterable[Product], dtype: jnp.dtype) -> dict[str, Call]:
    """Calls that compute only the products, on random values."""
    multiply = jax.jit(lambda x, weight: jnp.einsum("ri,oi->ro", x, weight))
    key = jax.random.key(0)

    def call(product: Product) -> Call:
        x = jax.random.normal(key, (product.rows, product.inputs), dtype)
        weight = jax.random.normal(key, (product.outputs, product.inputs), dtype)
        return lambda: multiply(x, weight)

    return {str(product): call(product) for product in products}


def best_rate(products: Iterable[Product], seconds: Mapping[str, float]) -> float:
    """FLOP/s of the fastest product; `seconds` has the products' names as keys."""
    return max(product.flops / seconds[str(product)] for product in products)


def reading_calls() -> dict[str, Call]:
    """Two ways to read `READ` bytes once, a sum and a product with one row; the faster one defines the bandwidth."""
    values = jnp.ones((READ // 4 // 1024, 1024), jnp.float32)
    add, multiply = jax.jit(jnp.sum), jax.jit(lambda x, y: jnp.einsum("i,oi->o", y, x))
    row = jnp.ones(1024, jnp.float32)
    return {"read by a sum": lambda: add(values), "read by a product": lambda: multiply(values, row)}


def bandwidth(seconds: Mapping[str, float]) -> float:
    """Bytes per second, from the seconds of the `reading_calls`."""
    return READ / min(seconds["read by a sum"], seconds["read by a product"])


PLOTTED_STEPS = 40  # the paper's


def plot_by_groups(results: list[dict[str, Any]]) -> "Figure":
    """Plots time per image by group count, from results for steps of one group: ours, PyTorch's and the roofline."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    results = sorted(results, key=lambda result: result["num_groups"])
    groups = [result["num_groups"] for result in results]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, label, style in (
        ("against_seconds", "PyTorch, eager", "C1s-"),
        ("seconds", "lattejax", "C0o-"),
        ("limit", "the matrix products alone, at this machine's best rate", "k:"),
    ):
        per_image = [PLOTTED_STEPS * result[name] / result["batch_size"] for result in results]
        axes.plot(groups, per_image, style, label=label)
        if name == "seconds" and groups[0] == 1:
            axes.axhline(per_image[0], color="C0", linewidth=0.8, linestyle="--", label="Vanilla: lattejax, one group")
    axes.set(xscale="log", yscale="log", xlabel="timestep-expert groups", ylabel=f"seconds, {PLOTTED_STEPS} steps")
    axes.set_xticks(groups, [str(count) for count in groups])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.minorticks_off()
    axes.set_title("Time per image by group count")
    axes.legend(fontsize="small")
    return figure
