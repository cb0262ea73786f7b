"""The processes of `evbus bench` that use the asyncio client; those of `connections` always do."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from array import array
from typing import Any

import evbus
from evbus.cli.bench_check import Window
from evbus.cli.bench_spec import Link, Result, Spec, own_cost, times
from evbus.cli.bench_sync import is_over, question

__all__ = ["run"]

#: Connections that one process makes at a time: below what a server takes of strangers.
_AT_A_TIME = 32


def run(spec: Spec, link: Link) -> Result:
    """Do the work of one process."""
    return asyncio.run(_run(spec, link))


async def _run(spec: Spec, link: Link) -> Result:
    roles = {"publish": _publish, "subscribe": _subscribe, "ask": _ask, "answer": _answer}
    if spec.role == "connect":
        return await _connect(spec, link)
    problems: list[str] = []

    def on_error(error: BaseException, _message: evbus.Message | None) -> None:
        if len(problems) < 10:
            problems.append(str(error))

    async with _client(spec, on_error=on_error) as client:
        result = await roles[spec.role](spec, link, client)
    result.problems += problems
    return result


def _client(spec: Spec, **options: Any) -> evbus.AsyncEventClient:
    return evbus.AsyncEventClient(servers=[spec.url], name=f"evbus bench {spec.role}", reconnect=False, **options)


async def _publish(spec: Spec, link: Link, client: evbus.AsyncEventClient) -> Result:
    window = Window(spec.subscribers, spec.window)
    if spec.subscribers:
        await client.subscribe(f"{spec.subject}.ack", window.on_ack, type=bytes)
    source, publish, subject = spec.source(window), client.publish, spec.subject
    own_s = own_cost(spec, source=True)
    await asyncio.to_thread(link.ready)
    for body in source.warm_up(spec.warm_up):
        await publish(subject, body)
    await client.flush()
    cpu_s, began = time.process_time(), time.monotonic()
    source.begin()
    while (taken := source.take()) is not None:
        if isinstance(taken, list):
            for body in taken:
                await publish(subject, body)
            if spec.rate is not None or spec.subscribers:
                await asyncio.sleep(0)  # a publish that need not wait does not let the loop read what subscribers say
        else:
            await asyncio.sleep(taken)
        if spec.progress:
            link.progress(source.sent)
    await client.flush()
    result = Result(
        role=spec.role,
        messages=source.sent,
        seconds=time.monotonic() - began,
        cpu_s=time.process_time() - cpu_s,
        own_s=own_s * source.sent,
        late=times(source.late),
        problems=["the subscribers did not go on taking messages"] if source.gave_up else [],
    )
    await publish(subject, source.end())
    await client.flush()
    return result


async def _subscribe(spec: Spec, link: Link, client: evbus.AsyncEventClient) -> Result:
    tally, done = spec.tally(), asyncio.Event()
    own_s = own_cost(spec, source=False)
    ack_subject = f"{spec.subject}.ack"

    async def on_message(body: bytes) -> None:
        if tally.add(body):
            await client.publish(ack_subject, tally.ack(spec.number))
        elif tally.is_complete:
            done.set()

    await client.subscribe(spec.subject, on_message, type=bytes)
    await asyncio.to_thread(link.ready)
    deadline = time.monotonic() + (spec.duration or 0.0) + spec.patience
    seen = 0
    while not done.is_set() and time.monotonic() < deadline:
        try:
            await asyncio.wait_for(done.wait(), 0.1)
        except asyncio.TimeoutError:
            if tally.received > seen:
                seen, deadline = tally.received, max(deadline, time.monotonic() + spec.patience)
            if spec.progress:
                link.progress(seen)
            if client.status is not evbus.ConnectStatus.CONNECTED or link.is_told_to_stop:
                break
    tally.finish()
    result = Result(role=spec.role, own_s=own_s * tally.received)
    result.take_tally(tally)
    return result


async def _answer(spec: Spec, link: Link, client: evbus.AsyncEventClient) -> Result:
    answered = itertools.count()

    async def answer(body: bytes) -> bytes:
        next(answered)
        return body

    client.on_query(spec.subject)(answer)
    await client.flush()
    await asyncio.to_thread(link.ready)
    cpu_s, began = time.process_time(), time.monotonic()
    await asyncio.to_thread(link.line)  # the askers are done
    return Result(
        role=spec.role,
        messages=next(answered),
        seconds=time.monotonic() - began,
        cpu_s=time.process_time() - cpu_s,
    )


async def _ask(spec: Spec, link: Link, client: evbus.AsyncEventClient) -> Result:
    result, latencies = Result(role=spec.role), array("q")
    await asyncio.to_thread(link.ready)
    for _ in range(spec.warm_up):
        await client.query(spec.subject, b"w" * spec.size, bytes, timeout=spec.patience)
    cpu_s, began = time.process_time(), time.monotonic()

    async def ask_in_turn(index: int) -> None:
        for number in itertools.count(index, spec.at_once):
            due: float = time.monotonic() if spec.rate is None else began + number / spec.rate
            if is_over(spec, number, due - began):
                return
            wait = due - time.monotonic()
            if wait > 0:
                await asyncio.sleep(wait)
            body = question(spec, number)
            try:
                answer: Any = await client.query(spec.subject, body, bytes, timeout=spec.patience)
            except evbus.EvbusError as error:
                result.lost += 1
                result.problems[:] = [str(error)]
                if client.status is not evbus.ConnectStatus.CONNECTED:
                    return
                continue
            latencies.append(int((time.monotonic() - due) * 1e9))
            result.damaged += answer != body
            result.messages += 1
            if spec.progress:
                link.progress(result.messages)

    await asyncio.gather(*(ask_in_turn(index) for index in range(spec.at_once)))
    result.seconds, result.cpu_s = time.monotonic() - began, time.process_time() - cpu_s
    result.latency = times(latencies)
    return result


async def _connect(spec: Spec, link: Link) -> Result:
    """Make many connections, subscribe on each, and see that one message reaches each of them once."""
    result, latencies = Result(role=spec.role), array("q")
    clients = [_client(spec) for _ in range(spec.connections)]
    got = [0] * spec.connections
    still_without, all_have_it = set(range(spec.connections)), asyncio.Event()
    gate = asyncio.Semaphore(_AT_A_TIME)

    async def connect(client: evbus.AsyncEventClient) -> None:
        async with gate:
            began = time.monotonic_ns()
            try:
                await client.connect(spec.patience)
            except evbus.EvbusError as error:
                result.lost += 1
                result.problems[:] = [str(error)]
                return
            latencies.append(time.monotonic_ns() - began)
            result.messages += 1
            if spec.progress:
                link.progress(result.messages)

    async def subscribe(index: int) -> None:
        async def on_message(_body: bytes) -> None:
            got[index] += 1
            if got[index] == 1:
                still_without.discard(index)
                if not still_without:
                    all_have_it.set()

        async with gate:
            await clients[index].subscribe(spec.subject, on_message, type=bytes)

    await asyncio.to_thread(link.ready)
    try:
        cpu_s, began = time.process_time(), time.monotonic()
        await asyncio.gather(*map(connect, clients))
        result.seconds, result.cpu_s = time.monotonic() - began, time.process_time() - cpu_s
        result.latency = times(latencies)
        up = [index for index, client in enumerate(clients) if client.status is evbus.ConnectStatus.CONNECTED]
        still_without.intersection_update(up)
        began = time.monotonic()
        await asyncio.gather(*map(subscribe, up))
        result.more["subscribe_s"] = time.monotonic() - began
        if up:
            await clients[up[0]].publish(spec.subject, b"x" * spec.size)
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(all_have_it.wait(), spec.patience)
        # A message that came twice came before the answer to this.
        await asyncio.gather(*(clients[index].rtt(spec.patience) for index in up))
        result.lost += sum(not got[index] for index in up)
        result.repeated = sum(max(got[index] - 1, 0) for index in up)
    finally:
        await asyncio.gather(*(client.disconnect(drain=False) for client in clients))
    return result
