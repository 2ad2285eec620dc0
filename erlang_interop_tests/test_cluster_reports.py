"""What gateways tell about the cluster, heard by BEAMs that take part in Phoenix.PubSub as the original's nodes do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import pytest

from erlang_interop_tests.beam import BeamNode, Beams, wait_until
from erlang_interop_tests.gater_process import gater_process
from erlang_interop_tests.standin import StandInCluster
from gater.erl.terms import Atom

SECRET: Final = "not a real secret"
WITHIN_S: Final = 20.0

# What Phoenix.PubSub's adapter and a subscriber are there, and the structs of ExESDBGater.Messages.HealthMessages.
LISTEN: Final = """
defmodule ExESDBGater.Messages.HealthMessages do
  defmodule NodeHealth do
    defstruct [:node, :status, :checks, :load_avg, :memory_usage, :disk_usage, :timestamp]
  end

  defmodule ClusterHealth do
    defstruct [
      :status,
      :healthy_nodes,
      :total_nodes,
      :degraded_nodes,
      :unhealthy_nodes,
      :quorum_status,
      :timestamp
    ]
  end
end

defmodule Listener do
  alias ExESDBGater.Messages.HealthMessages.{ClusterHealth, NodeHealth}

  def start(servers) do
    {:ok, _} = :pg.start(Phoenix.PubSub)
    keeper = spawn(fn -> Process.sleep(:infinity) end)
    :heard = :ets.new(:heard, [:named_table, :public, :duplicate_bag])
    true = :ets.give_away(:heard, keeper, nil)
    for server <- servers, do: adapter(server)
    :ok
  end

  defp adapter(server) do
    name = Module.concat(server, "Adapter")
    pid = spawn(fn -> listen(server) end)
    Process.register(pid, name)
    :ok = :pg.join(Phoenix.PubSub, name, pid)
  end

  defp listen(server) do
    receive do
      {:forward_to_local, topic, message, Phoenix.PubSub} -> :ets.insert(:heard, {server, topic, message})
    end

    listen(server)
  end

  # The payloads heard on a server and topic, checked as health_messages.ex does.
  def heard(server, topic, secret) do
    for {^server, ^topic, message} <- :ets.tab2list(:heard), do: open(message, secret)
  end

  defp open({:cluster_state_changed, map}, _), do: Map.update!(map, :timestamp, &DateTime.to_iso8601/1)
  defp open({:unsecured_message, message}, nil), do: checked(message)

  defp open({:secure_message, signature, message}, secret) do
    expected = :crypto.mac(:hmac, :sha256, secret, :erlang.term_to_binary(message))
    if signature == expected, do: checked(message), else: :invalid_signature
  end

  defp checked({:node_health_updated, %NodeHealth{} = payload}), do: plain(payload, %NodeHealth{})
  defp checked({:cluster_health_updated, %ClusterHealth{} = payload}), do: plain(payload, %ClusterHealth{})

  defp plain(payload, empty) do
    true = Map.keys(payload) == Map.keys(empty)
    {_, 3} = payload.timestamp.microsecond
    payload |> Map.from_struct() |> Map.update!(:timestamp, &DateTime.to_iso8601/1)
  end
end

Listener.start([:ex_esdb_health, :ex_esdb_system, ExESDBGater.PubSub])
"""


def is_(**fields: Any) -> Callable[[Any], bool]:
    """Whether a map has these values."""
    return lambda found: isinstance(found, dict) and all(found.get(Atom(key)) == each for key, each in fields.items())


async def heard(listener: BeamNode, server: str, topic: str, secret: str | None = SECRET) -> list[Any]:
    found: list[Any] = await listener.eval(
        "Listener.heard(server, topic, secret)",
        server=Atom(server),
        topic=topic.encode(),
        secret=None if secret is None else secret.encode(),
    )
    assert Atom("invalid_signature") not in found
    return found


async def hears(listener: BeamNode, server: str, topic: str, secret: str | None = SECRET, **fields: Any) -> Any:
    """Wait for a message with these fields."""

    async def came() -> Any:
        return [each for each in await heard(listener, server, topic, secret) if is_(**fields)(each)]

    return (await wait_until(came, WITHIN_S, what=f"{fields} on {topic}"))[0]


@pytest.mark.parametrize("secret", [SECRET, None], ids=["signed", "unsigned"])
async def test_an_elixir_node_hears_who_comes_and_goes_and_how_they_are(
    beam: Beams, standin: StandInCluster, secret: str | None
) -> None:
    listener = await beam.start("elixir")
    await listener.eval(LISTEN)
    store = Atom(standin.names[0])
    env = {"EXESDB_GATER_HEALTH_CHECK_INTERVAL": "500"} | ({} if secret is None else {"SECRET_KEY_BASE": secret})
    async with gater_process(
        cookie=beam.cookie,
        epmd_port=await beam.epmd_port(),
        connect=[listener.name, store.name],
        arguments=["--no-gossip"],
        env=env,
    ) as gater:
        health = "ex_esdb_health", "cluster:health", secret
        healthy = await hears(listener, *health, node=store, status=Atom("healthy"))
        assert set(healthy[Atom("checks")].values()) == {Atom("pass")}
        fine = {"status": Atom("healthy"), "healthy_nodes": 1, "total_nodes": 1, "quorum_status": Atom("available")}
        await hears(listener, *health, **fine)

        visitor, shell = await beam.start("elixir"), await beam.start("elixir", hidden=True)
        for node in (visitor, shell):
            assert await node.eval("Node.connect(gater)", gater=gater.atom)
        for server in ("ex_esdb_system", "Elixir.ExESDBGater.PubSub"):
            await hears(listener, server, "cluster:topology", event=Atom("nodeup"), node=visitor.atom, is_ex_esdb=False)
        await visitor.stop()
        await hears(listener, "ex_esdb_system", "cluster:topology", event=Atom("nodedown"), node=visitor.atom)

        await standin.kill(0)
        down = {"event": Atom("nodedown"), "node": store, "is_ex_esdb": True}
        gone = await hears(listener, "ex_esdb_system", "cluster:topology", **down)
        assert gone[Atom("connected_nodes")] == [listener.atom]
        assert gone[Atom("total_nodes")] == 1
        await hears(listener, *health, node=store, status=Atom("unhealthy"))
        await hears(listener, *health, status=Atom("unhealthy"), unhealthy_nodes=[store], healthy_nodes=0)

        await standin.restart(0)
        back = {"event": Atom("nodeup"), "node": store, "is_ex_esdb": True, "total_nodes": 2}
        await hears(listener, "Elixir.ExESDBGater.PubSub", "cluster:topology", **back)
        # Whoever comes later is told as well: it is said again with every health check.
        await listener.eval(":ets.delete_all_objects(:heard)")
        await hears(listener, *health, **fine)
        await hears(listener, *health, node=store, status=Atom("healthy"))
        assert not any(
            is_(node=gater.atom)(each) for each in await heard(listener, "ex_esdb_system", "cluster:topology")
        )


async def test_what_is_signed_is_believed_on_every_release(beam: Beams, standin: StandInCluster, otp: int) -> None:
    source = """
    {ok, _} = pg:start('Elixir.Phoenix.PubSub'),
    Name = 'Elixir.ex_esdb_health.Adapter',
    Listen = fun Listen(Heard) ->
        receive
            {forward_to_local, <<"cluster:health">>, Message, _} -> Listen([Message | Heard]);
            {heard, From} -> From ! {heard, Heard}, Listen(Heard)
        end
    end,
    Pid = spawn(fun() -> Listen([]) end),
    register(Name, Pid),
    pg:join('Elixir.Phoenix.PubSub', Name, Pid)
    """
    believed = """
    'Elixir.ex_esdb_health.Adapter' ! {heard, self()},
    receive {heard, Heard} -> ok end,
    [{Kind, S =:= crypto:mac(hmac, sha256, Secret, term_to_binary(M))}
        || {secure_message, S, {Kind, _} = M} <- Heard]
    """
    listener = await beam.start("erlang", otp=otp)
    await listener.eval(source)
    async with gater_process(
        cookie=beam.cookie,
        epmd_port=await beam.epmd_port(),
        connect=[listener.name, standin.names[0]],
        arguments=["--no-gossip"],
        env={"SECRET_KEY_BASE": SECRET, "EXESDB_GATER_HEALTH_CHECK_INTERVAL": "300"},
    ):

        async def both() -> Any:
            found = dict(await listener.eval(believed, Secret=SECRET.encode()))
            return found if len(found) == 2 else None

        kinds = Atom("node_health_updated"), Atom("cluster_health_updated")
        assert await wait_until(both, WITHIN_S, what="both messages") == dict.fromkeys(kinds, True)
