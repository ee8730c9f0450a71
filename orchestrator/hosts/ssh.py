"""Hosts of kind ``ssh``: any Linux machine, reached by paramiko.

Host keys are checked against ``known_hosts`` and never accepted blindly. The agent's stream is a channel of the SSH
connection: nothing listens on the network. The toolkit on the host must be of the same version; it is installed into
``/opt/orchestrator`` where it is missing.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import shlex
import threading
from pathlib import Path, PurePosixPath
from typing import Any

import paramiko

from orchestrator import __version__
from orchestrator.errors import HostError, HostKeyError
from orchestrator.hosts.install import build_wheel
from orchestrator.hosts.model import SshHost
from orchestrator.hosts.rpc import Progress, Stream
from orchestrator.hosts.transport import HostFacts
from orchestrator.run import tail_of
from orchestrator.spec.resolved import ResolvedHost, ResolvedLab

CONNECT_SECONDS = 15
COMMAND_SECONDS = 60
INSTALL_SECONDS = 600
DEFAULT_TOOLKIT = "/opt/orchestrator/bin/orchestrator"


def parse_jump(text: str) -> tuple[str | None, str, int]:
    """``[user@]host[:port]`` → user, host, port.

    :raise HostError: the port is no number.
    """
    user, _, rest = text.rpartition("@")
    host, colon, port = rest.rpartition(":")
    if not colon or host.endswith(":"):
        host, port = rest, "22"
    if not port.isdigit():
        raise HostError(f"jump host {text!r}: {port!r} is no port", hint="write [user@]host[:port]")
    return user or None, host.strip("[]"), int(port)


class SshTransport:
    """A machine reached by SSH, with an agent of this lab."""

    shares_files = False

    def __init__(self, lab: ResolvedLab, host: ResolvedHost) -> None:
        if not isinstance(host.spec, SshHost):
            raise TypeError(f"host {host.name} is of kind {host.spec.kind}")
        self.host = host
        self.lab = lab
        self.spec = host.spec
        self._client: paramiko.SSHClient | None = None
        self._jump: paramiko.SSHClient | None = None
        self._lock = threading.Lock()

    @property
    def toolkit(self) -> PurePosixPath:
        return PurePosixPath(self.spec.toolkit or DEFAULT_TOOLKIT)

    # -- SSH -----------------------------------------------------------------------------------------------------

    def _new_client(self, address: str, port: int, user: str | None, sock: Any = None) -> paramiko.SSHClient:
        """:raise HostError: with what to do about it."""
        known_hosts = (self.spec.known_hosts or Path("~/.ssh/known_hosts")).expanduser()
        ssh = paramiko.SSHClient()
        ssh.set_missing_host_key_policy(paramiko.RejectPolicy())
        name = address if port == 22 else f"[{address}]:{port}"
        learn = f"check its key, then: ssh-keyscan -p {port} {address} >> {known_hosts}"
        try:
            if known_hosts.exists():
                ssh.load_host_keys(str(known_hosts))
            ssh.connect(
                address,
                port=port,
                username=user,
                key_filename=str(self.spec.key.expanduser()) if self.spec.key else None,
                timeout=CONNECT_SECONDS,
                banner_timeout=CONNECT_SECONDS,
                auth_timeout=CONNECT_SECONDS,
                sock=sock,
            )
        except paramiko.BadHostKeyException as error:
            raise HostKeyError(
                f"host {self.host.name}: the key of {name} has changed: {error.key.get_name()} "
                f"{error.key.fingerprint}",
                hint=f"if the machine was installed anew: ssh-keygen -f {known_hosts} -R '{name}', then {learn}",
            ) from error
        except paramiko.PasswordRequiredException as error:
            raise HostError(f"host {self.host.name}: the private key has a passphrase", hint="ssh-add it") from error
        except paramiko.AuthenticationException as error:
            raise HostError(
                f"host {self.host.name}: {user or 'the user'} may not log in at {name}: {error}",
                hint=f"ssh-copy-id -p {port} {user or 'root'}@{address}, or set `key:`",
            ) from error
        except paramiko.SSHException as error:
            unknown = "not found in known_hosts" in str(error)
            raise HostError(
                f"host {self.host.name}: {'the key of ' + name + ' is not known' if unknown else error}",
                hint=learn if unknown else None,
            ) from error
        except (OSError, EOFError, ValueError) as error:
            raise HostError(
                f"host {self.host.name}: {name} does not answer: {error}",
                hint=f"ssh -p {port} {user or 'root'}@{address}",
            ) from error
        transport = ssh.get_transport()
        if transport:
            transport.set_keepalive(15)
        return ssh

    def _connection(self) -> paramiko.SSHClient:
        with self._lock:
            if self._client is None:
                sock = None
                if self.spec.jump:
                    user, host, port = parse_jump(self.spec.jump)
                    self._jump = self._new_client(host, port, user)
                    over = self._jump.get_transport()
                    assert over is not None
                    try:
                        sock = over.open_channel(
                            "direct-tcpip",
                            (self.spec.address, self.spec.port),
                            ("127.0.0.1", 0),
                            timeout=CONNECT_SECONDS,
                        )
                    except paramiko.SSHException as error:
                        raise HostError(
                            f"host {self.host.name}: jump host {self.spec.jump} cannot reach "
                            f"{self.spec.address}:{self.spec.port}: {error}"
                        ) from error
                self._client = self._new_client(self.spec.address, self.spec.port, self.spec.user, sock)
            return self._client

    def check(self) -> None:
        """:raise HostError: the host does not answer, or does not let us in."""
        self._connection()

    def _run(self, command: str, seconds: float = COMMAND_SECONDS) -> tuple[int, bytes, bytes]:
        """Run a shell command there: exit status, output, errors.

        :raise HostError: the connection fails, or the command does not end in time.
        """
        try:
            _, out, err = self._connection().exec_command(command, timeout=seconds)
            stdout, stderr = out.read(), err.read()
            return out.channel.recv_exit_status(), stdout, stderr
        except TimeoutError as error:
            raise HostError(f"host {self.host.name}: no answer within {seconds:.0f} s", command=command) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise HostError(f"host {self.host.name}: the connection broke: {error}", command=command) from error

    def _remote_command(self, action: str) -> str:
        python = self.toolkit.parent / "python"
        return shlex.join(
            [
                str(python),
                "-m",
                "orchestrator.agent.remote",
                action,
                f"--lab={self.lab.lab}",
                f"--uid={self.lab.uid}",
                f"--host={self.host.name}",
                f"--libvirt={self.spec.libvirt}",
            ]
        )

    def _act(self, action: str) -> bytes:
        """:raise HostError: the action fails there."""
        command = self._remote_command(action)
        status, stdout, stderr = self._run(command)
        if status:
            raise HostError(
                f"host {self.host.name}: {action} failed with exit status {status}",
                command=f"ssh -p {self.spec.port} {self.spec.user}@{self.spec.address} {shlex.quote(command)}",
                tail=tail_of(stderr or stdout),
                hint="orchestrator doctor on that host tells what is missing",
            )
        return stdout

    # -- the transport -------------------------------------------------------------------------------------------

    def _version_there(self) -> str | None:
        status, stdout, _ = self._run(shlex.join([str(self.toolkit), "--version"]))
        return stdout.decode(errors="replace").strip() if status == 0 else None

    def _facts(self) -> dict[str, Any]:
        try:
            return dict(json.loads(self._act("facts")))
        except ValueError as error:
            raise HostError(f"host {self.host.name}: the toolkit there gave no facts: {error}") from error

    def facts(self) -> HostFacts:
        version = self._version_there()
        problems = () if version == __version__ else (f"toolkit: {version or 'missing'} → {__version__}",)
        if version is None:
            return HostFacts(problems=problems)
        facts = self._facts()
        return HostFacts(present=bool(facts["present"]), agent=bool(facts["agent"]), problems=problems)

    def ensure(self, progress: Progress) -> None:
        progress("connecting")
        version = self._version_there()
        if version != __version__:
            self._install(version, progress)
        progress("agent")
        self.start_agent()

    def start_agent(self) -> None:
        self._act("start")

    def _install(self, version: str | None, progress: Progress) -> None:
        """:raise HostError: what is there may not be replaced, or the installation fails."""
        if version is not None and self.spec.toolkit:
            raise HostError(
                f"host {self.host.name}: {self.toolkit} is of version {version}, this is {__version__}",
                hint="update it there, or leave `toolkit:` away to have it installed",
            )
        prefix = self.toolkit.parent.parent
        progress(f"installing the toolkit into {prefix}")
        wheel = build_wheel()
        target = f"/tmp/{wheel.name}"
        with contextlib.closing(self._connection().open_sftp()) as sftp:
            sftp.put(str(wheel), target)
        steps = [
            shlex.join(["python3", "-m", "venv", str(prefix)]),
            shlex.join([str(prefix / "bin" / "pip"), "install", "--quiet", "--force-reinstall", "--no-deps", target]),
            shlex.join([str(prefix / "bin" / "pip"), "install", "--quiet", target]),
        ]
        status, stdout, stderr = self._run(
            " && ".join(steps) + f"; s=$?; rm -f {shlex.quote(target)}; exit $s", INSTALL_SECONDS
        )
        if status:
            raise HostError(
                f"host {self.host.name}: the toolkit could not be installed",
                command=" && ".join(steps),
                tail=tail_of(stderr or stdout),
                hint="Debian and Ubuntu need: apt install python3-venv python3-dev gcc pkg-config libvirt-dev",
            )

    def remove(self, progress: Progress) -> None:
        progress("agent")
        self._act("remove")

    def stream(self) -> Stream:
        transport = self._connection().get_transport()
        if transport is None:
            raise HostError(f"host {self.host.name}: the connection has ended")
        try:
            channel = transport.open_session(timeout=CONNECT_SECONDS)
            channel.exec_command(self._remote_command("connect"))
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise HostError(f"host {self.host.name}: no stream to the agent: {error}") from error
        return channel

    def close(self) -> None:
        for ssh in (self._client, self._jump):
            if ssh is not None:
                ssh.close()
        self._client = self._jump = None
