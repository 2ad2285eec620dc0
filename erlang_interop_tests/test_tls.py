"""Distribution over TLS with real nodes (`-proto_dist inet_tls`), both directions, certificates checked."""

from __future__ import annotations

import asyncio
import datetime
import functools
import ipaddress
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from erlang_interop_tests.beam import START_TIMEOUT_S, BeamNode, Beams, unique_name
from erlang_interop_tests.python_node import Server
from gater.erl import Node, NodeOptions, NodeTls, make_node
from gater.erl.errors import ErlError, NodeError
from gater.erl.gen_server import start_server
from gater.erl.rpc import erpc_call
from gater.erl.terms import Atom


@dataclass(frozen=True, slots=True)
class Files:
    """A certificate for a host, its key, and the authority that signed it, as PEM files."""

    certificate: str
    key: str
    authority: str

    def tls(self) -> NodeTls:
        return NodeTls.of_files(certificate=self.certificate, key=self.key, authority=self.authority)

    def erl_arguments(self) -> list[str]:
        options = {
            "server_certfile": self.certificate,
            "server_keyfile": self.key,
            "server_cacertfile": self.authority,
            "server_verify": "verify_peer",
            "server_fail_if_no_peer_cert": "true",
            "client_certfile": self.certificate,
            "client_keyfile": self.key,
            "client_cacertfile": self.authority,
            "client_verify": "verify_peer",
        }
        return [
            "-proto_dist",
            "inet_tls",
            *(part for name, value in options.items() for part in ("-ssl_dist_opt", name, value)),
        ]


def make_files(directory: Path, host: str = "127.0.0.1") -> Files:
    directory.mkdir()
    now = datetime.datetime.now(datetime.UTC)
    authority_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    authority_name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])

    def begin(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(authority_name)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    authority = (
        begin(authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    certificate = (
        begin(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)]), key.public_key())
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(host), x509.IPAddress(ipaddress.ip_address(host))]),
            critical=False,
        )
        .add_extension(
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
        )
        .sign(authority_key, hashes.SHA256())
    )
    files = Files(*(str(directory / name) for name in ("cert.pem", "key.pem", "ca.pem")))
    Path(files.certificate).write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    Path(files.authority).write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    Path(files.key).write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return make_files(tmp_path / "ours")


@functools.cache
def borrowed() -> list[str]:
    """The directories of code that the OTP 28 of these tests lacks, of the `erl` that is installed."""
    directories = "[filename:join(code:lib_dir(Name), ebin) || Name <- [ssl, public_key, asn1]]"
    done = subprocess.run(
        ["erl", "-noinput", "-eval", f'io:put_chars(lists:join("\\n", {directories})), halt().'],
        capture_output=True,
        text=True,
        check=True,
        timeout=START_TIMEOUT_S,
    )
    return done.stdout.split()


async def start_beam(beam: Beams, otp: int, arguments: list[str]) -> BeamNode:
    """A node that is distributed over TLS; one of OTP 28 has the installed OTP's `ssl` and its own `crypto`."""
    code = ["-pa", *await asyncio.to_thread(borrowed)] if otp == 28 else []
    return await beam.start("erlang", otp=otp, arguments=[*code, *arguments])


@pytest.fixture
async def tls_node(beam: Beams, otp: int, files: Files) -> BeamNode:
    return await start_beam(beam, otp, files.erl_arguments())


async def python(beam: Beams, files: Files | None) -> Node:
    options = NodeOptions(
        epmd_port=await beam.epmd_port(), builtin_epmd=False, tls=None if files is None else files.tls()
    )
    return make_node(unique_name("py"), cookie=beam.cookie, options=options)


async def test_a_beam_connects_over_tls(tls_node: BeamNode, beam: Beams, files: Files) -> None:
    async with await python(beam, files) as node:
        await start_server(node, Server(), name="counter")
        assert await tls_node.eval("net_adm:ping(N)", N=node.name) is Atom("pong")
        same = "B = rand:bytes(3000000), gen_server:call({counter, N}, {echo, B}) =:= B"
        assert await tls_node.eval(same, N=node.name) is True


async def test_python_connects_over_tls(tls_node: BeamNode, beam: Beams, files: Files) -> None:
    async with await python(beam, files) as node:
        assert await erpc_call(node, tls_node.atom, "erlang", "node") is tls_node.atom
        assert await erpc_call(node, tls_node.atom, "erlang", "byte_size", [bytes(3_000_000)]) == 3_000_000


async def test_two_python_nodes_connect_over_tls(beam: Beams, files: Files) -> None:
    async with await python(beam, files) as one, await python(beam, files) as two:
        assert await erpc_call(one, two.name, "erlang", "node") is two.name


async def test_a_certificate_of_another_authority_is_refused_both_ways(
    tls_node: BeamNode, beam: Beams, tmp_path: Path
) -> None:
    async with await python(beam, make_files(tmp_path / "others")) as node:
        assert await tls_node.eval("net_adm:ping(N)", N=node.name) is Atom("pang")
        with pytest.raises(ErlError):
            await node.connect(tls_node.atom)
        assert node.nodes() == []


async def test_a_beam_without_a_certificate_is_refused(beam: Beams, otp: int, files: Files) -> None:
    arguments = files.erl_arguments()
    for option in ("client_certfile", "client_keyfile"):
        at = arguments.index(option)
        del arguments[at - 1 : at + 2]
    peer = await start_beam(beam, otp, arguments)
    async with await python(beam, files) as node:
        assert await peer.eval("net_adm:ping(N)", N=node.name) is Atom("pang")
        assert node.nodes() == []


async def test_a_certificate_for_another_host_is_refused(beam: Beams, otp: int, files: Files, tmp_path: Path) -> None:
    elsewhere = make_files(tmp_path / "elsewhere", "127.0.0.2")
    peer = await start_beam(beam, otp, elsewhere.erl_arguments())
    known = Files(files.certificate, files.key, elsewhere.authority)
    async with await python(beam, known) as node:
        with pytest.raises(ErlError, match=r"127\.0\.0\.1"):
            await node.connect(peer.atom)
        assert node.nodes() == []


async def test_plain_and_tls_nodes_do_not_connect(tls_node: BeamNode, beam: Beams) -> None:
    async with await python(beam, None) as node:
        assert await tls_node.eval("net_adm:ping(N)", N=node.name) is Atom("pang")
        with pytest.raises(ErlError):
            await node.connect(tls_node.atom)


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(NodeError, match="cannot be used"):
        NodeTls.of_files(certificate=str(tmp_path / "none"), key="none", authority="none")
