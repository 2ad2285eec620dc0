"""Signed messages of ExESDBGater: `{:secure_message, signature, message}` and `{:unsecured_message, message}`.

Source: `generate_signature/1` and `validate_secure_message/1`, the same in each of `messages/*.ex` of ExESDBGater 0.8:
`:crypto.mac(:hmac, :sha256, secret_key_base, :erlang.term_to_binary(message))`. So the bytes of `term_to_binary` count,
and those differ between releases: until OTP 25 atoms are written as `ATOM_EXT`, from OTP 26 on as
`SMALL_ATOM_UTF8_EXT`, and the keys of a map are in term order until OTP 25 and in the order of the node's own atom
table from OTP 26 on.

A signature that came is checked against both ways of writing atoms, with the keys in the order in which they came,
which is the order in which the sender wrote them when it signed. What is signed here is written as OTP 25 or as OTP 26
reads it; nodes of OTP 26 agree among themselves only by luck on maps with more than one atom as key, and so with us.
Secrets and messages are never in an error's text.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Iterator, Mapping
from enum import IntEnum
from itertools import chain
from typing import Final

from gater.erl import etf
from gater.erl.errors import EncodeError, ErlError
from gater.erl.terms import Atom, EncodedTerm, Export, ImproperList, Pid, Port, Reference, Term, TermMap, as_plain

SECURE_MESSAGE: Final = Atom("secure_message")
UNSECURED_MESSAGE: Final = Atom("unsecured_message")

SMALL_MAP_KEYS: Final = 32
"""`MAP_SMALL_MAP_LIMIT`: a larger map is a hash map, whose order only a BEAM knows."""

_MAX_STRING_EXT: Final = 0xFFFF
_MAX_DEPTH: Final = etf.MAX_DEPTH


class MessageRefused(ErlError):
    """A message that may not be believed; `reason` is the atom the original answers in `{:error, reason}`."""

    def __init__(self, reason: str) -> None:
        self.reason = Atom(reason)
        super().__init__(f"message refused: {reason}")


class Format(IntEnum):
    """Whose `term_to_binary` is meant: its option `minor_version`."""

    OTP_25 = 1
    """OTP 25 and before."""
    OTP_26 = 2
    """OTP 26 and later."""


def sign(message: Term, secret: str, written_for: Format = Format.OTP_25) -> Term:
    """`{:secure_message, signature, message}`, or `{:unsecured_message, message}` where no secret is set.

    `written_for` is the release of the nodes that are to believe it.
    """
    if not secret:
        return (UNSECURED_MESSAGE, message)
    return (SECURE_MESSAGE, _mac(secret, term_to_binary(message, written_for, sort_keys=True)), message)


def sign_as_written(message: Term, written: bytes, secret: str) -> Term:
    """`{:secure_message, signature, message}` over `written`, the bytes `term_to_binary(message)` gave on the node that
    is to believe it: right for every release and any map.

    Raises `MessageRefused` if those bytes say anything else, lest a node has us sign what we never said.
    """
    try:
        same = etf.decode(written) == message
    except ErlError:
        same = False
    if not same:
        raise MessageRefused("invalid_format")
    return (SECURE_MESSAGE, _mac(secret, written), message)


def verify(message: Term, secret: str) -> Term:
    """The message inside, if it may be believed; raises `MessageRefused` where the original answers `{:error, reason}`.

    With a secret only what was signed with it is believed; without one only what is not signed.
    """
    match message:
        case (kind, bytes() as signature, inside) if kind is SECURE_MESSAGE:
            if not secret:
                raise MessageRefused("no_secret_configured")
            # No early exit: how long the comparison takes tells nothing.
            matches = [
                hmac.compare_digest(signature, _mac(secret, term_to_binary(inside, written))) for written in Format
            ]
            if not any(matches):
                raise MessageRefused("invalid_signature")
            return inside
        case (kind, inside) if kind is UNSECURED_MESSAGE:
            if secret:
                raise MessageRefused("unsecured_message_rejected")
            return inside
    raise MessageRefused("invalid_format")


def is_signed_form(message: Term) -> bool:
    """Whether the message is one of the two forms, believable or not."""
    return type(message) is tuple and len(message) in (2, 3) and message[0] in (SECURE_MESSAGE, UNSECURED_MESSAGE)


def _mac(secret: str, data: bytes) -> bytes:
    return hmac.digest(secret.encode(), data, hashlib.sha256)


def term_to_binary(root: Term, written: Format, *, sort_keys: bool = False) -> bytes:
    """Exactly what `erlang:term_to_binary/1` of that release gives, for a map in the order its keys have here.

    With `sort_keys` maps of up to `SMALL_MAP_KEYS` keys are written in term order, as OTP 25 keeps them (keys that are
    numbers, atoms and binaries; others stay behind them in the order they have). Raises `EncodeError`
    for what is no term, or is nested deeper than `MAX_DEPTH`.
    """
    out = [b"\x83"]
    stack: list[Iterator[Term]] = []
    items: Iterator[Term] = iter((root,))
    sort = sort_keys and written is Format.OTP_25
    while True:
        for item in items:
            kind = type(item)
            children: Iterable[Term]
            if kind is Atom or kind is bool or item is None:
                out.append(_atom(item, written))
            elif kind is tuple:
                out.append(b"h%c" % len(item) if len(item) < 256 else b"i" + len(item).to_bytes(4, "big"))
                children = item
                break
            elif kind is list:
                if not item:
                    out.append(b"j")
                elif len(item) <= _MAX_STRING_EXT and all(type(each) is int and 0 <= each <= 255 for each in item):
                    out.append(b"k" + len(item).to_bytes(2, "big") + bytes(item))
                else:
                    out.append(b"l" + len(item).to_bytes(4, "big"))
                    children = chain(item, ([],))
                    break
            elif kind is dict or kind is TermMap:
                out.append(b"t" + len(item).to_bytes(4, "big"))
                pairs = _pairs(item)
                if sort and len(item) <= SMALL_MAP_KEYS:
                    pairs = sorted(pairs, key=lambda pair: _order(pair[0]))
                children = chain.from_iterable(pairs)
                break
            elif kind is ImproperList:
                out.append(b"l" + len(item.elements).to_bytes(4, "big"))
                children = chain(item.elements, (item.tail,))
                break
            elif kind in (Pid, Reference, Port, Export):
                out.append(_named(item, written))
            elif kind is EncodedTerm:
                children = (etf.decode_encoded(item),)
                break
            elif isinstance(item, tuple | list | Mapping):
                children = (as_plain(item),)
                break
            else:
                out.append(etf.encode_term(item))
        else:
            if not stack:
                return b"".join(out)
            items = stack.pop()
            continue
        stack.append(items)
        if len(stack) > _MAX_DEPTH:
            raise EncodeError(f"containers nested deeper than MAX_DEPTH ({_MAX_DEPTH})")
        items = iter(children)


def _pairs(term: Mapping[Term, Term]) -> Iterable[tuple[Term, Term]]:
    return term.pairs() if isinstance(term, TermMap) else term.items()


def _atom(term: Term, written: Format) -> bytes:
    name = "nil" if term is None else term.name if type(term) is Atom else "true" if term else "false"
    if written is Format.OTP_25:
        try:
            latin1 = name.encode("latin-1")
        except UnicodeEncodeError:
            pass
        else:
            return b"d" + len(latin1).to_bytes(2, "big") + latin1
    return etf.encode_term(term)


def _named(term: Term, written: Format) -> bytes:
    """A term with atoms in it: they are written in the same way."""
    out: list[bytes] = []
    etf.encode_into(out, term, _OldAtoms() if written is Format.OTP_25 else None)
    return b"".join(out)


class _OldAtoms(etf.AtomRefs):
    def __missing__(self, atom: Atom) -> bytes:
        return _atom(atom, Format.OTP_25)


def _order(key: Term) -> tuple[int, Term]:
    """Where a key stands in a small map of OTP 25."""
    if type(key) is int:
        return (0, key)
    if type(key) is float:
        return (1, key)
    if type(key) is Atom or type(key) is bool or key is None:
        name = "nil" if key is None else key.name if type(key) is Atom else "true" if key else "false"
        return (2, name)
    if type(key) is bytes or type(key) is str:
        return (3, key.encode() if type(key) is str else key)
    return (4, 0)
