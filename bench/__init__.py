"""Measures gater beside its peers in one run: `python -m bench`. See `docs/benchmarks.md`.

One module a chapter: `echo` (GenServer calls), `codec` (one large term), `gateway` (through the gateway and direct),
`names` (the Swarm registry). Each gives `report.Table`s; `machine` says where it ran. Nothing here is asserted on.
"""
