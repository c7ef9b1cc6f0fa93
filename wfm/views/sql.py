"""What the reads share: statements in, structs out, and names that do not exist."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import Any, NoReturn, TypeVar

import msgspec
from msgspec import Struct
from sqlalchemy import Connection, text

from wfm import grouping, schema
from wfm.catalogue import called_now
from wfm.errors import NotFoundError
from wfm.model import ACTIVE_STATES

T = TypeVar("T", bound=Struct)


def _all(conn: Connection, sql: str, **params: Any) -> list[dict[str, Any]]:
    found = conn.execute(text(sql), params).mappings()
    return [{k: v.astimezone(UTC) if isinstance(v, datetime) else v for k, v in row.items()} for row in found]


def _rows(conn: Connection, kind: type[T], sql: str, **params: Any) -> list[T]:
    return msgspec.convert(_all(conn, sql, **params), list[kind])  # type: ignore[valid-type]


def _column(conn: Connection, sql: str, **params: Any) -> list[Any]:
    return list(conn.execute(text(sql), params).scalars())


def _asked(column: str, name: str, kind: str = "text", comparison: str = "=") -> str:
    """A condition that holds for all rows while its parameter is None."""
    return f"(CAST(:{name} AS {kind}) IS NULL OR {column} {comparison} :{name})"


def _listed(values: Iterable[str]) -> str:
    return "(" + ", ".join(f"'{v}'" for v in sorted(values)) + ")"


_ACTIVE = _listed(ACTIVE_STATES)


_PIPELINES = "SELECT name FROM pipeline"
_PIPELINES_HERE = "SELECT name FROM pipeline WHERE location_id = :loc AND deleted_at IS NULL"
_OF_PIPELINE = _asked("p.name", "pipeline")
_STEPS = f"SELECT s.name FROM reduction_step s JOIN pipeline p ON p.id = s.pipeline_id WHERE {_OF_PIPELINE}"
_UNITS = f"""
SELECT u.key FROM pipeline p JOIN (SELECT DISTINCT pipeline_id, dims FROM reduction_step) s ON s.pipeline_id = p.id
JOIN unit u ON (u.pipeline_id, u.dims) = (s.pipeline_id, s.dims) WHERE {_OF_PIPELINE}
"""
_PACKAGES = "SELECT name FROM raw_data_package"
_PRODUCTS = "SELECT path FROM data_product"


def _require(conn: Connection, what: str, name: str | None, names: str, **params: Any) -> None:
    """Nothing if the statement `names` gives this name, or if none was asked for."""
    if name is None:
        return
    if not _column(conn, f"SELECT 1 FROM ({names}) n(name) WHERE name = :name LIMIT 1", name=name, **params):
        _not_found(conn, what, name, names, **params)


def _require_all(*checks: Callable[[], None]) -> None:
    """Every check is made; all names that do not exist are reported together."""
    faults = []
    for check in checks:
        try:
            check()
        except NotFoundError as e:
            faults.append(str(e))
    if faults:
        raise NotFoundError("\n".join(faults))


def _not_found(conn: Connection, what: str, name: str, names: str, **params: Any) -> NoReturn:
    # Names of about the same length are enough to look through: only such can be near.
    near = _column(
        conn,
        f"SELECT name FROM ({names}) n(name) GROUP BY name ORDER BY abs(length(name) - :length), name LIMIT 2000",
        length=len(name),
        **params,
    )
    table = {"pipeline": schema.pipeline, "step": schema.reduction_step}.get(what)
    now = "" if table is None else called_now(conn, table, name, params.get("pipeline"))
    raise NotFoundError(grouping.unknown(what, name, sorted(near), now))


def _require_location(conn: Connection, location_id: int) -> None:
    known = {r["id"]: r["name"] for r in _all(conn, "SELECT id, name FROM data_location ORDER BY id")}
    if location_id not in known:
        listed = ", ".join(f"{i} ({name})" for i, name in known.items()) or "none yet"
        raise NotFoundError(f"unknown location {location_id}; known: {listed}")


def _no_run(conn: Connection, key: object) -> NoReturn:
    (newest,) = _column(conn, "SELECT max(id) FROM run")
    known = f"the newest run is {newest}; see `wfm runs list`" if newest else "there are no runs yet"
    raise NotFoundError(f"unknown run {key!r}; {known}")
