"""How good is a bundle on a session? Decoded as at the rig where it can be, beside trivial guesses.

Shape suffixes: S scored bins, T bins, M modalities (0 is spikes), V published values.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offline.compared import Baselines, baseline_values, ideal_values, of_present
from offline.config import DataConfig, TrainConfig
from offline.encoding import Predicted, encoding_scores, glm_scores, predict_spikes
from offline.metrics import (
    TIME_STEPS,
    categorical_scores,
    gaussian_scores,
    mean_profile,
    poisson_d2,
)
from offline.regions import decode_regions, regions_of
from offline.streamed import largest_difference, offline_values, stream_spans
from offline.windows import BinnedSession, Split, bin_session
from rt_neds.bundle import BundleSession, BundleSpec, build_model, load_spec
from rt_neds.config import parse_config
from rt_neds.errors import BundleError, ConfigError
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour
from rt_neds.result import make_folder
from rt_neds.session import Session, load_session
from rt_neds.stream.decoder import outputs_of


@dataclass
class Evaluation:
    """One session, scored: the numbers, and what they are of, for pictures.

    Attributes
    ----------
    result : dict
        What ``--json`` gives for the session.
    binned : BinnedSession
    behaviours : list of Behaviour
        Those that were scored.
    bins : dict of str to ndarray of int64, shape (S,)
        Scored bins of each behaviour.
    true : dict of str to ndarray, shape (S,)
        What the behaviour was there.
    values : dict of str to ndarray, shape (S, V)
        What was decoded there, streamed if it can be.
    predicted : dict of str to Predicted
        Spikes, by metric of ``encoding``.
    region_N : ndarray of str, optional
    """

    result: dict[str, Any]
    binned: BinnedSession
    behaviours: list[Behaviour]
    bins: dict[str, NDArray[np.int64]]
    true: dict[str, NDArray]
    values: dict[str, NDArray]
    predicted: dict[str, Predicted]
    region_N: NDArray[np.str_] | None


def evaluate(
    bundle: str | Path,
    session_paths: str | Path | Sequence[str | Path],
    *,
    split: Split = "test",
    overrides: dict[str, Any] | None = None,
    baselines: Baselines = "linear",
    region: str | None = None,
    report: str | Path | None = None,
    live: Sequence[str] = (),
) -> dict[str, Any]:
    """Score a bundle on one split of a session, or of several.

    It is decoded through the streaming path. A bundle that cannot be served (it sees the future, or
    has the paper's tokens) is decoded offline, and the result says so.

    Parameters
    ----------
    bundle : path
    session_paths : path or sequence of path
    split : {"train", "val", "test"}
    overrides : dict, optional
        Fields of the ``data`` section to change, such as ``{"split": "contiguous"}``.
    baselines : {"linear", "all", "none"}
        What to fit on the same split: ridge and logistic regression; also those that take minutes;
        nothing.
    region : str, optional
        Field of ``units`` with each unit's region; by default the one training used, or the first
        of ``regions.FIELDS`` that is there.
    report : path, optional
        Folder in which to leave ``report.html``.
    live : sequence of str
        Behaviours that are shown, as a rig would that observes them, and so not scored. Linear
        baselines go without.

    Returns
    -------
    dict
        ``session, split, bundle, live, bins, streamed, decoding, encoding, baselines, ideal,
        stream_vs_offline_max_abs`` (in units of each behaviour's sd, or of probability; None where
        nothing is streamed) and ``regions``; for several sessions ``sessions``, one such dict each,
        and ``regions``, of the units of all.

    Raises
    ------
    BundleError, SessionError, ConfigError
    """
    paths = [session_paths] if isinstance(session_paths, (str, Path)) else list(session_paths)
    if report is not None:
        make_folder(report)  # told before the work
    spec = load_spec(bundle)
    refuse_unusable(spec, paths)
    model = build_model(bundle, spec)
    pictured: list[Evaluation] = []
    region_of: dict[str, NDArray[np.str_]] = {}

    def evaluated(path: str | Path) -> dict[str, Any]:
        of = evaluate_session(
            model,
            spec,
            path,
            split=split,
            overrides=overrides,
            baselines=baselines,
            region=region,
            live=live,
        )
        if of.region_N is not None:
            region_of[of.result["session"]] = of.region_N
        if report is not None:  # of many sessions the spikes would fill the memory
            pictured.append(of)
        return of.result

    results = [evaluated(path) for path in paths]
    regions = decode_regions(model, region_of)
    if report is not None:
        from offline.report import write_report

        write_report(report, spec, pictured, regions)
    one = results[0] if len(results) == 1 else {"sessions": results}
    return {**one, "regions": regions}


def evaluate_session(
    model: NEDS,
    spec: BundleSpec,
    session_path: str | Path,
    *,
    split: Split,
    overrides: dict[str, Any] | None,
    baselines: Baselines,
    region: str | None,
    live: Sequence[str] = (),
) -> Evaluation:
    """Score one session; see :func:`evaluate`."""
    config = parse_config(spec.training["config"], TrainConfig, f"{spec.name} (its configuration)")
    data = DataConfig(**{**_fields(config.data), **(overrides or {})})
    session, of_bundle = open_session(spec, session_path)
    alone = config.masking.of_spikes
    binned = bin_session(session, data, config.behaviour, require=False, spikes_alone=alone)
    spans = binned.spans(split)
    if not spans:
        raise ConfigError(f"{session_path} has no {split} split by data.split = {data.split!r}")
    kept_T = np.concatenate([np.arange(a, b) for a, b in spans])
    m_of = {b.name: m for m, b in enumerate(spec.behaviours, start=1)}
    decoded = outputs_of(spec, of_bundle, live)
    streamed = bool(decoded) and spec.model.streams
    offline: dict[str, NDArray] = {}
    if decoded:
        offline = offline_values(model, of_bundle, binned, spans, decoded, data.window_bins, live)
    if streamed:
        found, published_T = stream_spans(spec, model, of_bundle, binned, spans, live)
    else:  # nothing goes out, and bins are those that were recorded
        found, published_T = offline, binned.scored_TM[kept_T, 0]
    scored = {b.name: published_T & binned.scored_TM[kept_T, m_of[b.name]] for b in decoded}
    if region is None and config.masking.by_region:
        region = config.masking.region
    region_N = regions_of(session, region)
    scales = [of_bundle.scales[b.name] for b in model.behaviours]
    predicted = predict_spikes(
        model, config.masking.taught, binned, spans, scales, region_N, window=data.window_bins
    )
    behaviours = [b for b in decoded if scored[b.name].sum() >= 2]
    bins = {b.name: kept_T[scored[b.name]] for b in behaviours}
    true = {name: binned.values_TM[at_S, m_of[name]] for name, at_S in bins.items()}
    values = {name: found[name][scored[name]] for name in bins}

    def scores(guesses: dict[str, NDArray]) -> dict[str, Any]:
        return {
            b.name: score(binned, b, m_of[b.name], bins[b.name], guesses[b.name])
            for b in behaviours
            if b.name in guesses
        }

    shown = [b for b in spec.behaviours if b.name in live]
    lean = of_present(binned, [b.name for b in spec.behaviours])
    compared = baseline_values(lean, behaviours, bins, baselines, shown, window=data.window_bins)
    ideal = {b.name: ideal_values(binned, b, config, bins[b.name]) for b in behaviours}
    result: dict[str, Any] = {
        "session": session.id,
        "split": f"{data.split}/{split}",
        "bundle": spec.name,
        "live": list(live),
        "bins": int(published_T.sum()),
        "streamed": streamed,
        "decoding": scores(values),
        "encoding": encoding_scores(predicted),
        "baselines": {method: scores(guesses) for method, guesses in compared.items()},
        "ideal": scores({name: guess for name, guess in ideal.items() if guess is not None}),
        "stream_vs_offline_max_abs": (
            largest_difference(found, offline, scored, of_bundle, decoded) if streamed else None
        ),
    }
    if baselines == "all" and predicted:
        classes = {b.name: len(b.classes) for b in spec.behaviours if b.kind == "categorical"}
        result["baselines"]["glm"] = glm_scores(lean, predicted, classes)
    return Evaluation(result, binned, behaviours, bins, true, values, predicted, region_N)


def open_session(spec: BundleSpec, path: str | Path) -> tuple[Session, BundleSession]:
    """A session, and what the bundle knows of it; refused where their units differ."""
    session = load_session(path)
    of_bundle = spec.session(session.id)
    if of_bundle.units != session.unit_ids:
        raise BundleError(
            f"bundle {spec.name} knows {len(of_bundle.units)} units of session {session.id} and "
            f"{path} has {len(session.unit_ids)}, or others; it was trained on another "
            "version of the file: train again"
        )
    return session, of_bundle


def refuse_unusable(spec: BundleSpec, paths: list[str | Path]) -> None:
    """What cannot be evaluated among several sessions is told before the work of any."""
    if len(paths) < 2:
        return
    ids = [open_session(spec, path)[0].id for path in paths]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"{', '.join(map(str, paths))}: a session is given twice; give each once")


# -- scores --------------------------------------------------------------------------------------


def score(
    binned: BinnedSession,
    behaviour: Behaviour,
    m: int,
    at_S: NDArray[np.int64],
    values_SV: NDArray,
) -> dict[str, Any]:
    """Scores of one output at the bins ``at_S``."""
    true_S = binned.values_TM[at_S, m].astype(np.float64)
    if behaviour.kind == "categorical":
        trial_S = binned.trial_of(behaviour.name, at_S)
        return categorical_scores(true_S.astype(np.int64), values_SV, trial_S)
    if behaviour.kind == "poisson":
        return {"d2": poisson_d2(true_S, values_SV[:, 0])}
    train_S = np.flatnonzero(binned.of_split("train") & binned.scored_TM[:, m])
    phase_T = phase_in_trial(binned)
    train = binned.values_TM[train_S, m], phase_T[train_S]
    profile_S = mean_profile(*train, phase_T[at_S])
    return gaussian_scores(
        true_S,
        values_SV[:, 0],
        values_SV[:, 1] if values_SV.shape[1] > 1 else None,
        profile_S,
        profile_sd=float(np.std(train[0] - mean_profile(*train, train[1]))),
        tenth_S=tenth_of_trial(binned)[at_S],
    )


def phase_in_trial(binned: BinnedSession) -> NDArray[np.int64]:
    """Bins since the start of the trial, -1 outside trials: the clock a trivial guess may read."""
    phase_T = np.full(binned.bins, -1, np.int64)
    for low, high in _trials(binned):
        phase_T[low:high] = np.arange(high - low)
    return phase_T


def tenth_of_trial(binned: BinnedSession) -> NDArray[np.int64]:
    """Which tenth of its trial a bin lies in, -1 outside trials."""
    tenth_T = np.full(binned.bins, -1, np.int64)
    for low, high in _trials(binned):
        tenth_T[low:high] = np.arange(high - low) * TIME_STEPS // (high - low)
    return tenth_T


def _trials(binned: BinnedSession) -> list[tuple[int, int]]:
    """First bin and the one after the last of each trial, where the session has trials."""
    if not binned.session.has("trials.start"):
        return []
    trials_K2 = np.clip(binned.session.intervals("trials") // binned.width, 0, binned.bins)
    return [(int(low), int(high)) for low, high in trials_K2 if high > low]


def _fields(config: DataConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__struct_fields__}


# -- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", required=True, metavar="DIR", help="folder that train left")
    parser.add_argument(
        "--session", required=True, nargs="+", metavar="S.h5", help="one session file, or several"
    )
    parser.add_argument(
        "--split", default="test", choices=["train", "val", "test"], help="what to score (test)"
    )
    parser.add_argument(
        "--baselines",
        default="linear",
        choices=["linear", "all", "none"],
        help="fitted on the same split: ridge and logistic (linear), also GRU and GLM (all)",
    )
    parser.add_argument(
        "--region", metavar="FIELD", help="field of units that names regions (region, region_beryl)"
    )
    parser.add_argument(
        "--live",
        nargs="+",
        default=[],
        metavar="NAME",
        help="behaviours to show, as a rig that observes them would; others are decoded",
    )
    parser.add_argument("--report", metavar="DIR", help="leave DIR/report.html: tables, pictures")


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    result = evaluate(
        args.bundle,
        args.session,
        split=args.split,
        baselines=args.baselines,
        region=args.region,
        report=args.report,
        live=args.live,
    )
    if not args.quiet:
        show(result)
        if args.report:
            print(Path(args.report) / "report.html")
    return result


def show(result: dict[str, Any]) -> None:
    """Print the tables."""
    from rich.console import Console
    from rich.table import Table

    from offline.tables import HOW, decoding_table, encoding_table, regions_sentence

    console = Console()
    for one in result.get("sessions", [result]):
        apart = one["stream_vs_offline_max_abs"]
        how = ", streamed" if one["streamed"] else ""
        how += ", offline: it cannot be served" if one["decoding"] and not one["streamed"] else ""
        how += f", {' and '.join(one['live'])} shown" if one["live"] else ""
        console.print(f"{one['session']}, {one['split']}: {one['bins']} bins{how}")
        for head, rows in (decoding_table(one), encoding_table(one)):
            table = Table()
            for column in head:
                table.add_column(column, justify="left" if column in (head[0], HOW) else "right")
            for row in rows:
                table.add_row(*row)
            if rows:
                console.print(table)
        if apart is not None:
            console.print(f"stream against offline: {apart:.1e} at most")
    if result["regions"]:
        console.print(regions_sentence(result["regions"]))
