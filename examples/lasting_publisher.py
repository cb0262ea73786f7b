"""A publisher that goes on while the server restarts: what it publishes meanwhile is kept, and sent first."""

import logging
import queue
import tempfile
from pathlib import Path

import evbus
from evbus import ConnectStatus, EventServer, Reconnect

logging.getLogger("evbus").setLevel(logging.ERROR)  # the loss is expected here

with tempfile.TemporaryDirectory() as directory:
    path = Path(directory) / "bus.sock"
    statuses: queue.SimpleQueue[ConnectStatus] = queue.SimpleQueue()
    patience = Reconnect(first_delay_s=0.05, min_delay_s=0.05, max_delay_s=0.1, buffer_bytes=1024 * 1024)
    server = EventServer(None, unix=path).start()
    with evbus.connect(f"unix://{path}", reconnect=patience, on_status=statuses.put) as client:
        readings = client.subscribe("reading", on_gap=lambda gap: print("missed:", gap.count, gap.reason))
        client.publish("reading", 1)
        print("got", readings.next(timeout=30).decode(int))

        server.stop()
        while statuses.get(timeout=30) is not ConnectStatus.RECONNECTING:
            pass
        client.publish("reading", 2)  # there is no server

        with EventServer(None, unix=path):
            client.wait_connected(timeout=30)
            print("got", readings.next(timeout=30).decode(int))
            client.disconnect()
