"""Writes and reads per second, with the freeze shaded."""

import math
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator

from demo.story import Story

BIN: Final = 0.1
WRITES: Final = "#1f5fa8"
READS: Final = "#3b8a5a"
FROZEN: Final = "#dce8f5"
INK: Final = "#222222"
GREY: Final = "#666666"


def draw(story: Story, path: Path) -> None:
    """Write the picture to *path*, as PNG."""
    style: dict[Any, Any] = {"font.size": 9, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": INK}
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 1, figsize=(9.6, 4.6), sharex=True, layout="constrained", facecolor="white")
        for one, group, name, colour in ((axes[0], "write", "writes", WRITES), (axes[1], "read", "reads", READS)):
            _rate(one, story, group, colour)
            gap = story.gap(group).seconds
            one.set_title(f"{name} per second; longest time without: {gap:.2f} s", loc="left", fontsize=10)
        marks = ((story.barrier, "barrier"), (story.checkpointed, "checkpoint"), (story.restored, "thawed"))
        for at, said in marks:
            axes[0].annotate(
                said,
                (at - story.barrier, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -3),
                textcoords="offset points",
                va="top",
                fontsize=8,
                color=GREY,
            )
        begin, end = (at - story.barrier for at in story.copy)
        bar = axes[0].get_ylim()[1] * 0.45
        axes[0].annotate(
            "", (begin, bar), (end, bar), arrowprops={"arrowstyle": "<->", "color": GREY, "linewidth": 0.9}
        )
        axes[0].annotate(
            "copy", ((begin + end) / 2, bar), (0, 3), textcoords="offset points", ha="center", fontsize=8, color=GREY
        )
        axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[1].set_xlabel("seconds after the barrier; frozen where shaded", color=GREY)
        figure.savefig(path, dpi=150)
        plt.close(figure)


def _rate(axes: Any, story: Story, group: str, colour: str) -> None:
    bins = int((story.end - story.begin) / BIN)
    counts = [0] * bins
    for moment in story.recorded.completions(group):
        index = math.floor((moment - story.begin) / BIN)
        if 0 <= index < bins:
            counts[index] += 1
    edges = [story.begin - story.barrier + BIN * index for index in range(bins + 1)]
    axes.stairs([count / BIN for count in counts], edges, fill=True, color=colour, linewidth=0)
    axes.axvspan(0, story.restored - story.barrier, color=FROZEN, zorder=0, linewidth=0)
    for at in (story.barrier, story.checkpointed, story.restored):
        axes.axvline(at - story.barrier, color="#9bb3cc", linewidth=0.8, zorder=1)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, max(counts) / BIN * 1.15)
    axes.tick_params(length=0)
    axes.grid(axis="y", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
