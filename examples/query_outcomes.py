"""Every query ends in exactly one way: an answer, or an error that says what happened."""

import threading

import evbus
from evbus import EventServer, Message, NoRespondersError, QueryTimeoutError, RemoteError

with EventServer(port=0) as server:
    url = f"evbus://{server.address}"
    with evbus.connect(url) as calculator, evbus.connect(url) as client:
        leave = threading.Event()

        @calculator.on_query("math.divide")
        def divide(numbers: list[float]) -> float:
            dividend, divisor = numbers
            return dividend / divisor

        @calculator.on_query("math.root")
        def root(message: Message) -> None:
            number = message.decode(float)
            if number < 0:
                message.fail(422, "no real root of a negative number")
            else:
                message.reply(number**0.5)

        @calculator.on_query("math.prove")
        def prove(conjecture: str) -> str:
            leave.wait()  # this may take a while
            return f"{conjecture}: proven"

        print("6 / 3 =", client.query("math.divide", [6, 3], float))
        print("root of 16 =", client.query("math.root", 16.0, float))
        try:
            client.query("math.root", -1.0, float)
        except RemoteError as error:
            print(f"the responder says no: {error.code} {error.text}")
        try:
            client.query("math.prove", "P = NP", str, timeout=0.1)
        except QueryTimeoutError as error:
            print(f"no answer within {error.timeout} s")
        try:
            client.query("maths.divide", [6, 3], float)
        except NoRespondersError as error:
            print(f"nobody answers {error.subject}")
        leave.set()
