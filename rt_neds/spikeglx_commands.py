"""The commands of the SpikeGLX emulator: what is asked over one connection, and what is answered.

As version 4 of the API has it: ``OK`` or ``ERROR <text>`` behind each answer; an idle connection is
closed, and one with five errors running.

Shape suffixes: S samples, C channels.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rt_neds.spikeglx_recording import Failure
from rt_neds.spikeglx_run import Rig
from rt_neds.spikeglx_wire import IMEC

VERSION = "SpikeGLX v20260709 api v4.1.3"
MAX_ERRORS = 5
MAX_LINE = 65_536
MAX_BLOCK_LINES = 10_000
MAX_FETCH_S = 10.0


class Worker:
    """One connection."""

    def __init__(self, rig: Rig, connection: socket.socket) -> None:
        self._rig, self._run = rig, rig.run
        self._probe = rig.run.recording.probe
        self._connection = connection
        self._received = b""
        self._open = True

    def work(self) -> None:
        """Answer until the other side goes, idles, or errs five times running."""
        errors = 0
        while self._open and errors < MAX_ERRORS:
            line = self._line()
            if line is None:
                return
            if not line:
                continue
            try:
                self._answer(line)
                errors = 0
            except Failure as failure:
                self._connection.sendall(f"ERROR {failure}\n".encode())
                errors += 1

    def _line(self) -> str | None:
        while b"\n" not in self._received:
            more = self._connection.recv(MAX_LINE)
            if not more or len(self._received) > MAX_LINE:
                return None
            self._received += more
        line, _, self._received = self._received.partition(b"\n")
        return line.decode("utf-8", errors="replace").strip()

    def _answer(self, line: str) -> None:
        word, *args = line.split()
        command = word.upper()
        method = _COMMANDS.get(command)
        if method is None:
            raise Failure(f"CmdWorker: Unknown command [{command}].")
        self._rig.commands[command] = self._rig.commands.get(command, 0) + 1
        reply = method(self, command, args)
        if not self._open:
            return
        self._connection.sendall((b"" if reply is None else reply) + b"OK\n")

    # -- checks ----------------------------------------------------------------------------------

    def _stream(self, command: str, args: list[str]) -> int:
        """Number of the stream's kind; there are probes only."""
        if len(args) < 2:
            raise Failure(f"{command}: Requires at least 2 params.")
        kind = _int(args[0])
        if kind == 0:
            raise Failure(f"{command}: nidq stream not enabled.")
        if kind == 1:
            raise Failure(f"{command}: obx stream not enabled.")
        if abs(kind) != IMEC:
            raise Failure(f"{command}: stream-js must be in set {{-2,0,1,2}}.")
        self._check_probe(command, args[1])
        return kind

    def _check_probe(self, command: str, arg: str) -> None:
        if not 0 <= _int(arg) < self._rig.probes:
            raise Failure(f"{command}: imec stream-ip must be in range[0..{self._rig.probes - 1}].")

    def _started(self, command: str) -> None:
        if not self._run.running:
            raise Failure(f"{command}: Run not yet started.")

    # -- queries ---------------------------------------------------------------------------------

    def _of_stream(self, command: str, args: list[str]) -> bytes:
        """What is asked of a stream, in one line."""
        self._stream(command, args)
        probe = self._probe
        if command == "GETSTREAMI16TOVOLTS":
            if len(args) < 3:
                raise Failure(f"{command}: Requires at least 3 params.")
            return _text(f"{probe.volts / (probe.max_int * self._gain(_int(args[2]))):.6g}")
        if command == "GETSTREAMSAMPLECOUNT":
            count = self._run.count
            self._run.asked.set()  # only then, so that whoever waits has seen that nothing ran
            return _text(count)
        return _text(
            {
                "GETSTREAMACQCHANS": f"{probe.ap} {probe.lf} {probe.status}",
                "GETSTREAMFILESTART": self._run.first if self._rig.saving else 0,
                "GETSTREAMMAXINT": probe.max_int,
                "GETSTREAMSAMPLERATE": f"{probe.rate:.6f}",
                "GETSTREAMSAVECHANS": " ".join(map(str, range(probe.channels))),
                "GETSTREAMSN": f"{probe.serial} {probe.type}",
                "GETSTREAMVOLTAGERANGE": f"{-probe.volts:g} {probe.volts:g}",
                "ISUSRORDER": 0,
            }[command]
        )

    def _gain(self, channel: int) -> float:
        if 0 <= channel < self._probe.ap:
            return self._probe.gains[channel]
        return self._probe.lf_gain if channel < self._probe.ap + self._probe.lf else 1.0

    def _of_program(self, command: str, _: list[str]) -> bytes:
        """What is asked of SpikeGLX itself, in one line."""
        rig, probe = self._rig, self._probe
        numbers = range(rig.probes)
        return _text(
            {
                "GETCURRUNFILE": "",
                "GETDATADIR": "/data",
                "GETLASTGT": "0 0",
                "GETOBXADDRS": "()",
                "GETPROBEADDRS": "".join(f"({n},2,{n + 1},1)" for n in numbers),
                "GETPROBELIST": "".join(f"({n},1,{probe.part})" for n in numbers),
                "GETRUNNAME": rig.name,
                "GETTIME": f"{time.monotonic() - rig.began:.3f}",
                "GETVERSION": VERSION,
                "ISCONSOLEHIDDEN": 0,
                "ISINITIALIZED": 1,
                "ISRUNNING": int(self._run.running),
                "ISSAVING": int(self._run.running and rig.saving),
            }[command]
        )

    def _probes_of_kind(self, command: str, args: list[str]) -> bytes:
        if not args:
            raise Failure(f"{command}: Requires parameter js.")
        return _text(self._rig.probes if abs(_int(args[0])) == IMEC else 0)

    def _gains(self, command: str, args: list[str]) -> bytes:
        if len(args) < 2:
            raise Failure(f"{command}: Requires params {{ip, chan}}.")
        self._check_probe(command, args[0])
        return _text(f"{self._gain(_int(args[1])):g} {self._probe.lf_gain:g}")

    def _geometry(self, command: str, args: list[str]) -> bytes:
        if not args:
            raise Failure(f"{command}: Requires parameter ip.")
        self._check_probe(command, args[0])
        shanks = int(self._probe.sites_C[:, 0].max()) + 1
        lines = [
            f"head_partNumber={self._probe.part}",
            f"head_numShanks={shanks}",
            f"head_shankPitch={0 if shanks == 1 else 250}",
            "head_shankWidth=70",
        ]
        for channel, (shank, x, z) in enumerate(self._probe.sites_C.tolist()):
            values = {"s": int(shank), "x": f"{x:g}", "z": f"{z:g}", "u": 1}
            lines += [f"ch{channel}_{name}={value}" for name, value in values.items()]
        return _text("\n".join(lines))

    def _params(self, command: str, args: list[str]) -> bytes:
        probe, name = self._probe, self._rig.name
        if command == "GETPARAMSIMPRB":
            if not args:
                raise Failure(f"{command}: Requires parameter ip.")
            self._check_probe(command, args[0])
            pairs = {"imroFile": "", "imStdby": "", "imLEDEnable": "false",
                     "imSnsSaveChanSubset": "all"}  # fmt: skip
        else:
            pairs = {
                "imEnabled": "true",
                "imNProbes": str(self._rig.probes),
                "imSampRate": f"{probe.rate:.6f}",
                "gateMode": "0",
                "trigMode": "0",
                "snsRunName": name,
                **self._rig.params,
            }
        return _text("\n".join(f"{key}={value}" for key, value in pairs.items()))

    def _map_sample(self, command: str, args: list[str]) -> bytes:
        """The same sample: all our probes play the same."""
        if len(args) < 5:
            raise Failure(f"{command}: Requires at least 5 params.")
        self._stream(f"{command} (dst)", args[:2])
        self._stream(f"{command} (src)", args[3:])
        same = args[:2] == args[3:5]
        if not same and not self._run.running:
            raise Failure(f"{command}: Not running.")
        return _text(_int(args[2]))

    # -- commands --------------------------------------------------------------------------------

    def _nothing(self, _: str, __: list[str]) -> None:
        """What needs no more than ``OK``."""

    def _fetch(self, command: str, args: list[str]) -> bytes:
        if len(args) < 4:
            raise Failure(f"{command}: Requires at least 4 params.")
        if self._stream(command, args) < 0 or not self._run.running:
            raise Failure(f"{command}: Not running or stream not enabled.")
        channels = self._chosen(args[4] if len(args) > 4 else "-1#")
        step = max(1, _int(args[5])) if len(args) > 5 else 1
        most = min(max(0, _int(args[3])), round(MAX_FETCH_S * self._probe.rate))
        first, samples_SC = self._run.fetch(max(0, _int(args[2])), most)
        if channels is not None and len(samples_SC):  # an empty reply counts all channels
            samples_SC = samples_SC[:, channels]
        if step > 1 and len(samples_SC):
            samples_SC = _downsampled(samples_SC, step)
        head = f"BINARY_DATA {samples_SC.shape[1]} {len(samples_SC)} uint64({first})\n"
        return head.encode() + samples_SC.astype("<i2", copy=False).tobytes()

    def _chosen(self, words: str) -> list[int] | None:
        """The channels of a list: ascending, each once, whatever their order; None for all."""
        if words in ("-1#", "-2#"):
            return None
        chosen = {_int(word) for word in words.split("#") if word}
        if not chosen:
            raise Failure("Bad channel string format.")
        for channel in sorted(chosen):
            if not 0 <= channel < self._probe.channels:
                raise Failure(f"Channel {channel} out of range [0..{self._probe.channels - 1}].")
        return sorted(chosen)

    def _set_digital(self, command: str, args: list[str]) -> None:
        if len(args) < 2:
            raise Failure(f"{command}: Requires params {{lines, bits}}.")
        self._rig.digital.append(("".join(args[:-1]), _int(args[-1]) & 0xFFFFFFFF))
        del self._rig.digital[:-1000]

    def _start(self, command: str, _: list[str]) -> None:
        if self._run.running:
            raise Failure(f"{command}: Already running.")
        self._run.start()

    def _stop(self, _: str, __: list[str]) -> None:
        self._run.stop()

    def _set_name(self, command: str, args: list[str]) -> None:
        if not args:
            raise Failure(f"{command}: Requires name parameter.")
        self._rig.name = " ".join(args)[:256]

    def _set_saving(self, command: str, args: list[str]) -> None:
        if not args:
            raise Failure(f"{command}: Requires parameter {{0 or 1}}.")
        self._started(command)
        self._rig.saving = bool(_int(args[0]))

    def _trigger(self, command: str, args: list[str]) -> None:
        if len(args) < 2:
            raise Failure(f"{command}: Requires params {{g, t}}.")
        self._started(command)

    def _take_block(self, command: str, args: list[str]) -> None:
        """Lines ``key=value`` and a blank one, after we said that we are ready."""
        if command == "SETMETADATA":
            self._started(command)
        elif self._run.running:
            raise Failure(f"{command}: Cannot set params while running.")
        self._connection.sendall(b"READY\n")
        pairs: dict[str, str] = {}
        for _ in range(MAX_BLOCK_LINES):
            line = self._line()
            if not line:
                break
            key, _, value = line.partition("=")
            pairs[key.strip()] = value.strip()
        if not pairs:
            raise Failure(f"{command}: Param string is empty.")
        self._rig.params = pairs

    def _bye(self, _: str, __: list[str]) -> None:
        self._open = False


def _downsampled(samples_SC: NDArray[np.int16], step: int) -> NDArray[np.int16]:
    """Means of so many samples; of what is left at the end, too."""
    starts = np.arange(0, len(samples_SC), step)
    sums_SC = np.add.reduceat(samples_SC.astype(np.int64), starts, axis=0)
    sizes_S = np.diff([*starts, len(samples_SC)])
    return np.trunc(sums_SC / sizes_S[:, None]).astype(np.int16)


def _int(word: str) -> int:
    """A number as Qt reads it: 0 where it is none."""
    try:
        return int(word) if len(word) < 20 else 0
    except ValueError:
        return 0


def _text(value: object) -> bytes:
    return f"{value}\n".encode()


_Method = Callable[[Worker, str, list[str]], bytes | None]

_COMMANDS: dict[str, _Method] = {
    **dict.fromkeys(
        ("GETSTREAMACQCHANS", "GETSTREAMFILESTART", "GETSTREAMI16TOVOLTS", "GETSTREAMMAXINT",
         "GETSTREAMSAMPLECOUNT", "GETSTREAMSAMPLERATE", "GETSTREAMSAVECHANS", "GETSTREAMSN",
         "GETSTREAMVOLTAGERANGE", "ISUSRORDER"),
        Worker._of_stream,
    ),
    **dict.fromkeys(
        ("GETCURRUNFILE", "GETDATADIR", "GETLASTGT", "GETOBXADDRS", "GETPROBEADDRS",
         "GETPROBELIST", "GETRUNNAME", "GETTIME", "GETVERSION", "ISCONSOLEHIDDEN",
         "ISINITIALIZED", "ISRUNNING", "ISSAVING"),
        Worker._of_program,
    ),
    **dict.fromkeys(("NOOP", "CONSOLEHIDE", "CONSOLESHOW", "PAUSEGRF"), Worker._nothing),
    **dict.fromkeys(("GETPARAMS", "GETPARAMSIMALL", "GETPARAMSIMPRB"), Worker._params),
    **dict.fromkeys(("SETPARAMS", "SETPARAMSIMALL", "SETMETADATA"), Worker._take_block),
    **dict.fromkeys(("BYE", "QUIT", "EXIT", "CLOSE"), Worker._bye),
    "FETCH": Worker._fetch,
    "GETGEOMMAP": Worker._geometry,
    "GETIMECCHANGAINS": Worker._gains,
    "GETSTREAMNP": Worker._probes_of_kind,
    "MAPSAMPLE": Worker._map_sample,
    "NIDOSET": Worker._set_digital,
    "SETRECORDENAB": Worker._set_saving,
    "SETRUNNAME": Worker._set_name,
    "STARTRUN": Worker._start,
    "STOPRUN": Worker._stop,
    "TRIGGERGT": Worker._trigger,
}  # fmt: skip
