"""Settings: where values come from, which win, and what is said of a wrong one."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gater.cluster.strategy import DnsPoll
from gater.errors import SettingsError
from gater.settings import HIDDEN, MAX_ATOM_CHARACTERS, MAX_DNS_POLLING_INTERVAL_MS, Given, Settings

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "priv" / "gater.example.toml"
CONFIGURATION = ROOT / "docs" / "configuration.md"

# protocols.md section 6 and the variables of EPMD: name, a good value, the field it sets, what it becomes.
VARIABLES = [
    ("EX_ESDB_GATER_CONNECT_TO", "a@10.0.0.1,b@10.0.0.2", "connect", ("a@10.0.0.1", "b@10.0.0.2")),
    ("EX_ESDB_PUB_SUB", ":ex_esdb_system", "pub_sub", "ex_esdb_system"),
    ("EX_ESDB_CLUSTER_SECRET", "between us", "gossip_secret", "between us"),
    ("EX_ESDB_COOKIE", "biscuit", "cookie", "biscuit"),
    ("RELEASE_COOKIE", "biscuit", "cookie", "biscuit"),
    ("EX_ESDB_CLUSTER_PORT", "45893", "gossip_port", 45893),
    ("EX_ESDB_CLUSTER_INTERFACE", "10.0.0.3", "gossip_bind", "10.0.0.3"),
    ("EX_ESDB_GOSSIP_MULTICAST_ADDR", "233.252.1.32", "gossip_multicast_addr", "233.252.1.32"),
    ("EX_ESDB_GOSSIP_MULTICAST_IF", "127.0.0.1", "gossip_multicast_if", "127.0.0.1"),
    ("EX_ESDB_GATER_DNS_QUERY", "stores.local", "dns_query", "stores.local"),
    ("EX_ESDB_GATER_DNS_NODE_BASENAME", "ex_esdb", "dns_node_basename", "ex_esdb"),
    ("EX_ESDB_GATER_DNS_POLLING_INTERVAL", "1000", "dns_polling_interval_ms", 1000),
    ("EX_ESDB_STORE_ID", "orders", "stores", ("orders",)),
    ("EX_ESDB_GATER_NODE_NAME", "gater@10.0.0.9", "name", "gater@10.0.0.9"),
    ("SECRET_KEY_BASE", "k" * 64, "secret_key_base", "k" * 64),
    ("EXESDB_GATER_PORT", "4002", "http_port", 4002),
    ("EXESDB_GATER_POOL_SIZE", "0", "pool_size", 0),
    ("EXESDB_GATER_USE_LIBCLUSTER", "false", "gossip", False),
    ("EXESDB_GATER_CONNECTION_RETRY_INTERVAL", "250", "connection_retry_interval_ms", 250),
    ("EXESDB_GATER_HEALTH_CHECK_INTERVAL", "1000", "health_check_interval_ms", 1000),
    ("EXESDB_GATER_MAX_CONNECTIONS", "7", "max_connections", 7),
    ("ERL_EPMD_PORT", "4370", "epmd_port", 4370),
    ("ERL_EPMD_ADDRESS", "127.0.0.1,::1", "epmd_listen", ("127.0.0.1", "::1")),
]

NEEDED_BESIDE = {
    "EX_ESDB_GATER_DNS_QUERY": {"EX_ESDB_GATER_DNS_NODE_BASENAME": "ex_esdb"},
    "EX_ESDB_GATER_DNS_NODE_BASENAME": {"EX_ESDB_GATER_DNS_QUERY": "stores.local"},
}

SETTING_FIELDS = {item.name: item.metadata["setting"] for item in fields(Settings) if "setting" in item.metadata}


@pytest.mark.parametrize(("variable", "text", "name", "value"), VARIABLES, ids=[row[0] for row in VARIABLES])
def test_every_variable_of_the_original_is_read(variable: str, text: str, name: str, value: object) -> None:
    settings = Settings.load(environ={**NEEDED_BESIDE.get(variable, {}), variable: text})
    assert getattr(settings, name) == value
    assert settings.source_of(name) == variable


def test_no_variable_is_read_that_is_not_tested_here() -> None:
    assert {name for setting in SETTING_FIELDS.values() for name in setting.env} == {row[0] for row in VARIABLES}


def test_an_empty_variable_counts_as_not_set() -> None:
    settings = Settings.load(environ={"EX_ESDB_CLUSTER_SECRET": "", "EX_ESDB_COOKIE": "", "RELEASE_COOKIE": "biscuit"})
    assert settings.gossip_secret == "dev_cluster_secret"
    assert settings.cookie == "biscuit"


def test_flags_stand_above_the_environment_above_the_file_above_defaults(tmp_path: Path) -> None:
    config = tmp_path / "gater.toml"
    config.write_text("[gateway]\npool_size = 3\n")

    def pool(flags: dict[str, Given], environ: dict[str, str], file: Path | None) -> tuple[int, str]:
        settings = Settings.load(flags, environ=environ, config=file)
        return settings.pool_size, settings.source_of("pool_size")

    flags, environ = {"pool_size": Given("1", "--pool-size")}, {"EXESDB_GATER_POOL_SIZE": "2"}
    assert pool(flags, environ, config) == (1, "--pool-size")
    assert pool({}, environ, config) == (2, "EXESDB_GATER_POOL_SIZE")
    assert pool({}, {}, config) == (3, str(config))
    assert pool({}, {}, None) == (10, "default")


def test_the_cookie_is_sought_in_the_documented_order(tmp_path: Path) -> None:
    home_file = tmp_path / ".erlang.cookie"
    home_file.write_text("from_home\n")
    home_file.chmod(0o400)
    config = tmp_path / "gater.toml"
    config.write_text('[node]\ncookie = "from_file"\n')
    environ = {"EX_ESDB_COOKIE": "first", "RELEASE_COOKIE": "second", "HOME": str(tmp_path)}
    assert Settings.load({"cookie": Given("flag", "--cookie")}, environ=environ, config=config).cookie == "flag"
    assert Settings.load(environ=environ, config=config).cookie == "first"
    del environ["EX_ESDB_COOKIE"]
    assert Settings.load(environ=environ, config=config).cookie == "second"
    del environ["RELEASE_COOKIE"]
    assert Settings.load(environ=environ, config=config).cookie == "from_file"
    settings = Settings.load(environ=environ)
    assert (settings.cookie, settings.source_of("cookie")) == ("from_home", str(home_file))
    assert Settings.load(environ={}).cookie == ""


def test_the_cookie_file_may_stand_in_the_configuration_directory(tmp_path: Path) -> None:
    file = tmp_path / ".config" / "erlang" / ".erlang.cookie"
    file.parent.mkdir(parents=True)
    file.write_text("elsewhere")
    file.chmod(0o600)
    assert Settings.load(environ={"HOME": str(tmp_path)}).cookie == "elsewhere"


@pytest.mark.parametrize(
    ("content", "mode", "problem"),
    [
        (b"biscuit", 0o644, "must be accessible by its owner only: chmod 400 it"),
        (b"bisc\nuit", 0o400, "allowed is 1 to 255 printable ASCII characters"),
        (b"bisc\xffuit", 0o400, "characters that are not ASCII"),
    ],
)
def test_a_bad_cookie_file_is_refused_without_showing_it(
    tmp_path: Path, content: bytes, mode: int, problem: str
) -> None:
    file = tmp_path / ".erlang.cookie"
    file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(SettingsError) as caught:
        Settings.load(environ={"HOME": str(tmp_path)})
    assert str(caught.value).startswith(f"setting node.cookie ({file}): ")
    assert problem in str(caught.value)
    assert "bisc" not in str(caught.value)


def test_a_missing_cookie_is_only_wrong_for_who_needs_one() -> None:
    settings = Settings.load(environ={})
    with pytest.raises(SettingsError, match=r"give --cookie, EX_ESDB_COOKIE, RELEASE_COOKIE or ~/\.erlang\.cookie"):
        settings.require_cookie()
    assert Settings(cookie="biscuit").require_cookie() == "biscuit"


@pytest.mark.parametrize(
    ("variable", "text", "allowed"),
    [
        ("EX_ESDB_CLUSTER_PORT", "0", "a whole number from 1 to 65535"),
        ("EX_ESDB_CLUSTER_PORT", "99999", "a whole number from 1 to 65535"),
        ("EXESDB_GATER_PORT", "4001x", "a whole number from 1 to 65535"),
        ("EXESDB_GATER_POOL_SIZE", "-1", "a whole number from 0 to 1000"),
        ("EXESDB_GATER_USE_LIBCLUSTER", "yes", "true or false"),
        ("EX_ESDB_CLUSTER_INTERFACE", "eth0", "an IPv4 address"),
        ("EX_ESDB_GOSSIP_MULTICAST_ADDR", "239.255.0", "an IPv4 address"),
        ("EX_ESDB_GATER_CONNECT_TO", "ex_esdb", "a list, each NAME@HOST"),
        ("EX_ESDB_GATER_NODE_NAME", "my gater@h", "NAME@HOST"),
        ("EX_ESDB_GATER_NODE_NAME", "g@" + "h" * MAX_ATOM_CHARACTERS, "NAME@HOST"),
        ("EX_ESDB_STORE_ID", "s" * 256, "a name of 1 to 255 characters"),
        ("ERL_EPMD_PORT", "epmd", "a whole number from 1 to 65535"),
    ],
)
def test_a_wrong_value_is_answered_with_its_setting_source_and_what_is_allowed(
    variable: str, text: str, allowed: str
) -> None:
    key = next(setting.key for setting in SETTING_FIELDS.values() if variable in setting.env)
    with pytest.raises(SettingsError) as caught:
        Settings.load(environ={variable: text})
    message = str(caught.value)
    assert message.startswith(f"setting {key} ({variable}): got '{text[:30]}")
    assert allowed in message
    assert "\n" not in message
    assert len(message) < 400


def test_a_wrong_secret_is_not_repeated_in_the_message() -> None:
    with pytest.raises(SettingsError) as caught:
        Settings.load({"cookie": Given("krümel", "--cookie")}, environ={})
    assert str(caught.value) == (
        "setting node.cookie (--cookie): a value that is not allowed, allowed is 1 to 255 printable ASCII characters"
    )


@given(st.sampled_from(sorted({row[0] for row in VARIABLES})), st.text(max_size=300))
def test_any_text_in_any_variable_is_taken_or_refused_in_one_line(variable: str, text: str) -> None:
    message = ""
    try:
        Settings.load(environ={variable: text})
    except SettingsError as error:
        message = str(error)
    assert "\n" not in message
    assert not message or variable in message


@pytest.mark.parametrize(
    ("name", "kind", "long_names", "listen"),
    [
        ("gater@127.0.0.1", "auto", True, "127.0.0.1"),
        ("gater@::1", "long", True, "127.0.0.1"),
        ("gater@gater.example.org", "auto", True, "0.0.0.0"),
        ("gater@gater00", "auto", False, "0.0.0.0"),
        ("gater@localhost", "short", False, "127.0.0.1"),
    ],
)
def test_the_kind_of_name_and_the_addresses_follow_from_the_host(
    name: str, kind: str, long_names: bool, listen: str
) -> None:
    settings = Settings(name=name, name_kind=kind)
    assert (settings.name, settings.long_names, settings.listen) == (name, long_names, (listen,))
    assert settings.epmd_listen == settings.listen


def test_a_short_name_without_host_gets_this_machines() -> None:
    settings = Settings(name="gater", name_kind="short")
    assert re.fullmatch(r"gater@[^.]+", settings.name)


@pytest.mark.parametrize(("name", "kind", "hint"), [("g@a.b", "short", "--sname g@HOST"), ("g@a", "long", "--sname")])
def test_a_host_of_the_other_kind_is_refused_with_the_rule(name: str, kind: str, hint: str) -> None:
    with pytest.raises(SettingsError, match="long and with short names cannot connect to each other") as caught:
        Settings(name=name, name_kind=kind)
    assert hint in str(caught.value)


def test_a_peer_of_the_other_kind_of_name_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"got 'store@host', a short name, but this node, gater@127.0.0.1"):
        Settings(connect=("store@host",))


def test_this_node_itself_is_left_out_of_the_nodes_to_connect_to() -> None:
    assert Settings(connect=("gater@127.0.0.1", "store@127.0.0.1")).connect == ("store@127.0.0.1",)


def test_lists_take_commas_and_spaces_and_count_repeated_items_once() -> None:
    assert Settings.load(environ={"EX_ESDB_STORE_ID": " a, b  a,:c "}).stores == ("a", "b", "c")


def test_no_store_at_all_is_refused() -> None:
    with pytest.raises(SettingsError, match="one or more"):
        Settings(stores=())


def test_an_address_that_is_no_multicast_one_means_broadcast() -> None:
    assert not Settings().gossip_broadcast
    assert Settings(gossip_multicast_addr="255.255.255.255").gossip_broadcast


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[node]\nnmae = 1\n", "setting node.nmae ({file}): there is no such setting, did you mean node.name?"),
        ("name = 1\n", "setting name ({file}): there is no such setting"),
        ("[node\n", "setting config ({file}): the file is no TOML: "),
        ("[http]\nport = true\n", "setting http.port ({file}): got True, allowed is a whole number from 1 to 65535"),
        ("[store]\nids = [1]\n", "setting store.ids ({file}): got [1], allowed is a list, each a name"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "gater.toml"
    file.write_text(text)
    with pytest.raises(SettingsError) as caught:
        Settings.load(environ={}, config=file)
    assert str(caught.value).startswith(problem.format(file=file))


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"missing\.toml\): the file cannot be read: No such file"):
        Settings.load(environ={}, config=tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("value", "directory"), [("true", Path("gater-data")), ("false", None), ('"stores"', Path("stores"))]
)
def test_the_file_may_switch_the_embedded_store_on(tmp_path: Path, value: str, directory: Path | None) -> None:
    file = tmp_path / "gater.toml"
    file.write_text(f"[store]\nembedded = {value}\n")
    assert Settings.load(environ={}, config=file).embedded == directory


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"dns_query": "stores.local"}, r"dns\.query .*dns\.node_basename is not set"),
        ({"dns_node_basename": "store"}, r"dns\.node_basename .*dns\.query is not set"),
        (
            {"dns_query": "stores.local", "dns_node_basename": "store", "name": "g@host"},
            "this node, g@host, has a short one",
        ),
        ({"dns_query": "a..b", "dns_node_basename": "store"}, "allowed is a DNS name"),
        ({"dns_query": "x" * 64, "dns_node_basename": "store"}, "allowed is a DNS name"),
        ({"dns_query": "stores.local", "dns_node_basename": "store@host"}, "allowed is the part of a node's name"),
        ({"dns_polling_interval_ms": 150_001}, "from 100 to 150000"),
    ],
)
def test_dns_settings_that_find_nobody_are_refused(given: dict[str, Any], problem: str) -> None:
    with pytest.raises(SettingsError, match=problem):
        Settings(**given)


@pytest.mark.parametrize(
    "name", ["health_check_interval_ms", "connection_retry_interval_ms", "dns_polling_interval_ms"]
)
def test_an_interval_that_would_keep_the_cluster_busy_is_refused(name: str) -> None:
    for too_short in (0, 1, 99):
        with pytest.raises(SettingsError, match=rf"{too_short}, allowed is a whole number from 100 to"):
            Settings(**{name: too_short})  # type: ignore[arg-type]
    assert getattr(Settings(**{name: 100}), name) == 100  # type: ignore[arg-type]


def test_the_longest_polling_interval_is_one_that_the_strategy_takes() -> None:
    DnsPoll("stores.local", "store", MAX_DNS_POLLING_INTERVAL_MS / 1000)
    with pytest.raises(ValueError, match="DNS is asked"):
        DnsPoll("stores.local", "store", (MAX_DNS_POLLING_INTERVAL_MS + 1) / 1000)


def test_secrets_are_hidden_wherever_settings_are_shown() -> None:
    secrets = {"cookie": "c00kie", "secret_key_base": "k3y", "gossip_secret": "g0ssip"}
    settings = Settings(**secrets)
    shown = repr(settings) + repr(list(settings.effective()))
    assert not [value for value in secrets.values() if value in shown]
    assert [row.value for row in settings.effective() if row.value == HIDDEN] == [HIDDEN] * 3


def test_every_setting_is_in_the_example_file_with_its_default(tmp_path: Path) -> None:
    lines = [re.sub(r"^# (?=[a-z0-9_]+ = )", "", line) for line in EXAMPLE.read_text().splitlines()]
    uncommented = tmp_path / "gater.toml"
    uncommented.write_text("\n".join(lines))
    from_file = Settings.load(environ={}, config=uncommented)
    assert set(from_file.sources) == set(SETTING_FIELDS) - {"gossip_multicast_if"}
    assert [row[:2] for row in from_file.effective() if row.key != "node.cookie"] == [
        row[:2] for row in Settings().effective() if row.key != "node.cookie"
    ]


def test_the_example_file_as_it_stands_is_a_valid_one() -> None:
    assert Settings.load(environ={}, config=EXAMPLE).name == "gater@127.0.0.1"


def test_every_setting_and_variable_is_documented() -> None:
    text = CONFIGURATION.read_text()
    missing = [
        word for setting in SETTING_FIELDS.values() for word in (setting.key, *setting.env) if f"`{word}`" not in text
    ]
    assert not missing
