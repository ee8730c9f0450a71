"""The switch beside its peers: a Linux bridge in the same namespaces, Open vSwitch in user space, VDE.

Rates are measured between network namespaces that are plugged in as guests are (:mod:`wires`), so that what carries
the datagrams is all there is to wait for, and once between two real guests. In every round each peer has its turn, so
that what else the machine does meets all of them.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pollers
import tools
import underlays
import wires
from report import Row, write
from wires import Host, Way, pinned, run

from orchestrator.switch import dispatcher, links

PORT = 5201
SMALL = 18
"""Bytes of payload in an Ethernet frame of 64 bytes, its checksum included."""
CHUNK = 1 << 18
TEST_RUNS = 200_000
TC_ACT_REDIRECT = 7
PORTS = (2, 10, 100, 1000)
GUEST_LIMIT_SECONDS = 300
PINGS = 50
GUEST_ROUNDS = 4
"""At most, because each takes long and they tell little; even, because the first of a round finds the guests idle."""

LAB = """\
lab: bench-switch
hosts: {one: {}}
networks:
  ours: {ipv4: 10.78.0.0/24}
  peer: {ipv4: 10.79.0.0/24, datapath: bridge}
defaults: {guest: {host: one, image: tiny, memory: 192M}}
guests:
  ann: {nics: [{network: ours, ipv4: 10.78.0.2}, {network: peer, ipv4: 10.79.0.2}]}
  bob: {nics: [{network: ours, ipv4: 10.78.0.3}, {network: peer, ipv4: 10.79.0.3}]}
"""

Figures = dict[str, list[float]]


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")


class Traffic:
    """What runs between two guests.

    :param seconds: of each rate.
    :param folder: where to compile what no package has.
    """

    def __init__(self, seconds: int, folder: Path) -> None:
        self._seconds = seconds
        self._iperf, self._qperf = tools.find("iperf3", "iperf3"), tools.find("qperf", "qperf")
        self._own = folder / "traffic"
        run("cc", "-O2", "-o", self._own, Path(__file__).with_name("traffic.c"))

    def serve(self, way: Way) -> None:
        """Start the other ends of :meth:`transactions` and :meth:`throughput`."""
        iperf = way.server.start(*pinned(1, self._iperf, "-s", "-p", str(PORT)))
        qperf = way.server.start(*pinned(0, self._qperf, "-lp", str(PORT + 1)))
        for process, port in ((iperf, PORT), (qperf, PORT + 1)):
            _wait_until_it_listens(process, port)

    def transactions(self, way: Way) -> float:
        """Requests of one byte, each sent when the one before has been answered: a second.

        Both sides are on one processor: on two, each waits until the other processor wakes up, which may take longer
        than all the rest.
        """
        seconds = str(self._seconds)
        words = pinned(0, self._qperf, "-lp", str(PORT + 1), "-t", seconds, "-m", "1", "-uu", way.address, "tcp_lat")
        said = re.search(r"latency += +(\d+) ns", way.client.run(*words))
        if said is None:
            sys.exit(f"{way.name}: qperf measured nothing")
        return 1e9 / (2 * int(said[1]))

    def throughput(self, way: Way) -> float:
        """Of one TCP connection: Gbit/s."""
        words = pinned(0, self._iperf, "-c", way.address, "-p", str(PORT), "-t", str(self._seconds), "-J")
        return float(json.loads(way.client.run(*words))["end"]["sum_received"]["bits_per_second"]) / 1e9

    def transactions_of_processor(self, way: Way) -> float:
        """The same by one process that has both ends: per second of processor time, whoever else uses it."""
        return self._asked(way, 1)

    def throughput_of_processor(self, way: Way) -> float:
        """Of one TCP connection by one process that has both ends: Gbit per second of processor time."""
        return self._asked(way, CHUNK) * CHUNK * 8 / 1e9

    def _asked(self, way: Way, size: int) -> float:
        places = (way.client.path, way.server.path, way.address, str(PORT + 2))
        return float(run(*pinned(0, self._own, "ask", *places, self._short, str(size))))

    def datagrams_of_processor(self, way: Way) -> float:
        """Small datagrams that arrive: thousands per second of the sender's processor time."""
        port = str(PORT + 3)
        counter = way.server.start(*pinned(1, self._own, "count", port, "10"), stdout=subprocess.PIPE)
        assert counter.stdout is not None
        counter.stdout.readline()  # it is ready
        spent = float(way.client.run(*pinned(0, self._own, "send", way.address, port, self._short, str(SMALL))))
        came, _ = counter.communicate()
        return float(came) / spent / 1e3

    def frames_of_processor(self, one: Host, other: Host) -> float:
        """Small frames between the taps of guests 2 and 3: thousands per second of processor time."""
        places = (one.space.path, wires.nic(2).tap, other.space.path, wires.nic(3).tap)
        frames = (wires.small_frame(2, 3).hex(), wires.small_frame(3, 2).hex())
        return float(run(*pinned(0, self._own, "taps", *places, self._short, *frames))) / 1e3

    @property
    def _short(self) -> str:
        """Seconds, for what others do not disturb."""
        return str(self._seconds * 0.25)


MEASURES: dict[str, tuple[str, Callable[[Traffic, Way], float]]] = {
    "TCP_RR": ("transactions/s", Traffic.transactions),
    "TCP_RR, processor time": ("transactions/s", Traffic.transactions_of_processor),
    "TCP throughput": ("Gbit/s", Traffic.throughput),
    "TCP throughput, processor time": ("Gbit/s", Traffic.throughput_of_processor),
    "UDP, 64 bytes": ("kpps", Traffic.datagrams_of_processor),
}
"""By name: unit, and how it is taken."""


def _wait_until_it_listens(process: subprocess.Popen[str], port: int) -> None:
    deadline = time.monotonic() + wires.PATIENCE_SECONDS
    tables = [Path(f"/proc/{process.pid}/net/{family}") for family in ("tcp", "tcp6")]
    listening = re.compile(rf":{port:04X} [0:]+ 0A")
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if any(listening.search(table.read_text()) for table in tables):
                return
        time.sleep(0.01)
    sys.exit(f"nothing listens at port {port}")


def compare(where: str, ways: list[Way], traffic: Traffic, rounds: int) -> list[Row]:
    """Take all measures in turn, round by round; the first of ``ways`` is ours."""
    figures: dict[str, Figures] = defaultdict(lambda: defaultdict(list))
    for number in range(rounds):
        for way in ways:
            way.use()
            for name, (_, take) in MEASURES.items():
                if way.only is None or name in way.only:
                    figures[name][way.name].append(take(traffic, way))
        say(f"{where}: round {number + 1} of {rounds}")
    return [
        Row.of(f"{name}, {where}", unit, figures[name][ways[0].name], figures[name][way.name], way.name, "higher")
        for name, (unit, _) in MEASURES.items()
        for way in ways[1:]
        if way.name in figures[name]
    ]


# -- the parts -------------------------------------------------------------------------------------------------------


def one_host(options: argparse.Namespace, traffic: Traffic) -> list[Row]:
    with contextlib.ExitStack() as stack:
        ways = wires.on_one_host(stack)
        outside = []
        for peer in (wires.open_vswitch, wires.vde):
            try:
                outside.append(peer(stack))
            except tools.MissingError as error:
                say(f"LEFT OUT: {error}")
        for way in (ways[0], *outside):
            traffic.serve(way)
        return compare("one host", ways + outside, traffic, options.rounds)


def two_hosts(options: argparse.Namespace, traffic: Traffic) -> list[Row]:
    with contextlib.ExitStack() as stack:
        ways = wires.on_two_hosts(stack)
        traffic.serve(ways[0])
        return compare("two hosts", ways, traffic, options.rounds)


def taps(options: argparse.Namespace, traffic: Traffic) -> list[Row]:
    """What real guests have, and nothing else: small frames from tap to tap."""
    figures: dict[str, Figures] = {"one host": defaultdict(list), "two hosts": defaultdict(list)}
    kinds = {"ours": False, **wires.bridges()}
    with contextlib.ExitStack() as stack:
        hosts: list[tuple[str, str, Host, Host]] = []
        for name, filtered in kinds.items():
            datapath: wires.Datapath = "ebpf" if name == "ours" else "bridge"
            single, pair = Host(stack, "taps"), wires.connected(stack)
            single.plug_taps(range(2, 4))
            for number, host in enumerate(pair, 2):
                host.plug_taps(range(number, number + 1))
            for host in (single, *pair):
                host.filter_bridged(filtered)
                host.ensure(datapath, tuple(other for other in pair if host in pair and other is not host))
            hosts += [("one host", name, single, single), ("two hosts", name, *pair)]
        for _ in range(options.rounds):
            for where, name, one, other in hosts:
                figures[where][name].append(traffic.frames_of_processor(one, other))
    return [
        Row.of(f"frames of 64 bytes, taps, {where}", "kpps", taken["ours"], taken[name], name, "higher")
        for where, taken in figures.items()
        for name in wires.bridges()
    ]


def polled(options: argparse.Namespace, _: Traffic) -> list[Row]:
    """What copies from virtqueue to virtqueue; each switch in turn has the second processor for itself."""
    figures: Figures = defaultdict(list)
    for number in range(options.rounds):
        for start in (pollers.ours, pollers.open_vswitch):
            with contextlib.ExitStack() as stack:
                try:
                    poller = start(stack)
                    figures[poller.name].append(pollers.Guest(stack, poller).rate(options.seconds))
                except tools.MissingError as error:
                    say(f"LEFT OUT: {error}")
        say(f"virtqueues: round {number + 1} of {options.rounds}")
    if "ours" not in figures:
        return []
    peers = [name for name in figures if name != "ours"]
    return [
        Row.of("frames of 64 bytes, virtqueues", "Mpps", figures["ours"], figures[peer], peer, "higher")
        for peer in peers
    ]


def underlay(options: argparse.Namespace, traffic: Traffic) -> list[Row]:
    """What carries frames from host to host, by itself; the first is what the switch uses."""
    figures: Figures = defaultdict(list)
    with contextlib.ExitStack() as stack:
        pairs = {kind: underlays.hosts(stack, kind) for kind in underlays.KINDS}
        for _ in range(options.rounds):
            for kind, pair in pairs.items():
                figures[kind].append(traffic.frames_of_processor(*pair))
    ours, *peers = underlays.KINDS
    return [
        Row.of(f"frames of 64 bytes, {ours}, alone", "kpps", figures[ours], figures[peer], peer, "higher")
        for peer in peers
    ]


def attach(options: argparse.Namespace, _: Traffic) -> list[Row]:
    """100 ports at once, and one more: each time in a new namespace. Before that the program is loaded into the
    kernel, as every agent does once."""
    taken: dict[str, Figures] = defaultdict(lambda: defaultdict(list))
    loading: list[float] = []
    datapaths: tuple[wires.Datapath, ...] = ("ebpf", "bridge")
    for number in range(options.rounds):
        for datapath in datapaths:
            with contextlib.ExitStack() as stack:
                host = Host(stack, datapath)
                host.plug_taps(range(2, 102))
                if datapath == "ebpf":
                    dispatcher.unavailable.cache_clear()
                    began = time.monotonic()
                    dispatcher.unavailable()
                    loading.append(time.monotonic() - began)
                taken["attach 100 ports"][datapath].append(host.ensure(datapath))
                host.plug_taps(range(102, 103))
                taken["attach one port to 100"][datapath].append(host.ensure(datapath))
                taken["101 ports, nothing to do"][datapath].append(host.ensure(datapath))
        say(f"attach: round {number + 1} of {options.rounds}")
    return [
        Row.of("load the program", "s", loading, None, None, "lower"),
        *(
            Row.of(title, "s", figures["ebpf"], figures["bridge"], "Linux bridge", "lower")
            for title, figures in taken.items()
        ),
    ]


def program_cost(host: Host) -> float:
    """Nanoseconds that the program takes for a datagram from guest 2 to guest 3, without any link's own cost."""
    with host.space.entered(), links.netlink("program") as netlink:
        found = netlink.get_links()
        ifindex = next(link["index"] for link in found if link.get("ifname") == wires.nic(2).tap)
        with dispatcher.opened(netlink, wires.UID, found) as switch:
            assert switch is not None
            return repeated(switch.program("dispatch"), wires.small_frame(2, 3), ifindex, TEST_RUNS)


class _TestRun(ctypes.Structure):
    """``struct bpf_test_run_opts`` of libbpf 1.0."""

    _fields_ = [
        *(("size", ctypes.c_size_t), ("data_in", ctypes.c_char_p), ("data_out", ctypes.c_char_p)),
        *(("data_size_in", ctypes.c_uint32), ("data_size_out", ctypes.c_uint32)),
        *(("context_in", ctypes.c_char_p), ("context_out", ctypes.c_char_p)),
        *(("context_size_in", ctypes.c_uint32), ("context_size_out", ctypes.c_uint32)),
        *(("verdict", ctypes.c_uint32), ("repeat", ctypes.c_int), ("duration", ctypes.c_uint32)),
        *(("flags", ctypes.c_uint32), ("cpu", ctypes.c_uint32), ("batch_size", ctypes.c_uint32)),
    ]


def repeated(program: int, frame: bytes, ifindex: int, times: int) -> float:
    """Nanoseconds of a run of a tc program, by ``BPF_PROG_TEST_RUN``; it must redirect."""
    context = bytes(40) + ifindex.to_bytes(4, "little") + bytes(148)  # struct __sk_buff
    request = _TestRun(
        size=ctypes.sizeof(_TestRun),
        data_in=frame,
        data_size_in=len(frame),
        context_in=context,
        context_size_in=len(context),
        repeat=times,
    )
    failed = ctypes.CDLL("libbpf.so.1").bpf_prog_test_run_opts(program, ctypes.byref(request))
    if failed or request.verdict != TC_ACT_REDIRECT:
        sys.exit(f"the program cannot be run: {failed}, verdict {request.verdict}")
    return float(request.duration)


def ports(options: argparse.Namespace, traffic: Traffic) -> list[Row]:
    """What a datagram costs with few and with many ports plugged in."""
    cost: dict[int, list[float]] = defaultdict(list)
    rate: dict[int, list[float]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        hosts: dict[int, tuple[Host, Way]] = {}
        for count in PORTS:
            host = Host(stack, f"ports{count}")
            way = Way("ours", host.plug(2), host.plug(3), wires.address(3))
            host.plug_taps(range(4, count + 2))
            say(f"{count} ports: {host.ensure('ebpf'):.2f} s")
            way.use()
            hosts[count] = host, way
        for _ in range(options.rounds):
            for count, (host, way) in hosts.items():
                cost[count].append(program_cost(host))
                if count in (PORTS[0], PORTS[-1]):
                    rate[count].append(traffic.datagrams_of_processor(way))
    few, many = PORTS[0], PORTS[-1]
    peer = f"ours, {few} ports"
    rows = [
        Row.of(f"program, {count} ports", "ns/packet", cost[count], cost[few], peer, "lower") for count in PORTS[1:]
    ]
    return [*rows, Row.of(f"UDP, 64 bytes, {many} ports", "kpps", rate[many], rate[few], peer, "higher")]


class Lab:
    """Two real guests on one host, on a network of each kind."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(mode=0o755, exist_ok=True)
        self._file = folder / "bench-switch.yaml"
        self._file.write_text(LAB)
        places = {"ORCHESTRATOR_STATE": str(folder / "state"), "ORCHESTRATOR_RUN": f"/run/{folder.name}"}
        self._env = os.environ | places

    def run(self, *words: str) -> str:
        command = [sys.executable, "-m", "orchestrator", words[0], "-f", str(self._file), *words[1:]]
        done = subprocess.run(
            command, env=self._env, capture_output=True, text=True, timeout=GUEST_LIMIT_SECONDS, check=False
        )
        if done.returncode:
            sys.exit(f"orchestrator {' '.join(words)}: {done.stderr}")
        return done.stdout

    def close(self) -> None:
        with contextlib.suppress(SystemExit):
            self.run("down")
        shutil.rmtree(self._folder, ignore_errors=True)

    def inside(self, guest: str, *words: str) -> str:
        return self.run("exec", guest, "--", *words)

    def round_trip(self, address: str) -> float:
        """Milliseconds."""
        said = self.inside("ann", "ping", "-q", "-c", str(PINGS), "-i", "0.01", address)
        return float(re.findall(r"min/avg/max = [0-9.]+/([0-9.]+)/", said)[0])

    def throughput(self, address: str, seconds: int) -> float:
        """Of one TCP connection: Gbit/s."""
        said = self.inside("ann", "iperf3", "-c", address, "-t", str(seconds), "-J")
        return float(json.loads(said)["end"]["sum_received"]["bits_per_second"]) / 1e9


def guests(options: argparse.Namespace, _: Traffic) -> list[Row]:
    """Between emulated guests, where what carries the datagrams is a small part of it."""
    lab = Lab(Path("/var/tmp/orc-bench-switch"))
    rounds = min(options.rounds, GUEST_ROUNDS)
    trip: Figures = defaultdict(list)
    rate: Figures = defaultdict(list)
    try:
        lab.run("down")  # what was left of a measurement that was killed
        lab.run("up")
        lab.inside("bob", "iperf3", "-s", "-D")
        for number in range(rounds):
            turn = (("ours", "10.78.0.3"), ("peer", "10.79.0.3"))
            for name, address in turn if number % 2 else reversed(turn):
                trip[name].append(lab.round_trip(address))
                rate[name].append(lab.throughput(address, options.seconds))
            say(f"guests: round {number + 1} of {rounds}")
    finally:
        lab.close()
    kind = list(wires.bridges())[-1]  # as this machine has it by default
    return [
        Row.of("ping, real guests", "ms", trip["ours"], trip["peer"], kind, "lower"),
        Row.of("TCP throughput, real guests", "Gbit/s", rate["ours"], rate["peer"], kind, "higher"),
    ]


PARTS: dict[str, Callable[[argparse.Namespace, Traffic], list[Row]]] = {
    "one-host": one_host,
    "two-hosts": two_hosts,
    "taps": taps,
    "underlay": underlay,
    "polled": polled,
    "attach": attach,
    "ports": ports,
    "guests": guests,
}


def _end(*_: object) -> None:
    """Clean up, undisturbed."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)
    sys.exit("ended")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="counted rounds of each, in turn")
    parser.add_argument("--seconds", type=int, default=1, help="of each rate in each round")
    parser.add_argument("--only", choices=PARTS, action="append", help="this part; may come more than once")
    options = parser.parse_args()
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, _end)
    if why := dispatcher.unavailable():
        sys.exit(f"this host cannot have the switch: {why}")
    wires.remove_what_was_left()
    rows = []
    with tempfile.TemporaryDirectory(prefix=wires.OWN) as folder:
        try:
            traffic = Traffic(options.seconds, Path(folder))
        except tools.MissingError as error:
            sys.exit(str(error))
        for part in options.only or PARTS:
            rows += PARTS[part](options, traffic)
    write("-".join(["switch", *(options.only or ())]), rows)


if __name__ == "__main__":
    main()
