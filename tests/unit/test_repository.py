"""What holds for the repository as a whole: links, the built wheel, one copy of what is declared twice."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PAGES = [TOP / "README.md", TOP / "CHANGELOG.md", *sorted((TOP / "docs").rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(TOP)))
def test_links_between_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_wheel_works_elsewhere(tmp_path):
    """Statecharts and default settings ship in the wheel from their one source."""
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(TOP)],
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"wfm/statecharts/run.yaml", "wfm/statecharts/run-1.yaml"} <= set(names)
    assert "wfm/settings.toml" in names
    # The dependencies of this environment, and nothing of this checkout.
    site = next(p for p in sys.path if p.endswith("site-packages"))
    venv.create(tmp_path / "v", with_pip=False)
    there = tmp_path / "there"
    with zipfile.ZipFile(wheel) as z:
        z.extractall(there)
    done = subprocess.run(
        [str(tmp_path / "v" / "bin" / "python"), "-P", "-m", "wfm", "charts", "check"],
        env={"PYTHONPATH": f"{there}:{site}", "PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert str(there) in done.stdout + done.stderr or "run" in done.stdout
