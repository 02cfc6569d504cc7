"""What a trigger waits for: ``choice.left > 0.9 and wheel_speed < 0.5``, read once, never ``eval``.

The whole grammar::

    any        = all, { "or", all }
    all        = one, { "and", one }
    one        = "not", one | "(", any, ")" | comparison
    comparison = name, order, number | number, order, name
    order      = "<" | "<=" | ">" | ">="

A name with other characters than letters, digits, ``_``, ``-``, ``/`` and ``.`` stands in quotes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rt_neds.errors import ConfigError

LESS, AT_MOST, MORE, AT_LEAST, BOTH, EITHER, NOT = range(7)
"""Operations; the first four compare a value with a number, the others what was found so far."""

_ORDERS = {"<": LESS, "<=": AT_MOST, ">": MORE, ">=": AT_LEAST}
_TURNED = {LESS: MORE, AT_MOST: AT_LEAST, MORE: LESS, AT_LEAST: AT_MOST}
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)(?![\w.])
          |(?P<order><=|>=|<|>)
          |(?P<bracket>[()])
          |(?P<name>[^\W\d][\w./-]*)
          |(?P<quoted>"[^"]*"|'[^']*'))""",
    re.VERBOSE,
)
_WORDS = ("and", "or", "not")
MAX_LENGTH = 1000
MAX_DEPTH = 24
"""Brackets and nots inside each other: what is found so far is kept in the bits of one integer."""


class Operation(NamedTuple):
    """One step of a condition in postfix order.

    Attributes
    ----------
    what : int
        ``LESS`` ... ``NOT``.
    value : int
        Place of the value compared; 0 for the rest.
    number : float
        What it is compared with; 0 for the rest.
    """

    what: int
    value: int = 0
    number: float = 0.0


class _Token(NamedTuple):
    kind: str
    text: str
    at: int


def value_names(outputs: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Names that a condition may use, and where in ``values`` each stands.

    Parameters
    ----------
    outputs : sequence of mapping
        ``outputs`` of the schema message.

    Returns
    -------
    dict of str to int
        ``name`` and ``name.sd`` of a continuous output, ``name.class`` of a categorical one,
        ``name`` of a rate.
    """
    names = {}
    for output in outputs:
        parts: Sequence[str] = ("", ".sd") if output["kind"] == "continuous" else ("",)
        if output["kind"] == "categorical":
            parts = [f".{one}" for one in output["classes"]]
        for place, part in enumerate(parts):
            names[output["name"] + part] = output["offset"] + place
    return names


def parse_condition(text: str, names: Mapping[str, int], where: str) -> list[Operation]:
    """Read a condition.

    Parameters
    ----------
    text : str
    names : mapping of str to int
        See :func:`value_names`.
    where : str
        What to call it in messages, such as ``trigger go_left``.

    Returns
    -------
    list of Operation
        In postfix order.

    Raises
    ------
    ConfigError
        What came instead of what, and at which character.
    """
    parser = _Parser(text, names, where)
    parser.any(0)
    parser.expect_end()
    return parser.operations


class _Parser:
    """Recursive descent; every rule of the grammar is a method that appends its operations."""

    def __init__(self, text: str, names: Mapping[str, int], where: str) -> None:
        self.operations: list[Operation] = []
        self._text, self._names, self._where = text, names, where
        if len(text) > MAX_LENGTH:
            raise ConfigError(
                f"{where}: a condition of {len(text)} characters; at most {MAX_LENGTH} are read: "
                "make several triggers of it"
            )
        self._tokens = self._split()
        self._next = 0

    def any(self, depth: int) -> None:
        self.all(depth)
        while self._take_word("or"):
            self.all(depth)
            self.operations.append(Operation(EITHER))

    def all(self, depth: int) -> None:
        self.one(depth)
        while self._take_word("and"):
            self.one(depth)
            self.operations.append(Operation(BOTH))

    def one(self, depth: int) -> None:
        if depth > MAX_DEPTH:
            raise self._wrong(f"at most {MAX_DEPTH} brackets and nots inside each other")
        if self._take_word("not"):
            self.one(depth + 1)
            self.operations.append(Operation(NOT))
        elif self._peek().text == "(" and self._peek().kind == "bracket":
            self._next += 1
            self.any(depth + 1)
            if self._peek().text != ")":
                raise self._wrong("and, or, or )")
            self._next += 1
        else:
            self._comparison()

    def expect_end(self) -> None:
        if self._peek().kind != "end":
            raise self._wrong("and, or, or the end")

    def _comparison(self) -> None:
        if self._peek().kind == "number":
            number = self._number()
            order = _TURNED[self._order()]
            value = self._name("an output")
        else:
            value = self._name("an output, a number, not, or (")
            order = self._order()
            number = self._number()
        self.operations.append(Operation(order, value, number))

    def _name(self, expected: str) -> int:
        token = self._peek()
        if token.kind not in ("name", "quoted"):
            raise self._wrong(expected)
        name = token.text[1:-1] if token.kind == "quoted" else token.text
        if name not in self._names:
            known = ", ".join(self._names) or "none"
            raise self._wrong(f"one of the outputs {known}")
        self._next += 1
        return self._names[name]

    def _order(self) -> int:
        token = self._peek()
        if token.kind != "order":
            raise self._wrong("<, <=, > or >=")
        self._next += 1
        return _ORDERS[token.text]

    def _number(self) -> float:
        token = self._peek()
        if token.kind != "number" or not math.isfinite(float(token.text)):
            raise self._wrong("a number")
        self._next += 1
        return float(token.text)

    def _take_word(self, word: str) -> bool:
        token = self._peek()
        taken = token.kind == "word" and token.text == word
        self._next += taken
        return taken

    def _peek(self) -> _Token:
        return self._tokens[self._next]

    def _split(self) -> list[_Token]:
        tokens, at = [], 0
        end = len(self._text.rstrip())
        while at < end:
            found = _TOKEN.match(self._text, at)
            if found is None:
                skipped = len(self._text) - len(self._text[at:].lstrip())
                raise self._wrong_at(
                    _Token("", self._text[skipped : skipped + 10], skipped),
                    "an output, a number, <, <=, >, >=, and, or, not, or a bracket",
                )
            kind = str(found.lastgroup)
            text, start, at = found.group(kind), found.start(kind), found.end()
            kind = "word" if kind == "name" and text in _WORDS else kind
            tokens.append(_Token(kind, text, start))
        return [*tokens, _Token("end", "", end)]

    def _wrong(self, expected: str) -> ConfigError:
        return self._wrong_at(self._peek(), expected)

    def _wrong_at(self, token: _Token, expected: str) -> ConfigError:
        came = repr(token.text) if token.text else "nothing"
        return ConfigError(
            f"{self._where}: {came} at character {token.at + 1} of {self._text!r}; expected "
            f"{expected}"
        )
