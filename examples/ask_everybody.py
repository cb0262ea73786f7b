"""A query to all responders: one reply of each, failures included, and an end that is not a timer."""

import evbus
from evbus import EventServer, Message

with EventServer(port=0) as server:
    url = f"evbus://{server.address}"
    with evbus.connect(url) as first, evbus.connect(url) as second, evbus.connect(url) as boss:

        @first.on_query("worker.load")
        def load(_message: Message) -> int:
            return 3

        @second.on_query("worker.load")
        def fail(message: Message) -> None:
            message.fail(503, "out of order")

        outcomes: list[str] = []
        for reply in boss.query_all("worker.load", response=int, timeout=10):
            if reply.error is None:
                outcomes.append(f"load {reply.value}")
            else:
                outcomes.append(f"no load: {reply.error}")
        for line in sorted(outcomes):  # the replies come in any order
            print(line)
