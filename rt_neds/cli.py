"""The command line: a table of commands; nothing heavy is imported until one is chosen."""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from rt_neds import __version__
from rt_neds.errors import RtNedsError
from rt_neds.result import refuse_unwritable, write_json

COMMANDS = {
    "demo": ("rt_neds.demo", "see it work: simulate, train, replay into serve, measure, draw"),
    "simulate": ("rt_neds.simulate_command", "write a simulated session with an ideal observer"),
    "prepare": ("offline.prepare.command", "make a session of IBL, NWB, or raw recordings"),
    "detector": ("offline.detector", "learn from a raw baseline how to find its spikes"),
    "inspect": ("rt_neds.inspect", "say what is in a session file or a bundle"),
    "train": ("offline.train", "train on sessions and leave a bundle"),
    "sweep": ("offline.sweep", "search for the settings that train best"),
    "evaluate": ("offline.evaluate", "score a bundle on a session, through the streaming path"),
    "serve": ("rt_neds.serve", "decode a probe's spikes, live"),
    "replay": ("rt_neds.replay", "send a session or a capture as an acquisition would"),
    "record": ("rt_neds.record", "write down what came and what went, byte for byte"),
    "export": ("offline.nwb", "turn what was recorded into NWB"),
    "watch": ("rt_neds.watch", "show what is decoded, with latency, live"),
    "metrics": ("rt_neds.metrics", "tell Prometheus what is published"),
    "bench": ("rt_neds.bench", "measure this machine: latency, step, soak"),
    "doctor": ("rt_neds.doctor", "say what this machine will hold, and what to change"),
}
"""Each module has ``add_arguments(parser)`` and ``run(args)``; what run returns is for --json."""


OF_THE_DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EEXIST, errno.ENAMETOOLONG),
)
"""What can be wrong with a file, or with the disk it is on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments; those of the process by default.

    Returns
    -------
    int
        0 done, 1 begun and failed, 2 unusable input.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_overview())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"rt-neds {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        import difflib

        nearest = difflib.get_close_matches(argv[0], COMMANDS, n=1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(COMMANDS)}"
        return _fail(f"no command {argv[0]}; {advice}", 2)
    try:
        with _ended_gently():
            return _run(argv[0], argv[1:])
    except RtNedsError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 1)
    except BrokenPipeError:
        # Whoever read our output has gone; Python would complain once more while closing it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        if error.errno not in OF_THE_DISK:
            raise
        of = f"{error.filename}: " if error.filename else ""
        return _fail(f"{of}{error.strerror}; name another place, or make room there", 1)


class _Terminated(BaseException):
    """A SIGTERM came."""


@contextlib.contextmanager
def _ended_gently() -> Iterator[None]:
    """Clean up on a SIGTERM, then die of it: processes of ours would be left behind."""

    def terminated(*_: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, terminated)
    try:
        yield
    except _Terminated:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)


class Parser(argparse.ArgumentParser):
    """Tells what is wrong in one line, as all of our errors are; a number is a finite one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.register("type", float, _finite)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help says more\n")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} where a finite number was expected")
    return number


def command(name: str) -> tuple[Any, argparse.ArgumentParser]:
    """The module of a command, and what reads its arguments."""
    module_name, help_text = COMMANDS[name]
    module = importlib.import_module(module_name)
    parser = Parser(prog=f"rt-neds {name}", description=help_text)
    module.add_arguments(parser)
    if getattr(module, "TAKES_CONFIG", False):
        parser.add_argument("--config", metavar="FILE", help="TOML with the whole run")
        parser.add_argument(
            "--set", action="append", default=[], metavar="section.key=value", help="override a key"
        )
    if getattr(module, "HAS_RESULT", True):
        parser.add_argument(
            "--json", metavar="FILE", help="write the result there; - for the screen"
        )
    else:
        parser.set_defaults(json=None)
    parser.add_argument("--quiet", action="store_true", help="no progress, no chatter")
    return module, parser


def _run(name: str, argv: Sequence[str]) -> int:
    module, parser = command(name)
    args = parser.parse_args(argv)
    refuse_unwritable(args.json)
    if args.json == "-":
        # Standard output belongs to the JSON alone.
        with contextlib.redirect_stdout(sys.stderr):
            result = module.run(args)
    else:
        result = module.run(args)
    if args.json is not None and result is not None:
        write_json(args.json, result)
    return 0


def _overview() -> str:
    lines = ["usage: rt-neds COMMAND [options]", ""]
    lines += [f"  {name:<10} {help_text}" for name, (_, help_text) in COMMANDS.items()]
    return "\n".join([*lines, "", "rt-neds COMMAND --help says more."])


def _fail(message: str, code: int) -> int:
    print(f"rt-neds: {message}", file=sys.stderr)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
