"""What each training scheme hides, and so asks for.

Schemes of NEDS (arXiv 2504.08201, section 3), drawn per sample:

    decoding           every behaviour is hidden, spikes are shown; half of the samples show some
                       of those that may be observed live
    encoding           spikes are hidden, every behaviour is shown
    within_spikes      random bins of the spikes are hidden; behaviours are neither shown nor asked
    within_behaviour   random bins of each behaviour, independently; spikes neither shown nor asked
    cross_modal        the same random bins of every modality

Schemes of MtM (arXiv 2407.14668, section 3), on spikes alone; its temporal masking, NDT1's, is
within_spikes. A hidden unit enters with its stand-in in every bin, and is asked for:

    neuron             random units
    inter_region       all units of one region, drawn at random
    intra_region       all units outside one region, unasked, and random units inside it, asked
    forward            the last bins of the window, for every unit

Where ``decoding`` shows all spikes, each bin's may also be asked of the bins before it (``ahead``):
it hides nothing, and costs nothing.

Shape suffixes: B samples, T bins, M modalities (0 is spikes), N units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offline.config import MaskingConfig
from rt_neds.model.neds import SCHEMES

MAY, EACH = 0.5, 0.75
"""Share of the samples of ``decoding`` that may show live behaviours: from spikes alone, which is
what is always there, most is to be learned. And then the share that each is shown in: one may fail
while others come."""
UNIT_SCHEMES = ("neuron", "inter_region", "intra_region")
"""Schemes that hide units rather than bins."""


@dataclass(frozen=True)
class Masks:
    """What one batch shows and asks.

    Attributes
    ----------
    scheme_B : ndarray of int64
    observed_BTM : ndarray of bool
        What the network is shown.
    asked_BTM : ndarray of bool
        What is hidden by the scheme and scored: the loss counts these and nothing else.
    asked_BN : ndarray of bool
        Units whose spikes are asked for, where spikes are.
    missing_BN : ndarray of bool
        Units replaced by their stand-in.
    ahead_BT : ndarray of bool
        Bins whose spikes are asked of the bins before them.
    """

    scheme_B: NDArray[np.int64]
    observed_BTM: NDArray[np.bool_]
    asked_BTM: NDArray[np.bool_]
    asked_BN: NDArray[np.bool_]
    missing_BN: NDArray[np.bool_]
    ahead_BT: NDArray[np.bool_]


def draw_masks(
    config: MaskingConfig,
    shown_BTM: NDArray[np.bool_],
    scored_BTM: NDArray[np.bool_],
    region_N: NDArray[np.int64],
    rng: np.random.Generator,
    live_M: NDArray[np.bool_] | None = None,
) -> Masks:
    """Draw a scheme for each sample and hide what it says.

    Parameters
    ----------
    config : MaskingConfig
    shown_BTM, scored_BTM : ndarray of bool
        Where each modality may be shown, and may be asked for.
    region_N : ndarray of int
        Region of each unit, as a number.
    rng : numpy.random.Generator
    live_M : ndarray of bool, optional
        Behaviours that ``decoding`` may show; none by default.

    Returns
    -------
    Masks
    """
    names = [name for name, weight in config.schemes.items() if weight > 0]
    weights = np.array([config.schemes[name] for name in names], dtype=np.float64)
    drawn = rng.choice(len(names), size=len(shown_BTM), p=weights / weights.sum())
    units = (len(shown_BTM), len(region_N))
    share = rng.uniform(0.0, 2.0 * config.unit_dropout, size=(len(shown_BTM), 1))
    missing, asked_units = rng.random(units) < share, np.ones(units, bool)
    observed, asked = np.zeros_like(shown_BTM), np.zeros_like(scored_BTM)
    ahead = np.zeros(shown_BTM.shape[:2], bool)
    for b, index in enumerate(drawn):
        hidden_TM, silenced_M = hide(names[index], shown_BTM.shape[1:], config.ratio, rng)
        if names[index] == "decoding" and live_M is not None and live_M.any():
            may, each_M = rng.random(), rng.random(len(live_M))
            hidden_TM[:, live_M & (each_M < EACH) & (may < MAY)] = False
        observed[b] = shown_BTM[b] & ~hidden_TM & ~silenced_M
        asked[b] = scored_BTM[b] & hidden_TM
        if names[index] in UNIT_SCHEMES:
            missing[b], asked_units[b] = hide_units(names[index], region_N, config.ratio, rng)
            asked[b, :, 0] = scored_BTM[b, :, 0]  # asked though shown: of other units
        elif names[index] == "decoding" and config.ahead:
            ahead[b] = scored_BTM[b, :, 0]
    return Masks(
        scheme_B=np.array([SCHEMES.index(names[index]) for index in drawn], dtype=np.int64),
        observed_BTM=observed,
        asked_BTM=asked,
        asked_BN=asked_units,
        missing_BN=missing,
        ahead_BT=ahead,
    )


def hide(
    scheme: str, shape_TM: tuple[int, ...], ratio: float, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What one scheme hides in one sample, by bins.

    Parameters
    ----------
    scheme : str
        One of ``SCHEMES``.
    shape_TM : (int, int)
    ratio : float
        Chance of a bin to be hidden by the schemes that hide bins at random; share of the window
        that ``forward`` hides.
    rng : numpy.random.Generator

    Returns
    -------
    hidden_TM : ndarray of bool
    silenced_M : ndarray of bool
        Modalities that are not shown, though not hidden, and so not asked for.
    """
    T, M = shape_TM
    hidden_TM, silenced_M = np.zeros((T, M), bool), np.zeros(M, bool)
    if scheme == "decoding":
        hidden_TM[:, 1:] = True
    elif scheme == "encoding":
        hidden_TM[:, 0] = True
    elif scheme == "within_behaviour":
        hidden_TM[:, 1:] = rng.random((T, M - 1)) < ratio
        silenced_M[0] = True
    elif scheme == "cross_modal":
        hidden_TM[:] = (rng.random(T) < ratio)[:, None]
    elif scheme in SCHEMES:  # spikes alone
        silenced_M[1:] = True
        if scheme == "within_spikes":
            hidden_TM[:, 0] = rng.random(T) < ratio
        elif scheme == "forward":
            hidden_TM[T - max(1, round(ratio * T)) :, 0] = True
    else:
        raise ValueError(f"no scheme {scheme}; there are {', '.join(SCHEMES)}")
    return hidden_TM, silenced_M


def hide_units(
    scheme: str, region_N: NDArray[np.int64], ratio: float, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What one scheme hides in one sample, by units.

    Parameters
    ----------
    scheme : str
        One of ``UNIT_SCHEMES``.
    region_N : ndarray of int
    ratio : float
        Chance of a unit to be hidden, where units are hidden at random; one at least is.
    rng : numpy.random.Generator

    Returns
    -------
    missing_N, asked_N : ndarray of bool
        Units replaced by their stand-in, and those of them that are asked for.
    """
    here_N = region_N == rng.choice(np.unique(region_N))
    if scheme == "inter_region":
        return here_N, here_N
    inside_N = here_N if scheme == "intra_region" else np.ones(len(region_N), bool)
    asked_N = inside_N & (rng.random(len(region_N)) < ratio)
    if not asked_N.any():
        asked_N[rng.choice(np.flatnonzero(inside_N))] = True
    return asked_N | ~inside_N, asked_N
