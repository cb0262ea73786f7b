"""A program that is server and client at once: nothing else has to be started."""

from dataclasses import dataclass

import evbus
from evbus import EventServer


@dataclass
class Reading:
    sensor: str
    celsius: float


with EventServer(port=0) as server, evbus.connect(f"evbus://{server.address}") as client:
    # Without a handler, a subscription is an iterator of messages.
    with client.subscribe("reading.*") as readings:
        client.publish("reading.roof", Reading("roof", 21.5))
        client.publish("reading.cellar", Reading("cellar", 12.0))
        for _ in range(2):
            message = next(readings)
            print(f"{message.subject}: {message.decode(Reading).celsius} degrees")
    print(f"{server.stats()['delivered']} messages delivered")
