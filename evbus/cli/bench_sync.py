"""The processes of `evbus bench` that use the synchronous client."""

from __future__ import annotations

import itertools
import threading
import time
from array import array
from typing import Any

import evbus
from evbus.cli.bench_check import Window
from evbus.cli.bench_spec import Link, Result, Spec, own_cost, times

__all__ = ["run"]


def run(spec: Spec, link: Link) -> Result:
    """Do the work of one process."""
    roles = {"publish": _publish, "subscribe": _subscribe, "ask": _ask, "answer": _answer}
    problems: list[str] = []

    def on_error(error: BaseException, _message: evbus.Message | None) -> None:
        if len(problems) < 10:
            problems.append(str(error))

    with evbus.connect(spec.url, name=f"evbus bench {spec.role}", reconnect=False, on_error=on_error) as client:
        result = roles[spec.role](spec, link, client)
    result.problems += problems
    return result


def _publish(spec: Spec, link: Link, client: evbus.EventClient) -> Result:
    window = Window(spec.subscribers, spec.window)
    if spec.subscribers:
        client.subscribe(f"{spec.subject}.ack", window.on_ack, type=bytes)
    source, publish, subject = spec.source(window), client.publish, spec.subject
    own_s = own_cost(spec, source=True)
    link.ready()
    for body in source.warm_up(spec.warm_up):
        publish(subject, body)
    client.flush()
    cpu_s, began = time.process_time(), time.monotonic()
    source.begin()
    while (taken := source.take()) is not None:
        if isinstance(taken, list):
            for body in taken:
                publish(subject, body)
        else:
            time.sleep(taken)
        if spec.progress:
            link.progress(source.sent)
    client.flush()
    result = Result(
        role=spec.role,
        messages=source.sent,
        seconds=time.monotonic() - began,
        cpu_s=time.process_time() - cpu_s,
        own_s=own_s * source.sent,
        late=times(source.late),
        problems=["the subscribers did not go on taking messages"] if source.gave_up else [],
    )
    publish(subject, source.end())
    client.flush()
    return result


def _subscribe(spec: Spec, link: Link, client: evbus.EventClient) -> Result:
    tally, done = spec.tally(), threading.Event()
    own_s = own_cost(spec, source=False)
    ack_subject = f"{spec.subject}.ack"

    def on_message(body: bytes) -> None:
        if tally.add(body):
            client.publish(ack_subject, tally.ack(spec.number))
        elif tally.is_complete:
            done.set()

    client.subscribe(spec.subject, on_message, type=bytes)
    link.ready()
    deadline = time.monotonic() + (spec.duration or 0.0) + spec.patience
    seen = 0
    while not done.wait(0.1) and time.monotonic() < deadline:
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


def _answer(spec: Spec, link: Link, client: evbus.EventClient) -> Result:
    answered = itertools.count()

    @client.on_query(spec.subject)
    def answer(body: bytes) -> bytes:
        next(answered)
        return body

    link.ready()
    cpu_s, began = time.process_time(), time.monotonic()
    link.line()  # the askers are done
    return Result(
        role=spec.role,
        messages=next(answered),
        seconds=time.monotonic() - began,
        cpu_s=time.process_time() - cpu_s,
    )


class _Asking:
    """What the threads of one asker share."""

    def __init__(self, result: Result) -> None:
        self.result = result
        self.lock = threading.Lock()
        self.latencies = array("q")
        self.asked = 0


def _ask(spec: Spec, link: Link, client: evbus.EventClient) -> Result:
    result = Result(role=spec.role)
    asking = _Asking(result)
    link.ready()
    body = b"w" * spec.size
    for _ in range(spec.warm_up):
        client.query(spec.subject, body, bytes, timeout=spec.patience)
    cpu_s, began = time.process_time(), time.monotonic()
    threads = [
        threading.Thread(target=_ask_in_turn, args=(spec, client, asking, index, began))
        for index in range(spec.at_once)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.1)
            if spec.progress:
                link.progress(asking.asked)
    result.seconds, result.cpu_s = time.monotonic() - began, time.process_time() - cpu_s
    result.latency = times(asking.latencies)
    return result


def _ask_in_turn(spec: Spec, client: evbus.EventClient, asking: _Asking, index: int, began: float) -> None:
    """One thread: the queries index, index + at_once, ...; each at its time, if there is a rate."""
    latencies, result = array("q"), asking.result
    problem, lost, damaged, asked = "", 0, 0, 0
    for number in itertools.count(index, spec.at_once):
        due: float = time.monotonic() if spec.rate is None else began + number / spec.rate
        if is_over(spec, number, due - began):
            break
        wait = due - time.monotonic()
        if wait > 0:
            time.sleep(wait)
        body = question(spec, number)
        try:
            answer: Any = client.query(spec.subject, body, bytes, timeout=spec.patience)
        except evbus.EvbusError as error:
            lost += 1
            problem = str(error)
            if client.status is not evbus.ConnectStatus.CONNECTED:
                break
            continue
        latencies.append(int((time.monotonic() - due) * 1e9))
        damaged += answer != body
        asked += 1
        asking.asked += 1  # for the progress only: a lost update does not matter
    with asking.lock:
        asking.latencies.extend(latencies)
        result.messages += asked
        result.lost += lost
        result.damaged += damaged
        if problem:
            result.problems.append(problem)


def is_over(spec: Spec, number: int, passed: float) -> bool:
    """Whether query `number`, due `passed` seconds after the first, is not asked any more."""
    return (spec.count is not None and number >= spec.count) or (spec.duration is not None and passed >= spec.duration)


def question(spec: Spec, number: int) -> bytes:
    """The body of a query: no two of one bench are the same."""
    return (spec.number << 64 | number).to_bytes(16, "big").ljust(spec.size, b"?")
