"""What a thing was made from, and what was made from it."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any, Literal

from msgspec import Struct, structs
from sqlalchemy import Connection

from wfm.errors import NotFoundError, UsageError
from wfm.model import ProductType
from wfm.schema import PINNED
from wfm.views.run_lines import _RUN_SOFTWARE, _RUN_TABLES
from wfm.views.sql import _PACKAGES, _PRODUCTS, _all, _column, _no_run, _not_found, _require


class LineageKind(StrEnum):
    """What lineage connects."""

    PACKAGE = "package"
    RUN = "run"
    PRODUCT = "product"


class LineageNode(Struct, frozen=True, kw_only=True):
    """A thing with what it was made from and what was made from it.

    A node that was met before in the same direction is `repeated`: it is named, but neither described nor expanded
    again. So the tree is never larger than the number of links.

    Attributes:
        id: of the package, run or product.
        label: its name. note: the most important of `details` for people.
        upstream: what it was made from. downstream: what was made from it; of the root, and below there.
    """

    kind: LineageKind
    id: int
    label: str
    note: str = ""
    details: dict[str, Any] = {}
    repeated: bool = False
    upstream: list[LineageNode] = []
    downstream: list[LineageNode] = []


_READS_RAW = "NOT EXISTS (SELECT 1 FROM run_input i WHERE i.run_id = r.id)"
_Key = tuple[LineageKind, int]


_Arrow = tuple[_Key, _Key]
"""From a thing to what was made from it."""


def lineage(conn: Connection, kind: LineageKind, key: int | str) -> LineageNode:
    """What a product, package or run was made from, and what was made from it.

    A run that read upstream runs read their INTERMEDIATE products; any other run read the raw data packages that its
    unit had in the run's generation.

    Args:
        key: the id of a run or product, the name of a package, or the path of a product: absolute, relative to its
            attempt's directory, or its last parts. Of several products the one that is not superseded is meant.

    Raises:
        NotFoundError: no such thing.
        UsageError: a path that several products have.
    """
    if kind is LineageKind.PACKAGE:
        root, seeds = _package_seeds(conn, str(key))
        up: list[int] = []
    elif kind is LineageKind.PRODUCT:
        product, run = find_product(conn, str(key))
        root, seeds = (kind, product), [run]
        up = _closure(conn, seeds, "run_id", "upstream_run_id")
    else:
        run_id = _number(str(key))
        if run_id is None:
            _no_run(conn, key)
        root, seeds = (kind, run_id), [run_id]
        up = _closure(conn, seeds, "run_id", "upstream_run_id")
    down = _closure(conn, seeds, "upstream_run_id", "run_id")
    nodes, arrows = _load(conn, root, up, down)
    if root not in nodes:
        _no_run(conn, key)
    if kind is LineageKind.PACKAGE:
        arrows += [(root, (LineageKind.RUN, run)) for run in seeds]
    before: defaultdict[_Key, list[_Key]] = defaultdict(list)
    after: defaultdict[_Key, list[_Key]] = defaultdict(list)
    for source, target in arrows:
        before[target].append(source)
        after[source].append(target)
    upstream = _grow(root, nodes, before, "upstream").upstream
    return structs.replace(_grow(root, nodes, after, "downstream"), upstream=upstream)


def _package_seeds(conn: Connection, name: str) -> tuple[_Key, list[int]]:
    """A package, and the runs that read it themselves."""
    _require(conn, "raw data package", name, _PACKAGES)
    (package,) = _column(conn, "SELECT id FROM raw_data_package WHERE name = :name", name=name)
    runs = _column(
        conn,
        f"""
        SELECT r.id FROM unit_member m JOIN unit u ON u.id = m.unit_id
        JOIN reduction_step s ON s.pipeline_id = u.pipeline_id JOIN run r ON r.step_id = s.id AND {PINNED}
        WHERE m.package_id = :package AND {_READS_RAW} ORDER BY r.id
        """,
        package=package,
    )
    return (LineageKind.PACKAGE, package), runs


def find_product(conn: Connection, key: str) -> tuple[int, int]:
    """Ids of a product and its run."""
    found = _all(
        conn,
        """
        SELECT DISTINCT d.id, d.run_id, d.path, d.superseded_by IS NOT NULL AS superseded
        FROM data_product d LEFT JOIN physical_copy c ON c.product_id = d.id
        LEFT JOIN data_location l ON l.id = c.location_id
        WHERE CASE WHEN CAST(:id AS bigint) IS NOT NULL THEN d.id = :id ELSE d.path = :path
            OR right(d.path, length(:path) + 1) = '/' || :path OR c.path = :path
            OR rtrim(l.root, '/') || '/' || c.path = :path END
        ORDER BY d.id DESC
        """,
        id=_number(key),
        path=key,
    )
    if not found and _number(key) is not None:
        raise NotFoundError(f"no product has the id {key}; `wfm runs show RUN` lists those of a run")
    if not found:
        _not_found(conn, "product", key, _PRODUCTS)
    current = [d for d in found if not d["superseded"]] or found
    if len(current) > 1:
        listed = ", ".join(f"{d['id']} ({d['path']} of run {d['run_id']})" for d in current[:5])
        more = ", ..." if len(current) > 5 else ""
        raise UsageError(f"{len(current)} products are named {key!r}; name one by its id: {listed}{more}")
    return current[0]["id"], current[0]["run_id"]


def _number(key: str) -> int | None:
    return int(key) if re.fullmatch(r"\d{1,18}", key, re.ASCII) else None


def _closure(conn: Connection, seeds: Sequence[int], along: str, to: str) -> list[int]:
    """All runs that are reached from these along run_input, themselves included; each once."""
    return _column(
        conn,
        f"""
        WITH RECURSIVE reached(id) AS (
            SELECT unnest(CAST(:seeds AS bigint[]))
            UNION SELECT i.{to} FROM reached JOIN run_input i ON i.{along} = reached.id)
        SELECT id FROM reached
        """,
        seeds=list(seeds),
    )


def _load(
    conn: Connection, root: _Key, up: Sequence[int], down: Sequence[int]
) -> tuple[dict[_Key, LineageNode], list[_Arrow]]:
    """These runs with what they read and made, in four statements.

    Arrows may come from runs that are not among these; nothing leads to such from the root.
    """
    runs = sorted({*up, *down})
    nodes: dict[_Key, LineageNode] = {}
    arrows: list[_Arrow] = []
    for r in _all(
        conn,
        f"""
        SELECT r.id, p.name AS pipeline, s.name AS step, u.key AS unit, r.state, r.attempt, r.finished_at, r.probe_of,
            sw.name AS software, sv.version, sv.state AS version_state, cf.name AS config, cr.revision, cr.parameters,
            cr.revoked_by AS config_revoked_by, cr.revoked_reason AS config_revoked_reason
        FROM {_RUN_TABLES} {_RUN_SOFTWARE} WHERE r.id = ANY(:runs)
        """,
        runs=runs,
    ):
        run = (LineageKind.RUN, r.pop("id"))
        config = f", config {r['config']} revision {r['revision']}" if r["config"] else ""
        config += _revoked(r, "config_")
        state = "" if r["version_state"] == "active" else f" ({r['version_state']})"
        probe = f", a probe of run {r['probe_of']}" if r["probe_of"] else ""
        nodes[run] = LineageNode(
            kind=LineageKind.RUN,
            id=run[1],
            label=f"{r['pipeline']}/{r['step']} {r['unit']}",
            note=f"{r['state']}, {r['software']} {r['version']}{state}{config}{probe}",
            details=r,
        )
    read: defaultdict[tuple[int, int], list[_Key]] = defaultdict(list)
    for d in _all(
        conn,
        """
        SELECT id, run_id AS run, attempt, type, path, size, checksum, metrics, superseded_by, revoked_by,
            revoked_reason, created_at
        FROM data_product JOIN unnest(CAST(:runs AS bigint[])) AS w(run) ON run_id = w.run
        WHERE type = 'INTERMEDIATE' OR run_id = ANY(:down) OR id = :root ORDER BY path, id
        """,
        runs=runs,
        down=down,
        root=root[1] if root[0] is LineageKind.PRODUCT else None,
    ):
        product, run = (LineageKind.PRODUCT, d.pop("id")), (LineageKind.RUN, d["run"])
        newer = "a later attempt" if d["superseded_by"] == d["run"] else f"run {d['superseded_by']}"
        superseded = f", superseded by {newer}" if d["superseded_by"] else ""
        nodes[product] = LineageNode(
            kind=LineageKind.PRODUCT,
            id=product[1],
            label=d.pop("path"),
            note=f"{d['type']}, {d['size']} bytes{superseded}{_revoked(d)}",
            details=d,
        )
        arrows.append((run, product))
        if d["type"] == ProductType.INTERMEDIATE:
            read[d["run"], d["attempt"]].append(product)
    for i in _all(
        conn,
        """
        SELECT run_id, upstream_run_id, upstream_attempt FROM run_input WHERE run_id = ANY(:runs)
        ORDER BY run_id, upstream_run_id
        """,
        runs=runs,
    ):
        upstream, reader = (LineageKind.RUN, i["upstream_run_id"]), (LineageKind.RUN, i["run_id"])
        arrows += [(source, reader) for source in read[upstream[1], i["upstream_attempt"]] or [upstream]]
    for k in _all(
        conn,
        f"""
        WITH needed AS (
            SELECT r.id AS run, m.package_id FROM run r JOIN unit_member m ON {PINNED}
            WHERE r.id = ANY(:up) AND {_READS_RAW}
            UNION ALL SELECT NULL, CAST(:root AS bigint))
        SELECT n.run, k.id, k.name, k.state, k.size, k.revoked_by, k.revoked_reason,
            e.name AS executed_obs_unit, k.registered_at
        FROM needed n JOIN raw_data_package k ON k.id = n.package_id
        JOIN executed_obs_unit e ON e.id = k.executed_obs_unit_id ORDER BY n.run, k.name
        """,
        up=up,
        root=root[1] if root[0] is LineageKind.PACKAGE else None,
    ):
        package, reader = (LineageKind.PACKAGE, k.pop("id")), k.pop("run")
        nodes[package] = LineageNode(
            kind=LineageKind.PACKAGE,
            id=package[1],
            label=k.pop("name"),
            note=f"{k['state']}, {k['size']} bytes{_revoked(k)}",
            details=k,
        )
        if reader is not None:
            arrows.append((package, (LineageKind.RUN, reader)))
    return nodes, arrows


def _revoked(row: Mapping[str, Any], prefix: str = "") -> str:
    by, reason = row[f"{prefix}revoked_by"], row[f"{prefix}revoked_reason"]
    return f", revoked by {by}: {reason}" if by else ""


def _grow(
    root: _Key,
    nodes: Mapping[_Key, LineageNode],
    arrows: Mapping[_Key, Sequence[_Key]],
    side: Literal["upstream", "downstream"],
) -> LineageNode:
    """The tree that the arrows span from a node; as deep as the pipeline, so recursion is safe."""
    seen: set[_Key] = set()

    def grow(key: _Key) -> LineageNode:
        if key in seen:
            return structs.replace(nodes[key], repeated=True, note="", details={})
        seen.add(key)
        return structs.replace(nodes[key], **{side: [grow(k) for k in arrows.get(key, ())]})

    return grow(root)


def tree(node: LineageNode) -> str:
    """Lineage as text with lines: first what the node was made from, then what was made from it."""
    lines = [_describe(node)]
    for title, children, side in (
        ("made from", node.upstream, "upstream"),
        ("used for", node.downstream, "downstream"),
    ):
        if children:
            lines.append(title)
            lines += _branches(children, side, "")
    return "\n".join(lines) + "\n"


def _branches(nodes: Sequence[LineageNode], side: str, indent: str) -> Iterator[str]:
    for n, node in enumerate(nodes, 1):
        last = n == len(nodes)
        yield f"{indent}{'└─' if last else '├─'} {_describe(node)}"
        yield from _branches(getattr(node, side), side, indent + ("   " if last else "│  "))


def _describe(node: LineageNode) -> str:
    note = "see above" if node.repeated else node.note
    return _name(node) + (f" ({note})" if note else "")


def _name(node: LineageNode) -> str:
    return f"run {node.id} {node.label}" if node.kind is LineageKind.RUN else f"{node.kind} {node.label}"


_MERMAID_SHAPES = {
    LineageKind.PACKAGE: '[("{}")]',
    LineageKind.RUN: '["{}"]',
    LineageKind.PRODUCT: '(["{}"])',
}


def mermaid(node: LineageNode) -> str:
    """Lineage as a Mermaid flowchart in the direction of the data; each node and each arrow once."""
    shapes: dict[str, str] = {}
    arrows: dict[tuple[str, str], None] = {}

    def draw(n: LineageNode) -> str:
        name = f"{n.kind}{n.id}"
        label = re.sub(r"[^\w ,.()/@:-]", lambda match: f"#{ord(match[0])};", _name(n))
        shapes.setdefault(name, name + _MERMAID_SHAPES[n.kind].format(label))
        for source in n.upstream:
            arrows[draw(source), name] = None
        for target in n.downstream:
            arrows[name, draw(target)] = None
        return name

    root = draw(node)
    links = (f"{source} --> {target}" for source, target in arrows)
    return "\n    ".join(["flowchart LR", *shapes.values(), *links, f"style {root} stroke-width:3px"]) + "\n"
