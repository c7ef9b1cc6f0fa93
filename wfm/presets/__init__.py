"""Ready groupings with pipelines around them, as files beside this one: to be edited, then applied.

A preset is a file here: its first line, a comment, says what it is for.
"""

from __future__ import annotations

from importlib import resources


def texts() -> dict[str, str]:
    """By name, the YAML text of each preset."""
    files = sorted(resources.files(__name__).iterdir(), key=lambda f: f.name)
    return {f.name.removesuffix(".yaml"): f.read_text(encoding="utf-8") for f in files if f.name.endswith(".yaml")}


def purpose(text: str) -> str:
    """What a preset is for."""
    return text.partition("\n")[0].removeprefix("#").strip()
