"""Hosts of kind ``ssh``: any Linux machine, reached by paramiko.

Host keys are checked against ``known_hosts`` and never accepted blindly. The agent's stream is a channel of the SSH
connection: nothing listens on the network. Whoever logs in as another user than root needs sudo without a password.

The toolkit on the host must be this one, to the letter; where it is missing or another it is installed into
``/opt/orchestrator`` (:mod:`orchestrator.hosts.install`). An agent that runs other code is replaced, which guests
outlive.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import contextlib
import json
import shlex
import socket
import threading
from pathlib import Path, PurePosixPath
from typing import Any

import paramiko

from orchestrator import __version__
from orchestrator.errors import HostError, HostKeyError, HostLostError
from orchestrator.hosts.install import bundle, our_digest
from orchestrator.hosts.model import SshHost
from orchestrator.hosts.rpc import Progress, Stream
from orchestrator.hosts.transport import HostFacts, SharedAgent
from orchestrator.patience import scaled
from orchestrator.run import tail_of
from orchestrator.spec.resolved import ResolvedHost, ResolvedLab

CONNECT_SECONDS = 15
ANSWER_SECONDS = 45
"""For one answer of a machine that listens: it may be busy, or emulated."""
KEEPALIVE_SECONDS, SILENCE_SECONDS = 15, 120
"""A machine that acknowledges nothing for so long has gone: longer than a snapshot holds one up."""
COMMAND_SECONDS = 60
INSTALL_SECONDS = 600
DEFAULT_TOOLKIT = "/opt/orchestrator/bin/orchestrator"
CACHE = "/var/cache/orchestrator"
PYTHON = "/usr/bin/python3"  # the distribution's own, which has its bindings of libvirt
NO_PASSWORD = "allow it there, with visudo: {user} ALL=(ALL) NOPASSWD: ALL"


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


def known_hosts_of(spec: SshHost) -> Path:
    return (spec.known_hosts or Path("~/.ssh/known_hosts")).expanduser()


class Connection:
    """A machine that is logged in to when it is first needed, and whose commands run as root."""

    def __init__(self, name: str, spec: SshHost, *, may_sudo: bool = False) -> None:
        """:param may_sudo: it is known that the user may become root; else that is tried before it is needed."""
        self.name = name
        self.spec = spec
        self._client: paramiko.SSHClient | None = None
        self._jump: paramiko.SSHClient | None = None
        self._may_sudo = may_sudo
        self._lock = threading.Lock()

    def _open(self, address: str, port: int, user: str | None, sock: Any = None) -> paramiko.SSHClient:
        """:raise HostError: with what to do about it."""
        known_hosts = known_hosts_of(self.spec)
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
                timeout=scaled(CONNECT_SECONDS),
                banner_timeout=scaled(ANSWER_SECONDS),
                auth_timeout=scaled(ANSWER_SECONDS),
                sock=sock,
            )
        except paramiko.BadHostKeyException as error:
            raise HostKeyError(
                f"host {self.name}: the key of {name} has changed: {error.key.get_name()} {error.key.fingerprint}",
                hint=f"if the machine was installed anew: ssh-keygen -f {known_hosts} -R '{name}', then {learn}",
            ) from error
        except paramiko.PasswordRequiredException as error:
            raise HostError(f"host {self.name}: the private key has a passphrase", hint="ssh-add it") from error
        except paramiko.AuthenticationException as error:
            raise HostError(
                f"host {self.name}: {user or 'the user'} may not log in at {name}: {error}",
                hint=f"ssh-copy-id -p {port} {user or 'root'}@{address}, or set `key:`",
            ) from error
        except paramiko.SSHException as error:
            unknown = "not found in known_hosts" in str(error)
            raise HostError(
                f"host {self.name}: {'the key of ' + name + ' is not known' if unknown else error}",
                hint=learn if unknown else None,
            ) from error
        except (OSError, EOFError, ValueError) as error:
            raise HostError(
                f"host {self.name}: {name} does not answer: {error}",
                hint=f"ssh -p {port} {user or 'root'}@{address}",
            ) from error
        transport = ssh.get_transport()
        if transport:
            transport.set_keepalive(KEEPALIVE_SECONDS)
            if isinstance(transport.sock, socket.socket):  # and not a channel of the jump host
                transport.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, SILENCE_SECONDS * 1000)
        return ssh

    def client(self) -> paramiko.SSHClient:
        """:raise HostError: the machine does not answer, or does not let us in."""
        with self._lock:
            if self._client is None:
                self._client = self._open(self.spec.address, self.spec.port, self.spec.user, self._way())
            return self._client

    def _way(self) -> paramiko.Channel | None:
        """A channel through the jump host, where there is one."""
        if not self.spec.jump:
            return None
        user, host, port = parse_jump(self.spec.jump)
        self._jump = self._open(host, port, user)
        over = self._jump.get_transport()
        assert over is not None
        there = (self.spec.address, self.spec.port)
        try:
            return over.open_channel("direct-tcpip", there, ("127.0.0.1", 0), timeout=scaled(ANSWER_SECONDS))
        except paramiko.SSHException as error:
            raise HostError(
                f"host {self.name}: jump host {self.spec.jump} cannot reach "
                f"{self.spec.address}:{self.spec.port}: {error}"
            ) from error

    def run(self, command: str, seconds: float = COMMAND_SECONDS) -> tuple[int, bytes, bytes]:
        """Run a shell command as the user that logs in: exit status, output, errors.

        :raise HostLostError: the connection breaks.
        :raise HostError: there is none, or the command does not end in time.
        """
        seconds = scaled(seconds)
        try:
            _, out, err = self.client().exec_command(command, timeout=seconds)
            stdout, stderr = out.read(), err.read()
            return out.channel.recv_exit_status(), stdout, stderr
        except TimeoutError as error:
            raise HostError(f"host {self.name}: no answer within {seconds:.0f} s", command=command) from error
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise HostLostError(f"host {self.name}: the connection broke: {error}", command=command) from error

    def as_root(self, command: str) -> str:
        """``command`` as a shell command that runs as root.

        :raise HostError: sudo does not let us, or wants a password.
        """
        if self.spec.user == "root":
            return command
        if not self._may_sudo:
            status, _, stderr = self.run("sudo -n true")
            if status:
                raise HostError(
                    f"host {self.name}: {self.spec.user} cannot become root there",
                    command=self.line("sudo -n true"),
                    tail=tail_of(stderr),
                    hint=NO_PASSWORD.format(user=self.spec.user) + "; or log in as root (`user:`)",
                )
            self._may_sudo = True
        return f"sudo -n -- sh -c {shlex.quote(command)}"

    def line(self, command: str) -> str:
        """``command`` as it could be typed here."""
        return f"ssh -p {self.spec.port} {self.spec.user}@{self.spec.address} {shlex.quote(command)}"

    def put(self, file: Path, target: str) -> None:
        """:raise HostError: the file cannot be copied there."""
        try:
            with contextlib.closing(self.client().open_sftp()) as sftp:
                sftp.put(str(file), target)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise HostError(f"host {self.name}: {file.name} cannot be copied there: {error}") from error

    def channel(self, command: str) -> paramiko.Channel:
        """:raise HostError: no command can be started."""
        try:
            transport = self.client().get_transport()
            if transport is None:
                raise HostError(f"host {self.name}: the connection has ended")
            channel = transport.open_session(timeout=scaled(ANSWER_SECONDS))
            channel.exec_command(command)
        except (paramiko.SSHException, OSError, EOFError) as error:
            raise HostError(f"host {self.name}: no stream to the agent: {error}") from error
        return channel

    def close(self) -> None:
        for ssh in (self._client, self._jump):
            if ssh is not None:
                ssh.close()
        self._client = self._jump = None


class SshTransport(SharedAgent):
    """A machine reached by SSH, with an agent of this lab."""

    shares_files = False
    disposable = False

    def __init__(self, lab: ResolvedLab, host: ResolvedHost, *, may_sudo: bool = False) -> None:
        if not isinstance(host.spec, SshHost):
            raise TypeError(f"host {host.name} is of kind {host.spec.kind}")
        self.host = host
        self.lab = lab
        self.spec = host.spec
        self.connection = Connection(host.name, host.spec, may_sudo=may_sudo)

    @property
    def toolkit(self) -> PurePosixPath:
        return PurePosixPath(self.spec.toolkit or DEFAULT_TOOLKIT)

    def check(self) -> None:
        """:raise HostError: the host does not answer, or does not let us in."""
        self.connection.client()

    def run(self, command: str) -> bytes:
        """Run a shell command as root there; what it printed.

        :raise HostError: it fails, or we cannot become root.
        """
        return self._must(self.connection.as_root(command), command)

    def _must(self, command: str, name: str) -> bytes:
        status, stdout, stderr = self.connection.run(command)
        if status:
            raise HostError(
                f"host {self.host.name}: {name} failed with exit status {status}",
                command=self.connection.line(command),
                tail=tail_of(stderr or stdout),
                hint="orchestrator doctor on that host tells what is missing",
            )
        return stdout

    def _command(self, action: str) -> str:
        """:raise HostError: we cannot become root there."""
        names = [f"--lab={self.lab.lab}", f"--uid={self.lab.uid}", f"--host={self.host.name}"]
        return self._python("orchestrator.agent.remote", action, *names, f"--libvirt={self.spec.libvirt}")

    def _python(self, *words: str) -> str:
        """The command that runs a module of the toolkit there, as root."""
        return self.connection.as_root(shlex.join([str(self.toolkit.parent / "python"), "-P", "-m", *words]))

    def _act(self, action: str) -> bytes:
        """:raise HostError: the action fails there."""
        return self._must(self._command(action), action)

    # -- what is there -------------------------------------------------------------------------------------------

    def _there(self) -> dict[str, Any] | None:
        """What the toolkit there says (``agent.remote facts``); None where there is none that runs."""
        status, stdout, _ = self.connection.run(self._command("facts"))
        try:
            return dict(json.loads(stdout)) if status == 0 else None
        except ValueError:
            return None

    def _difference(self, there: dict[str, Any] | None) -> str | None:
        """Why the toolkit there is not ours. One that the user named is held to be, if its version is."""
        if there is None:
            return f"toolkit: missing → {__version__}"
        if there["version"] != __version__:
            return f"toolkit: {there['version']} → {__version__}"
        ours = None if self.spec.toolkit else our_digest()
        if ours and there.get("toolkit") != ours:
            return f"toolkit: {there.get('toolkit') or 'of unknown origin'} → {ours}"
        return None

    def facts(self) -> HostFacts:
        self.check()
        with contextlib.suppress(HostLostError):  # an agent that runs our toolkit is all that there need be
            if not self._difference(self.agent().call("host.hello")):
                return HostFacts(present=True, agent=True)
        there = self._there()
        problems = [text for text in [self._difference(there)] if text]
        if there is None:
            return HostFacts(problems=tuple(problems))
        if there["agent"] and not there.get("current", True):
            problems.append("the agent runs another toolkit than is installed")
        return HostFacts(
            present=bool(there["present"]),
            agent=bool(there["agent"]),
            problems=tuple(problems),
            outdated=bool(problems),
        )

    # -- the transport -------------------------------------------------------------------------------------------

    def ensure(self, progress: Progress, cancel: threading.Event | None = None) -> None:
        progress("connecting")
        there = self._there()
        if self._difference(there):
            self._install(there, progress)
            there = self._there()
        if there is not None and not there.get("bindings", True):
            raise HostError(
                f"host {self.host.name}: {PYTHON} there has no bindings of libvirt",
                hint=f"apt-get install python3-libvirt; `orchestrator host provision {self.host.name}` installs all "
                "that a lab host needs",
            )
        progress("agent")
        self.start_agent()

    def start_agent(self) -> None:
        self.forget_agent()
        self._act("start")

    def _install(self, there: dict[str, Any] | None, progress: Progress) -> None:
        """:raise HostError: what is there may not be replaced, or the installation fails."""
        if there is not None and self.spec.toolkit:
            raise HostError(
                f"host {self.host.name}: {self.toolkit} is of version {there['version']}, this is {__version__}",
                hint="update it there, or leave `toolkit:` away to have it installed",
            )
        made = bundle(self._python_version(), progress)
        prefix = self.toolkit.parent.parent
        progress(f"installing the toolkit into {prefix}")
        status, stdout, stderr = self.connection.run("mktemp -d")
        folder = stdout.decode(errors="replace").strip()
        if status or not folder:
            raise HostError(f"host {self.host.name}: no temporary folder there", tail=tail_of(stderr))
        try:
            file = f"{folder}/{made.name}"
            self.connection.put(made, file)
            kept = f'"${{ORCHESTRATOR_CACHE:-{CACHE}}}/bundle.pyz"'  # where Ansible's role has it too
            command = self.connection.as_root(
                f"install -D -m 644 {file} {kept} && {shlex.join([PYTHON, file, f'--prefix={prefix}'])}"
            )
            status, stdout, stderr = self.connection.run(command, INSTALL_SECONDS)
        finally:
            with contextlib.suppress(HostError):  # the connection broke, which is said already
                self.connection.run(f"rm -rf {shlex.quote(folder)}")
        if status:
            raise HostError(
                f"host {self.host.name}: the toolkit could not be installed",
                command=self.connection.line(command),
                tail=tail_of(stderr or stdout),
            )

    def _python_version(self) -> str:
        """Version of the Python there, such as 3.13.

        :raise HostError: there is none.
        """
        script = "import sys; print('%d.%d' % sys.version_info[:2])"
        status, stdout, stderr = self.connection.run(shlex.join([PYTHON, "-c", script]))
        if status:
            raise HostError(
                f"host {self.host.name}: there is no {PYTHON}, which the agent needs",
                tail=tail_of(stderr),
                hint=f"`orchestrator host provision {self.host.name}` installs all that a lab host needs",
            )
        return stdout.decode().strip()

    def halt(self, progress: Progress) -> None:
        pass  # it is not ours to power off

    def remove(self, progress: Progress) -> None:
        progress("agent")
        self.forget_agent()
        self._act("remove")

    def stream(self) -> Stream:
        return self.connection.channel(self._python("orchestrator.agent.connect", self.lab.uid, self.host.name))

    def close(self) -> None:
        super().close()
        self.connection.close()
