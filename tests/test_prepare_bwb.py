"""Public sessions are fetched whole, over connections that break, or not at all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from offline.prepare import bwb
from rt_neds.cli import main
from rt_neds.session import load_session
from tests.making import write_session

EID = "4b00df29-3769-43be-bb40-128b1cba6d35"
OTHER = "d23a44ef-1402-4ed7-97f5-47e9a7a504d9"


class Bucket(ThreadingHTTPServer):
    """Answers as a public bucket does: parts of files, tags, 403 for what is not there."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.files: dict[str, bytes] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.breaks: list[int] = []  # after so many bytes of each answer, one after the other
        self.codes: list[int] = []  # to answer with first

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Bucket

    def do_GET(self) -> None:
        bucket, part = self.server, self.headers["Range"]
        bucket.asked.append((self.path, part))
        whole = bucket.files.get(self.path)
        if bucket.codes or whole is None:
            self.send_error(bucket.codes.pop(0) if bucket.codes else 403)
            return
        assert self.headers["If-Match"] == ('"a"' if part else None)
        body = whole[int(part[6:-1]) if part else 0 :]
        self.send_response(206 if part else 200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", '"a"')
        self.end_headers()
        self.wfile.write(body[: bucket.breaks.pop(0)] if bucket.breaks else body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def session_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return write_session(tmp_path_factory.mktemp("public") / "S.h5", session_id=EID).read_bytes()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    with Bucket() as server:
        monkeypatch.setattr(bwb, "BUCKET", server.url)
        monkeypatch.setattr(bwb, "PAUSE_S", 0.01)
        monkeypatch.setattr(bwb, "CHUNK", 10_000)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def fetch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    def run(session: str = EID) -> tuple[int, str]:
        out = str(tmp_path / "S.h5")
        code = main(["prepare", "ibl-bwb", "--session", session, "--out", out])
        said = capsys.readouterr().err
        assert [path.name for path in tmp_path.iterdir()] == (["S.h5"] if code == 0 else [])
        return code, said

    return run


def place(regime: str, session: str = EID) -> str:
    return f"/brainsets/all_units/ibl_brain_wide_bench_2026/{regime}/{session}.h5"


@pytest.mark.parametrize("regime", ["pretrain", "eval"])
def test_a_session_is_taken_as_it_is(
    bucket: Bucket,
    fetch: Callable[..., tuple[int, str]],
    tmp_path: Path,
    session_bytes: bytes,
    regime: str,
) -> None:
    bucket.files[place(regime)] = session_bytes
    code, said = fetch(EID.upper())
    assert code == 0
    assert "6 units" in said
    assert (tmp_path / "S.h5").read_bytes() == session_bytes
    assert load_session(tmp_path / "S.h5").id == EID


def test_it_goes_on_where_a_connection_broke(
    bucket: Bucket, fetch: Callable[..., tuple[int, str]], tmp_path: Path, session_bytes: bytes
) -> None:
    bucket.files[place("pretrain")] = session_bytes
    bucket.codes, bucket.breaks = [503], [0, 25_000, 0, 7]
    assert fetch()[0] == 0
    assert (tmp_path / "S.h5").read_bytes() == session_bytes
    parts = [None, None, None, "bytes=25000-", "bytes=25000-", "bytes=25007-"]
    assert [part for _, part in bucket.asked] == parts


def test_a_server_that_breaks_off_again_and_again_is_given_up(
    bucket: Bucket, fetch: Callable[..., tuple[int, str]], session_bytes: bytes
) -> None:
    bucket.files[place("pretrain")] = session_bytes
    bucket.breaks = [20_000] + [0] * 100
    code, said = fetch()
    assert code == 2
    assert len(said.splitlines()) == 1
    assert f"it broke off after 20000 of {len(session_bytes)} bytes; check the network" in said
    assert len(bucket.asked) == 1 + bwb.TRIES


@pytest.mark.parametrize(
    ("session", "expected"),
    [
        ("today", "'today' is no IBL session id; expected one like"),
        (OTHER, f"no public BrainWideBench session is called {OTHER}"),
    ],
)
def test_what_is_not_there_is_told_at_once(
    bucket: Bucket, fetch: Callable[..., tuple[int, str]], session: str, expected: str
) -> None:
    code, said = fetch(session)
    assert code == 2
    assert len(said.splitlines()) == 1
    assert expected in said
    assert len(bucket.asked) <= 2


def test_what_came_instead_of_the_session_is_not_kept(
    bucket: Bucket, fetch: Callable[..., tuple[int, str]], session_bytes: bytes
) -> None:
    bucket.files[place("pretrain")] = b"<html>please sign in</html>"
    code, said = fetch()
    assert code == 2
    assert len(said.splitlines()) == 1
    bucket.files[place("pretrain", OTHER)] = session_bytes
    code, said = fetch(OTHER)
    assert code == 2
    assert f"what came as session {OTHER} is session {EID}" in said


def test_nobody_to_be_reached(
    fetch: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with Bucket() as gone:
        monkeypatch.setattr(bwb, "BUCKET", gone.url)
    monkeypatch.setattr(bwb, "PAUSE_S", 0.01)
    code, said = fetch()
    assert code == 2
    assert len(said.splitlines()) == 1
    assert "refused" in said
    assert "the file can be trained on as it is" in said


def test_tables_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "S.h5"), "--tables", "wheel.csv"]
    assert main(["prepare", "ibl-bwb", "--session", EID, *out]) == 2
    assert "prepare ibl-bwb expects --session ID" in capsys.readouterr().err
