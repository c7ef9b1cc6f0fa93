"""Campaigns: how far each is, what it misses, and what it made."""

from __future__ import annotations

from collections import defaultdict
from datetime import datetime

from msgspec import Struct
from sqlalchemy import Connection

from wfm.model import CoverageState, ProductType, Why
from wfm.views.coverage import CoverageLine, WhyLine, coverage_summary, of_members, why
from wfm.views.sql import _all, _require, _require_location, _rows

_CAMPAIGNS_HERE = """
SELECT p.name FROM campaign g JOIN pipeline p ON p.id = g.pipeline_id WHERE p.location_id = :loc
    AND p.deleted_at IS NULL
"""


class CampaignLine(Struct, frozen=True, kw_only=True):
    """A campaign. `units` and `covered` count all its steps; `complete`: 100 % of it is covered."""

    name: str
    template: str
    packages: int
    units: int
    covered: int
    created_at: datetime
    actor: str
    reason: str

    @property
    def percent(self) -> float:
        """How much of it is covered, rounded down: 100 means all."""
        return int(1000 * self.covered / self.units) / 10 if self.units else 0.0


class ReasonLine(Struct, frozen=True):
    """How many units of a step are not covered for one reason; the first of them in full."""

    step: str
    why: Why
    units: int
    example: WhyLine


class CampaignStep(Struct, frozen=True, kw_only=True):
    """A step of a campaign: what it is pinned to, and its units by coverage state."""

    step: str
    software: str
    version: str
    version_state: str
    config: str | None
    config_revision: int | None
    units: int
    states: dict[CoverageState, int]


class RevokedMember(Struct, frozen=True):
    """A package of a campaign that was revoked after it was frozen."""

    package: str
    by: str
    reason: str


class CampaignDetail(CampaignLine, frozen=True, kw_only=True):
    """A campaign in full.

    Attributes:
        complete: all of it is covered, nothing in it was revoked, and no member of it is in quarantine.
        missing: why what is not covered is not, those that need somebody first; and what is covered without a member.
        revoked: packages that are in it all the same: it is frozen.
    """

    complete: bool
    revoked: list[RevokedMember]
    steps: list[CampaignStep]
    missing: list[ReasonLine]


class CampaignProduct(Struct, frozen=True, kw_only=True):
    """A product that counts."""

    id: int
    step: str
    unit: str
    run: int
    type: ProductType
    path: str
    size: int
    checksum: str


def campaigns(conn: Connection, location_id: int, name: str | None = None) -> list[CampaignLine]:
    """The campaigns of a location, the newest first.

    Raises:
        NotFoundError: no such location or campaign.
    """
    _require_location(conn, location_id)
    _require(conn, "campaign", name, _CAMPAIGNS_HERE, loc=location_id)
    return _rows(
        conn,
        CampaignLine,
        """
        SELECT p.name, t.name AS template, g.packages, g.created_at, g.actor, g.reason, z.units, z.covered
        FROM campaign g JOIN pipeline p ON p.id = g.pipeline_id JOIN pipeline t ON t.id = g.template_id
        CROSS JOIN LATERAL (SELECT count(*) AS units, count(*) FILTER (WHERE c.state = 'covered') AS covered
            FROM reduction_step s JOIN unit u ON u.pipeline_id = s.pipeline_id AND u.dims = s.dims
            LEFT JOIN coverage c ON (c.step_id, c.unit_id) = (s.id, u.id)
            WHERE s.pipeline_id = p.id AND s.active AND u.members > 0) z
        WHERE p.location_id = :loc AND p.deleted_at IS NULL AND (CAST(:name AS text) IS NULL OR p.name = :name)
        ORDER BY p.id DESC
        """,
        loc=location_id,
        name=name,
    )


def campaign(conn: Connection, name: str, location_id: int) -> CampaignDetail:
    """How far a campaign is, by step, and what is missing, by reason.

    Raises:
        NotFoundError: no such location or campaign.
    """
    (line,) = campaigns(conn, location_id, name)
    covered = {c.step: c for c in coverage_summary(conn, location_id, name)}
    steps = [_step(row, covered[str(row["step"])]) for row in _all(conn, _PINNED, name=name)]
    revoked = _rows(conn, RevokedMember, _REVOKED, name=name)
    missing = _missing(conn, name, location_id)
    return CampaignDetail(
        **{field: getattr(line, field) for field in CampaignLine.__struct_fields__},
        complete=line.covered == line.units and not revoked and all(m.why is not Why.QUARANTINED for m in missing),
        revoked=revoked,
        steps=steps,
        missing=missing,
    )


_REVOKED = """
SELECT k.name AS package, k.revoked_by AS by, k.revoked_reason AS reason FROM raw_data_package k
WHERE k.revoked_by <> '' AND EXISTS (SELECT 1 FROM unit_member m JOIN unit u ON u.id = m.unit_id
    JOIN pipeline p ON p.id = u.pipeline_id
    WHERE m.package_id = k.id AND m.removed IS NULL AND p.name = :name AND p.deleted_at IS NULL)
ORDER BY k.name
"""

_PINNED = """
SELECT s.name AS step, w.name AS software, s.version, coalesce(v.state, 'gone') AS version_state, cf.name AS config,
    cr.revision AS config_revision
FROM pipeline p JOIN reduction_step s ON s.pipeline_id = p.id AND s.active JOIN software w ON w.id = s.software_id
LEFT JOIN software_version v ON v.software_id = w.id AND v.version = s.version
LEFT JOIN config_revision cr ON cr.id = s.config_revision_id LEFT JOIN config cf ON cf.id = cr.config_id
WHERE p.name = :name AND p.deleted_at IS NULL ORDER BY s.position
"""


def _step(row: dict[str, object], line: CoverageLine) -> CampaignStep:
    return CampaignStep(**row, units=line.units, states=line.states)  # type: ignore[arg-type]


def _missing(conn: Connection, name: str, location_id: int) -> list[ReasonLine]:
    """By step and reason; `why` puts first what needs somebody."""
    lines: dict[tuple[str, Why], list[WhyLine]] = defaultdict(list)
    for line in why(conn, pipeline=name, location_id=location_id, limit=10_000):
        if line.state is not CoverageState.COVERED:
            lines[line.step, line.why].append(line)
        elif line.quarantined:
            lines[line.step, Why.QUARANTINED].append(of_members(line, [q.member for q in line.quarantined]))
    return [ReasonLine(step, reason, len(found), found[0]) for (step, reason), found in lines.items()]


def campaign_products(
    conn: Connection, name: str, location_id: int, kinds: list[ProductType] | None = None
) -> list[CampaignProduct]:
    """The products of a campaign that count, by step and unit.

    Raises:
        NotFoundError: no such location or campaign.
    """
    _require_location(conn, location_id)
    _require(conn, "campaign", name, _CAMPAIGNS_HERE, loc=location_id)
    return _rows(
        conn,
        CampaignProduct,
        """
        SELECT d.id, s.name AS step, u.key AS unit, r.id AS run, d.type, d.path, d.size, d.checksum
        FROM pipeline p JOIN reduction_step s ON s.pipeline_id = p.id AND s.active JOIN coverage c ON c.step_id = s.id
        JOIN unit u ON u.id = c.unit_id JOIN run r ON r.id = c.run_id
        JOIN data_product d ON d.run_id = r.id AND d.superseded_by IS NULL
        WHERE p.name = :name AND p.deleted_at IS NULL AND c.state = 'covered'
            AND (CAST(:kinds AS text[]) IS NULL OR d.type = ANY(:kinds))
        ORDER BY s.position, u.key, d.path
        """,
        name=name,
        kinds=kinds,
    )
