"""The demo's picture: what was decoded, how evidence grew, how good it is, how fast it came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from rt_neds.frames import DecodedFrame
from rt_neds.session import Session, load_session

INK, TRUE, OURS, LINEAR, IDEAL = "#222222", "#9a9a9a", "#0b6e99", "#d98c1f", "#3c8d5a"
LEFT, RIGHT = "#0b6e99", "#b3443c"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "legend.frameon": False,
}
SOURCES = {
    "wheel_speed": ("wheel.wheel_speed", "wheel speed (rad/s)"),
    "whisker": ("whisker.whisker_motion_energy", "whisker motion (a.u.)"),
}
SHOWN_S = 20.0
PEOPLE = {"wheel_speed": "wheel speed", "whisker": "whisker", "choice": "choice"}


def draw(path: Path, session_path: Path, live: Any, scores: dict[str, Any]) -> None:
    """Draw ``decoded.png``.

    Parameters
    ----------
    path : path
        Of the picture.
    session_path : path
        For the true behaviour.
    live : rt_neds.demo.Live
    scores : dict
        As ``rt-neds evaluate --json``.
    """
    session = load_session(session_path)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(12, 7.2), dpi=150, layout="constrained")
        grid = figure.add_gridspec(3, 3, height_ratios=[1, 1, 1.25])
        axes = [figure.add_subplot(grid[row, :]) for row in range(2)]
        for axis, (name, (source, label)) in zip(axes, SOURCES.items(), strict=True):
            _trace(axis, session, live, name, source, label)
        axes[0].set_title(
            "Decoded while it happened: held-out minutes, replayed at real speed over ZeroMQ"
        )
        axes[0].legend(loc="lower right", bbox_to_anchor=(1.0, 0.98), borderaxespad=0.0, ncols=3)
        axes[0].tick_params(labelbottom=False)
        axes[1].set_xlabel("session time (s)")
        _evidence(figure.add_subplot(grid[2, 0]), session, live)
        _scores(figure.add_subplot(grid[2, 1]), scores)
        _latency(figure.add_subplot(grid[2, 2]), live)
        figure.savefig(path)
        plt.close(figure)


def _output(live: Any, name: str) -> dict[str, Any]:
    return next(output for output in live.outputs if output["name"] == name)


def _matrix(frames: list[DecodedFrame]) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    return np.array([f.end for f in frames]), np.stack([f.values_V for f in frames])


def _trace(axis: Axes, session: Session, live: Any, name: str, source: str, label: str) -> None:
    frames = [frame for frame in live.real_time if not frame.flags] or live.real_time
    end, values = _matrix(frames)
    seconds = end / session.rate
    window = seconds <= seconds[0] + SHOWN_S
    seconds, at = seconds[window], _output(live, name)["offset"]
    mean, sd = values[window, at], values[window, at + 1]
    series = session.series(source)
    true = series.values_L[np.searchsorted(series.samples_L, end[window], side="right") - 1]
    axis.fill_between(
        seconds, mean - sd, mean + sd, color=OURS, alpha=0.18, lw=0, label="± stated sd"
    )
    axis.plot(seconds, true, color=TRUE, lw=1.6, label="true")
    axis.plot(seconds, mean, color=OURS, lw=1.4, label="decoded")
    axis.set_ylabel(label)
    axis.margins(x=0)
    axis.set_ylim(
        min(0.0, float(true.min())) - 0.05 * float(np.ptp(true)), 1.15 * float(true.max())
    )


def _evidence(axis: Axes, session: Session, live: Any) -> None:
    """P(left) from stimulus to feedback, of each held-out trial, by what the mouse then chose."""
    end, values = _matrix(live.whole)
    left = values[:, _output(live, "choice")["offset"]]
    width = int(np.median(np.diff(end)))
    onset = session.samples(session.column("trials.stim_on_time"))
    feedback = session.samples(session.column("trials.feedback_time"))
    chosen = session.column("trials.choice")
    longest = 60
    for side, color, word in ((1, LEFT, "left"), (0, RIGHT, "right")):
        lines = np.full((len(onset), longest), np.nan)
        for trial in np.flatnonzero(chosen == side):
            first = np.searchsorted(end, onset[trial] + width)
            count = min(longest, int((feedback[trial] - onset[trial]) // width))
            if onset[trial] < end[0] or first + count > len(left) or count < 1:
                continue
            lines[trial, :count] = left[first : first + count]
        kept = lines[np.isfinite(lines[:, 0])]
        time = np.arange(1, longest + 1) * width / session.rate
        axis.plot(time, kept.T, color=color, lw=0.4, alpha=0.25)
        enough = np.isfinite(kept).sum(axis=0) >= 5
        mean = np.nanmean(kept[:, enough], axis=0) if len(kept) else []
        axis.plot(time[enough], mean, color=color, lw=2.4, label=f"chose {word} ({len(kept)})")
    axis.axhline(0.5, color=INK, lw=0.6, ls=":")
    axis.set(title="Choice, as the evidence comes in", xlabel="time from stimulus (s)", ylim=(0, 1))
    axis.set_ylabel("decoded P(left)")
    axis.legend(loc="upper left", fontsize=7, frameon=True, framealpha=0.85, edgecolor="none")


def _scores(axis: Axes, scores: dict[str, Any]) -> None:
    linear = {n: s for method in scores["baselines"].values() for n, s in method.items()}
    names = list(scores["decoding"])
    rows = {"ridge / logistic": (linear, LINEAR), "rt-neds": (scores["decoding"], OURS),
            "ideal observer": (scores["ideal"], IDEAL)}  # fmt: skip
    for i, (label, (table, color)) in enumerate(rows.items()):
        heights = [_headline(table.get(name, {})) for name in names]
        bars = axis.bar(
            np.arange(len(names)) + 0.27 * (i - 1), heights, 0.25, color=color, label=label
        )
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=1)
    words = [
        f"{PEOPLE.get(n, n)}\n({'R²' if 'r2' in scores['decoding'][n] else 'balanced acc.'})"
        for n in names
    ]
    axis.set_xticks(np.arange(len(names)), words)
    axis.set(title="How good, on the held-out part", ylim=(0, 1.28))
    axis.set_yticks([0, 0.5, 1.0])
    axis.legend(loc="upper center", ncols=3, fontsize=7, columnspacing=0.9, handlelength=1.2)


def _headline(scores: dict[str, Any]) -> float:
    return float(scores.get("r2", scores.get("balanced_accuracy", np.nan)) or 0.0)


def _latency(axis: Axes, live: Any) -> None:
    edges = np.geomspace(0.05, 50, 60)
    decoded, control = live.tallies
    for latency, color, label in (
        (control.bin_end_to_publish, TRUE, "transport alone"),
        (decoded.bin_end_to_publish, OURS, "with decoding"),
    ):
        share = np.array(latency.shares(list(edges))) / max(latency.count, 1)
        p50 = latency.percentiles_ms()["p50"]
        axis.stairs(
            share, edges, color=color, fill=True, alpha=0.6, label=f"{label}: p50 {p50:.2f} ms"
        )
    axis.axvline(live.latency["bin_ms"], color=INK, lw=0.8, ls="--")
    axis.annotate(
        "next bin",
        (live.latency["bin_ms"], 0.9),
        xycoords=("data", "axes fraction"),
        xytext=(-2, 0),
        textcoords="offset points",
        ha="right",
        va="top",
        rotation=90,
        fontsize=7,
    )
    axis.set_xscale("log")
    axis.set_xticks([0.1, 1, 10], ["0.1", "1", "10"])
    axis.set(title="Latency, from the end of the bin", xlabel="end of bin to published (ms)")
    axis.set_ylabel("share of bins")
    axis.set_ylim(0, axis.get_ylim()[1] * 1.35)
    axis.legend(loc="upper left", fontsize=7)
