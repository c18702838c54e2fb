"""Plots of an evaluation (evaluate.py --plots)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
matplotlib.rcParams["svg.hashsalt"] = "blockdraft"  # the same file for the same figures

from matplotlib import pyplot  # noqa: E402
from matplotlib.axes import Axes  # noqa: E402

KINDS = {"ar": "16 texts, one row each", "verify": "16 verified rows", "mask": "16 mask rows"}


def plot(result: dict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in (("acceptance", _acceptance), ("mixing", _mixing), ("experts", _experts)):
        figure, axes = pyplot.subplots(figsize=(7, 4))
        draw(axes, result)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        figure.tight_layout()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)


def _acceptance(axes: Axes, result: dict) -> None:
    for law, sides in result["own_text"].items():
        for drafter, style in (("mask", "-"), ("ngram", ":")):
            shares = sides[drafter]["not_looping"]["acceptance_by_position"]
            axes.plot(range(1, len(shares) + 1), shares, style, marker=".", label=f"{law}, {drafter}, not looping")
    shares = result["true_text"]["mask"]["acceptance_by_position"]
    axes.plot(range(1, len(shares) + 1), shares, "--", color="black", label="greedy, mask, after true text")
    axes.set(xlabel="draft", ylabel="share of blocks in which it held", ylim=(0, 1))


def _mixing(axes: Axes, result: dict) -> None:
    for law, sides in result["own_text"].items():
        points = {name: side["all"] for name, side in sides.items() if name.startswith("mix")}
        if points:
            ys = [point["tokens_per_forward"] for point in points.values()]
            axes.plot([0, *(point["kl"] for point in points.values())],
                      [sides["mask"]["all"]["tokens_per_forward"], *ys], marker="o", label=law)  # fmt: skip
            for name, point in points.items():
                axes.annotate(name, (point["kl"], point["tokens_per_forward"]), fontsize=8)
    axes.set(xlabel="KL(mixed || AR), nats per token", ylabel="tokens per forward, all outputs")


def _experts(axes: Axes, result: dict) -> None:
    for i, (name, label) in enumerate(KINDS.items()):
        values = result["experts"][name]["distinct"]
        axes.bar([layer + 0.27 * (i - 1) for layer in range(len(values))], values, 0.25, label=label)
    axes.axhline(result["experts"]["uniform"], color="black", linewidth=0.8, label="uniform routing")
    axes.set(xlabel="layer", ylabel=f"distinct experts of {result['experts']['experts']}", xticks=range(len(values)))
