"""Fitting the linear decoder that a network begins at: closed form, of training bins alone.

In training the network must hear what regression says of bins it was not fitted to, or it would
learn to believe it too much: training is cut into contiguous pieces, and of each speaks a decoder
fitted to the others (stacking: Wolpert, Neural Networks 5:241, 1992). Outside training the one of
all is heard.

Shape suffixes: S sampled bins, T bins, F features of the read-in, X fits (of all, then without each
piece), U numbers the decoder says, R targets, C numbers of an output.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
import torch.nn.functional as nnf
from numpy.typing import NDArray
from scipy.linalg import solve
from torch import Tensor, nn

from offline.losses import loss_of, smeared
from offline.windows import BinnedSession
from rt_neds.model.linear import LinearDecoder, numbers_said
from rt_neds.model.readin import SpikeReadIn
from rt_neds.model.readout import Behaviour, Scale

PIECES = 5
"""Contiguous pieces of training, each foretold from the others."""
PENALTIES = tuple(float(a) for a in np.logspace(-2.0, 3.0, 11))
"""Tried, over the number of bins; features have unit variance in the mean."""
MOST_BINS = 12_000
"""Training bins that a session is fitted to; neighbours say nearly the same."""
FEWEST_BINS = 20
METHOD = 1
"""Another one where other numbers come out of the same session: what was kept is fitted anew."""
BINS_ALIKE = 50
"""So many neighbouring bins are evidence as one is."""
IMAGINED = 4.0
"""Trials of each class believed in beside those seen: eight labels that happen to be six of one
class and two of another do not say that the one is three times as common."""
WORTH = {"categorical": 2.0, "poisson": 1.0}
"""Nats per unit of a score, if a score is a probability less its mean; of a rate, to begin with."""


@dataclass(frozen=True)
class Fits:
    """Decoders of one session, one fitted to all of training and one without each piece of it.

    Attributes
    ----------
    weight_XUF, bias_XU : tensor of float32
    fit_T : ndarray of int8
        Which of them a bin of the session may hear in training.
    outs : dict of str to tensor
        What read-outs make of the first of them at the beginning, as their ``state_dict``.
    """

    weight_XUF: Tensor
    bias_XU: Tensor
    fit_T: NDArray[np.int8]
    outs: dict[str, Tensor]

    def give(self, decoder: LinearDecoder, but: Collection[str] = ()) -> None:
        """Have a network's decoder say what the one fitted to all of training says.

        Read-outs begin at what is made of it, ``but`` those of some behaviours, which are kept.
        """
        decoder.weight_UF.copy_(self.weight_XUF[0])
        decoder.bias_U.copy_(self.bias_XU[0])
        own = decoder.out.state_dict()
        for key, tensor in self.outs.items():
            if key.partition(".")[0] not in but:
                own[key].copy_(tensor)


def fit(
    binned: BinnedSession,
    behaviours: tuple[Behaviour, ...],
    scales: list[Scale],
    spikes_in: SpikeReadIn,
) -> Fits:
    """Fit a session's linear decoder, and those that training listens to.

    A behaviour of which training has too little, or only one value, is left out: nothing is said.

    Parameters
    ----------
    binned : BinnedSession
    behaviours : tuple of Behaviour
    scales : list of Scale
        Of each of them.
    spikes_in : SpikeReadIn
        Whose features are used, standardised already.

    Returns
    -------
    Fits
    """
    fit_T, root_F = pieces(binned), _as_roots(spikes_in)
    decoder = LinearDecoder(len(root_F), behaviours)
    U, F = decoder.weight_UF.shape
    weight_XUF, bias_XU = np.zeros((1 + PIECES, U, F)), np.zeros((1 + PIECES, U))
    for m, behaviour in enumerate(behaviours, start=1):
        usable_T = (fit_T > 0) & binned.scored_TM[:, m] & binned.shown_TM[:, 0]
        bins_S = np.flatnonzero(usable_T)
        if behaviour.name not in binned.present or len(bins_S) < FEWEST_BINS:
            continue
        most = min(MOST_BINS, len(bins_S))
        bins_S = bins_S[np.linspace(0, len(bins_S) - 1, most).round().astype(int)]
        value_S, scale = binned.values_TM[bins_S, m], scales[m - 1]
        target_SR = _targets(value_S, behaviour, scale)
        if not (np.ptp(target_SR, axis=0) > 0).any():
            continue
        root_SF = features(binned, bins_S, spikes_in) * root_F
        class_S = value_S.astype(int) if behaviour.kind == "categorical" else 0 * bins_S
        trial_S = binned.trial_of(behaviour.name, bins_S)
        late_S = _late(trial_S)
        weight_XRF, bias_XR = ridge(root_SF, target_SR, fit_T[bins_S], class_S, late_S)
        rows = decoder.where[behaviour.name]
        weight_XUF[:, rows], bias_XU[:, rows] = weight_XRF * root_F, bias_XR
        said_XSR = np.einsum("sf,xrf->xsr", root_SF, weight_XRF, optimize=True) + bias_XR[:, None]
        unseen_SR = said_XSR[fit_T[bins_S], np.arange(len(bins_S))]
        trials = len(np.unique(trial_S[trial_S >= 0]))
        out = cast(nn.Linear, decoder.out[behaviour.name])
        begin_out(out, unseen_SR, value_S, behaviour, scale, trials)
    return Fits(
        weight_XUF=torch.from_numpy(weight_XUF).float(),
        bias_XU=torch.from_numpy(bias_XU).float(),
        fit_T=fit_T,
        outs={name: tensor.clone() for name, tensor in decoder.out.state_dict().items()},
    )


def _as_roots(spikes_in: SpikeReadIn) -> NDArray[np.float32]:
    """What undoes the division of each feature by its own sd, all by that of all; shape (F,).

    The root of a count has the same noise whatever its mean, so what varies more says more: ridge
    is better on roots as they are than on those that have been made to vary alike (decision 0024).
    """
    return (spikes_in.sd_KN / spikes_in.sd_KN.square().mean().sqrt()).flatten().numpy()


def pieces(binned: BinnedSession) -> NDArray[np.int8]:
    """Piece of training each bin is in, from 1 on, 0 elsewhere; no trial is in two."""
    fit_T = np.zeros(binned.bins, np.int8)
    train = np.flatnonzero(binned.of_split("train"))
    fit_T[train] = 1 + np.arange(len(train)) * PIECES // max(len(train), 1)
    in_trial = train[binned.trial_T[train] >= 0]
    _, first, trial = np.unique(binned.trial_T[in_trial], return_index=True, return_inverse=True)
    fit_T[in_trial] = fit_T[in_trial[first]][trial]
    return fit_T


def features(
    binned: BinnedSession, bins_S: NDArray[np.int64], spikes_in: SpikeReadIn
) -> NDArray[np.float32]:
    """Features of the read-in at some bins, in order; shape (S, F)."""
    past, found = max(spikes_in.history) - 1, []
    far = np.flatnonzero((np.diff(bins_S) > 100) | (np.arange(1, len(bins_S)) % 1000 == 0)) + 1
    for run in np.split(bins_S, far):
        first, stop = int(run[0]), int(run[-1]) + 1
        counts_TN = binned.counts_TN(first - past, stop)
        counts_TN[~binned.cut(binned.shown_TM[:, 0], first - past, stop)] = 0
        with torch.no_grad():
            z_TF = spikes_in.standardise(torch.from_numpy(counts_TN)[None])[0]
        found.append(z_TF[past:][run - first].numpy())
    return np.concatenate(found)


def ridge(
    root_SF: NDArray[np.float32],
    target_SR: NDArray[np.float64],
    piece_S: NDArray[np.integer],
    class_S: NDArray[np.int64],
    late_S: NDArray[np.float64],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Ridge regressions of all bins and without each piece, at the penalty that foretells best.

    Parameters
    ----------
    root_SF, target_SR : ndarray
    piece_S : ndarray of int
        From 1 on.
    class_S : ndarray of int
        Classes count alike in each regression, whatever their numbers there.
    late_S : ndarray
        What a bin counts beside others of its class.

    Returns
    -------
    ndarray, shape (X, R, F)
    ndarray, shape (X, R)
    """
    basis_JF, x_SJ = None, root_SF
    if len(root_SF) < root_SF.shape[1]:  # fewer bins than features: all weights are sums of bins
        power_J, axes_SJ = np.linalg.eigh((root_SF @ root_SF.T).astype(np.float64))
        kept_J = power_J > 1e-6 * power_J[-1]
        root_J = np.sqrt(power_J[kept_J])
        x_SJ = axes_SJ[:, kept_J] * root_J
        basis_JF = (axes_SJ[:, kept_J] / root_J).T @ root_SF
    x_SJ = np.concatenate([x_SJ, np.ones((len(x_SJ), 1), x_SJ.dtype)], axis=1)
    error_A, weight_AXJR = np.zeros(len(PENALTIES)), []
    for x in range(1 + PIECES):
        seen_S, unseen_S = piece_S != x, piece_S == x
        weight_S = _weights(class_S[seen_S], late_S[seen_S])[:, None]
        wx_SJ = (x_SJ[seen_S] * weight_S).astype(x_SJ.dtype)
        gram_JJ, cross_JR = wx_SJ.T @ x_SJ[seen_S], wx_SJ.T @ target_SR[seen_S]
        weight_AJR = [_solve(gram_JJ, cross_JR, a) for a in PENALTIES]
        weight_AXJR.append(weight_AJR)
        if unseen_S.any():
            weight_S = _weights(class_S, late_S)[unseen_S]
            for a, weight_JR in enumerate(weight_AJR):
                missed_SR = x_SJ[unseen_S] @ weight_JR - target_SR[unseen_S]
                error_A[a] += (weight_S * np.square(missed_SR).sum(axis=1)).sum()
    best = len(PENALTIES) - 1 - int(error_A[::-1].argmin())  # of equals, the strongest
    weight_XJR = np.stack([weight_AJR[best] for weight_AJR in weight_AXJR])
    weight_XRJ, bias_XR = weight_XJR[:, :-1].transpose(0, 2, 1), weight_XJR[:, -1]
    return (weight_XRJ if basis_JF is None else weight_XRJ @ basis_JF), bias_XR


def _weights(class_S: NDArray[np.int64], late_S: NDArray[np.float64]) -> NDArray[np.float64]:
    """What each bin counts; all together one."""
    of_class = np.bincount(class_S, weights=late_S)
    return late_S / of_class[class_S] / np.count_nonzero(of_class)


def _solve(gram_JJ: NDArray, cross_JR: NDArray, penalty: float) -> NDArray[np.float64]:
    """Weights; the last feature is constant and is not penalised."""
    gram_JJ = gram_JJ.astype(np.float64)
    gram_JJ.flat[:: len(gram_JJ) + 1] += penalty
    gram_JJ[-1, -1] += 1e-9 - penalty
    return solve(gram_JJ, cross_JR, assume_a="pos", overwrite_a=True, check_finite=False)


def _targets(value_S: NDArray, behaviour: Behaviour, scale: Scale) -> NDArray[np.float64]:
    """What is regressed on: the value in sds, inside the range, or one column per class."""
    if behaviour.kind == "categorical":
        return np.eye(numbers_said(behaviour))[value_S.astype(int)]
    return np.asarray(scale.normalised(value_S.astype(np.float64)))[:, None]


def _late(trial_S: NDArray[np.int64]) -> NDArray[np.float64]:
    """What a bin counts: late in a trial there is more to know than early."""
    late_S = np.ones(len(trial_S))
    for trial in np.unique(trial_S[trial_S >= 0]):
        mine = np.flatnonzero(trial_S == trial)
        late_S[mine] = (np.arange(1, len(mine) + 1) / len(mine)) ** 2
    return late_S


def begin_out(
    out: nn.Linear,
    said_SR: NDArray[np.float64],
    value_S: NDArray,
    behaviour: Behaviour,
    scale: Scale,
    trials: int = 0,
) -> None:
    """Make an output, from what a decoder said of bins it had not seen, as likely as it is.

    A histogram is that of all values, tilted by what was said: few numbers, so that few trials
    suffice. What is said is never taken for its contrary, as chance would have it where trials are
    few: how much it is believed is positive, and near what it is worth in theory until there is
    evidence of more or less. Classes are taken to be as common as each other until there is.
    """
    said, value = _float(said_SR), _float(value_S)
    shape_CJ, base_C = torch.eye(behaviour.outputs), torch.zeros(behaviour.outputs)
    if behaviour.kind == "continuous":
        values_C = torch.from_numpy((scale.values_C - scale.mean) / scale.sd)
        shape_CJ = torch.stack([values_C, 0.3 * values_C**2], dim=1)
        base_C = (smeared(value, scale).mean(dim=0) + 1e-4).log()
    elif behaviour.kind == "poisson":
        base_C = value.mean(dim=0, keepdim=True).clamp_min(1e-4).log()
    believed = torch.zeros(1, requires_grad=True)  # logarithm, over what it is worth
    surer = torch.zeros(1, requires_grad=True)  # of large values than of small ones
    shift_J = torch.zeros(shape_CJ.shape[1], requires_grad=True)
    asked_1S = torch.ones(1, len(value), dtype=torch.bool)
    independent = trials or max(1.0, len(value) / BINS_ALIKE)

    def weight_CR() -> Tensor:
        if behaviour.kind == "continuous":
            return (shape_CJ @ torch.cat([believed.exp(), surer]))[:, None]
        return shape_CJ * believed.exp() * WORTH[behaviour.kind]

    def bias_C() -> Tensor:
        return base_C + shape_CJ @ shift_J

    def closure() -> Tensor:
        optimiser.zero_grad()
        raw_SC = nnf.linear(said, weight_CR(), bias_C())
        loss = loss_of(behaviour.kind, raw_SC[None], value[None], asked_1S, scale)
        doubt = 0.5 * (believed.square().sum() + surer.square().sum())
        if behaviour.kind == "categorical":
            doubt = doubt - IMAGINED * torch.log_softmax(raw_SC.mean(dim=0), dim=0).sum()
        else:
            doubt = doubt + 0.5 * shift_J.square().sum()
        loss = loss + doubt / independent
        loss.backward()
        return loss

    optimiser = torch.optim.LBFGS(
        [believed, surer, shift_J], max_iter=100, line_search_fn="strong_wolfe"
    )
    optimiser.step(closure)
    with torch.no_grad():
        out.weight.copy_(weight_CR())
        out.bias.copy_(bias_C())


def _float(array: NDArray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).float()
