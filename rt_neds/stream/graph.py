"""The step on a GPU: one captured graph for each trunk, whichever streams go through it.

Counts, what is live, whether it was observed, and the rotary angles of the bin go up in one copy
from a pinned buffer, one kernel computes all (:mod:`rt_neds.stream.graph_kernel`) and writes the
outputs into another; the number of the bin is counted on the device. Where that kernel cannot be,
PyTorch's hundred and fifty do it (:mod:`rt_neds.stream.graph_streams`).

Shape suffixes: T bins, N units, D model width, F angles of a head, O numbers read out (of
behaviours, then log-rates of the next bin's spikes), M live behaviours.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rt_neds.errors import BundleError
from rt_neds.model.attention import ROTARY_BASE
from rt_neds.model.neds import NEDS
from rt_neds.model.readout import Scale
from rt_neds.stream.binner import CHUNK
from rt_neds.stream.graph_streams import TRUNK, Stream, Streams
from rt_neds.stream.live_tokens import LiveTokens

F4 = NDArray[np.float32]


class _Group:
    """Streams of one trunk, and what runs them; who no longer exists is left out."""

    def __init__(
        self, model: NEDS, steps: Sequence[GraphStep], captured: bool, one_launch: bool
    ) -> None:
        self.model, self.captured, self.one_launch = model, captured, one_launch
        self._steps = [weakref.ref(step) for step in steps]
        self.streams = Streams(model, [step._stream for step in steps], captured, one_launch)
        for p, step in enumerate(steps):
            step._group, step._host = self, self.streams.host[p]

    def living(self) -> list[GraphStep]:
        return [step for ref in self._steps if (step := ref()) is not None and step._group is self]

    def same_trunk(self, other: _Group) -> bool:
        """Whether nothing would change if the other's weights were used."""
        if (self.captured, self.one_launch) != (other.captured, other.one_launch):
            return False
        if self.model.config != other.model.config:
            return False
        mine, theirs = (
            {k: v for k, v in group.model.state_dict().items() if k.split(".")[0] in TRUNK}
            for group in (self, other)
        )
        return mine.keys() == theirs.keys() and all(
            mine[key].device == theirs[key].device and torch.equal(mine[key], theirs[key])
            for key in mine
        )


class GraphStep:
    """The network, one bin at a time, for one stream of spikes, and of behaviours observed live.

    Parameters
    ----------
    model : NEDS
        Copied; later changes to it are not seen.
    session : str
        Session id.
    wanted : sequence of str
        Behaviours to decode, at least one, in the order of their outputs.
    missing_N : ndarray of bool, shape (units,), optional
        Units to replace by their learned stand-in.
    device : torch.device or str
    live : mapping of str to Scale, optional
        Behaviours that may be shown, in the order of their values.
    captured : bool
        Replay a CUDA graph, rather than launch kernel by kernel.
    one_launch : bool, optional
        Compute all in one launch where the GPU can; by default if captured.

    Raises
    ------
    BundleError
        If a tensor does not have the shape that the others imply; it is named.
    RuntimeError
        If the device is not there, has no memory left, or does not let itself be captured.
    """

    _group: _Group
    _host: dict[str, F4]

    def __init__(
        self,
        model: NEDS,
        session: str,
        wanted: Sequence[str],
        missing_N: NDArray[np.bool_] | None = None,
        device: torch.device | str = "cuda",
        *,
        live: Mapping[str, Scale] | None = None,
        captured: bool = True,
        one_launch: bool | None = None,
    ) -> None:
        model.start(session)  # refuses a model that cannot be streamed
        if not wanted or not set(wanted) <= set(model.modalities[1:]):
            raise ValueError(f"asked for {list(wanted)}; expected one or more behaviours")
        self._units, c = model.parts(session).units, model.config
        self._never_N = np.zeros(self._units, bool) if missing_N is None else missing_N
        _check("missing_N", self._never_N.shape, (self._units,))
        self._live = LiveTokens(model, session, live or {})
        model = copy.deepcopy(model).eval().requires_grad_(False).to(device)
        self._stream = Stream(model, session, wanted, self._never_N)
        width = c.dim // c.heads
        self._frequency_F = ROTARY_BASE ** -(np.arange(0, width, 2, dtype=np.float64) / width)
        self._table_2F, self._turned = np.zeros(2 * len(self._frequency_F), np.float32), -1
        self._next_TN = np.zeros((CHUNK, self._units), np.float32)
        self._raw_TO = np.zeros((CHUNK, self._stream.outputs), np.float32)
        self._bins = 0
        _Group(model, [self], captured, captured if one_launch is None else one_launch)
        self.reset()

    def reset(self, first_bin: int = 0) -> None:
        """Forget the past; the next bin has this number."""
        self._bin = int(first_bin)
        self._stream.reset(self._bin)

    def step(self, counts_N: F4, observed: bool, live_M: F4 | None = None) -> F4:
        """Decode the next bin; see :meth:`steps`."""
        return self.steps((counts_N,), (observed,), () if live_M is None else (live_M,))[0]

    def steps(
        self, counts_TN: Sequence[F4], observed_T: Sequence[bool], live_TM: Sequence[F4] = ()
    ) -> F4:
        """Decode the next bins, one replay after the other.

        Parameters
        ----------
        counts_TN : sequence of ndarray of float32, shape (units,)
            Spikes of each unit in each bin; ignored if the bin is not observed.
        observed_T : sequence of bool
        live_TM : sequence of ndarray of float32, shape (live behaviours,)
            What is observed of them in each bin, NaN where nothing is; empty if they are hidden.

        Returns
        -------
        ndarray of float32, shape (bins, numbers of all wanted outputs)
            Valid until the next call.
        """
        return self.together((self,), (counts_TN,), (observed_T,), (live_TM,))[0]

    @staticmethod
    def together(
        steps: Sequence[GraphStep],
        counts_PTN: Sequence[Sequence[F4]],
        observed_PT: Sequence[Sequence[bool]],
        live_PTM: Sequence[Sequence[F4]],
    ) -> list[F4]:
        """As :meth:`steps` of each of several streams that share a trunk: one replay for a bin of
        each of them.
        """
        group = steps[0]._group
        assert all(step._group is group for step in steps), "streams of different trunks"
        for step in group.living():
            step._host["due_1"][0] = 0.0
        for t in range(max(map(len, counts_PTN))):
            due = []
            for step, counts_TN, observed_T, live_TM in zip(
                steps, counts_PTN, observed_PT, live_PTM, strict=True
            ):
                step._host["due_1"][0] = t < len(counts_TN)
                if t < len(counts_TN):
                    step._put(counts_TN[t], observed_T[t], live_TM[t] if live_TM else None)
                    due.append(step)
            group.streams.start()
            for step in due:  # the host has nothing else to do
                step._turn(step._bin + 1)
            group.streams.wait()
            for step in due:
                step._get(t)
        for step, counts_TN in zip(steps, counts_PTN, strict=True):
            step._bins = len(counts_TN)
        return [step._raw_TO[: step._bins] for step in steps]

    def _put(self, counts_N: F4, observed: bool, live_M: F4 | None) -> None:
        """What goes up of the next bin."""
        _check("counts_N", np.shape(counts_N), (self._units,))
        host = self._host
        host["counts_N"][:] = counts_N if observed else 0.0
        host["spikes_1"][0] = observed
        host["seen_1"][0] = self._live.write(live_M, host["live_D"]) or observed
        if self._turned != self._bin:
            self._turn(self._bin)
        host["table_2F"][:] = self._table_2F

    def _turn(self, bin: int) -> None:
        """Find the rotary angles of a bin, before it comes."""
        half = len(self._frequency_F)
        angle_F = bin * self._frequency_F  # in float64, or it is off after some hours
        np.cos(angle_F, out=self._table_2F[:half], casting="same_kind")
        np.sin(angle_F, out=self._table_2F[half:], casting="same_kind")
        self._turned = bin

    def _get(self, t: int) -> None:
        """What came down."""
        outputs = self._stream.outputs
        self._raw_TO[t] = self._host["raw_O"][:outputs]
        self._next_TN[t] = self._host["raw_O"][outputs:]
        self._bin += 1

    def share(self, other: GraphStep) -> bool:
        """Go through the other's graph if the trunk is the same, so that both can in one replay.

        Both keep what they know of the past.
        """
        if self._group is not other._group and self._group.same_trunk(other._group):
            steps = [*other._group.living(), *self._group.living()]
            _Group(other._group.model, steps, other._group.captured, other._group.one_launch)
        return self._group is other._group

    @property
    def many_because(self) -> str:
        """Why a step is many launches, where it was to be one."""
        return self._group.streams.many_because

    def next_TN(self) -> F4:
        """Log-rates of the spikes of the bin after each of those last decoded."""
        return self._next_TN[: self._bins]

    def miss(self, silent_N: NDArray[np.bool_] | None) -> None:
        """From the next bin on take these units, too, for missing."""
        missing_N = self._never_N if silent_N is None else self._never_N | silent_N
        # In place: the graph has its address.
        self._stream.missing_N.copy_(torch.from_numpy(missing_N))


def _check(name: str, came: Any, expected: tuple[int, ...]) -> None:
    if tuple(came) != expected:
        raise BundleError(
            f"{name} is {tuple(came)} and {expected} was captured; "
            "serve the bundle of the session whose units come"
        )
