"""The pictures of an evaluation. Each function draws one figure from numbers, and saves nothing.

Shape suffixes: S scored bins, T shown bins, V values of an output, R regions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from scipy.stats import norm

from offline.metrics import LEAST_SPIKES, TIME_STEPS
from offline.tables import QUESTIONS
from rt_neds.model.readout import Behaviour
from rt_neds.picture import IDEAL, INK, LEFT, LINEAR, OURS, RIGHT, STYLE, TRUE

if TYPE_CHECKING:
    from offline.evaluate import Evaluation

WIDTH = 10.0
SHOWN_S = 30.0
GAP = 8
"""Bins left empty where time was left out."""

COLORS = (OURS, LINEAR, IDEAL, RIGHT, "#6b5b95", "#7a6a53")
LINES: dict[str, dict[str, Any]] = {
    "rt-neds": {"lw": 1.8, "marker": "o", "ms": 3.5},
    "linear": {"lw": 1.1, "ls": "--"},
    "mean profile": {"lw": 1.1, "ls": ":"},
}
PLAIN = {
    **STYLE,
    "figure.facecolor": "white",
    "svg.hashsalt": "rt-neds",
    "axes.titlepad": 8,
    "text.parse_math": False,
}
"""How they look; a dollar in a region's name is a dollar."""


def traces(of: Evaluation) -> Figure:
    """True and decoded behaviour where most was scored; time in which nothing was is left out."""
    bin_s = of.binned.width / of.binned.session.rate
    shown_T, place_T = _stretch(list(of.bins.values()), max(2, round(SHOWN_S / bin_s)))
    whole = len(shown_T) == place_T[-1] + 1
    seconds = (np.arange(place_T[-1] + 1) + 1 + (shown_T[0] if whole else 0)) * bin_s
    rows = len(of.behaviours)
    figure, axes = _grid(rows, 1, height=1.6 * rows + 0.5)
    for axis, behaviour in zip(axes, of.behaviours, strict=True):
        # A line must not cross what was not scored: a gap gets a NaN.
        name = behaviour.name
        values_TV = np.full((len(seconds), of.values[name].shape[1]), np.nan)
        true_T = np.full(len(seconds), np.nan)
        _, here, there = np.intersect1d(shown_T, of.bins[name], return_indices=True)
        values_TV[place_T[here]] = of.values[name][there]
        true_T[place_T[here]] = of.true[name][there]
        draw = _chances if behaviour.kind == "categorical" else _values
        draw(axis, behaviour, seconds, true_T, values_TV)
        axis.set_xlim(seconds[0], seconds[-1])
        axis.set_title(name)
        axis.legend(
            loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=8, borderaxespad=0.2
        )
        for cut in place_T[:-1][np.diff(place_T) > 1]:
            axis.axvline((cut + 1 + GAP / 2) * bin_s, color=TRUE, lw=0.6, ls=(0, (1, 3)))
    for axis in axes[:-1]:
        axis.tick_params(labelbottom=False)
    axes[-1].set_xlabel("session time (s)" if whole else "seconds shown; dotted: time left out")
    return figure


def _stretch(
    bins: list[NDArray[np.int64]], length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Scored bins to show, from where they lie densest, and their places, apart where time is."""
    scored_T = np.unique(np.concatenate(bins))
    within = np.searchsorted(scored_T, scored_T + length) - np.arange(len(scored_T))
    first = int(within.argmax())
    shown_T = scored_T[first : first + length]
    jumps = np.concatenate([[0], np.diff(shown_T) > 1]).astype(np.int64)
    return shown_T, np.arange(len(shown_T)) + GAP * np.cumsum(jumps)


def _values(
    axis: Axes, behaviour: Behaviour, seconds: NDArray, true_T: NDArray, values_TV: NDArray
) -> None:
    mean = values_TV[:, 0]
    if values_TV.shape[1] > 1:
        sd = values_TV[:, 1]
        axis.fill_between(
            seconds, mean - sd, mean + sd, color=OURS, alpha=0.18, lw=0, label="± stated sd"
        )
    axis.plot(seconds, true_T, color=TRUE, lw=1.6, label="true")
    axis.plot(seconds, mean, color=OURS, lw=1.3, label="decoded")
    axis.set_ylabel(behaviour.unit or "value")
    seen = np.concatenate([true_T, mean])
    low, high = (np.nanmin(seen), np.nanmax(seen)) if np.isfinite(seen).any() else (0.0, 1.0)
    axis.set_ylim(low - 0.08 * (high - low) - 1e-9, high + 0.08 * (high - low) + 1e-9)


def _chances(
    axis: Axes, behaviour: Behaviour, seconds: NDArray, true_T: NDArray, values_TV: NDArray
) -> None:
    """Probability of each class (of the first, where there are two) over a band of the truth."""
    shown = behaviour.classes if len(behaviour.classes) > 2 else behaviour.classes[:1]
    colors = (LEFT, RIGHT, *COLORS[2:])
    for c, name in enumerate(behaviour.classes):
        color = colors[c % len(colors)]
        axis.fill_between(
            seconds, 0, 1, where=true_T == c, color=color, alpha=0.16, lw=0, step="mid",
            label=f"truly {name}",
        )  # fmt: skip
    for c, name in enumerate(shown):
        color = colors[c % len(colors)] if len(shown) > 1 else INK
        axis.plot(seconds, values_TV[:, c], color=color, lw=1.6, label=f"P({name})")
    axis.axhline(1 / len(behaviour.classes), color=INK, lw=0.6, ls=":")
    axis.set(ylim=(-0.03, 1.03), yticks=[0, 0.5, 1], ylabel="probability")


def reliability(of: Evaluation) -> Figure:
    """Stated against true: intervals of the continuous outputs, chances of the categorical ones."""
    scores = of.result["decoding"]
    continuous = [b for b in of.behaviours if b.kind == "continuous"]
    categorical = [b for b in of.behaviours if b.kind == "categorical"]
    panels = [kind for kind in (continuous, categorical) if kind]
    figure, axes = _grid(1, len(panels), height=3.7, width=4.6 * len(panels))
    levels = np.linspace(0.02, 0.98, 49)
    for axis, kind in zip(axes, panels, strict=True):
        axis.plot([0, 1], [0, 1], color=TRUE, lw=1, ls="--", zorder=1)
        if kind is continuous:
            for b, color in zip(continuous, _colors(continuous), strict=True):
                mean_S, sd_S = of.values[b.name].T.astype(np.float64)
                off_S = np.abs(of.true[b.name] - mean_S) / np.maximum(sd_S, 1e-12)
                inside = (off_S[:, None] <= norm.ppf(0.5 + levels / 2)).mean(axis=0)
                axis.plot(levels, inside, color=color, lw=1.8, label=b.name)
            axis.set(title="Intervals", xlabel="stated to hold", ylabel="share of true values")
            axis.set(xlim=(0, 1), ylim=(0, 1))
            axis.text(0.96, 0.42, "too sure", ha="right", color=TRUE, fontsize=8)
            axis.text(0.04, 0.93, "too careful", color=TRUE, fontsize=8)
        else:
            for b, color in zip(categorical, _colors(categorical), strict=True):
                parts = scores[b.name]["reliability"]
                size = 20 + 280 * np.array(parts["bins"]) / sum(parts["bins"])
                label = f"{b.name} (error {scores[b.name]['ece']:.3f})"
                axis.plot(
                    parts["stated"], parts["true"], color=color, lw=1.2, marker="o", ms=4,
                    label=label,
                )  # fmt: skip
                axis.scatter(parts["stated"], parts["true"], s=size, color=color, alpha=0.75, lw=0)
            low = min(1 / len(b.classes) for b in categorical)
            axis.set(title="Likeliest class", xlabel="stated probability", ylabel="share right")
            axis.set(xlim=(max(0, low - 0.05), 1.02), ylim=(0, 1.03))
        axis.set_box_aspect(1)
        axis.legend(loc="lower right", fontsize=8)
    return figure


def over_time(of: Evaluation) -> Figure | None:
    """Scores against time in the trial, beside trivial and linear ones; None without trials."""
    scores = of.result["decoding"]
    continuous = [b for b in of.behaviours if scores[b.name].get("error_by_time")]
    categorical = [b for b in of.behaviours if scores[b.name].get("by_time")]
    panels = [panel for panel in (continuous, categorical) if panel]
    if not panels:
        return None
    figure, axes = _grid(1, len(panels), height=3.3, width=4.9 * len(panels))
    linear = {
        name: scores_of
        for method in ("ridge", "logistic")
        for name, scores_of in of.result["baselines"].get(method, {}).items()
    }
    for axis, panel in zip(axes, panels, strict=True):
        key = "by_time" if panel is categorical else "error_by_time"
        at = np.arange(1, TIME_STEPS + 1) / TIME_STEPS - (0 if panel is categorical else 0.05)
        for b, color in zip(panel, _colors(panel), strict=True):
            lines = {"rt-neds": scores[b.name][key], "linear": linear.get(b.name, {}).get(key)}
            if panel is continuous:
                lines["mean profile"] = scores[b.name]["error_by_time_profile"]
            for name, line in lines.items():
                if line is not None:
                    axis.plot(at, line, color=color, **LINES[name])
        for b, color in zip(panel, _colors(panel), strict=True):
            axis.plot([], [], color=color, lw=4, label=b.name)
        for name, style in LINES.items():
            if name in lines and lines[name] is not None:
                axis.plot([], [], color=INK, **style, label=name)
        axis.set_xlim(0, 1.02)
        if panel is categorical:
            floor = min(scores[b.name]["chance"] for b in panel)
            axis.axhline(floor, color=INK, lw=0.7, ls=":")
            axis.set(title="Decisions: how often right", ylim=(min(0.3, floor - 0.1), 1.03))
            axis.set(xlabel="share of the scored stretch passed", ylabel="balanced accuracy")
        else:
            axis.set(title="Continuous: how far off", xlabel="share of the trial passed")
            axis.set(ylabel="squared error / variance", ylim=(0, None))
        axis.legend(fontsize=8, loc="best", ncols=2, columnspacing=1.2, handlelength=1.8)
    return figure


def bits_of_units(of: Evaluation) -> Figure | None:
    """Bits per spike of each unit, one row for each metric; None where spikes are not predicted."""
    names = [metric for metric in QUESTIONS if metric in of.predicted]
    if not names:
        return None
    figure, (axis,) = _grid(1, 1, height=0.62 * len(names) + 1.0)
    units = {name: of.predicted[name].bits() for name in names}
    often = {name: unit["spikes"] >= LEAST_SPIKES for name, unit in units.items()}
    shown = [
        u["bits"][often[name]] if often[name].any() else u["bits"] for name, u in units.items()
    ]
    low, high = np.nanquantile(np.concatenate(shown), [0.02, 0.98])
    low, high = min(low, 0) - 0.08 * (high - low), high + 0.08 * (high - low)
    rng = np.random.default_rng(0)
    for row, (name, unit) in enumerate(reversed(units.items())):
        inside = np.clip(unit["bits"], low, high)
        height = row + rng.uniform(-0.26, 0.26, len(inside))
        for use, alpha in ((~often[name], 0.18), (often[name], 0.6)):
            axis.scatter(inside[use], height[use], s=13, color=OURS, alpha=alpha, lw=0)
        mean = of.result["encoding"][name]["mean50"]
        if np.isfinite(mean):
            axis.plot([mean, mean], [row - 0.36, row + 0.36], color=INK, lw=2)
            axis.annotate(
                f"{mean:.3f}".replace("-", "−"), (mean, row + 0.36), ha="center", va="bottom",
                fontsize=8, color=INK,
            )  # fmt: skip
    axis.axvline(0, color=TRUE, lw=1, ls="--", zorder=0)
    axis.set_yticks(range(len(names)), [QUESTIONS[name][0] for name in reversed(names)])
    axis.set(xlim=(low, high), ylim=(-0.6, len(names) - 0.3), xlabel="bits per spike")
    axis.tick_params(left=False)
    axis.spines["left"].set_visible(False)
    return figure


def confusion(regions: dict[str, Any]) -> Figure:
    """Where units of each region are said to be."""
    count_RR = np.array(regions["confusion"], dtype=np.float64)
    share_RR = count_RR / count_RR.sum(axis=1, keepdims=True)
    names = list(regions["regions"])
    side = min(8.5, 1.9 + 0.5 * len(names))
    figure, (axis,) = _grid(1, 1, height=side, width=side + 0.8)
    image = axis.imshow(share_RR, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 14:
        for (row, column), share in np.ndenumerate(share_RR):
            ink = "white" if share > 0.55 else INK
            axis.text(column, row, f"{100 * share:.0f}", ha="center", va="center", color=ink,
                      fontsize=8)  # fmt: skip
    axis.set_xticks(range(len(names)), names, rotation=45 if len(names) > 6 else 0)
    axis.set_yticks(range(len(names)), [f"{n} ({k})" for n, k in regions["regions"].items()])
    axis.set(xlabel="named", ylabel="true (units)")
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    bar = figure.colorbar(image, ax=axis, shrink=0.75, ticks=[0, 0.5, 1])
    bar.ax.set_yticklabels(["0 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
    return figure


def _grid(
    rows: int, columns: int, *, height: float, width: float = WIDTH
) -> tuple[Figure, list[Axes]]:
    figure, axes = plt.subplots(
        rows, columns, figsize=(width, height), squeeze=False, layout="constrained"
    )
    return figure, list(axes.flat)


def _colors(behaviours: list[Behaviour]) -> list[str]:
    return [COLORS[i % len(COLORS)] for i in range(len(behaviours))]
