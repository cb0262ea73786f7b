"""Workers share the jobs of one subject: each job goes to one member of the group, and to every plain subscriber."""

import threading
from dataclasses import dataclass

import evbus
from evbus import EventServer

JOBS = 6


@dataclass
class Job:
    number: int


done: dict[str, list[int]] = {"worker 1": [], "worker 2": []}
seen: list[int] = []
all_done = threading.Semaphore(0)

with EventServer(port=0) as server:
    url = f"evbus://{server.address}"
    with evbus.connect(url) as first, evbus.connect(url) as second, evbus.connect(url) as boss:

        def work(name: str, job: Job) -> None:
            done[name].append(job.number)
            all_done.release()

        # The type can be given where the handler does not tell it.
        first.subscribe("job", lambda job: work("worker 1", job), type=Job, group="workers")
        second.subscribe("job", lambda job: work("worker 2", job), type=Job, group="workers")

        @boss.on("job")
        def log(job: Job) -> None:
            seen.append(job.number)
            all_done.release()

        for number in range(JOBS):
            boss.publish("job", Job(number))
        for _ in range(2 * JOBS):
            all_done.acquire()

for name, jobs in done.items():
    print(f"{name} did {sorted(jobs)}")
print(f"the boss saw {seen}")
