"""Inputs in: makes an attempt directory, places the inputs, verifies every byte of them, writes the manifest last.

**Repeatable.** A file gets its name only when it is complete and verified, so whoever comes after a killed worker keeps
what is in place and good, and ends in the same tree. A worker that takes over removes the workshop (`_WORKSHOP`) of the
one before, and everything becomes visible by a rename out of there: one that was thought dead cannot meddle any more.

**Raw data is never altered.** A link is made only where the job, which runs as the user of this process, can neither
write to the file, nor replace it, nor permit itself either: the file and its directory belong to others and are not
writable. Root can always write, so it never gets links; neither does a result of an upstream step, which is our own.

**Durable before the manifest.** The manifest lets the job start, also after a power failure. Copies are therefore
synced, all at once at the end, when most is on the disk already.

**Who is held for want of space holds none**: it gives back what it had placed, so that two of them cannot wait for each
other.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import BinaryIO, Literal

import msgspec
from msgspec import Struct

from wfm import jobs
from wfm.backends import CLAIM, EXIT_RECORD, runjob
from wfm.errors import HeldError, InputError, UnavailableError, WfmError
from wfm.jobs import How, Input, StagedInput, StagePlan, Watch

log = logging.getLogger(__name__)

DISK_RETRY_SECONDS = 60.0

_WORKSHOP = ".staging-"
"""How the directories begin, in that of the attempt, for what is not finished; each call has its own."""
_FICLONE = 0x40049409  # linux/fs.h: share the extents of another file
_NO_CLONES = (errno.EOPNOTSUPP, errno.ENOTTY, errno.EXDEV, errno.EINVAL, errno.ENOSYS)
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_MISSING = (FileNotFoundError, NotADirectoryError)


class StagingPolicy(Struct, frozen=True):
    """How inputs reach a job.

    Attributes:
        mode: ``auto`` takes the first possible one of link, reflink (a copy that shares its blocks with the original
            until one of the two changes) and copy. The others insist on one for raw data, and refuse files for which
            it is not possible; results of upstream steps are placed as with ``auto``.
        reserve_bytes: disk space to leave free.
    """

    mode: Literal["auto", "link", "reflink", "copy"]
    reserve_bytes: int


class Staged(Struct, frozen=True):
    """A complete attempt directory.

    Attributes:
        files: number of inputs. bytes: their size together.
        linked, copied, reflinked: how many of them were placed in each way.
    """

    directory: str
    files: int
    bytes: int
    linked: int
    copied: int
    reflinked: int


def stage(
    plan: StagePlan,
    policy: StagingPolicy,
    *,
    alive: Callable[[], bool] = lambda: True,
    progress: Callable[[int], object] = lambda _: None,
) -> Staged:
    """Make the attempt directory ready for its job.

    A complete one stays as it is; so does one whose job has started.

    Args:
        alive: turns false when the work is no longer ours; asked for every megabyte read, and before the end.
        progress: is told the numbers of bytes verified.

    Raises:
        InputError: inputs have no good copy, or not in the way the policy insists on; every one with every place.
        HeldError: there is no reachable copy, also since a location is away; or too little disk space.
        UnavailableError: a file system does not answer or refuses, or `alive` turned false.
        WfmError: the job of another plan has started in this directory.
    """
    directory = plan.spec.directory
    wanted = jobs.inputs(plan)
    if homeless := [i.label for i in wanted if not i.sources]:
        raise HeldError(f"held: no reachable copy of {jobs.listed(homeless, '; ')}")
    document = _json(jobs.manifest(plan))
    workshop = os.path.join(directory, _WORKSHOP + os.urandom(8).hex())
    watch = Watch(alive, progress)
    try:
        os.makedirs(workshop)  # first of all: whoever comes later can take it away
        standing = _standing(directory, document)
        if any(runjob.present(os.path.join(directory, name)) for name in (CLAIM, EXIT_RECORD)):
            if standing is None:
                raise WfmError(f"{directory} was used by a job with other inputs or another configuration")
            return _summary(directory, standing)
        _take_over(workshop)
        if standing is not None:
            return _summary(directory, standing)
        if runjob.present(os.path.join(directory, jobs.MANIFEST)):  # of another plan: the manifest goes first
            _remove(directory, jobs.MANIFEST, jobs.INPUT, jobs.WORKSPACE)
        for name in jobs.directories(plan.facts.step):
            os.makedirs(os.path.join(directory, name), exist_ok=True)
        placed = _place_all(wanted, directory, workshop, policy, watch)
        watch.check()
        return _summary(directory, _seal(plan, placed, document, workshop))
    except (HeldError, InputError):
        _give_back(directory, workshop)
        raise
    except OSError as error:
        if error.errno in (*_NO_SPACE, errno.EIO):  # after EIO from a sync, what is read may not be on the disk
            _give_back(directory, workshop)
        if error.errno in _NO_SPACE:
            raise HeldError(f"held: disk: full while staging at {directory}", DISK_RETRY_SECONDS) from error
        raise UnavailableError(f"staging at {directory}: {error}") from error
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _standing(directory: str, document: bytes) -> tuple[StagedInput, ...] | None:
    """The inputs of a directory that was staged completely before, with this very manifest."""
    with suppress(FileNotFoundError, msgspec.DecodeError):
        if _read(os.path.join(directory, jobs.MANIFEST)) == document:
            return msgspec.json.decode(_read(os.path.join(directory, jobs.STAGED)), type=tuple[StagedInput, ...])
    return None


def _take_over(workshop: str) -> None:
    """Remove what others left unfinished, and with it their means to go on."""
    place, mine = os.path.split(workshop)
    _remove(place, *(name for name in os.listdir(place) if name.startswith(_WORKSHOP) and name != mine))


def _summary(directory: str, staged: Sequence[StagedInput]) -> Staged:
    ways = Counter(s.how for s in staged)
    return Staged(
        directory,
        files=len(staged),
        bytes=sum(s.size for s in staged),
        linked=ways["link"],
        copied=ways["copy"],
        reflinked=ways["reflink"],
    )


def _give_back(directory: str, workshop: str) -> None:
    """Free the space that inputs take; unless another worker took over (and removed the workshop): they are its own."""
    if os.path.isdir(workshop):
        for name in (jobs.INPUT, jobs.WORKSPACE):
            shutil.rmtree(os.path.join(directory, name), ignore_errors=True)


# --- which copy, which way ---


class _Search(Struct):
    """What is known of the copies of one input.

    Attributes:
        kept: a file of the right size is in place, from an earlier try.
        copies: path and way of placing of each copy that may be good, best first.
        away: locations of copies, that are not there at all. unreachable: copies that do not answer.
        absent: those that are not there, or not in the way the policy insists on.
        bad: those that are not as they should be.
    """

    item: Input
    kept: bool
    copies: list[tuple[str, How]] = []
    away: list[str] = []
    unreachable: list[str] = []
    absent: list[str] = []
    bad: list[str] = []


def _place_all(
    wanted: Sequence[Input], directory: str, workshop: str, policy: StagingPolicy, watch: Watch
) -> list[tuple[Input, str, How]]:
    """Place every input; returns each with its source and the way it went."""
    searches = [_search(item, directory, workshop, policy) for item in wanted]
    _insist([s for s in searches if not (s.copies or s.kept)])
    needed = sum(s.item.size for s in searches if not s.kept and s.copies[0][1] == "copy")
    disk = os.statvfs(directory)
    free = disk.f_bavail * disk.f_frsize
    if free - needed < policy.reserve_bytes:
        text = f"needs {_gb(needed)} and {_gb(policy.reserve_bytes)} in reserve, {_gb(free)} free at {directory}"
        raise HeldError(f"held: disk: {text}", DISK_RETRY_SECONDS)

    placed: list[tuple[Input, str, How]] = []
    lost: list[_Search] = []
    for search in searches:
        if copy := _place(search, directory, workshop, watch):
            placed.append((search.item, *copy))
        else:
            lost.append(search)
    _insist(lost)
    _report(directory, workshop, [s for s in searches if s.bad])
    return placed


def _search(item: Input, directory: str, workshop: str, policy: StagingPolicy) -> _Search:
    """Look at the copies without reading them."""
    search = _Search(item, _is_kept(os.path.join(directory, item.path), item.size))
    mode = policy.mode if item.raw else "auto"
    for source in item.sources:
        try:
            found = os.stat(source)
            if not stat.S_ISREG(found.st_mode):
                search.bad.append(f"{source} is not a regular file")
            elif found.st_size != item.size:
                search.bad.append(f"{source} has {found.st_size} bytes instead of {item.size}")
            elif mode in ("auto", "link") and not _is_alterable(source):
                search.copies.append((os.path.realpath(source), "link"))
            elif mode in ("auto", "reflink") and _can_clone(source, workshop, afresh=mode == "reflink"):
                search.copies.append((source, "reflink"))
            elif mode in ("auto", "copy"):
                search.copies.append((source, "copy"))
            else:
                search.absent.append(f"{source} allows no {mode}, on which staging_mode = {mode} insists")
        except OSError as error:
            if location := _away(item, source):
                search.away.append(location)
            elif isinstance(error, _MISSING):
                search.absent.append(f"{source} is missing")
            else:
                search.unreachable.append(str(error))
    return search


def _away(item: Input, source: str) -> str | None:
    """The location of a copy, if the root of all that lies there is no directory now: then nothing is missing yet."""
    for location, root in item.roots.items():
        if root and source.startswith(f"{root.rstrip('/')}/") and not os.path.isdir(root):
            return f"location {location} is not there, no directory {root}"
    return None


def _insist(lost: Sequence[_Search]) -> None:
    """End with what is wrong if there are inputs without a good copy; what is away or does not answer may be good."""
    if away := sorted({location for s in lost for location in s.away}):
        raise HeldError(f"held: {jobs.listed(away, '; ')} (is it mounted?)")
    if unreachable := [text for s in lost for text in s.unreachable]:
        raise UnavailableError(f"inputs cannot be read: {jobs.listed(unreachable, '; ')}")
    if lost:
        texts = [f"{s.item.label} has no good copy: {'; '.join(s.absent + s.bad)}" for s in lost]
        raise InputError(jobs.listed(texts, "\n"))


def _is_kept(path: str, size: int) -> bool:
    try:
        found = os.lstat(path)
    except _MISSING:
        return False
    return stat.S_ISREG(found.st_mode) and found.st_size == size


def _is_alterable(source: str) -> bool:
    """Whether the user of this process could write to the file, put another in its place, or allow himself to."""
    me, real = os.geteuid(), os.path.realpath(source)
    return me == 0 or any(
        os.stat(path).st_uid == me or os.access(path, os.W_OK, effective_ids=True)
        for path in (real, os.path.dirname(real))
    )


_unshared: set[tuple[int, int]] = set()
"""File systems (of source and target) that were seen to share no extents; saves a trial for every file."""


def _can_clone(source: str, workshop: str, *, afresh: bool) -> bool:
    """Whether a reflink of this file is possible; found out by making one in the workshop.

    Args:
        afresh: do not believe what was seen before: the numbers of file systems are given again after a mount.
    """
    pair = os.stat(source).st_dev, os.stat(workshop).st_dev
    if pair in _unshared and not afresh:
        return False
    try:
        with open(os.path.join(workshop, "trial"), "wb") as trial:
            _clone(source, trial)
    except OSError as error:
        if error.errno not in _NO_CLONES:
            return True  # another fault comes again, and is reported, when it counts
        if error.errno != errno.EINVAL:  # which may be this file's alone
            _unshared.add(pair)
        return False
    return True


# --- placing ---


class _UnreadableError(Exception):
    """A copy does not answer; another may."""


def _place(search: _Search, directory: str, workshop: str, watch: Watch) -> tuple[str, How] | None:
    """Bring one input to its place; returns its source and the way, or None if no copy is good."""
    item = search.item
    target = os.path.join(directory, item.path)
    if search.kept:
        with suppress(_UnreadableError):
            if jobs.checksum(_chunks(target, item.size), watch) == item.checksum:
                return item.sources[0], "copy"
    os.makedirs(os.path.dirname(target), exist_ok=True)
    unfinished = os.path.join(workshop, "file")
    for source, how in search.copies:
        try:
            found = _WAYS[how](source, unfinished, item.size, watch)
        except _UnreadableError as error:
            search.unreachable.append(str(error))
        else:
            if found == item.checksum:
                os.replace(unfinished, target)
                return source, how
            search.bad.append(f"{source} has {found} instead of {item.checksum}")
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
    return None


def _chunks(path: str, size: int) -> Iterator[memoryview]:
    """The bytes of a file; its faults are told from those of the disk that we write to."""
    try:
        with open(path, "rb", buffering=0) as file:
            yield from jobs.chunks(file, size)
    except OSError as error:
        raise _UnreadableError(f"{path}: {error}") from error


def _link(source: str, target: str, size: int, watch: Watch) -> str:
    os.symlink(source, target)
    return jobs.checksum(_chunks(target, size), watch)


def _reflink(source: str, target: str, size: int, watch: Watch) -> str:
    with open(target, "xb") as clone:
        os.fchmod(clone.fileno(), 0o444)
        try:
            _clone(source, clone)
        except OSError as error:
            raise _UnreadableError(f"{source}: {error}") from error
    return jobs.checksum(_chunks(target, size), watch)


def _clone(source: str, target: BinaryIO) -> None:
    with open(source, "rb") as original:
        fcntl.ioctl(target, _FICLONE, original.fileno())


def _copy(source: str, target: str, size: int, watch: Watch) -> str:
    with open(target, "xb") as copy:
        found = jobs.checksum(_chunks(source, size), watch, copy.write)
        os.fchmod(copy.fileno(), 0o444)
    return found


_WAYS: Mapping[How, Callable[[str, str, int, Watch], str]] = {"link": _link, "reflink": _reflink, "copy": _copy}
"""Each makes the target out of the source, and returns the checksum of what the job will read there."""


# --- the end ---


def _report(directory: str, workshop: str, searches: Sequence[_Search]) -> None:
    """Leave word of bad copies that were passed over: for operators, and in a log file of the attempt."""
    lines = [f"{s.item.label}: passed over {'; '.join(s.bad)}" for s in searches]
    for line in lines:
        log.warning("%s", line)
    if lines:
        _write(os.path.join(directory, jobs.STAGING_LOG), "".join(f"{x}\n" for x in lines).encode(), workshop)
    else:
        _remove(directory, jobs.STAGING_LOG)


def _seal(
    plan: StagePlan, placed: Sequence[tuple[Input, str, How]], document: bytes, workshop: str
) -> list[StagedInput]:
    """Make everything durable, and say so with the manifest."""
    directory = plan.spec.directory
    jobs.sync_all(os.path.join(directory, item.path) for item, _, how in placed if how != "link")
    staged = []
    for item, source, how in placed:
        seen = os.stat(os.path.join(directory, item.path))
        staged.append(
            StagedInput(item.path, source, how, seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns, item.checksum)
        )
    _write(os.path.join(directory, jobs.STAGED), _json(msgspec.to_builtins(staged)), workshop)
    step = os.path.dirname(os.path.dirname(directory))
    inode = os.stat(step).st_ino
    jobs.sync_all(_directories(plan, staged, rooted=_rooted.get(step) == inode))
    _rooted[step] = inode
    _write(os.path.join(directory, jobs.MANIFEST), document, workshop)
    jobs.sync_all([os.path.join(directory, jobs.CONFIG)])
    return staged


_rooted: dict[str, int] = {}
"""Directories of steps, with their inodes, whose way from the base this process has made durable: there are few."""


def _directories(plan: StagePlan, staged: Sequence[StagedInput], *, rooted: bool) -> set[str]:
    """Every directory that staging has put something in; of those above the attempt, up to the step's or the base."""
    top = plan.spec.directory
    base = os.path.dirname(os.path.dirname(top)) if rooted else plan.facts.base_directory.rstrip("/")
    made = [*jobs.directories(plan.facts.step), *(s.path for s in staged)]
    found: set[str] = set()
    for name in made:
        path = os.path.dirname(os.path.join(top, name))
        while path not in found and (f"{path}/".startswith(f"{base}/") or f"{path}/".startswith(f"{top}/")):
            found.add(path)
            path = os.path.dirname(path)
    return found


# --- files ---


def _json(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, indent=2, ensure_ascii=False).encode() + b"\n"


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _write(path: str, content: bytes, workshop: str) -> None:
    """Write a file durably; it appears complete or not at all."""
    unfinished = os.path.join(workshop, os.path.basename(path))
    with open(unfinished, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _remove(directory: str, *names: str) -> None:
    for path in (os.path.join(directory, name) for name in names):
        with suppress(FileNotFoundError):
            if os.path.isdir(path) and not os.path.islink(path):
                shutil.rmtree(path)
            else:
                os.unlink(path)


def _gb(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
