"""Three plots, as PNG files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_compress.demo.table import Row
from jaxopt_compress.demo.training import Trained
from jaxopt_compress.extras import require

# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")
LINES = ("-", "-", "-", (0, (4, 3)), (0, (4, 3)), "-")


def _figure(width: float, height: float, **layout: Any) -> tuple[Any, Any]:
    # Without pyplot there is no display and no global state.
    figure = require("matplotlib.figure", extra="examples").Figure(
        figsize=(width, height), dpi=140, layout="constrained"
    )
    axes = figure.subplots(**layout)
    for ax in np.ravel(axes):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(axis="y", color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def sparsity(path: Path, trained: Mapping[str, Trained]) -> None:
    """Zeros among the weights and the loss, over the steps of training."""
    figure, (top, bottom) = _figure(7.5, 6, nrows=2, sharex=True)
    for (name, run), color, line in zip(trained.items(), COLORS, LINES, strict=False):
        steps = np.arange(len(run.loss))
        top.plot(steps, 100 * run.sparsity, color=color, linestyle=line, label=name, linewidth=1.8)
        window = min(21, len(run.loss))
        mean = np.convolve(run.loss, np.full(window, 1 / window), mode="valid")
        middle = steps[window // 2 :][: len(mean)]
        bottom.plot(middle, mean, color=color, linestyle=line, linewidth=1.5)
    top.set(ylabel="zeros among all kernel weights (%)", ylim=(-3, 112))
    top.set_yticks(range(0, 101, 20))
    top.set_title("Sparsity of the weights that the forward pass uses", loc="left")
    top.legend(frameon=False, ncols=len(trained), loc="upper right", fontsize="small")
    bottom.set(xlabel="training step", ylabel="cross entropy", yscale="log")
    bottom.set_title("Training loss, moving average", loc="left")
    figure.savefig(path)


def accuracy(path: Path, rows: Sequence[Row], images: int) -> None:
    """Accuracy against stored bytes, after training and without."""
    ticker = require("matplotlib.ticker", extra="examples")

    # On a logarithmic axis of errors both 98% against 99% and 20% against 90% can be seen.
    error = lambda share: max(100 * (1 - share), 50 / images)
    kilobytes = lambda row: row.stored_bytes / 1e3
    label = lambda row: f"{row.variant}: {kilobytes(row):,.0f} kB, {row.accuracy:.1%}"
    figure, ax = _figure(7.5, 5)
    dense, *others = rows
    ax.axhline(error(dense.accuracy), color="0.4", linestyle=":", linewidth=1.2)
    ax.plot(
        kilobytes(dense), error(dense.accuracy), "s", color="0.3", markersize=8, label=label(dense)
    )
    for row, color in zip(others, COLORS, strict=False):
        x, y, untrained = kilobytes(row), error(row.accuracy), error(row.one_shot_accuracy)
        ax.plot([x, x], [untrained, y], color=color, linewidth=1, alpha=0.5)
        ax.plot(x, untrained, "o", color=color, markerfacecolor="white", markersize=8)
        ax.plot(x, y, "o", color=color, markersize=8, label=label(row))
    ax.plot([], [], "o", color="0.3", markerfacecolor="white", label="hollow: without training")
    ax.legend(frameon=False, loc="lower right", fontsize="small")
    ax.set(xscale="log", yscale="log", xlabel="stored size (kB)", ylabel="test accuracy (%)")
    ax.set_title("Accuracy against stored size; up and left is better", loc="left")
    plain = ticker.FuncFormatter(lambda x, _: f"{x:g}")
    ax.xaxis.set(major_locator=ticker.FixedLocator([5, 10, 20, 50, 100, 200, 500, 1000]))
    ax.xaxis.set(major_formatter=plain, minor_locator=ticker.NullLocator())
    ax.yaxis.set(major_locator=ticker.FixedLocator([0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 90]))
    ax.yaxis.set(major_formatter=ticker.FuncFormatter(lambda y, _: f"{100 - y:g}"))
    ax.yaxis.set(minor_locator=ticker.NullLocator())
    errors = [error(share) for row in rows for share in (row.accuracy, row.one_shot_accuracy)]
    ax.set_ylim(min(100, 1.4 * max(errors)), 0.6 * min(errors))
    sizes = [kilobytes(row) for row in rows]
    ax.set_xlim(0.6 * min(sizes), 1.6 * max(sizes))
    figure.savefig(path)


def layer_error(path: Path, reports: Mapping[str, Mapping[str, Any]]) -> None:
    """How far each layer's weights are from those of the dense network."""
    figure, ax = _figure(7.5, 4.5)
    width = 0.8 / len(reports)
    names: list[str] = []
    for i, ((name, report), color) in enumerate(zip(reports.items(), COLORS, strict=False)):
        leaves = [row for row in report["leaves"] if len(row["shape"]) > 1]
        names = [f"{_layer(row)}\n{'x'.join(map(str, row['shape']))}" for row in leaves]
        heights = [row["relative_error"] for row in leaves]
        offset = (i - (len(reports) - 1) / 2) * width
        ax.bar(np.arange(len(leaves)) + offset, heights, 0.9 * width, color=color, label=name)
    ax.set_xticks(range(len(names)), names)
    ax.tick_params(axis="x", length=0)
    ax.set(xlabel="layer and shape of its kernel", ylabel=r"$\|W - \hat{W}\|_F \,/\, \|W\|_F$")
    ax.set_title(
        "Relative error of each kernel, compressed and trained, against the dense one", loc="left"
    )
    ax.margins(y=0.2)
    ax.legend(frameon=False, ncols=len(reports), loc="upper center", fontsize="small")
    figure.savefig(path)


def _layer(row: Mapping[str, Any]) -> str:
    return row["path"].removesuffix("/kernel").rpartition("/")[2]
