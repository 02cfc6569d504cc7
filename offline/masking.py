"""What each training scheme hides, and so asks for.

Schemes of NEDS (arXiv 2504.08201, section 3), drawn per sample:

    decoding           every behaviour is hidden, spikes are shown
    encoding           spikes are hidden, every behaviour is shown
    within_spikes      random bins of the spikes are hidden; behaviours are neither shown nor asked
    within_behaviour   random bins of each behaviour, independently; spikes neither shown nor asked
    cross_modal        the same random bins of every modality

Shape suffixes: B samples, T bins, M modalities (0 is spikes), N units.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from offline.config import MaskingConfig
from rt_neds.model.neds import SCHEMES


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
    missing_BN : ndarray of bool
        Units replaced by their stand-in.
    """

    scheme_B: NDArray[np.int64]
    observed_BTM: NDArray[np.bool_]
    asked_BTM: NDArray[np.bool_]
    missing_BN: NDArray[np.bool_]


def draw_masks(
    config: MaskingConfig,
    shown_BTM: NDArray[np.bool_],
    scored_BTM: NDArray[np.bool_],
    units: int,
    rng: np.random.Generator,
) -> Masks:
    """Draw a scheme for each sample and hide what it says.

    Parameters
    ----------
    config : MaskingConfig
    shown_BTM, scored_BTM : ndarray of bool
        Where each modality may be shown, and may be asked for.
    units : int
    rng : numpy.random.Generator

    Returns
    -------
    Masks
    """
    names = list(config.schemes)
    weights = np.array([config.schemes[name] for name in names], dtype=np.float64)
    drawn = rng.choice(len(names), size=len(shown_BTM), p=weights / weights.sum())
    observed, asked = np.zeros_like(shown_BTM), np.zeros_like(scored_BTM)
    for b, index in enumerate(drawn):
        hidden_TM, silenced_M = hide(names[index], shown_BTM.shape[1:], config.ratio, rng)
        observed[b] = shown_BTM[b] & ~hidden_TM & ~silenced_M
        asked[b] = scored_BTM[b] & hidden_TM & ~silenced_M
    share = rng.uniform(0.0, 2.0 * config.unit_dropout, size=(len(shown_BTM), 1))
    return Masks(
        scheme_B=np.array([SCHEMES.index(names[index]) for index in drawn], dtype=np.int64),
        observed_BTM=observed,
        asked_BTM=asked,
        missing_BN=rng.random((len(shown_BTM), units)) < share,
    )


def hide(
    scheme: str, shape_TM: tuple[int, ...], ratio: float, rng: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """What one scheme hides in one sample.

    Parameters
    ----------
    scheme : str
        One of ``SCHEMES``.
    shape_TM : (int, int)
    ratio : float
        Chance of a bin to be hidden by the schemes that hide bins at random.
    rng : numpy.random.Generator

    Returns
    -------
    hidden_TM : ndarray of bool
    silenced_M : ndarray of bool
        Modalities that are neither shown nor asked for.
    """
    T, M = shape_TM
    hidden_TM, silenced_M = np.zeros((T, M), bool), np.zeros(M, bool)
    if scheme == "decoding":
        hidden_TM[:, 1:] = True
    elif scheme == "encoding":
        hidden_TM[:, 0] = True
    elif scheme == "within_spikes":
        hidden_TM[:, 0] = rng.random(T) < ratio
        silenced_M[1:] = True
    elif scheme == "within_behaviour":
        hidden_TM[:, 1:] = rng.random((T, M - 1)) < ratio
        silenced_M[0] = True
    elif scheme == "cross_modal":
        hidden_TM[:] = (rng.random(T) < ratio)[:, None]
    else:
        raise ValueError(f"no scheme {scheme}; there are {', '.join(SCHEMES)}")
    return hidden_TM, silenced_M
