"""Queries through the shipped broker: who is asked, who may answer, and how each query ends. The oracle looks on."""

from __future__ import annotations

import random
from typing import Any

import pytest
import reference as ref
from helpers_bus import Bus, Client, brief

from evbus.wire import ErrorCode


def ask(client: Client, subject: str, number: str, **fields: Any) -> None:
    """Send a query, of version 2 if the dialect has it."""
    client.send(ref.QUERY, 2 if client.dialect == ref.EVBUS_2 else 1, TaskId=number, Subject=subject, **fields)


def answer(client: Client, subject: str, number: str, **fields: Any) -> None:
    """Answer a query."""
    client.send(ref.PUBLISH, 2 if client.dialect == ref.EVBUS_2 else 1, Subject=subject, QueryTaskId=number, **fields)


def test_one_responder_is_asked_in_turn() -> None:
    bus = Bus()
    asker, one, two, plain = (bus.open() for _ in range(4))
    one.subscribe("q", 1, role=ref.RESPONDER)
    two.subscribe(">", 2, role=ref.RESPONDER)
    plain.subscribe("q")
    for index in range(10):
        ask(asker, "q", f"n{index}")
    assert (len(one.take()), len(two.take()), plain.take()) == (5, 5, [])


def test_turns_of_queries_and_of_events_do_not_disturb_each_other() -> None:
    bus = Bus()
    asker, one, two = (bus.open() for _ in range(3))
    for client in (one, two):
        client.subscribe("x", 1, role=ref.RESPONDER)
        client.subscribe("x", 2, group="g")
    for index in range(20):
        ask(asker, "x", f"n{index}")
        asker.publish("x")
    for client in (one, two):
        flags = [packet.fields["Flags"] for packet in client.take()]
        assert (flags.count(ref.IS_QUERY), flags.count(0)) == (10, 10)


def test_only_who_was_asked_may_answer_and_once() -> None:
    bus = Bus()
    asker, one, two = (bus.open() for _ in range(3))
    for client in (one, two):
        client.subscribe("q", 1, role=ref.RESPONDER)
    ask(asker, "q", "n")
    asked, other = (one, two) if one.take() else (two, one)
    answer(other, "q", "n", TaskId="t")
    answer(asked, "elsewhere", "n")
    assert [out[:3] for out in other.brief()] == [(ref.ERROR, "t", ErrorCode.UNKNOWN_QUERY)]
    assert [out[:3] for out in asked.brief()] == [(ref.ERROR, "", ErrorCode.UNKNOWN_QUERY)]
    answer(asked, "q", "n", TaskId="t", Buffer=b"!", Flags=ref.CONFIRM)
    assert asked.brief() == [(ref.RECEIPT, "t", 1)]
    answer(asked, "q", "n", Buffer=b"again")
    assert [packet.fields["Buffer"] for packet in asker.take()] == [b"!"]
    assert bus.errors() == {"unknown_query": 3}
    assert bus.router.queries.count == 0


def test_an_id_in_use_elsewhere_is_mapped_and_mapped_back() -> None:
    bus = Bus()
    askers = [bus.open() for _ in range(4)] + [bus.open(ref.H23_199)]
    responder = bus.open()
    responder.subscribe("q", 1, role=ref.RESPONDER)
    for asker in askers:
        ask(asker, "q", "same")
    numbers = [packet.fields["TaskId"] for packet in responder.take()]
    assert numbers == ["same", "evbus-1", "evbus-2", "evbus-3", "evbus-4"]
    ask(askers[0], "q", "same")
    assert askers[0].brief() == [(ref.ERROR, "same", ErrorCode.DUPLICATE_ID)]
    askers[1].send(ref.CANCEL_QUERY, TaskId="same")
    for index, number in reversed(list(enumerate(numbers))):
        answer(responder, "q", number, Buffer=b"%d" % index)
    got = [[packet.fields["Buffer"] for packet in asker.take()] for asker in askers]
    assert got == [[b"0"], [], [b"2"], [b"3"], [b"4"]]
    assert [out[2] for out in responder.brief()] == [ErrorCode.UNKNOWN_QUERY]


def test_an_id_that_the_server_would_have_made_is_left_alone() -> None:
    bus = Bus()
    one, two, responder = (bus.open() for _ in range(3))
    responder.subscribe("q", 1, role=ref.RESPONDER)
    ask(one, "q", "evbus-1")
    ask(one, "q", "n")
    ask(two, "q", "n")
    assert [packet.fields["TaskId"] for packet in responder.take()] == ["evbus-1", "n", "evbus-2"]


def test_plain_subscribers_are_asked_all_and_groups_only_without_them() -> None:
    bus = Bus()
    asker, plain, grouped = bus.open(ref.H23_199), bus.open(ref.H23_199), bus.open()
    grouped.subscribe("q", 1, group="g")
    ask(asker, "q", "a")
    assert grouped.brief() == [(ref.DELIVERY, "a", ref.IS_QUERY, 1)]
    plain.subscribe("*")
    asker.subscribe("q")
    ask(asker, "q", "b")
    assert (grouped.take(), plain.brief()) == ([], [(ref.DELIVERY, "b", True)])
    assert asker.brief() == [(ref.DELIVERY, "b", True)]
    answer(plain, "q", "b", TaskId="t")
    assert (plain.brief(), asker.brief()) == ([(ref.RESPONSE, "t", 1)], [(ref.DELIVERY, "b", False)])


def test_flags_of_a_publish_mean_nothing_in_a_query() -> None:
    bus = Bus()
    asker = bus.open()
    asker.subscribe("q", 1, group="g")
    ask(asker, "q", "n", Flags=ref.NO_ECHO | ref.CONFIRM)
    assert asker.brief() == [(ref.DELIVERY, "n", ref.IS_QUERY, 1)]


@pytest.mark.parametrize("wish", [*range(4000, 4040), 1, 1001, 29_999, 59_999, 60_000])
def test_deadline_is_passed_on_to_the_millisecond(wish: int) -> None:
    bus = Bus()
    asker, responder = bus.open(), bus.open()
    responder.subscribe("q", 1, role=ref.RESPONDER)
    for number, given, left in (("a", wish, wish), ("b", 0, 30_000), ("c", -5, 30_000), ("d", 2**31 - 1, 60_000)):
        ask(asker, "q", number, DeadlineMs=given)
        assert [packet.fields["DeadlineMs"] for packet in responder.take()] == [left]


def test_deadlines_come_in_their_order() -> None:
    bus = Bus(check=False)
    rng = random.Random(5)
    asker, responder = bus.open(), bus.open()
    responder.subscribe("q", 1, role=ref.RESPONDER)
    deadlines = {f"n{index}": rng.randrange(1, 60_000) for index in range(500)}
    for number, deadline in deadlines.items():
        ask(asker, "q", number, DeadlineMs=deadline)
    responder.take()
    gone = set(rng.sample(sorted(deadlines), 200))
    for number in gone:
        answer(responder, "q", number)
    asker.take()
    start = bus.world.now
    ended: list[str] = []
    while bus.router.queries.count:
        due = bus.router.queries.next_deadline
        assert due is not None
        bus.wait(max(due - bus.world.now, 0.0) + 1e-6)
        for packet in asker.take():
            number = packet.fields["TaskId"]
            assert (packet.object_id, packet.fields["Reason"]) == (ref.QUERY_END, ref.DEADLINE)
            assert abs(start + deadlines[number] / 1000 - bus.world.now) < 0.01
            ended.append(number)
    assert ended == sorted(ended, key=deadlines.__getitem__)
    assert set(ended) == deadlines.keys() - gone
    assert bus.router.queries.next_deadline is None


def test_a_query_of_version_1_ends_in_silence_at_its_deadline() -> None:
    bus = Bus(query_default_s=2.0)
    bus.world.check = False
    asker, responder = bus.open(ref.H22), bus.open()
    responder.subscribe("q", 1, role=ref.RESPONDER)
    ask(asker, "q", "n")
    assert [packet.fields["DeadlineMs"] for packet in responder.take()] == [2000]
    bus.wait(1.9)
    assert bus.router.queries.count == 1
    bus.wait(0.2)
    assert (bus.router.queries.count, asker.take()) == (0, [])


@pytest.mark.parametrize(
    ("replies", "told"),
    [
        ("ok ok", [(5, "n", 16, 0), (5, "n", 16, 0), (1005, "n", ref.COMPLETE, 2)]),
        ("bad bad", [(1000, "n", 7), (1000, "n", 7), (1005, "n", ref.COMPLETE, 2)]),
        ("gone ok", [(1005, "n", ref.LOST, 0), (5, "n", 16, 0), (1005, "n", ref.LOST, 1)]),
        ("gone bad", [(1005, "n", ref.LOST, 0), (1000, "n", 7), (1005, "n", ref.LOST, 1)]),
        ("ok gone", [(5, "n", 16, 0), (1005, "n", ref.LOST, 1), (1005, "n", ref.LOST, 1)]),
        ("gone gone", [(1005, "n", ref.LOST, 0)] * 3),
        ("ok late", [(5, "n", 16, 0), (1005, "n", ref.DEADLINE, 1)]),
    ],
)
def test_query_to_all(replies: str, told: list[tuple[Any, ...]]) -> None:
    bus = Bus()
    asker, *responders = (bus.open() for _ in range(3))
    for client in responders:
        client.subscribe("q", 1, role=ref.RESPONDER)
        client.subscribe(">", 2, role=ref.RESPONDER)
    ask(asker, "q", "n", Flags=ref.ALL, DeadlineMs=2000)
    for client, reply in zip(responders, replies.split(), strict=True):
        assert len(client.take()) == 1
        if reply == "ok":
            answer(client, "q", "n")
            answer(client, "q", "n")  # the second finds nothing any more
        elif reply == "bad":
            client.send(ref.ERROR, TaskId="n", Code=7)
        elif reply == "gone":
            client.close()
    bus.wait(2.5)
    packets = asker.take()
    assert [brief(packet) for packet in packets] == told
    # Who replied, or was lost; the end itself is the server's word.
    senders = [client.id for client, reply in zip(responders, replies.split(), strict=True) if reply != "late"]
    assert [packet.system_id for packet in packets] == [*senders, 0]
    assert bus.router.queries.count == 0


@pytest.mark.parametrize(
    ("dialect", "failed", "lost"),
    [
        (ref.EVBUS_2, [(1000, "n", 500)], [(1005, "n", ref.LOST, 0)]),
        (ref.H23_199, [(254, "n", 2)], [(254, "n", 2)]),
        (ref.H22, [(254, "n", 2)], [(254, "n", 2)]),
    ],
)
def test_failure_and_loss(dialect: str, failed: list[tuple[Any, ...]], lost: list[tuple[Any, ...]]) -> None:
    bus = Bus()
    asker, one, two, stranger = bus.open(dialect), bus.open(), bus.open(), bus.open()
    for client in (one, two):
        client.subscribe("q")
    ask(asker, "q", "n")
    stranger.send(ref.ERROR, TaskId="n", Code=1)
    one.send(ref.ERROR, TaskId="n", Code=500, Text="no")
    assert asker.take() == []  # the other may still answer
    two.send(ref.ERROR, TaskId="n", Code=500, Subject="not mine to say", Text="no\udcff" + "x" * 2000)
    packets = asker.take()
    assert [(packet.object_id, *list(packet.fields.values())[:2]) for packet in packets] == failed
    if dialect == ref.EVBUS_2:
        assert packets[0].system_id == two.id
        assert packets[0].fields["Subject"] == "q"
        assert packets[0].fields["Text"] == "no\ufffd" + "x" * 1021
    else:
        assert packets[0].fields["Message"].startswith("no\ufffdx")
    ask(asker, "q", "n")
    one.close()
    assert asker.take() == []
    two.close()
    assert asker.brief() == lost
    assert bus.errors() == {"unknown_query": 1}


def test_old_generation_answers_by_publishing() -> None:
    bus = Bus()
    asker, old, watcher = bus.open(), bus.open(ref.H22), bus.open()
    old.subscribe("q")
    ask(asker, "q", "one")
    ask(asker, "q", "two")
    watcher.subscribe("q")
    numbers = [packet.fields["TaskId"] for packet in old.take()]
    assert len(set(numbers)) == 2
    assert not {"one", "two"} & set(numbers)
    for index in range(3):
        old.publish("q", b"%d" % index, task_id="t")
    got = [(packet.fields["TaskId"], packet.fields["Buffer"]) for packet in asker.take()]
    assert got == [("one", b"0"), ("two", b"1")]
    # The third answers nothing: an event like any other, for all and acknowledged.
    assert [packet.fields["Buffer"] for packet in watcher.take()] == [b"2"]
    assert old.brief() == [(ref.DELIVERY, "t"), (ref.RESPONSE, "t", 1)]


def test_cancel_forgets_and_one_too_late_is_counted() -> None:
    bus = Bus()
    asker, responder = bus.open(), bus.open()
    responder.subscribe("q", 1, role=ref.RESPONDER)
    ask(asker, "q", "n")
    asker.send(ref.CANCEL_QUERY, TaskId="n")
    asker.send(ref.CANCEL_QUERY, TaskId="n")
    responder.send(ref.CANCEL_QUERY, TaskId="n")
    answer(responder, "q", "n")
    assert asker.take() == []
    assert bus.errors() == {"unknown_query": 3}


def test_limit_of_pending_queries() -> None:
    bus = Bus(queries_per_connection=3)
    asker, other, responder = bus.open(), bus.open(), bus.open()
    responder.subscribe("q", 1, role=ref.RESPONDER)
    for index in range(5):
        ask(asker, "q", f"n{index}")
    ask(other, "q", "n9")
    assert [out[:3] for out in asker.brief()] == [(1000, f"n{n}", ErrorCode.TOO_MANY_QUERIES) for n in (3, 4)]
    assert (len(responder.take()), other.take()) == (4, [])
    answer(responder, "q", "n0")
    ask(asker, "q", "n5")
    assert asker.brief() == [(ref.DELIVERY, "n0", ref.IS_ANSWER, 0)]


@pytest.mark.parametrize("dialect", ref.DIALECTS)
@pytest.mark.parametrize("number", ["", " ", "\t\r\n ", "x" * 129])
def test_an_id_that_is_none_is_malformed(dialect: str, number: str) -> None:
    bus = Bus()
    client = bus.open(dialect)
    client.send(ref.QUERY, TaskId=number, Subject="q")
    told = [(ref.ERROR, number if len(number) < 129 else "", ErrorCode.MALFORMED)]
    assert client.brief() == (told if dialect == ref.EVBUS_2 else [])
    assert bus.errors() == {"malformed": 1}


def test_nobody_to_ask_is_told_at_once() -> None:
    bus = Bus()
    clients = {dialect: bus.open(dialect) for dialect in ref.DIALECTS}
    for dialect, client in clients.items():
        client.send(ref.QUERY, TaskId="n", Subject="q")
        told = (ref.ERROR, "n", ErrorCode.NO_RESPONDERS) if dialect == ref.EVBUS_2 else (ref.RESPONSE, "n", ref.FAIL)
        assert client.brief() == [told]
    assert bus.errors() == {"no_responders": 4}


def test_many_queries_each_answered_once_and_to_its_asker() -> None:
    bus = Bus(check=False)
    rng = random.Random(11)
    askers, responders = [bus.open() for _ in range(8)], [bus.open() for _ in range(4)]
    for client in responders:
        client.subscribe("q.*", 1, role=ref.RESPONDER)
    expected: dict[int, set[tuple[str, bytes]]] = {asker.id: set() for asker in askers}
    waiting: list[tuple[Client, str, str, bytes]] = []
    for round_ in range(400):
        for _ in range(10):
            asker, number = rng.choice(askers), f"n{rng.randrange(10_000)}"
            if (number, number.encode()) not in expected[asker.id]:
                expected[asker.id].add((number, number.encode()))
                ask(asker, f"q.{round_ % 7}", number, Buffer=number.encode())
        for client in responders:
            waiting += [
                (client, packet.fields["Subject"], packet.fields["TaskId"], packet.fields["Buffer"])
                for packet in client.take()
            ]
        rng.shuffle(waiting)
        while len(waiting) > 50:
            client, subject, number, buffer = waiting.pop()
            answer(client, subject, number, Buffer=buffer)
    for client, subject, number, buffer in waiting:
        answer(client, subject, number, Buffer=buffer)
    for asker in askers:
        got = [(packet.fields["TaskId"], packet.fields["Buffer"]) for packet in asker.take()]
        assert len(got) == len(set(got))
        assert set(got) == expected[asker.id]
    assert (bus.router.queries.count, bus.errors()) == (0, {})
