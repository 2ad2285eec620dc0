"""Every setting of the gateway, in one validated class; the only place that reads the environment.

A value comes from the command line, else the environment, else the configuration file, else its default, and remembers
which: a wrong one is refused with one line that says which setting, where it came from, what came and what is allowed.
The environment variables are those of ExESDBGater 0.8 and of `epmd`; an empty one counts as not set, because compose
files pass unset variables on as empty ones. The file is TOML: a table for each part before the dot of a setting's key.

Nothing here opens a socket or starts anything: `gater.cli` builds the settings, `gater.system` acts on them.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from gater.errors import SettingsError

DEFAULT_NAME: Final = "gater@127.0.0.1"
"""Reachable from this machine only: whoever wants more gives a name other machines can resolve."""

DEFAULT_EPMD_PORT: Final = 4369
DEFAULT_NET_TICKTIME_S: Final = 60
"""As `net_ticktime` of the kernel application; peers must agree on it within a quarter."""

DEFAULT_BUSY_WAIT_US: Final = 200
"""A little more than a call to another node takes to be answered; as much as a small call costs anyway."""

DEFAULT_MAX_CONNECTIONS: Final = 1_000
"""Connected nodes, as the original's `max_connections`; a full mesh of this size is far beyond any ExESDB cluster."""

DEFAULT_CONNECTION_RETRY_INTERVAL_MS: Final = 5_000
DEFAULT_HEALTH_CHECK_INTERVAL_MS: Final = 30_000
DEFAULT_GOSSIP_PORT: Final = 45_892
DEFAULT_GOSSIP_BIND: Final = "0.0.0.0"
"""All addresses: a socket bound to one address gets no multicast."""

DEFAULT_GOSSIP_MULTICAST_ADDR: Final = "239.255.0.1"
DEFAULT_GOSSIP_MULTICAST_TTL: Final = 1
"""As `multicast_ttl` of libcluster."""

DEFAULT_CLUSTER_SECRET: Final = "dev_cluster_secret"
"""The original's, so that a development cluster is found without a setting."""

DEFAULT_DNS_POLLING_INTERVAL_MS: Final = 5_000
"""As libcluster's DNSPoll."""

MIN_INTERVAL_MS: Final = 100
"""What is done again and again asks or tells every node of the cluster: ten times a second is the most that helps."""

MAX_DNS_POLLING_INTERVAL_MS: Final = 150_000
"""A node found by DNS is forgotten when it was not named for five minutes; one failed query must not do that."""

DEFAULT_PUB_SUB: Final = "ex_esdb_events"
DEFAULT_STORE: Final = "ex_esdb_store"
DEFAULT_EMBEDDED_DIR: Final = Path("gater-data")
DEFAULT_POOL_SIZE: Final = 10
DEFAULT_CALL_TIMEOUT_MS: Final = 4_500
"""An Elixir caller that gave no timeout gives up after 5,000 (`gen_server:call/2`): the answer comes before."""

DEFAULT_MAX_REQUESTS: Final = 10_000
"""Requests under way at once. At 1 ms each that is ten seconds of work: more would only be answered too late."""

DEFAULT_DRAIN_TIMEOUT_MS: Final = 30_000
DEFAULT_HTTP_PORT: Final = 4001

MAX_ATOM_CHARACTERS: Final = 255
"""Node names, store names and cookies are atoms on the BEAM."""

MAX_DNS_CHARACTERS: Final = 253
"""Of a DNS name (RFC 1035, section 2.3.4, as text)."""

MAX_LIST_ITEMS: Final = 1_000
"""Nodes or stores in one list; far above any cluster, and small enough to print."""

MAX_CONFIG_BYTES: Final = 1024 * 1024
"""A configuration file is a few kilobytes; a larger one is some other file."""

MAX_QUOTED_CHARACTERS: Final = 120
"""Of a wrong value in a message: enough to recognise it, and the message stays one line."""

HIDDEN: Final = "(hidden)"
NOT_SET: Final = "(none)"

_FLAG_OF: Final = {"long": "--name", "short": "--sname"}
_NODE_HEAD: Final = re.compile(r"[0-9A-Za-z_-]+")
_NODE_HOST: Final = re.compile(r"[!-?A-~]+")
_DNS_NAME: Final = re.compile(r"(?!-)[0-9A-Za-z_-]{1,63}(\.[0-9A-Za-z_-]{1,63})*\.?")
_PLAIN_NAME: Final = re.compile(r"[^\s,:\x00-\x1f\x7f][^\s,\x00-\x1f\x7f]*")
_COOKIE: Final = re.compile(r"([ -~]*)[\r\n ]*")
"""What OTP's `auth:check_cookie/2` takes: printable ASCII, then line ends and spaces, which do not count."""

_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,18}")
_OWNER_ONLY: Final = 0o077


class Given(NamedTuple):
    """A value as it was given, and the words for where: `--cookie`, `EX_ESDB_COOKIE`, `gater.toml`."""

    value: object
    source: str


class Kind(NamedTuple):
    """What a setting may be: `allowed` in words, and `parse`, which raises ValueError for anything else.

    `parse` takes what a flag or variable (str), a TOML file (str, int, bool, list) or Python code may hold, and
    returns a parsed value unchanged.
    """

    allowed: str
    parse: Callable[[object], Any]


class Setting(NamedTuple):
    """What is known of one setting besides its value. `key` is its name in the file and in messages."""

    key: str
    kind: Kind
    help: str
    env: tuple[str, ...] = ()
    secret: bool = False


class Effective(NamedTuple):
    """One line of `gater config`: the value as text, secrets hidden, and where it came from."""

    key: str
    value: str
    source: str


def _whole(low: int, high: int, unit: str = "") -> Kind:
    def parse(value: object) -> int:
        if isinstance(value, str) and _WHOLE.fullmatch(value.strip()):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise ValueError
        return value

    return Kind(f"a whole number from {low} to {high}{unit and ' ' + unit}", parse)


def _parse_bool(value: object) -> bool:
    if isinstance(value, bool):
        return value
    return {"true": True, "false": False}[_text(value).lower()]


def _choice(*options: str) -> Kind:
    def parse(value: object) -> str:
        text = _text(value).lower()
        if text not in options:
            raise ValueError
        return text

    return Kind("one of " + ", ".join(options), parse)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value.strip()


def _parse_secret(value: object) -> str:
    if not isinstance(value, str) or "\0" in value:
        raise ValueError
    return value


def _parse_cookie(value: object) -> str:
    match = _COOKIE.fullmatch(value) if isinstance(value, str) else None
    if match is None or len(match[1]) > MAX_ATOM_CHARACTERS:
        raise ValueError
    return match[1]


def _parse_ip(value: object) -> str:
    return str(ipaddress.ip_address(_text(value)))


def _parse_ipv4(value: object) -> str:
    return str(ipaddress.IPv4Address(_text(value)))


def _parse_dns_name(value: object) -> str:
    text = _text(value)
    if text and (len(text) > MAX_DNS_CHARACTERS or not _DNS_NAME.fullmatch(text)):
        raise ValueError
    return text


def _parse_node_basename(value: object) -> str:
    text = _text(value)
    if text and (len(text) > MAX_DNS_CHARACTERS - len("@255.255.255.255") or not _NODE_HEAD.fullmatch(text)):
        raise ValueError
    return text


def _optional(kind: Kind) -> Kind:
    return Kind(kind.allowed, lambda value: None if value is None else kind.parse(value))


def _parse_plain_name(value: object) -> str:
    text = _text(value).removeprefix(":")
    if len(text) > MAX_ATOM_CHARACTERS or not _PLAIN_NAME.fullmatch(text):
        raise ValueError
    return text


def _parse_node_name(value: object) -> str:
    text = _text(value)
    head, at, host = text.partition("@")
    if len(text) > MAX_ATOM_CHARACTERS or not _NODE_HEAD.fullmatch(head) or (at and not _NODE_HOST.fullmatch(host)):
        raise ValueError
    return text


def _parse_peer_name(value: object) -> str:
    text = _parse_node_name(value)
    if "@" not in text:
        raise ValueError
    return text


def _list_of(kind: Kind) -> Kind:
    """A list; in a variable or flag, items stand between commas or spaces. Repeated items count once."""

    def parse(value: object) -> tuple[Any, ...]:
        if isinstance(value, str):
            value = value.replace(",", " ").split()
        if not isinstance(value, (list, tuple)) or len(value) > MAX_LIST_ITEMS:
            raise ValueError
        return tuple(dict.fromkeys(kind.parse(item) for item in value))

    return Kind(f"a list, each {kind.allowed}", parse)


def _parse_embedded(value: object) -> Path | None:
    if value is None or value is False:
        return None
    if value is True:
        return DEFAULT_EMBEDDED_DIR
    if isinstance(value, Path):
        return value
    text = _text(value)
    if not text or "\0" in text:
        raise ValueError
    return Path(text).expanduser()


_BOOL: Final = Kind("true or false", _parse_bool)
_PORT: Final = _whole(1, 65_535)
_MILLISECONDS: Final = _whole(1, 86_400_000, "(milliseconds)")
_INTERVAL: Final = _whole(MIN_INTERVAL_MS, 86_400_000, "(milliseconds)")
_IP: Final = Kind("an IP address", _parse_ip)
_IPV4: Final = Kind("an IPv4 address", _parse_ipv4)
_SECRET: Final = Kind("text", _parse_secret)
_STORE: Final = Kind(f"a name of 1 to {MAX_ATOM_CHARACTERS} characters without spaces or commas", _parse_plain_name)
_NODE: Final = Kind(
    "NAME@HOST, NAME of letters, digits, _ and -, HOST a host name or IP address",
    _parse_node_name,
)


def _setting(
    default: object, key: str, kind: Kind, help: str, *, env: tuple[str, ...] = (), secret: bool = False
) -> Any:
    setting = Setting(key, kind, help, env, secret)
    return field(default=default, repr=not secret, metadata={"setting": setting})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The effective settings. Build them with `Settings.load`, or in Python with `Settings(name=..., cookie=...)`.

    Whichever way, the values are checked: a wrong one raises `SettingsError`. A name ends with the unit of its time.
    """

    name: str = _setting(
        DEFAULT_NAME, "node.name", _NODE, "this node's name, NAME@HOST", env=("EX_ESDB_GATER_NODE_NAME",)
    )
    name_kind: str = _setting(
        "auto",
        "node.name_kind",
        _choice("auto", "long", "short"),
        "long names have a dot or an IP address as host, short ones do not; auto goes by the name",
    )
    cookie: str = _setting(
        "",
        "node.cookie",
        Kind(f"1 to {MAX_ATOM_CHARACTERS} printable ASCII characters", _parse_cookie),
        "the cookie shared by all nodes of the cluster; else the one in ~/.erlang.cookie",
        env=("EX_ESDB_COOKIE", "RELEASE_COOKIE"),
        secret=True,
    )
    listen: tuple[str, ...] = _setting(
        (),
        "node.listen",
        _list_of(_IP),
        "addresses that accept other nodes; default: the loopback address if the name's host is one, else all",
    )
    listen_port: int = _setting(
        0, "node.port", _whole(0, 65_535), "port that accepts other nodes; 0: any free one, told to EPMD"
    )
    net_ticktime_s: int = _setting(
        DEFAULT_NET_TICKTIME_S,
        "node.net_ticktime_s",
        _whole(4, 86_400, "(seconds)"),
        "a node silent for this long is down; the same on every node",
    )
    busy_wait_us: int = _setting(
        DEFAULT_BUSY_WAIT_US,
        "node.busy_wait_us",
        _whole(0, 10_000, "(microseconds)"),
        "how long to look for more input after there was some, before sleeping; 0: not at all",
    )
    max_connections: int = _setting(
        DEFAULT_MAX_CONNECTIONS,
        "node.max_connections",
        _whole(1, 100_000),
        "nodes connected at once",
        env=("EXESDB_GATER_MAX_CONNECTIONS",),
    )
    epmd_port: int = _setting(DEFAULT_EPMD_PORT, "epmd.port", _PORT, "port of EPMD", env=("ERL_EPMD_PORT",))
    epmd_builtin: bool = _setting(True, "epmd.builtin", _BOOL, "start the built-in EPMD when none listens")
    epmd_listen: tuple[str, ...] = _setting(
        (),
        "epmd.listen",
        _list_of(_IP),
        "addresses the built-in EPMD listens on; default: as node.listen",
        env=("ERL_EPMD_ADDRESS",),
    )
    connect: tuple[str, ...] = _setting(
        (),
        "cluster.connect",
        _list_of(Kind(_NODE.allowed, _parse_peer_name)),
        "nodes to connect to and stay connected to",
        env=("EX_ESDB_GATER_CONNECT_TO",),
    )
    connection_retry_interval_ms: int = _setting(
        DEFAULT_CONNECTION_RETRY_INTERVAL_MS,
        "cluster.connection_retry_interval_ms",
        _INTERVAL,
        "how long to wait before connecting to a lost node again",
        env=("EXESDB_GATER_CONNECTION_RETRY_INTERVAL",),
    )
    health_check_interval_ms: int = _setting(
        DEFAULT_HEALTH_CHECK_INTERVAL_MS,
        "cluster.health_check_interval_ms",
        _INTERVAL,
        "how often the health of nodes is checked",
        env=("EXESDB_GATER_HEALTH_CHECK_INTERVAL",),
    )
    pub_sub: str = _setting(
        DEFAULT_PUB_SUB,
        "cluster.pub_sub",
        _STORE,
        "Phoenix.PubSub server that carries the events",
        env=("EX_ESDB_PUB_SUB",),
    )
    secret_key_base: str = _setting(
        "",
        "cluster.secret_key_base",
        _SECRET,
        "key that signs health, metrics and audit messages; empty: unsigned",
        env=("SECRET_KEY_BASE",),
        secret=True,
    )
    gossip: bool = _setting(
        True, "gossip.enabled", _BOOL, "find nodes by libcluster's gossip", env=("EXESDB_GATER_USE_LIBCLUSTER",)
    )
    gossip_port: int = _setting(
        DEFAULT_GOSSIP_PORT, "gossip.port", _PORT, "UDP port of the gossip", env=("EX_ESDB_CLUSTER_PORT",)
    )
    gossip_bind: str = _setting(
        DEFAULT_GOSSIP_BIND, "gossip.bind", _IPV4, "address the gossip binds", env=("EX_ESDB_CLUSTER_INTERFACE",)
    )
    gossip_multicast_addr: str = _setting(
        DEFAULT_GOSSIP_MULTICAST_ADDR,
        "gossip.multicast_addr",
        _IPV4,
        "multicast address of the gossip; any other address is taken as a broadcast one",
        env=("EX_ESDB_GOSSIP_MULTICAST_ADDR",),
    )
    gossip_multicast_if: str | None = _setting(
        None,
        "gossip.multicast_if",
        _optional(_IPV4),
        "address of the interface to send gossip from and to join on; default: the system's choice",
        env=("EX_ESDB_GOSSIP_MULTICAST_IF",),
    )
    gossip_multicast_ttl: int = _setting(
        DEFAULT_GOSSIP_MULTICAST_TTL,
        "gossip.multicast_ttl",
        _whole(0, 255),
        "hops that multicast gossip may take; 0: stay on this machine, 1: on the local network",
    )
    gossip_secret: str = _setting(
        DEFAULT_CLUSTER_SECRET,
        "gossip.secret",
        _SECRET,
        "secret that encrypts the gossip; empty (in the file): not encrypted",
        env=("EX_ESDB_CLUSTER_SECRET",),
        secret=True,
    )
    dns_query: str = _setting(
        "",
        "dns.query",
        Kind("a DNS name", _parse_dns_name),
        "DNS name whose A records are nodes to connect to; empty: DNS is not asked",
        env=("EX_ESDB_GATER_DNS_QUERY",),
    )
    dns_node_basename: str = _setting(
        "",
        "dns.node_basename",
        Kind("the part of a node's name before the @: letters, digits, _ and -", _parse_node_basename),
        "what stands before the @ in the names of those nodes",
        env=("EX_ESDB_GATER_DNS_NODE_BASENAME",),
    )
    dns_polling_interval_ms: int = _setting(
        DEFAULT_DNS_POLLING_INTERVAL_MS,
        "dns.polling_interval_ms",
        _whole(MIN_INTERVAL_MS, MAX_DNS_POLLING_INTERVAL_MS, "(milliseconds)"),
        "how often DNS is asked",
        env=("EX_ESDB_GATER_DNS_POLLING_INTERVAL",),
    )
    stores: tuple[str, ...] = _setting(
        (DEFAULT_STORE,), "store.ids", _list_of(_STORE), "stores the embedded store holds", env=("EX_ESDB_STORE_ID",)
    )
    embedded: Path | None = _setting(
        None,
        "store.embedded",
        Kind("a directory, or true for ./gater-data, or false", _parse_embedded),
        "directory of the embedded store; false: none, serve only the cluster",
    )
    pool_size: int = _setting(
        DEFAULT_POOL_SIZE,
        "gateway.pool_size",
        _whole(0, 1_000),
        "gateway workers registered for each store; 0: none",
        env=("EXESDB_GATER_POOL_SIZE",),
    )
    call_timeout_ms: int = _setting(
        DEFAULT_CALL_TIMEOUT_MS,
        "gateway.call_timeout_ms",
        _MILLISECONDS,
        "how long a request may take where its caller gave no time",
    )
    max_requests: int = _setting(
        DEFAULT_MAX_REQUESTS,
        "gateway.max_requests",
        _whole(1, 1_000_000),
        "requests under way at once; more are answered {:error, :overloaded}",
    )
    append_mode: Literal["auto", "guarded", "worker"] = _setting(
        "auto",
        "gateway.append_mode",
        _choice("auto", "guarded", "worker"),
        "how events are appended: checked by the store itself (guarded), by its workers, or auto: guarded if it can be",
    )
    drain_timeout_ms: int = _setting(
        DEFAULT_DRAIN_TIMEOUT_MS,
        "gateway.drain_timeout_ms",
        _MILLISECONDS,
        "how long a stopping gateway waits for requests under way",
    )
    http_port: int = _setting(
        DEFAULT_HTTP_PORT,
        "http.port",
        _PORT,
        "port of health, metrics and status (nothing is served there yet)",
        env=("EXESDB_GATER_PORT",),
    )
    log_level: str = _setting(
        "info", "log.level", _choice("debug", "info", "warning", "error", "critical"), "the least level logged"
    )
    log_format: str = _setting("console", "log.format", _choice("console", "json"), "how a log line looks")

    sources: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Where each value came from, by field name; a field that is missing has its default or was given in Python."""

    def __post_init__(self) -> None:
        for item, setting in _declared():
            value = getattr(self, item.name)
            try:
                parsed = setting.kind.parse(value)
            except (ValueError, KeyError):
                came = "a value that is not allowed" if setting.secret else f"got {_quoted(value)}"
                raise self._wrong(item.name, f"{came}, allowed is {setting.kind.allowed}") from None
            object.__setattr__(self, item.name, parsed)
        self._complete_name()
        self._check_peers()
        self._check_dns()
        if not self.stores:
            raise self._wrong("stores", "got no store, allowed is one or more")
        if not self.listen:
            object.__setattr__(self, "listen", ("127.0.0.1",) if self._host_is_loopback() else ("0.0.0.0",))
        if not self.epmd_listen:
            object.__setattr__(self, "epmd_listen", self.listen)

    @classmethod
    def load(
        cls,
        flags: Mapping[str, Given] | None = None,
        *,
        environ: Mapping[str, str] | None = None,
        config: Path | None = None,
    ) -> Settings:
        """The effective settings: `flags` (by field name) above `environ` above the file `config` above defaults.

        `environ` is the process's environment unless given. Raises `SettingsError`.
        """
        environ = os.environ if environ is None else environ
        filed = {} if config is None else _read_config(config)
        given: dict[str, Given] = {}
        for item, setting in _declared():
            if (
                value := (flags or {}).get(item.name) or _from_env(setting, environ) or filed.get(setting.key)
            ) is not None:
                given[item.name] = value
        if "cookie" not in given and (cookie := _cookie_file(environ)) is not None:
            given["cookie"] = cookie
        values: dict[str, Any] = {name: item.value for name, item in given.items()}
        return cls(**values, sources={name: item.source for name, item in given.items()})

    def require_cookie(self) -> str:
        """The cookie; raises `SettingsError` where none was found, because no node would let this one in."""
        if not self.cookie:
            raise SettingsError(
                "node.cookie",
                "not set",
                "a cookie is needed: give --cookie, EX_ESDB_COOKIE, RELEASE_COOKIE or ~/.erlang.cookie",
            )
        return self.cookie

    def source_of(self, name: str) -> str:
        """Where the value of field `name` came from, in words."""
        return self.sources.get(name, "default")

    @property
    def long_names(self) -> bool:
        """Whether this node is of the long-names kind; the two kinds cannot connect to each other."""
        return self.name_kind == "long"

    @property
    def gossip_broadcast(self) -> bool:
        """Whether gossip is broadcast: `gossip_multicast_addr` is no multicast address."""
        return not ipaddress.IPv4Address(self.gossip_multicast_addr).is_multicast

    def effective(self) -> Iterator[Effective]:
        """Every setting as `gater config` shows it, in the order of the file; secrets hidden."""
        for item, setting in _declared():
            value = getattr(self, item.name)
            text = HIDDEN if setting.secret and value else _shown(value)
            yield Effective(setting.key, text, self.source_of(item.name))

    def _wrong(self, name: str, problem: str) -> SettingsError:
        return SettingsError(_setting_of(name).key, self.source_of(name), problem)

    def _host_is_loopback(self) -> bool:
        host = self.name.partition("@")[2]
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"

    def _complete_name(self) -> None:
        """Settles the kind of name, adds the host where none was given, refuses a host of the other kind."""
        head, _, host = self.name.partition("@")
        kind = self.name_kind if self.name_kind != "auto" else "long" if _is_long(host) else "short"
        if not host:
            host = socket.getfqdn() if kind == "long" else socket.gethostname().partition(".")[0]
        if _is_long(host) != (kind == "long"):
            raise self._wrong(
                "name",
                f"got {head + '@' + host!r}, but the host of a {kind} name has "
                + (
                    f"a dot or is an IP address: give {_FLAG_OF['long']} {head}@HOST.DOMAIN, or {_FLAG_OF['short']}"
                    if kind == "long"
                    else f"no dot and is no IP address: give {_FLAG_OF['short']} {head}@HOST, or {_FLAG_OF['long']}"
                )
                + "; nodes with long and with short names cannot connect to each other",
            )
        try:
            object.__setattr__(self, "name", _parse_peer_name(f"{head}@{host}"))
        except ValueError:
            raise self._wrong(
                "name", f"this machine is called {host!r}, which no node can be: give {head}@HOST"
            ) from None
        object.__setattr__(self, "name_kind", kind)

    def _check_peers(self) -> None:
        """Refuses peers of the other kind of name; leaves this node out, as one list may be given to all nodes."""
        for peer in self.connect:
            if _is_long(peer.partition("@")[2]) != self.long_names:
                kind = "short" if self.long_names else "long"
                raise self._wrong(
                    "connect",
                    f"got {peer!r}, a {kind} name, but this node, {self.name}, has a {self.name_kind} one, "
                    f"and the two kinds cannot connect to each other: use one kind on all nodes",
                )
        object.__setattr__(self, "connect", tuple(peer for peer in self.connect if peer != self.name))

    def _check_dns(self) -> None:
        """Refuses half a setting, and nodes by address for a node with a short name."""
        if bool(self.dns_query) != bool(self.dns_node_basename):
            given, missing = (
                ("dns_query", "dns_node_basename") if self.dns_query else ("dns_node_basename", "dns_query")
            )
            raise self._wrong(given, f"{_setting_of(missing).key} is not set: nodes are found by DNS with both, or not")
        if self.dns_query and not self.long_names:
            raise self._wrong(
                "dns_query",
                f"nodes found by DNS have long names, NAME@ADDRESS, but this node, {self.name}, has a short one, "
                f"and the two kinds cannot connect to each other",
            )


def _declared() -> Iterator[tuple[Field[Any], Setting]]:
    for item in fields(Settings):
        if (setting := item.metadata.get("setting")) is not None:
            yield item, setting


def _setting_of(name: str) -> Setting:
    return next(setting for item, setting in _declared() if item.name == name)


def _is_long(host: str) -> bool:
    """OTP's rule (`inet_tcp_dist`): a long name's host has a dot, or a colon (IPv6)."""
    return "." in host or ":" in host


def _shown(value: object) -> str:
    if value is None or value in ("", ()):
        return NOT_SET
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ", ".join(str(item) for item in value)
    return str(value)


def _quoted(value: object) -> str:
    """The value for a message: on one line, and cut where it is long."""
    text = repr(value)
    return text if len(text) <= MAX_QUOTED_CHARACTERS else text[:MAX_QUOTED_CHARACTERS] + "..."


def _from_env(setting: Setting, environ: Mapping[str, str]) -> Given | None:
    for variable in setting.env:
        if value := environ.get(variable):
            return Given(value, variable)
    return None


def _read_config(path: Path) -> dict[str, Given]:
    """The settings in a TOML file by key; raises `SettingsError` for a file or key that is none."""
    import tomllib

    def wrong(problem: str) -> SettingsError:
        return SettingsError("config", str(path), problem)

    try:
        with path.open("rb") as file:
            content = file.read(MAX_CONFIG_BYTES + 1)
        if len(content) > MAX_CONFIG_BYTES:
            raise wrong(f"the file is larger than {MAX_CONFIG_BYTES} bytes, allowed is a TOML file of settings")
        tables = tomllib.loads(content.decode())
    except OSError as error:
        raise wrong(f"the file cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise wrong(f"the file is no TOML: {error}") from None
    known = {setting.key for _, setting in _declared()}
    found: dict[str, Given] = {}
    for table, entries in tables.items():
        for key, value in entries.items() if isinstance(entries, dict) else [("", entries)]:
            name = f"{table}.{key}" if key else table
            if name not in known:
                raise SettingsError(name, str(path), f"there is no such setting{_nearest(name, known)}")
            found[name] = Given(value, str(path))
    return found


def _nearest(name: str, known: set[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f", did you mean {near[0]}?" if near else ", `gater config` lists them"


def _cookie_file(environ: Mapping[str, str]) -> Given | None:
    """The cookie of the user's Erlang nodes, from the places and with the checks of OTP's `auth` module."""
    if not (home := environ.get("HOME")):
        return None
    config_home = Path(environ.get("XDG_CONFIG_HOME") or Path(home, ".config"))
    for path in (Path(home, ".erlang.cookie"), config_home / "erlang" / ".erlang.cookie"):
        try:
            mode = path.stat().st_mode
            if mode & _OWNER_ONLY:
                raise SettingsError(
                    "node.cookie", str(path), "the file must be accessible by its owner only: chmod 400 it"
                )
            return Given(path.read_text("ascii"), str(path))
        except FileNotFoundError:
            continue
        except UnicodeDecodeError:
            raise SettingsError("node.cookie", str(path), "the file holds characters that are not ASCII") from None
        except OSError as error:
            raise SettingsError("node.cookie", str(path), f"the file cannot be read: {error.strerror}") from None
    return None
