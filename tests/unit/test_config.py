"""Settings: precedence, faults, secrets, and which servers are used."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest
from redis import Redis
from rich.pretty import pretty_repr
from sqlalchemy.engine import make_url

from wfm.config import DATABASE_PREFIX, HOME_ABOVE, PREFIXES, SECRETS, SETTINGS, SHIPPED_FILE, Settings, load
from wfm.errors import ConfigError

PG = {
    f"{DATABASE_PREFIX}HOST": "db.example",
    f"{DATABASE_PREFIX}PORT": "5433",
    f"{DATABASE_PREFIX}DATABASE": "ops",
    f"{DATABASE_PREFIX}USER": "wfm",
    f"{DATABASE_PREFIX}PASSWORD": "pw",
}
NASTY = "p w:/@?#%&+'\"[]é=*"


def write(path: Path, text: str) -> Path:
    path.write_text(text, "utf-8")
    return path


def faults(environ: dict[str, str], files: tuple[Path, ...] = ()) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        load(environ, files)
    assert caught.value.exit_code == 2
    return caught.value.faults


def fault(environ: dict[str, str], files: tuple[Path, ...] = ()) -> str:
    (only,) = faults(environ, files)
    return only


def sources(settings: Settings) -> dict[str, str]:
    return {name: source for name, _, source in settings.describe()}


# ---------------------------------------------------------------- declaration


def test_every_setting_has_a_type_a_meaning_and_a_shipped_default() -> None:
    shipped = tomllib.loads(SHIPPED_FILE.read_text("utf-8"))
    assert shipped["default"].keys() == SETTINGS.keys()
    for name, kind in SETTINGS.items():
        schema = msgspec.json.schema(kind, schema_hook=lambda _: {})
        assert schema.get("description"), f"{name} has no meaning"
        if name.endswith("_seconds"):
            assert schema["description"].startswith("s "), f"{name} does not say its unit"
        if name.endswith("_gb"):
            assert "10^9 bytes" in schema["description"], f"{name} does not say its unit"


def test_secrets_are_declared() -> None:
    assert {"redis_password", "redis_url", "database_url"} == SECRETS
    assert all(name in SECRETS for name in SETTINGS if "password" in name)


def test_the_documented_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    bare = load({"ENV_FOR_DYNACONF": "production", **PG})
    assert (bare.hpc_backend, bare.runtime) == ("kubernetes", "apptainer")
    assert (bare.pipeline_base_dir, bare.sif_cache_dir) == (Path("/data/pipelines"), Path("/data/sif-cache"))
    assert (bare.processing_location_id, bare.k8s_namespace, bare.slurm_partition) == (1, "ccat-workflows", "")
    assert (bare.redis_host, bare.redis_port, bare.redis_password) == ("localhost", 6379, "")
    assert load({"ENV_FOR_DYNACONF": "staging", **PG}).k8s_namespace == "ccat-workflows-staging"

    local = load({})
    assert (local.env, local.hpc_backend, local.runtime) == ("localdev", "local", "none")
    assert local.home == tmp_path / ".wfm"
    assert local.pipeline_base_dir == tmp_path / ".wfm" / "pipelines"
    assert load({"WFM_HOME": "/srv/wfm"}).pipeline_base_dir == Path("/srv/wfm/pipelines")
    assert load({"WFM_PIPELINE_BASE_DIR": "runs"}).pipeline_base_dir == tmp_path / "runs"
    assert load({"WFM_HOME": "~/wfm"}).home == Path("~/wfm").expanduser()


def test_the_home_is_looked_for_upwards(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    below = tmp_path / "project" / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert load({}).home == below / ".wfm"  # nothing anywhere: here
    (tmp_path / ".wfm").mkdir()
    project = tmp_path / "project" / ".wfm"
    project.mkdir()
    found = load({})
    assert (found.home, found.pipeline_base_dir) == (project, project / "pipelines")
    assert sources(found)["home"] == HOME_ABOVE
    assert found.which_home.startswith(f"home {project} (found above the working directory; ")
    # Who says where it is, means it.
    assert load({"WFM_HOME": ".wfm"}).home == below / ".wfm"
    assert load({}, [write(tmp_path / "site.toml", '[default]\nhome = ".wfm"')]).home == below / ".wfm"
    (below / ".wfm").mkdir()
    assert load({}).home == below / ".wfm"
    assert load({}).which_home == f"home {below / '.wfm'}"


def test_the_home_of_somebody_else_is_not_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    below = tmp_path / "below"
    below.mkdir()
    (tmp_path / ".wfm").mkdir()
    monkeypatch.chdir(below)
    monkeypatch.setattr("os.geteuid", lambda: os.getuid() + 1)
    assert load({}).home == below / ".wfm"


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        load({}).redis_port = 1  # type: ignore[misc]


# ---------------------------------------------------------------- precedence


@pytest.mark.parametrize(
    ("environ", "site", "expected", "source"),
    [
        ({}, "", "local", "default"),
        ({"ENV_FOR_DYNACONF": "Staging", **PG}, "", "kubernetes", "default"),
        ({}, '[default]\nhpc_backend = "slurm"', "slurm", "{site} [default]"),
        (
            {},
            '[default]\nhpc_backend = "slurm"\n[localdev]\nHPC_BACKEND = "kubernetes"',
            "kubernetes",
            "{site} [localdev]",
        ),
        ({}, '[staging]\nhpc_backend = "slurm"', "local", "default"),
        ({"ENV_FOR_DYNACONF": "staging", **PG}, '[staging]\nhpc_backend = "slurm"', "slurm", "{site} [staging]"),
        ({"WFM_HPC_BACKEND": "slurm"}, '[localdev]\nhpc_backend = "kubernetes"', "slurm", "WFM_HPC_BACKEND"),
        ({"CCAT_WORKFLOW_MANAGER_HPC_BACKEND": "slurm"}, "", "slurm", "CCAT_WORKFLOW_MANAGER_HPC_BACKEND"),
        ({"WFM_HPC_BACKEND": ""}, '[localdev]\nhpc_backend = "slurm"', "slurm", "{site} [localdev]"),
    ],
)
def test_precedence(tmp_path: Path, environ: dict[str, str], site: str, expected: str, source: str) -> None:
    path = write(tmp_path / "site.toml", site)
    settings = load({"WFM_SETTINGS_FILE": str(path), **environ})
    assert settings.hpc_backend == expected
    assert sources(settings)["hpc_backend"] == source.format(site=path)


def test_files_given_by_the_caller_win_over_the_site(tmp_path: Path) -> None:
    site = write(tmp_path / "site.toml", "[default]\nbatch_size = 1\nmax_deliveries = 1\nmax_task_tries = 1")
    first = write(tmp_path / "first.toml", "[default]\nbatch_size = 2\nmax_deliveries = 2")
    second = write(tmp_path / "second.toml", "[localdev]\nbatch_size = 3")
    settings = load({"CCAT_WORKFLOW_MANAGER_SETTINGS_FILE": str(site)}, [first, second])
    assert (settings.batch_size, settings.max_deliveries, settings.max_task_tries) == (3, 2, 1)


def test_the_process_environment_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WFM_BATCH_SIZE", "7")
    assert load().batch_size == 7
    assert load({}).batch_size == 200


def test_nothing_but_the_documented_sources_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither the switches of dynaconf, nor files that it would find by itself, nor code beside a file."""
    monkeypatch.chdir(tmp_path)
    for name in ("settings.toml", "settings.local.toml", ".secrets.toml", "site.local.toml"):
        write(tmp_path / name, "[default]\nbatch_size = 13\n[global]\nbatch_size = 13")
    write(tmp_path / ".env", "WFM_BATCH_SIZE=13\nDYNACONF_BATCH_SIZE=13")
    write(tmp_path / "dynaconf_hooks.py", "raise SystemExit('the hook ran')")
    site = write(tmp_path / "site.toml", "[default]\nmax_deliveries = 2")
    for variable, value in {
        "ENV_FOR_DYNACONF": "production",
        "DYNACONF_BATCH_SIZE": "13",
        "ENVVAR_PREFIX_FOR_DYNACONF": "OTHER",
        "OTHER_BATCH_SIZE": "13",
        "AUTO_CAST_FOR_DYNACONF": "true",
        "LOADERS_FOR_DYNACONF": '["dynaconf.loaders.env_loader"]',
    }.items():
        monkeypatch.setenv(variable, value)
    settings = load({"WFM_SETTINGS_FILE": str(site), "WFM_SLURM_PARTITION": "@int 5"})
    assert (settings.env, settings.batch_size, settings.max_deliveries) == ("localdev", 200, 2)
    assert settings.slurm_partition == "@int 5"


def test_a_variable_of_another_dynaconf_program_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DYNACONF_OTHER", "@int x")
    assert load({}).batch_size == 200


@pytest.mark.parametrize(
    "text", ["0012", "true", "@int 5", "@format {this}", "@merge x", "[1]", "a=b", "{home}", NASTY]
)
def test_text_stays_what_it_is(tmp_path: Path, text: str) -> None:
    environ = {"WFM_DATABASE_URL": "postgresql://h/d"}
    assert load({"WFM_REDIS_PASSWORD": text, **environ}).redis_password == text
    site = tmp_path / "site.toml"
    write(site, f"[default]\nredis_password = {msgspec.json.encode(text).decode()}")
    assert load({"WFM_SETTINGS_FILE": str(site), **environ}).redis_password == text


@pytest.mark.parametrize(
    ("variable", "text", "expected"),
    [
        ("WFM_LEASE_SECONDS", "30", 30.0),
        ("WFM_BATCH_SIZE", "1000", 1000),
        ("WFM_LOCAL_CPU", "0", 0.0),
        ("WFM_STAGING_MODE", "reflink", "reflink"),
        ("WFM_DATABASE_SCHEMA", "_wfm_2", "_wfm_2"),
    ],
)
def test_text_becomes_the_type_of_the_setting(variable: str, text: str, expected: object) -> None:
    value = getattr(load({variable: text}), variable.removeprefix("WFM_").lower())
    assert value == expected
    assert type(value) is type(expected)


# ---------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("BATCH_SIZE", "0", "integer from 1 to 1000"),
        ("BATCH_SIZE", "1001", "integer from 1 to 1000"),
        ("BATCH_SIZE", "many", "integer from 1 to 1000"),
        ("BATCH_SIZE", "2.5", "integer from 1 to 1000"),
        ("LEASE_SECONDS", "0", "number above 0 to 86400"),
        ("LEASE_SECONDS", "nan", "number above 0 to 86400"),
        ("LEASE_SECONDS", "30s", "number above 0 to 86400"),
        ("POLL_SECONDS", "x", "number above 0 to 86400"),
        ("POLL_MAX_SECONDS", "x", "number above 0 to 86400"),
        ("STAGING_RESERVE_GB", "inf", "number from 0 to 1000000"),
        ("STAGING_RESERVE_GB", "-1", "number from 0 to 1000000"),
        ("REDIS_PORT", "65536", "integer from 1 to 65535"),
        ("REDIS_DB", "-1", "integer from 0"),
        ("REDIS_HOST", "a b", "string like"),
        ("REDIS_HOST", "me@host", "string like"),
        ("REDIS_TLS", "yes", "true or false"),
        ("PROCESSING_LOCATION_ID", "0", "integer from 1"),
        ("HPC_BACKEND", "kubernets", "one of kubernetes, local, slurm; did you mean kubernetes?"),
        ("RUNTIME", "docker", "one of apptainer, none"),
        ("STAGING_MODE", "LINK", "one of auto, copy, link, reflink; did you mean link?"),
        ("LOG_LEVEL", "debug", "did you mean DEBUG?"),
        ("K8S_NAMESPACE", "Bad_Name", "string like"),
        ("DATABASE_SCHEMA", "wfm; drop", "string like"),
        ("DATABASE_SCHEMA", "wfm\n", "string like"),
        ("DATABASE_SCHEMA", "a" * 64, "string like"),
    ],
)
def test_a_malformed_value_is_named_with_what_is_allowed(name: str, text: str, says: str) -> None:
    # A database keeps the rule about redis without one out of the picture.
    told = fault({f"WFM_{name}": text, "WFM_DATABASE_URL": "postgresql://h/d"})
    assert told.startswith(f"{name.lower()} (from WFM_{name}) = {text!r}: allowed is ")
    assert says in told


@pytest.mark.parametrize(
    "line", ['batch_size = "many"', "batch_size = true", "batch_size = [1]", "batch_size = {a = 1}"]
)
def test_a_malformed_value_in_a_file_names_file_and_section(tmp_path: Path, line: str) -> None:
    site = write(tmp_path / "site.toml", f"[localdev]\n{line}")
    told = fault({"WFM_SETTINGS_FILE": str(site)})
    assert told.startswith(f"batch_size (from {site} [localdev]) = ")
    assert told.endswith("allowed is integer from 1 to 1000")


def test_an_empty_path_in_a_file_is_refused(tmp_path: Path) -> None:
    site = write(tmp_path / "site.toml", '[default]\nsif_cache_dir = ""')
    assert fault({"WFM_SETTINGS_FILE": str(site)}).endswith(
        f"sif_cache_dir (from {site} [default]) = '': allowed is path"
    )


@pytest.mark.parametrize(
    "url", ["mysql://u:hidden@h/d", "hidden", "postgresql://u:hidden@h:port/d", "postgresql://u:hid/den@h/d"]
)
def test_a_malformed_database_url_is_refused_unseen(url: str) -> None:
    told = fault({"WFM_DATABASE_URL": url, "ENV_FOR_DYNACONF": "production"})
    assert told == "database_url (from WFM_DATABASE_URL) = ***: allowed is a postgresql:// URL"


@pytest.mark.parametrize("url", ["http://u:hidden@h", "hidden", "redis://:hidden@h:port"])
def test_a_malformed_redis_url_is_refused_unseen(url: str) -> None:
    told = fault({"WFM_REDIS_URL": url, **PG})
    assert told == "redis_url (from WFM_REDIS_URL) = ***: allowed is a redis(s):// or unix:// URL"


def test_a_wrong_section_name_is_refused() -> None:
    told = fault({"ENV_FOR_DYNACONF": "prod"})
    assert told == (
        "ENV_FOR_DYNACONF = 'prod': allowed is one of localdev, production, staging; did you mean production?"
    )


@pytest.mark.parametrize("section", ["default", "localdev", "production"])
def test_an_unknown_key_is_refused_in_every_section(tmp_path: Path, section: str) -> None:
    site = write(tmp_path / "site.toml", f'[{section}]\nredis_pasword = "hidden"')
    told = fault({"WFM_SETTINGS_FILE": str(site)})
    assert told == f"{site} [{section}]: unknown setting redis_pasword; did you mean redis_password?"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (
            "[prodution]\nbatch_size = 1",
            "prodution is no section; allowed is one of default, localdev, staging, production",
        ),
        ("[global]\nbatch_size = 1", "global is no section"),
        ("batch_size = 1", "batch_size is no section"),
        ("default = 1", "default is no section"),
        ("[default", "cannot be read"),
        ("[default]\nbatch_size = 1\nbatch_size = 2", "cannot be read"),
    ],
)
def test_a_malformed_file_is_refused(tmp_path: Path, text: str, says: str) -> None:
    site = write(tmp_path / "site.toml", text)
    told = fault({"WFM_SETTINGS_FILE": str(site)})
    assert told.startswith(f"{site}: ")
    assert says in told


def test_a_missing_file_and_a_file_that_is_no_text_are_refused(tmp_path: Path) -> None:
    missing, binary = tmp_path / "missing.toml", tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe")
    told = faults({"WFM_SETTINGS_FILE": str(missing)}, (binary,))
    assert [text.split(": ")[:2] for text in told] == [[str(p), "cannot be read"] for p in (missing, binary)]


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    site = write(tmp_path / "site.toml", "[production]\nbach_size = 1\nlease_seconds = -1\n[nowhere]")
    told = faults(
        {
            "ENV_FOR_DYNACONF": "production",
            "WFM_SETTINGS_FILE": str(site),
            "WFM_HPC_BACKEND": "pbs",
            "WFM_REDIS_PORT": "x",
            "CCAT_WORKFLOW_MANAGER_LOG_LEVEL": "INFO",
            "WFM_LOG_LEVEL": "ERROR",
            "WFM_POLL_SECONDS": "9",
            "WFM_REDIS_PASSWORD_FILE": str(tmp_path / "nothing"),
        }
    )
    expected = (
        "bach_size", "lease_seconds", "nowhere", "hpc_backend", "redis_port", "LOG_LEVEL", "poll_seconds",
        "REDIS_PASSWORD_FILE", "database is missing",
    )  # fmt: skip
    assert len(told) == len(expected)
    for word in expected:
        assert sum(word in text for text in told) >= 1, word
    assert str(ConfigError(told)) == "\n".join(told)


@pytest.mark.parametrize(
    ("low", "high"),
    [("retry_backoff_seconds", "retry_backoff_max_seconds"), ("poll_seconds", "poll_max_seconds")],
)
def test_bounds_stand_in_order(low: str, high: str) -> None:
    told = fault({f"WFM_{low.upper()}": "20", f"WFM_{high.upper()}": "10"})
    assert told == f"{low} = 20.0: allowed is at most {high} = 10.0"
    load({f"WFM_{low.upper()}": "10", f"WFM_{high.upper()}": "10"})


# ---------------------------------------------------------------- the environment


def test_both_prefixes_may_agree_and_must_not_differ() -> None:
    long, short = (f"{prefix}BATCH_SIZE" for prefix in PREFIXES)
    assert load({long: "5", short: "5"}).batch_size == 5
    assert load({long: "5", short: ""}).batch_size == 5
    assert fault({long: "5", short: "6"}) == f"{long} and {short} differ: set only one of them"


@pytest.mark.parametrize(
    ("variable", "warns"),
    [
        ("WFM_REDIS_PASWORD", "did you mean WFM_REDIS_PASSWORD?"),
        ("CCAT_WORKFLOW_MANAGER_HPC_BACKENDS", "did you mean CCAT_WORKFLOW_MANAGER_HPC_BACKEND?"),
        ("WFM_SETTING_FILE", "did you mean WFM_SETTINGS_FILE?"),
        ("WFM_QQQQ", "ignored"),
        ("WFM_REDIS_HOST_FILE", "ignored"),
    ],
)
def test_an_unknown_variable_warns_once_and_stops_nothing(variable: str, warns: str) -> None:
    (warning,) = load({variable: "hidden"}).warnings
    assert warning.startswith(f"{variable} is not a setting and is ignored")
    assert warns in warning
    assert "hidden" not in warning


def test_known_and_foreign_variables_do_not_warn(tmp_path: Path) -> None:
    secret = write(tmp_path / "secret", "x")
    environ = {f"{prefix}{name}": "" for prefix in PREFIXES for name in map(str.upper, SETTINGS)}
    environ |= {
        "WFM_TEST_DATABASE_URL": "x",
        "CCAT_WORKFLOW_MANAGER_TEST_X": "x",
        "WFMX": "x",
        "PATH": "x",
        "_WFM_": "",
    }
    environ |= {"WFM_REDIS_PASSWORD_FILE": str(secret), "WFM_SETTINGS_FILE": "", **PG}
    assert load(environ).warnings == ()


# ---------------------------------------------------------------- secrets


def everything_shown(settings: Settings) -> str:
    return "\n".join([repr(settings), str(settings), f"{settings:}", pretty_repr(settings), str(settings.describe())])


def test_no_secret_is_shown() -> None:
    settings = load(
        {
            "WFM_DATABASE_URL": "postgresql://me:hidden@h:5433/d?sslpassword=hidden&PASSWORD=hidden&sslmode=require",
            "WFM_REDIS_URL": "rediss://:hid:den\nhidden@h:1/0?password=hidden",
            "WFM_REDIS_PASSWORD": "hidden",
        }
    )
    shown = everything_shown(settings)
    assert "hidden" not in shown
    assert "hid:den" not in shown
    described = {name: value for name, value, _ in settings.describe()}
    assert (
        described["database_url"]
        == "postgresql+psycopg2://me:***@h:5433/d?sslpassword=***&PASSWORD=***&sslmode=require"
    )
    assert described["redis_url"] == "rediss://:***@h:1/0?password=***"
    assert described["redis_password"] == "***"
    assert "hidden" not in everything_shown(load({**PG, f"{DATABASE_PREFIX}PASSWORD": "hidden"}))


def test_an_address_without_password_is_shown_as_it_is() -> None:
    settings = load({"WFM_DATABASE_URL": "postgresql://me@h:5433/d", "WFM_REDIS_URL": "unix:///run/redis.sock?db=1"})
    described = {name: value for name, value, _ in settings.describe()}
    assert described["database_url"] == "postgresql+psycopg2://me@h:5433/d"
    assert described["redis_url"] == "unix:///run/redis.sock?db=1"
    assert described["redis_tls"] == "false"
    assert described["redis_password"] == ""


def test_faults_show_no_secret(tmp_path: Path) -> None:
    site = write(tmp_path / "site.toml", "[default]\nredis_password = 123454321\n")
    told = faults(
        {
            "WFM_SETTINGS_FILE": str(site),
            "WFM_DATABASE_URL": "hidden",
            "WFM_REDIS_URL": "hidden",
            f"{DATABASE_PREFIX}PASSWORD": "hidden",
            "CCAT_WORKFLOW_MANAGER_REDIS_URL": "also hidden",
            "WFM_REDIS_PASSWORD_FILE": "hidden",
        }
    )
    assert "hidden" not in "\n".join(told)
    assert "123454321" not in "\n".join(told)
    differ = fault({**PG, "WFM_REDIS_PASSWORD": "hidden", "CCAT_WORKFLOW_MANAGER_REDIS_PASSWORD": "hidden too"})
    assert differ == "CCAT_WORKFLOW_MANAGER_REDIS_PASSWORD and WFM_REDIS_PASSWORD differ: set only one of them"


@pytest.mark.parametrize("ending", ["", "\n", "\r\n"])
def test_secrets_are_read_from_files(tmp_path: Path, ending: str) -> None:
    path = tmp_path / "secret"
    path.write_bytes(f" {NASTY} {ending}".encode())
    environ = {**PG, f"{DATABASE_PREFIX}PASSWORD_FILE": str(path), "WFM_REDIS_PASSWORD_FILE": str(path)}
    del environ[f"{DATABASE_PREFIX}PASSWORD"]
    settings = load(environ)
    assert settings.redis_password == f" {NASTY} "
    assert make_url(settings.database_url).password == f" {NASTY} "
    assert sources(settings)["redis_password"] == "WFM_REDIS_PASSWORD_FILE"


def test_an_address_is_a_secret_too(tmp_path: Path) -> None:
    path = write(tmp_path / "secret", "postgresql://u:p@h/d\n")
    assert load({"WFM_DATABASE_URL_FILE": str(path)}).database_url == "postgresql+psycopg2://u:p@h/d"


def test_a_secret_given_twice_must_agree(tmp_path: Path) -> None:
    path = write(tmp_path / "secret", "one")
    given = {**PG, "WFM_REDIS_PASSWORD_FILE": str(path)}
    assert load({**given, "WFM_REDIS_PASSWORD": "one"}).redis_password == "one"
    told = fault({**given, "WFM_REDIS_PASSWORD": "two"})
    assert told == "WFM_REDIS_PASSWORD and WFM_REDIS_PASSWORD_FILE differ: set only one of them"


def test_an_unusable_secret_file_is_a_fault(tmp_path: Path) -> None:
    empty, binary = write(tmp_path / "empty", "\n"), tmp_path / "binary"
    binary.write_bytes(b"\xff")
    for path in (empty, binary, tmp_path, tmp_path / "missing"):
        told = fault({**PG, "WFM_REDIS_PASSWORD_FILE": str(path)})
        assert told.startswith(f"WFM_REDIS_PASSWORD_FILE = {str(path)!r}: allowed is the path of a readable file")


# ---------------------------------------------------------------- the database


def test_the_database_from_its_parts() -> None:
    settings = load(PG)
    assert settings.database_url == "postgresql+psycopg2://wfm:pw@db.example:5433/ops"
    assert sources(settings)["database_url"] == f"{DATABASE_PREFIX}{{HOST,PORT,DATABASE,USER,PASSWORD}}"
    bare = {key: value for key, value in PG.items() if not key.endswith(("PORT", "PASSWORD"))}
    assert load(bare).database_url == "postgresql+psycopg2://wfm@db.example:5432/ops"


@pytest.mark.parametrize("host", ["db.example", "::1", "/run/pg socket"])
def test_special_characters_survive_into_the_url(host: str) -> None:
    odd = {"USER": "u s/e:r@x", "PASSWORD": NASTY, "DATABASE": "my db"}
    url = make_url(
        load({**PG, **{DATABASE_PREFIX + k: v for k, v in odd.items()}, f"{DATABASE_PREFIX}HOST": host}).database_url
    )
    _, arguments = url.get_dialect()().create_connect_args(url)
    assert url.drivername == "postgresql+psycopg2"
    assert (arguments["user"], arguments["password"], arguments["dbname"]) == tuple(odd.values())
    assert (arguments["host"], int(arguments["port"])) == (host, 5433)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_the_database_from_one_url(scheme: str) -> None:
    for prefix in PREFIXES:
        settings = load({f"{prefix}DATABASE_URL": f"{scheme}://u:p%40@h:1/d?sslmode=require"})
        assert settings.database_url == "postgresql+psycopg2://u:p%40@h:1/d?sslmode=require"
        assert not settings.embedded


def test_the_parts_win_over_a_file(tmp_path: Path) -> None:
    site = write(tmp_path / "site.toml", '[default]\ndatabase_url = "postgresql://file/d"')
    assert load({"WFM_SETTINGS_FILE": str(site)}).database_url == "postgresql+psycopg2://file/d"
    assert load({"WFM_SETTINGS_FILE": str(site), **PG}).database_url == load(PG).database_url


def test_parts_and_url_must_agree() -> None:
    assert (
        load({**PG, "WFM_DATABASE_URL": "postgresql://wfm:pw@db.example:5433/ops"}).database_url
        == load(PG).database_url
    )
    told = fault({**PG, "WFM_DATABASE_URL": "postgresql://elsewhere/ops"})
    assert (
        told
        == f"WFM_DATABASE_URL and {DATABASE_PREFIX}{{HOST,PORT,DATABASE,USER,PASSWORD}} differ: set only one of them"
    )


def test_incomplete_and_malformed_parts() -> None:
    told = fault({f"{DATABASE_PREFIX}HOST": "h"})
    assert told == f"{DATABASE_PREFIX}DATABASE, {DATABASE_PREFIX}USER: missing beside {DATABASE_PREFIX}{{HOST}}"
    told = fault({**PG, f"{DATABASE_PREFIX}PORT": "5432x"})
    assert told == f"{DATABASE_PREFIX}PORT = '5432x': allowed is integer from 1 to 65535"


# ---------------------------------------------------------------- embedded servers


def test_embedded_without_any_server() -> None:
    settings = load({**dict.fromkeys(PG, ""), "WFM_DATABASE_URL": "", "WFM_REDIS_HOST": ""})
    assert settings.embedded
    assert settings.database_url == ""


def test_a_database_alone_uses_redis_at_its_default() -> None:
    settings = load(PG)
    assert not settings.embedded
    assert settings.redis_address() == ("redis://localhost:6379/0", {})


@pytest.mark.parametrize(
    ("variable", "text"),
    [("WFM_REDIS_HOST", "localhost"), ("CCAT_WORKFLOW_MANAGER_REDIS_PASSWORD", "x"), ("WFM_REDIS_URL", "redis://h")],
)
def test_redis_without_a_database_is_refused(variable: str, text: str) -> None:
    name = variable.removeprefix("CCAT_WORKFLOW_MANAGER_").removeprefix("WFM_").lower()
    told = fault({variable: text})
    assert told.startswith(f"the database is missing ({name} set): set WFM_DATABASE_URL or {DATABASE_PREFIX}{{HOST,")


def test_redis_in_a_file_without_a_database_is_refused(tmp_path: Path) -> None:
    site = write(tmp_path / "default.toml", '[localdev]\nredis_host = "h"')
    assert "the database is missing (redis_host set)" in fault({"WFM_SETTINGS_FILE": str(site)})


@pytest.mark.parametrize("env", ["staging", "production"])
def test_no_embedded_servers_in_staging_and_production(env: str) -> None:
    told = fault({"ENV_FOR_DYNACONF": env})
    assert told == (
        f"the database is missing ({env} has no embedded servers): "
        f"set WFM_DATABASE_URL or {DATABASE_PREFIX}{{HOST,PORT,DATABASE,USER,PASSWORD}}"
    )
    assert not load({"ENV_FOR_DYNACONF": env, **PG}).embedded


def test_the_caller_fills_in_the_embedded_servers() -> None:
    before = load({})
    after = before.with_servers("postgresql://postgres:@/postgres?host=/tmp/pg", "unix:///tmp/valkey.sock?db=0")
    assert make_url(after.database_url).drivername == "postgresql+psycopg2"
    assert after.redis_address() == ("unix:///tmp/valkey.sock?db=0", {})
    assert after.embedded
    assert (sources(after)["database_url"], sources(after)["redis_url"]) == ("embedded", "embedded")
    assert before.database_url == ""


# ---------------------------------------------------------------- redis


def connection_arguments(settings: Settings) -> dict[str, object]:
    url, options = settings.redis_address()
    pool = Redis.from_url(url, **options).connection_pool
    return {**pool.connection_kwargs, "class": pool.connection_class.__name__}


def test_redis_from_its_parts(tmp_path: Path) -> None:
    files = {name: str(write(tmp_path / name, "x")) for name in ("ca", "cert", "key")}
    settings = load(
        {
            **PG,
            "WFM_REDIS_HOST": "::1",
            "WFM_REDIS_PORT": "6380",
            "WFM_REDIS_DB": "2",
            "WFM_REDIS_USERNAME": "me",
            "WFM_REDIS_PASSWORD": NASTY,
            "WFM_REDIS_TLS": "true",
            **{f"WFM_REDIS_TLS_{name.upper()}_FILE": path for name, path in files.items()},
        }
    )
    assert settings.redis_address()[0] == "rediss://[::1]:6380/2"
    arguments = connection_arguments(settings)
    expected = {
        "class": "SSLConnection", "host": "::1", "port": 6380, "db": 2, "username": "me", "password": NASTY,
        "ssl_ca_certs": files["ca"], "ssl_certfile": files["cert"], "ssl_keyfile": files["key"],
    }  # fmt: skip
    assert {key: arguments[key] for key in expected} == expected


def test_a_redis_url_replaces_the_parts(tmp_path: Path) -> None:
    authority = str(write(tmp_path / "ca", "x"))
    given = {**PG, "WFM_REDIS_HOST": "other", "WFM_REDIS_PASSWORD": "other", "WFM_REDIS_URL": "rediss://me:pw@h:1/3"}
    arguments = connection_arguments(load({**given, "WFM_REDIS_TLS_CA_FILE": authority}))
    expected = {"host": "h", "port": 1, "db": 3, "username": "me", "password": "pw", "ssl_ca_certs": authority}
    assert {key: arguments[key] for key in expected} == expected
    plain = connection_arguments(load({**PG, "WFM_REDIS_PASSWORD": "other", "WFM_REDIS_URL": "unix:///run/r.sock"}))
    assert plain["path"] == "/run/r.sock"
    assert "password" not in plain


def test_tls_that_would_not_be_used_is_refused(tmp_path: Path) -> None:
    authority = str(write(tmp_path / "ca", "x"))
    told = fault({**PG, "WFM_REDIS_TLS_CA_FILE": authority})
    assert told == "redis_tls_ca_file set without TLS: set redis_tls = true, or a rediss:// redis_url"
    told = fault({**PG, "WFM_REDIS_TLS": "true", "WFM_REDIS_URL": "redis://h"})
    assert told == "redis_tls set without TLS: set redis_tls = true, or a rediss:// redis_url"


def test_certificate_and_key_come_together_and_exist(tmp_path: Path) -> None:
    given = {**PG, "WFM_REDIS_TLS": "true", "WFM_REDIS_TLS_CERT_FILE": str(write(tmp_path / "cert", "x"))}
    assert fault(given) == "redis_tls_cert_file and redis_tls_key_file: set both or none"
    missing = str(tmp_path / "missing")
    assert fault({**given, "WFM_REDIS_TLS_KEY_FILE": missing}) == f"redis_tls_key_file = {missing!r}: no such file"


# ---------------------------------------------------------------- start-up


def test_importing_the_settings_loads_neither_dynaconf_nor_sqlalchemy() -> None:
    program = "import sys, wfm.config; print([m for m in ('dynaconf', 'sqlalchemy', 'redis') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "[]"
