"""What belongs to sessions is parted among the processes of a run; what all share, each has.

A unit costs a thousand parameters at the base width: hundreds of sessions are hundreds of millions,
five times over (network, running average, best, two moments of AdamW), and a step uses those of a
few. So each session is kept by one process. The others borrow its weights for a step of it; in
between theirs are empty tensors, of which averages, copies and state dicts cost nothing. The trunk
is twelve million parameters at most, and stays whole (``docs/decisions/0013``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from offline.processes import Processes
from rt_neds.model.neds import NEDS


class Shards:
    """The sessions of a network, each with the process that keeps it.

    Parameters
    ----------
    model : NEDS
        Whole, and the same in all processes. What others keep of it is emptied here.
    processes : Processes
    """

    def __init__(self, model: NEDS, processes: Processes) -> None:
        self._processes = processes
        self._keeper = {s: n % processes.count for n, s in enumerate(model.session_ids)}
        self._shapes = {s: [x.shape for x in _tensors(model, s)] for s in model.session_ids}
        for session in model.session_ids:
            self._give_back(model, session)

    @contextmanager
    def borrowed(self, model: NEDS, sessions: Sequence[str]) -> Iterator[None]:
        """Meanwhile all have the weights of these sessions; all must come here together.

        What changes of them meanwhile is kept by their keeper alone.
        """
        try:
            for session in sessions:
                self._borrow(model, session)
            yield
        finally:
            for session in sessions:
                self._give_back(model, session)

    def gather(self, model: NEDS) -> None:
        """Make the network whole in the first process; all must come here together."""
        for session in model.session_ids:
            self._borrow(model, session)
            if not self._processes.first:
                self._give_back(model, session)

    @torch.no_grad()
    def _borrow(self, model: NEDS, session: str) -> None:
        if self._processes.count == 1:
            return
        keeper, shapes = self._keeper[session], self._shapes[session]
        tensors, sizes = _tensors(model, session), [shape.numel() for shape in shapes]
        if keeper == self._processes.number:
            self._processes.tell(torch.cat([x.flatten() for x in tensors]), keeper)
            return
        told = self._processes.tell(torch.empty(sum(sizes), device=tensors[0].device), keeper)
        for tensor, piece, shape in zip(tensors, told.split(sizes), shapes, strict=True):
            tensor.data = piece.view(shape)

    def _give_back(self, model: NEDS, session: str) -> None:
        if self._keeper[session] == self._processes.number:
            return
        for tensor in _tensors(model, session):
            tensor.grad = None
            tensor.data = tensor.new_empty(0)


def _tensors(model: NEDS, session: str) -> list[Tensor]:
    parts = model.parts(session)
    return [*parts.parameters(), *parts.buffers()]
