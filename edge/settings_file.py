"""The settings file: one TOML file, read once into `edge.settings`."""

from __future__ import annotations

import sys
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from edge.settings import Settings, SettingsError, check

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_settings(path: Path | None) -> Settings:
    """Read the TOML file at `path` (None: all defaults); raise SettingsError naming the first key that is wrong."""
    if path is None:
        return Settings()
    try:
        table = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SettingsError(f"the settings file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"the settings file {path} is not TOML: {error}") from error
    settings: Settings = _section(Settings, table, "")
    check(settings)
    return settings


def _section(kind: Any, table: dict[str, Any], prefix: str) -> Any:
    hints = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    values: dict[str, Any] = {}
    for name, value in table.items():
        key = prefix + name
        if name not in known:
            raise SettingsError(f"{key} is not a setting; known here: {', '.join(sorted(known))}")
        wanted = hints[name]
        if is_dataclass(wanted):
            if not isinstance(value, dict):
                raise SettingsError(f"{key} must be a section, [{key}]")
            values[name] = _section(wanted, value, f"{key}.")
        elif wanted == tuple[str, ...] and isinstance(value, list) and all(isinstance(each, str) for each in value):
            values[name] = tuple(value)
        elif wanted is Path and isinstance(value, str):
            values[name] = Path(value)
        elif wanted is float and isinstance(value, (int, float)) and not isinstance(value, bool):
            values[name] = float(value)
        elif isinstance(wanted, type) and isinstance(value, wanted) and not (wanted is int and isinstance(value, bool)):
            values[name] = value
        else:
            needed = "list of texts" if wanted == tuple[str, ...] else wanted.__name__
            raise SettingsError(f"{key} is {value!r}; a value of type {needed} is needed")
    return kind(**values)
