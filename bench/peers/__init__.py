"""The servers that the bench drives, each with as much of its protocol as a publish and a subscribe need."""

from __future__ import annotations

from bench.peers.base import Peer
from bench.peers.evbus import Evbus, EvbusVersion1
from bench.peers.nats import Nats
from bench.peers.redis import Redis
from bench.peers.relay import Relay

__all__ = ["PEERS", "Peer"]

#: By the names that `--peers` takes, in the order of the table.
PEERS: dict[str, type[Peer]] = {peer.name: peer for peer in (Relay, Nats, Redis, Evbus, EvbusVersion1)}
