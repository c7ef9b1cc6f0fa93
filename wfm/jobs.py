"""What an attempt is made of: its name, its directory, its command, its manifest. Decides; touches no file.

An attempt directory, ``<base>/<pipeline>/<step>/<unit key>/r<run>-a<attempt>/``, is the tree that a container would see
at ``/workflow``. Pipeline and step are called there as they were when the run was made, so that all its attempts lie
side by side; below it, steps are called as they were when the attempt was built, so that no two have the same name:

==========================================  ===========================================================================
``input/<package>/<file>``                  raw data, read-only; every file under its package, so that no path depends
                                            on what else is staged
``workspace/<own step>/``                   working directory; what an intermediate step leaves here is its result
``workspace/<upstream>/<unit key>/<file>``  results of upstream steps, read-only
``output/<kind>/``                          what a final step leaves here is its result; the kind decides the type
``config/manifest.json``                    what to do; written last, so its presence means: completely staged
``config/staged.json``                      how each input came here (`StagedInput`)
``logs/``                                   ``job.log``, ``staging.log``, and what the software adds
==========================================  ===========================================================================
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import RawIOBase
from pathlib import PurePosixPath
from typing import Any, Literal

import msgspec
from msgspec import Struct

from wfm.backends import runjob
from wfm.errors import InputError, UnavailableError, UsageError
from wfm.model import PRODUCT_DIRECTORIES, JobSpec, LeftOut, Probe, Resources, UpstreamRead

INPUT = "input"
WORKSPACE = "workspace"
OUTPUT = "output"
CONFIG = "config"
LOGS = "logs"
MANIFEST = f"{CONFIG}/manifest.json"
STAGED = f"{CONFIG}/staged.json"
STAGING_LOG = f"{LOGS}/staging.log"

MANIFEST_VERSION = 1

_CHUNK_BYTES = 1 << 20
_NAME_BYTES = 200
_LISTED = 50
_INTERPRETERS = ("python", "python3")

How = Literal["link", "reflink", "copy"]
"""Ways of placing an input; a reflink shares its blocks with the original until one of the two changes."""


# --- the facts ---


class JobFacts(Struct, frozen=True):
    """All that fixes an attempt.

    Attributes:
        pipeline, made_as: what the pipeline and the step were called when the run was made.
        step: what the step was called when the attempt was built.
        final: no other step depends on this one.
        unit_key, unit_values: the unit's name in paths, and its values by dimension.
        software, version: of the reduction software.
        command: argument list.
        environment: the step's own variables.
        config_parameters: the step's config.
        base_directory: absolute path of the root of all attempt directories.
        missing: scheduled observations that belong to the unit, and were not waited for any longer.
        python: absolute path of the interpreter that the words ``python`` and ``python3`` stand for.
        upstream: where it does not need all results of the steps it depends on, which ones it has.
        quarantined: members of the unit that are left out, and why.
        probe_of, probe: the failed run that it examines, and which part of the unit it tries; None of other runs.
    """

    location_id: int
    run_id: int
    attempt: int
    pipeline: str
    made_as: str
    step: str
    final: bool
    unit_key: str
    unit_values: dict[str, Any]
    software: str
    version: str
    command: tuple[str, ...]
    environment: dict[str, str]
    resources: Resources
    config_parameters: dict[str, Any]
    base_directory: str
    python: str
    upstream: tuple[UpstreamRead, ...] = ()
    missing: tuple[str, ...] = ()
    quarantined: tuple[LeftOut, ...] = ()
    probe_of: int | None = None
    probe: Probe | None = None


class InputFile(Struct, frozen=True):
    """A raw data file.

    Attributes:
        name: path below the package's directory.
        size: bytes.
        checksum: ``sha256:`` and 64 hexadecimal digits.
        sources: absolute paths of its copies, best first.
        roots: by name of the locations they lie at, the directory that is there as long as the location is.
    """

    package: str
    name: str
    size: int
    checksum: str
    sources: tuple[str, ...]
    roots: dict[str, str] = {}


class InputProduct(Struct, frozen=True):
    """A result of an upstream step.

    Attributes:
        run_id, unit: of the run that made it; `unit` is the unit's key.
        step: what its step was called when the attempt that reads it was built.
        type: a `ProductType`.
        name: path below the upstream step's output directory.
        path: absolute path of the file.
        size: bytes.
        checksum: ``sha256:`` and 64 hexadecimal digits.
    """

    run_id: int
    step: str
    unit: str
    type: str
    name: str
    path: str
    size: int
    checksum: str


class StagePlan(Struct, frozen=True):
    """Everything that staging one attempt needs."""

    spec: JobSpec
    facts: JobFacts
    files: tuple[InputFile, ...]
    products: tuple[InputProduct, ...]


class Input(Struct, frozen=True):
    """A file to place in an attempt directory.

    Attributes:
        label: what people call it.
        path: where it goes, relative to the attempt directory.
        size: bytes.
        checksum: ``sha256:`` and 64 hexadecimal digits.
        sources: absolute paths of its copies, best first.
        roots: as in `InputFile`.
        raw: raw data; otherwise a result of an upstream step.
    """

    label: str
    path: str
    size: int
    checksum: str
    sources: tuple[str, ...]
    roots: dict[str, str]
    raw: bool


class StagedInput(Struct, frozen=True):
    """One entry of ``config/staged.json``: an input as it was placed.

    Attributes:
        path: relative to the attempt directory.
        source: absolute path of the copy it was made from; of a link, what it leads to.
        how: way of placing; a file found in place from an earlier try counts as a copy.
        size, mtime_ns, ctime_ns: what `os.stat` told of the path. Programs can set a file back to its old mtime, but
            not to its old ctime.
        checksum: ``sha256:`` and 64 hexadecimal digits; verified.
    """

    path: str
    source: str
    how: How
    size: int
    mtime_ns: int
    ctime_ns: int
    checksum: str


# --- names and paths ---


def job_name(location_id: int, run_id: int, attempt: int) -> str:
    """The name by which every backend can look an attempt's job up: ``wfm-1-r42-a1``."""
    return f"wfm-{location_id}-r{run_id}-a{attempt}"


def attempt_directory(base: str, pipeline: str, step: str, unit_key: str, run_id: int, attempt: int) -> str:
    """Absolute path of an attempt's directory.

    Raises:
        UsageError: the base is not an absolute path, or a name cannot be a directory.
    """
    faults = [] if base.startswith("/") else [f"base directory {base!r}: allowed is an absolute path"]
    for what, name in (("pipeline", pipeline), ("step", step), ("unit", unit_key)):
        if name in ("", ".", "..") or "/" in name or "\0" in name:
            faults.append(f"{what} {name!r}: allowed is a name that can be a directory, without '/'")
    if faults:
        raise UsageError("\n".join(faults))
    return str(PurePosixPath(base, pipeline, step, unit_key, f"r{run_id}-a{attempt}"))


def directories(step: str) -> tuple[str, ...]:
    """The directories of a fresh attempt, relative to it."""
    outputs = (f"{OUTPUT}/{name}" for name in PRODUCT_DIRECTORIES)
    return INPUT, f"{WORKSPACE}/{step}", *outputs, CONFIG, LOGS


def output_directory(step: str, final: bool) -> str:
    """Where a step leaves its results, relative to the attempt directory."""
    return OUTPUT if final else f"{WORKSPACE}/{step}"


def inputs(plan: StagePlan) -> tuple[Input, ...]:
    """The files to place, in the order of their paths.

    Raises:
        InputError: a name leads out of its directory, or two files would have the same place.
    """
    found = [
        Input(f"package {f.package}, file {f.name}", _file_path(f), f.size, f.checksum, f.sources, f.roots, raw=True)
        for f in plan.files
    ]
    for p in plan.products:
        label = f"step {p.step}, unit {p.unit}, product {p.name} of run {p.run_id}"
        found.append(Input(label, _product_path(p), p.size, p.checksum, (p.path,), {}, raw=False))
    found.sort(key=lambda i: i.path)
    faults = [
        f"{i.label}: the name leads out of its directory"
        for i in found
        if "\0" in i.path or any(part in ("", ".", "..") for part in i.path.split("/"))
    ]
    paths = Counter(i.path for i in found)
    for i in found:
        if paths[i.path] > 1:
            faults.append(f"{i.label}: there is another one with the same name")
        if any(str(parent) in paths for parent in PurePosixPath(i.path).parents):
            faults.append(f"{i.label}: there is a file where its directory must be")
    if faults:
        raise InputError("\n".join(faults))
    return tuple(found)


def _file_path(file: InputFile) -> str:
    return f"{INPUT}/{_as_directory(file.package)}/{file.name}"


def _product_path(product: InputProduct) -> str:
    return f"{WORKSPACE}/{product.step}/{product.unit}/{product.name}"


def _as_directory(package: str) -> str:
    """A package's name as one directory; unequal names give unequal directories.

    Names may hold a slash, begin with a dot, or be longer than a file system allows.
    """
    name = re.sub(r"[/%\0]|\A\.", lambda found: f"%{ord(found[0]):02X}", package)
    if len(name.encode()) <= _NAME_BYTES:
        return name
    digest = hashlib.sha256(package.encode()).hexdigest()[:16]
    return f"{name.encode()[: _NAME_BYTES - 20].decode(errors='ignore')}%-{digest}"  # "%-" comes from no other name


# --- command and manifest ---


def build_spec(facts: JobFacts) -> JobSpec:
    """The job of an attempt, to be executed without a container.

    The first word ``python`` or ``python3`` of a command means `JobFacts.python`, so that software installed beside
    wfm is found. The variables ``WORKFLOW_*`` below win over the step's own.

    Raises:
        UsageError: see `attempt_directory`.
    """
    directory = attempt_directory(
        facts.base_directory, facts.pipeline, facts.made_as, facts.unit_key, facts.run_id, facts.attempt
    )
    command = facts.command
    if command[:1] and command[0] in _INTERPRETERS:
        command = (facts.python, *command[1:])
    contract = {
        "WORKFLOW_INPUT_DIR": f"{directory}/{INPUT}",
        "WORKFLOW_WORKSPACE_DIR": f"{directory}/{WORKSPACE}",
        "WORKFLOW_OUTPUT_DIR": f"{directory}/{output_directory(facts.step, facts.final)}",
        "WORKFLOW_CONFIG_DIR": f"{directory}/{CONFIG}",
        "WORKFLOW_LOG_DIR": f"{directory}/{LOGS}",
        "WORKFLOW_MANIFEST": f"{directory}/{MANIFEST}",
        "WORKFLOW_RUN_ID": str(facts.run_id),
        "WORKFLOW_ATTEMPT": str(facts.attempt),
        "WORKFLOW_STEP": facts.step,
    }
    return JobSpec(
        name=job_name(facts.location_id, facts.run_id, facts.attempt),
        directory=directory,
        command=command,
        environment={**facts.environment, **contract},
        working_directory=f"{directory}/{WORKSPACE}/{facts.step}",
        resources=facts.resources,
    )


def built_for(spec: JobSpec) -> tuple[str, bool]:
    """The name of the step that a job was built for, and whether it was final; its pipeline may have changed since."""
    return spec.environment["WORKFLOW_STEP"], spec.environment["WORKFLOW_OUTPUT_DIR"] == f"{spec.directory}/{OUTPUT}"


def manifest(plan: StagePlan) -> dict[str, Any]:
    """Content of ``config/manifest.json``: all that the software needs to know.

    It holds no date and lists everything in a fixed order, so equal attempts have equal manifests but for their
    ids and paths.
    """
    facts, directory = plan.facts, plan.spec.directory
    return {
        "schema_version": MANIFEST_VERSION,
        "run_id": facts.run_id,
        "attempt": facts.attempt,
        "pipeline": facts.pipeline,
        "step": {"name": facts.step, "is_final": facts.final},
        "unit": {"key": facts.unit_key, "values": facts.unit_values},
        "software": {"name": facts.software, "version": facts.version},
        "config": {"parameters": facts.config_parameters},
        "resources": msgspec.to_builtins(facts.resources),
        "missing_observations": list(facts.missing),
        "input_files": [
            {
                "package": f.package,
                "name": f.name,
                "path": f"{directory}/{_file_path(f)}",
                "size": f.size,
                "checksum": f.checksum,
            }
            for f in sorted(plan.files, key=lambda f: (f.package, f.name))
        ],
        "input_products": [
            {
                "run_id": p.run_id,
                "step": p.step,
                "unit": p.unit,
                "type": p.type,
                "name": p.name,
                "path": f"{directory}/{_product_path(p)}",
                "size": p.size,
                "checksum": p.checksum,
            }
            for p in sorted(plan.products, key=lambda p: (p.step, p.unit, p.name))
        ],
        "upstream": [msgspec.to_builtins(u) for u in facts.upstream],
        "quarantined": [msgspec.to_builtins(q) for q in facts.quarantined],
        **_probe(facts),
        "workspace_dir": f"{directory}/{WORKSPACE}",
        "output_dir": f"{directory}/{output_directory(facts.step, facts.final)}",
        "log_dir": f"{directory}/{LOGS}",
    }


def _probe(facts: JobFacts) -> dict[str, Any]:
    """Which part of a failed unit the job tries: only there where it is a probe."""
    if facts.probe is None:
        return {}
    part = {name: getattr(facts.probe, name) for name in ("number", "first", "last", "members")}
    return {"probe": {"run_id": facts.probe_of, **part}}


def listed(texts: Sequence[str], separator: str = ", ") -> str:
    """Many things in one message; of very many, the first ones and how many more there are."""
    more = [f"and {len(texts) - _LISTED} more"] if len(texts) > _LISTED else []
    return separator.join([*texts[:_LISTED], *more])


# --- the disk ---

_FEW = 16
"""So many syncs are done one after the other: the first commits most of what the others ask for."""


def sync_all(paths: Iterable[str]) -> None:
    """Make files and directories durable; of many, several at a time, so that they share the commits of the disk.

    Raises:
        OSError: of the first that the disk did not keep.
    """
    todo = list(paths)
    if len(todo) <= _FEW:
        for path in todo:
            runjob.sync_directory(path)
    else:
        with ThreadPoolExecutor(8, thread_name_prefix="sync") as pool:
            list(pool.map(runjob.sync_directory, todo))


# --- checksums ---


class Watch(Struct, frozen=True):
    """Who looks on while many bytes are read.

    Attributes:
        alive: whether the work is still wanted here.
        progress: is told the number of bytes of every chunk read.
    """

    alive: Callable[[], bool] = lambda: True
    progress: Callable[[int], object] = lambda _: None

    def check(self) -> None:
        """Stop work that is no longer ours.

        Raises:
            UnavailableError: the lease was lost.
        """
        if not self.alive():
            raise UnavailableError("stopped: the lease was lost, or the worker is to end")


def chunks(file: RawIOBase, size: int) -> Iterator[memoryview]:
    """The bytes of an open file; of one that has become longer than `size`, just one too many, for it may never end.

    A chunk is valid until the next one is asked for.
    """
    left = size + 1
    buffer = memoryview(bytearray(min(left, _CHUNK_BYTES)))
    while count := file.readinto(buffer[:left]):
        yield buffer[:count]
        left -= count


def checksum(content: Iterable[memoryview], watch: Watch, sink: Callable[[memoryview], object] | None = None) -> str:
    """``sha256:`` and the hexadecimal digest of some bytes, which may go on to a `sink` in the same pass.

    Raises:
        UnavailableError: see `Watch.check`.
    """
    digest = hashlib.sha256()
    for chunk in content:
        watch.check()
        digest.update(chunk)
        if sink is not None:
            sink(chunk)
        watch.progress(len(chunk))
    return f"sha256:{digest.hexdigest()}"
