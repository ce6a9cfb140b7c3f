"""Names as they are shown: whoever made a database, a table or a role may have put anything into its name."""

from __future__ import annotations


def visible(text: object) -> str:
    """Return *text* with what a terminal or a log would act upon made visible, line breaks too."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in str(text))


def identifier(name: str) -> str:
    """Return *name* as an SQL identifier that can be shown, and pasted into psql."""
    escaped = name.replace('"', '""')
    if name.isprintable():
        return f'"{escaped}"'
    points = "".join(char.replace("\\", "\\\\") if char.isprintable() else f"\\+{ord(char):06x}" for char in escaped)
    return f'U&"{points}"'


def quoted(name: str) -> str:
    """Return *name* as :func:`identifier` does; a plain lower-case name stays as it is."""
    plain = name.isidentifier() and name.isascii() and name == name.lower()
    return name if plain else identifier(name)


def literal(text: str) -> str:
    """Return *text* as an SQL literal, for a command that people paste into psql."""
    escaped = "".join(_escaped(char) for char in text)
    return f"E'{escaped}'" if "\\" in escaped else f"'{escaped}'"


def _escaped(char: str) -> str:
    if not char.isprintable():
        return f"\\U{ord(char):08x}"
    return {"'": "''", "\\": "\\\\"}.get(char, char)
