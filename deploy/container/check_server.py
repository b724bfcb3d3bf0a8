"""Asks a running container for what it promises, then stops it. Standard library only.

Without --drain: ready, healthy, a picture of the right size, SIGTERM. With it, SIGTERM comes
while an answer is streamed: the server must refuse new work at once and finish that answer.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

READY_TIMEOUT_S = 180.0
POLL_S = 0.1
REQUEST_TIMEOUT_S = 300.0
STREAM_TOKENS = 600
"""Long enough that a signal sent after the first token arrives before the last."""
PNG = b"\x89PNG\r\n\x1a\n"


class Broken(Exception):
    """A promise that does not hold."""


def require(holds: bool, message: str) -> None:
    if not holds:
        raise Broken(message)


def say(what: str, value: object) -> None:
    print(f"{what:34} {value}", flush=True)


class Server:
    def __init__(self, port: int, pid: int) -> None:
        self._port = port
        self.pid = pid

    def ask(self, method: str, path: str, body: object = None) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REQUEST_TIMEOUT_S)
        payload = None if body is None else json.dumps(body)
        connection.request(method, path, payload, {"Content-Type": "application/json"})
        return connection.getresponse()

    def status(self, path: str) -> int:
        return self.ask("GET", path).status

    def json(self, method: str, path: str, body: object = None) -> Any:
        response = self.ask(method, path, body)
        text = response.read()
        require(response.status == 200, f"{path}: {response.status} {text[:300]!r}")
        return json.loads(text)

    def wait_until_ready(self) -> float:
        """Seconds until /ready was 200."""
        started = time.monotonic()
        while time.monotonic() - started < READY_TIMEOUT_S:
            require(Path(f"/proc/{self.pid}").exists(), "the process ended before it was ready")
            try:
                if self.status("/ready") == 200:
                    return time.monotonic() - started
            except OSError:
                pass  # not listening yet
            time.sleep(POLL_S)
        raise Broken(f"not ready after {READY_TIMEOUT_S:g} s")

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def process_status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def check_confinement(pid: int, uid: int) -> None:
    status = process_status(pid)
    uids = status["Uid"].split()
    require(set(uids) == {str(uid)}, f"runs as uid {uids}, not {uid}")
    for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
        require(int(status[name], 16) == 0, f"has capabilities: {name} {status[name]}")
    require(status["NoNewPrivs"] == "1", "may gain privileges")
    options = next(
        line.split()[3]
        for line in Path(f"/proc/{pid}/mounts").read_text().splitlines()
        if line.split()[1] == "/"
    )
    require("ro" in options.split(","), f"the root file system is writable: {options}")
    require(status["NSpid"].split()[-1] == "1", "is not PID 1 of its container")
    say("uid, capabilities, root", f"{uid}, none, read-only")
    say("memory when ready", f"{int(status['VmRSS'].split()[0]) // 1024} MiB")


def check_picture(server: Server) -> None:
    started = time.monotonic()
    reply = server.json("POST", "/v1/images/generations", {"prompt": "red apple", "seed": 7})
    took_s = time.monotonic() - started
    png = base64.b64decode(reply["data"][0]["b64_json"], validate=True)
    require(png.startswith(PNG), "the picture is not a PNG")
    width, height = struct.unpack(">II", png[16:24])
    require(reply["size"] == f"{width}x{height}", f"{reply['size']} became {width}x{height}")
    require(png.endswith(b"IEND\xaeB`\x82"), "the PNG is cut off")
    say("picture", f"{width}x{height} PNG, {len(png)} bytes, {took_s:.1f} s")


def check_health_command(image: dict[str, Any], pid: int, uid: int) -> None:
    """Runs the image's HEALTHCHECK as the engine would: in the container, as its user."""
    enter = ["nsenter", f"--target={pid}", "--mount", "--pid", "--net", "--root", "--wd=/"]
    command = ["env", "--ignore-environment", *image["Env"], *image["Healthcheck"]["Test"][1:]]
    user = [f"--setuid={uid}", f"--setgid={uid}"]
    done = subprocess.run([*enter, *user, "--", *command], capture_output=True, text=True)
    require(done.returncode == 0, f"the health check failed: {done.stderr[-300:]}")
    say("health check inside the container", "healthy")


def check_drain(server: Server) -> None:
    """SIGTERM while an answer is streamed."""
    body = {
        "messages": [{"role": "user", "content": "define violin"}],
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
        "max_tokens": STREAM_TOKENS,
    }
    stream = server.ask("POST", "/v1/chat/completions", body)
    require(stream.status == 200, f"the stream was refused: {stream.status}")
    stream.readline()
    server.stop()
    while server.status("/ready") != 503:  # the signal is handled by the event loop, not at once
        time.sleep(POLL_S / 10)
    require(server.status("/health") == 200, "a draining server is not healthy")
    refused = server.ask("POST", "/v1/chat/completions", body)
    code = json.loads(refused.read())["error"]["code"]
    require((refused.status, code) == (503, "draining"), f"new work: {refused.status} {code}")
    events = [line[6:] for line in stream.read().decode().splitlines() if line.startswith("data: ")]
    require(events[-1] == "[DONE]", f"the stream ends with {events[-1][:200]}")
    chunks = [json.loads(event) for event in events[:-1]]
    reasons = [c["finish_reason"] for chunk in chunks for c in chunk.get("choices", ())]
    made = chunks[-1]["usage"]["completion_tokens"]
    require(reasons[-1] == "length", f"the stream was cut off: {reasons[-1]}")
    require(made == STREAM_TOKENS, f"{made} of {STREAM_TOKENS} tokens came")
    say("stream across SIGTERM", f"whole: {made} tokens, finish_reason length")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--pid", type=int, required=True, help="the server's, as the host sees it")
    parser.add_argument("--uid", type=int, required=True, help="the user it must run as")
    parser.add_argument(
        "--image", type=Path, required=True, help="what `buildah inspect` says of the image"
    )
    parser.add_argument("--drain", action="store_true", help="stop it in the middle of an answer")
    args = parser.parse_args()
    image = json.loads(args.image.read_text())["Docker"]["config"]
    server = Server(args.port, args.pid)
    try:
        say("ready after", f"{server.wait_until_ready():.1f} s")
        require(server.status("/health") == 200, "ready but not healthy")
        check_confinement(args.pid, args.uid)
        check_health_command(image, args.pid, args.uid)
        check_picture(server)
        if args.drain:
            check_drain(server)
        else:
            server.stop()
    except (Broken, OSError) as error:
        print(f"check_server: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
