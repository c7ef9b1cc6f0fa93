"""The README's own pipeline, exactly as it is written there but for the path of the archive."""

from __future__ import annotations

import re
import shlex

from tests.acceptance.test_demo import REPOSITORY, Home
from tests.acceptance.test_demo import home as home  # noqa: PLC0414 - a fixture
from tests.harness import wait_until


def test_the_readmes_own_pipeline(home: Home) -> None:
    readme = (REPOSITORY / "README.md").read_text()
    section = readme.partition("## Your own pipeline")[2].partition("\n## ")[0]
    archive = home.folder / "archive"
    (archive / "night1").mkdir(parents=True)
    (archive / "night1" / "a.fits").write_bytes(b"x" * 1000)
    (document,) = re.findall(r"```yaml\n(.*?)```", section, re.DOTALL)
    (home.folder / "mine.yaml").write_text(document.replace("/path/to/archive", str(archive)))
    (block,) = re.findall(r"```\n(wfm up.*?)```", section, re.DOTALL)
    for line in block.replace("/path/to/archive", str(archive)).splitlines():
        words = shlex.split(line)[1:]
        if words[:2] != ["runs", "watch"]:
            home.wfm(*words)
    wait_until(lambda: [line["state"] for line in home.json("why", "sizes")] == ["covered"], what="covered")
    (run,) = home.json("runs", "list")
    home.wfm("try", "sizes/count", run["unit"])
