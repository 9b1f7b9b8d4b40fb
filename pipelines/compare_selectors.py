"""Selectors of a comparison: NAME or NAME:field=value,field=value says which outliers a classifier is trained on."""

import re
import types
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from miner.config import Config, Data, Game, Output, Rule, Selection
from miner.errors import UsageError
from miner.inputs import check as check_mining

NONE, FULL, RANDOM, MINED = "none", "full", "random", "mined"
GAMES = ("hedge", "paper", "reference", "equilibrium")  # rules with rounds; every other one scores the pool once
CLUSTERED = "dos"  # its strata are part of the rule
_BARE = {"exclude_near_id": 0.0, "strata": 0, "views": 1, "smooth": 0.0}  # as published: no guard, strata, averaging


def slug(selector: str) -> str:
    """``selector`` as a part of a folder's name; different ones stay different."""
    return re.sub(r"[:,]", "+", selector)


def settings(selector: str) -> dict[str, Any]:
    """The fields of Game and Selection that ``selector`` sets, {} for none and full.

    Raises UsageError for an unknown selector or field, and for a value that is not of the field's type.
    """
    name, _, rest = selector.partition(":")
    rules = get_args(Rule)
    if name not in (NONE, FULL, RANDOM, MINED, *rules):
        known = ", ".join(dict.fromkeys((NONE, FULL, RANDOM, MINED, *rules)))
        raise UsageError(f"--selectors {selector}: no selector is called {name!r}; choose from {known}")
    if name in (NONE, FULL) and rest:
        raise UsageError(f"--selectors {selector}: {name} mines nothing and takes no fields")
    found: dict[str, Any] = {}
    if name == RANDOM:
        found = _BARE | {"rule": "uniform", "draw": "random", "rounds": 1}
    elif name in rules:
        found = _BARE | {"rule": name} | ({} if name in GAMES else {"rounds": 1})
        if name == CLUSTERED:
            del found["strata"]
    for pair in rest.split(",") if rest else ():
        field, _, value = pair.partition("=")
        found[field] = _value(selector, field, value)
    return found


def mining_config(selector: str, data: Data, gammas: tuple[float, ...], out: Path | None = None) -> Config:
    """The mining run of ``selector``. Raises UsageError as ``settings`` and for values that make no sense."""
    found = settings(selector)
    game = {name: value for name, value in found.items() if name in Game.__dataclass_fields__}
    selection = {name: value for name, value in found.items() if name not in game}
    config = Config(
        data, replace(Game(), **game), Selection(gammas, **selection), output=Output(str(out) if out else None)
    )
    try:
        check_mining(config)
    except UsageError as error:
        raise UsageError(f"--selectors {selector}: {error}") from None
    return config


def _value(selector: str, field: str, text: str) -> Any:
    """``text`` as the type of ``field``."""
    hints = {name: hint for section in (Game, Selection) for name, hint in get_type_hints(section).items()}
    del hints["gamma"]  # the matrix has its own
    if field not in hints:
        raise UsageError(f"--selectors {selector}: no field {field!r}; choose from {', '.join(hints)}")
    hint = hints[field]
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    for kind in kinds:
        if kind is type(None) and text == "none":
            return None
        if get_origin(kind) is Literal and text in get_args(kind):
            return text
        if kind is bool and text in ("true", "false"):
            return text == "true"
        if kind in (int, float, str):
            try:
                return kind(text)
            except ValueError:
                continue
    raise UsageError(f"--selectors {selector}: {field}={text} is no {' or '.join(map(_spelt, kinds))}")


def _spelt(kind: Any) -> str:
    return " or ".join(get_args(kind)) or ("none" if kind is type(None) else kind.__name__)
