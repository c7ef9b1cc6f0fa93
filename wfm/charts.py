"""Statecharts: text → validated `Chart` → one `transitions` machine, and its diagram. Pure: texts in, values out.

A chart is a YAML mapping::

    chart: NAME                       # names are words: letters, digits and _, a letter first
    version: 1                        # a positive whole number
    initial: STATE
    states:
      STATE:
        meaning: TEXT                 # one line for people
        owner: ROLE                   # who must act next           } not in a
        look_again_after: SECONDS     # when somebody must look     } final state
        final: true                   # instead of the two above
        emits: [{event: NAME, to: ROLE}, ...]    # on entry; without `to` for the public stream only
    transitions:
      - {trigger: NAME, source: STATE or [STATE, ...], dest: STATE, guard: NAME}

Of several transitions with the same trigger and source, the first in file order whose guard holds decides.
A final state may have transitions of its own; somebody must then ask for them.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import yaml
from msgspec import Struct
from transitions import EventData, Machine
from yaml import MappingNode, Node, ScalarNode, SequenceNode

from wfm.errors import ChartError, RefusedError, nearest
from wfm.model import Role

Guard = Callable[[Any], bool]
"""Looks at the facts given to `Chart.advance` and says whether the transition may be taken. Pure."""


class Emit(Struct, frozen=True):
    """An event that the entry into a state emits.

    Attributes:
        event: its type.
        to: the role that must act on it; None for the public stream only.
    """

    event: str
    to: Role | None


class StateSpec(Struct, frozen=True):
    """One state.

    Attributes:
        name: unique in its chart.
        meaning: one line for people.
        owner: the role that must act next; None in a final state.
        look_again_after: seconds after which somebody must look; None in a final state.
        final: whether a thing may rest here for good.
        emits: what its entry emits.
    """

    name: str
    meaning: str
    owner: Role | None
    look_again_after: float | None
    final: bool
    emits: tuple[Emit, ...]


class TransitionSpec(Struct, frozen=True):
    """One move from one source state.

    Attributes:
        trigger: name of the move.
        source, dest: names of states.
        guard: name of the guard that must hold; None if there is none.
    """

    trigger: str
    source: str
    dest: str
    guard: str | None

    @property
    def label(self) -> str:
        """``trigger [guard]``, for people."""
        return f"{self.trigger} [{self.guard}]" if self.guard else self.trigger


class Chart:
    """A validated statechart, made by `parse`. Nothing of it changes afterwards, so threads may share it.

    Attributes:
        name, version: which chart this is.
        initial: name of the first state.
        states: by name, in file order.
        transitions: one per source state, in file order.
    """

    __slots__ = ("_machine", "_moves", "initial", "name", "states", "transitions", "version")

    def __init__(
        self,
        *,
        name: str,
        version: int,
        initial: str,
        states: Iterable[StateSpec],
        transitions: Iterable[TransitionSpec],
        guards: Mapping[str, Guard],
    ) -> None:
        self.name = name
        self.version = version
        self.initial = initial
        self.states: Mapping[str, StateSpec] = MappingProxyType({spec.name: spec for spec in states})
        self.transitions = tuple(transitions)
        moves: dict[str, dict[str, list[TransitionSpec]]] = {state: {} for state in self.states}
        for move in self.transitions:
            moves[move.source].setdefault(move.trigger, []).append(move)
        self._moves = moves
        self._machine = Machine(
            model=None,
            states=list(self.states),
            initial=None,
            transitions=[
                {
                    "trigger": move.trigger,
                    "source": move.source,
                    "dest": move.dest,
                    # Never a name: `transitions` takes strings for import paths.
                    "conditions": _condition(guards[move.guard]) if move.guard else None,
                }
                for move in self.transitions
            ],
            send_event=True,
            auto_transitions=False,
            ignore_invalid_triggers=False,
            queued=False,
            model_attribute="_state",
        )

    def advance(self, state: str, trigger: str, facts: object = None) -> str:
        """Apply one trigger.

        Args:
            state: where the thing is now.
            trigger: name of the move.
            facts: what the guards look at.

        Returns:
            The name of the new state.

        Raises:
            RefusedError: the chart has no such state, no such move from it, or no guard of the move holds.
            Exception: whatever a guard raised. Nothing has changed then.
        """
        if trigger not in self.triggers(state):
            raise self._refused(state, trigger, "there is no such move")
        position = _Position(state)
        if not self._machine.events[trigger].trigger(position, facts=facts):
            guards = ", ".join(str(move.guard) for move in self._moves[state][trigger])
            raise self._refused(state, trigger, f"no guard holds ({guards})")
        return position._state

    def triggers(self, state: str) -> tuple[str, ...]:
        """The moves that a state knows, in file order; whether their guards hold is another question.

        Raises:
            RefusedError: the chart has no such state.
        """
        if state not in self._moves:
            raise RefusedError(f"{self}: there is no state '{state}'; it has {', '.join(self.states)}")
        return tuple(self._moves[state])

    def mermaid(self) -> str:
        """The chart as a Mermaid state diagram: titles give name and owner, below them the meaning."""
        lines = ["stateDiagram-v2"]
        for spec in self.states.values():
            # A title must differ from the identifier: Mermaid drops one that does not.
            title = f"{spec.name} ({spec.owner or 'final'})"
            rows = [title, *textwrap.wrap(spec.meaning, _MERMAID_WIDTH)]
            lines += [f"{_mermaid_id(spec.name)} : {_mermaid_text(row)}" for row in rows]
        lines.append(f"[*] --> {_mermaid_id(self.initial)}")
        lines += [
            f"{_mermaid_id(move.source)} --> {_mermaid_id(move.dest)} : {move.label}" for move in self.transitions
        ]
        lines += [f"{_mermaid_id(spec.name)} --> [*]" for spec in self.states.values() if spec.final]
        return "\n    ".join(lines) + "\n"

    def __str__(self) -> str:
        return f"chart {self.name} {self.version}"

    def _refused(self, state: str, trigger: str, reason: str) -> RefusedError:
        possible = ", ".join(move.label for moves in self._moves[state].values() for move in moves)
        return RefusedError(f"{self}: '{trigger}' refused in {state}: {reason}; possible: {possible or 'nothing'}")


class _Position:
    """What the machine moves: one per call, so that a call that breaks leaves nothing behind."""

    # `transitions` refuses a trigger of this name, but no trigger begins with an underscore.
    __slots__ = ("_state",)

    def __init__(self, state: str) -> None:
        self._state = state


def _condition(guard: Guard) -> Callable[[EventData], bool]:
    # `transitions` compares with True, and what is merely true (a record, a count) is not equal to it.
    return lambda event: bool(guard(event.kwargs["facts"]))


# --- diagrams ---------------------------------------------------------------------------------------------

_MERMAID_WIDTH = 40
_MERMAID_WORDS = frozenset(
    {
        "accdescr",
        "acctitle",
        "class",
        "classdef",
        "click",
        "default",
        "href",
        "note",
        "root",
        "root_end",
        "root_start",
        "scale",
        "state",
        "style",
    }
)


def _mermaid_id(name: str) -> str:
    """The name itself, unless Mermaid (which ignores case) takes it for a word of its own."""
    return f"_{name}" if name.lower() in _MERMAID_WORDS else name


def _mermaid_text(text: str) -> str:
    """Write what Mermaid may take for syntax as character codes."""
    return re.sub(r"[^\w ,.()/'-]", lambda match: f"#{ord(match[0])};", text)


# --- reading ----------------------------------------------------------------------------------------------


def parse(text: str, *, source: str, guards: Mapping[str, Guard], events: Collection[str]) -> Chart:
    """Read and validate a chart.

    Args:
        text: YAML, see the module's text.
        source: where the text comes from, for messages.
        guards: what the chart's guard names mean.
        events: the event types that states may emit.

    Raises:
        ChartError: with every fault, as ``source:line: message``, by line.
    """
    return _Reader(text, source, guards, events).chart()


_WORD = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_TAG = "tag:yaml.org,2002:"


class _Reader:
    """Reads the nodes of one text and collects its faults.

    Works on nodes, not on loaded values: those have lost their lines and their duplicate keys. After a fault each
    method returns a stand-in, chosen so that it causes no second fault; only a text without faults becomes a chart.
    A node that is None belongs to a key that is missing: not a fault of its own, `_fields` knows what is required.
    """

    def __init__(self, text: str, source: str, guards: Mapping[str, Guard], events: Collection[str]) -> None:
        self._text = text
        self._source = source
        self._guards = guards
        self._events = sorted(events)
        self._faults: list[tuple[int, str]] = []

    def chart(self) -> Chart:
        try:
            root = yaml.compose(self._text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise ChartError([self._unreadable(error)]) from error
        if root is None:
            raise ChartError([f"{self._source}:1: the text is empty"])

        fields = self._fields(root, "chart", root, ["chart", "version", "initial", "states", "transitions"]) or {}
        name = self._word(fields.get("chart"), "chart")
        version = self._version(fields.get("version"))
        keys, specs = self._states(fields.get("states"))
        initial = self._state_name(fields.get("initial"), "initial", keys)
        if initial in specs and specs[initial].final:
            self._fault(fields["initial"], f"initial: {initial} is final; a chart starts in a state that is not")
        moves: list[TransitionSpec] = []
        if (items := self._items(fields.get("transitions"), "transitions")) is not None:
            moves = self._transitions(items, keys)
            self._check_ways(keys, specs, initial, moves)
        if self._faults:
            by_line = sorted(self._faults, key=lambda fault: fault[0])
            raise ChartError([f"{self._source}:{line}: {message}" for line, message in by_line])
        return Chart(
            name=name,
            version=version,
            initial=initial,
            states=specs.values(),
            transitions=moves,
            guards=self._guards,
        )

    # the parts of a chart

    def _states(self, node: Node | None) -> tuple[dict[str, Node], dict[str, StateSpec]]:
        """The nodes of all names, and those states that can be judged."""
        entries = self._entries(node, "states")
        if node is not None and entries == {}:
            self._fault(node, "states: there are none")
        keys = {name: key for name, (key, _) in (entries or {}).items()}
        specs = [self._state(name, key, value) for name, (key, value) in (entries or {}).items()]
        return keys, {spec.name: spec for spec in specs if spec}

    def _state(self, name: str, key: Node, node: Node) -> StateSpec | None:
        what = f"state {name}"
        self._word(key, "the name of a state")
        fields = self._fields(node, what, key, ["meaning"], ["owner", "look_again_after", "final", "emits"])
        if fields is None:
            return None
        final = self._boolean(fields.get("final"), f"{what}: final")
        for duty in ("owner", "look_again_after"):
            if final is True and duty in fields:
                self._fault(fields[duty], f"{what}: is final, nobody must act next: leave out {duty}")
            if final is False and duty not in fields:
                self._fault(key, f"{what}: is not final, so it needs {duty}")
        meaning = self._string(fields.get("meaning"), f"{what}: meaning")
        owner = self._role(fields.get("owner"), f"{what}: owner")
        look_again_after = self._seconds(fields.get("look_again_after"), f"{what}: look_again_after")
        emits = self._emits(fields.get("emits"), f"{what}: emits")
        if final is None:
            return None
        return StateSpec(name, " ".join(meaning.split()), owner, look_again_after, final, emits)

    def _emits(self, node: Node | None, what: str) -> tuple[Emit, ...]:
        emits: list[Emit] = []
        for item in self._items(node, what) or ():
            fields = self._fields(item, what, item, ["event"], ["to"]) or {}
            event = self._choice(fields.get("event"), f"{what}: event", self._events)
            emit = Emit(event, self._role(fields.get("to"), f"{what}: to"))
            if event and emit in emits:
                self._fault(item, f"{what}: {event} to {emit.to or 'the public stream only'} stands there twice")
            emits.append(emit)
        return tuple(emits)

    def _transitions(self, items: Sequence[Node], states: Collection[str]) -> list[TransitionSpec]:
        moves: list[TransitionSpec] = []
        earlier: dict[tuple[str, str], list[tuple[TransitionSpec, Node]]] = defaultdict(list)
        for item in items:
            fields = self._fields(item, "transition", item, ["trigger", "source", "dest"], ["guard"]) or {}
            trigger = self._word(fields.get("trigger"), "transition: trigger")
            what = f"transition {trigger}".rstrip()
            dest = self._state_name(fields.get("dest"), f"{what}: dest", states)
            guard = None
            if "guard" in fields:
                guard = self._choice(fields["guard"], f"{what}: guard", sorted(self._guards))
            for node in self._sources(fields.get("source"), f"{what}: source"):
                source = self._state_name(node, f"{what}: source", states)
                move = TransitionSpec(trigger, source, dest, guard)
                if trigger and source in states:
                    self._check_fires(move, node, earlier[trigger, source])
                    earlier[trigger, source].append((move, node))
                moves.append(move)
        return moves

    def _sources(self, node: Node | None, what: str) -> Sequence[Node]:
        if node is None:
            return []
        if not isinstance(node, SequenceNode):
            return [node]
        if not node.value:
            self._fault(node, f"{what}: the list is empty; name at least one state")
        return list(node.value)

    # rules over several parts

    def _check_fires(self, move: TransitionSpec, node: Node, earlier: Iterable[tuple[TransitionSpec, Node]]) -> None:
        for other, other_node in earlier:
            if other == move:
                fault = f"repeats line {_line(other_node)}"
            elif other.guard in (None, move.guard):
                fault = f"can never fire: {other.label} to {other.dest} in line {_line(other_node)} always comes first"
            else:
                continue
            self._fault(node, f"transition {move.label} from {move.source} to {move.dest}: {fault}")
            return

    def _check_ways(
        self,
        keys: Mapping[str, Node],
        specs: Mapping[str, StateSpec],
        initial: str,
        moves: Iterable[TransitionSpec],
    ) -> None:
        ways: dict[str, set[str]] = defaultdict(set)
        for move in moves:
            ways[move.source].add(move.dest)
        for name, spec in specs.items():
            if not spec.final and not ways[name] - {name}:
                self._fault(keys[name], f"state {name}: is not final and has no way out; add a transition or `final`")
        if initial not in keys:
            return
        reached: set[str] = set()
        ahead = {initial}
        while ahead:
            reached |= ahead
            ahead = {dest for name in ahead for dest in ways[name]} - reached
        for name, key in keys.items():
            if name not in reached:
                self._fault(key, f"state {name}: cannot be reached from {initial}")

    # nodes

    def _fields(
        self, node: Node, what: str, at: Node, required: Sequence[str], optional: Sequence[str] = ()
    ) -> dict[str, Node] | None:
        """The values of a mapping with fixed keys; None if it is no mapping. What is missing is reported at `at`."""
        entries = self._entries(node, what)
        if entries is None:
            return None
        allowed = [*required, *optional]
        fields = {name: value for name, (_, value) in entries.items() if name in allowed}
        for name, (key, value) in entries.items():
            fields.setdefault(self._known(key, name, f"{what}: key", allowed), value)
        missing = [name for name in required if name not in fields]
        if missing:
            self._fault(at, f"{what}: {', '.join(missing)} missing; required: {', '.join(required)}")
        return fields

    def _entries(self, node: Node | None, what: str) -> dict[str, tuple[Node, Node]] | None:
        """Key → (node of the key, node of the value); None if it is no mapping. The first of duplicates stays."""
        if node is None:
            return None
        if not isinstance(node, MappingNode):
            self._fault(node, f"{what}: must be a mapping, not {_shown(node)}")
            return None
        entries: dict[str, tuple[Node, Node]] = {}
        for key, value in node.value:
            name = self._string(key, f"{what}: a key")
            if name in entries:
                self._fault(key, f"{what}: key '{name}' stands already in line {_line(entries[name][0])}")
            elif name:
                entries[name] = key, value
        return entries

    def _items(self, node: Node | None, what: str) -> Sequence[Node] | None:
        if node is None:
            return None
        if not isinstance(node, SequenceNode):
            self._fault(node, f"{what}: must be a list, not {_shown(node)}")
            return None
        return list(node.value)

    def _string(self, node: Node | None, what: str) -> str:
        if node is None:
            return ""
        text = _scalar(node, "str")
        if not text.strip():
            self._fault(node, f"{what}: must be text (quoted if YAML reads it otherwise), not {_shown(node)}")
            return ""
        return text

    def _word(self, node: Node | None, what: str) -> str:
        word = self._string(node, what)
        if node and word and not _WORD.fullmatch(word):
            self._fault(node, f"{what}: must be a word (letters, digits and _, a letter first), not '{word}'")
        return word

    def _choice(self, node: Node | None, what: str, allowed: Collection[str]) -> str:
        name = self._string(node, what)
        return self._known(node, name, what, allowed) if node and name else ""

    def _known(self, node: Node, name: str, what: str, allowed: Collection[str]) -> str:
        """The name; if it is unknown the nearest one, so that one slip of the pen does not look like many."""
        if name in allowed:
            return name
        near = nearest(name, allowed)
        hint = f"did you mean '{near}'? " if near else ""
        self._fault(node, f"{what}: '{name}' is unknown; {hint}allowed: {', '.join(allowed) or 'none'}")
        return near or name

    def _state_name(self, node: Node | None, what: str, states: Collection[str]) -> str:
        """Without any states, which is a fault of its own, nothing can be said about their names."""
        return self._choice(node, what, states) if states else self._string(node, what)

    def _role(self, node: Node | None, what: str) -> Role | None:
        name = self._choice(node, what, [role.value for role in Role])
        return next((role for role in Role if role == name), None)

    def _boolean(self, node: Node | None, what: str) -> bool | None:
        """False if it is missing, None if it is neither."""
        if node is None:
            return False
        value = {"true": True, "false": False}.get(_scalar(node, "bool").lower())
        if value is None:
            self._fault(node, f"{what}: must be true or false, not {_shown(node)}")
        return value

    def _version(self, node: Node | None) -> int:
        if node is None:
            return 0
        digits = _scalar(node, "int")
        if not re.fullmatch(r"[1-9][0-9]*", digits):
            self._fault(node, f"version: must be a positive whole number, not {_shown(node)}")
            return 0
        return int(digits)

    def _seconds(self, node: Node | None, what: str) -> float | None:
        if node is None:
            return None
        try:
            seconds = float(_scalar(node, "int", "float"))
        except ValueError:
            seconds = math.nan
        if not 0 < seconds < math.inf:
            self._fault(node, f"{what}: must be a number of seconds above 0, not {_shown(node)}")
        return seconds

    # faults

    def _fault(self, node: Node, message: str) -> None:
        self._faults.append((_line(node), message))

    def _unreadable(self, error: yaml.YAMLError) -> str:
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark:
            line = error.problem_mark.line + 1
            problem = ": ".join(part for part in (error.context, error.problem) if part)
        else:
            line = self._text.count("\n", 0, getattr(error, "position", 0)) + 1
            problem = str(error).splitlines()[0]
        return f"{self._source}:{line}: not YAML: {problem}"


def _line(node: Node) -> int:
    return node.start_mark.line + 1


def _scalar(node: Node, *kinds: str) -> str:
    """The text of a scalar of one of these YAML types; empty for anything else."""
    return str(node.value) if isinstance(node, ScalarNode) and node.tag.removeprefix(_TAG) in kinds else ""


def _shown(node: Node) -> str:
    if not isinstance(node, ScalarNode):
        return "a list" if isinstance(node, SequenceNode) else "a mapping"
    kind = node.tag.removeprefix(_TAG)
    if kind == "str":
        return f"'{node.value}'"
    return f"{node.value} ({kind})" if node.value else "nothing"
