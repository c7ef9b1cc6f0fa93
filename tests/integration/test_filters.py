"""Filter rules, presets and dimensions as people meet them: on the command line, with a real database."""

from __future__ import annotations

import zoneinfo
from datetime import datetime
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from msgspec import structs

from tests.harness import World
from tests.integration.test_cli import Cli
from wfm import gaps, presets
from wfm.model import Actor


@pytest.fixture
def cli(world: World) -> Cli:
    return Cli(world.environ)


def apply(cli: Cli, text: str, code: int = 0) -> Any:
    return cli("apply", "-f", "-", stdin=dedent(text), code=code)


def sort(world: World) -> None:
    """Reconciliation sorts all packages; what it sorted is then as the catalogue says, also for packages one by one."""
    packages = [r.id for r in world.query("SELECT id FROM raw_data_package")]
    with world.store.begin() as tx:
        gaps.reconcile(tx, 1, Actor("trigger-manager"))
        sorted_ = tx.all("SELECT id, generation FROM unit ORDER BY id")
        assert gaps.fold(tx, 1, packages) == set()
        gaps.reconcile(tx, 1, Actor("trigger-manager"))
        assert tx.all("SELECT id, generation FROM unit ORDER BY id") == sorted_


def units(world: World, pipeline: str) -> dict[str, set[str]]:
    """By unit of a pipeline, the names of its packages."""
    found: dict[str, set[str]] = {}
    for r in world.query(
        "SELECT u.key, k.name FROM unit u JOIN pipeline p ON p.id = u.pipeline_id"
        " JOIN unit_member m ON m.unit_id = u.id JOIN raw_data_package k ON k.id = m.package_id"
        " WHERE p.name = :name AND m.removed IS NULL",
        name=pipeline,
    ):
        found.setdefault(r.key.rpartition("-")[0] or r.key, set()).add(r.name)
    return found


def test_rules_with_alternatives_nulls_and_types_select_what_they_say(world: World, cli: Cli) -> None:
    world.register(
        world.package("bright", metadata={"flux": "1e3", "taken": "2025-06-01T04:30:00Z"}),
        world.package("faint", metadata={"flux": 0.5, "taken": "2025-06-01T04:30:00Z", "purpose": "calibration"}),
        world.package("early", metadata={"flux": 2000, "taken": "2024-12-31T23:59:59+02:00"}),
        world.package("odd", metadata={"flux": "strong", "taken": "last night"}),
    )
    apply(
        cli,
        """
        kind: grouping
        name: wanted
        rules:
          - {table: source, column: name, operator: not_null}
          - {table: raw_data_package, column: metadata, json_path: taken, type: time, operator: gte, value: 2025-01-01}
          - any_of:
              - {table: raw_data_package, column: metadata, json_path: flux, type: number, operator: gt, value: 100}
              - - {table: raw_data_package, column: metadata, json_path: purpose, operator: eq, value: calibration}
                - {table: raw_data_package, column: metadata, json_path: comment, operator: is_null}
        ---
        kind: pipeline
        name: p
        grouping: wanted
        steps: [{name: s, software: copy, version: 1.0.0, group_by: [raw_data_package]}]
        """,
    )
    sort(world)
    assert set(units(world, "p")) == {"bright", "faint"}
    (odd,) = cli.json("why", "--package", "early")["not_selected"]
    assert odd["reason"] == (
        'grouping wanted rejects it: rule 2, raw_data_package.metadata at taken (as time) gte "2025-01-01"'
    )
    (shown,) = cli.json("get", "grouping", "wanted")
    text = cli("get", "grouping", "wanted").stdout
    assert text.index("table: source") < text.index("operator: not_null")
    assert [list(r) for r in shown["rules"]] == [
        ["table", "column", "operator"],
        ["table", "column", "operator", "value", "json_path", "type"],
        ["any_of"],
    ]
    assert apply(cli, text).stdout == "grouping wanted: unchanged\n"


def test_every_fault_of_nested_rules_has_its_line(cli: Cli) -> None:
    said = apply(
        cli,
        """\
        kind: grouping
        name: wanted
        rules:
          - {table: source, column: name, operator: is_null, value: 3}
          - any_of:
              - {table: sorce, column: name, operator: not_null}
              - - {table: source, column: name, operator: eq, value: NGC253}
                - {table: source, column: metadata, json_path: v, type: tme, operator: gt, value: 2025-01-01}
              - []
        """,
        code=2,
    ).stderr
    assert [line.removeprefix("error: ").strip() for line in said.splitlines()] == [
        "standard input:4: rule 1: operator is_null takes no value, got 3",
        "standard input:6: rule 2.1: unknown table 'sorce', did you mean 'source'?; allowed: raw_data_package,"
        " executed_obs_unit, instrument_module, obs_unit, instrument, source, observing_program, site",
        "standard input:8: rule 2.2.2: unknown type 'tme', did you mean 'time'?; allowed: text, number, boolean, time",
        "standard input:9: rule 2.3: a member of any_of needs at least one rule",
    ]


# --- presets ---


@pytest.mark.parametrize("name", presets.texts())
def test_a_preset_can_be_applied_as_it_is(name: str, world: World, cli: Cli) -> None:
    assert name in cli("get", "presets").stdout
    (shown,) = cli.json("get", "presets", name)
    assert shown["purpose"]
    text = cli("get", "presets", name).stdout
    assert shown["text"] == text
    created = apply(cli, text).stdout.splitlines()
    assert created
    assert all(line.endswith(": created") for line in created if ": " in line and not line.startswith("units"))
    assert "unchanged" in apply(cli, text).stdout
    world.register(world.package("a"))
    (pipeline,) = cli.json("get", "pipeline", name)
    assert not pipeline["enabled"]


def test_presets_fit_together(cli: Cli) -> None:
    for text in presets.texts().values():
        apply(cli, text)
    cli("get", "presets", "chai-per-scn", code=3)
    assert cli("delete", "presets", "chai-per-scan", code=2).stderr


def test_calibrations_are_found_by_any_of_their_marks(world: World, cli: Cli) -> None:
    apply(cli, presets.texts()["calibrations"])
    world.register(
        world.package("science"),
        world.package("marked", metadata={"scan": {"purpose": "calibration"}}),
        world.package("bad", metadata={"scan": {"purpose": "calibration"}, "quality": {"usable": False}}),
        structs.replace(
            world.package("planet"),
            executed_obs_unit=structs.replace(
                world.package("planet").executed_obs_unit, obs_unit="mars", source="Mars"
            ),
        ),
    )
    sort(world)
    assert set.union(*units(world, "calibrations").values()) == {"marked", "planet"}


# --- dimensions ---


def test_units_by_what_packages_say_of_themselves(world: World, cli: Cli) -> None:
    world.register(
        world.package("a", metadata={"band": 350}),
        world.package("b", metadata={"band": 350.0}),
        world.package("c", metadata={"band": "CO(4-3)"}),
        world.package("d", metadata={"band": ["x"]}),
        world.package("e"),
    )
    text = """
        kind: pipeline
        name: p
        grouping: everything
        steps:
          - {name: one, software: copy, version: 1.0.0, group_by: [raw_data_package]}
          - name: each
            software: copy
            version: 1.0.0
            depends_on: [one]
            group_by: ["raw_data_package.metadata:band"]
        """
    apply(cli, text)
    sort(world)
    members = {key: some for key, some in units(world, "p").items() if len(key) > 1}
    assert members == {"350": {"a", "b"}, "co-4-3": {"c"}, "none": {"d", "e"}}
    world.register(world.package("a", metadata={"instrument_configuration": {"filter_wheel_position": {"name": "K"}}}))
    long = "raw_data_package.metadata:instrument_configuration.filter_wheel_position.name"
    apply(cli, text.replace("raw_data_package.metadata:band", long).replace("name: p\n", "name: q\n"))
    sort(world)
    members = {key: some for key, some in units(world, "q").items() if len(key) > 1 or key == "k"}
    assert members == {"k": {"a"}, "none": {"b", "c", "d", "e"}}
    said = apply(cli, text.replace("[raw_data_package]", "[source]"), code=2).stderr
    assert "is grouped by raw_data_package.metadata:band, which the units of 'one' (grouped by source)" in said


def test_the_system_reads_what_it_wrote(world: World, tmp_path: Path, cli: Cli) -> None:
    """A file from `wfm get presets`, edited as its head says, makes runs."""
    file = tmp_path / "mine.yaml"
    text = cli("get", "presets", "chai-per-scan").stdout
    file.write_text(text.replace("[chai-calibrate]", "[sh, -c, ':']").replace("value: CHAI", "value: cam"))
    cli("apply", "-f", file)
    cli("enable", "chai-per-scan")
    world.register(world.package("a"), world.package("b"))
    sort(world)
    assert {(r.step, r.state) for r in world.runs()} == {("calibrate", "PENDING")}
    assert len(world.runs()) == 2


def test_units_by_source_and_night(world: World, cli: Cli) -> None:
    """A night is that of the clocks where the instrument observes; a site that moves its clocks moves its nights."""
    evening = {"a": "2025-06-01T22:00:00-04:00", "b": "2025-06-02T11:00:00-04:00", "c": "2025-06-02T12:30:00-04:00"}
    world.register(*(_taken(world.package(name), at) for name, at in evening.items()))
    text = """
        kind: pipeline
        name: p
        grouping: everything
        steps:
          - {name: scan, software: copy, version: 1.0.0, group_by: [executed_obs_unit, instrument_module]}
          - {name: night, software: copy, version: 1.0.0, depends_on: [scan], group_by: [source, night]}
        """
    place = """
        kind: site
        name: chajnantor
        time_zone: America/Santiago
        ---
        kind: instrument
        name: cam
        site: chajnantor
        """
    apply(cli, text)
    sort(world)
    assert _nights(world) == {
        "2025-06-01-ngc253": {"a"},
        "2025-06-02-ngc253": {"b", "c"},
    }  # by UTC
    assert "p  " in apply(cli, place).stdout
    sort(world)
    assert _nights(world) == {"2025-06-01-ngc253": {"a", "b"}, "2025-06-02-ngc253": {"c"}}
    said = apply(cli, text.replace("executed_obs_unit, instrument_module", "executed_obs_unit"), code=2).stderr
    assert "is grouped by night, which the units of 'scan' (grouped by executed_obs_unit) do not determine" in said
    assert "group 'scan' also by one of: raw_data_package, instrument_module, instrument, site, night" in said
    said = apply(cli, place.replace("America/Santiago", "Santiago"), code=2).stderr
    assert "standard input:4: unknown time zone 'Santiago'" in said


def test_a_time_zone_that_the_database_does_not_know(world: World, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    known = zoneinfo.available_timezones() | {"Mars/Jezero"}
    monkeypatch.setattr(zoneinfo, "available_timezones", lambda: known)
    said = apply(cli, "kind: site\nname: far\ntime_zone: Mars/Jezero\n", code=2).stderr
    assert "standard input:3: time zone 'Mars/Jezero' is not known to this Postgres" in said


def _taken(package: Any, at: str) -> Any:
    started = datetime.fromisoformat(at)
    return structs.replace(package, executed_obs_unit=structs.replace(package.executed_obs_unit, started_at=started))


def _nights(world: World) -> dict[str, set[str]]:
    return {key: some for key, some in units(world, "p").items() if key.startswith("2025")}
