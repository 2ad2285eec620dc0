"""An Erlang node in Python.

    async with make_node("py@127.0.0.1", cookie="secret") as node:
        await node.connect("erl@127.0.0.1")
        await call(node, ("server", "erl@127.0.0.1"), request)

The wire half (`terms`, `etf`, `control`, `handshake`, `dist_header`, `epmd_protocol`, `phash2`) is pure: bytes in,
values out. The node half (`connection`, `node`, `process`, `gen_server`, `supervisor`, `rpc`, `rpc_server`, `kernel`,
`epmd`) runs on asyncio.
"""

from __future__ import annotations

from gater.erl import kernel, pg, rpc_server
from gater.erl.node import Node, NodeOptions, NodeTls

__all__ = ["Node", "NodeOptions", "NodeTls", "make_node"]


def make_node(name: str, *, cookie: str, options: NodeOptions | None = None) -> Node:
    """A node that answers remote procedure calls and kernel functions, not started yet."""
    node = Node(name, cookie=cookie, options=options)
    rpc_server.install(node)
    kernel.install(node)
    pg.install(node)
    return node
