"""Staging on real files: complete or not at all, repeatable after any kill, and never a danger for raw data."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest

from wfm import jobs
from wfm.errors import HeldError, InputError, UnavailableError, WfmError
from wfm.jobs import InputFile, InputProduct, JobFacts, StagePlan
from wfm.model import PRODUCT_DIRECTORIES, Resources
from wfm.staging import Staged, StagingPolicy, stage

AUTO = StagingPolicy("auto", 0)
COPY = StagingPolicy("copy", 0)


def sha256(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class Archive:
    """Raw data and upstream results on disk, and plans to stage them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.base = directory / "base"
        self.files: list[InputFile] = []
        self.products: list[InputProduct] = []

    def path(self, name: str) -> Path:
        path = self.directory / "archive" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, package: str, name: str, data: bytes, *sources: Path) -> Path:
        """Write a raw file (unless the places of its copies are given) and take it into the plan."""
        path = self.path(f"{len(self.files)}/{name}")
        if not sources:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        places = tuple(str(p) for p in sources or (path,))
        self.files.append(InputFile(package, name, len(data), sha256(data), places))
        return path

    def add_product(self, name: str, data: bytes, step: str = "calibrate", unit: str = "all") -> Path:
        path = self.path(f"products/{step}/{unit}/{name}")
        path.write_bytes(data)
        path.chmod(0o444)
        self.products.append(
            InputProduct(7, step, unit, "INTERMEDIATE", name, str(path), len(data), sha256(data)),
        )
        return path

    def plan(self, parameters: dict[str, Any] | None = None) -> StagePlan:
        facts = JobFacts(
            location_id=1,
            run_id=42,
            attempt=1,
            pipeline="maps",
            made_as="reduce",
            step="reduce",
            final=True,
            unit_key="all",
            unit_values={},
            software="reducer",
            version="1.0.0",
            command=("reduce",),
            environment={},
            resources=Resources(),
            config_parameters=parameters or {},
            base_directory=str(self.base),
            python=sys.executable,
        )
        return StagePlan(jobs.build_spec(facts), facts, tuple(self.files), tuple(self.products))

    @property
    def attempt(self) -> Path:
        return Path(self.plan().spec.directory)

    def stage(self, policy: StagingPolicy = AUTO, **more: Any) -> Staged:
        return stage(self.plan(), policy, **more)


@pytest.fixture
def archive(tmp_path: Path) -> Archive:
    return Archive(tmp_path)


@pytest.fixture
def full(archive: Archive) -> Archive:
    """Two packages, the larger file of several chunks, and an upstream result."""
    archive.add("scan1", "raw.fits", b"one" * 1_000_000)
    archive.add("scan2", "sub/raw.fits", b"two")
    archive.add_product("map.fits", b"map")
    return archive


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A directory in memory, where there is one: syncs cost nothing there."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(prefix="wfm-staging-", dir="/dev/shm") as directory:
        yield Path(directory)


def snapshot(directory: Path) -> dict[str, Any]:
    """What there is below a directory, but for times."""
    found: dict[str, Any] = {}
    for path in sorted(directory.rglob("*")):
        name, mode = str(path.relative_to(directory)), path.lstat().st_mode
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif path.is_dir():
            found[name] = None
        elif name == jobs.STAGED:
            found[name] = [{k: v for k, v in s.items() if "time" not in k} for s in json.loads(path.read_bytes())]
        else:
            found[name] = stat.S_IMODE(mode), path.read_bytes()
    return found


def touched(directory: Path) -> dict[Path, tuple[int, int, int]]:
    """By path, what changes with every change of a file or directory."""
    return {p: (s.st_ino, s.st_mode, s.st_ctime_ns) for p in directory.rglob("*") if (s := p.lstat())}


def interrupt_at(number: int, what: Callable[[], object] = lambda: None) -> Callable[[], bool]:
    """An `alive` that turns false at its n-th call, and does something then."""
    calls = 0

    def alive() -> bool:
        nonlocal calls
        calls += 1
        if calls == number:
            what()
        return calls < number

    return alive


# --- the tree ---


def test_a_complete_attempt(full: Archive) -> None:
    counted: list[int] = []
    staged = full.stage(COPY, progress=counted.append)
    assert staged == Staged(str(full.attempt), files=3, bytes=3_000_006, linked=0, copied=3, reflinked=0)
    assert sum(counted) == staged.bytes
    found = snapshot(full.attempt)
    manifest, record = found.pop(jobs.MANIFEST), found.pop(jobs.STAGED)
    assert found == {
        "input": None,
        "input/scan1": None,
        "input/scan1/raw.fits": (0o444, b"one" * 1_000_000),
        "input/scan2": None,
        "input/scan2/sub": None,
        "input/scan2/sub/raw.fits": (0o444, b"two"),
        "workspace": None,
        "workspace/reduce": None,
        "workspace/calibrate": None,
        "workspace/calibrate/all": None,
        "workspace/calibrate/all/map.fits": (0o444, b"map"),
        "output": None,
        **{f"output/{name}": None for name in PRODUCT_DIRECTORIES},
        "config": None,
        "logs": None,
    }
    assert json.loads(manifest[1]) == jobs.manifest(full.plan())
    assert [(s["path"], s["how"], s["source"], s["checksum"]) for s in record] == [
        ("input/scan1/raw.fits", "copy", full.files[0].sources[0], full.files[0].checksum),
        ("input/scan2/sub/raw.fits", "copy", full.files[1].sources[0], full.files[1].checksum),
        ("workspace/calibrate/all/map.fits", "copy", full.products[0].path, full.products[0].checksum),
    ]
    for entry in json.loads((full.attempt / jobs.MANIFEST).read_bytes())["input_files"]:
        assert sha256(Path(entry["path"]).read_bytes()) == entry["checksum"]


def test_a_step_without_inputs(archive: Archive) -> None:
    assert archive.stage().files == 0
    assert (archive.attempt / jobs.MANIFEST).exists()


@pytest.mark.parametrize("name", ["Beobachtung äöü €.fits", "数据/観測.fits", "white space 'quoted'", "-rf", "a" * 255])
def test_any_name(archive: Archive, name: str) -> None:
    archive.add("Paket 1/½", name, b"data")
    archive.stage()
    (entry,) = json.loads((archive.attempt / jobs.MANIFEST).read_bytes())["input_files"]
    assert Path(entry["path"]).read_bytes() == b"data"
    assert entry["path"].endswith(name)


def test_a_thousand_files(memory: Path) -> None:
    archive = Archive(memory)
    for n in range(1000):
        archive.add(f"scan{n // 100}", f"{n}.fits", f"data {n}".encode())
    assert archive.stage().files == 1000
    assert (archive.attempt / "input/scan9/999.fits").read_bytes() == b"data 999"


# --- again ---


def test_a_complete_attempt_stays_as_it_is(full: Archive) -> None:
    first = full.stage()
    before = touched(full.attempt)
    for path in full.files[0].sources:
        Path(path).unlink()
    assert full.stage() == first
    assert touched(full.attempt) == before


KILLED = """
import os, shutil, signal, sys
import msgspec
from wfm.jobs import StagePlan
from wfm.staging import StagingPolicy, stage
from tests.integration.test_staging import snapshot
from pathlib import Path

plan = msgspec.json.decode(sys.argv[1], type=StagePlan)
policy, attempt = StagingPolicy("copy", 0), Path(plan.spec.directory)
stage(plan, policy)
wanted = snapshot(attempt)
moment, killed = 0, True
while killed:
    shutil.rmtree(plan.facts.base_directory)
    child = os.fork()
    if child == 0:
        left = moment
        def tick(event="", args=()):
            global left
            if event.split(".")[0] in ("", "open", "os", "shutil"):
                left -= 1
                if left == -1:
                    os.kill(os.getpid(), signal.SIGKILL)
            return True
        sys.addaudithook(tick)
        stage(plan, policy, alive=tick)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), status
    killed = status != 0
    if (attempt / "config/manifest.json").exists():
        left = snapshot(attempt)
        assert {name: left[name] for name in left if not name.startswith(".staging")} == wanted, moment
    stage(plan, policy)
    assert snapshot(attempt) == wanted, moment
    moment += 1
print(moment)
"""


def run_script(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_killed_at_any_moment_it_ends_in_the_same_tree(full: Archive, memory: Path) -> None:
    """SIGKILL before every single operation on the file system, and between chunks; then once more."""
    full.base = memory / "base"
    moments = int(run_script(KILLED, msgspec.json.encode(full.plan()).decode()))
    assert moments > 50


def test_what_is_in_place_and_good_is_kept(full: Archive) -> None:
    with pytest.raises(UnavailableError, match="lease"):
        full.stage(COPY, alive=interrupt_at(5))
    kept = full.attempt / "input/scan1/raw.fits"
    number = kept.stat().st_ino
    assert not (full.attempt / jobs.MANIFEST).exists()
    full.stage(COPY)
    assert kept.stat().st_ino == number


def test_what_is_in_place_and_bad_is_replaced(full: Archive) -> None:
    with pytest.raises(UnavailableError):
        full.stage(COPY, alive=interrupt_at(5))
    damaged = full.attempt / "input/scan1/raw.fits"
    damaged.chmod(0o644)
    damaged.write_bytes(b"two" * 1_000_000)
    full.stage(COPY)
    assert damaged.read_bytes() == b"one" * 1_000_000


def test_without_the_lease_nothing_is_completed(full: Archive) -> None:
    calls = 0

    def counting() -> bool:
        nonlocal calls
        calls += 1
        return True

    full.stage(COPY, alive=counting)
    for number in range(1, calls + 1):
        shutil.rmtree(full.base)
        with pytest.raises(UnavailableError, match="lease"):
            full.stage(COPY, alive=interrupt_at(number))
        assert not (full.attempt / jobs.MANIFEST).exists()
        assert not list(full.attempt.glob(".staging*"))


@pytest.mark.parametrize("number", [1, 2, 3, 4, 5, 6])
def test_one_that_was_thought_dead_cannot_meddle(full: Archive, number: int) -> None:
    """Frozen at some moment, thawed when another worker has staged and the job runs."""
    frozen, thaw = threading.Event(), threading.Event()
    errors: list[BaseException] = []

    def freeze() -> None:
        frozen.set()
        thaw.wait(60)

    def first() -> None:
        alive = interrupt_at(number, freeze)
        try:
            full.stage(COPY, alive=lambda: alive() or True)
        except WfmError as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    try:
        assert frozen.wait(60)
        full.stage(COPY)
        (full.attempt / "claim").mkdir()
        before = touched(full.attempt)
    finally:
        thaw.set()
        thread.join(60)
    assert [type(e) for e in errors] == [UnavailableError]
    assert touched(full.attempt) == before


def test_one_that_was_thought_dead_takes_nothing_away(archive: Archive, mounted: Callable[..., Path]) -> None:
    """It wakes on a full disk; what is in place there is no longer its own."""
    archive.base = mounted("-t", "tmpfs", "-o", "size=10m", "wfm-test")
    archive.add("scan1", "raw.fits", b"x" * 3_000_000)

    def meanwhile() -> None:
        archive.stage(COPY)
        with suppress(OSError), (archive.base / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 65_536)

    alive = interrupt_at(3, meanwhile)
    with pytest.raises(HeldError, match="full while staging"):
        archive.stage(COPY, alive=lambda: alive() or True)
    assert (archive.attempt / "input/scan1/raw.fits").read_bytes() == b"x" * 3_000_000


@pytest.mark.parametrize("mark", ["claim", "exit.json"])
def test_when_the_job_has_started_nothing_is_changed(full: Archive, mark: str) -> None:
    first = full.stage()
    (full.attempt / mark).mkdir()
    (full.attempt / "input/scan2/sub/raw.fits").unlink()
    before = snapshot(full.attempt)
    assert full.stage() == first
    assert snapshot(full.attempt) == before


@pytest.mark.parametrize("mark", ["claim", "exit.json"])
def test_the_directory_of_another_job_is_refused(full: Archive, mark: str) -> None:
    full.stage()
    (full.attempt / mark).mkdir()
    before = snapshot(full.attempt)
    with pytest.raises(WfmError, match="other inputs or another configuration") as error:
        stage(full.plan({"threshold": 5}), AUTO)
    assert type(error.value) is WfmError
    assert snapshot(full.attempt) == before


def test_a_directory_staged_for_other_inputs_is_made_anew(full: Archive) -> None:
    full.add("scan3", "more.fits", b"more")
    full.stage()
    (full.attempt / "cancelled").touch()
    del full.files[2]
    full.stage()
    assert not (full.attempt / "input/scan3").exists()
    assert json.loads((full.attempt / jobs.MANIFEST).read_bytes()) == jobs.manifest(full.plan())
    assert (full.attempt / "cancelled").exists()


# --- bad, missing and unreachable copies ---


def test_every_missing_file_is_named_with_every_place(archive: Archive) -> None:
    archive.path("plain").write_bytes(b"a file where the directory should be")
    places = archive.path("a"), archive.directory / "archive/plain/one.fits"
    archive.add("scan1", "one.fits", b"1", *places)
    archive.add("scan2", "two.fits", b"2", archive.path("b/two.fits"))
    archive.add("scan3", "good.fits", b"3")
    with pytest.raises(InputError) as error:
        archive.stage()
    one, two = str(error.value).splitlines()
    assert all(text in one for text in ("package scan1", "one.fits", *map(str, places)))
    assert "two.fits is missing" in two


def test_a_wrong_checksum_is_named_with_the_right_one(archive: Archive) -> None:
    archive.add("scan1", "raw.fits", b"good").write_bytes(b"evil")
    archive.add("scan1", "also.fits", b"good").write_bytes(b"more than good")
    archive.add("scan2", "raw.fits", b"fine").write_bytes(b"foul")
    with pytest.raises(InputError) as error:
        archive.stage()
    assert "14 bytes instead of 4" in str(error.value), "found without reading anything"
    archive.files.pop(1)
    with pytest.raises(InputError) as error:
        archive.stage()
    first, second = str(error.value).splitlines()
    assert f"{sha256(b'evil')} instead of {sha256(b'good')}" in first
    assert f"{sha256(b'foul')} instead of {sha256(b'fine')}" in second
    assert not (archive.attempt / jobs.MANIFEST).exists()
    assert not (archive.attempt / "input").exists(), "a failed attempt gives its space back"


def test_a_good_copy_is_used_instead_of_a_bad_one(archive: Archive, caplog: pytest.LogCaptureFixture) -> None:
    evil, short, folder, good = (archive.path(x) for x in ("evil", "short", "folder", "good"))
    evil.write_bytes(b"evil")
    short.write_bytes(b"")
    folder.mkdir()
    good.write_bytes(b"good")
    archive.add("scan1", "raw.fits", b"good", archive.path("missing"), evil, short, folder, good)
    archive.stage()
    assert (archive.attempt / "input/scan1/raw.fits").read_bytes() == b"good"
    (record,) = json.loads((archive.attempt / jobs.STAGED).read_bytes())
    assert record["source"] == str(good)
    text = (archive.attempt / jobs.STAGING_LOG).read_text()
    assert f"{evil} has sha256:" in text
    assert f"{short} has 0 bytes instead of 4" in text
    assert f"{folder} is not a regular file" in text
    assert str(evil) in caplog.text


def test_warnings_of_an_earlier_try_are_forgotten(archive: Archive) -> None:
    evil, good = archive.path("evil"), archive.path("good")
    evil.write_bytes(b"evil")
    good.write_bytes(b"good")
    archive.add("scan1", "raw.fits", b"good", evil, good)
    archive.stage()
    (archive.attempt / jobs.MANIFEST).unlink()
    evil.write_bytes(b"good")
    archive.stage()
    assert not (archive.attempt / jobs.STAGING_LOG).exists()


def test_without_any_copy_the_task_is_held(archive: Archive) -> None:
    archive.files.append(InputFile("scan1", "raw.fits", 1, sha256(b"1"), ()))
    with pytest.raises(HeldError, match=r"no reachable copy of package scan1, file raw\.fits"):
        archive.stage()
    assert not archive.attempt.exists()


def test_a_location_that_is_away_holds_what_lies_there(archive: Archive) -> None:
    """Its root is not there, so nobody knows whether a file is missing; below a root that is there, one knows."""
    root, other = archive.directory / "tape", archive.directory / "other"
    raw = root / "night" / "raw.fits"
    roots = {"cheap": str(other), "tape": f"{root}/"}
    other.mkdir()
    archive.files.append(InputFile("scan1", "raw.fits", 1, sha256(b"1"), (str(other / "raw.fits"), str(raw)), roots))
    said = rf"held: location tape is not there, no directory {root}/ \(is it mounted\?\)"
    with pytest.raises(HeldError, match=said):
        archive.stage()
    assert not (archive.attempt / "input").exists()
    root.symlink_to(root)  # does not answer, as a file system that lost its server
    with pytest.raises(HeldError, match=said):
        archive.stage()
    root.unlink()
    root.mkdir()
    with pytest.raises(InputError, match=f"{raw} is missing"):
        archive.stage()
    raw.parent.mkdir()
    raw.write_bytes(b"1")
    other.rmdir()
    assert archive.stage().files == 1  # another copy will do


def test_a_copy_that_does_not_answer_may_do_so_later(archive: Archive) -> None:
    loop = archive.path("loop")
    loop.symlink_to(loop)
    archive.add("scan1", "raw.fits", b"x", loop)
    archive.add("scan2", "raw.fits", b"x", archive.path("missing"))
    with pytest.raises(UnavailableError, match=str(loop)):
        archive.stage()
    good = archive.path("good")
    good.write_bytes(b"x")
    archive.files = [msgspec.structs.replace(f, sources=(*f.sources, str(good))) for f in archive.files]
    archive.stage()
    assert (archive.attempt / "input/scan1/raw.fits").read_bytes() == b"x"


def test_a_read_error_is_not_the_end(archive: Archive) -> None:
    broken = Path("/proc/self/mem")  # says it has no bytes; reading gives EIO
    assert broken.stat().st_size == 0
    archive.add("scan1", "raw.fits", b"", broken)
    with pytest.raises(UnavailableError, match="/proc/self/mem"):
        archive.stage(COPY)
    good = archive.path("good")
    good.touch()
    archive.files = [msgspec.structs.replace(archive.files[0], sources=(str(broken), str(good)))]
    assert archive.stage(COPY).files == 1


def test_a_copy_that_grows_is_no_copy(archive: Archive) -> None:
    growing = archive.add("scan1", "raw.fits", b"x" * 3_000_000)

    def grow(_: int) -> None:
        with growing.open("ab") as file:
            file.write(b"y" * 1_100_000)

    with pytest.raises(InputError, match=f"{growing} has sha256"):
        archive.stage(COPY, progress=grow)


def test_a_base_that_refuses_is_unavailable(archive: Archive) -> None:
    archive.base.write_text("a file where the base directory should be")
    with pytest.raises(UnavailableError, match=str(archive.base)):
        archive.stage()


# --- raw data is never altered ---


def test_raw_data_is_not_touched(full: Archive) -> None:
    before = {p: (p.stat(), p.read_bytes()) for p in map(Path, (*full.files[0].sources, full.products[0].path))}
    full.stage()
    for name in ("input/scan1/raw.fits", "workspace/calibrate/all/map.fits"):
        path = full.attempt / name
        path.chmod(0o644)
        path.write_bytes(b"the job alters its input")
    after = {p: (p.stat(), p.read_bytes()) for p in before}
    assert [(s.st_mtime_ns, s.st_ctime_ns, d) for s, d in after.values()] == [
        (s.st_mtime_ns, s.st_ctime_ns, d) for s, d in before.values()
    ]


def test_root_gets_no_links(mounted: Callable[..., Path], tmp_path: Path) -> None:
    """Not even to what others own on a file system that is mounted read-only, just now."""
    place = mounted("-t", "tmpfs", "-o", "size=10m", "wfm-test")
    archive = Archive(place)
    raw = archive.add("scan1", "raw.fits", b"x")
    for path in (raw, raw.parent):
        os.chown(path, 65534, 65534)
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
    archive.base = tmp_path / "base"
    assert archive.stage().copied == 1


UNPRIVILEGED = """
import json, os, sys
import msgspec
from wfm.errors import WfmError
from wfm.jobs import StagePlan
from wfm.staging import StagingPolicy, stage

if os.geteuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
plan = msgspec.json.decode(sys.argv[1], type=StagePlan)
try:
    staged = stage(plan, StagingPolicy(sys.argv[2], 0))
except WfmError as error:
    print(json.dumps([type(error).__name__, str(error)]))
else:
    record = json.load(open(staged.directory + "/config/staged.json"))
    print(json.dumps(["Staged", {x["path"].split("/")[-1]: x["how"] for x in record}]))
"""

FOREIGN = Path("/etc/passwd")  # belongs to root, and so does its directory


class Commoner(Archive):
    """What a user who is not root stages; nobody, if this is root."""

    def own(self, name: str, mode: int, *, product: bool = False) -> Path:
        path = self.add_product(name, b"x") if product else self.add("own", name, b"x")
        path.chmod(mode)
        if os.geteuid() == 0:
            os.chown(path, 65534, 65534)
        return path

    def foreign(self, path: Path = FOREIGN) -> None:
        self.add("foreign", path.name, path.read_bytes(), path)

    def run(self, mode: str = "auto") -> Any:
        return json.loads(run_script(UNPRIVILEGED, msgspec.json.encode(self.plan()).decode(), mode))


@pytest.fixture
def commoner() -> Iterator[Commoner]:
    directory = Path(tempfile.mkdtemp(prefix="wfm-staging-"))  # pytest's own directories are closed to others
    directory.chmod(0o755)
    (directory / "base").mkdir()
    (directory / "base").chmod(0o777)
    yield Commoner(directory)
    shutil.rmtree(directory)


def test_a_link_is_made_only_where_the_job_cannot_alter_the_original(commoner: Commoner) -> None:
    commoner.foreign()
    commoner.own("writable", 0o644)
    commoner.own("own-but-read-only", 0o444)
    commoner.own("result-of-a-step", 0o444, product=True)
    in_open_directory = commoner.add("own", "replaceable", b"x")
    in_open_directory.chmod(0o444)
    in_open_directory.parent.chmod(0o777)
    assert commoner.run() == [
        "Staged",
        {
            "passwd": "link",
            "writable": "copy",
            "own-but-read-only": "copy",
            "replaceable": "copy",
            "result-of-a-step": "copy",
        },
    ]
    link = commoner.attempt / "input/foreign/passwd"
    assert link.readlink() == FOREIGN.resolve()


def test_a_link_leads_to_the_file_itself(commoner: Commoner) -> None:
    """Whoever can turn a link on the way could turn the input."""
    alias = commoner.path("alias")
    alias.symlink_to(FOREIGN)
    commoner.add("foreign", "alias", FOREIGN.read_bytes(), alias)
    assert commoner.run() == ["Staged", {"alias": "link"}]
    assert (commoner.attempt / "input/foreign/alias").readlink() == FOREIGN.resolve()


def test_a_linked_original_is_verified(commoner: Commoner) -> None:
    commoner.foreign()
    commoner.files = [msgspec.structs.replace(commoner.files[0], checksum=sha256(b"something else"))]
    kind, text = commoner.run()
    assert kind == "InputError"
    assert f"{sha256(FOREIGN.read_bytes())} instead of {sha256(b'something else')}" in text


def test_a_policy_that_insists_on_links(commoner: Commoner) -> None:
    commoner.foreign()
    commoner.own("result-of-a-step", 0o444, product=True)
    assert commoner.run("link") == ["Staged", {"passwd": "link", "result-of-a-step": "copy"}]
    shutil.rmtree(commoner.attempt)
    own = commoner.own("own", 0o444)
    kind, text = commoner.run("link")
    assert kind == "InputError"
    assert f"{own} allows no link, on which staging_mode = link insists" in text


def test_a_policy_that_insists_on_copies(commoner: Commoner) -> None:
    commoner.foreign()
    assert commoner.run("copy") == ["Staged", {"passwd": "copy"}]


def test_a_file_that_may_not_be_read_is_unavailable(commoner: Commoner) -> None:
    closed = commoner.add("closed", "raw.fits", b"x")
    closed.chmod(0o000)
    kind, text = commoner.run("copy")
    assert kind == "UnavailableError"
    assert str(closed) in text


# --- reflinks ---


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[..., Path]]:
    """Mounts file systems; skips where that is not possible."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a file system")
    places: list[Path] = []

    def mount(*arguments: str) -> Path:
        place = tmp_path / f"mounted{len(places)}"
        place.mkdir()
        done = subprocess.run(["mount", *arguments, str(place)], check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"mount {' '.join(arguments)}: {done.stderr.strip()}")
        places.append(place)
        return place

    yield mount
    for place in places:
        subprocess.run(["umount", str(place)], check=True)


@pytest.fixture
def xfs(mounted: Callable[..., Path], tmp_path: Path) -> Path:
    mkfs = shutil.which("mkfs.xfs") or shutil.which("mkfs.xfs", path="/usr/sbin:/sbin")
    if mkfs is None:
        pytest.skip("no mkfs.xfs on this machine (Debian package xfsprogs)")
    image = tmp_path / "xfs.image"
    with image.open("wb") as file:
        file.truncate(400_000_000)
    subprocess.run([mkfs, "-q", "-m", "reflink=1", str(image)], check=True)
    return mounted("-o", "loop", str(image))


@pytest.mark.parametrize("mode", ["auto", "reflink"])
def test_a_reflink_where_the_file_system_can(xfs: Path, mode: Literal["auto", "reflink"]) -> None:
    archive = Archive(xfs)
    data = os.urandom(1 << 20) * 60
    original = archive.add("scan1", "raw.fits", data)
    archive.add_product("map.fits", b"map")
    os.sync()
    before = os.statvfs(xfs)
    staged = archive.stage(StagingPolicy(mode, before.f_bavail * before.f_frsize - len(data) // 2))
    assert staged.reflinked == staged.files == 2, "reflinks need no space"
    copy = archive.attempt / "input/scan1/raw.fits"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o444
    assert stat.S_IMODE(original.stat().st_mode) == 0o644
    with copy.open("r+b") as file:
        file.write(b"altered")
    assert original.read_bytes() == data


def test_a_policy_that_insists_on_reflinks(mounted: Callable[..., Path]) -> None:
    archive = Archive(mounted("-t", "tmpfs", "-o", "size=10m", "wfm-test"))  # tmpfs has no reflinks
    original = archive.add("scan1", "raw.fits", b"x")
    with pytest.raises(InputError, match=f"{original} allows no reflink"):
        archive.stage(StagingPolicy("reflink", 0))
    assert archive.stage(AUTO).copied == 1


# --- disk space ---


def test_the_reserve_is_left_free(full: Archive) -> None:
    full.base.mkdir()
    disk = os.statvfs(full.base)
    free = disk.f_bavail * disk.f_frsize
    with pytest.raises(HeldError, match=r"held: disk: needs 0\.003 GB and .* GB free at") as error:
        full.stage(StagingPolicy("copy", free + 10**12))
    assert error.value.retry_in == 60
    assert str(full.attempt) in str(error.value)


def test_what_is_there_already_needs_no_space(archive: Archive, mounted: Callable[..., Path]) -> None:
    archive.base = mounted("-t", "tmpfs", "-o", "size=10m", "wfm-test")
    archive.add("scan1", "raw.fits", b"x" * 6_000_000)
    with pytest.raises(UnavailableError):
        archive.stage(COPY, alive=interrupt_at(7))
    assert archive.stage(COPY).copied == 1


def test_who_is_held_gives_back_what_he_has(archive: Archive, mounted: Callable[..., Path]) -> None:
    archive.base = mounted("-t", "tmpfs", "-o", "size=10m", "wfm-test")
    for n in range(3):
        archive.add(f"scan{n}", "raw.fits", b"x" * 2_000_000)
    with pytest.raises(UnavailableError):
        archive.stage(COPY, alive=interrupt_at(4))
    assert (archive.attempt / "input/scan0/raw.fits").exists()
    with pytest.raises(HeldError, match=r"needs 0\.004 GB"):
        archive.stage(StagingPolicy("copy", 8_000_000))
    assert not (archive.attempt / "input").exists()
    archive.stage(COPY)


def test_a_disk_that_fills_up_meanwhile(archive: Archive, mounted: Callable[..., Path]) -> None:
    archive.base = mounted("-t", "tmpfs", "-o", "size=10m", "wfm-test")
    for n in range(3):
        archive.add(f"scan{n}", "raw.fits", b"x" * 2_000_000)
    filler = archive.base / "filler"

    def fill() -> bool:
        with filler.open("ab") as file:
            file.write(b"x" * 700_000)
        return True

    with pytest.raises(HeldError, match="held: disk: full while staging") as error:
        archive.stage(COPY, alive=fill)
    assert isinstance(error.value.__cause__, OSError)
    assert error.value.__cause__.errno == errno.ENOSPC
    assert not list(archive.attempt.rglob("raw.fits"))
    assert not list(archive.attempt.glob(".staging*"))
    filler.unlink()
    assert archive.stage(COPY).copied == 3
