"""What the documentation says to type is what commands take, and its links lead somewhere."""

import re
import shlex
import threading
import tomllib
from pathlib import Path

import numpy as np
import pytest

from offline.config import TrainConfig
from rt_neds.children import free_port
from rt_neds.cli import COMMANDS, command
from rt_neds.config import parse_config
from rt_neds.frames import DecodedFrame
from rt_neds.serve_config import ServeConfig
from rt_neds.stream.publisher import Publisher

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), ROOT / "benchmarks/README.md"])


def code_of(page):
    """Blocks of code, fenced and indented."""
    text, fences = page.read_text(), []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        fences.append((kind, block))
    rest = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return fences + [("", block) for block in re.findall(r"(?:^    \S.*\n)+", rest, re.MULTILINE)]


COMMAND = re.compile(rf"[#\s]*(?:torchrun .*|srun .*)?rt-neds ((?:{'|'.join(COMMANDS)}) .*)")


def commands_of(text):
    """Argument vectors of the rt-neds commands in some lines; ``...`` stands for more sessions."""
    for line in text.replace("\\\n", " ").splitlines():
        if found := COMMAND.match(line):
            yield [word for word in shlex.split(found[1], comments=True) if word != "..."]


def told():
    for page in PAGES:
        for kind, block in code_of(page):
            if kind in ("", "bash", "sh"):
                yield from ((page, argv) for argv in commands_of(block))
    for config in sorted((ROOT / "configs").glob("*.toml")):
        yield from ((config, argv) for argv in commands_of(config.read_text()))


@pytest.mark.parametrize(
    ("page", "argv"),
    [pytest.param(p, a, id=f"{p.relative_to(ROOT)}: {' '.join(a)[:60]}") for p, a in told()],
)
def test_what_it_says_to_type_is_understood(page, argv):
    _, parser = command(argv[0])
    args = parser.parse_args(argv[1:])  # exits where it does not
    config = getattr(args, "config", None)
    if config is not None and config.startswith("configs/"):
        assert (ROOT / config).is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tomls_are_what_serve_and_train_take(page):
    for kind, block in code_of(page):
        if kind == "toml":
            keys = tomllib.loads(block).keys()
            if keys & {"trigger", "probes"}:
                parse_config(tomllib.loads(block), ServeConfig, "the page")
            if "training" in keys:
                parse_config(tomllib.loads(block), TrainConfig, "the page")


def test_there_is_something_to_check():
    assert len(list(told())) > 30


def test_the_client_of_the_readme_acts_on_frames_that_nothing_is_known_against():
    source = next(code for kind, code in code_of(ROOT / "README.md") if kind == "python")
    endpoint, acted = f"tcp://127.0.0.1:{free_port()}", []

    class Enough(Exception):
        pass

    def act_on(values_V):
        acted.append(values_V[0])
        if values_V[0] == 9:
            raise Enough

    def publish():
        """The same four over and over, until the listener is there and has heard the last."""
        while not over.wait(0.02):
            publisher.note("status", {"drift": {"drifted": True}})
            publisher.write(frame(1, flags=0))
            publisher.note("status", {"drift": {}})
            publisher.write(frame(2, flags=2))
            publisher.write(frame(9, flags=0))

    publisher, over = Publisher(endpoint, "imec0"), threading.Event()
    sending = threading.Thread(target=publish)
    sending.start()
    try:
        with pytest.raises(Enough):
            exec(source.replace("tcp://127.0.0.1:5580", endpoint), {"act_on": act_on})
    finally:
        over.set()
        sending.join()
        publisher.close()
    assert acted == [9]


def frame(value, flags):
    stamps = dict.fromkeys(("sent", "received", "binned", "decoded", "published"), 1)
    return DecodedFrame(
        "imec0", 1, 0, 0, np.array([value], np.float32), flags, 0, 0, 0, 0, "m", stamps
    )
