"""Campaigns: a named, frozen set of packages, versions and configs, processed as a pipeline of its own.

A campaign is a pipeline like any other, but for three things: the members of its units are fixed once, when it is made
(`gaps.fold` passes it by from then on); each step is pinned to the version, and to the revision of its config, that its
template would use at that time; and its definition cannot change any more. So everything that is true of pipelines
(coverage, reasons, retries, priority, pause) is true of campaigns, and nothing that comes later touches them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec import Struct

from wfm import documents, gaps, grouping, schema
from wfm.catalogue import called_now, emit
from wfm.decide import SoftwareVersion, choose_version
from wfm.errors import NotFoundError, RefusedError, UsageError
from wfm.events import CampaignCreated
from wfm.grouping import unknown
from wfm.model import Actor, VersionPolicy
from wfm.store import Tx


class Created(Struct, frozen=True):
    """A new campaign: its packages, and by step its units and the version it is pinned to."""

    name: str
    packages: int
    versions: dict[str, str]


def create(
    tx: Tx,
    name: str,
    template: str,
    *,
    location_id: int,
    actor: Actor,
    versions: Mapping[str, str] = {},
    rules: Sequence[Any] = (),
    packages: Sequence[str] | None = None,
    priority: int | None = None,
) -> Created:
    """Freeze what a pipeline selects now, and what its steps would run now, under a name of its own.

    Args:
        versions: by step, the version it runs; others run what their policy gives today.
        rules: conditions beside those of the template's grouping, checked with `grouping.validate_rules`.
        packages: names; None for all that the rules select.
        priority: of its runs; the template's by default.

    Raises:
        NotFoundError: no such pipeline at this location, or a package that does not exist or is not selected.
        RefusedError: the name is taken. UsageError: nothing is selected, or a step has no such version.
    """
    (found,) = _template(tx, template, location_id)
    if tx.all("SELECT 1 FROM pipeline WHERE name = :name", name=name):
        raise RefusedError(f"there is, or was, a pipeline {name!r}: name the campaign otherwise")
    ids = _select(tx, found.rules, rules, packages)
    (document,) = documents.get(tx.conn, "pipeline", template)
    pinned = _pin(tx, document, versions)
    document |= {"name": name, "enabled": True, "trigger": "CONTINUOUS"}
    document.pop("trigger_config", None)
    document["priority"] = document["priority"] if priority is None else priority
    loaded = documents.load([(f"campaign {name}", json.dumps(document))])
    applied = documents.apply(tx.conn, loaded, location_id=location_id, actor=actor.name, reason=actor.reason)
    (pipeline_id,) = applied.pipeline_ids_changed
    gaps.fold(tx, found.location_id, ids, [pipeline_id])
    tx.run("UPDATE pipeline SET frozen_at = now() WHERE id = :id", id=pipeline_id)
    tx.run(
        """
        UPDATE reduction_step s SET config_revision_id = (SELECT id FROM config_revision c
            WHERE c.config_id = s.config_id ORDER BY revision DESC LIMIT 1) WHERE pipeline_id = :id
        """,
        id=pipeline_id,
    )
    tx.run(
        "INSERT INTO campaign (pipeline_id, template_id, packages, actor, reason)"
        " VALUES (:id, :template, :packages, :actor, :reason)",
        id=pipeline_id,
        template=found.id,
        packages=len(ids),
        actor=actor.name,
        reason=actor.reason,
    )
    event = CampaignCreated(pipeline=name, template=template, packages=len(ids))
    told = emit(tx.conn, [(found.location_id, event)], actor=actor.name, reason=actor.reason)
    tx.load_events([*applied.event_ids, *told])
    return Created(name, len(ids), pinned)


def _template(tx: Tx, name: str, location_id: int) -> Sequence[Any]:
    rows = tx.all(
        "SELECT p.id, p.name, p.location_id, g.rules FROM pipeline p JOIN data_grouping g ON g.id = p.grouping_id"
        " WHERE p.deleted_at IS NULL AND p.location_id = :loc ORDER BY p.name",
        loc=location_id,
    )
    found = [r for r in rows if r.name == name]
    if not found:
        now = called_now(tx.conn, schema.pipeline, name)
        raise NotFoundError(unknown("pipeline", name, [r.name for r in rows], now))
    return found


def _select(tx: Tx, base: Sequence[Any], more: Sequence[Any], names: Sequence[str] | None) -> list[int]:
    """The packages to freeze."""
    faults = grouping.validate_rules(list(more))
    if faults:
        raise UsageError("\n".join(faults))
    rules = grouping.rules_from([*base, *more])
    if names is None:
        ids = sorted(row[0] for row in tx.conn.execute(grouping.select_packages(rules, [])))
        if not ids:
            raise UsageError("nothing to freeze: the rules select no package; `wfm data list` shows what there is")
        return ids
    known = {
        r.name: r.id
        for r in tx.all("SELECT id, name FROM raw_data_package WHERE name = ANY(:names)", names=list(names))
    }
    ids = sorted(
        row[0] for row in tx.conn.execute(grouping.select_packages(rules, [], package_ids=sorted(known.values())))
    )
    faults = [f"unknown raw data package {n!r}; see `wfm data list`" for n in names if n not in known]
    chosen = set(ids)
    faults += [f"package {n!r} is not selected by the rules" for n in known if known[n] not in chosen]
    if faults:
        raise NotFoundError("\n".join(faults))
    if not ids:
        raise UsageError("nothing to freeze: no package is named")
    return ids


def _pin(tx: Tx, document: dict[str, Any], versions: Mapping[str, str]) -> dict[str, str]:
    """Pin each step of a pipeline's document; returns the versions by step. All faults are told together."""
    steps = {step["name"]: step for step in document["steps"]}
    faults = [unknown("step", name, steps) for name in versions if name not in steps]
    known: dict[str, list[SoftwareVersion]] = {}
    for row in tx.all(
        "SELECT s.name, v.id, v.version, v.state FROM software_version v JOIN software s ON s.id = v.software_id"
        " WHERE s.name = ANY(:names) ORDER BY v.id",
        names=[step["software"] for step in steps.values()],
    ):
        known.setdefault(row.name, []).append(SoftwareVersion(row.id, row.version, row.state))
    for name, step in steps.items():
        policy, named = VersionPolicy(step["version_policy"]), step["version"]
        if name in versions:
            policy, named = VersionPolicy.PINNED, versions[name]
        version, fault = choose_version(policy, named, known.get(step["software"], []))
        if version is None:
            faults.append(f"step {name}: {fault}")
        else:
            step |= {"version_policy": VersionPolicy.PINNED, "version": version.version}
    if faults:
        raise UsageError("\n".join(faults))
    return {name: step["version"] for name, step in steps.items()}
