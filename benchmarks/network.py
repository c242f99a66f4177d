"""A network between two workers on one machine: a namespace for each, joined by a cable with a speed limit."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from harness import UnavailableError

DEVICE = "bench0"  # the same name at both ends: the workers of one launcher have one GLOO_SOCKET_IFNAME
ADDRESSES = ("10.219.0.1", "10.219.0.2")


@dataclass(frozen=True)
class Network:
    """Two namespaces, joined. The first is worker 0's and the launcher's."""

    names: tuple[str, str]

    def path(self, side: int) -> str:
        """Return the file through which a process joins."""
        return f"/var/run/netns/{self.names[side]}"

    def inside(self, side: int) -> list[str]:
        """Return what to put before a command. Not `ip netns exec`, which would hide the cgroups."""
        return ["nsenter", f"--net={self.path(side)}"]

    def sent(self) -> int:
        """Return the bytes that have gone from the first namespace to the second."""
        (link,) = json.loads(ip("-netns", self.names[0], "-statistics", "-json", "link", "show", DEVICE))
        return int(link["stats64"]["tx"]["bytes"])


def ip(*arguments: str) -> str:
    """Run `ip`; return what it prints."""
    return call("ip", *arguments)


def call(*command: str) -> str:
    """Run a program; return what it prints."""
    done = subprocess.run(command, check=False, text=True, capture_output=True)
    if done.returncode:
        raise OSError(done.stderr.strip() or f"{command[0]} ended with code {done.returncode}")
    return done.stdout


@contextlib.contextmanager
def joined(rate: str | None) -> Iterator[Network]:
    """Join two namespaces for as long as they are needed, at this rate or at the machine's full speed."""
    pair = Network((f"adarun-bench-{os.getpid()}-0", f"adarun-bench-{os.getpid()}-1"))
    try:
        try:
            connect(pair, rate)
        except OSError as error:
            raise UnavailableError(f"no network namespaces can be made here ({error})") from error
        yield pair
    finally:
        for name in pair.names:
            with contextlib.suppress(OSError):  # what was not made cannot be deleted
                ip("netns", "delete", name)  # and the cable with it


def connect(pair: Network, rate: str | None) -> None:
    """Make the namespaces and the cable."""
    one, other = pair.names
    for name in pair.names:
        ip("netns", "add", name)
    ip("link", "add", DEVICE, "netns", one, "type", "veth", "peer", "name", DEVICE, "netns", other)
    for name, address in zip(pair.names, ADDRESSES, strict=True):
        ip("-netns", name, "address", "add", f"{address}/24", "dev", DEVICE)
        ip("-netns", name, "link", "set", "lo", "up")
        ip("-netns", name, "link", "set", DEVICE, "up")
        if rate:
            limit = ["root", "tbf", "rate", rate, "burst", "32kbit", "latency", "50ms"]
            call("tc", "-netns", name, "qdisc", "add", "dev", DEVICE, *limit)
