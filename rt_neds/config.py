"""One TOML is one complete run: read strictly, with the nearest right name for a wrong one."""

from __future__ import annotations

import difflib
import math
import tomllib
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin

import msgspec

from rt_neds.errors import ConfigError

T = TypeVar("T", bound=msgspec.Struct)


def load_config(path: str | Path | None, kind: type[T], overrides: Iterable[str] = ()) -> T:
    """Read a TOML file into a typed struct.

    Parameters
    ----------
    path : path or None
        The file; None stands for an empty one (all defaults).
    kind : type
        A ``msgspec.Struct``; its fields are the only keys allowed.
    overrides : iterable of str
        ``section.key=value`` strings, as given to ``--set``; the value is TOML, or else a string.

    Returns
    -------
    instance of ``kind``

    Raises
    ------
    ConfigError
        Missing file, bad TOML, unknown key (with the nearest right one) or a value of another type.
    """
    table = {} if path is None else _read_toml(Path(path))
    sources = [] if path is None else [str(path)]
    for override in overrides:
        _apply(table, override)
        sources.append(f"--set {override}")
    # Each is named: a slip in an override would be looked for in the file, in vain.
    return parse_config(table, kind, " and ".join(sources) or "--set")


def parse_config(table: dict[str, Any], kind: type[T], where: str) -> T:
    """Turn an already parsed table into ``kind``; ``where`` names it in messages."""
    _refuse_unknown_keys(table, kind, where, "")
    _refuse_nonfinite(table, where, "")
    try:
        return msgspec.convert(table, kind)
    except (msgspec.ValidationError, ValueError) as error:
        said = _of_one_table(table, kind) or _in_our_words(error)
        said += _choices(kind, said.partition(":")[0].split("."))
        raise ConfigError(f"{where}: {said}; correct that value") from None


def config_path(name: str) -> Path:
    """Path of a configuration that comes with rt-neds, such as ``demo.toml``."""
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise ConfigError(f"no configuration {name} comes with this rt-neds; name a file of your own")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no such configuration file: {path}; check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a folder; a TOML file was expected") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} is not text; a TOML file was expected") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}; correct that line") from None


def _apply(table: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {override}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *sections, last = key.strip().split(".")
    for section in sections:
        table = table.setdefault(section, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {override}: {section} is a value, not a section")
    table[last] = value


def _refuse_unknown_keys(table: dict[str, Any], kind: type, where: str, prefix: str) -> None:
    hints = typing.get_type_hints(kind)
    for key, value in table.items():
        if key not in hints:
            nearest = difflib.get_close_matches(key, hints, n=1, cutoff=0.5)
            advice = (
                f"did you mean {prefix}{nearest[0]}?"
                if nearest
                else f"known here: {', '.join(sorted(hints))}"
            )
            raise ConfigError(f"{where}: unknown key {prefix}{key}; {advice}")
        if not isinstance(value, dict):
            continue
        for struct, is_table_of_structs in _structs_in(hints[key]):
            children = value.items() if is_table_of_structs else [(None, value)]
            for name, child in children:
                if isinstance(child, dict):
                    inner = f"{prefix}{key}." + (f"{name}." if name else "")
                    _refuse_unknown_keys(child, struct, where, inner)


def _refuse_nonfinite(value: Any, where: str, key: str) -> None:
    """NaN is neither more nor less than any limit, and nobody can wait or train for ever."""
    if isinstance(value, dict):
        for name, child in value.items():
            _refuse_nonfinite(child, where, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for child in value:
            _refuse_nonfinite(child, where, key)
    elif isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{where}: {key} is {value}; a finite number was expected")


def _of_one_table(table: dict[str, Any], kind: type) -> str:
    """What is wrong in a table of tables by name, and in which: msgspec does not say."""
    for key, hint in typing.get_type_hints(kind).items():
        for struct, is_table_of_structs in _structs_in(hint):
            children = table.get(key)
            if not is_table_of_structs or not isinstance(children, dict):
                continue
            for name, child in children.items():
                try:
                    msgspec.convert(child, struct)
                except (msgspec.ValidationError, ValueError) as error:
                    return _in_our_words(error, f"{key}.{name}")
    return ""


def _in_our_words(error: Exception, table: str = "") -> str:
    text, _, path = str(error).partition(" - at `$")
    key = (table + path.rstrip("`")).lstrip(".")
    return f"{key}: {text}" if key else text


def _choices(hint: Any, path: list[str]) -> str:
    """What a key may be, if that is one of a few words: msgspec does not say."""
    if not path:
        return f" (it may be {', '.join(get_args(hint))})" if get_origin(hint) is Literal else ""
    for struct, is_table_of_structs in _structs_in(hint):
        inner, hints = path[is_table_of_structs:], typing.get_type_hints(struct)
        if inner and inner[0] in hints:
            return _choices(hints[inner[0]], inner[1:])
    return ""


def _structs_in(hint: Any) -> list[tuple[type, bool]]:
    """Structs a field may hold, and whether it holds a table of them by name."""
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return [(hint, False)]
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is dict:
        return [(struct, True) for struct, _ in _structs_in(arguments[1])]
    if origin in (typing.Union, types.UnionType):
        return [found for argument in arguments for found in _structs_in(argument)]
    return []
