"""Up to which sample is a stream complete that does not say so? Open Ephys, from what it sends.

Of every block its spikes are sent first, electrode by electrode, so that they are in order on an
electrode but not across electrodes; peaks in the last ``TAIL`` samples come with the next block;
then the continuous samples of the chosen channels, if any were chosen. So:

- *by data*: after a block's samples nothing before its end less ``TAIL`` can come any more;
- *by spikes*, where no samples are sent: a spike or event at sample s says that nothing before s
  less the lateness is awaited, and the lateness must cover a block and its tail.

Everything is a function of the messages in their order, except that by spikes, in silence, the
clock may stand in for them.
"""

from __future__ import annotations

TAIL = 100
"""The spike detector leaves so many samples of a block to the next."""
DEFAULT_LATENESS_MS = 50.0
"""By spikes, where nothing was set: a block of 1024 samples at 30 kHz, its tail, and 13 ms."""
LEAP_S = 60.0
BACK_S = 1.0
UNDECIDED = 3
"""Spikes over so many latenesses without a block: this stream sends none."""
BEYOND = 32
"""So many messages a second past the last block: the channels were deselected."""

Span = tuple[int, int]


class Watermark:
    """Follows one acquisition.

    Spans ``(first, end)`` are what a batch states: complete from ``first`` to ``end``. A ``first``
    beyond the last ``end`` says that something between is missing.

    Parameters
    ----------
    rate : float
        Samples per second.
    lateness_ms : float
        By data it is added to the tail; by spikes 0 stands for ``DEFAULT_LATENESS_MS``.

    Attributes
    ----------
    end : int or None
        Stated so far.
    by_data : bool or None
        None while undecided.
    newest : int
        The last sample that is known to have been; -1 before the first.
    """

    def __init__(self, rate: float, lateness_ms: float) -> None:
        self._tail = TAIL + round(lateness_ms / 1000 * rate)
        self._lateness = round((lateness_ms or DEFAULT_LATENESS_MS) / 1000 * rate)
        self._grid = max(1, round(rate / 1000))
        self._leap, self._back = round(LEAP_S * rate), round(BACK_S * rate)
        self._rate = rate
        self.begin(whole=False)

    def begin(self, *, whole: bool) -> None:
        """Begin an acquisition; ``whole``: its very first message is here."""
        self.end: int | None = None
        self.by_data: bool | None = None
        self._lost = not whole
        self.newest = -1
        self._oldest = -1
        self._suspect_to = 0  # by spikes: what was lost may lie anywhere before
        self._block: Span | None = None
        self._beyond = 0

    @property
    def whole(self) -> bool:
        """Whether nothing is known to be missing before what comes next."""
        return not self._lost

    @property
    def lateness_s(self) -> float:
        """How long a block may take, in seconds."""
        return self._lateness / self._rate

    def lose(self) -> None:
        """Take in that messages are missing just before the next."""
        self._lost = True

    def breaks(self, sample: int) -> bool:
        """Whether a spike or event at ``sample`` cannot belong to the same acquisition."""
        if self.by_data or self.newest < 0:
            return False
        return not self.newest - self._back <= sample <= self.newest + self._leap

    def block_breaks(self, first: int) -> bool:
        """Whether a block that begins at ``first`` cannot belong to the same acquisition."""
        if self._block is None:
            return self.breaks(first)
        began, ended = self._block
        return first != began and not ended <= first <= ended + self._leap

    def jumps(self, sample: int) -> bool:
        """Whether so much is left out before a spike or event that it may be of another."""
        return not self.by_data and 0 <= self.newest < sample - self._back

    def block_jumps(self, first: int) -> bool:
        """Whether anything is left out before a block."""
        return self._block is not None and first > self._block[1]

    def see(self, sample: int) -> list[Span]:
        """Take in a spike or an event."""
        if self.by_data:
            assert self._block is not None
            self._beyond += sample > self._block[1] + self._back
            if self._beyond < BEYOND:
                return []
            self.by_data, self._block = False, None
        self._oldest = sample if self._oldest < 0 else min(self._oldest, sample)
        self.newest = max(self.newest, sample)
        if self._lost:
            self._suspect_to = self.newest + self._lateness
        if self.by_data is None:
            if self.newest - self._oldest <= UNDECIDED * self._lateness:
                return []
            self.by_data = False
        self._lost = False
        return self._advance()

    def see_block(self, first: int, end: int) -> list[Span]:
        """Take in one channel of a block; all but the first channel say nothing new."""
        self._beyond = 0
        last, began_by_spikes = self._block, self.by_data is False
        if last is not None and end <= last[1]:
            return []
        self.by_data, self._block = True, (first, end)
        self.newest = max(self.newest, end - 1)
        lost = self._lost or (began_by_spikes and (self.end or 0) < self._suspect_to)
        # All but the tail of this block may have been in what was lost, whatever is held back.
        complete = max(end - (TAIL if lost else self._tail), self.end or 0)
        self._lost = False
        if self.end is None:
            start = complete if lost else first
            return self._state((start, max(start, complete)))
        if lost:
            return self._state((complete, complete))
        if last is not None and first > last[1]:  # not recorded between
            ended = max(self.end, last[1])
            return self._state((self.end, ended), (first, max(first, complete)))
        return self._state((self.end, complete))

    def pass_to(self, sample: int) -> list[Span]:
        """Take in, by spikes, that the clock says ``sample`` has come and nothing was heard."""
        if self.by_data is not False or sample > self.newest + self._leap:
            return []
        self.newest = max(self.newest, sample)
        return self._advance()

    def _advance(self) -> list[Span]:
        # On a grid, so that a burst of spikes does not become a burst of batches.
        to = (self.newest - self._lateness) // self._grid * self._grid
        if self.end is None:
            start = self._suspect_to or max(0, self._oldest - self._lateness)
            return self._state((start, to)) if to >= start else []
        if to <= self.end:
            return []
        if self.end < self._suspect_to:
            missing_to = min(to, self._suspect_to)
            return self._state((missing_to, missing_to), (missing_to, to))
        return self._state((self.end, to))

    def _state(self, *spans: Span) -> list[Span]:
        self.end = spans[-1][1]
        return list(spans)
