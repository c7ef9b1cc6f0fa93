"""Settings: files and the environment become one frozen `Settings`. Nothing else in wfm reads the environment.

Where a setting comes from, the later source wins:

1. ``settings.toml`` of this package, section ``[default]``, then the section that ``ENV_FOR_DYNACONF`` chooses;
2. the site's file named by ``WFM_SETTINGS_FILE``, the same two sections;
3. the variable ``CCAT_WORKFLOW_MANAGER_<NAME>`` or, shorter, ``WFM_<NAME>``; an empty variable counts as not set.
   A secret may stand in a file named by ``<NAME>_FILE``. The database may also be given in parts (`DATABASE_PREFIX`).

Where none of them gives the home, and the working directory has none, the nearest one above it is used, as with git.

To add a setting, declare it in `Settings` (type, bounds, meaning, unit) and give its default in ``settings.toml``.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import Meta, Struct

from wfm.errors import ConfigError, nearest

PREFIXES = ("CCAT_WORKFLOW_MANAGER_", "WFM_")
DATABASE_PREFIX = "CCAT_OPS_DB_DATABASE_POSTGRESQL_"
DATABASE_PARTS = ("host", "port", "database", "user", "password")
Environment = Literal["localdev", "staging", "production"]
SECTIONS = ("default", *get_args(Environment))
HOME_ABOVE = "found above the working directory"
SHIPPED_FILE = Path(__file__).with_name("settings.toml")

Environ = Mapping[str, str]
Found = dict[str, tuple[str, str]]  # name → (variable, text)
Seconds = Annotated[float, Meta(gt=0, le=86_400)]
Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Amount = Annotated[float, Meta(ge=0, le=1_000_000)]
Truth = Annotated[bool, Meta(title="true or false")]
Port = Annotated[int, Meta(ge=1, le=65_535)]
_ADDRESS = r"://([^/@]*@)?(\[[^\]]*\]|[^:/@]*)(:\d+)?([/?].*)?"
PostgresUrl = Annotated[str, Meta(pattern=rf"\A(postgres(ql)?(\+psycopg2)?{_ADDRESS})?\Z", title="a postgresql:// URL")]
RedisUrl = Annotated[str, Meta(pattern=rf"\A((rediss?|unix){_ADDRESS})?\Z", title="a redis(s):// or unix:// URL")]
Namespace = Annotated[str, Meta(pattern=r"\A[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?\Z")]
Identifier = Annotated[str, Meta(pattern=r"\A[a-z_][a-z0-9_]{0,62}\Z")]
Host = Annotated[str, Meta(pattern=r"\A[^\s/?#@\[\]]+\Z")]


def about(meaning: str, *, secret: bool = False) -> Meta:
    """What a setting means, with its unit; a secret is never shown, and may be read from a file."""
    return Meta(description=meaning, extra={"secret": True} if secret else None)


class Settings(Struct, frozen=True, kw_only=True):
    """All settings of one process. Fields without a default here are settings, with their default in ``settings.toml``.

    Attributes:
        env: the section in use: localdev, staging or production.
        embedded: no server is configured, so wfm runs its own; `with_servers` then says where they are.
        warnings: what is worth telling the user although it stops nothing.
        sources: for each setting, where its value comes from.
    """

    home: Annotated[
        Path, about("directory of the state of `wfm up`; the default is looked for as git looks for its own")
    ]
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], about("least severity that is logged")]
    hpc_backend: Annotated[Literal["local", "slurm", "kubernetes"], about("what runs jobs")]
    runtime: Annotated[Literal["none", "apptainer"], about("how local and Slurm jobs run their software")]
    pipeline_base_dir: Annotated[Path, about("root of the attempt directories, shared with the jobs")]
    sif_cache_dir: Annotated[Path, about("directory of the Apptainer images")]
    processing_location_id: Annotated[Count, about("id of the processing location that this deployment serves")]
    k8s_namespace: Annotated[Namespace, about("Kubernetes namespace of the jobs")]
    slurm_partition: Annotated[str, about("Slurm partition; empty: the cluster's default")]
    local_cpu: Annotated[Amount, about("cores that local jobs share; 0: all of this machine")]
    local_memory_gb: Annotated[Amount, about("memory that local jobs share, in 10^9 bytes; 0: all of this machine")]
    database_url: Annotated[PostgresUrl, about("Postgres database; empty: embedded servers", secret=True)]
    database_schema: Annotated[Identifier, about("Postgres schema that holds all tables of wfm")]
    redis_url: Annotated[RedisUrl, about("Redis server; replaces redis_host to redis_tls", secret=True)]
    redis_host: Annotated[Host, about("host name or address of Redis")]
    redis_port: Annotated[Port, about("TCP port of Redis")]
    redis_username: Annotated[str, about("ACL user of Redis; empty: the default user")]
    redis_password: Annotated[str, about("password of the Redis user; empty: none", secret=True)]
    redis_db: Annotated[int, Meta(ge=0, le=65_535), about("number of the Redis database")]
    redis_tls: Annotated[Truth, about("speak TLS with Redis")]
    redis_tls_ca_file: Annotated[str, about("PEM file of the authority that Redis is checked against")]
    redis_tls_cert_file: Annotated[str, about("PEM file of the client certificate for Redis")]
    redis_tls_key_file: Annotated[str, about("PEM file of the key of the client certificate")]
    lease_seconds: Annotated[Seconds, about("s that a worker holds a task without renewing it")]
    claim_idle_seconds: Annotated[Seconds, about("s until a message that its reader left is taken over")]
    republish_seconds: Annotated[Seconds, about("s until an event that is still pending is published again")]
    reconcile_seconds: Annotated[Seconds, about("s between two full comparisons with the catalogue")]
    sweep_seconds: Annotated[Seconds, about("s between two looks for rows that are due")]
    block_seconds: Annotated[Seconds, about("s that one read waits for messages")]
    batch_size: Annotated[int, Meta(ge=1, le=1000), about("messages handled in one transaction, at most")]
    stream_high_water: Annotated[Count, about("messages a command stream takes; more wait in Postgres")]
    public_stream_max_length: Annotated[Count, about("messages kept in the public stream `events`, about")]
    max_deliveries: Annotated[Count, about("deliveries of a message before it goes to the dead letters")]
    approval_units: Annotated[
        int, Meta(ge=0, le=2**31 - 1), about("units of a step that a version, config or revocation reruns unasked")
    ]
    approval_core_hours: Annotated[Amount, about("core-hours that it reruns unasked; above, `wfm approve` is needed")]
    max_in_flight: Annotated[Count, about("runs from admission until their job is over: jobs at the backend")]
    max_task_tries: Annotated[Count, about("tries of a task (stage, submit, collect) before its run fails")]
    retry_backoff_seconds: Annotated[Seconds, about("s before the first retry of a run; doubles with each")]
    retry_backoff_max_seconds: Annotated[Seconds, about("s before any retry, at most")]
    vanish_grace_seconds: Annotated[Seconds, about("s that a job may be missing before it counts as vanished")]
    poll_seconds: Annotated[Seconds, about("s between two looks at local jobs, while they are young")]
    poll_max_seconds: Annotated[Seconds, about("s between two looks at local jobs, at most")]
    staging_mode: Annotated[Literal["auto", "link", "reflink", "copy"], about("how inputs reach a job")]
    staging_reserve_gb: Annotated[Amount, about("disk space that staging leaves free, in 10^9 bytes")]

    env: Environment = "localdev"
    embedded: bool = False
    warnings: tuple[str, ...] = ()
    sources: Mapping[str, str] = {}

    def with_servers(self, database_url: str, redis_url: str) -> Settings:
        """The same settings with the addresses of the embedded servers."""
        urls = {"database_url": _with_driver(database_url), "redis_url": redis_url}
        return msgspec.structs.replace(self, **urls, sources={**self.sources, **dict.fromkeys(urls, "embedded")})

    @property
    def which_home(self) -> str:
        """The home for people, and how to have another one where it is that of a parent directory."""
        above = self.sources.get("home") == HOME_ABOVE
        more = f" ({HOME_ABOVE}; for a system of its own: `mkdir {self.home.name}` here first)" if above else ""
        return f"home {self.home}{more}"

    def redis_address(self) -> tuple[str, dict[str, Any]]:
        """The URL and the keyword arguments (login, TLS files) for `redis.Redis.from_url`."""
        url = self.redis_url
        options = {
            "ssl_ca_certs": self.redis_tls_ca_file,
            "ssl_certfile": self.redis_tls_cert_file,
            "ssl_keyfile": self.redis_tls_key_file,
        }
        if not url:
            host = f"[{self.redis_host}]" if ":" in self.redis_host else self.redis_host
            url = f"{'rediss' if self.redis_tls else 'redis'}://{host}:{self.redis_port}/{self.redis_db}"
            options |= {"username": self.redis_username, "password": self.redis_password}
        return url, {name: value for name, value in options.items() if value}

    def describe(self) -> list[tuple[str, str, str]]:
        """Name, value and source of every setting, with secrets hidden."""
        return [(n, _shown(n, getattr(self, n)), self.sources.get(n, "")) for n in ("env", *SETTINGS)]

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        return [(name, value) for name, value, _ in self.describe()]


SETTINGS: Mapping[str, Any] = {field.name: field.type for field in msgspec.structs.fields(Settings) if field.required}
SECRETS = frozenset(name for name, kind in SETTINGS.items() if kind.__metadata__[-1].extra)


def load(environ: Environ | None = None, files: Sequence[Path] = ()) -> Settings:
    """Read, check and freeze the settings.

    Args:
        environ: environment variables; those of the process if None.
        files: further settings files; they win over the site's file, a later one over an earlier one.

    Raises:
        ConfigError: with every fault found in the environment and in the files.
    """
    environ = os.environ if environ is None else environ
    faults: list[str] = []
    chosen = environ.get("ENV_FOR_DYNACONF", "").lower() or "localdev"
    env: Any = _checked("ENV_FOR_DYNACONF", Environment, chosen, faults) or "default"
    site = _found(["settings_file"], PREFIXES, [], environ, faults)
    given = _found(SETTINGS, PREFIXES, SECRETS, environ, faults)
    if parts := _found(DATABASE_PARTS, [DATABASE_PREFIX], ["password"], environ, faults):
        given["database_url"] = _composed(parts, given.get("database_url"), faults)
    values, sources = _layer(env, [*(Path(path) for _, path in site.values()), *files], given, faults)
    faults += _contradictions(env, values, sources)
    if faults:
        raise ConfigError(faults)

    if sources["home"] == "default" and (above := _home_above(values["home"])):
        values["home"], sources["home"] = above, HOME_ABOVE
    home = str(values["home"])
    paths = {name: value for name, value in values.items() if isinstance(value, Path)}
    values |= {name: Path(str(path).replace("{home}", home)).absolute() for name, path in paths.items()}
    values["database_url"] = _with_driver(values["database_url"])
    sources["env"] = "ENV_FOR_DYNACONF" if environ.get("ENV_FOR_DYNACONF") else "default"
    warnings = tuple(_unknown_variables(environ))
    return Settings(**values, env=env, embedded=not values["database_url"], warnings=warnings, sources=sources)


def _home_above(name: Path) -> Path | None:
    """The nearest home above the working directory, if that has none itself.

    Only one of our own: where others may write, as in /tmp, theirs would decide which programs and servers we trust.
    """
    here = Path.cwd()
    if os.path.lexists(here / name):
        return None
    mine = (d / name for d in here.parents if os.path.isdir(d / name) and os.stat(d / name).st_uid == os.geteuid())
    return next(mine, None)


def _found(
    names: Iterable[str], prefixes: Sequence[str], secrets: Container[str], environ: Environ, faults: list[str]
) -> Found:
    """What the environment gives of `names`. A secret may also stand in the file that ``<variable>_FILE`` names."""
    found: Found = {}
    for name in names:
        texts = {}
        for variable in (prefix + name.upper() for prefix in prefixes):
            if text := environ.get(variable):
                texts[variable] = text
            if name in secrets and (path := environ.get(f"{variable}_FILE")):
                with suppress(OSError, UnicodeError):
                    texts[f"{variable}_FILE"] = Path(path).read_text("utf-8").rstrip("\r\n")
                if not texts.get(f"{variable}_FILE"):
                    shown = repr(path) if path.startswith("/") else "***"  # it may be the password, by mistake
                    faults.append(f"{variable}_FILE = {shown}: allowed is the path of a readable file with a text")
        if len(set(texts.values())) > 1:
            faults.append(f"{' and '.join(texts)} differ: set only one of them")
        if texts:
            found[name] = next(iter(texts.items()))
    return found


def _composed(parts: Found, rival: tuple[str, str] | None, faults: list[str]) -> tuple[str, str]:
    """The database URL made of its parts. A HOST that is a directory holds the Unix socket of the server."""
    from sqlalchemy.engine import URL

    variables = f"{DATABASE_PREFIX}{{{','.join(parts).upper()}}}"
    if missing := [DATABASE_PREFIX + part.upper() for part in ("host", "database", "user") if part not in parts]:
        faults.append(f"{', '.join(missing)}: missing beside {variables}")
    text = {part: value for part, (_, value) in parts.items()}
    host = text.get("host", "")
    port = _checked(f"{DATABASE_PREFIX}PORT", SETTINGS["redis_port"], text.get("port", 5432), faults)
    by_socket = host.startswith("/")
    url = URL.create(
        "postgresql+psycopg2",
        username=text.get("user"),
        password=text.get("password"),
        host=None if by_socket else host,
        port=None if by_socket else port,
        database=text.get("database"),
        query={"host": host, "port": str(port)} if by_socket else {},
    ).render_as_string(hide_password=False)
    if rival and _with_driver(rival[1]) != url:
        faults.append(f"{rival[0]} and {variables} differ: set only one of them")
    return variables, url


def _layer(env: str, files: Sequence[Path], given: Found, faults: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Value and source of every setting after all layers; a faulty setting has a source only."""
    from dynaconf import Dynaconf, get_history
    from dynaconf.loaders.base import SourceMetadata

    # dynaconf layers and remembers, but does not read: its readers would make numbers of passwords, expand
    # "@…" in them, and run a dynaconf_hooks.py that lies beside a settings file.
    layers = Dynaconf(loaders=[])
    layers.set("AUTO_CAST_FOR_DYNACONF", False)  # as an argument, a variable of that name would overrule it
    for path in (SHIPPED_FILE, *(file.absolute() for file in files)):
        sections = _read(path, faults)
        for section in ("default", env):
            source = "default" if path == SHIPPED_FILE else f"{path} [{section}]"
            layers.update(sections.get(section), loader_identifier=SourceMetadata("file", source, section))
    for name, (variable, text) in given.items():
        layers.update({name: text}, loader_identifier=SourceMetadata("environment", variable))

    sources = {name: get_history(layers, name)[-1]["identifier"] for name in SETTINGS}
    checked = {
        name: _checked(f"{name} (from {sources[name]})", kind, layers[name], faults, secret=name in SECRETS)
        for name, kind in SETTINGS.items()
    }
    return {name: value for name, value in checked.items() if value is not None}, sources


def _checked(label: str, kind: Any, value: object, faults: list[str], *, secret: bool = False) -> Any:
    """`value` in the type of a setting; None and a fault if it is not allowed."""
    try:
        return msgspec.convert(value, kind, strict=False, dec_hook=_path)
    except msgspec.ValidationError:
        faults.append(f"{label} = {'***' if secret else repr(value)}: allowed is {_allowed(kind, value)}")
        return None


def _path(_: type, value: object) -> Path:
    if not isinstance(value, str) or not value:
        raise ValueError
    return Path(os.path.expanduser(value))


def _allowed(kind: Any, value: object) -> str:
    """What a setting takes, in words."""
    schema = msgspec.json.schema(kind, schema_hook=lambda _: {"type": "path"})
    if "enum" in schema:
        return _one_of(schema["enum"], str(value))
    words = {"type": "", "exclusiveMinimum": "above ", "minimum": "from ", "maximum": "to ", "pattern": "like "}
    return str(schema.get("title") or " ".join(word + str(schema[key]) for key, word in words.items() if key in schema))


def _read(path: Path, faults: list[str]) -> dict[str, dict[str, Any]]:
    """The sections of a settings file, all of them checked for unknown names."""
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        faults.append(f"{path}: cannot be read: {error}")
        return {}
    sections: dict[str, dict[str, Any]] = {}
    for section, table in document.items():
        if section not in SECTIONS or not isinstance(table, dict):
            faults.append(f"{path}: {section} is no section; allowed is {_one_of(SECTIONS, section)}")
            continue
        sections[section] = table
        unknown = [name for name in table if name.lower() not in SETTINGS]
        faults += [f"{path} [{section}]: unknown setting {name}{_nearest(name, SETTINGS)}" for name in unknown]
    return sections


def _contradictions(env: str, values: Mapping[str, Any], sources: Mapping[str, str]) -> Iterator[str]:
    """Faults between settings. One that is missing in `values` is faulty by itself and judged no further."""
    for low, high in (("retry_backoff_seconds", "retry_backoff_max_seconds"), ("poll_seconds", "poll_max_seconds")):
        if low in values and high in values and values[low] > values[high]:
            yield f"{low} = {values[low]}: allowed is at most {high} = {values[high]}"
    files = {name: values[name] for name in SETTINGS if name.startswith("redis_tls_") and values.get(name)}
    if "redis_url" in values and "redis_tls" in values:
        url, tls = values["redis_url"], values["redis_tls"]
        if (tls or files) and not (url.startswith("rediss://") if url else tls):
            yield f"{', '.join(files) or 'redis_tls'} set without TLS: set redis_tls = true, or a rediss:// redis_url"
    if ("redis_tls_cert_file" in files) != ("redis_tls_key_file" in files):
        yield "redis_tls_cert_file and redis_tls_key_file: set both or none"
    for name, path in files.items():
        if not Path(path).is_file():
            yield f"{name} = {path!r}: no such file"
    if values.get("database_url") == "":
        redis = [name for name in SETTINGS if name.startswith("redis_") and sources[name] != "default"]
        if redis or env in ("staging", "production"):
            because = f"{', '.join(redis)} set" if redis else f"{env} has no embedded servers"
            parts = ",".join(DATABASE_PARTS).upper()
            yield f"the database is missing ({because}): set WFM_DATABASE_URL or {DATABASE_PREFIX}{{{parts}}}"


def _unknown_variables(environ: Environ) -> Iterator[str]:
    """A warning for each variable that bears a prefix of ours and means nothing."""
    known = {name.upper() for name in SETTINGS} | {f"{name.upper()}_FILE" for name in SECRETS} | {"SETTINGS_FILE"}
    for prefix in PREFIXES:
        for variable in sorted(environ):
            name = variable.removeprefix(prefix)
            if name != variable and name not in known and not name.startswith("TEST_"):
                yield f"{variable} is not a setting and is ignored{_nearest(name, known, prefix)}"


def _one_of(words: Sequence[str], wrong: str) -> str:
    return f"one of {', '.join(words)}{_nearest(wrong, words)}"


def _nearest(word: str, words: Iterable[str], prefix: str = "") -> str:
    near = nearest(word, words, likeness=0.5)
    return f"; did you mean {prefix}{near}?" if near else ""


def _with_driver(url: str) -> str:
    """SQLAlchemy's default driver depends on its version; ours does not."""
    return re.sub(r"\Apostgres(ql)?://", "postgresql+psycopg2://", url)


def _shown(name: str, value: Any) -> str:
    """A value as people may see it: no password, and truth as it is written in a file."""
    if name not in SECRETS:
        return str(value).lower() if isinstance(value, bool) else str(value)
    if not name.endswith("_url"):
        return "***" if value else ""
    return re.sub(r"(://[^:/@]*:)[^/@]*(?=@)|(password=)[^&]*", r"\1\2***", value, flags=re.IGNORECASE)
