"""The plot of quantize_formats.py: rate against distortion, with Shannon's bound."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.fonttype"], matplotlib.rcParams["svg.hashsalt"] = "none", "smelt"

from matplotlib import pyplot  # noqa: E402

SHOWN = ("Gaussian", "llama up_proj", "ResNet-56 convolution")
MOST = 7  # bits per weight
BIT = 20 * math.log10(2)  # decibels


def draw(path: Path, found: dict[str, list[dict[str, Any]]], curves: list[str]) -> None:
    """Above, signal to noise; below, by how much it is short of the bound, so that curves lie apart."""
    names = [name for name in SHOWN if name in found]
    figure, panels = pyplot.subplots(2, len(names), figsize=(5 * len(names) + 3, 10), sharex=True, squeeze=False)
    colours = pyplot.get_cmap("tab20").colors
    for column, name in enumerate(names):
        upper, lower = panels[0][column], panels[1][column]
        upper.plot([0, MOST], [0, BIT * MOST], "k--", lw=1, label="Shannon's bound (Gaussian)")
        lower.axhline(0, color="k", ls="--", lw=1)
        for i, curve in enumerate(curves):
            points = sorted((p["bits"], p["weight"]) for p in found[name] if p["curve"] == curve and "bits" in p)
            points = [(b, d) for b, d in points if b < MOST]
            if points:
                marks = {"marker": "osv^Dx"[i // 4], "ms": 4, "lw": 1, "color": colours[i % 20]}
                upper.plot(*zip(*points, strict=True), label=curve, **marks)
                lower.plot(*zip(*((b, d - BIT * b) for b, d in points), strict=True), **marks)
        upper.set(title=name, xlim=(0, MOST), ylim=(0, 40))
        lower.set(xlabel="bits per weight in the file", ylim=(-12, 0.5))
        for panel in (upper, lower):
            panel.grid(alpha=0.3)
    panels[0][0].set_ylabel("signal to noise of the weight, dB")
    panels[1][0].set_ylabel("the same less the bound, dB")
    figure.legend(*panels[0][0].get_legend_handles_labels(), fontsize=8, loc="center right")
    figure.tight_layout(rect=(0, 0, 1 - 2.6 / (5 * len(names) + 3), 1))
    part = path.with_suffix(".part.svg")
    figure.savefig(part, metadata={"Date": None})
    part.replace(path)
    print(f"drew {path.name}")
