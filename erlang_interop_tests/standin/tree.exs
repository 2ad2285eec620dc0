defmodule ExESDB.StandIn.Tree do
  @moduledoc """
  The state of one store: a tree of nodes as Khepri keeps it, in an ETS table that everyone on the node may read.

  Only the store's Raft member writes, one command at a time (`apply_command/2`), so a condition holds at the moment its
  put is carried out. Path components are names (atoms, binaries) or Khepri's condition records (tuples named `if_..`).
  Unlike Khepri's, `if_path_matches` looks at one level of the tree only.
  """

  # Rows: {{depth, path}, :none | {:data, term}, payload_version, child_list_version, child_list_length}.
  # The depth in front makes the children of a node neighbours in the ordered table.

  def table(store), do: :"standin_tree_#{store}"

  def new(store) do
    table = :ets.new(table(store), [:ordered_set, :named_table, :protected, read_concurrency: true])
    :ets.insert(table, {{0, []}, :none, 1, 1, 0})
    table
  end

  def known?(store), do: is_atom(store) and :ets.whereis(table(store)) != :undefined

  def apply_command(table, {:put, pattern, data}) do
    with {:ok, path} <- walk(table, pattern, [], 0) do
      insert(table, path, {:data, data})
      :ok
    end
  end

  def apply_command(table, {:delete, path}) do
    case :ets.lookup(table, key(path)) do
      [] -> :ok
      [_row] -> delete(table, path)
    end
  end

  def apply_command(_table, :nothing), do: :ok

  @doc "`{:ok, row}` of exactly this path, or Khepri's `{:error, {:khepri, :node_not_found, info}}`."
  def get(table, path) do
    case :ets.lookup(table, key(check(path))) do
      [row] -> {:ok, row}
      [] -> {:error, not_found(table, path)}
    end
  end

  @doc "All rows that match the path pattern, parents before children, in order of their names."
  def match(table, pattern) do
    [root] = :ets.lookup(table, {0, []})
    Enum.reduce(check(pattern), [root], fn component, rows -> Enum.flat_map(rows, &step(table, &1, component)) end)
  end

  @doc "How many nodes match; for all children of one node without looking at them."
  def count(table, pattern) do
    {parent, [last]} = Enum.split(check(pattern), length(pattern) - 1)

    if last == {:if_node_exists, true} and Enum.all?(parent, &name?/1) do
      case :ets.lookup(table, key(parent)) do
        [{_, _, _, _, children}] -> children
        [] -> 0
      end
    else
      length(match(table, pattern))
    end
  end

  def path({{_depth, path}, _, _, _, _}), do: path
  def data({_, :none, _, _, _}), do: :undefined
  def data({_, {:data, data}, _, _, _}), do: data

  @doc "The properties of a row that Khepri calls node props, as asked for by `props_to_return`."
  def props(table, {{depth, path}, payload, payload_version, list_version, list_length}, wanted) do
    Enum.reduce(wanted, %{}, fn
      :payload, props when payload == :none -> props
      :payload, props -> Map.put(props, :data, elem(payload, 1))
      :has_payload, props -> Map.put(props, :has_payload, payload != :none)
      :payload_version, props -> Map.put(props, :payload_version, payload_version)
      :child_list_version, props -> Map.put(props, :child_list_version, list_version)
      :child_list_length, props -> Map.put(props, :child_list_length, list_length)
      :child_names, props -> Map.put(props, :child_names, child_names(table, depth, path))
    end)
  end

  defp child_names(table, depth, path),
    do: for({{_, child}, _, _, _, _} <- children(table, depth, path), do: List.last(child))

  defp key(path), do: {length(path), path}

  defp name?(component), do: is_atom(component) or is_binary(component)

  defp check(path) do
    valid? = is_list(path) and Enum.all?(path, &(name?(&1) or is_tuple(&1)))
    if valid?, do: path, else: :erlang.error({:khepri_ex, :invalid_path, %{path: path}})
  end

  defp children(table, depth, path),
    do: :ets.select(table, [{{{depth + 1, path ++ [:_]}, :_, :_, :_, :_}, [], [:"$_"]}])

  defp step(table, {{depth, path}, _, _, _, _}, component) do
    case target(component) do
      {:ok, name} ->
        for row <- :ets.lookup(table, {depth + 1, path ++ [name]}), met(component, row) == true, do: row

      :error ->
        for row <- children(table, depth, path), met(component, row) == true, do: row
    end
  end

  # The path a put goes to, or the error of the first component whose condition is not met.
  defp walk(_table, [], path, _depth), do: {:ok, path}

  defp walk(table, [component | rest], parent, depth) do
    {:ok, name} = target(component)
    path = parent ++ [name]
    info = %{node_name: name, node_path: path, node_is_target: rest == []}

    case :ets.lookup(table, {depth + 1, path}) do
      [row] ->
        case met(component, row) do
          true -> walk(table, rest, path, depth + 1)
          {false, condition} -> {:error, {:khepri, :mismatching_node, mismatch(table, row, condition, info)}}
        end

      [] ->
        if may_create?(component),
          do: walk(table, rest, path, depth + 1),
          else: {:error, {:khepri, :node_not_found, Map.put(info, :condition, component)}}
    end
  end

  defp mismatch(table, row, condition, info) do
    props = props(table, row, [:payload, :payload_version, :child_list_version, :child_list_length])
    Map.merge(info, %{condition: condition, node_props: props})
  end

  defp not_found(table, path) do
    missing = Enum.find(1..length(path), length(path), &(:ets.lookup(table, key(Enum.take(path, &1))) == []))
    there = Enum.take(path, missing)

    {:khepri, :node_not_found,
     %{node_name: List.last(there), node_path: there, node_is_target: missing == length(path)}}
  end

  defp target({:if_all, conditions}),
    do: Enum.find_value(conditions, :error, &if(match?({:ok, _}, target(&1)), do: target(&1)))

  defp target(component), do: if(name?(component), do: {:ok, component}, else: :error)

  defp may_create?({:if_node_exists, exists}), do: not exists
  defp may_create?({:if_all, conditions}), do: Enum.all?(conditions, &may_create?/1)
  defp may_create?({:if_any, conditions}), do: Enum.any?(conditions, &may_create?/1)
  defp may_create?(component), do: name?(component)

  defp met({:if_all, conditions}, row),
    do: Enum.find_value(conditions, true, &if(met(&1, row) != true, do: met(&1, row)))

  defp met({:if_any, conditions} = all, row),
    do: if(Enum.any?(conditions, &(met(&1, row) == true)), do: true, else: {false, all})

  defp met({:if_not, condition} = all, row), do: if(met(condition, row) == true, do: {false, all}, else: true)
  defp met(condition, row), do: if(holds?(condition, row), do: true, else: {false, condition})

  defp holds?({:if_node_exists, exists}, _row), do: exists
  defp holds?({:if_has_payload, wanted}, row), do: elem(row, 1) != :none == wanted
  defp holds?({:if_has_data, wanted}, row), do: elem(row, 1) != :none == wanted
  defp holds?({:if_payload_version, wanted}, row), do: compare(elem(row, 2), wanted)
  defp holds?({:if_child_list_version, wanted}, row), do: compare(elem(row, 3), wanted)
  defp holds?({:if_child_list_length, wanted}, row), do: compare(elem(row, 4), wanted)
  defp holds?({:if_path_matches, regex, _}, row), do: named?(row, regex)
  defp holds?({:if_name_matches, regex, _}, row), do: named?(row, regex)
  defp holds?({:if_data_matches, _, _, _}, row) when elem(row, 1) == :none, do: false
  defp holds?({:if_data_matches, pattern, guards, _}, row), do: data_matches?(data(row), pattern, guards)
  defp holds?(name, {{_, path}, _, _, _, _}) when is_atom(name) or is_binary(name), do: List.last(path) == name

  defp compare(value, {:eq, other}), do: value == other
  defp compare(value, {:ne, other}), do: value != other
  defp compare(value, {:lt, other}), do: value < other
  defp compare(value, {:le, other}), do: value <= other
  defp compare(value, {:gt, other}), do: value > other
  defp compare(value, {:ge, other}), do: value >= other
  defp compare(value, wanted), do: value == wanted

  defp named?(_row, :any), do: true
  defp named?(row, regex), do: :re.run(to_string(List.last(path(row))), regex, capture: :none) == :match

  @doc "Khepri's `if_data_matches`: the pattern is that of a match specification, maps match by a subset of keys."
  def data_matches?(data, pattern, guards) do
    specification = :ets.match_spec_compile([{{pattern}, guards, [true]}])
    :ets.match_spec_run([{data}], specification) == [true]
  end

  defp insert(table, path, payload) do
    case :ets.lookup(table, key(path)) do
      [{_, ^payload, _, _, _}] ->
        :ok

      [{node, _, version, _, _}] ->
        :ets.update_element(table, node, [{2, payload}, {3, version + 1}])

      [] ->
        parent = Enum.drop(path, -1)
        if :ets.lookup(table, key(parent)) == [], do: insert(table, parent, :none)
        :ets.insert(table, {key(path), payload, 1, 1, 0})
        :ets.update_counter(table, key(parent), [{4, 1}, {5, 1}])
    end
  end

  defp delete(table, path) do
    for {{_, child}, _, _, _, _} <- children(table, length(path), path), do: delete(table, child)
    :ets.delete(table, key(path))
    parent = Enum.drop(path, -1)
    [[_, left]] = [:ets.update_counter(table, key(parent), [{4, 1}, {5, -1}])]
    # As in Khepri, a node that only held children goes with the last of them.
    if left == 0 and parent != [] and match?([{_, :none, _, _, _}], :ets.lookup(table, key(parent))),
      do: delete(table, parent)

    :ok
  end
end
