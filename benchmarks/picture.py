"""The results as a picture: every round a dot, every median a number."""

from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")
from matplotlib import pyplot as plt

from benchmarks.results import Results, Spread

OUR_COLOUR: Final = "#1f5fa8"
OTHER_COLOURS: Final = ("#8a8a8a", "#b0671f")
INK: Final = "#222222"


def draw(results: Results, path: Path) -> None:
    """Write the picture to *path*, as SVG."""
    style: dict[Any, Any] = {
        "font.size": 9,
        "font.family": "DejaVu Sans",
        "svg.hashsalt": "pg-freeze",
        "text.color": INK,
        "axes.labelcolor": INK,
    }
    with plt.rc_context(style):
        figure, (writes, reads, drains) = plt.subplots(
            1, 3, figsize=(11, 4.2), width_ratios=(4, 4, 3), layout="constrained", facecolor="white"
        )
        rows = [(procedure, long) for long in results.loads for procedure in results.procedures]
        for axes, title, what in ((writes, "Write gap", "write_gap"), (reads, "Read gap", "read_gap")):
            _outages(axes, results, rows, what)
            axes.set_title(f"{title}, s", loc="left", fontsize=10, fontweight="bold")
        writes.set_yticks(range(len(rows)), [procedure for procedure, _ in rows])
        reads.set_yticks([])
        _drains(drains, results)
        figure.supxlabel(
            "logarithmic; a dot is one round, the bar and the number the median"
            f" — {results.clients[0]} writers, {results.clients[1]} readers, snapshot of 0.5 s",
            fontsize=8,
            color="#555555",
        )
        figure.savefig(path, metadata={"Date": None})
        plt.close(figure)


def _outages(axes: Any, results: Results, rows: list[tuple[str, bool]], what: str) -> None:
    for y, (procedure, long) in enumerate(rows):
        values = [getattr(outage, what) for outage in results.of(procedure, long_transaction=long)]
        _row(axes, y, values, _colour(results, procedure))
    half = len(results.procedures)
    axes.axhline(half - 0.5, color="#dddddd", linewidth=0.8)
    for y, text in ((0, "short transactions only"), (half, "and a client with 3 s transactions"))[: len(results.loads)]:
        axes.annotate(
            text, (1, y - 0.5), xycoords=("axes fraction", "data"), ha="right", va="top", fontsize=7.5, color="#777777"
        )
    axes.set_ylim(len(rows) - 0.5, -0.5)
    _sober(axes, 0.01, 80)


def _drains(axes: Any, results: Results) -> None:
    procedures = tuple(dict.fromkeys(drain.procedure for drain in results.drains))
    labels = []
    y = 0
    for procedure in procedures:
        for count in results.session_counts:
            values = [d.seconds for d in results.drains if d.procedure == procedure and d.sessions == count]
            _row(axes, y, values, _colour(results, procedure))
            labels.append(str(count))
            y += 1
    axes.axhline(len(results.session_counts) - 0.5, color="#dddddd", linewidth=0.8)
    for number, procedure in enumerate(procedures):
        axes.annotate(
            procedure.partition(",")[0],
            (1, number * len(results.session_counts) - 0.5),
            xycoords=("axes fraction", "data"),
            ha="right",
            va="top",
            fontsize=7.5,
            color="#777777",
        )
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_title("Drain of idle sessions, s", loc="left", fontsize=10, fontweight="bold")
    _sober(axes, 0.02, 20)


def _colour(results: Results, procedure: str) -> str:
    others = [name for name in results.procedures if name not in results.ours]
    return OTHER_COLOURS[others.index(procedure)] if procedure in others else OUR_COLOUR


def _row(axes: Any, y: int, values: list[float], colour: str) -> None:
    spread = Spread.of(values)
    axes.plot([spread.least, spread.most], [y, y], color=colour, linewidth=1.2, alpha=0.5)
    axes.plot(values, [y] * len(values), "o", color=colour, markersize=4, alpha=0.75, markeredgewidth=0)
    axes.plot([spread.median], [y], "|", color=colour, markersize=11, markeredgewidth=1.6)
    axes.annotate(
        f"{spread.median:.2f}" if spread.median < 10 else f"{spread.median:.1f}",
        (spread.most, y),
        xytext=(6, 0),
        textcoords="offset points",
        va="center",
        fontsize=8.5,
        color=colour,
    )


def _sober(axes: Any, least: float, most: float) -> None:
    axes.set_xscale("log")
    axes.set_xlim(least, most)
    ticks = [tick for tick in (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30) if least <= tick <= most]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", color="#eeeeee", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#bbbbbb")
