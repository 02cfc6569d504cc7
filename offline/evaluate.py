"""How good is a bundle on a session? Decoded through the streaming path, beside trivial guesses.

Shape suffixes: S scored bins, T bins, M modalities (0 is spikes), V published values.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from offline.config import DataConfig, TrainConfig
from offline.metrics import (
    bits_per_spike,
    categorical_scores,
    gaussian_scores,
    mean_profile,
    poisson_d2,
)
from offline.predict import decode_spans, encode_spans
from offline.windows import BinnedSession, Split, bin_session
from rt_neds.bundle import BundleSession, BundleSpec, build_model, load_spec
from rt_neds.config import parse_config
from rt_neds.errors import BundleError, ConfigError
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Behaviour, to_values_TV
from rt_neds.replay import batches
from rt_neds.session import load_session
from rt_neds.stream.binner import Binner
from rt_neds.stream.decoder import Decoder, make_step, outputs_of, schema_outputs

BATCH_MS = 20.0


def evaluate(
    bundle: str | Path,
    session_path: str | Path,
    *,
    split: Split = "test",
    overrides: dict[str, Any] | None = None,
    baselines: bool = True,
) -> dict[str, Any]:
    """Score a bundle on one split of a session.

    Parameters
    ----------
    bundle : path
    session_path : path
    split : {"train", "val", "test"}
    overrides : dict, optional
        Fields of the ``data`` section to change, such as ``{"split": "contiguous"}``.
    baselines : bool
        Whether to fit ridge and logistic regression on the same split.

    Returns
    -------
    dict
        ``session, split, bundle, bins, decoding, encoding, baselines, ideal,
        stream_vs_offline_max_abs``; the last in units of each behaviour's sd, or of probability.

    Raises
    ------
    BundleError, SessionError, ConfigError
    """
    spec = load_spec(bundle)
    session = load_session(session_path)
    of_bundle = spec.session(session.id)
    if of_bundle.units != session.unit_ids:
        raise BundleError(
            f"{bundle} knows {len(of_bundle.units)} units of session {session.id} and "
            f"{session_path} has {len(session.unit_ids)}, or others; it was trained on another "
            "version of the file: train again"
        )
    config = parse_config(spec.training["config"], TrainConfig, f"{bundle} (its configuration)")
    data = DataConfig(**{**_fields(config.data), **(overrides or {})})
    binned = bin_session(session, data, config.behaviour, require=False)
    model = build_model(bundle, spec)
    spans = binned.spans(split)
    if not spans:
        raise ConfigError(f"{session_path} has no {split} split by data.split = {data.split!r}")
    kept_T = np.concatenate([np.arange(a, b) for a, b in spans])
    streamed, published_T = stream_spans(spec, model, of_bundle, binned, spans)
    behaviours = outputs_of(spec, of_bundle)
    offline = offline_values(model, of_bundle, binned, spans, behaviours, data.window_bins)
    scored = {
        b.name: published_T & binned.scored_TM[kept_T, 1 + spec.behaviours.index(b)]
        for b in behaviours
    }
    result: dict[str, Any] = {
        "session": session.id,
        "split": f"{data.split}/{split}",
        "bundle": spec.name,
        "bins": int(published_T.sum()),
        "decoding": {},
        "encoding": encoding_scores(model, config, of_bundle, binned, spans, data.window_bins),
        "baselines": {},
        "ideal": {},
        "stream_vs_offline_max_abs": _difference(streamed, offline, scored, of_bundle, behaviours),
    }
    for b in behaviours:
        at_S = kept_T[scored[b.name]]
        if len(at_S) < 2:
            continue
        m = 1 + spec.behaviours.index(b)
        result["decoding"][b.name] = score(binned, b, m, at_S, streamed[b.name][scored[b.name]])
        ideal = ideal_values(binned, b, config, at_S)
        if ideal is not None:
            result["ideal"][b.name] = score(binned, b, m, at_S, ideal)
        if baselines:
            method, values = baseline_values(binned, b, at_S)
            scores = score(binned, b, m, at_S, values)
            result["baselines"].setdefault(method, {})[b.name] = scores
    return result


# -- three ways to decode ------------------------------------------------------------------------


def stream_spans(
    spec: BundleSpec,
    model: NEDS,
    of_bundle: BundleSession,
    binned: BinnedSession,
    spans: list[tuple[int, int]],
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.bool_]]:
    """Decode spans as the rig would: batches through the binner and the decoder, bin by bin.

    Each span begins as many bins earlier as can influence it, as a run of its own.

    Returns
    -------
    dict of str to ndarray, shape (bins of all spans, values of that output)
    ndarray of bool
        Which of the bins were published.
    """
    units = len(of_bundle.units)
    step = make_step(model, spec, of_bundle, np.zeros(units, bool))
    decoder = Decoder(spec, of_bundle, step)
    rows_U = np.arange(units, dtype=np.int32)
    values, published = [], []
    for epoch, (first, stop) in enumerate(spans):
        values_TV = np.full((stop - first, len(decoder.values_V)), np.nan, np.float32)
        binner = Binner(rows_U, units, binned.width, spec.model.context)
        start = max(0, first - spec.model.receptive_field) * binned.width
        plan = batches(binned.session, BATCH_MS, epoch=epoch, first=start, end=stop * binned.width)
        for batch in plan:
            for frame in binner.frames(batch):
                value_V = decoder.decode(frame)
                if frame.bin >= first:
                    values_TV[frame.bin - first] = value_V
        values.append(values_TV)
        published.append(np.isfinite(values_TV[:, 0]))
    all_TV = np.concatenate(values)
    cut = {
        o["name"]: slice(o["offset"], o["offset"] + o["size"])
        for o in schema_outputs(spec, of_bundle)
    }
    return {name: all_TV[:, at] for name, at in cut.items()}, np.concatenate(published)


def offline_values(
    model: NEDS,
    of_bundle: BundleSession,
    binned: BinnedSession,
    spans: list[tuple[int, int]],
    behaviours: list[Behaviour],
    window: int,
) -> dict[str, NDArray[np.float32]]:
    """The same from the offline forward pass."""
    raws = decode_spans(model, binned, spans, wanted=[b.name for b in behaviours], window=window)
    return {
        b.name: to_values_TV(torch.from_numpy(raws[b.name]), b, of_bundle.scales[b.name]).numpy()
        for b in behaviours
    }


def baseline_values(
    binned: BinnedSession, behaviour: Behaviour, at_S: NDArray[np.int64]
) -> tuple[str, NDArray]:
    """What a linear method, fitted on the same training bins, gives."""
    from offline.baselines import logistic, ridge

    if behaviour.kind == "categorical":
        return "logistic", logistic(binned, behaviour.name, at_S, classes=len(behaviour.classes))
    return "ridge", ridge(binned, behaviour.name, at_S)[:, None]


def ideal_values(
    binned: BinnedSession, behaviour: Behaviour, config: TrainConfig, at_S: NDArray[np.int64]
) -> NDArray | None:
    """Estimates of the ideal observer, where a simulated session carries them."""
    source = config.behaviour[behaviour.name].sources[0].rpartition(".")[2]
    if not binned.session.has(f"ideal.{source}"):
        return None
    series = binned.session.series(f"ideal.{source}")
    last = np.searchsorted(series.samples_L, (at_S + 1) * binned.width, side="right") - 1
    value_S = series.values_L[np.maximum(last, 0)]
    if behaviour.kind != "categorical":
        return value_S[:, None]
    codes = list(config.behaviour[behaviour.name].classes.values())
    if sorted(codes) != [0.0, 1.0]:
        return None
    return np.stack([value_S if code == 1.0 else 1.0 - value_S for code in codes], axis=1)


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
        trial_S = binned.trial_T[at_S].astype(np.int64)
        return categorical_scores(true_S.astype(np.int64), values_SV, trial_S)
    if behaviour.kind == "poisson":
        return {"d2": poisson_d2(true_S, values_SV[:, 0])}
    train_S = np.flatnonzero(binned.of_split("train") & binned.scored_TM[:, m])
    phase_T = phase_in_trial(binned)
    profile_S = mean_profile(binned.values_TM[train_S, m], phase_T[train_S], phase_T[at_S])
    sd_S = values_SV[:, 1] if values_SV.shape[1] > 1 else None
    return gaussian_scores(true_S, values_SV[:, 0], sd_S, profile_S)


def phase_in_trial(binned: BinnedSession) -> NDArray[np.int64]:
    """Bins since the start of the trial, -1 outside trials: the clock a trivial guess may read."""
    phase_T = np.full(binned.bins, -1, np.int64)
    if binned.session.has("trials.start"):
        for start, end in binned.session.intervals("trials") // binned.width:
            low, high = max(0, int(start)), min(int(end), binned.bins)
            phase_T[low:high] = np.arange(high - low)
    return phase_T


def encoding_scores(
    model: NEDS,
    config: TrainConfig,
    of_bundle: BundleSession,
    binned: BinnedSession,
    spans: list[tuple[int, int]],
    window: int,
) -> dict[str, Any]:
    """Bits per spike of the spikes given the behaviours; null for what was not trained."""
    scores: dict[str, Any] = dict.fromkeys(
        ("bits_per_spike", "forward", "co_smoothing", "intra_region", "inter_region")
    )
    if not config.masking.schemes.get("encoding"):
        return scores
    by = [of_bundle.scales[b.name] for b in model.behaviours]
    rate_TN = encode_spans(model, binned, spans, by, window=window)
    kept_T = np.concatenate([np.arange(a, b) for a, b in spans])
    shown = binned.shown_TM[kept_T]
    use = shown[:, 0] & shown[:, 1:].any(axis=1)
    count_TN = np.concatenate([binned.counts_TN(a, b) for a, b in spans])
    if use.any():
        scores["bits_per_spike"] = bits_per_spike(count_TN[use], rate_TN[use])
    return scores


def _difference(
    streamed: dict[str, NDArray],
    offline: dict[str, NDArray],
    scored: dict[str, NDArray],
    of_bundle: BundleSession,
    behaviours: list[Behaviour],
) -> float:
    """Largest difference over all scored bins, in sds of a behaviour or in probability."""
    worst = 0.0
    for b in behaviours:
        use = scored[b.name]
        if use.any():
            sd = of_bundle.scales[b.name].sd if b.kind == "gaussian" else 1.0
            gap = np.abs(streamed[b.name][use] - offline[b.name][use])
            worst = max(worst, float(gap.max()) / sd)
    return worst


def _fields(config: DataConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__struct_fields__}


# -- command -------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", required=True, metavar="DIR")
    parser.add_argument("--session", required=True, metavar="S.h5")
    parser.add_argument("--split", default="test", choices=["train", "val", "test"])
    parser.add_argument("--no-baselines", action="store_true", help="leave out ridge and logistic")


def run(args: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    result = evaluate(args.bundle, args.session, split=args.split, baselines=not args.no_baselines)
    if not args.quiet:
        show(result)
    return result


def show(result: dict[str, Any]) -> None:
    """Print a table of the scores."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['session']}, {result['split']}: {result['bins']} bins, streamed")
    columns = ["decoded", "score", "trivial", *result["baselines"], "ideal"]
    for column in columns:
        table.add_column(column, justify="left" if column == "decoded" else "right")
    for name, scores in result["decoding"].items():
        key, trivial = _headline(scores)
        cells = [f"{name} ({key})", f"{scores[key]:.3f}", trivial]
        for method in [*result["baselines"].values(), result["ideal"]]:
            cells.append(f"{method[name][key]:.3f}" if name in method else "")
        table.add_row(*cells)
    console = Console()
    console.print(table)
    console.print(f"stream against offline: {result['stream_vs_offline_max_abs']:.1e} at most")
    if result["encoding"]["bits_per_spike"]:
        console.print(
            f"encoding: {result['encoding']['bits_per_spike']['mean50']:.3f} bits per spike"
        )


def _headline(scores: dict[str, Any]) -> tuple[str, str]:
    if "r2" in scores:
        return "r2", f"{scores['r2_profile']:.3f} mean profile"
    if "d2" in scores:
        return "d2", "0 mean rate"
    return "balanced_accuracy", f"{1 / 2:.2f} chance" if scores["auc"] is not None else "chance"
