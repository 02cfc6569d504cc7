"""What a command leaves behind: JSON, and the name of the machine it was measured on."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import platform
import sys
from pathlib import Path
from typing import Any

from rt_neds.errors import ConfigError


def write_json(target: str, result: Any) -> None:
    """Write a result to a file, or to the screen for ``-``."""
    text = json.dumps(clean(result), indent=1)
    if target == "-":
        print(text)
        return
    try:
        with open(target, "w", encoding="utf-8") as file:
            file.write(text + "\n")
    except OSError as error:
        raise ConfigError(f"cannot write {target} ({error.strerror}); name another file") from None


def tell(line: str) -> None:
    """Say a line to whoever started us; one that cannot be said must not end what goes on."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr)


def refuse_unwritable(target: str | None) -> None:
    """Say so before the work, not after it, if its result could not be written.

    Raises
    ------
    ConfigError
    """
    if target is None or target == "-":
        return
    path = Path(target)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"cannot write {target}; name a file in a folder that exists")


def refuse_existing(out: str | Path, holds: str = "") -> None:
    """Say so before the work if what it makes is there already: it may be the only one.

    Parameters
    ----------
    out : path
        What would be written.
    holds : str, optional
        Of a folder: the file by which it is what would be written.

    Raises
    ------
    ConfigError
    """
    if (Path(out) / holds).exists():
        raise ConfigError(f"{out} is there already; name another, or remove it")


def make_folder(folder: str | Path) -> None:
    """Make a folder that results go into, or say in one line that they cannot.

    Raises
    ------
    ConfigError
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise ConfigError(
            f"cannot write into {folder} ({error.strerror}); name another folder"
        ) from None


def clean(value: Any) -> Any:
    """The same for JSON, which knows neither NaN nor infinity: they become null."""
    if isinstance(value, dict):
        return {str(key): clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    return {
        "cpu": name,
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }
