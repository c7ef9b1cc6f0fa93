"""YAML texts in and out: documents as structs, with the line of each of their parts and every fault.

Which keys a document may have is said by a struct for each kind. Reading goes on after each fault, so that one reading
finds all of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from enum import StrEnum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import msgspec
import yaml
from msgspec import Meta, Struct, structs

from wfm.errors import DocumentError
from wfm.grouping import parse_time, storable, unknown

Path = tuple[str | int, ...]
"""Keys and indices that lead to a part of a document."""

Fault = tuple[str, int, str]
"""File, line, message."""


def refuse(faults: Sequence[Fault]) -> None:
    """Raise a `DocumentError` with all faults, in the order of files and lines, if there are some."""
    if faults:
        # sorted() is stable: faults of one line stay in the order in which they were found.
        ordered = sorted(faults, key=lambda fault: fault[:2])
        raise DocumentError([f"{file}:{line}: {message}" for file, line, message in ordered])


class Document(Struct, frozen=True):
    """One document.

    Attributes:
        spec: what it says. Where a part had a fault, an empty value stands for it, or none.
        lines: where each of its parts stands in `file`.
        sound: it has no fault.
    """

    kind: str
    spec: Any
    file: str
    lines: dict[Path, int]
    sound: bool

    def fault(self, path: Path, message: str) -> Fault:
        """A fault at a part of the document, or at the nearest part around it that is there."""
        while path not in self.lines:
            path = path[:-1]
        return self.file, self.lines[path], message


_TAG = "tag:yaml.org,2002:"


class _Loader(yaml.SafeLoader):
    """Safe YAML whose plain scalars follow version 1.2.

    In PyYAML's version 1.1 the line NO (nitric oxide) is false, 12:30:49 is the number 45049, and 1e3 is a text.
    """

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own name, filled below

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.composer.ComposerError(None, None, "aliases are not supported: write it out", mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever `_Loader` would not read as a text."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers

    def text(self, value: str) -> yaml.ScalarNode:
        # PyYAML folds at these line ends unless they are escaped, and reads them back as spaces.
        return self.represent_scalar(_TAG + "str", value, style='"' if re.search("[\x85\u2028\u2029]", value) else None)


_Dumper.add_representer(str, _Dumper.text)

_SCALARS: dict[str, tuple[str, list[str], Callable[[str], Any]]] = {
    # tag: (pattern, first characters, constructor)
    "null": (r"~|null|Null|NULL|", [*"~nN", ""], lambda _: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"], lambda s: s.lower() == "true"),
    "int": (
        r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
        [*"-+0123456789"],
        lambda s: int(s, 0 if s[:2] in ("0o", "0x") else 10),
    ),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        [*"-+.0123456789"],
        lambda s: float(s.lower().replace(".inf", "inf").replace(".nan", "nan")),
    ),
}
for _name, (_pattern, _first, _) in _SCALARS.items():
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


def dump(documents: Sequence[Mapping[str, Any]]) -> str:
    """Mappings as YAML that `read` reads as the same."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, explicit_start=True)


_BAD = object()
"""Stands for a value that had a fault; the fault is noted."""


class Reading(Struct, frozen=True):
    """What was read.

    Attributes:
        documents: also those with faults.
        faults: every one.
        unread: parts of the texts that could not be read as documents of some kind.
    """

    documents: list[Document] = []
    faults: list[Fault] = []
    unread: list[str] = []


def read(sources: Sequence[tuple[str, str]], kinds: Mapping[str, type[Struct]]) -> Reading:
    """Read YAML texts; each may hold many documents.

    Args:
        sources: (file name, text) each.
        kinds: by the value of the key ``kind``, the struct whose fields are the other keys.
    """
    reading = Reading()
    for file, text in sources:
        _Reader(file, text, kinds, reading).read()
    return reading


class _Reader:
    """Reads the documents of one text, and goes on after each fault."""

    def __init__(self, file: str, text: str, kinds: Mapping[str, type[Struct]], reading: Reading) -> None:
        self.file = file
        self.text = text
        self.kinds = kinds
        self.reading = reading
        self.lines: dict[Path, int] = {}
        self.sound = True

    def read(self) -> None:
        done = 0
        try:
            loader = _Loader(self.text)
            while loader.check_node():
                node = loader.get_node()
                if node is not None and node.tag != _TAG + "null":
                    self._document(node)
                    done = node.end_mark.index
            return
        except yaml.MarkedYAMLError as e:
            mark = e.problem_mark or e.context_mark
            self._fault(mark.line + 1 if mark else 1, ", ".join(filter(None, (e.context, e.problem))))
        except yaml.reader.ReaderError as e:
            line = self.text.count("\n", 0, e.position) + 1
            self._fault(line, f"the character #x{ord(self.text[e.position]):04x} is not allowed in YAML")
        except RecursionError:
            self._fault(1, "nested too deeply")
        self.reading.unread.append(self.text[done:])

    def _document(self, node: yaml.Node) -> None:
        self.lines = {(): _line(node)}
        self.sound = True
        if not isinstance(node, yaml.MappingNode):
            self._note(node, (), f"expected a document with kind and name, got {_shown(node)}")
        elif not (named := [value for key, value in node.value if key.value == "kind"]):
            self._note(node, (), f"missing key 'kind'; allowed: {', '.join(self.kinds)}")
        elif (kind := named[0].value if isinstance(named[0], yaml.ScalarNode) else "") not in self.kinds:
            self._note(named[0], (), unknown("kind", kind, self.kinds))
        else:
            spec = self._struct(self.kinds[kind], node, (), beside=("kind",))
            self.reading.documents.append(Document(kind, spec, self.file, self.lines, self.sound))
            return
        self.reading.unread.append(self.text[node.start_mark.index : node.end_mark.index])

    def _fault(self, line: int, message: str) -> None:
        self.reading.faults.append((self.file, line, message))

    def _note(self, node: yaml.Node, path: Path, message: str) -> Any:
        self.sound = False
        self._fault(_line(node), f"{_text(path)}: {message}" if path else message)
        return _BAD

    def _entries(self, node: yaml.MappingNode, path: Path) -> dict[str, yaml.Node]:
        entries: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode) or not storable(key.value):
                self._note(key, path, f"expected a text as key, got {_shown(key)}")
            elif key.value in entries:
                first = _line(entries[key.value])
                self._note(key, path, f"key {key.value!r} comes twice (first in line {first})")
            else:
                entries[key.value] = value
        return entries

    def _struct(self, cls: type[Struct], node: yaml.Node, path: Path, beside: Sequence[str] = ()) -> Any:
        if not isinstance(node, yaml.MappingNode):
            return self._note(node, path, f"expected keys and values, got {_shown(node)}")
        entries = self._entries(node, path)
        fields = {f.encode_name: f for f in structs.fields(cls)}
        keys = {key.value: key for key, _ in node.value if isinstance(key, yaml.ScalarNode)}
        for name in entries:
            if name not in fields and name not in beside:
                self._note(keys[name], path, unknown("key", name, [*beside, *fields]))
        values: dict[str, Any] = {}
        for name, f in fields.items():
            value = _BAD
            if name in entries:
                value = self._value(f.type, entries[name], (*path, name))
                if f.required and value == () and not entries[name].value:
                    self._note(entries[name], (*path, name), "must not be empty")
            elif f.required:
                self._note(node, path, f"missing key {name!r}")
            if value is not _BAD:
                values[f.name] = value
            elif f.required:
                values[f.name] = () if get_origin(f.type) is tuple else ""
        return cls(**values)

    def _value(self, type_: Any, node: yaml.Node, path: Path) -> Any:
        self.lines[path] = _line(node)
        origin, args = get_origin(type_), get_args(type_)
        if type_ is Any:
            return self._plain(node, path)
        if origin in (Union, UnionType):
            if node.tag == _TAG + "null":
                return None
            (type_,) = (arg for arg in args if arg is not NoneType)
            return self._value(type_, node, path)
        if isinstance(type_, type) and issubclass(type_, Struct):
            return self._struct(type_, node, path)
        if origin is tuple:
            if not isinstance(node, yaml.SequenceNode):
                return self._note(node, path, f"expected a list, got {_shown(node)}")
            items: list[Any] = []
            for child in node.value:  # numbered as in the result, where `lines` is looked up
                item = self._value(args[0], child, (*path, len(items)))
                items += [] if item is _BAD else [item]
            return tuple(items)
        if origin is dict:
            if not isinstance(node, yaml.MappingNode):
                return self._note(node, path, f"expected keys and values, got {_shown(node)}")
            found = {k: self._value(args[1], v, (*path, k)) for k, v in self._entries(node, path).items()}
            return {k: v for k, v in found.items() if v is not _BAD}
        return self._scalar(type_, node, path)

    def _scalar(self, type_: Any, node: yaml.Node, path: Path) -> Any:
        base = get_args(type_)[0] if get_origin(type_) is Annotated else type_
        choices = get_args(base) if get_origin(base) is Literal else ()
        if isinstance(base, type) and issubclass(base, StrEnum):
            choices = tuple(base)
        if not isinstance(node, yaml.ScalarNode):
            return self._note(node, path, f"expected {_expected(type_)}, got {_shown(node)}")
        value = self._plain(node, path)
        if value is _BAD:
            return _BAD
        if (base is str or choices) and value is not None:
            value = node.value  # as it is written: version 1.10 is not 1.1
        if choices and value is not None and value not in choices:
            return self._note(node, path, unknown(str(path[-1]), value, choices))
        try:
            return parse_time(node.value) if base is datetime else msgspec.convert(value, type_)
        except (msgspec.ValidationError, ValueError, OverflowError):
            self._note(node, path, f"expected {_expected(type_)}, got {_shown(node)}")
            return value if base is str and value is not None else _BAD  # what refers to it by name is no fault more

    def _plain(self, node: yaml.Node, path: Path) -> Any:
        """A node as JSON value."""
        if isinstance(node, yaml.CollectionNode):
            self.lines[path] = _line(node)
        if isinstance(node, yaml.SequenceNode):
            listed: list[Any] = []
            for child in node.value:  # numbered as in `_value`
                item = self._plain(child, (*path, len(listed)))
                listed += [] if item is _BAD else [item]
            return listed
        if isinstance(node, yaml.MappingNode):
            found = {k: self._plain(v, (*path, k)) for k, v in self._entries(node, path).items()}
            return {k: v for k, v in found.items() if v is not _BAD}
        tag = str(node.tag).removeprefix(_TAG)
        if tag == "str" and storable(node.value):
            return node.value
        if tag == "str":
            return self._note(node, path, f"{node.value!r} has characters that cannot be stored")
        if tag not in _SCALARS:
            return self._note(node, path, f"the tag {node.tag} is not allowed")
        try:
            value = _SCALARS[tag][2](node.value)
        except ValueError:
            return self._note(node, path, f"{_shown(node)} is not a {tag}")
        if isinstance(value, float) and not math.isfinite(value):
            return self._note(node, path, f"{_shown(node)} is not a finite number")
        return value


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _text(path: Path) -> str:
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        text = str(node.value)
        return repr(text if len(text) <= 60 else text[:57] + "...") if node.tag != _TAG + "null" else "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "keys and values"


def _expected(type_: Any) -> str:
    base, *notes = get_args(type_) if get_origin(type_) is Annotated else (type_,)
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false", datetime: "an ISO 8601 time"}
    described = [n.description for n in notes if isinstance(n, Meta) and n.description]
    return described[0] if described else words.get(base) or f"one of {', '.join(get_args(base) or base)}"
