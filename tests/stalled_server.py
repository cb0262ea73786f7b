"""R44 as a program, so that any Python can run it: publishes 64 MiB to a server that stops reading, and prints as JSON
what the client kept. Needs evbus and nothing else.
"""

from __future__ import annotations

import asyncio
import json
import platform
import resource
import socket
import struct
import sys
import threading
from pathlib import Path

import evbus

TOTAL_BYTES = 64 << 20


def receive(sock: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = sock.recv(size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def packet(object_id: int, body: bytes) -> bytes:
    return struct.pack("<iqHBq", 23 + len(body), 0, object_id, 1, 0) + body


def text(value: bytes) -> bytes:
    size, length = len(value), b""
    while True:
        length += bytes([size & 0x7F | (0x80 if size > 0x7F else 0)])
        size >>= 7
        if not size:
            return length + value


def serve(listener: socket.socket, end: threading.Event) -> None:
    """Shake hands, answer the first heartbeat, and read no more."""
    sock, _ = listener.accept()
    with sock:
        for _ in range(2):
            size, _, object_id, _, _ = struct.unpack("<iqHBq", receive(sock, 23))
            body = receive(sock, size - 23)
            if object_id == 1:
                length = body[0]
                answer = text(body[1 : 1 + length]) + b"\x01" + text(b'evbus/1 {"version":2}')
                sock.sendall(packet(254, answer))
            else:
                sock.sendall(packet(199, body))
        end.wait()


def publish_plain(port: int, size: int) -> dict[str, int]:
    """Publish without waiting, until all is sent or refused."""
    client = evbus.EventClient("127.0.0.1", port, heartbeat=600.0).connect()
    payload, kept, taken, refused = b"x" * size, 0, 0, 0
    for _ in range(TOTAL_BYTES // size):
        try:
            client.publish("big", payload, timeout=0)
            taken += size
        except evbus.BufferFullError:
            refused += size
        kept = max(kept, client.stats().pending_bytes)
    client.disconnect(drain=False)
    return {"kept": kept, "taken": taken, "refused": refused}


async def publish_asyncio(port: int, size: int) -> dict[str, int]:
    """Publish as fast as the client lets us, for as long as it does: one publish that waits means that it is full."""
    client = await evbus.AsyncEventClient("127.0.0.1", port, heartbeat=600.0).connect()
    payload, kept, taken, refused = b"x" * size, 0, 0, 0
    for _ in range(TOTAL_BYTES // size):
        try:
            await client.publish("big", payload, timeout=0)
            taken += size
        except evbus.BufferFullError:
            refused += size
            await asyncio.sleep(0)
        kept = max(kept, client.stats().pending_bytes)
    await client.disconnect(drain=False)
    return {"kept": kept, "taken": taken, "refused": refused}


def peak_bytes() -> int:
    """The most memory that this process has had so far."""
    try:
        # Not ru_maxrss, which on Linux begins with what the parent had.
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    found: dict[str, object] = {"python": platform.python_version(), "limit": evbus.ClientLimits().buffer_bytes}
    for name in ("plain", "asyncio"):
        for size in (1 << 20, 1 << 10):
            end = threading.Event()
            with socket.create_server(("127.0.0.1", 0)) as listener:
                thread = threading.Thread(target=serve, args=(listener, end))
                thread.start()
                port = listener.getsockname()[1]
                before = peak_bytes()
                figures = publish_plain(port, size) if name == "plain" else asyncio.run(publish_asyncio(port, size))
                grown = peak_bytes() - before
                end.set()
                thread.join()
            found[f"{name}, {size} B"] = figures | {"grown": grown}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
