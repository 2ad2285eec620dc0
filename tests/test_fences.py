"""Own writes are read: nodes that may lag catch up before they are read from."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from gateway_kit import STORE, connected, event, gateway, server_door
from node_kit import wait_until
from test_service import ERROR, OK, House, open_house

from gater.erl.terms import Atom


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    async with open_house(tmp_path) as built:
        yield built


async def test_a_node_of_which_nothing_is_known_yet_catches_up_before_it_is_read_from(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=2, khepri=True) as house:
        service, fenced = house.system.service, house.cluster.fenced
        # It was away, and has not said yet how it appends.
        owner = service.router.owners(STORE, b"s")[0]
        service.fences.may_lag(owner)
        del service.guarded_forms[owner]
        assert await house.version(b"s") == (OK, -1)
        assert fenced == [owner]
        assert await house.version(b"s") == (OK, -1)
        assert fenced == [owner]


async def test_a_node_without_fences_is_read_from_once_that_is_known(house: House) -> None:
    assert await house.append(b"s", 0) == (OK, 0)
    for _ in range(2):
        assert await house.version(b"s") == (OK, 0)
    owner = house.system.service.router.owners(STORE, b"s")[0]
    assert not house.system.service.fences.lags(STORE, b"s", owner)
    assert not house.system.service.fences.can_catch_up(STORE, owner)


@pytest.mark.parametrize("problem", ["nobody catches up", "no quorum"])
async def test_where_nobody_can_catch_up_the_node_that_wrote_last_is_read_from(tmp_path: Path, problem: str) -> None:
    async with open_house(tmp_path, nodes=3, khepri=True) as house:
        service, fenced = house.system.service, house.cluster.fenced
        first, second, third = service.router.owners(STORE, b"s")
        service.appended_elsewhere(STORE, b"s", 3, second)
        for node in (first, second, third):
            service.fences.may_lag(node)
        if problem == "no quorum":
            service.quorum = lambda store: {}
        house.cluster.fence_answer = (ERROR, Atom("timeout"))
        assert await house.version(b"s") == (OK, -1)
        assert fenced == ([first, second, third] if problem == "nobody catches up" else [])
        assert [worker.home.node.name for worker in house.cluster.asked("get_version")] == [second]


async def test_what_was_appended_through_another_gateway_on_another_node_is_read(tmp_path: Path) -> None:
    async with open_house(tmp_path, nodes=2, khepri=True) as house, gateway(house.cluster) as other:
        await connected(other, house.cluster)
        await other.node.connect(house.system.node.name)
        service = house.system.service
        owner = service.router.owners(STORE, b"s")[0]
        assert await house.version(b"s") == (OK, -1)
        fenced = house.cluster.fenced
        fenced.clear()
        ask = server_door(house.caller, other)

        async def heard() -> bool:
            await ask("append_events", STORE, b"s", [event(0).to_term()])
            return service.fences.lags(STORE, b"s", owner)

        # The other gateway appends where the owner is left out.
        other.service.router.suspect(owner, True)
        await wait_until(heard, "what was appended elsewhere")
        ok, version = await house.version(b"s")
        assert (ok, fenced) == (OK, [owner])
        assert version >= 0
        assert await house.version(b"s") == (OK, version)
        assert fenced == [owner]
