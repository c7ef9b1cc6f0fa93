"""Names, directories, commands and manifests of attempts."""

from __future__ import annotations

import hashlib
import io
import json
from itertools import permutations
from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wfm import jobs
from wfm.errors import InputError, UnavailableError, UsageError
from wfm.jobs import InputFile, InputProduct, JobFacts, StagePlan, Watch
from wfm.model import Resources

ATTEMPT = "/base/maps/reduce/ngc253-0f1e/r42-a3"
SHA = "sha256:" + "0" * 64


def facts(**changes: Any) -> JobFacts:
    standard = JobFacts(
        location_id=1,
        run_id=42,
        attempt=3,
        pipeline="maps",
        made_as="reduce",
        step="reduce",
        final=False,
        unit_key="ngc253-0f1e",
        unit_values={"source": "NGC253"},
        software="reducer",
        version="1.2.0",
        command=("reduce", "--all"),
        environment={"THREADS": "2"},
        resources=Resources(cpu=2, memory_gb=4),
        config_parameters={"threshold": 3.5, "beam": {"fwhm": 12}},
        base_directory="/base",
        python="/venv/bin/python",
    )
    return msgspec.structs.replace(standard, **changes)


def raw(package: str, name: str) -> InputFile:
    return InputFile(package, name, 10, SHA, ("/archive/x",))


def result(name: str, step: str = "calibrate", unit: str = "all") -> InputProduct:
    return InputProduct(7, step, unit, "INTERMEDIATE", name, "/base/x", 10, SHA)


def plan(*files: InputFile, products: tuple[InputProduct, ...] = (), **changes: Any) -> StagePlan:
    return StagePlan(jobs.build_spec(facts(**changes)), facts(**changes), files, products)


def paths(*files: InputFile, products: tuple[InputProduct, ...] = ()) -> list[str]:
    return [i.path for i in jobs.inputs(plan(*files, products=products))]


def test_a_job_is_named_after_its_attempt() -> None:
    spec = jobs.build_spec(facts())
    assert spec.name == jobs.job_name(1, 42, 3) == "wfm-1-r42-a3"
    assert spec.directory == ATTEMPT
    assert spec.working_directory == f"{ATTEMPT}/workspace/reduce"
    assert spec.working_directory.removeprefix(f"{ATTEMPT}/") in jobs.directories("reduce")
    assert spec.resources == Resources(cpu=2, memory_gb=4)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\0b"])
def test_a_name_that_leads_elsewhere_is_no_directory(name: str) -> None:
    with pytest.raises(UsageError) as error:
        jobs.attempt_directory("relative", name, name, name, 1, 1)
    lines = str(error.value).splitlines()
    assert [x.split()[0] for x in lines] == ["base", "pipeline", "step", "unit"], "all faults at once"
    assert repr(name) in lines[1]
    assert "allowed" in lines[1]


def test_the_environment_gives_the_paths_of_the_contract() -> None:
    environment = jobs.build_spec(facts()).environment
    assert environment == {
        "THREADS": "2",
        "WORKFLOW_INPUT_DIR": f"{ATTEMPT}/input",
        "WORKFLOW_WORKSPACE_DIR": f"{ATTEMPT}/workspace",
        "WORKFLOW_OUTPUT_DIR": f"{ATTEMPT}/workspace/reduce",
        "WORKFLOW_CONFIG_DIR": f"{ATTEMPT}/config",
        "WORKFLOW_LOG_DIR": f"{ATTEMPT}/logs",
        "WORKFLOW_MANIFEST": f"{ATTEMPT}/config/manifest.json",
        "WORKFLOW_RUN_ID": "42",
        "WORKFLOW_ATTEMPT": "3",
        "WORKFLOW_STEP": "reduce",
    }
    assert jobs.build_spec(facts(final=True)).environment["WORKFLOW_OUTPUT_DIR"] == f"{ATTEMPT}/output"


def test_a_step_cannot_override_the_contract() -> None:
    spec = jobs.build_spec(facts(environment={"WORKFLOW_OUTPUT_DIR": "/archive", "OMP_NUM_THREADS": "1"}))
    assert spec.environment["WORKFLOW_OUTPUT_DIR"] == f"{ATTEMPT}/workspace/reduce"
    assert spec.environment["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize("word", ["python", "python3"])
def test_python_means_the_interpreter_of_wfm(word: str) -> None:
    assert jobs.build_spec(facts(command=(word, "-m", "python"))).command == ("/venv/bin/python", "-m", "python")


@pytest.mark.parametrize("command", [("reduce", "python"), ("/usr/bin/python3", "x.py"), ("python3.12",), ()])
def test_any_other_command_stays(command: tuple[str, ...]) -> None:
    assert jobs.build_spec(facts(command=command)).command == command


def test_every_input_has_its_place() -> None:
    assert paths(raw("scan2", "a.fits"), raw("scan1", "sub/a.fits"), products=(result("map.fits"),)) == [
        "input/scan1/sub/a.fits",
        "input/scan2/a.fits",
        "workspace/calibrate/all/map.fits",
    ]


def test_the_place_of_a_file_does_not_depend_on_the_others() -> None:
    alone = paths(raw("scan1", "a.fits"))
    assert alone[0] in paths(raw("scan1", "a.fits"), raw("scan2", "a.fits"))


@pytest.mark.parametrize("package", ["..", ".", ".hidden", "2025/11/scan", "/etc", "µ" * 200, "a%2Fb"])
def test_any_package_name_gives_one_plain_directory(package: str) -> None:
    (path,) = paths(raw(package, "a.fits"))
    top, directory, name = path.split("/")
    assert (top, name) == ("input", "a.fits")
    assert not directory.startswith(".")
    assert len(directory.encode()) <= 255


@given(st.lists(st.text(st.sampled_from("aä./%F2E-"), min_size=1), unique=True, min_size=2))
@example(["a/b", "a%2Fb"])
@example([".a", "%2Ea"])
def test_unequal_packages_have_unequal_directories(packages: list[str]) -> None:
    assert len(set(paths(*(raw(p, "f") for p in packages)))) == len(packages)


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", "", ".", "a//b", "a/", "x\0y"])
def test_no_input_leads_out_of_its_directory(name: str) -> None:
    with pytest.raises(InputError, match="package scan1") as error:
        paths(raw("scan1", name), raw("scan1", "good"), products=(result(name),))
    assert "step calibrate, unit all" in str(error.value), "all faults at once"
    assert "good" not in str(error.value)


def test_two_inputs_cannot_have_one_place() -> None:
    with pytest.raises(InputError, match="the same name"):
        paths(raw("scan1", "a"), raw("scan1", "a"))
    with pytest.raises(InputError, match="file a/b: there is a file where its directory must be"):
        paths(raw("scan1", "a"), raw("scan1", "a/b"))


def test_the_manifest_tells_everything() -> None:
    found = jobs.manifest(plan(raw("scan1", "a.fits"), products=(result("map.fits"),), final=True))
    assert found == {
        "schema_version": 1,
        "run_id": 42,
        "attempt": 3,
        "pipeline": "maps",
        "step": {"name": "reduce", "is_final": True},
        "unit": {"key": "ngc253-0f1e", "values": {"source": "NGC253"}},
        "software": {"name": "reducer", "version": "1.2.0"},
        "config": {"parameters": {"threshold": 3.5, "beam": {"fwhm": 12}}},
        "resources": {"cpu": 2, "memory_gb": 4, "time_hours": None, "gpu": 0},
        "missing_observations": [],
        "input_files": [
            {
                "package": "scan1",
                "name": "a.fits",
                "path": f"{ATTEMPT}/input/scan1/a.fits",
                "size": 10,
                "checksum": SHA,
            }
        ],
        "input_products": [
            {
                "run_id": 7,
                "step": "calibrate",
                "unit": "all",
                "type": "INTERMEDIATE",
                "name": "map.fits",
                "path": f"{ATTEMPT}/workspace/calibrate/all/map.fits",
                "size": 10,
                "checksum": SHA,
            }
        ],
        "upstream": [],
        "quarantined": [],
        "workspace_dir": f"{ATTEMPT}/workspace",
        "output_dir": f"{ATTEMPT}/output",
        "log_dir": f"{ATTEMPT}/logs",
    }


def test_the_manifest_does_not_depend_on_the_order_of_the_facts() -> None:
    files = raw("s2", "a"), raw("s1", "b"), raw("s1", "a")
    products = result("b", unit="u2"), result("a", unit="u2"), result("z", unit="u1")
    texts = {
        json.dumps(jobs.manifest(plan(*f, products=p))) for f in permutations(files) for p in permutations(products)
    }
    assert len(texts) == 1


def test_a_checksum_in_one_pass() -> None:
    data = bytes(range(256)) * 10_000
    seen = bytearray()
    counted: list[int] = []
    file: Any = io.BytesIO(data)
    found = jobs.checksum(jobs.chunks(file, len(data)), Watch(progress=counted.append), seen.extend)
    assert found == f"sha256:{hashlib.sha256(data).hexdigest()}"
    assert bytes(seen) == data
    assert sum(counted) == len(data)
    assert len(counted) > 1


def test_reading_a_file_that_grows_comes_to_an_end() -> None:
    file: Any = io.BytesIO(b"12345")
    assert [bytes(c) for c in jobs.chunks(file, 3)] == [b"1234"], "one byte too many, so that it is noticed"


def test_a_checksum_stops_when_it_is_not_wanted_any_more() -> None:
    file: Any = io.BytesIO(b"x")
    with pytest.raises(UnavailableError, match="lease"):
        jobs.checksum(jobs.chunks(file, 1), Watch(alive=lambda: False))
