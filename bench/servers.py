"""Mining through many servers, some of them dead or mad: what comes of their time, and what it takes here.

    python bench/servers.py [--prompts 100000] [--servers 8] [--seconds 0.5] [--parallel 16] [--kill]

Loopback servers answer each request after some seconds. Three of them die along the way and one answers garbage. Ideal
are the answers that the sound ones could have given in the time that `buleyean mine` was up, each with all its
places taken. With --kill the command is killed half way, and asked again: nothing that had come is asked for twice,
and every prompt has one record.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DEAD, MAD = 3, 1
WORDS = " ".join(f"word{number}" for number in range(40))
LENGTH = re.compile(rb"content-length: *(\d+)", re.IGNORECASE)


def serve(ports: Connection, servers: int, seconds: float) -> None:
    """Servers in a process: the first die when told, the next is mad; tells how often each has answered when asked."""
    answered = [0] * servers
    asked: list[int] = []
    listening: list[asyncio.Server] = []
    connected: list[set[asyncio.StreamWriter]] = [set() for _ in range(servers)]

    async def handle(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connected[number].add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                match = LENGTH.search(head)
                body = await reader.readexactly(int(match[1])) if match else b""
                await asyncio.sleep(seconds)
                if DEAD <= number < DEAD + MAD:
                    content = b"<html>Bad gateway</html>"
                elif not body:
                    content = b'{"data": [{"id": "model"}]}'
                else:
                    prompt = json.loads(body)["messages"][-1]["content"]
                    asked.append(int(prompt.split()[-1]))
                    answered[number] += 1
                    message = {"role": "assistant", "content": f"{prompt}: {WORDS}"}
                    choice = {"message": message, "finish_reason": "stop"}
                    content = json.dumps({"choices": [choice], "usage": {"completion_tokens": 60}}).encode()
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(content), content))
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def main() -> None:
        for number in range(servers):

            async def accept(reader: Any, writer: Any, number: int = number) -> None:
                await handle(number, reader, writer)

            listening.append(await asyncio.start_server(accept, "127.0.0.1", 0))
        ports.send([server.sockets[0].getsockname()[1] for server in listening])
        loop = asyncio.get_running_loop()
        while (order := await loop.run_in_executor(None, ports.recv)) != "end":
            if order == "count":
                ports.send((list(answered), len(asked), len(asked) - len(set(asked))))
            else:
                listening[order].close()
                for writer in connected[order]:
                    writer.transport.abort()

    asyncio.run(main())


def mine(folder: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "buleyean_rl.cli", "mine", str(folder / "prompts.txt")]
    command += ["--model", str(folder / "servers.txt"), "-o", str(folder / "records.jsonl"), "--json"]
    command += ["--judge", "regex:word7 "]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=(folder / "log").open("ab"))


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.Process(target=serve, args=(there, arguments.servers, arguments.seconds), daemon=True)
    process.start()
    ports = here.recv()
    lines = (f"http://127.0.0.1:{port}/v1#model parallel={arguments.parallel}\n" for port in ports)
    (folder / "servers.txt").write_text("".join(lines))
    (folder / "prompts.txt").write_text("".join(f"Write number {k}\n" for k in range(arguments.prompts)))
    sound = arguments.servers - DEAD - MAD
    rate = arguments.parallel / arguments.seconds  # answers a second of one server

    def count() -> tuple[list[int], int, int]:
        here.send("count")
        answers: tuple[list[int], int, int] = here.recv()
        return answers

    def wait_for(share: float, running: subprocess.Popen[bytes]) -> None:
        while count()[1] < share * arguments.prompts and running.poll() is None:
            time.sleep(0.2)

    died, killed = [], 0
    running = mine(folder)
    while not count()[1]:
        time.sleep(0.02)
    started = time.monotonic()
    for number in range(DEAD):
        wait_for(0.1 * (number + 1), running)
        here.send(number)
        died.append(time.monotonic() - started)
    if arguments.kill:
        wait_for(0.5, running)
        killed = count()[1]
        running.send_signal(signal.SIGKILL)
        running.wait()
        held = sum(b'"answer"' in line for line in (folder / "records.mined.jsonl").read_bytes().splitlines())
        running = mine(folder)
    wait_for(1.0, running)
    seconds = time.monotonic() - started
    out, _ = running.communicate()
    report = json.loads(out)
    _, asked, twice = count()
    records = sum(1 for _ in (folder / "records.jsonl").open())
    here.send("end")
    process.join()
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    ideal = rate * (sound * seconds + sum(died))
    return {
        "prompts": arguments.prompts,
        "records": records,
        "seconds": seconds,
        "answers_per_s": arguments.prompts / seconds,
        "of_the_ideal": arguments.prompts / ideal,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "asked": asked,
        "asked_twice": twice,
        **({"lost_by_the_kill": killed - held} if arguments.kill else {}),
        "servers": report["servers"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--servers", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=0.5, help="that an answer takes")
    parser.add_argument("--parallel", type=int, default=16, help="requests at once at each server")
    parser.add_argument("--kill", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), arguments), indent=1))


if __name__ == "__main__":
    main()
