"""Products out: what a job left behind, checked against the contract, hashed, made durable and read-only.

What lies where decides what it is: below ``output/science``, ``qa``, ``plots``, ``statistics`` and ``logs`` of a final
step, below ``workspace/<step>/`` of an intermediate one, and below ``logs/`` of both. Nothing else is looked at.

* Symbolic links: one to a file of the same attempt counts as a file with that content. One that leads elsewhere,
  nowhere or to a directory is refused: the attempt would not be complete in itself.
* Hard links are fine where all names of a file lie in the attempt. Else a file of somebody else would be made
  read-only, and he could change the product.
* Files that are hidden or temporary by their name are passed over with a warning.
* Products become read-only; directories stay as they are, so that a purge can remove them.

Nothing here changes what a repeated collection finds.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import PurePosixPath
from typing import Any

import msgspec
from msgspec import Struct

from wfm import jobs
from wfm.backends import runjob
from wfm.errors import InputError, OutputError, UnavailableError, WfmError
from wfm.jobs import StagedInput, Watch
from wfm.model import PRODUCT_DIRECTORIES, ProductType

METRICS_BYTES = 1_000_000
"""The largest JSON file below ``output/qa/`` that is read for metrics."""

_PASSED_OVER = re.compile(r"\.(?!z(array|attrs|group|metadata)\Z)|.*(~|\.tmp|\.part)\Z", re.DOTALL)  # those make a Zarr
_UNFIT_NAME = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # surrogates stand for what is not UTF-8


class Product(Struct, frozen=True):
    """A file that a run produced.

    Attributes:
        path: relative to the attempt directory.
        size: bytes.
        checksum: ``sha256:`` and 64 hexadecimal digits.
        metrics: of a QA_METRIC that is a JSON object: its numbers, texts and truths, one level of nesting flattened to
            ``outer.inner``.
    """

    type: ProductType
    path: str
    size: int
    checksum: str
    metrics: dict[str, Any]


class Collected(Struct, frozen=True):
    """The products of an attempt in the order of their paths, and remarks for people."""

    products: tuple[Product, ...]
    warnings: tuple[str, ...]


def collect(
    directory: str,
    *,
    step: str,
    final: bool,
    alive: Callable[[], bool] = lambda: True,
    progress: Callable[[int], object] = lambda _: None,
) -> Collected:
    """Find, check, hash and protect the products of an attempt whose job has ended.

    Args:
        directory: the attempt's.
        final: no other step depends on this one.
        alive: turns false when the work is no longer ours; asked for every megabyte read.
        progress: is told the numbers of bytes hashed.

    Raises:
        InputError: the job altered its inputs; every one.
        OutputError: the output breaks the contract, with every fault; or there is none.
        UnavailableError: a file system does not answer, a file still changes, or `alive` turned false.
        WfmError: a product could not be made durable: only another computation can help.
    """
    watch = Watch(alive, progress)
    try:
        if altered := verify_inputs(directory, watch):
            raise InputError(f"input altered by the job: {jobs.listed(altered)}")
        files, warnings = _find(directory, step, final)
        _protect(directory, files)
        products = []
        for file in files:
            checksum = _checksum(file, watch)
            metrics, remarks = _metrics(file)
            products.append(Product(file.type, file.path, file.size, checksum, metrics))
            warnings += remarks
        return Collected(tuple(products), tuple(warnings))
    except OSError as error:
        raise UnavailableError(f"collecting from {directory}: {error}") from error


# --- inputs ---


def verify_inputs(directory: str, watch: Watch = Watch()) -> list[str]:  # noqa: B008 - immutable
    """The inputs of an attempt that are no longer what was staged; as paths relative to the directory.

    Only what was touched since is read again.

    Raises:
        InputError: the record of staging is gone or damaged.
        UnavailableError: see `Watch.check`. OSError: the file system does not answer.
    """
    record = os.path.join(directory, jobs.STAGED)
    try:
        with open(record, "rb") as file:
            staged = msgspec.json.decode(file.read(), type=tuple[StagedInput, ...])
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError) as error:
        os.stat(directory)  # of a whole attempt out of sight, nothing can be said
        raise InputError(f"inputs cannot be verified, the record of staging is gone or damaged: {error}") from error
    return [s.path for s in staged if not all(_is_unchanged(p, s, watch) for p in _paths(directory, s))]


def _paths(directory: str, staged: StagedInput) -> list[str]:
    path = os.path.join(directory, staged.path)
    return [path, staged.source] if staged.how == "link" else [path]


def _is_unchanged(path: str, staged: StagedInput, watch: Watch) -> bool:
    try:
        seen = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        return False
    if (seen.st_size, seen.st_mtime_ns, seen.st_ctime_ns) == (staged.size, staged.mtime_ns, staged.ctime_ns):
        return True
    if not stat.S_ISREG(seen.st_mode) or seen.st_size != staged.size:
        return False
    with open(path, "rb", buffering=0) as file:
        return jobs.checksum(jobs.chunks(file, staged.size), watch) == staged.checksum


# --- what is there ---


class _File(Struct, frozen=True):
    """A file to register.

    Attributes:
        path: relative to the attempt directory. real: absolute path without links. status: of the real file.
    """

    type: ProductType
    path: str
    real: str
    status: os.stat_result

    @property
    def size(self) -> int:
        return self.status.st_size


def _find(directory: str, step: str, final: bool) -> tuple[list[_File], list[str]]:
    """The files that are products, in the order of their paths, and warnings.

    Raises:
        OutputError: with every fault.
    """
    root = jobs.output_directory(step, final)
    faults: list[str] = []
    passed_over: list[str] = []
    files: list[_File] = []
    for tree in (root, jobs.LOGS):
        for path, real, status in _walk(directory, tree, faults, passed_over):
            if type_ := _type(path, final):
                files.append(_File(type_, path, real, status))
            else:
                allowed = ", ".join(f"{root}/{name}/" for name in PRODUCT_DIRECTORIES)
                faults.append(f"{_shown(path)}: allowed is a place below {allowed}")
    faults += [f"{f.path}: is a hard link to a file outside the attempt" for f in _foreign(directory, files)]
    if faults:
        raise OutputError(jobs.listed([f"step {step!r} breaks the output contract:", *sorted(faults)], "\n"))

    warnings = [f"passed over as hidden or temporary: {jobs.listed(sorted(passed_over))}"] if passed_over else []
    results = [f for f in files if f.type is not ProductType.LOG]
    if not results:
        raise OutputError("; ".join([f"step {step!r} wrote no result below {root}/ (WORKFLOW_OUTPUT_DIR)", *warnings]))
    if empty := sorted(f.path for f in results if not f.size):
        warnings.append(f"empty: {jobs.listed(empty)}")
    return sorted(files, key=lambda f: f.path), warnings


def _type(path: str, final: bool) -> ProductType | None:
    """What the place of a file says of it; None if that is not allowed."""
    top, *rest = path.split("/")
    if top == jobs.LOGS:
        return ProductType.LOG
    if not final:
        return ProductType.INTERMEDIATE
    return PRODUCT_DIRECTORIES.get(rest[0]) if len(rest) > 1 else None


def _walk(
    directory: str, tree: str, faults: list[str], passed_over: list[str]
) -> Iterator[tuple[str, str, os.stat_result]]:
    """Relative path, real path and status of every file below a tree of the attempt; the lists take what is none."""
    top = os.path.realpath(directory)
    if not runjob.present(os.path.join(directory, tree)):
        return
    if os.path.realpath(os.path.join(directory, tree)) != os.path.join(top, tree):
        faults.append(f"{tree}: was replaced by a link")
        return
    folders = [tree]
    while folders:
        folder = folders.pop()
        for name in os.listdir(os.path.join(directory, folder)):
            path = f"{folder}/{name}"
            real = os.path.join(top, path)
            if _PASSED_OVER.match(name):
                passed_over.append(_shown(path))
                continue
            if _UNFIT_NAME.search(name):
                faults.append(f"{_shown(path)}: a name must be UTF-8 without control characters")
                continue
            status = os.lstat(real)
            linked = stat.S_ISLNK(status.st_mode)
            if linked:
                try:
                    real = os.path.realpath(real, strict=True)
                except OSError as error:
                    if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                        raise
                    faults.append(f"{path}: is a link that leads nowhere")
                    continue
                if not real.startswith(f"{top}/"):
                    faults.append(f"{path}: is a link that leads out of the attempt, to {_shown(real)}")
                    continue
                status = os.stat(real)
            if stat.S_ISREG(status.st_mode):
                yield path, real, status
            elif not stat.S_ISDIR(status.st_mode):
                faults.append(f"{path}: is neither a file nor a directory")
            elif linked:
                faults.append(f"{path}: is a link to a directory")
            else:
                folders.append(path)


def _foreign(directory: str, files: Sequence[_File]) -> list[_File]:
    """The files that have a name outside the attempt directory."""
    suspects = [f for f in files if f.status.st_nlink > 1]
    names: Counter[tuple[int, int]] = Counter()
    if suspects:
        for folder, _, entries in os.walk(directory, onerror=_raise):
            for entry in entries:
                status = os.lstat(os.path.join(folder, entry))
                names[status.st_dev, status.st_ino] += 1
    return [f for f in suspects if f.status.st_nlink > names[f.status.st_dev, f.status.st_ino]]


def _raise(error: OSError) -> None:
    raise error


# --- what is in it ---


def _protect(directory: str, files: Sequence[_File]) -> None:
    """Make products read-only, and them and the way to them durable.

    Raises:
        WfmError: the disk did not keep something. It says so once; the next sync would succeed all the same.
    """
    for file in files:
        if stat.S_IMODE(file.status.st_mode) != 0o444:
            with suppress(PermissionError):  # it belongs to another user, whom the job ran as
                os.chmod(file.real, 0o444)
    # The attempt's own directory is durable since the exit record, the job's last act, was made so.
    folders = {os.path.join(directory, p) for f in files for p in PurePosixPath(f.path).parents if p.name}
    try:
        jobs.sync_all([*(f.real for f in files), *folders])
    except OSError as error:
        if error.filename is not None:  # it was not even opened
            raise
        raise WfmError(f"the disk did not keep the products in {directory}: {error}") from error


def _checksum(file: _File, watch: Watch) -> str:
    with open(file.real, "rb", buffering=0) as content:
        before = _stamp(content)
        checksum = jobs.checksum(jobs.chunks(content, file.size), watch)
        if _stamp(content) != before or before[0] != file.size:
            raise UnavailableError(f"{file.path}: changed while it was read; is somebody still writing it?")
    return checksum


def _stamp(file: FileIO) -> tuple[int, int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _metrics(file: _File) -> tuple[dict[str, Any], list[str]]:
    """The metrics in a product, and remarks on what is left out."""
    if file.type is not ProductType.QA_METRIC or not file.path.endswith(".json"):
        return {}, []
    if file.size > METRICS_BYTES:
        return {}, [f"{file.path}: no metrics: larger than {METRICS_BYTES} bytes"]
    with open(file.real, "rb") as content:
        text = content.read()
    try:
        found = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        return {}, [f"{file.path}: no metrics: {error}"]
    if not isinstance(found, dict):
        return {}, [f"{file.path}: no metrics: not a JSON object"]
    flat: dict[str, Any] = {}
    for outer, value in found.items():
        flat |= {f"{outer}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {outer: value}
    metrics = {key: value for key, value in flat.items() if _is_storable(key) and _is_storable(value)}
    left_out = [_shown(key) for key in flat if key not in metrics]
    remarks = [f"{file.path}: neither number, text nor truth, left out: {jobs.listed(left_out)}"] if left_out else []
    return metrics, remarks


def _is_storable(value: object) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and "\0" not in value)


def _shown(text: str) -> str:
    return text if text.isprintable() else ascii(text)
