"""What a broker must send, and how to compare with it what an implementation did send; see `reference`.

Where the protocol leaves a choice (which group member, which responder), a `Chooser` decides.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reference_codec import ANNOUNCEMENT, DELIVERY, OLD, Packet

if TYPE_CHECKING:
    from reference import ReferenceBroker


class Matcher:
    """An expected value that stands for many."""

    def __init__(self, name: str, test: Callable[[Any], bool]) -> None:
        self.name = name
        self.test = test

    def __eq__(self, other: object) -> bool:
        return self.test(other)

    def __hash__(self) -> int:
        return hash(self.name)

    def __repr__(self) -> str:
        return f"<{self.name}>"


_GUID = re.compile("[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")
ANY = Matcher("anything", lambda value: True)
SOME_TEXT = Matcher("a text", lambda value: isinstance(value, str) and value != "")
FRESH_GUID = Matcher("a fresh GUID", lambda value: isinstance(value, str) and _GUID.fullmatch(value) is not None)
SERVER_FACTS = Matcher("an announcement", lambda value: isinstance(value, str) and value.startswith(ANNOUNCEMENT))

Target = tuple[int, int]  # connection, subscription id (0: a plain subscription)


@dataclass(slots=True)
class Out:
    """One packet that a connection must receive.

    Neighbours with the same non-zero `unordered` may come in any order. `optional`: may be missing. `one_of`: the
    targets among which an implementation was free to choose this one (empty: no choice).
    """

    packet: Packet
    unordered: int = 0
    optional: bool = False
    one_of: tuple[Target, ...] = ()


def same(expected: Packet, actual: Packet, *, ids: bool = True, times: bool = False) -> bool:
    """Whether an actual packet is the expected one; `ids`, `times`: compare SystemId and time too where known."""
    return (
        expected.object_id == actual.object_id
        and expected.version == actual.version
        and expected.fields == actual.fields
        and (not ids or expected.system_id is None or expected.system_id == actual.system_id)
        and (not times or expected.time is None or expected.time == actual.time)
    )


def diff(expected: Sequence[Out], actual: Sequence[Packet], *, ids: bool = True, times: bool = False) -> str | None:
    """What differs between the packets that a connection must receive and those that it did; None if nothing does."""
    at = start = 0
    while start < len(expected):
        end = start + 1
        group = expected[start].unordered
        while group and end < len(expected) and expected[end].unordered == group:
            end += 1
        wanted = list(expected[start:end])
        while wanted:
            found = actual[at] if at < len(actual) else None
            hit = next((o for o in wanted if found and same(o.packet, found, ids=ids, times=times)), None)
            if hit is not None:
                wanted = [out for out in wanted if out is not hit]
                at += 1
            elif all(o.optional for o in wanted):
                break
            else:
                return f"packet {at}: expected {' or '.join(repr(o.packet) for o in wanted)}, got {found!r}"
        start = end
    return None if at == len(actual) else f"packet {at}: expected nothing more, got {actual[at]!r}"


class Chooser:
    """Decides what the protocol leaves open."""

    def choose(self, broker: ReferenceBroker, key: str, candidates: list[Target], fields: dict[str, Any]) -> int | None:
        """Index of the candidate that gets a message with these `fields`; None: none of them (taken as index 0 where
        that is not allowed). `key` names the group, or the responders of a subject."""
        raise NotImplementedError

    def query_id(self, broker: ReferenceBroker, default: str, targets: list[Target], fields: dict[str, Any]) -> str:
        """The id that the server gives a query whose own id is taken."""
        return default


class RoundRobin(Chooser):
    """One after the other."""

    def __init__(self) -> None:
        self.turns: Counter[str] = Counter()

    def choose(self, broker: ReferenceBroker, key: str, candidates: list[Target], fields: dict[str, Any]) -> int | None:
        turn = self.turns[key]
        self.turns[key] += 1
        return turn % len(candidates)


class Follower(Chooser):
    """Chooses what an implementation chose. Feed the implementation first, then the broker with the same bytes.

    `actual(conn)` gives every packet that the implementation has sent to a connection since its start. Times or
    payloads should be unique in a test, else two choices can be taken for each other.
    """

    WINDOW = 16

    def __init__(self, actual: Callable[[int], Sequence[Packet]]) -> None:
        self.actual = actual

    def _offset(self, broker: ReferenceBroker, target: Target, fields: dict[str, Any]) -> tuple[int, str] | None:
        conn, subscription = target
        start = broker.sent[conn]
        time = broker.handling.time if broker.handling else None
        for offset, packet in enumerate(self.actual(conn)[start : start + self.WINDOW]):
            there = packet.fields
            if packet.object_id != DELIVERY or there.get("SubscriptionId", 0) != subscription or packet.time != time:
                continue
            if there["Buffer"] == fields["Buffer"] and there["Subject"] == fields["Subject"]:
                return offset, there["TaskId"]
        return None

    def choose(self, broker: ReferenceBroker, key: str, candidates: list[Target], fields: dict[str, Any]) -> int | None:
        best: tuple[int, int] | None = None
        for index, target in enumerate(candidates):
            found = self._offset(broker, target, fields)
            if found is not None and (best is None or found[0] < best[0]):
                best = found[0], index
        return None if best is None else best[1]

    def query_id(self, broker: ReferenceBroker, default: str, targets: list[Target], fields: dict[str, Any]) -> str:
        for target in targets:
            if broker.conns[target[0]].dialect not in OLD:
                found = self._offset(broker, target, fields)
                if found is not None:
                    return found[1]
        return default
