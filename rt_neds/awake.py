"""Cores that stay awake between messages, where the system lets us.

A core with nothing to do sleeps, and its waking comes before all else: some microseconds for a
light sleep, a tenth of a millisecond for a deep one, and on a virtual machine what its host takes.
Linux keeps cores from sleeping deeper than a file that is held open says (PM QoS,
``/dev/cpu_dma_latency``), and no longer than it is: nothing is left behind by who dies.
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from io import FileIO
from pathlib import Path

DEVICE = Path("/dev/cpu_dma_latency")
LIGHT_US = 3
"""Longest waking where the processor sleeps by itself: C1, as a rule."""
VIRTUAL_US = 0
"""On a virtual machine cores wait without sleeping: their sleep is the host's, which tells nothing
of how long waking takes (measured: 50 us a time where 1 was told)."""


class Awake:
    """Holds cores awake whenever there is something to be on time for.

    Parameters
    ----------
    wanted : bool
        Whether it ever may: costs power, and a core of a virtual machine all of its time.
    device : path
    """

    def __init__(self, wanted: bool = True, device: Path = DEVICE) -> None:
        self._may, self._device = wanted, device
        self._held: FileIO | None = None

    @property
    def held(self) -> bool:
        """Whether cores are held awake now."""
        return self._held is not None

    def hold(self, now: bool) -> None:
        """Hold them, or let them sleep; where it is refused, that is all."""
        if self._held is not None and not now:
            self._held.close()
            self._held = None
        elif self._held is None and now and self._may:
            try:
                self._held = FileIO(self._device, "r+")
                self._held.write(struct.pack("i", VIRTUAL_US if is_virtual() else LIGHT_US))
            except OSError:
                self._may = False
                self.hold(False)


def may_be_held(device: Path = DEVICE) -> bool:
    """Whether the system lets us."""
    holding = Awake(device=device)
    holding.hold(True)
    held = holding.held
    holding.hold(False)
    return held


@contextlib.contextmanager
def awake() -> Iterator[None]:
    """Cores are held awake for the length of the block."""
    holding = Awake()
    holding.hold(True)
    try:
        yield
    finally:
        holding.hold(False)


def is_virtual(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor says that it is a virtual machine's."""
    with contextlib.suppress(OSError):
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("flags"):
                return "hypervisor" in line.split()
    return False
