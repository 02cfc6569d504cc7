"""Public sessions of IBL BrainWideBench (arXiv 2609.22064), fetched as they are.

They are brainsets files already, with units that nobody chose among (``all_units``), and lie where
anyone may read them: 423 for pretraining, 29 for evaluation.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path
from time import sleep
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from offline.prepare.spikes import Tell
from offline.prepare.writing import put_in_place
from rt_neds.errors import ConfigError, StreamError

BUCKET = "https://brain-wide-bench.s3.amazonaws.com"
FOLDERS = tuple(
    f"brainsets/all_units/ibl_brain_wide_bench_2026/{regime}" for regime in ("pretrain", "eval")
)
TIMEOUT_S, PAUSE_S = 30.0, 2.0
TRIES = 5
"""So often in a row a connection may bring nothing."""
CHUNK = 1 << 20


def fetch_session(session_id: str, out: str | Path, tell: Tell) -> dict[str, Any]:
    """Download a session, look whether it can be read, and only then put it in its place.

    Parameters
    ----------
    session_id : str
        IBL's id of it, a UUID.
    out : path
    tell : callable
        Takes a name and how much of it is done.

    Returns
    -------
    dict
        As of :func:`offline.prepare.writing.write_session`.

    Raises
    ------
    ConfigError
        That is no session's id, no public session has it, or the file cannot be written.
    SessionError
        What came is no session, or another one.
    StreamError
        The server cannot be reached, or breaks off again and again.
    """
    name, out = _eid(session_id), Path(out)
    partial = out.with_name(f"{out.stem}.part-{os.getpid()}")
    try:
        if not any(_download(f"{BUCKET}/{at}/{name}.h5", partial, tell) for at in FOLDERS):
            raise ConfigError(
                f"no public BrainWideBench session is called {name} at {BUCKET}; expected the id "
                "of one of its 423 + 29 sessions"
            )
        return put_in_place(partial, out, session_id=name)
    finally:
        partial.unlink(missing_ok=True)


def _eid(session_id: str) -> str:
    try:
        return str(uuid.UUID(session_id))
    except ValueError:
        raise ConfigError(
            f"{session_id!r} is no IBL session id; expected one like "
            "4b00df29-3769-43be-bb40-128b1cba6d35"
        ) from None


def _download(url: str, path: Path, tell: Tell) -> bool:
    """Whether there is such a thing; it is in the file then."""
    try:
        with path.open("wb") as file:
            for chunk, done in _chunks(url):
                file.write(chunk)
                tell(url.rpartition("/")[2], done)
            return file.tell() > 0
    except OSError as error:  # of the file: those of the connection never come here
        raise ConfigError(f"cannot write {path} ({error.strerror}); name another file") from None


def _chunks(url: str) -> Iterator[tuple[bytes, float]]:
    """What lies there, and how much has come; nothing if nothing does. Goes on where it broke."""
    at, size, tag, trouble, left = 0, 1, "", "", TRIES
    while at < size:
        if not left:
            raise StreamError(
                f"{url}: {trouble}; check the network, or fetch it otherwise: the file can be "
                "trained on as it is"
            )
        left -= 1
        headers = {"Range": f"bytes={at}-", "If-Match": tag} if at else {}
        try:
            with urlopen(Request(url, headers=headers), timeout=TIMEOUT_S) as reply:
                size, tag = at + int(reply.headers["Content-Length"]), reply.headers["ETag"]
                while chunk := reply.read(CHUNK):
                    at += len(chunk)
                    left = TRIES
                    yield chunk, at / size
            trouble = f"it broke off after {at} of {size} bytes"
        except HTTPError as error:
            if error.code in (403, 404) and not at:  # 403: to whoever may not list what is there
                return
            trouble = f"the server answered {error.code} {error.reason}"
        except (OSError, HTTPException, TypeError, ValueError) as error:
            trouble = f"{getattr(error, 'reason', error)}"
        if at < size and left:
            sleep(PAUSE_S)
