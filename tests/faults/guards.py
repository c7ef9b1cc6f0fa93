"""The guards of wfm, and for each how to take it away and who must notice; see `tests.faults.mutants`."""

from __future__ import annotations

from tests.faults.mutants import Mutant

_GUARDS = "tests/faults/test_guards.py"
_MAIN = "tests/integration/test_main_path.py"
_LOCAL = "tests/integration/test_local_backend.py"
_BACKEND = "tests/contract/test_backend.py"
_STAGING = "tests/integration/test_staging.py"
_COLLECT = "tests/integration/test_collect.py"

_STORE, _TASKS, _KINDS, _ROLES = "wfm/store.py", "wfm/tasks.py", "wfm/kinds.py", "wfm/roles.py"
_SERVICE, _BUS, _LOCAL_PY, _RUNJOB = "wfm/service.py", "wfm/bus.py", "wfm/backends/local.py", "wfm/backends/runjob.py"


def _guard(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    return Mutant(name, file, old, new, tests)


# Migrations; the tests' databases are at the newest revision.
_TALLIES = "wfm/migrations/versions/0006_upstream_tallies.py"
_RESTS_ON = "wfm/migrations/versions/0018_what_decisions_rest_on.py"

RUNS = [
    _guard(
        "the version in the guarded UPDATE of runs",
        _STORE,
        "WHERE r.id = m.id AND r.version = m.expected",
        "WHERE r.id = m.id",
        f"{_GUARDS}::test_a_move_that_was_decided_on_an_old_picture_is_refused",
    ),
    _guard(
        "the lock of a run",
        _STORE,
        "ORDER BY r.id FOR NO KEY UPDATE OF r",
        "ORDER BY r.id",
        f"{_GUARDS}::test_who_locks_a_run_has_it_alone",
    ),
    _guard(
        "one active run for a unit: the unique index",
        _RESTS_ON,
        '["step_id", "unit_id"],\n        unique=True,',
        '["step_id", "unit_id"],\n        unique=False,',
        f"{_GUARDS}::test_one_active_run_for_a_unit_whoever_decides",
    ),
    _guard(
        "one active run for a unit: the decision",
        "wfm/decide.py",
        "if f.active and withdraw is None:",
        "if False:",
        "tests/unit/test_decide.py",
    ),
    _guard(
        "no run for a pipeline that is being deleted",
        _STORE,
        " FOR SHARE OF p) g",
        ") g",
        f"{_GUARDS}::test_a_pipeline_that_is_being_deleted_gets_no_run",
    ),
    _guard(
        "the lock of a location's slots",
        _ROLES,
        'WHERE id = :loc FOR NO KEY UPDATE"',
        'WHERE id = :loc"',
        f"{_GUARDS}::test_two_workflow_managers_share_the_slots",
    ),
    _guard(
        "the digest checked again when a job is built",
        _ROLES,
        "if i in stale:",
        "if False:",
        f"{_GUARDS}::test_a_run_whose_inputs_changed_before_it_was_built_is_withdrawn",
    ),
    _guard(
        "newer input withdraws what has not started",
        "wfm/decide.py",
        "withdraw = f.active.id if f.active and f.active.state in _NOT_STARTED",
        "withdraw = None if f.active and f.active.state in _NOT_STARTED",
        "tests/unit/test_decide.py",
    ),
    _guard(
        "an exit record needed for success: the chart",
        "statecharts/run.yaml",
        "source: [SUBMITTED, RUNNING], dest: COLLECTING_RESULTS, guard: has_exit_record}",
        "source: [SUBMITTED, RUNNING], dest: COLLECTING_RESULTS}",
        "tests/unit/test_charts.py",
    ),
    _guard(
        "an exit record needed for success: the backend",
        _LOCAL_PY,
        'return report(JobStatus.VANISHED, "its supervisor',
        'return report(JobStatus.COMPLETED, "its supervisor',
        f"{_BACKEND}::test_a_vanished_job",
    ),
    _guard(
        "superseding goes from older to newer",
        _KINDS,
        "AND (d.run_id, d.attempt) < (older.newer, older.attempt)",
        "AND (d.run_id, d.attempt) <> (older.newer, older.attempt)",
        f"{_GUARDS}::test_of_two_results_the_older_one_is_superseded",
    ),
]

TASKS = [
    _guard(
        "the epoch of who ends a task",
        _STORE,
        "WHERE t.id = e.id AND t.epoch = e.epoch AND t.state = 'leased'",
        "WHERE t.id = e.id AND t.state = 'leased'",
        f"{_GUARDS}::test_only_who_holds_the_lease_is_heard",
    ),
    _guard(
        "a task ends once",
        _STORE,
        "WHERE t.id = e.id AND t.epoch = e.epoch AND t.state = 'leased'",
        "WHERE t.id = e.id AND t.epoch = e.epoch",
        f"{_GUARDS}::test_only_who_holds_the_lease_is_heard",
    ),
    _guard(
        "the epoch of who renews a lease",
        _STORE,
        "WHERE t.id = h.id AND t.epoch = h.epoch AND t.state = 'leased'",
        "WHERE t.id = h.id AND t.state = 'leased'",
        f"{_GUARDS}::test_only_who_holds_the_lease_is_heard",
    ),
    _guard(
        "an outcome of a lost lease is not acted on",
        _TASKS,
        "if o.task.lease not in counted:",
        "if False:",
        f"{_GUARDS}::test_the_outcome_of_a_lost_lease_moves_nothing",
    ),
    _guard(
        "a lost lease is told from the next one in the same hands",
        _TASKS,
        "if o.task.lease not in counted:",
        "if o.task.id not in {task for task, _ in counted}:",
        f"{_GUARDS}::test_a_worker_that_took_its_own_task_again_is_heard_once",
    ),
    _guard(
        "leases that ran out are taken over",
        _STORE,
        "ELSE lease_until < now() END",
        "ELSE false END",
        f"{_GUARDS}::test_a_lease_that_ran_out_is_taken_over_and_no_other",
    ),
    _guard(
        "leases that live are not taken over",
        _STORE,
        "ELSE lease_until < now() END",
        "ELSE true END",
        f"{_GUARDS}::test_a_lease_that_ran_out_is_taken_over_and_no_other",
    ),
    _guard(
        "copies of a worker lease different tasks",
        _STORE,
        "ORDER BY priority DESC, id LIMIT k.n FOR UPDATE SKIP LOCKED",
        "ORDER BY priority DESC, id LIMIT k.n",
        f"{_GUARDS}::test_two_workers_never_lease_the_same_task",
    ),
    _guard(
        "a move closes the tasks that the run no longer waits for",
        _STORE,
        "ids=[r.id for r in moved.values() if r.state not in (RunState.SUBMITTED, RunState.RUNNING)],",
        "ids=[],",
        f"{_GUARDS}::test_a_move_closes_the_tasks_that_the_run_no_longer_waits_for",
    ),
    _guard(
        "what is done is not opened again",
        _STORE,
        "WHERE task.state IN ('closed', 'failed')",
        "WHERE true",
        f"{_GUARDS}::test_a_task_that_is_done_is_not_opened_again",
    ),
    _guard(
        "a task of another attempt is not wanted",
        _KINDS,
        "if run and run.state in states and run.attempt == t.attempt:",
        "if run and run.state in states:",
        f"{_GUARDS}::test_a_task_of_another_attempt_or_state_is_not_wanted",
    ),
    _guard(
        "a task of another state is not wanted",
        _KINDS,
        "if run and run.state in states and run.attempt == t.attempt:",
        "if run and run.attempt == t.attempt:",
        f"{_GUARDS}::test_a_task_of_another_attempt_or_state_is_not_wanted",
    ),
    _guard(
        "nothing is submitted after a cancellation",
        _KINDS,
        "for i, r in staged.items() if r.state is RunState.STAGING_DATA}",
        "for i, r in staged.items()}",
        f"{_GUARDS}::test_a_stage_that_ends_after_a_cancellation_submits_nothing",
    ),
    _guard(
        "a report counts for the attempt that was asked for",
        _KINDS,
        "if (run.version, run.attempt) != (was.version, was.attempt):",
        "if False:",
        f"{_GUARDS}::test_a_report_about_an_earlier_attempt_moves_nothing",
    ),
    _guard(
        "the most tries of a task that breaks",
        _TASKS,
        "if repeatable and tries < self.max_tries:",
        "if repeatable:",
        f"{_GUARDS}::test_a_task_that_breaks_every_time_is_given_up",
    ),
    _guard(
        "the most tries of a task whose workers die",
        _TASKS,
        "            for t in tasks\n            if t.tries > self.max_tries\n",
        "            for t in tasks\n            if False\n",
        f"{_GUARDS}::test_a_task_whose_workers_die_every_time_is_given_up",
    ),
    _guard(
        "a task that cannot be prepared falls out alone",
        _TASKS,
        "            if len(tasks) == 1:\n",
        "            if True:\n",
        f"{_GUARDS}::test_a_task_that_cannot_be_prepared_harms_no_other",
    ),
    _guard(
        "an outcome that cannot be written falls out alone",
        _SERVICE,
        "                for outcome in outcomes:\n                    self._settle([outcome])\n",
        "",
        f"{_GUARDS}::test_an_outcome_that_cannot_be_written_harms_no_other",
    ),
    _guard(
        "a task that is missing is made again",
        _ROLES,
        "        _reopen_tasks(tx, overdue)\n",
        "",
        f"{_MAIN}::test_a_run_whose_task_and_message_are_gone_is_found_by_looking_again",
    ),
    _guard(
        "leases are handed back at the end",
        _SERVICE,
        "self._transact(self.work.hand_back)",
        "pass",
        f"{_GUARDS}::test_leases_in_hand_are_handed_back_at_the_end",
    ),
]

MESSAGES = [
    _guard(
        "events are marked done by their recipient",
        _SERVICE,
        "            tx.mark_done([event.id for _, event in batch if event.id is not None])\n",
        "",
        f"{_MAIN}::test_a_package_becomes_a_product",
    ),
    _guard(
        "acknowledged after the commit",
        _SERVICE,
        "        after, outbox = self._transact(work)\n",
        "        self._send([], done)\n        after, outbox = self._transact(work)\n",
        f"{_GUARDS}::test_a_message_is_kept_until_its_work_is_committed",
    ),
    _guard(
        "published after the commit, not before",
        _SERVICE,
        "        after, outbox = self._transact(work)\n",
        "        after, outbox = self._transact(lambda tx: (work(tx), self._send(tx.outbox, ()))[0])\n",
        f"{_GUARDS}::test_nothing_is_published_that_is_not_committed",
    ),
    _guard(
        "published after the commit, at once",
        _SERVICE,
        "        self._send(outbox, done)\n",
        "        self._send([], done)\n",
        f"{_GUARDS}::test_what_is_committed_is_published_at_once",
    ),
    _guard(
        "the relay",
        _SERVICE,
        "{k: min(page, self.settings.stream_high_water - n) for k, n in backlog.items()}",
        "{}",
        f"{_GUARDS}::test_what_is_pending_for_too_long_is_published_again",
    ),
    _guard(
        "the relay's patience",
        _STORE,
        "                        AND publish_at <= now()\n",
        "",
        f"{_GUARDS}::test_what_is_pending_for_too_long_is_published_again",
    ),
    _guard(
        "the relay's high-water mark",
        "wfm/bus.py",
        "if m.recipient and room[m.type] > 0:",
        "if m.recipient:",
        f"{_GUARDS}::test_a_long_stream_is_not_made_longer",
    ),
    _guard(
        "relays share what is due",
        _STORE,
        "ORDER BY publish_at LIMIT k.n FOR UPDATE SKIP LOCKED",
        "ORDER BY publish_at LIMIT k.n",
        f"{_GUARDS}::test_two_relays_publish_a_due_event_once",
    ),
    _guard(
        "everything pending is published when Redis was emptied",
        _SERVICE,
        "if born and self._life != life:",
        "if False:",
        f"{_GUARDS}::test_after_redis_was_emptied_everything_pending_is_published_at_once",
    ),
    _guard(
        "groups that are gone are made again",
        _BUS,
        '            log.warning("consumer groups are gone (%s); making them again", e)\n            self.join()\n',
        "",
        "tests/contract/test_bus.py::test_reading_goes_on_after_the_groups_are_gone",
    ),
    _guard(
        "a new group begins at the beginning",
        _BUS,
        'id="0", mkstream=True',
        'id="$", mkstream=True',
        "tests/contract/test_bus.py::test_a_group_that_is_made_late_still_sees_older_entries",
    ),
    _guard(
        "what was handed to us is read first",
        _SERVICE,
        "entries = self.bus.read_own_pending(self.settings.batch_size)",
        "entries = []",
        f"{_GUARDS}::test_what_was_handed_to_us_and_never_arrived_is_read_first",
    ),
    _guard(
        "what dead readers held is taken over",
        _SERVICE,
        "entries = self.bus.claim_idle(self.settings.claim_idle_seconds, self.settings.batch_size)",
        "entries = []",
        f"{_GUARDS}::test_what_a_dead_reader_held_is_taken_over",
    ),
    _guard(
        "taking over goes on where it stopped",
        _BUS,
        "            self._claim_from[stream] = reply[0]\n",
        "",
        "tests/contract/test_bus.py::test_claiming_follows_the_cursor_past_many_live_entries",
    ),
    _guard(
        "who leaves with entries in hand keeps his name",
        _BUS,
        'if mine and not mine[0]["pending"]:',
        "if mine:",
        "tests/contract/test_bus.py::test_leaving_takes_the_name_off_unless_entries_are_held",
    ),
    _guard(
        "what cannot be decoded is buried",
        _SERVICE,
        '                self._bury(entry, f"cannot be decoded: {e}")\n',
        "                self._send([], [entry])\n",
        f"{_MAIN}::test_garbage_goes_to_the_dead_letters_and_harms_no_neighbour",
    ),
    _guard(
        "what is delivered too often is buried",
        _SERVICE,
        "if tries >= self.settings.max_deliveries:",
        "if False:",
        f"{_GUARDS}::test_a_message_that_comes_again_and_again_is_buried",
    ),
    _guard(
        "what fails too often is buried",
        _SERVICE,
        "if self._count_failure(event.id) >= most:",
        "if self._count_failure(event.id) < 0:",
        f"{_GUARDS}::test_an_event_that_breaks_every_time_is_buried",
    ),
    _guard(
        "a poisoned message falls out alone",
        _SERVICE,
        "                for one in batch:\n                    self._handle([one])\n",
        "                pass\n",
        f"{_GUARDS}::test_a_poisoned_message_harms_no_neighbour",
    ),
    _guard(
        "an entry that was deleted while it was held is no poison",
        _SERVICE,
        "            if not entry.body:\n",
        "            if False:\n",
        f"{_GUARDS}::test_an_entry_that_was_deleted_while_it_was_held_is_no_poison",
    ),
    _guard(
        "all recorded arrivals are folded before a decision",
        _ROLES,
        "return {*recorded.packages, *(r.id for r in found)}",
        "return {r.id for r in found}",
        f"{_MAIN}::test_what_one_transaction_registers_is_decided_on_as_a_whole",
    ),
    _guard(
        "reconciliation with the catalogue",
        _ROLES,
        "        if mine:\n            gaps.fold",
        "        if False:\n            gaps.fold",
        f"{_GUARDS}::test_what_no_message_tells_of_is_found_by_reconciliation",
    ),
    _guard(
        "what is not folded is looked for by its digest",
        "wfm/gaps/reconciliation.py",
        "if total(there[2 * i : 2 * i + 2]) != total(here(d))",
        "if False",
        "tests/integration/test_reconcile.py::test_packages_of_which_no_message_told_are_found_in_any_number",
    ),
    _guard(
        "a decision is made again when what it rested on has changed",
        "wfm/gaps/reconciliation.py",
        "z.had_basis IS DISTINCT FROM z.basis",
        "z.had_basis IS NULL",
        "tests/integration/test_reconcile.py::test_after_a_reconciliation_a_full_evaluation_changes_nothing",
    ),
    _guard(
        "who ends otherwise than by covering its unit leaves no basis",
        _STORE,
        "basis = CASE WHEN m.state = 'covered' AND c.wanted = r.wanted THEN c.basis END",
        "basis = c.basis",
        "tests/integration/test_reconcile.py::test_what_an_older_run_left_open_is_found_when_its_end_was_not_heard",
    ),
    _guard(
        "whoever changes edges waits for those who change the coverage inside",
        _TALLIES,
        "    PERFORM 1 FROM coverage WHERE unit_id IN (SELECT lower_id FROM edges) ORDER BY step_id, unit_id"
        " FOR NO KEY UPDATE;\n",
        "",
        "tests/integration/test_tallies.py::test_a_run_that_ends_while_its_unit_moves_is_counted_where_the_unit_is",
    ),
    _guard(
        "whoever changes edges waits for a first row of coverage inside",
        _TALLIES,
        "    PERFORM 1 FROM unit WHERE id IN (SELECT lower_id FROM edges) ORDER BY id FOR UPDATE;\n",
        "",
        "tests/integration/test_tallies.py::test_a_first_row_of_coverage_is_counted_where_its_unit_moves_to",
    ),
    _guard(
        "who loses a deadlock tries again",
        _STORE,
        '_RETRIED = {"40001", "40P01"}',
        "_RETRIED: set[str] = set()",
        f"{_GUARDS}::test_who_loses_a_deadlock_tries_again",
    ),
    _guard(
        "a commit whose reply was lost is repeated",
        _SERVICE,
        "                if not is_connection_error(e):\n                    raise\n",
        "                raise\n",
        f"{_GUARDS}::test_a_transaction_whose_connection_is_lost_is_repeated",
    ),
]

JOBS = [
    _guard(
        "the intent is written before the launch",
        _LOCAL_PY,
        'runjob.write_json(os.path.join(directory, runjob.JOB), {**content, "grace_seconds": self._grace_seconds})',
        "pass",
        f"{_BACKEND}::test_success",
    ),
    _guard(
        "a job that was started is adopted: by the backend",
        _LOCAL_PY,
        "                return False\n            content",
        "                pass\n            content",
        f"{_LOCAL}::test_adopting_alters_nothing",
    ),
    _guard(
        "a job that was started is adopted: by the launcher",
        _RUNJOB,
        "if any(present(os.path.join(directory, started)) for started in (CLAIM, EXIT_RECORD)):",
        "if False:",
        f"{_LOCAL}::test_the_launcher_starts_nothing_where_something_was_started",
    ),
    _guard(
        "a supervisor on its way is adopted",
        _RUNJOB,
        '        if held is None:\n            return {"adopt": True}\n',
        '        if held is None:\n            held = os.open("/dev/null", os.O_RDONLY)\n',
        f"{_LOCAL}::test_a_supervisor_on_its_way_is_neither_absent_nor_started_twice",
    ),
    _guard(
        "the job's claim",
        _RUNJOB,
        "    except FileExistsError:\n        return False\n    pid = os.getpid()",
        "    except FileExistsError:\n        pass\n    pid = os.getpid()",
        f"{_LOCAL}::test_of_fifty_supervisors_one_runs",
    ),
    _guard(
        "the job looks at the mark after its claim",
        _RUNJOB,
        "    return not present(os.path.join(directory, CANCELLED))\n",
        "    return True\n",
        f"{_GUARDS}::test_a_lost_job_can_not_begin_any_more",
        f"{_BACKEND}::test_cancelled_before_it_is_submitted",
    ),
    _guard(
        "the canceller's mark",
        _LOCAL_PY,
        "                _mark(job.directory)\n",
        "",
        f"{_BACKEND}::test_cancelled_before_it_is_submitted",
    ),
    _guard(
        "the supervisor's lock from before the fork",
        _RUNJOB,
        "            pid = os.fork()\n            if pid == 0:\n                _become",
        '            os.close(held)\n            held = os.open("/dev/null", os.O_RDONLY)\n'
        "            pid = os.fork()\n            if pid == 0:\n                time.sleep(0.3)\n"
        "                lock(directory)\n                _become",
        f"{_BACKEND}::test_a_submitted_job_is_never_absent",
    ),
    _guard(
        "a lost job is fenced before the next attempt",
        _KINDS,
        "fenced = self.backend.cancel([r.ref for r in lost])",
        "fenced: dict[str, Report] = {}",
        f"{_GUARDS}::test_a_lost_job_can_not_begin_any_more",
    ),
    _guard(
        "a job that may have been submitted is asked for",
        _KINDS,
        "if isinstance(o.error, WfmError) and not isinstance(o.error, UnavailableError):",
        "if True:",
        f"{_GUARDS}::test_a_job_that_may_have_been_submitted_is_asked_for_by_name",
    ),
    _guard(
        "a cancellation waits for the backend",
        _KINDS,
        "if reports[job.name].status in NOT_RUNNING",
        "if True",
        f"{_GUARDS}::test_a_job_that_does_not_end_yet_is_not_called_cancelled",
    ),
    _guard(
        "a target that cannot be asked fails nothing",
        _LOCAL_PY,
        "return Report(JobStatus.UNKNOWN, job.handle, reason=f",
        "return Report(JobStatus.ABSENT, job.handle, reason=f",
        f"{_BACKEND}::test_unreachable_directories_are_unknown",
    ),
    _guard(
        "a pid that was given again is not signalled",
        _LOCAL_PY,
        "yield process if _is_running(owner) else None",
        "yield process",
        f"{_LOCAL}::test_a_pid_given_again_is_never_signalled",
    ),
    _guard(
        "a record appears whole",
        _RUNJOB,
        'temporary = f"{path}.{os.urandom(6).hex()}"\n    try:\n        with open(temporary, "xb")',
        'temporary = path\n    try:\n        with open(temporary, "wb")',
        f"{_GUARDS}::test_a_file_is_replaced_whole_or_not_at_all",
    ),
]

FILES = [
    _guard(
        "a copy is verified",
        "wfm/staging.py",
        "            if found == item.checksum:\n",
        "            if True:\n",
        f"{_STAGING}::test_a_wrong_checksum_is_named_with_the_right_one",
    ),
    _guard(
        "what is kept from an earlier try is verified",
        "wfm/staging.py",
        "if jobs.checksum(_chunks(target, item.size), watch) == item.checksum:",
        "if True:",
        f"{_STAGING}::test_what_is_in_place_and_bad_is_replaced",
    ),
    _guard(
        "a worker that was thought dead cannot meddle",
        "wfm/staging.py",
        "        _take_over(workshop)\n",
        "",
        f"{_STAGING}::test_one_that_was_thought_dead_cannot_meddle",
    ),
    _guard(
        "nothing is changed under a job that started",
        "wfm/staging.py",
        "if any(runjob.present(os.path.join(directory, name)) for name in (CLAIM, EXIT_RECORD)):",
        "if False:",
        f"{_STAGING}::test_the_directory_of_another_job_is_refused",
    ),
    _guard(
        "the manifest is written last",
        "wfm/staging.py",
        "    _write(os.path.join(directory, jobs.STAGED), _json(",
        "    _write(os.path.join(directory, jobs.MANIFEST), document, workshop)\n"
        "    _write(os.path.join(directory, jobs.STAGED), _json(",
        f"{_STAGING}::test_killed_at_any_moment_it_ends_in_the_same_tree",
    ),
    _guard(
        "inputs are durable before the manifest",
        "wfm/staging.py",
        '    jobs.sync_all(os.path.join(directory, item.path) for item, _, how in placed if how != "link")\n',
        "",
        f"{_GUARDS}::test_inputs_are_durable_before_the_manifest_says_so",
    ),
    _guard(
        "without the lease nothing is completed",
        "wfm/staging.py",
        "        watch.check()\n        return _summary",
        "        return _summary",
        f"{_GUARDS}::test_without_the_lease_no_attempt_is_declared_complete",
    ),
    _guard(
        "a package with other content than then is not staged",
        _KINDS,
        "        if r.changed:\n",
        "        if False:\n",
        f"{_MAIN}::test_a_package_that_changes_under_a_built_run_is_not_taken_for_the_old_one",
    ),
    _guard(
        "inputs are verified before a result is accepted",
        "wfm/collect.py",
        "if altered := verify_inputs(directory, watch):",
        "if False and (altered := verify_inputs(directory, watch)):",
        f"{_COLLECT}::test_every_altered_input_is_named",
    ),
    _guard(
        "a product that still changes is not accepted",
        "wfm/collect.py",
        "if _stamp(content) != before or before[0] != file.size:",
        "if False:",
        f"{_COLLECT}::test_a_file_that_still_changes_is_not_accepted",
    ),
    _guard(
        "products become read-only",
        "wfm/collect.py",
        "os.chmod(file.real, 0o444)",
        "pass",
        f"{_COLLECT}::test_products_become_read_only",
    ),
]

_TRIGGERS = "tests/acceptance/test_triggers.py"

TRIGGERS = [
    _guard(
        "one firing, whoever sees that it is due",
        _ROLES,
        "ORDER BY d.pipeline_id\n            FOR NO KEY UPDATE OF d SKIP LOCKED",
        "ORDER BY d.pipeline_id",
        f"{_TRIGGERS}::test_one_firing_for_all_times_that_were_missed_whoever_sees_them",
    ),
    _guard(
        "no firing in the past where clocks show a time twice",
        "wfm/decide.py",
        "if (time := time.astimezone(UTC)) > after:",
        "if time := time.astimezone(UTC):",
        "tests/unit/test_schedule.py",
    ),
    _guard(
        "settling counts from the last change",
        "wfm/gaps/evaluation.py",
        "THEN c.wanted_since ELSE now() END",
        "THEN c.wanted_since ELSE coalesce(c.wanted_since, now()) END",
        f"{_TRIGGERS}::test_a_unit_runs_when_what_it_reads_has_been_quiet",
    ),
    _guard(
        "settling has an end",
        "wfm/decide.py",
        " and f.settling_seconds < f.settle_at_most_seconds:",
        ":",
        f"{_TRIGGERS}::test_endless_arrivals_do_not_keep_a_unit_from_running",
    ),
    _guard(
        "a withdrawn run is no run for a cooldown",
        "wfm/gaps/facts.py",
        " AND r.failure <> :withdrawn\n                AND r.id IS DISTINCT FROM a.id",
        "",
        f"{_TRIGGERS}::test_a_cooldown_counts_from_runs_that_had_a_chance",
    ),
    _guard(
        "a whole is not replaced by a part while results are made again",
        "wfm/decide.py",
        "if covered < min(f.accepted_results, possible):",
        "if False:",
        f"{_TRIGGERS}::test_a_whole_map_is_not_replaced_by_a_part_while_scans_are_made_again",
        "tests/unit/test_decide.py",
    ),
    _guard(
        "data that no result covers is none of a map's input",
        "wfm/decide.py",
        "if fan_in is not FanIn.ANY else (0, 0)",
        "",
        f"{_TRIGGERS}::test_a_map_of_any_scans_says_which_are_missing_and_is_made_again_when_they_come",
    ),
    _guard(
        "what was asked for is not forgotten with a withdrawn run",
        _STORE,
        "requested = c.requested OR m.again,",
        "requested = c.requested,",
        f"{_TRIGGERS}::test_what_was_asked_for_is_not_forgotten_when_newer_input_comes_before_it_starts",
    ),
]

_EDITING = "tests/acceptance/test_editing.py"

EDITING = [
    _guard(
        "what has not started is withdrawn with its step or unit",
        "wfm/decide.py",
        "unwanted = f.unwanted or (",
        "unwanted = (",
        f"{_EDITING}::test_runs_of_a_step_that_is_removed",
    ),
    _guard(
        "a run of a step that is gone is not built",
        _ROLES,
        "if not r.part",
        "if False",
        f"{_EDITING}::test_a_run_that_was_admitted_before_anybody_saw_the_change_is_not_built",
    ),
    _guard(
        "units of a step that is grouped otherwise are looked at once more",
        "wfm/gaps/reconciliation.py",
        "return [*(row.units or ()), *_orphans(tx, step)]",
        "return [*(row.units or ())]",
        f"{_EDITING}::test_a_step_that_is_grouped_otherwise_orphans_its_units_and_takes_them_back",
    ),
    _guard(
        "results are looked for where the job was told to leave them",
        _KINDS,
        "_Collection(run.job.directory, *built_for(run.job))",
        "_Collection(run.job.directory, run.step, False)",
        f"{_EDITING}::test_a_step_that_is_no_longer_the_last_one_while_it_runs",
    ),
]

_PREPARED, _TALLIED = "tests/integration/test_prepared.py", "tests/integration/test_tallies.py"

SPEED = [
    _guard(
        "plans that are kept never read whole tables",
        _STORE,
        "SET LOCAL enable_seqscan TO {value}",
        "SELECT 1",
        f"{_PREPARED}::test_no_plan_reads_a_table_from_end_to_end_although_they_are_all_but_empty",
    ),
    _guard(
        "plans are kept",
        _STORE,
        "SET plan_cache_mode TO force_generic_plan;",
        "",
        f"{_PREPARED}::test_plans_are_made_once_for_each_connection",
    ),
    _guard(
        "the planner is asked again after look-ups by key",
        _STORE,
        "        self._plan(before)",
        "        pass",
        f"{_PREPARED}::test_the_planner_is_asked_again_afterwards",
    ),
    _guard(
        "units that nobody has looked at are among the first lines of why",
        "wfm/views/coverage.py",
        "if seen < units.get(",
        "if False and units.get(",
        f"{_TALLIED}::test_the_first_lines_of_why_are_those_that_sorting_everything_gives",
    ),
    _guard(
        "units that are orphaned are among the first lines of why",
        "wfm/views/coverage.py",
        'if (step, in_state) == (s["id"], state)}',
        'if (step, in_state) == (s["id"], state) and dims == s["dims"]}',
        f"{_TALLIED}::test_the_first_lines_of_why_are_those_that_sorting_everything_gives",
    ),
]

_APPROVAL, _REVOKE = "tests/acceptance/test_approval.py", "tests/acceptance/test_revoke.py"
_BACKFILL, _LIMITS = "tests/integration/test_backfill.py", "tests/integration/test_limits.py"

COUNTING = [
    _guard(
        "a result that does not count is no run's input",
        _KINDS,
        "= (us.id, l.id) AND c.counts\n",
        "= (us.id, l.id)\n",
        f"{_TRIGGERS}::test_what_a_map_reads_is_checked_against_what_it_was_made_for",
    ),
    _guard(
        "a revoked result that is held does not count like one that waits for approval",
        "wfm/decide.py",
        "Why.REVOKED if f.revoked else Why.APPROVAL",
        "Why.APPROVAL",
        f"{_APPROVAL}::test_what_was_revoked_does_not_count_while_it_is_held",
    ),
    _guard(
        "what a step wants is decided once for all its units",
        "wfm/gaps/facts.py",
        "if (r.software_version_id, r.config_revision_id) == wanted[r.step_id]}",
        "if False}",
        _APPROVAL,
    ),
    _guard(
        "retries that are used up are inherited from a withdrawn run",
        _STORE,
        "CASE o.failure WHEN :withdrawn THEN o.failures END",
        "CASE o.failure WHEN :withdrawn THEN 0 END",
        "tests/acceptance/test_poison.py::test_what_goes_back_and_forth_makes_no_endless_retries",
    ),
    _guard(
        "runs for data that have a result have a priority of their own",
        "wfm/gaps/facts.py",
        "r.stale_priority if _reprocessed(r) and",
        "r.stale_priority if False and",
        f"{_APPROVAL}::test_runs_for_data_that_have_a_result_have_a_priority_of_their_own",
    ),
    _guard(
        "a backfill's limit",
        _ROLES,
        'Share(f"backfill {c.backfill}", runs[queue], most,',
        'Share(f"backfill {c.backfill}", runs[queue], None,',
        _BACKFILL,
        _LIMITS,
    ),
    _guard(
        "a backfill that is paused starts nothing",
        _ROLES,
        "if row.backfill_paused_by:",
        "if False:",
        _BACKFILL,
    ),
    _guard(
        "a unit that is paused starts nothing: the admission",
        _ROLES,
        "if row.unit_paused_by:",
        "if False:",
        f"{_LIMITS}::test_a_paused_unit_lets_others_pass_until_it_is_resumed",
    ),
    _guard(
        "a unit that is paused starts nothing: the decision",
        "wfm/gaps/facts.py",
        '("unit", r.unit_paused_by, r.unit_paused_reason),',
        '("unit", "", ""),',
        f"{_LIMITS}::test_a_paused_unit_lets_others_pass_until_it_is_resumed",
    ),
    _guard(
        "what is revoked belongs to no unit",
        "wfm/grouping.py",
        "conditions = [NOT_REVOKED, *(",
        "conditions = [*(",
        f"{_REVOKE}::test_a_package",
    ),
    _guard(
        "a campaign tells of packages that were revoked since",
        "wfm/views/campaigns.py",
        "WHERE k.revoked_by <> '' AND EXISTS",
        "WHERE false AND EXISTS",
        "tests/integration/test_campaign.py::test_a_campaign_tells_of_packages_that_were_revoked_since",
    ),
]

_NAMES, _RENAMING = "tests/integration/test_renaming.py", "tests/acceptance/test_renaming.py"
_FACTS, _DOCUMENTS = "wfm/gaps/facts.py", "wfm/documents.py"

RENAMING = [
    _guard(
        "the name of a step is not in the digests of what reads it",
        "wfm/gaps/quarantine.py",
        "return {u.identity: u.digest for u in self.upstream}",
        "return {u.step: u.digest for u in self.upstream}",
        f"{_RENAMING}::test_a_step_in_the_middle_gets_another_name_and_nothing_runs",
        "tests/integration/test_gap_engine.py",
    ),
    _guard(
        "the name of a step is not in the digest that a job is built for",
        _ROLES,
        "us.identity AS step,",
        "us.name AS step,",
        f"{_RENAMING}::test_a_run_that_is_under_way_comes_to_its_end",
    ),
    _guard(
        "the name of a step is not in its results",
        _FACTS,
        "result_hash(r.identity, r.unit, wanted)",
        "result_hash(r.step, r.unit, wanted)",
        f"{_NAMES}::test_a_result_is_the_same_whatever_its_step_is_called",
    ),
    _guard(
        "no decision rests on the name of its step",
        _FACTS,
        "ROW(s.identity, s.active",
        "ROW(s.name, s.active",
        f"{_NAMES}::test_nothing_that_is_covered_is_decided_again",
    ),
    _guard(
        "no decision rests on the names of the steps it depends on",
        _FACTS,
        "string_agg(ROW(z.identity,",
        "string_agg(ROW(z.step,",
        f"{_NAMES}::test_nothing_that_is_covered_is_decided_again",
    ),
    _guard(
        "the reason of what waits follows the names it tells",
        _FACTS,
        "(SELECT array_agg(us.name ORDER BY us.id) FROM",
        "(SELECT count(*) FROM",
        f"{_NAMES}::test_the_reason_of_a_unit_tells_the_name_of_today",
    ),
    _guard(
        "a step stays what it was at first",
        _DOCUMENTS,
        ', first=("identity",))',
        ")",
        f"{_NAMES}::test_nothing_that_is_covered_is_decided_again",
    ),
    _guard(
        "a new step with an old name is another one",
        "wfm/decide.py",
        "for n in range(2, len(taken) + 3))) if i not in taken)",
        "for n in range(2, len(taken) + 3))))",
        "tests/unit/test_decide.py",
    ),
    _guard(
        "what was renamed already is not renamed once more",
        "wfm/decide.py",
        "for new, old in wanted.items() if known.get(new) != old}",
        "for new, old in wanted.items()}",
        f"{_RENAMING}::test_two_steps_exchange_their_names",
        "tests/unit/test_decide.py",
    ),
    _guard(
        "what makes room for another one is renamed once more",
        "wfm/decide.py",
        "        todo |= more",
        "        break",
        "tests/unit/test_decide.py",
    ),
    _guard(
        "where there is a fault nothing is renamed",
        _DOCUMENTS,
        "with conn.begin_nested():  # names are changed before the faults are known",
        "if True:",
        f"{_NAMES}::test_where_there_is_a_fault_nothing_is_renamed",
    ),
    _guard(
        "names stay as they are while a job is built",
        _KINDS,
        '" ORDER BY id FOR KEY SHARE",',
        '" ORDER BY id",',
        f"{_NAMES}::test_no_step_gets_another_name_while_a_job_is_built",
    ),
    _guard(
        "what a job reads lies under the names of when it was built",
        _KINDS,
        "i.step_name AS step, u.key AS unit",
        "s.name AS step, u.key AS unit",
        f"{_NAMES}::test_an_attempt_that_is_staged_once_more_is_the_same",
    ),
    _guard(
        "the manifest of an attempt stays the same through a rename",
        _KINDS,
        "pipeline=r.pipeline_name,",
        "pipeline=tx.all('SELECT name FROM pipeline ORDER BY id')[0].name,",
        f"{_NAMES}::test_an_attempt_that_is_staged_once_more_is_the_same",
    ),
    _guard(
        "all attempts of a run lie side by side",
        "wfm/jobs.py",
        "facts.pipeline, facts.made_as, facts.unit_key",
        "facts.pipeline, facts.step, facts.unit_key",
        f"{_RENAMING}::test_two_steps_exchange_their_names",
    ),
    _guard(
        "files are purged where they were made",
        _KINDS,
        "attempt_directory(base, run.pipeline_name, run.step_name, run.unit,",
        "attempt_directory(base, run.pipeline, run.step, run.unit,",
        f"{_RENAMING}::test_files_of_old_names_are_purged",
    ),
    _guard(
        "logs are looked for where they were written",
        "wfm/cli/runs.py",
        "attempt_directory(base, run.pipeline_name, run.step_name, run.unit,",
        "attempt_directory(base, run.pipeline, run.step, run.unit,",
        f"{_RENAMING}::test_two_steps_exchange_their_names",
    ),
    _guard(
        "events are found by what their pipeline is called now",
        "wfm/views/ledger.py",
        '{_asked(_PIPELINE_NOW, "pipeline")}',
        """{_asked("e.body ->> 'pipeline'", "pipeline")}""",
        f"{_RENAMING}::test_pipelines_and_groupings_keep_all_they_have",
    ),
    _guard(
        "the futures under old and new names are compared step by step",
        "wfm/whatif.py",
        "found[(r.step_id, r.unit), r.wanted]",
        "found[(r.step, r.unit), r.wanted]",
        f"{_NAMES}::test_the_future_is_the_same_under_other_names",
    ),
]

_QUARANTINE = "tests/acceptance/test_quarantine.py"
_BISECT = "tests/unit/test_bisect.py"
_ASIDE, _FACTS, _DECIDE = "wfm/gaps/quarantine.py", "wfm/gaps/facts.py", "wfm/decide.py"

QUARANTINE = [
    _guard(
        "a probe covers nothing",
        _FACTS,
        "WHERE r.finished_at IS NOT NULL AND r.probe_of IS NULL AND",
        "WHERE r.finished_at IS NOT NULL AND",
        f"{_QUARANTINE}::test_where_none_is_looked_for_it_is_said_that_one_could_be",
    ),
    _guard(
        "what a probe makes is no product",
        _KINDS,
        "for run, value in mine if run.probe_of is None])",
        "for run, value in mine])",
        f"{_QUARANTINE}::test_the_guilty_package_is_found_and_left_out",
    ),
    _guard(
        "a probe that failed on its members is not repeated",
        _STORE,
        "most = 0 if run.probe_of is not None and failure in OF_DATA else run.max_retries",
        "most = run.max_retries",
        f"{_QUARANTINE}::test_what_fails_in_a_probe_is_not_repeated",
    ),
    _guard(
        "only a member that failed alone is guilty",
        _DECIDE,
        "    if alone.passed:",
        "    if False:",
        f"{_BISECT}::test_a_pair_that_fails_only_together_puts_it_on_no_member",
    ),
    _guard(
        "where nothing passes, nobody is guilty",
        _DECIDE,
        "if any(t.passed for t in tried):",
        "if True:",
        f"{_BISECT}::test_what_fails_on_everything_is_given_up_after_few_probes",
    ),
    _guard(
        "what vanished says nothing of its members",
        _DECIDE,
        "    if unsure:",
        "    if False:",
        f"{_BISECT}::test_a_probe_that_says_nothing_of_its_members_ends_the_search",
    ),
    _guard(
        "what explains nothing is released",
        _DECIDE,
        "if look.proven and s.unproven:",
        "if False:",
        f"{_BISECT}::test_when_as_many_as_may_are_left_out_and_the_rest_fails_these_are_released",
    ),
    _guard(
        "what a search could not finish is kept",
        _DECIDE,
        "if look.proven and s.unproven:",
        "if s.unproven:",
        f"{_BISECT}::test_when_as_many_as_may_are_left_out_and_the_rest_fails_these_are_released",
    ),
    _guard(
        "a search that is over is not begun again",
        _DECIDE,
        "    if s.over:",
        "    if False:",
        f"{_BISECT}::test_a_search_that_is_over_is_not_begun_again",
    ),
    _guard(
        "nobody asked for a probe that is withdrawn",
        _DECIDE,
        "requested=f.requested or not probe)",
        "requested=True)",
        f"{_BISECT}::test_an_active_probe_goes_on_as_long_as_the_unit_wants_what_failed",
    ),
    _guard(
        "a probe is of what its failed run wanted",
        _FACTS,
        "CASE WHEN a.probe_of IS NULL THEN a.wanted ELSE",
        "CASE WHEN true THEN a.wanted ELSE",
        f"{_QUARANTINE}::test_a_search_is_paused_and_gives_way_to_new_data",
    ),
    _guard(
        "a run that fails once more is searched anew",
        _ASIDE,
        "if probe.version != runs[r.probe_of].version:",
        "if False:",
        f"{_QUARANTINE}::test_a_cancelled_probe_ends_the_search",
    ),
    _guard(
        "what is left out has the content that failed",
        _ASIDE,
        "if member.content == int(r.content):",
        "if True:",
        f"{_QUARANTINE}::test_released_by_hand_by_a_version_and_by_new_content",
    ),
    _guard(
        "what is left out failed with this version and config",
        _FACTS,
        "if version and _runs(m) == (version.id, r.config_hash)]",
        "if version]",
        f"{_QUARANTINE}::test_released_by_hand_by_a_version_and_by_new_content",
    ),
    _guard(
        "no more members are left out than the step says",
        _FACTS,
        "aside[pair] = same[: r.quarantine_at_most]",
        "aside[pair] = same",
        f"{_QUARANTINE}::test_two_guilty_packages",
    ),
    _guard(
        "members that are others than the digest says are not searched",
        _ASIDE,
        "return (rest.items, rest.members) == (0, 0)",
        "return True",
        f"{_BISECT}::test_members_that_are_others_than_the_digest_says_are_not_searched",
    ),
    _guard(
        "the fingerprint of a decision has what is in quarantine",
        _FACTS,
        "    || coalesce(' without ' || qu.rows || ' of ' || s.quarantine_at_most, ''), 0) AS basis,",
        "    , 0) AS basis,",
        f"{_QUARANTINE}::test_reconciliation_finds_what_was_released",
    ),
    _guard(
        "a package in quarantine is not certified as covered",
        "wfm/views/certificate.py",
        "x.id IS NOT NULL OR a.uncovered AS uncovered",
        "a.uncovered AS uncovered",
        f"{_QUARANTINE}::test_the_certificate_and_a_campaign_miss_it",
    ),
    _guard(
        "a search begins nothing while its pipeline is paused",
        _DECIDE,
        "    if not f.enabled or f.paused:\n        return structs.replace(failed",
        "    if False:\n        return structs.replace(failed",
        f"{_BISECT}::test_nothing_is_searched_while_the_pipeline_stands",
    ),
    _guard(
        "a probe is not repeated by hand",
        _DECIDE,
        "if f.probe_of is not None:",
        "if False:",
        f"{_BISECT}::test_a_probe_is_not_repeated_by_hand",
    ),
]

MUTANTS = [
    *RUNS,
    *TASKS,
    *MESSAGES,
    *JOBS,
    *FILES,
    *TRIGGERS,
    *EDITING,
    *SPEED,
    *COUNTING,
    *RENAMING,
    *QUARANTINE,
]
