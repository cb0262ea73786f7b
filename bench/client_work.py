"""One process of the clients' bench: `python -m bench.client_work LIBRARY ROLE PORT MESSAGES AT_ONCE`.

Says "ready" on standard output when it is, reads a line before it begins, and prints one JSON object at the end. Each
message carries its number; a receiver fails on the first that is not the next one. What a library needs is imported by
its own class only.
"""

from __future__ import annotations

import abc
import asyncio
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

SIZE = 128
SUBJECT = "bench.clients"


def payload(number: int) -> bytes:
    """Message `number`."""
    return number.to_bytes(8, "big") + bytes(SIZE - 8)


class Meter:
    """Processor time and seconds of this process, from `begin` to `end`."""

    def begin(self) -> None:
        self._cpu, self._at = time.process_time(), time.perf_counter()

    def end(self) -> None:
        self.cpu_s, self.seconds = time.process_time() - self._cpu, time.perf_counter() - self._at


class Receiving(Meter):
    """Checks the order of what comes; measures from the first message to the last."""

    def __init__(self, count: int, done: Callable[[], object]) -> None:
        self.count, self.seen, self.problem, self._done = count, 0, "", done

    def take(self, data: bytes) -> None:
        if int.from_bytes(data[:8], "big") != self.seen:
            self.problem = f"message {int.from_bytes(data[:8], 'big')} came where {self.seen} was due"
        if self.seen == 0:
            self.begin()
        self.seen += 1
        if self.seen == self.count or self.problem:
            self.end()
            self._done()


def ready() -> None:
    """Tell the parent, and wait for its word."""
    print("ready", flush=True)
    sys.stdin.readline()


def report(meter: Meter, count: int, latencies: list[float] | None = None, problem: str = "") -> dict[str, Any]:
    found = {"count": count, "cpu_s": meter.cpu_s, "seconds": meter.seconds, "problem": problem}
    if latencies:
        found["p50_us"] = sorted(latencies)[len(latencies) // 2] * 1e6
    return found


class EvbusSync:
    """The synchronous client; queries of many at once come from as many threads."""

    def publish(self, port: int, count: int) -> dict[str, Any]:
        import evbus

        with evbus.connect(f"evbus://127.0.0.1:{port}") as bus:
            bodies, meter = [payload(i) for i in range(count)], Meter()
            ready()
            meter.begin()
            for body in bodies:
                bus.publish(SUBJECT, body)
            bus.flush()
            meter.end()
        return report(meter, count)

    def receive(self, port: int, count: int) -> dict[str, Any]:
        import evbus

        done = threading.Event()
        got = Receiving(count, done.set)
        with evbus.connect(f"evbus://127.0.0.1:{port}") as bus:
            bus.subscribe(SUBJECT, got.take, type=bytes)
            ready()
            if not done.wait(60):
                return {"problem": f"{got.seen} of {count} came"}
        return report(got, count, problem=got.problem)

    def answer(self, port: int, count: int) -> dict[str, Any]:
        import evbus

        with evbus.connect(f"evbus://127.0.0.1:{port}") as bus:
            bus.on_query(SUBJECT, type=bytes)(lambda body: body)
            bus.flush()
            ready()
            sys.stdin.readline()
        return {"problem": "", "count": count}

    def query(self, port: int, count: int, at_once: int) -> dict[str, Any]:
        import evbus

        latencies: list[float] = []
        wrong: list[str] = []
        meter = Meter()

        def ask(worker: int) -> None:
            for number in range(worker, count, at_once):
                began = time.perf_counter()
                if bus.query(SUBJECT, payload(number), bytes, timeout=10) != payload(number):
                    wrong.append(f"query {number} got another's answer")
                latencies.append(time.perf_counter() - began)

        with evbus.connect(f"evbus://127.0.0.1:{port}") as bus:
            ready()
            meter.begin()
            threads = [threading.Thread(target=ask, args=(worker,)) for worker in range(at_once)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            meter.end()
        return report(meter, len(latencies), latencies, "; ".join(wrong[:3]))


class _Asyncio(abc.ABC):
    """A library for asyncio: its verbs are coroutines."""

    @abc.abstractmethod
    async def open(self, port: int) -> Any: ...

    @abc.abstractmethod
    async def subscribe(self, bus: Any, got: Receiving) -> None: ...

    @abc.abstractmethod
    async def respond(self, bus: Any) -> None: ...

    @abc.abstractmethod
    async def ask(self, bus: Any, body: bytes) -> bytes: ...

    @abc.abstractmethod
    async def close(self, bus: Any) -> None: ...

    def publish(self, port: int, count: int) -> dict[str, Any]:
        async def main() -> dict[str, Any]:
            bus, meter = await self.open(port), Meter()
            bodies = [payload(i) for i in range(count)]
            ready()
            meter.begin()
            for body in bodies:
                await bus.publish(SUBJECT, body)
            await bus.flush()
            meter.end()
            await self.close(bus)
            return report(meter, count)

        return asyncio.run(main())

    def receive(self, port: int, count: int) -> dict[str, Any]:
        async def main() -> dict[str, Any]:
            bus, done = await self.open(port), asyncio.Event()
            got = Receiving(count, done.set)
            await self.subscribe(bus, got)
            await bus.flush()
            await asyncio.to_thread(ready)
            try:
                await asyncio.wait_for(done.wait(), 60)
            except asyncio.TimeoutError:
                return {"problem": f"{got.seen} of {count} came"}
            await self.close(bus)
            return report(got, count, problem=got.problem)

        return asyncio.run(main())

    def answer(self, port: int, count: int) -> dict[str, Any]:
        async def main() -> dict[str, Any]:
            bus = await self.open(port)
            await self.respond(bus)
            await bus.flush()
            await asyncio.to_thread(ready)
            await asyncio.to_thread(sys.stdin.readline)
            await self.close(bus)
            return {"problem": "", "count": count}

        return asyncio.run(main())

    def query(self, port: int, count: int, at_once: int) -> dict[str, Any]:
        async def main() -> dict[str, Any]:
            bus, meter = await self.open(port), Meter()
            latencies: list[float] = []
            wrong: list[str] = []

            async def ask(worker: int) -> None:
                for number in range(worker, count, at_once):
                    began = time.perf_counter()
                    if await self.ask(bus, payload(number)) != payload(number):
                        wrong.append(f"query {number} got another's answer")
                    latencies.append(time.perf_counter() - began)

            ready()
            meter.begin()
            await asyncio.gather(*map(ask, range(at_once)))
            meter.end()
            await self.close(bus)
            return report(meter, len(latencies), latencies, "; ".join(wrong[:3]))

        return asyncio.run(main())


class EvbusAsync(_Asyncio):
    """The asyncio client."""

    async def open(self, port: int) -> Any:
        import evbus

        return await evbus.AsyncEventClient("127.0.0.1", port).connect()

    async def subscribe(self, bus: Any, got: Receiving) -> None:
        async def take(body: bytes) -> None:
            got.take(body)

        await bus.subscribe(SUBJECT, take, type=bytes)

    async def respond(self, bus: Any) -> None:
        async def answer(body: bytes) -> bytes:
            return body

        await bus.subscribe(SUBJECT, answer, type=bytes)

    async def ask(self, bus: Any, body: bytes) -> bytes:
        answer: bytes = await bus.query(SUBJECT, body, bytes, timeout=10)
        return answer

    async def close(self, bus: Any) -> None:
        await bus.disconnect()


class NatsPy(_Asyncio):
    """nats-py, without limits on what may wait for a handler."""

    async def open(self, port: int) -> Any:
        import nats

        return await nats.connect(f"nats://127.0.0.1:{port}")

    async def subscribe(self, bus: Any, got: Receiving) -> None:
        async def take(message: Any) -> None:
            got.take(message.data)

        await bus.subscribe(SUBJECT, cb=take, pending_msgs_limit=-1, pending_bytes_limit=-1)

    async def respond(self, bus: Any) -> None:
        async def answer(message: Any) -> None:
            await message.respond(message.data)

        await bus.subscribe(SUBJECT, cb=answer)

    async def ask(self, bus: Any, body: bytes) -> bytes:
        answer: bytes = (await bus.request(SUBJECT, body, timeout=10)).data
        return answer

    async def close(self, bus: Any) -> None:
        await bus.close()


class RedisPy:
    """Publishes in pipelines of 500, its fast way."""

    def publish(self, port: int, count: int) -> dict[str, Any]:
        import redis

        client, meter = redis.Redis(port=port), Meter()
        bodies = [payload(i) for i in range(count)]
        client.ping()
        ready()
        meter.begin()
        for at in range(0, count, 500):
            pipe = client.pipeline(transaction=False)
            for body in bodies[at : at + 500]:
                pipe.publish(SUBJECT, body)
            pipe.execute()
        meter.end()
        return report(meter, count)

    def receive(self, port: int, count: int) -> dict[str, Any]:
        import redis

        client: Any = redis.Redis(port=port)
        subscription = client.pubsub()
        subscription.subscribe(SUBJECT)
        subscription.get_message(timeout=5)
        over: list[bool] = []
        got = Receiving(count, lambda: over.append(True))
        ready()
        for message in subscription.listen():
            got.take(message["data"])
            if over:
                break
        return report(got, count, problem=got.problem)


class PyZmq:
    """PUB and SUB through a proxy of its own, XSUB on `port` and XPUB on `port` + 1, without high-water marks."""

    def publish(self, port: int, count: int) -> dict[str, Any]:
        import zmq

        context = zmq.Context()
        sock, watch, meter = context.socket(zmq.XPUB), SUBJECT.encode(), Meter()
        sock.set_hwm(0)
        sock.connect(f"tcp://127.0.0.1:{port}")
        bodies = [payload(i) for i in range(count)]
        # XPUB is PUB that says when a subscription has come: without one everything is thrown away.
        if not sock.poll(10_000):
            return {"problem": "no subscription came"}
        sock.recv()
        ready()
        meter.begin()
        for body in bodies:
            sock.send_multipart([watch, body])
        sock.close(linger=30_000)
        context.term()
        meter.end()
        return report(meter, count)

    def receive(self, port: int, count: int) -> dict[str, Any]:
        import zmq

        sock = zmq.Context().socket(zmq.SUB)
        sock.set_hwm(0)
        sock.connect(f"tcp://127.0.0.1:{port + 1}")
        sock.subscribe(SUBJECT.encode())
        over: list[bool] = []
        got = Receiving(count, lambda: over.append(True))
        ready()
        while not over:
            if not sock.poll(30_000):
                return {"problem": f"{got.seen} of {count} came"}
            while not over:
                try:
                    got.take(sock.recv_multipart(zmq.NOBLOCK)[1])
                except zmq.Again:
                    break
        return report(got, count, problem=got.problem)


LIBRARIES: dict[str, type] = {
    "nats-py": NatsPy,
    "redis-py": RedisPy,
    "pyzmq": PyZmq,
    "evbus-sync": EvbusSync,
    "evbus-async": EvbusAsync,
}


def proxy() -> None:
    """The proxy of libzmq, until it is ended."""
    import zmq

    context = zmq.Context()
    front, back = context.socket(zmq.XSUB), context.socket(zmq.XPUB)
    for sock in (front, back):
        sock.set_hwm(0)
    for _ in range(50):
        port = front.bind_to_random_port("tcp://127.0.0.1")
        try:
            back.bind(f"tcp://127.0.0.1:{port + 1}")
        except zmq.ZMQError:
            front.unbind(f"tcp://127.0.0.1:{port}")
            continue
        print(f"listening on 127.0.0.1:{port}", flush=True)
        zmq.proxy(front, back)


def main() -> None:
    if sys.argv[1] == "proxy":
        proxy()
        return
    library, role, port, count, at_once = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), int(sys.argv[5])
    work = LIBRARIES[library]()
    more = (at_once,) if role == "query" else ()
    try:
        found = getattr(work, role)(port, count, *more)
    except Exception as error:  # noqa: BLE001  # a library may raise anything, and the parent tells it
        found = {"problem": f"{type(error).__name__}: {error}"}
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
