"""An independent, plain and slow codec and broker: the oracle of the property tests and of the fuzz. Not shipped.

It is written from `docs/protocol.md` (section numbers in these files are that document's) and shares no code and no
tables with evbus; a test holds its tables against `evbus.wire`.

Codec (`reference_codec`): `Decoder` cuts a stream into `Frame`s or says `Refuse`; `decode` turns a frame into a
`Packet`; `encode` is the way back. Broker: `ReferenceBroker` is fed the bytes of each connection and lists what each
connection must receive, as `Out`s (`reference_expect`). Where the protocol leaves a choice, a `Chooser` decides:
`RoundRobin` by itself, `Follower` by looking at what an implementation really sent, so that the two go on from the
same state. `diff` compares.
"""

# ruff: noqa: F403, F405
from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from reference_codec import *
from reference_expect import *


@dataclass(slots=True)
class Limits:
    """What the broker is configured to take."""

    payload: int = 1048576
    overhead: int = 65536
    before_handshake: int = 4096
    subscriptions: int = 10000
    queries: int = 10000
    handshake_s: float = 5.0
    stale_s: float = 180.0  # a version-1 peer
    heartbeat_s: float = 5.0  # an announced peer that has no wish; stale after two


@dataclass(slots=True)
class _Subscription:
    tokens: list[str]
    id: int = 0
    fields: tuple[Any, ...] = ()
    responder: bool = False
    group: str = ""
    overflow: int = 0
    credit: int = 0
    waiting: list[tuple[_Conn, Packet, _Receipt | None]] = field(default_factory=list)

    @property
    def ready(self) -> bool:
        """Whether a message goes out at once. (This broker's connections take everything, so nothing is dropped.)"""
        return self.overflow != BLOCK or self.credit > 0


@dataclass(slots=True)
class _Receipt:
    """One that is held back until its message waits for nobody any more."""

    publisher: int
    task_id: str
    left: int = 0
    receivers: int = 0
    dropped: int = 0


@dataclass(slots=True)
class _Conn:
    id: int
    decoder: Decoder
    opened_at: float
    seen_at: float
    dialect: str = ""
    one_string: bool = False
    message: Any = ""
    stale_s: float = 0.0
    by_subject: dict[str, _Subscription] = field(default_factory=dict)
    by_id: dict[int, _Subscription] = field(default_factory=dict)


@dataclass(slots=True)
class _Query:
    id: str  # as forwarded
    asker: int
    task_id: str  # as the asker named it
    subject: str
    all: bool
    ends_at: float
    waiting: set[int]
    asked: int
    replies: int = 0


class ReferenceBroker:
    """A server without sockets: bytes and seconds in, expected packets out.

    `connect` gives a connection's number (1, 2, 3, ...); `take(conn)` what it must have received since the last call;
    `closed[conn]` the reason why the server closed it; `counts` what was skipped and refused.
    """

    def __init__(self, limits: Limits | None = None, chooser: Chooser | None = None, token: str | None = None) -> None:
        self.limits = limits or Limits()
        self.chooser = chooser or RoundRobin()
        self.token = token
        self.now = 0.0
        self.conns: dict[int, _Conn] = {}
        self.closed: dict[int, int] = {}
        self.sent: Counter[int] = Counter()  # packets listed so far, taken or not
        self.counts: Counter[str] = Counter()
        self.queries: dict[str, _Query] = {}  # by forwarded id, oldest first
        self._outs: dict[int, list[Out]] = {}
        self._numbers = 0
        self.handling: Packet | None = None
        self._own_ids = 0
        self._burst = 2

    # -- what a test calls

    def connect(self) -> int:
        """A new connection."""
        self._numbers += 1
        conn = _Conn(self._numbers, Decoder(None, self.limits.before_handshake), self.now, self.now)
        self.conns[conn.id] = conn
        self._outs[conn.id] = []
        return conn.id

    def feed(self, conn_id: int, data: bytes) -> None:
        """Bytes from a peer, in any pieces; ignored once the server has closed the connection."""
        conn = self.conns.get(conn_id)
        if conn is None:
            return
        conn.seen_at = self.now
        conn.decoder.feed(data)
        while conn_id in self.conns and (item := conn.decoder.next()) is not None:
            self._burst += 2
            if isinstance(item, Refuse):
                self._close(conn, item.reason)
            else:
                self._frame(conn, item)

    def close(self, conn_id: int) -> None:
        """The peer went away."""
        if conn_id in self.conns:
            self._burst += 2
            self._close(self.conns[conn_id], CLOSES["CLIENT_CLOSED"])

    def advance(self, seconds: float) -> None:
        """Let time pass; deadlines on the way happen in their order."""
        until = self.now + seconds
        self._burst += 2
        while True:
            due: list[tuple[float, int, Any]] = [(q.ends_at, 0, q) for q in self.queries.values()]
            for conn in self.conns.values():
                ready = conn.dialect != ""
                due.append(
                    (conn.seen_at + conn.stale_s if ready else conn.opened_at + self.limits.handshake_s, 1, conn)
                )
            if not due:
                break
            at, _, what = min(due, key=lambda item: item[:2])
            if at > until:
                break
            self.now = max(self.now, at)
            if isinstance(what, _Query):
                self._end(what, DEADLINE)
            else:
                self._close(what, CLOSES["STALE" if what.dialect else "HANDSHAKE_TIMEOUT"])
        self.now = until

    def take(self, conn_id: int) -> list[Out]:
        """What the connection must have received since the last call."""
        outs, self._outs[conn_id] = self._outs[conn_id], []
        return outs

    def shutdown(self) -> None:
        """Every announced peer is told that the server goes."""
        for conn in self.conns.values():
            self._go_away(conn, CLOSES["SERVER_SHUTDOWN"], optional=False)

    # -- sending

    def _send(self, conn: _Conn, object_id: int, fields: dict[str, Any], version: int = 1, **more: Any) -> None:
        packet = Packet(object_id, version, fields, more.pop("system_id", None), more.pop("time", None))
        if conn.dialect == EVBUS_2 and packet.system_id is None:
            packet.system_id = 0
        self._outs[conn.id].append(Out(packet, **more))
        self.sent[conn.id] += 1

    def _respond(self, conn: _Conn, task_id: str, status: int, message: Any = "", **more: Any) -> None:
        self._send(conn, RESPONSE, {"TaskId": task_id, "Status": status, "Message": message}, **more)

    def _error(self, conn: _Conn, code: str, task_id: str, subject: Any = "") -> None:
        self.counts[code] += 1
        if conn.dialect == EVBUS_2:
            self._send(conn, ERROR, {"TaskId": task_id, "Code": ERRORS[code], "Subject": subject, "Text": ANY})
        elif task_id and code != "MALFORMED":
            self._respond(conn, task_id, FAIL, SOME_TEXT)

    def _go_away(self, conn: _Conn, reason: int, optional: bool) -> None:
        if conn.dialect == EVBUS_2:
            fields = {"Reason": reason, "RetryAfterMs": ANY, "Text": ANY}
            self._send(conn, GO_AWAY, fields, optional=optional)

    def _close(self, conn: _Conn, reason: int) -> None:
        if reason > CLOSES["CONNECTION_LOST"]:
            self.closed[conn.id] = reason
            self._go_away(conn, reason, optional=True)
        del self.conns[conn.id]
        for sub in conn.by_id.values():
            self._drop_waiting(sub)
        for query in list(self.queries.values()):
            if query.asker == conn.id:
                del self.queries[query.id]
            elif conn.id in query.waiting:
                query.waiting.remove(conn.id)
                if query.all:
                    fields = {"TaskId": query.task_id, "Reason": LOST, "Replies": query.replies}
                    asker = self.conns[query.asker]
                    self._send(asker, QUERY_END, fields, system_id=conn.id, unordered=self._burst + 1)
                if not query.waiting:
                    self._end(query, LOST)

    # -- packets

    def _frame(self, conn: _Conn, frame: Frame) -> None:
        kind = frame.object_id, frame.version
        if conn.dialect == "":
            if kind != (HANDSHAKE, 1):
                self.counts["early"] += 1
                return
            self._handshake(conn, frame)
            return
        handler = _HANDLERS.get(kind)
        if handler is None or (conn.dialect != EVBUS_2 and (frame.version == 2 or frame.object_id >= 1000)):
            self.counts["unknown"] += 1
            return
        try:
            packet = self.handling = decode(frame, conn.dialect)
            handler(self, conn, packet, packet.fields)
        except Malformed as error:
            self._error(conn, "MALFORMED", error.task_id)

    def _handshake(self, conn: _Conn, frame: Frame) -> None:
        layout = conn.decoder.layout
        if layout == 22 and len(frame.body) == 4:
            self._close(conn, CLOSES["UNSUPPORTED_DIALECT"])
            return
        try:
            fields = decode_body(H22 if layout == 22 else H23_199, HANDSHAKE, 1, frame.body)
        except Malformed:
            self.counts["MALFORMED"] += 1
            return
        wish = announced(fields.get("Announcement", ""))
        dialect, stale_s = H22 if layout == 22 else H23_199, self.limits.stale_s
        if layout == 23 and len(fields) == 1 and frame.system_id != 0:
            dialect = H23_255
        if self.token is not None and fields.get("AuthenticationToken", "") != self.token:
            self._respond(conn, fields["TaskId"], FAIL, SOME_TEXT)
            self._close(conn, CLOSES["AUTH_FAILED"])
            return
        if wish is not None:
            low, high = wish["versions"]
            if not low <= 2 <= high:
                self._respond(conn, fields["TaskId"], FAIL, SOME_TEXT)
                self._close(conn, CLOSES["UNSUPPORTED_DIALECT"])
                return
            beat: Any = wish.get("heartbeat")
            if type(beat) not in (int, float) or not beat > 0:
                beat = self.limits.heartbeat_s
            dialect, stale_s = EVBUS_2, 2.0 * beat
        conn.dialect, conn.stale_s, conn.one_string = dialect, stale_s, layout == 23 and len(fields) == 1
        conn.message = SERVER_FACTS if dialect == EVBUS_2 else ""
        conn.decoder.limit = self.limits.payload + self.limits.overhead
        self._respond(conn, fields["TaskId"], SUCCESS, conn.message)

    def _handshake_again(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        self._respond(conn, fields["TaskId"], SUCCESS, conn.message)

    def _heartbeat(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        if conn.one_string:  # the second witness
            conn.dialect = H23_199 if packet.object_id == HEARTBEAT else H23_255
        self._send(conn, packet.object_id, fields)

    def _subscribe(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        task_id, subject = fields["TaskId"], fields["Subject"]
        number = fields.get("SubscriptionId", 0)
        if packet.version == 2 and number <= 0:
            raise Malformed("SubscriptionId", task_id)
        if not valid_subject(subject, pattern=True):
            self._error(conn, "INVALID_SUBJECT", task_id, ANY)
            return
        new = _Subscription(subject.split("."))
        if packet.version == 2:
            if fields["Role"] > RESPONDER or fields["Overflow"] > (0 if fields["Role"] == RESPONDER else BLOCK):
                self._error(conn, "UNSUPPORTED", task_id, subject)
                return
            new.id, new.responder, new.group = number, fields["Role"] == RESPONDER, fields["Group"]
            new.overflow = fields["Overflow"]
            new.fields = subject, fields["Role"], fields["Overflow"], fields["Group"]
        old = conn.by_id.get(number) if packet.version == 2 else conn.by_subject.get(subject)
        if old is not None and old.fields != new.fields:
            self._error(conn, "DUPLICATE_ID", task_id, subject)
            return
        if old is None:
            if len(conn.by_id) + len(conn.by_subject) >= self.limits.subscriptions:
                self._error(conn, "TOO_MANY_SUBSCRIPTIONS", task_id, subject)
                return
            if packet.version == 2:
                conn.by_id[number] = new
            else:
                conn.by_subject[subject] = new
        self._acknowledge(conn, packet, 0)

    def _unsubscribe(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        if packet.version == 1:
            conn.by_subject.pop(fields["Subject"], None)
        else:
            sub = conn.by_id.pop(fields["SubscriptionId"], None)
            if sub is None:
                self._error(conn, "UNKNOWN_SUBSCRIPTION", fields["TaskId"])
                return
            self._drop_waiting(sub)
        self._acknowledge(conn, packet, 0)

    # -- credit

    def _credit(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        if fields["SubscriptionId"] <= 0 or fields["Msgs"] <= 0:
            raise Malformed("Credit", "")
        sub = conn.by_id.get(fields["SubscriptionId"])
        if sub is None or sub.overflow != BLOCK:
            return
        sub.credit = min(sub.credit + fields["Msgs"], 2**31 - 1)
        while sub.waiting and sub.credit > 0:
            source, event, receipt = sub.waiting.pop(0)
            sub.credit -= 1
            self._deliver((conn.id, sub.id), source, event, event.fields["TaskId"])
            if receipt is not None:
                self._settle(receipt)

    def _send_or_wait(self, target: Target, source: _Conn, packet: Packet, receipt: _Receipt | None) -> None:
        """An event for a subscription with Overflow block."""
        sub = self.conns[target[0]].by_id[target[1]]
        if sub.credit > 0 and not sub.waiting:
            sub.credit -= 1
            self._deliver(target, source, packet, packet.fields["TaskId"])
            return
        sub.waiting.append((source, packet, receipt))
        if receipt is not None:
            receipt.left += 1

    def _drop_waiting(self, sub: _Subscription) -> None:
        for _, _, receipt in sub.waiting:
            if receipt is not None:
                receipt.receivers -= 1
                receipt.dropped += 1
                self._settle(receipt)
        sub.waiting.clear()

    def _settle(self, receipt: _Receipt) -> None:
        receipt.left -= 1
        publisher = self.conns.get(receipt.publisher)
        if receipt.left == 0 and publisher is not None:
            fields = {"TaskId": receipt.task_id, "Receivers": receipt.receivers, "Dropped": receipt.dropped}
            self._send(publisher, RECEIPT, fields)

    def _acknowledge(self, conn: _Conn, packet: Packet, receivers: int, unordered: int = 0) -> None:
        task_id = packet.fields["TaskId"]
        if task_id == "":
            return
        if packet.object_id == PUBLISH and packet.fields.get("Flags", 0) & CONFIRM:
            fields = {"TaskId": task_id, "Receivers": receivers, "Dropped": 0}
            self._send(conn, RECEIPT, fields, unordered=unordered)
        else:
            self._respond(conn, task_id, SUCCESS, unordered=unordered)

    # -- events

    def _matching(self, subject: str, skip: int = 0) -> tuple[list[int], dict[str, list[Target]], list[Target]]:
        """Connections with a plain subscription, members by group, responders."""
        tokens = subject.split(".")
        plain: list[int] = []
        groups: dict[str, list[Target]] = {}
        responders: list[Target] = []
        for conn in self.conns.values():
            if conn.id == skip:
                continue
            for subs in (conn.by_subject, conn.by_id):
                for sub in subs.values():
                    if not matches(sub.tokens, tokens):
                        continue
                    if sub.responder:
                        responders.append((conn.id, sub.id))
                    elif sub.group:
                        groups.setdefault(sub.group, []).append((conn.id, sub.id))
                    elif conn.id not in plain and sub.overflow != BLOCK:
                        plain.append(conn.id)
        return plain, groups, responders

    def _blocking(self, subject: str, skip: int = 0) -> list[Target]:
        """Plain subscriptions with Overflow block, which get copies of their own."""
        tokens = subject.split(".")
        return [
            (conn.id, sub.id)
            for conn in self.conns.values()
            for sub in conn.by_id.values()
            if conn.id != skip
            and sub.overflow == BLOCK
            and not sub.responder
            and not sub.group
            and matches(sub.tokens, tokens)
        ]

    def _subscription(self, target: Target) -> _Subscription | None:
        return self.conns[target[0]].by_id.get(target[1])

    def _pick(self, name: str, members: list[Target], fields: dict[str, Any]) -> Target:
        """The member of a group that gets an event: in turn, of those that may be sent one now; else the one with the
        shortest queue."""
        ready = [target for target in members if (sub := self._subscription(target)) is None or sub.ready]
        if not ready:
            return min(members, key=lambda target: (len(self.conns[target[0]].by_id[target[1]].waiting), target))
        return ready[self.chooser.choose(self, "group " + name, ready, fields) or 0]

    def _deliver(
        self,
        target: Target,
        source: _Conn,
        packet: Packet,
        task_id: Any,
        flags: int = 0,
        deadline_ms: int = 0,
        one_of: Sequence[Target] = (),
    ) -> None:
        conn, fields = self.conns[target[0]], packet.fields
        new: dict[str, Any] = {"TaskId": task_id, "Subject": fields["Subject"], "Buffer": fields["Buffer"]}
        more: dict[str, Any] = {"time": packet.time, "unordered": self._burst, "one_of": tuple(one_of)}
        if conn.dialect == EVBUS_2:
            new.update(Flags=flags, Codec=fields.get("Codec", 0), SubscriptionId=target[1], DeadlineMs=deadline_ms)
            new.update(QueryTaskId="", Headers=fields.get("Headers", b""))
            self._send(conn, DELIVERY, new, 2, system_id=source.id, **more)
        elif conn.dialect in OLD:
            if flags & IS_QUERY:
                new["TaskId"] = FRESH_GUID
            self._send(conn, DELIVERY, new, **more)
        else:
            new["IsQueryRequest"] = bool(flags & IS_QUERY)
            self._send(conn, DELIVERY, new, **more)

    def _checked(self, conn: _Conn, fields: dict[str, Any]) -> bool:
        if not valid_subject(fields["Subject"], pattern=False):
            self._error(conn, "INVALID_SUBJECT", fields["TaskId"], ANY)
        elif len(fields["Buffer"]) > self.limits.payload:
            self._error(conn, "PAYLOAD_TOO_LARGE", fields["TaskId"], fields["Subject"])
        else:
            return True
        return False

    def _publish(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        if not self._checked(conn, fields):
            return
        answered = fields.get("QueryTaskId", "")
        if not blank(answered):
            query = self.queries.get(answered)
            if query is None or conn.id not in query.waiting or query.subject != fields["Subject"]:
                # Not acknowledged, so a version-1 peer hears nothing: its TaskId is not shown to `_error`.
                task_id = fields["TaskId"] if conn.dialect == EVBUS_2 else ""
                self._error(conn, "UNKNOWN_QUERY", task_id, fields["Subject"])
                return
            self._answer(query, conn, packet)
            self._acknowledge(conn, packet, 1, self._burst + 1)
            return
        if conn.dialect in OLD:
            for query in self.queries.values():
                if conn.id in query.waiting and query.subject == fields["Subject"]:
                    self._answer(query, conn, packet)
                    return
        skip = conn.id if fields.get("Flags", 0) & NO_ECHO else 0
        plain, groups, _ = self._matching(fields["Subject"], skip)
        # All choices first: copies on one connection come in any order, so a Follower must see them all.
        picks = [(self._pick(name, members, fields), members) for name, members in groups.items()]
        blocking = self._blocking(fields["Subject"], skip)
        confirmed = fields["TaskId"] != "" and fields.get("Flags", 0) & CONFIRM
        receipt = _Receipt(conn.id, fields["TaskId"]) if confirmed else None
        for number in plain:
            self._deliver((number, 0), conn, packet, fields["TaskId"])
        for target, members in picks:
            sub = self._subscription(target)
            if sub is not None and sub.overflow == BLOCK:
                self._send_or_wait(target, conn, packet, receipt)
            else:
                self._deliver(target, conn, packet, fields["TaskId"], one_of=members)
        for target in blocking:
            self._send_or_wait(target, conn, packet, receipt)
        receivers = len(plain) + len(groups) + len(blocking)
        if receipt is not None and receipt.left:
            receipt.receivers = receivers
            return
        self._acknowledge(conn, packet, receivers)

    # -- queries

    def _query(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        task_id, subject = fields["TaskId"], fields["Subject"]
        if blank(task_id):
            raise Malformed("a query without an id", task_id)
        if not self._checked(conn, fields):
            return
        mine = [query for query in self.queries.values() if query.asker == conn.id]
        if any(query.task_id == task_id for query in mine):
            self._error(conn, "DUPLICATE_ID", task_id, subject)
            return
        if len(mine) >= self.limits.queries:
            self._error(conn, "TOO_MANY_QUERIES", task_id, subject)
            return
        to_all = bool(fields.get("Flags", 0) & ALL)
        targets = self._query_targets(subject, to_all, fields)
        if not targets:
            self._error(conn, "NO_RESPONDERS", task_id, subject)
            return
        number = task_id
        if number in self.queries:
            while number in self.queries:
                self._own_ids += 1
                number = f"evbus-{self._own_ids}"
            number = self.chooser.query_id(self, number, [target for target, _ in targets], fields)
        wish = fields.get("DeadlineMs", 0)
        deadline_ms = 30000 if wish <= 0 else min(wish, 60000)
        waiting = {target[0] for target, _ in targets}
        query = _Query(number, conn.id, task_id, subject, to_all, self.now + deadline_ms / 1000, waiting, len(waiting))
        self.queries[number] = query
        for target, one_of in targets:
            sub = self._subscription(target)
            if sub is not None and sub.overflow == BLOCK:
                sub.credit -= 1  # a query does not wait, but it counts
            self._deliver(target, conn, packet, number, IS_QUERY, deadline_ms, one_of)

    def _query_targets(self, subject: str, to_all: bool, fields: dict[str, Any]) -> list[tuple[Target, list[Target]]]:
        """Who is asked: (target, the targets it was chosen from). A connection is asked at most once."""
        plain, groups, responders = self._matching(subject)
        chosen: list[tuple[Target, list[Target]]] = []
        if responders and not to_all:
            index = self.chooser.choose(self, "responders " + subject, responders, fields) or 0
            return [(responders[index], responders)]
        if responders:
            by_conn: dict[int, list[Target]] = {}
            for target in responders:
                by_conn.setdefault(target[0], []).append(target)
            for number, own in by_conn.items():
                index = (self.chooser.choose(self, f"own {number}", own, fields) or 0) if len(own) > 1 else 0
                chosen.append((own[index], own if len(own) > 1 else []))
            return chosen
        blocking: dict[int, int] = {}
        for number, sid in self._blocking(subject):
            if number not in plain:
                blocking[number] = min(sid, blocking.get(number, sid))
        if plain or blocking:
            return [((number, 0), []) for number in plain] + [(target, []) for target in blocking.items()]
        # A group may have chosen a member on a connection that another group had asked before it, and so ask nobody:
        # for a Follower that is a group for which it finds no delivery, so those come last.
        asked: set[int] = set()
        picks = [
            (self.chooser.choose(self, "group " + name, members, fields), members) for name, members in groups.items()
        ]
        for picked, members in sorted(picks, key=lambda pick: pick[0] is None):
            target = members[picked or 0]
            if target[0] in asked or (picked is None and any(member[0] in asked for member in members)):
                continue
            asked.add(target[0])
            chosen.append((target, members))
        return chosen

    def _answer(self, query: _Query, answerer: _Conn, packet: Packet) -> None:
        query.waiting.discard(answerer.id)
        query.replies += 1
        self._deliver((query.asker, 0), answerer, packet, query.task_id, IS_ANSWER)
        self._settled(query)

    def _settled(self, query: _Query) -> None:
        if not query.all:
            del self.queries[query.id]
        elif not query.waiting:
            self._end(query, COMPLETE)

    def _end(self, query: _Query, reason: int) -> None:
        """No further answer can come."""
        del self.queries[query.id]
        asker = self.conns[query.asker]
        if query.all and reason != DEADLINE:
            reason = COMPLETE if query.replies == query.asked else LOST
        if asker.dialect == EVBUS_2:
            fields = {"TaskId": query.task_id, "Reason": reason, "Replies": query.replies}
            self._send(asker, QUERY_END, fields, unordered=self._burst + 1)
        elif reason == LOST:
            self._respond(asker, query.task_id, FAIL, SOME_TEXT, unordered=self._burst + 1)

    def _failure(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        query = self.queries.get(fields["TaskId"])
        if query is None or conn.id not in query.waiting:
            self.counts["UNKNOWN_QUERY"] += 1
            return
        query.waiting.remove(conn.id)
        if not query.all and query.waiting:
            return  # others may still answer
        query.replies += 1
        asker = self.conns[query.asker]
        if asker.dialect == EVBUS_2:
            words = raw(fields["Text"])[:1024].decode("utf-8", "replace")
            new = {"TaskId": query.task_id, "Code": fields["Code"], "Subject": query.subject, "Text": words}
            self._send(asker, ERROR, new, system_id=conn.id)
        else:
            self._respond(asker, query.task_id, FAIL, ANY)
        self._settled(query)

    def _cancel(self, conn: _Conn, packet: Packet, fields: dict[str, Any]) -> None:
        for query in list(self.queries.values()):
            if query.asker == conn.id and query.task_id == fields["TaskId"]:
                del self.queries[query.id]
                return
        self.counts["UNKNOWN_QUERY"] += 1


_HANDLERS: dict[tuple[int, int], Callable[[ReferenceBroker, _Conn, Packet, dict[str, Any]], None]] = {
    (HANDSHAKE, 1): ReferenceBroker._handshake_again,
    (SUBSCRIBE, 1): ReferenceBroker._subscribe,
    (SUBSCRIBE, 2): ReferenceBroker._subscribe,
    (UNSUBSCRIBE, 1): ReferenceBroker._unsubscribe,
    (UNSUBSCRIBE, 2): ReferenceBroker._unsubscribe,
    (PUBLISH, 1): ReferenceBroker._publish,
    (PUBLISH, 2): ReferenceBroker._publish,
    (QUERY, 1): ReferenceBroker._query,
    (QUERY, 2): ReferenceBroker._query,
    (HEARTBEAT, 1): ReferenceBroker._heartbeat,
    (HEARTBEAT_OLD, 1): ReferenceBroker._heartbeat,
    (ERROR, 1): ReferenceBroker._failure,
    (CANCEL_QUERY, 1): ReferenceBroker._cancel,
    (CREDIT, 1): ReferenceBroker._credit,
}


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def announced(announcement: str) -> dict[str, Any] | None:
    """The facts in a fourth string, or None if it is no announcement that can be used (section 5)."""
    if not announcement.startswith(ANNOUNCEMENT):
        return None
    try:
        facts: dict[str, Any] = json.loads(
            raw(announcement[len(ANNOUNCEMENT) :]).decode("utf-8"), parse_constant=_no_constant
        )
        low, high = facts["versions"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return facts if type(low) is int and type(high) is int and low <= high else None
