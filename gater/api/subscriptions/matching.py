"""Which events a subscription wants: the four kinds, as the original's Khepri filters decide it.

Source: `streams_filters.erl` of ExESDB 0.11. `by_stream` is `$all` or everything behind the first `$` of the selector;
`by_event_type` is the pattern `%{event_type: type}`; `by_event_pattern` matches the event record, `by_event_payload`
its `data`. Patterns are those of `khepri`'s `#if_data_matches{}`, which are Erlang match specifications (`ets`): of a
map the keys named, tuples and lists element by element, `:_` anything, `:"$1"` anything but the same everywhere, all
else equal by `=:=`.

A selector is compiled once into a `Matcher`; what it can be found by (stream, event type) stands in it, so that an
event is only shown to subscriptions that may want it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias

from gater.api.schema import (
    BY_EVENT_PATTERN,
    BY_EVENT_PAYLOAD,
    BY_EVENT_TYPE,
    BY_STREAM,
    DATA,
    EVENT_STREAM_ID,
    EVENT_TYPE,
    show,
)
from gater.api.subscriptions.protocol import Event
from gater.erl.terms import Atom, ImproperList, Term, TermMap, exact_key

ALL_STREAMS: Final = b"$all"

MAX_PATTERN_DEPTH: Final = 64
"""Containers in containers in a pattern. Patterns are compiled to nested functions; nobody's event is that deep."""

Test: TypeAlias = Callable[[Term, dict[str, Term]], bool]
"""Whether a term fits; what `:"$1"` and its like stand for is kept in the second argument."""

_ANYTHING: Final = Atom("_")
_VARIABLE: Final = re.compile(r"\$(0|[1-9][0-9]{0,8})")
_MISSING: Final = object()


class SelectorError(ValueError):
    """A selector that its kind cannot have; the message says why."""


@dataclass(frozen=True, slots=True)
class Matcher:
    """A compiled selector. `stream` and `event_type` are what every wanted event has, None where it may have any."""

    kind: Atom
    selector: Term
    stream: bytes | None
    event_type: bytes | None
    test: Callable[[Mapping[Term, Term]], bool] | None
    """What is left to be asked of an event of that stream and type; None: nothing, it is wanted."""

    def wants(self, event: Event) -> bool:
        """Whether the subscription wants this event, wherever it comes from."""
        if self.stream is not None and event.stream != self.stream:
            return False
        if self.event_type is not None and event.type != self.event_type:
            return False
        return self.test is None or self.test(event.record)

    @property
    def identity(self) -> Term:
        """Equal for two matchers exactly when kind and selector are the same (`=:=`)."""
        return (self.kind.name, exact_key(self.selector))


def compile_selector(kind: Atom, selector: Term) -> Matcher:
    """The matcher of a kind and its selector; `SelectorError` if the kind is unknown or cannot have this selector."""
    if isinstance(selector, str):
        selector = selector.encode()
    if kind is BY_STREAM or kind is BY_EVENT_TYPE:
        if type(selector) is not bytes:
            raise SelectorError(f"the selector of {show(kind)} is a binary, got {show(selector)}")
        if kind is BY_EVENT_TYPE:
            return Matcher(kind, selector, None, selector, None)
        if selector == ALL_STREAMS:
            return Matcher(kind, selector, None, None, None)
        _, dollar, stream = selector.partition(b"$")
        if not dollar:
            raise SelectorError(f'a by_stream selector is "$all" or "$" and the stream, got {show(selector)}')
        return Matcher(kind, selector, stream, None, None)
    if kind is BY_EVENT_PATTERN:
        if not isinstance(selector, Mapping):
            raise SelectorError(f"the selector of {show(kind)} is a map, got {show(selector)}")
        return Matcher(
            kind, selector, _literal(selector, EVENT_STREAM_ID), _literal(selector, EVENT_TYPE), pattern_test(selector)
        )
    if kind is BY_EVENT_PAYLOAD:
        return Matcher(kind, selector, None, None, pattern_test({DATA: selector}))
    raise SelectorError(f"no subscription is of the kind {show(kind)}")


def pattern_test(pattern: Term) -> Callable[[Term], bool]:
    """A function that says whether a term fits the match specification pattern; `SelectorError` if it is none."""
    test = _compile(pattern, 0)
    return lambda term: test(term, {})


def _literal(pattern: Mapping[Term, Term], key: Atom) -> bytes | None:
    value = pattern.get(key)
    return value.encode() if isinstance(value, str) else value if type(value) is bytes else None


def _compile(pattern: Term, depth: int) -> Test:
    if depth > MAX_PATTERN_DEPTH:
        raise SelectorError(f"the pattern is nested deeper than MAX_PATTERN_DEPTH ({MAX_PATTERN_DEPTH})")
    if pattern is _ANYTHING:
        return lambda term, bound: True
    if type(pattern) is Atom and _VARIABLE.fullmatch(pattern.name):
        return _variable(pattern.name)
    if isinstance(pattern, Mapping):
        return _map(pattern, depth)
    if isinstance(pattern, ImproperList):
        return _improper(pattern, depth)
    if isinstance(pattern, tuple | list):
        return _sequence(pattern, depth)
    return _equal(pattern)


def _variable(name: str) -> Test:
    def test(term: Term, bound: dict[str, Term]) -> bool:
        before = bound.setdefault(name, term)
        return before is term or bool(exact_key(before) == exact_key(term))

    return test


def _map(pattern: Mapping[Term, Term], depth: int) -> Test:
    pairs = pattern.pairs() if isinstance(pattern, TermMap) else pattern.items()
    wanted = []
    for key, value in pairs:
        if key is _ANYTHING or (type(key) is Atom and _VARIABLE.fullmatch(key.name)):
            raise SelectorError(f"a key of a pattern is matched as it is, it cannot be {show(key)}")
        wanted.append((_getter(key), _compile(value, depth + 1)))

    def test(term: Term, bound: dict[str, Term]) -> bool:
        if not isinstance(term, Mapping):
            return False
        for get, fits in wanted:
            value = get(term)
            if value is _MISSING or not fits(value, bound):
                return False
        return True

    return test


def _getter(key: Term) -> Callable[[Mapping[Term, Term]], Term]:
    """Look-up by `=:=`: a plain `dict` finds `1` under `1.0` and `true`."""
    if isinstance(key, str):
        key = key.encode()
    if type(key) is Atom or type(key) is bytes or key is None:
        return lambda term: term.get(key, _MISSING)
    wanted = exact_key(key)

    def get(term: Mapping[Term, Term]) -> Term:
        if isinstance(term, TermMap):
            return term.get(key, _MISSING)
        return next((value for each, value in term.items() if exact_key(each) == wanted), _MISSING)

    return get


def _sequence(pattern: tuple[Term, ...] | list[Term], depth: int) -> Test:
    is_tuple = isinstance(pattern, tuple)
    tests = [_compile(element, depth + 1) for element in pattern]

    def test(term: Term, bound: dict[str, Term]) -> bool:
        if not isinstance(term, tuple if is_tuple else list) or len(term) != len(tests):
            return False
        return all(fits(element, bound) for fits, element in zip(tests, term, strict=True))

    return test


def _improper(pattern: ImproperList, depth: int) -> Test:
    """`[a | pattern]`: the tail may fit the rest of a longer list."""
    heads = [_compile(element, depth + 1) for element in pattern.elements]
    tail = _compile(pattern.tail, depth + 1)

    def test(term: Term, bound: dict[str, Term]) -> bool:
        if isinstance(term, ImproperList):
            elements, rest = term.elements, term.tail
        elif isinstance(term, list):
            elements, rest = term, []
        else:
            return False
        if len(elements) < len(heads):
            return False
        if len(elements) > len(heads):
            left = elements[len(heads) :]
            rest = left if isinstance(term, list) else ImproperList(left, rest)
        return all(fits(each, bound) for fits, each in zip(heads, elements, strict=False)) and tail(rest, bound)

    return test


def _equal(value: Term) -> Test:
    if isinstance(value, str):
        value = value.encode()
    kind = type(value)
    if kind is Atom or kind is bool or value is None:
        return lambda term, bound: term is value
    if kind is int:
        return lambda term, bound: type(term) is int and term == value
    if kind is bytes:
        return lambda term, bound: term == value if type(term) is bytes else _is_text(term, value)
    try:
        wanted = exact_key(value)
    except TypeError as problem:
        raise SelectorError(f"the pattern holds what is no term: {problem}") from problem
    return lambda term, bound: bool(exact_key(term) == wanted)


def _is_text(term: Term, value: bytes) -> bool:
    """Events that never left this process may hold a `str` where the wire has a binary."""
    return type(term) is str and term.encode() == value
