defmodule ExESDB.StandIn.PubSub do
  @moduledoc """
  ExESDB's PubSub server for events, as others see it: the adapter process of Phoenix.PubSub 2.1 in the `pg` scope
  `Phoenix.PubSub`. With the switch `:emitters` a store's leader sends each new event to the subscriptions it matches, as
  triggers and emitters do when they work: to a topic when no subscriber is recorded, straight to a local subscriber,
  and to nobody when the subscriber lives on another node (there the original's emitter crashes).
  """

  use GenServer

  alias ExESDB.StandIn
  alias ExESDB.StandIn.Tree

  @scope Phoenix.PubSub
  @adapter :"Elixir.ex_esdb_events.Adapter"

  def start_link(_), do: GenServer.start_link(__MODULE__, nil, name: @adapter)
  def scope_spec, do: %{id: @scope, start: {:pg, :start_link, [@scope]}}

  @doc "Lets `pid` receive what is broadcast on the topic, by whichever node."
  def subscribe(topic, pid), do: GenServer.call(@adapter, {:subscribe, topic, pid})

  @doc "Broadcasts to the subscribers of all nodes, ours included."
  def broadcast(topic, message) do
    for pid <- :pg.get_members(@scope, @adapter), do: send(pid, {:forward_to_local, topic, message, Phoenix.PubSub})
    :ok
  end

  @doc "Called by the store's leader for each event that is new in it."
  def emit(store, event), do: GenServer.cast(@adapter, {:emit, store, event})

  @impl true
  def init(nil) do
    :ok = :pg.join(@scope, @adapter, self())
    {:ok, MapSet.new()}
  end

  @impl true
  def handle_call({:subscribe, topic, pid}, _from, subscribers),
    do: {:reply, :ok, MapSet.put(subscribers, {topic, pid})}

  @impl true
  def handle_cast({:emit, store, event}, subscribers) do
    rows = Tree.match(Tree.table(store), [:subscriptions, {:if_has_data, true}])

    for row <- rows, subscription = Tree.data(row), matches?(subscription, event) do
      case subscription.subscriber do
        nil -> broadcast(topic(store, subscription), {:events, [event]})
        pid when node(pid) == node() -> send(pid, {:events, [event]})
        _elsewhere -> :lost
      end
    end

    {:noreply, subscribers}
  end

  @impl true
  def handle_info({:forward_to_local, topic, message, _dispatcher}, subscribers) do
    for {^topic, pid} <- subscribers, do: send(pid, message)
    {:noreply, subscribers}
  end

  def handle_info(_other, subscribers), do: {:noreply, subscribers}

  defp matches?(%{type: :by_stream, selector: "$all"}, _event), do: true
  defp matches?(%{type: :by_stream, selector: "$" <> stream}, event), do: event.event_stream_id == stream
  defp matches?(%{type: :by_event_type, selector: type}, event), do: event.event_type == type
  defp matches?(%{type: :by_event_pattern, selector: pattern}, event), do: Tree.data_matches?(event, pattern, [])
  defp matches?(%{type: :by_event_payload, selector: pattern}, event), do: Tree.data_matches?(event.data, pattern, [])
  defp matches?(_unknown, _event), do: false

  defp topic(store, %{type: type, subscription_name: name, selector: selector}),
    do: "#{store}:#{suffix(type, name, selector)}"

  defp suffix(:by_stream, "all-events", "$all"), do: "$all"
  defp suffix(:by_stream, "transient", selector), do: selector
  defp suffix(:by_stream, name, _selector), do: "$#{name}"
  defp suffix(:by_event_type, "transient", selector), do: selector
  defp suffix(:by_event_type, name, selector), do: "*#{name}-#{selector}"
  defp suffix(:by_event_pattern, name, selector), do: "evt-pat-#{name}-#{hash(selector)}"
  defp suffix(:by_event_payload, name, selector), do: "evt-pay-#{name}-#{hash(selector)}"

  defp hash(selector), do: selector |> :erlang.phash2() |> Integer.to_string(16)
end
