"""The stand-in store: BEAM nodes that behave as an ExESDB cluster towards gateways (see standin/README.md).

The Elixir sources are compiled once into the tests' cache, so that a member is up in about half a second.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Final

from erlang_interop_tests.beam import BeamNode, Beams, elixir_lib, unique_name, wait_until
from erlang_interop_tests.otp28 import cache_directory
from gater.erl.terms import Atom, Term

SOURCES: Final = Path(__file__).resolve().parent / "standin"
DEFAULT_STORE: Final = "reg_gh"
READY_TIMEOUT_S: Final = 45.0
RESTART_TIMEOUT_S: Final = 60.0
COMPILE_TIMEOUT_S: Final = 60.0

_CORE: Final = ("tree.exs", "raft.exs", "swarm.exs", "pubsub.exs", "standin.exs")
_KHEPRI: Final = ("khepri.exs",)


class StandInCluster:
    """One, three or five members that hold the same stores; start with `await cluster.start()`, end with `close()`.

    `khepri=False` plays an ExESDB whose store offers no Khepri by rpc. Members keep their data when they are killed
    and started again. Nodes see each other as ordinary (visible) nodes; `beams` gives EPMD and cookie.
    """

    def __init__(
        self,
        beams: Beams,
        members: int = 1,
        stores: Sequence[str] = (DEFAULT_STORE,),
        *,
        workers: int = 2,
        khepri: bool = True,
        arguments: Sequence[str] = (),
    ) -> None:
        self.stores: list[str] = list(stores)
        self.names: list[str] = [unique_name(f"store{number}") for number in range(members)]
        self.members: list[BeamNode] = []
        self._beams = beams
        self._workers = workers
        self._khepri = khepri
        self._arguments = list(arguments)
        self._data = tempfile.TemporaryDirectory(prefix="gater-standin-")

    @property
    def cookie(self) -> str:
        return self._beams.cookie

    async def start(self) -> StandInCluster:
        """Start all members and wait until every store has a leader and every member sees every worker."""
        compiled = await asyncio.to_thread(_compiled)
        paths = ["-pa", str(compiled / "core"), *(["-pa", str(compiled / "khepri")] if self._khepri else [])]
        # A member that is cut off by a test must not be cut off from others by the BEAM's own reaction.
        kernel = ["-kernel", "prevent_overlapping_partitions", "false"]
        port = await self._beams.epmd_port()
        for index, name in enumerate(self.names):
            node = BeamNode(
                language="elixir",
                name=name,
                cookie=self._beams.cookie,
                epmd_port=port,
                arguments=[*paths, *kernel, *self._arguments],
                env={
                    "STANDIN_STORES": " ".join(self.stores),
                    "STANDIN_MEMBERS": " ".join(self.names),
                    "STANDIN_WORKERS": str(self._workers),
                    "STANDIN_DATA": str(Path(self._data.name) / str(index)),
                },
            )
            self._beams.nodes.append(node)
            self.members.append(node)
        await asyncio.gather(*(self._start_member(node) for node in self.members))
        await self.wait_ready()
        return self

    async def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Wait until the running members have a leader, have caught up, and know the workers of all running members."""
        running = [node for node in self.members if node.running]
        workers = len(running) * len(self.stores) * self._workers

        async def ready() -> bool:
            for node in running:
                if not await node.eval("ExESDB.StandIn.ready?()"):
                    return False
                if len(await self.workers(node)) != workers:
                    return False
            return True

        await wait_until(ready, timeout_s, what=f"the stand-in cluster {self.names} being ready")

    async def workers(self, node: BeamNode | None = None) -> dict[tuple[Term, ...], Term]:
        """The members' gateway workers (`{:gateway_worker, store, node, n}` → pid) in the registry of `node`."""
        asked = node or self.members[0]
        registered = await asked.eval(
            "for {name, _} = entry <- Swarm.registered(), match?({:gateway_worker, _, _, _}, name), do: entry"
        )
        return {name: pid for name, pid in registered if str(name[2]) in self.names}

    async def call(self, request: Term, *, member: int = 0, timeout_s: float = 10.0) -> Term:
        """The reply of one of the member's own workers to a gateway worker request."""
        source = """
        {_, pid} = Enum.find(Swarm.registered(), fn {name, _} ->
          match?({:gateway_worker, _, node, _} when node == node(), name) end)
        GenServer.call(pid, request, :infinity)
        """
        return await self.members[member].eval(source, request=request, timeout_s=timeout_s)

    async def set(self, switch: str, value: Term, *, member: int | None = None) -> None:
        """Set a switch (see standin/README.md) on one member or on all that run."""
        for node in self._chosen(member):
            await node.eval("ExESDB.StandIn.set(switch, value)", switch=Atom(switch), value=value)

    async def reset(self, *, member: int | None = None) -> None:
        """Take all switches back."""
        for node in self._chosen(member):
            await node.eval("ExESDB.StandIn.reset()")

    async def add_junk_names(self, count: int, *, member: int = 0) -> None:
        """Fill the registry of all members with names nobody looks for."""
        await self.members[member].eval("ExESDB.StandIn.add_junk_names(count)", count=count, timeout_s=60)

    async def cut(self, member: int, others: Sequence[str]) -> None:
        """Cut the connections of a member with these nodes, and refuse new ones in both directions, until `heal`."""
        await self.members[member].eval("ExESDB.StandIn.cut(nodes)", nodes=[Atom(name) for name in others])

    async def heal(self, member: int, others: Sequence[str]) -> None:
        """Allow connections of a member with these nodes again."""
        await self.members[member].eval("ExESDB.StandIn.heal(nodes)", nodes=[Atom(name) for name in others])

    async def leader(self, store: str = DEFAULT_STORE, *, member: int = 0) -> int | None:
        """The index of the member that leads the store, as `member` knows it."""
        found = await self.members[member].eval("ExESDB.StandIn.Raft.info(store).leader", store=Atom(store))
        return None if found is None else self.names.index(str(found))

    async def events(self, stream: str, store: str = DEFAULT_STORE, *, member: int = 0) -> list[Any]:
        """All events of a stream as they are in the store, in order, after the member has caught up."""
        source = """
        :ok = ExESDB.StandIn.Raft.fence(store, 5_000)
        table = ExESDB.StandIn.Tree.table(store)
        rows = ExESDB.StandIn.Tree.match(table, [:streams, stream, {:if_node_exists, true}])
        for row <- rows, do: ExESDB.StandIn.Tree.data(row)
        """
        found: list[Any] = await self.members[member].eval(source, store=Atom(store), stream=stream)
        return found

    async def kill(self, member: int) -> None:
        """`kill -9`."""
        await self.members[member].kill()

    def wipe(self, member: int) -> None:
        """Remove the data of a member that is not running, as a real single node does itself when it ends."""
        shutil.rmtree(Path(self._data.name) / str(member))

    async def restart(self, member: int) -> None:
        """Start a killed member again and wait until it has caught up."""
        await self._start_member(self.members[member])
        await self.wait_ready(RESTART_TIMEOUT_S)

    async def close(self) -> None:
        """Kill all members and remove their data."""
        await asyncio.gather(*(node.close() for node in self.members))
        self._data.cleanup()

    def _chosen(self, member: int | None) -> list[BeamNode]:
        return [node for node in self.members if node.running] if member is None else [self.members[member]]

    async def _start_member(self, node: BeamNode) -> None:
        await node.start()
        # A member that comes back reads its whole log, on a machine that may be busy with the others.
        await node.eval("ExESDB.StandIn.start_from_environment()", timeout_s=RESTART_TIMEOUT_S)


@contextlib.asynccontextmanager
async def standin_cluster(beams: Beams, members: int = 1, **options: Any) -> AsyncIterator[StandInCluster]:
    """A running `StandInCluster` for a `with` block."""
    cluster = StandInCluster(beams, members, **options)
    try:
        yield await cluster.start()
    finally:
        await cluster.close()


@functools.cache
def _compiled() -> Path:
    digest = hashlib.sha256(b"".join((SOURCES / name).read_bytes() for name in (*_CORE, *_KHEPRI)))
    digest.update(str(elixir_lib()).encode())
    home = cache_directory() / f"standin-{digest.hexdigest()[:12]}"
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / "standin.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not home.exists():
            with tempfile.TemporaryDirectory(prefix="standin-", dir=home.parent) as work:
                asyncio.run(_compile(Path(work) / "beams"))
                os.rename(Path(work) / "beams", home)
    return home


async def _compile(target: Path) -> None:
    async with BeamNode(language="elixir", name=None) as node:
        for part, names in (("core", _CORE), ("khepri", _KHEPRI)):
            (target / part).mkdir(parents=True)
            await node.eval(
                "{:ok, _, _} = Kernel.ParallelCompiler.compile_to_path(files, target); :ok",
                files=[str(SOURCES / name) for name in names],
                target=str(target / part),
                timeout_s=COMPILE_TIMEOUT_S,
            )
