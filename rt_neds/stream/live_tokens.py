"""What behaviours that are observed live add to the token of a bin: the network's own read-ins.

Shape suffixes: M live behaviours, D model width, P places of a value, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rt_neds.model.readin import PLACES
from rt_neds.model.readout import Scale

F4 = NDArray[np.float32]


class LiveTokens:
    """Read-ins of some behaviours of one session, out of PyTorch.

    Parameters
    ----------
    model : NEDS
        Its weights are copied.
    session : str
    scales : mapping of str to Scale
        Of each behaviour that may be shown, in the order of the values.
    """

    def __init__(self, model: Any, session: str, scales: Mapping[str, Scale]) -> None:
        self._readers = [_reader(model, session, name, scale) for name, scale in scales.items()]

    def write(self, live_M: F4 | None, token_D: F4) -> bool:
        """Make the sum of what is shown; False if nothing is.

        Parameters
        ----------
        live_M : ndarray, shape (M,), or None
            Values in physical units, or class numbers; NaN where nothing is observed.
        token_D : ndarray
            Overwritten; it may be longer than the model is wide.
        """
        token_D[:] = 0
        if live_M is None:
            return False
        shown = False
        for value, reader in zip(live_M.tolist(), self._readers, strict=True):
            if value == value:  # it is a number
                of_value_D = reader(value)
                token_D[: len(of_value_D)] += of_value_D
                shown = True
        return shown


def _reader(model: Any, session: str, name: str, scale: Scale) -> Callable[[float], F4]:
    modality_D = _f4(model.modality_MD)[model.modalities.index(name)]
    if name in model.categorical_in:
        class_CD = _f4(model.categorical_in[name].embedding.weight) + modality_D
        return lambda value: class_CD[int(value)]
    read_in = model.parts(session).behaviour_in[name]
    bias_D = _f4(read_in.linear.bias) + modality_D
    weight_DI = np.column_stack([bias_D, _f4(read_in.linear.weight)])
    # exp(-away^2 / 2), written so that as few calls as can be are left: each costs a microsecond.
    narrow = np.float32((PLACES - 1) / 6.0 * np.sqrt(0.5))
    places_P = _f4(read_in.places_P) * narrow
    input_I = np.ones(2 + PLACES, np.float32)
    near_P, token_D = input_I[2:], np.empty(len(bias_D), np.float32)

    def read(value: float) -> F4:
        z = (min(max(value, scale.low), scale.high) - scale.mean) / scale.sd
        input_I[1] = z
        np.subtract(places_P, np.float32(z) * narrow, out=near_P)
        np.multiply(near_P, near_P, out=near_P)
        np.negative(near_P, out=near_P)
        np.exp(near_P, out=near_P)
        return np.dot(weight_DI, input_I, out=token_D)

    return read


def _f4(tensor: Tensor) -> F4:
    return tensor.detach().cpu().numpy().astype(np.float32)
