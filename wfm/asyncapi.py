"""The schema of every event as an AsyncAPI 3.0 document, made from the structs and their docstrings. Pure."""

from __future__ import annotations

import inspect
import re
from typing import Any

import msgspec

from wfm.charts import Chart
from wfm.events import ENTRANCES, SCHEMA_VERSION, TYPES, AnyEvent

_ABOUT = (
    "Every message is one entry of a Redis Stream with a single field, `event`, that holds the body as JSON. "
    "Ignore fields that are not named here: newer versions may add some. A message is a hint that says where to look; "
    "the truth is in the database. Whoever must miss nothing reads the log: `wfm events list --after CURSOR --json`; "
    "see docs/how-to/automation.md."
)

# The outer braces are in the key (a hash tag, such as `{1}`), the inner ones are AsyncAPI's for a parameter.
_KEY = "wfm:{{location}}:"


def document(chart: Chart) -> dict[str, Any]:
    """The AsyncAPI document of all events.

    Args:
        chart: says which role its events are for.
    """
    recipients = {e.event: e.to for s in chart.states.values() for e in s.emits if e.to} | ENTRANCES
    _, schemas = msgspec.json.schema_components(TYPES.values(), ref_template="#/components/schemas/{name}")
    public = [name for name, kind in TYPES.items() if kind.durable]
    channels = {"events": _channel("events", "Every event, for anybody. Capped: old entries are trimmed.", public)}
    for name, role in recipients.items():
        channels[name] = _channel(name, f"For the {role}.", [name])
    channels["data.arrived"]["description"] += " Anybody may write here."
    return {
        "asyncapi": "3.0.0",
        "info": {"title": "Events of wfm", "version": str(SCHEMA_VERSION), "description": _ABOUT},
        "defaultContentType": "application/json",
        "channels": channels,
        "operations": {
            "tellEverybody": {"action": "send", "channel": {"$ref": "#/channels/events"}},
            "hearOfArrivals": {"action": "receive", "channel": {"$ref": "#/channels/data.arrived"}},
        },
        "components": {
            "messages": {name: _message(name, kind) for name, kind in TYPES.items()},
            "schemas": {kind.__name__: _described(schemas[kind.__name__], kind) for kind in TYPES.values()},
        },
    }


def _channel(name: str, description: str, types: list[str]) -> dict[str, Any]:
    return {
        "address": _KEY + name,
        "description": description,
        "parameters": {"location": {"description": "Id of the processing location; the outer braces are in the key."}},
        "messages": {t: {"$ref": f"#/components/messages/{t}"} for t in types},
    }


def _message(name: str, kind: type[AnyEvent]) -> dict[str, Any]:
    return {
        "name": name,
        "summary": _first(kind),
        "contentType": "application/json",
        "payload": {"$ref": f"#/components/schemas/{kind.__name__}"},
    }


def _first(kind: type[Any]) -> str:
    return " ".join(inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].split())


def _described(schema: dict[str, Any], kind: type[AnyEvent]) -> dict[str, Any]:
    """A schema whose properties say what the docstrings of the struct and its bases say."""
    meanings: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        _, _, text = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:")
        parts = re.split(r"(?:^|(?<=[.] ))([a-z_]+(?:, [a-z_]+)*): ", " ".join(text.split()))
        for names, meaning in zip(parts[1::2], parts[2::2], strict=True):
            meanings |= dict.fromkeys(names.split(", "), meaning.strip())
    properties = {
        name: {"description": meanings[name], **rest} if name in meanings else rest
        for name, rest in schema["properties"].items()
    }
    return {**schema, "description": _first(kind), "properties": properties}
