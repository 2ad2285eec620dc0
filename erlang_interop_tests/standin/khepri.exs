# What gateways call by rpc on a store node beside the workers: Khepri 0.17 and Ra, as far as protocols need them.
# Left out when the stand-in plays a store without Khepri (STANDIN_KHEPRI=0).

defmodule :khepri do
  @moduledoc "The part of Khepri's API that works on one path or one pattern; see the README for what is missing."

  alias ExESDB.StandIn
  alias ExESDB.StandIn.Raft
  alias ExESDB.StandIn.Tree

  @timeout_ms 5_000

  def get_store_ids, do: StandIn.options().stores

  def put(store, pattern, data, options \\ %{}) do
    StandIn.around_append(pattern, fn -> command(store, {:put, pattern, data}, options) end)
  end

  def put!(store, pattern, data, options \\ %{}) do
    case put(store, pattern, data, options) do
      :ok -> :ok
      {:error, reason} -> :erlang.error(reason)
    end
  end

  def create(store, path, data, options \\ %{}),
    do: put(store, conditional(path, {:if_node_exists, false}), data, options)

  def update(store, path, data, options \\ %{}),
    do: put(store, conditional(path, {:if_node_exists, true}), data, options)

  def compare_and_swap(store, path, pattern, data, options \\ %{}),
    do: put(store, conditional(path, {:if_data_matches, pattern, [], :undefined}), data, options)

  def delete(store, path, options \\ %{}), do: command(store, {:delete, path}, options)

  def get(store, path, _options \\ %{}) do
    with {:ok, table} <- table(store), {:ok, row} <- Tree.get(table, path), do: {:ok, Tree.data(row)}
  end

  def exists(store, path, _options \\ %{}) do
    with {:ok, table} <- table(store), do: match?({:ok, _}, Tree.get(table, path))
  end

  def get_many(store, pattern, _options \\ %{}) do
    with {:ok, table} <- table(store),
         do: {:ok, Map.new(Tree.match(table, pattern), &{Tree.path(&1), Tree.data(&1)})}
  end

  def count(store, pattern, _options \\ %{}) do
    with {:ok, table} <- table(store), do: {:ok, Tree.count(table, pattern)}
  end

  def fence(store, timeout \\ @timeout_ms), do: Raft.fence(store, timeout)

  defp command(store, command, options) do
    timeout = Map.get(options, :timeout, @timeout_ms)
    Raft.command(store, command, timeout)
  end

  defp table(store), do: if(Tree.known?(store), do: {:ok, Tree.table(store)}, else: {:error, :noproc})

  defp conditional(path, condition) do
    {parents, [last]} = Enum.split(path, length(path) - 1)
    parents ++ [{:if_all, [last, condition]}]
  end
end

defmodule :khepri_adv do
  @moduledoc "Reads with node props."

  alias ExESDB.StandIn.Tree

  @default_props [:payload, :payload_version]

  def get_many(store, pattern, options \\ %{}) do
    wanted = Map.get(options, :props_to_return, @default_props)

    if Tree.known?(store) do
      table = Tree.table(store)
      {:ok, Map.new(Tree.match(table, pattern), &{Tree.path(&1), Tree.props(table, &1, wanted)})}
    else
      {:error, :noproc}
    end
  end

  def get(store, path, options \\ %{}) do
    with {:ok, found} <- get_many(store, path, options) do
      case found do
        %{^path => props} -> {:ok, props}
        _ -> Tree.get(Tree.table(store), path)
      end
    end
  end
end

defmodule :khepri_cluster do
  @moduledoc "Who the members of a store are, as the local member knows it."

  alias ExESDB.StandIn.Raft

  def members(store, _options \\ %{}) do
    case Raft.info(store) do
      nil -> {:error, :noproc}
      %{members: members} -> {:ok, for(member <- members, do: {store, member})}
    end
  end

  def nodes(store, _options \\ %{}) do
    with {:ok, members} <- members(store), do: {:ok, Keyword.values(members)}
  end
end

defmodule :ra_leaderboard do
  @moduledoc "The leader, as the local member knows it."

  alias ExESDB.StandIn.Raft

  def lookup_leader(store) do
    case Raft.info(store) do
      %{leader: leader} when leader != nil -> {store, leader}
      _ -> :undefined
    end
  end
end

defmodule :ra do
  @moduledoc "Metrics and members of the local Raft member."

  alias ExESDB.StandIn.Raft

  def key_metrics({store, node} = server) when node == node() do
    case Raft.info(store) do
      nil -> %{state: :noproc}
      info -> info |> Map.delete(:members) |> Map.put(:leader_id, :ra_leaderboard.lookup_leader(elem(server, 0)))
    end
  end

  def key_metrics({_store, node} = server), do: :rpc.call(node, __MODULE__, :key_metrics, [server], 5_000)

  def members(server, timeout \\ 5_000)

  def members({store, node}, _timeout) when node == node() do
    case Raft.info(store) do
      nil -> {:error, :noproc}
      %{members: members} -> {:ok, for(member <- members, do: {store, member}), :ra_leaderboard.lookup_leader(store)}
    end
  end

  def members({_store, node} = server, timeout), do: :rpc.call(node, __MODULE__, :members, [server, timeout], timeout)
end
