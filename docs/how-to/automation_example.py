"""A system of its own that works hand in hand with wfm; docs/how-to/automation.md explains it.

When wfm has a new result, this program does its work on it (here: it prints a line), and announces the follow-up
exposure of the same field, which its archive has registered but told nobody of.

    QUICKLOOK_REDIS_URL=redis://quicklook:PASSWORD@HOST python automation_example.py CURSOR_FILE
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import redis

EVENTS, ARRIVED = "wfm:{1}:events", "wfm:{1}:data.arrived"  # of processing location 1
GROUP = CONSUMER = "quicklook"
KIND = "run.collected"
PAGE = 1000
PATIENCE = 30.0
"""Seconds after which the log is read although nobody told us anything."""


def told(client: redis.Redis) -> bool:
    """Whether the stream told of a result; waits for up to two seconds. Losing such a message loses no result."""
    try:
        reply = client.xreadgroup(GROUP, CONSUMER, {EVENTS: ">"}, count=1000, block=2000, noack=True)
    except redis.ResponseError as error:
        if not str(error).startswith("NOGROUP"):
            raise
        client.xgroup_create(EVENTS, GROUP, id="0", mkstream=True)  # the first time, and after Redis was emptied
        return True
    return any(json.loads(fields[b"event"])["type"] == KIND for _, entries in reply for _, fields in entries)


def catch_up(client: redis.Redis, cursor_file: Path) -> None:
    """React to every result in the log that comes after the saved cursor."""
    while True:
        cursor = cursor_file.read_text() if cursor_file.exists() else "0-0"
        words = ["wfm", "events", "list", "--type", KIND, "--after", cursor, "--limit", str(PAGE), "--json"]
        page = json.loads(subprocess.run(words, check=True, stdout=subprocess.PIPE).stdout)
        for event in page["events"]:
            react(client, event)
            save(cursor_file, event["cursor"])
        save(cursor_file, page["cursor"])
        if len(page["events"]) < PAGE:
            return


def react(client: redis.Redis, event: dict) -> None:
    """Our own work. Killed before the cursor is saved, we do it again: twice must be as good as once."""
    body = event["body"]
    print(event["id"], f"{body['pipeline']}/{body['step']}", body["unit"], flush=True)
    field, _, _ = body["unit"].rpartition("-")  # without the digest at its end
    client.xadd(ARRIVED, {"event": json.dumps({"raw_data_package": f"follow-up-{field}"})})


def save(cursor_file: Path, cursor: str) -> None:
    """Replace the cursor; whoever is killed meanwhile finds the old one."""
    fresh = cursor_file.with_suffix(".new")
    fresh.write_text(cursor)
    fresh.replace(cursor_file)


def main() -> None:
    """Work until killed; whatever breaks is tried again."""
    client = redis.Redis.from_url(os.environ["QUICKLOOK_REDIS_URL"], socket_timeout=10, protocol=2)
    cursor_file = Path(sys.argv[1])
    look_at = 0.0
    while True:
        try:
            news = told(client)
            if news or time.monotonic() >= look_at:
                catch_up(client, cursor_file)
                # What we were told of is in the log a little later while some older transaction is open.
                look_at = time.monotonic() + (1.0 if news else PATIENCE)
        except (redis.RedisError, subprocess.CalledProcessError) as error:
            print(f"trying again: {error}", file=sys.stderr, flush=True)
            look_at = 0.0
            time.sleep(1.0)


if __name__ == "__main__":
    main()
