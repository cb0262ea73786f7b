"""R36: every query has exactly one outcome, and it is its own."""

from __future__ import annotations

import asyncio
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
import reference as ref
from helpers_raw import CLIENT_FACTS, TIME_MS, RawClient
from helpers_rows import Responder, Row, summary_ms

from evbus import (
    AsyncEventClient,
    EventClient,
    EventServer,
    NoRespondersError,
    QueryTimeoutError,
    ResponderLostError,
)

ROUNDS = 50


@pytest.fixture
def server() -> Iterator[EventServer]:
    with EventServer(port=0) as running:
        yield running
        assert running.stats()["queries_pending"] == 0


@pytest.fixture
def row(record_property: Callable[[str, object], None]) -> Row:
    return Row(record_property, "R36", "queries: exactly one outcome each")


def raw(server: EventServer, client_id: str = "") -> RawClient:
    client = RawClient("127.0.0.1", server.port)
    if not client_id:
        client.handshake()
        return client
    fields = {"TaskId": "h", "AuthenticationToken": "", "ClientId": client_id, "Announcement": CLIENT_FACTS}
    client.send_bytes(ref.encode(ref.EVBUS_2, ref.HANDSHAKE, fields, time=TIME_MS))
    assert client.read().fields["Status"] == ref.SUCCESS
    return client


def respond(client: RawClient, subject: str) -> None:
    client.send(ref.SUBSCRIBE, version=2, TaskId="s", Subject=subject, SubscriptionId=1, Role=ref.RESPONDER)
    assert client.read().fields["Status"] == ref.SUCCESS


def answer(client: RawClient, subject: str, number: str, data: bytes, task_id: str = "") -> None:
    client.send(ref.PUBLISH, version=2, TaskId=task_id, Subject=subject, QueryTaskId=number, Buffer=data, Codec=2)


def test_one_of_three_responders_is_asked(server: EventServer, row: Row) -> None:
    calls: Counter[int] = Counter()
    shares: Counter[int] = Counter()
    responders = [EventClient(port=server.port).connect() for _ in range(3)]
    for index, client in enumerate(responders):

        def handle(number: int, index: int = index) -> int:
            calls[number] += 1
            shares[index] += 1
            return number

        client.on_query("q")(handle)
    with EventClient(port=server.port) as asker:
        assert all(asker.query("q", number, int) == number for number in range(3000))
    for client in responders:
        client.disconnect()
    assert calls == Counter(range(3000))
    assert sorted(shares.values()) == [1000, 1000, 1000]
    row.measured(f"3 responders: 3000 queries, {sum(calls.values())} calls, shares {dict(shares)}")


def test_no_responder_is_told_within_50_ms(server: EventServer, row: Row) -> None:
    took = []
    with EventClient(port=server.port) as client:
        for _ in range(ROUNDS):
            at = time.perf_counter()
            with pytest.raises(NoRespondersError):
                client.query("nobody", timeout=30)
            took.append(time.perf_counter() - at)
    row.measured(f"NO_RESPONDER: {summary_ms(took)} (<= 50 ms)")
    assert statistics.median(took) <= 0.05


def test_a_responder_that_dies_is_told_within_100_ms(server: EventServer, row: Row) -> None:
    took = []
    with EventClient(port=server.port) as client:
        outcomes: list[BaseException] = []
        ended = threading.Semaphore(0)

        def ask() -> None:
            try:
                client.query("q", timeout=30)
            except Exception as exc:
                outcomes.append(exc)
            took[-1] = time.perf_counter() - took[-1]
            ended.release()

        for index in range(20):
            if index:
                responder = raw(server)
                respond(responder, "q")
                thread = threading.Thread(target=ask)
                took.append(0.0)
                thread.start()
                assert responder.read().fields["Flags"] & ref.IS_QUERY
                took[-1] = time.perf_counter()
                responder.reset()
            else:
                process = Responder(server.port, "q")
                thread = threading.Thread(target=ask)
                took.append(0.0)
                thread.start()
                assert process.line() == "asked\n"
                took[-1] = time.perf_counter()
                process.kill()
            assert ended.acquire(timeout=10)
            thread.join()
        assert [type(outcome) for outcome in outcomes] == [ResponderLostError] * 20
        assert client.stats().pending_queries == 0
    row.measured(f"RESPONDER_GONE, once by SIGKILL: {summary_ms(took)} (<= 100 ms)")
    assert statistics.median(took) <= 0.1


def test_a_late_answer_is_dropped(server: EventServer, row: Row) -> None:
    with raw(server) as responder, EventClient(port=server.port) as client:
        respond(responder, "q")
        late: list[str] = []
        for index in range(ROUNDS):
            with pytest.raises(QueryTimeoutError):
                client.query("q", timeout=0.005)
            late.append(next(p for p in iter(responder.read, None) if p.object_id == ref.DELIVERY).fields["TaskId"])
            for number in late:  # this one is too late, and the ones before are so once more
                answer(responder, "q", number, b"late")
            got: list[str] = []
            asking = threading.Thread(target=lambda got=got: got.append(client.query("q", None, str)))
            asking.start()
            packet = next(p for p in iter(responder.read, None) if p.object_id == ref.DELIVERY)
            answer(responder, "q", packet.fields["TaskId"], b"answer %d" % index)
            asking.join()
            assert got == [f"answer {index}"]
        refused = server.stats()["errors"]
        assert isinstance(refused, dict)
        row.measured(f"late answers: {ROUNDS} queries, each answered right; the server counted {refused}")
        assert refused["unknown_query"] >= ROUNDS


def test_foreign_and_guessed_answers_are_rejected(server: EventServer, row: Row) -> None:
    with raw(server) as responder, raw(server) as foreigner, EventClient(port=server.port) as client:
        respond(responder, "q")
        for index in range(ROUNDS):
            got: list[str] = []
            asking = threading.Thread(target=lambda got=got: got.append(client.query("q", None, str)))
            asking.start()
            number = responder.read().fields["TaskId"]
            guesses = [number, f"evbus-{index}", str(index), number[:-1], number + "0"]
            for guess in guesses:
                answer(foreigner, "q", guess, b"forged", task_id="t")
                refusal = foreigner.read()
                assert (refusal.object_id, refusal.fields["Code"]) == (ref.ERROR, ref.ERRORS["UNKNOWN_QUERY"])
            answer(responder, "q", number, b"true")
            asking.join()
            assert got == ["true"]
        assert client.stats().late_answers == 0
    row.measured(f"foreign and guessed ids: {ROUNDS * 5} forged answers, 0 taken")


def test_two_clients_of_one_name_do_not_meet(server: EventServer, row: Row) -> None:
    name = "0" * 32
    with raw(server, name) as one, raw(server, name) as two, EventClient(port=server.port) as responder:
        responder.on_query("q")(lambda message: message.data.decode())
        for index in range(ROUNDS):
            for client, mark in ((one, b"one"), (two, b"two")):
                client.send(ref.QUERY, version=2, TaskId=f"same-{index}", Subject="q", Buffer=mark, Codec=2)
            for client, mark in ((one, b"one"), (two, b"two")):
                packet = client.read()
                assert (packet.object_id, packet.fields["TaskId"]) == (ref.DELIVERY, f"same-{index}"), packet
                assert packet.fields["Buffer"] == mark
    row.measured(f"same client id and same query ids from two clients: {ROUNDS} pairs, 0 crossed")


@pytest.mark.parametrize("queries", [10_000, pytest.param(100_000, marks=pytest.mark.full)], ids=["10,000", "100,000"])
def test_many_queries_from_asyncio(server: EventServer, row: Row, queries: int) -> None:
    wrong = 0

    async def main() -> None:
        async with AsyncEventClient(port=server.port) as responder, AsyncEventClient(port=server.port) as client:
            responder.on_query("echo", type=int)(lambda number: number)
            await responder.flush()
            numbers = iter(range(queries))

            async def ask() -> None:
                nonlocal wrong
                for number in numbers:
                    wrong += await client.query("echo", number, int, timeout=30) != number

            await asyncio.gather(*(ask() for _ in range(64)))
            assert client.stats().pending_queries == 0

    at = time.perf_counter()
    asyncio.run(main())
    row.measured(f"asyncio, 64 at once: {queries} queries, {wrong} mismatches, {time.perf_counter() - at:.1f} s")
    assert wrong == 0


@pytest.mark.parametrize("queries", [5_000, pytest.param(100_000, marks=pytest.mark.full)], ids=["5,000", "100,000"])
def test_many_queries_from_threads(server: EventServer, row: Row, queries: int) -> None:
    wrong: list[int] = []
    with EventClient(port=server.port) as responder, EventClient(port=server.port) as client:
        responder.on_query("echo", type=int, concurrency=4)(lambda number: number)

        def ask(first: int) -> None:
            wrong.extend(
                number
                for number in range(first, queries, 64)
                if client.query("echo", number, int, timeout=30) != number
            )

        threads = [threading.Thread(target=ask, args=(first,)) for first in range(64)]
        at = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        took = time.perf_counter() - at
        assert client.stats().pending_queries == 0
        assert client.stats().received == queries
    row.measured(f"64 threads: {queries} queries, {len(wrong)} mismatches, {took:.1f} s")
    assert wrong == []
