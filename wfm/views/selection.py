"""Which rule of a data grouping lets how many packages through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from msgspec import Struct
from sqlalchemy import Connection, and_, func, select

from wfm import grouping
from wfm.views.sql import _PIPELINES_HERE, _all, _require, _require_location

SHOWN_VALUES = 5


class RuleCount(Struct, frozen=True, kw_only=True):
    """What one rule lets through, counted in packages.

    Attributes:
        number: ``2``; ``2.1`` and ``2.1.3`` for rules in any_of.
        alone: where it holds. together: where it and all rules before it hold; None for rules in any_of.
        values: where an ``eq`` or ``in`` with texts matches nothing: what packages have instead, the nearest first.
    """

    number: str
    rule: str
    alone: int
    together: int | None
    values: list[str] = []


class Selection(Struct, frozen=True, kw_only=True):
    """How a grouping comes to its packages: how many there are (without revoked ones), how many it selects, by rule."""

    grouping: str
    packages: int
    selected: int
    rules: list[RuleCount]


def explain_pipeline(conn: Connection, pipeline: str, *, location_id: int) -> Selection:
    """`explain` for the grouping of a pipeline.

    Raises:
        NotFoundError: no such pipeline at this location.
    """
    _require_location(conn, location_id)
    _require(conn, "pipeline", pipeline, _PIPELINES_HERE, loc=location_id)
    (found,) = _all(
        conn,
        "SELECT g.name, g.rules FROM pipeline p JOIN data_grouping g ON g.id = p.grouping_id WHERE p.name = :name"
        " AND p.location_id = :loc",
        name=pipeline,
        loc=location_id,
    )
    return explain(conn, found["name"], found["rules"])


def explain(conn: Connection, name: str, rules: Sequence[Any]) -> Selection:
    """Count what each rule of a grouping lets through, in one pass over the packages.

    Args:
        rules: checked with `grouping.validate_rules`, as JSON.
    """
    conditions = grouping.rules_from(rules)
    numbered = [((n,), rule) for n, rule in enumerate(conditions)]
    every = [*_numbered(numbered)]
    alone = [func.count().filter(grouping.condition(rule)) for _, rule in every]
    together = [
        func.count().filter(and_(*map(grouping.condition, conditions[: n + 1]))) for n, _ in enumerate(conditions)
    ]
    total, *counts = conn.execute(
        select(func.count(), *alone, *together).select_from(grouping.joined(conditions)).where(grouping.NOT_REVOKED)
    ).one()
    left = counts[len(alone) :]
    lines = []
    for (path, rule), count in zip(every, counts, strict=False):
        lines.append(
            RuleCount(
                number=grouping.number(path),
                rule=str(rule),
                alone=count,
                together=left[path[0]] if len(path) == 1 else None,
                values=_nearest(conn, rule) if not count else [],
            )
        )
    return Selection(grouping=name, packages=total, selected=left[-1] if left else total, rules=lines)


_Numbered = tuple[tuple[int, ...], grouping.Condition]


def _numbered(rules: Sequence[_Numbered]) -> Iterator[_Numbered]:
    """Rules, each followed by those in its any_of."""
    for path, rule in rules:
        yield path, rule
        if isinstance(rule, grouping.AnyOf):
            for n, member in enumerate(rule.any_of):
                inner = [((*path, n, i) if len(member) > 1 else (*path, n), r) for i, r in enumerate(member)]
                yield from _numbered(inner)


def _nearest(conn: Connection, rule: grouping.Condition) -> list[str]:
    """What packages have where a rule finds none of its texts: what is spelled alike, then what most of them have."""
    if not isinstance(rule, grouping.Rule) or not (asked := rule.texts):
        return []
    value = grouping.text_of(rule)
    there_is = (grouping.NOT_REVOKED, value.is_not(None))
    rows = select(value, func.count()).select_from(grouping.joined([rule])).where(*there_is).group_by(value)
    # Only texts of about the same length can be near.
    by_length = rows.order_by(func.abs(func.length(value) - len(asked[0])), func.count().desc()).limit(2000)
    there: dict[str, int] = {row[0]: row[1] for row in conn.execute(by_length)}
    folded = {text.casefold(): text for text in there}
    near = [folded[f] for text in asked for f in get_close_matches(text.casefold(), folded, n=SHOWN_VALUES)]
    most = sorted(there, key=lambda text: -there[text])
    return list(dict.fromkeys([*near, *most]))[:SHOWN_VALUES]
