"""Signed messages: the bytes that are signed are those of `term_to_binary`, and what is not signed right is refused."""

from __future__ import annotations

import gzip
import hashlib
import hmac
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gater.erl.etf import decode
from gater.erl.terms import Atom, EncodedTerm, Fun, Term
from gater.pubsub.signatures import (
    SECURE_MESSAGE,
    UNSECURED_MESSAGE,
    Format,
    MessageRefused,
    is_signed_form,
    sign,
    sign_as_written,
    term_to_binary,
    verify,
)

CAPTURES = Path(__file__).parent / "captures"
VECTORS: list[dict[str, Any]] = json.loads(gzip.decompress((CAPTURES / "etf.json.gz").read_bytes()))["vectors"]
SECRET = "not a real secret"
MESSAGE: Term = (
    Atom("node_health_updated"),
    {Atom("status"): Atom("healthy"), Atom("node"): Atom("a@b"), Atom("checks"): {}, Atom("load_avg"): None},
)


def test_terms_are_written_as_a_beam_of_otp_25_writes_them() -> None:
    compared = 0
    for vector in VECTORS:
        for form in ("plain", "minor1"):
            data = bytes.fromhex(vector[form])
            assert term_to_binary(decode(data), Format.OTP_25) == data
            compared += 1
    assert compared > 1000


def test_small_maps_are_signed_in_term_order() -> None:
    order: list[Term] = [-3, 2, 0.5, Atom("a"), Atom("ab"), Atom("b"), None, True, b"", b"x"]
    written = term_to_binary(dict.fromkeys(reversed(order), 0), Format.OTP_25, sort_keys=True)
    assert list(decode(written)) == order


def test_the_signature_is_the_originals() -> None:
    # term_to_binary({ok, #{a => 1, b => <<"x">>}}) of OTP 25 and of OTP 26.
    message = (Atom("ok"), {Atom("b"): b"x", Atom("a"): 1})
    old = bytes.fromhex("83680264 00026f6b 74 00000002 640001 61 6101 640001 62 6d00000001 78")
    new = bytes.fromhex("83680277 026f6b 74 00000002 7701 62 6d00000001 78 7701 61 6101")
    for written_for, data in ((Format.OTP_25, old), (Format.OTP_26, new)):
        signature = hmac.new(SECRET.encode(), data, hashlib.sha256).digest()
        assert sign(message, SECRET, written_for) == (SECURE_MESSAGE, signature, message)


def test_a_beam_of_otp_25_signs_the_same() -> None:
    # crypto:mac(hmac, sha256, Secret, term_to_binary(Message)) there.
    signature = bytes.fromhex("651d64e8893196db8370608896d2c813c7282f0e3ddd4c188fb7bf79267c39dc")
    status: dict[Term, Term] = {
        Atom("timestamp"): None,
        Atom("status"): Atom("healthy"),
        Atom("node"): Atom("a@b"),
        Atom("checks"): {b"disk": Atom("ok"), Atom("cpu"): [1, 2, 3]},
        Atom("load_avg"): 0.5,
        Atom("é"): -1,
        7: True,
    }
    assert sign((Atom("node_health_updated"), status), SECRET)[1] == signature


@pytest.mark.parametrize("written_for", list(Format))
def test_what_is_signed_is_believed(written_for: Format) -> None:
    signed = sign(MESSAGE, SECRET, written_for)
    if written_for is Format.OTP_25:
        # A BEAM keeps the keys of a small map in order, and so they come over the wire.
        signed = (signed[0], signed[1], (MESSAGE[0], dict(sorted(MESSAGE[1].items(), key=lambda pair: pair[0].name))))
    assert is_signed_form(signed)
    assert verify(signed, SECRET) == MESSAGE


@pytest.mark.parametrize(
    ("message", "secret", "reason"),
    [
        ((SECURE_MESSAGE, b"x" * 32, MESSAGE), SECRET, "invalid_signature"),
        ((SECURE_MESSAGE, b"", MESSAGE), SECRET, "invalid_signature"),
        (sign(MESSAGE, "another secret"), SECRET, "invalid_signature"),
        ((SECURE_MESSAGE, b"x" * 32, MESSAGE), "", "no_secret_configured"),
        ((UNSECURED_MESSAGE, MESSAGE), SECRET, "unsecured_message_rejected"),
        (MESSAGE, SECRET, "invalid_format"),
        (MESSAGE, "", "invalid_format"),
        ((SECURE_MESSAGE, "text", MESSAGE), SECRET, "invalid_format"),
        ([], SECRET, "invalid_format"),
        (Atom("x"), "", "invalid_format"),
    ],
)
def test_anything_else_is_refused_as_the_original_does(message: Term, secret: str, reason: str) -> None:
    with pytest.raises(MessageRefused) as refused:
        verify(message, secret)
    assert refused.value.reason is Atom(reason)
    assert SECRET not in str(refused.value)


def test_without_a_secret_messages_go_unsigned_and_are_believed() -> None:
    assert sign(MESSAGE, "") == (UNSECURED_MESSAGE, MESSAGE)
    assert verify(sign(MESSAGE, ""), "") == MESSAGE


def test_an_encoded_part_is_signed_as_the_term_it_stands_for() -> None:
    encoded = (Atom("ok"), EncodedTerm(b"w\x01a"))
    assert term_to_binary(encoded, Format.OTP_25) == term_to_binary((Atom("ok"), Atom("a")), Format.OTP_25)


def test_a_fun_is_written_as_it_came() -> None:
    fun = Fun(112, b"body", None, 0)
    assert term_to_binary(fun, Format.OTP_25) == b"\x83pbody"


terms = st.recursive(
    st.one_of(
        st.integers(),
        st.binary(max_size=20),
        st.sampled_from([Atom("a"), Atom("é"), Atom("ж"), True, None]),
        st.floats(allow_nan=False, allow_infinity=False),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=5),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from([Atom("k"), b"k", Atom("j")]), inner, max_size=3),
    ),
    max_leaves=20,
)


@given(terms, st.sampled_from(list(Format)))
def test_whatever_is_written_reads_back(term: Term, written: Format) -> None:
    assert decode(term_to_binary(term, written)) == term


@given(terms)
def test_a_changed_message_is_never_believed(term: Term) -> None:
    _, signature, message = sign(term, SECRET)
    with pytest.raises(MessageRefused):
        verify((SECURE_MESSAGE, signature, (message, 1)), SECRET)


@pytest.mark.parametrize("written_for", Format)
def test_what_another_node_has_written_is_signed_as_it_wrote_it(written_for: Format) -> None:
    kind, payload = MESSAGE
    # From OTP 26 on a node has an order of its own for the keys.
    written = term_to_binary((kind, dict(reversed(payload.items()))), written_for)
    secured = sign_as_written(MESSAGE, written, SECRET)
    assert secured == (SECURE_MESSAGE, hmac.digest(SECRET.encode(), written, hashlib.sha256), MESSAGE)


@pytest.mark.parametrize("written", [b"", b"\x83", term_to_binary((Atom("another"), {}), Format.OTP_26), b"no term"])
def test_nothing_is_signed_that_was_not_said(written: bytes) -> None:
    with pytest.raises(MessageRefused):
        sign_as_written(MESSAGE, written, SECRET)
