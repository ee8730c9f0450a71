"""Bundles: what is in them, how they are made, how they install themselves. pip is a function that writes wheels."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator.errors import CommandError, HostError
from orchestrator.hosts import install, installer

CHECKOUT = Path(__file__).parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
PIN = re.compile(r"^([\w.-]+)==(\S+)", re.MULTILINE)


def pins(text: str) -> dict[str, str]:
    return dict(PIN.findall(text))


# -- what hosts get --------------------------------------------------------------------------------------------------


def test_hosts_get_the_versions_that_the_checkout_has() -> None:
    ours = pins((CHECKOUT / "requirements.lock").read_text())
    theirs = pins((CHECKOUT / install.LOCK).read_text())

    assert theirs.items() <= ours.items()
    assert {"paramiko", "pydantic-core", "pyroute2"} <= set(theirs)
    assert not {"libvirt-python", "pytest", "ansible-core"} & set(theirs)


def test_requirements_lose_markers_and_what_is_for_windows() -> None:
    lock = (
        "cffi==2.0 ; platform_python_implementation != 'PyPy' \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\n"
        "colorama==0.4 ; sys_platform == 'win32' \\\n    --hash=sha256:cc\n"
        "rich==15.0 \\\n    --hash=sha256:dd\n"
    )

    assert install.requirements(lock) == (
        "cffi==2.0 \\\n    --hash=sha256:aa \\\n    --hash=sha256:bb\nrich==15.0 \\\n    --hash=sha256:dd\n"
    )


def test_requirements_of_the_lock_itself_have_a_hash_each_and_no_marker() -> None:
    text = install.requirements((CHECKOUT / install.LOCK).read_text())

    assert ";" not in text
    for pin in text.split("\n\n")[0].split("==")[1:]:
        assert "--hash=sha256:" in pin


# -- making a bundle -------------------------------------------------------------------------------------------------


def wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    file = folder / f"{name}-1-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as out:
        for path, text in files.items():
            out.writestr(path, text)
    return file


class Pip:
    """Stands in for pip: writes one wheel into the folder that it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail: BaseException | None = None
        self.files = {"orchestrator/__init__.py": "", "orchestrator/errors.py": ""}

    def __call__(self, command: list[str | Path], **_: object) -> None:
        words = [str(word) for word in command]
        action = next(word for word in words if word in ("wheel", "download"))
        self.calls.append(action)
        folder = Path(words[words.index("--wheel-dir" if action == "wheel" else "--dest") + 1])
        if self.fail:
            (folder / "half.whl").write_text("")
            raise self.fail
        time.sleep(0.05)
        wheel(folder, *(("orchestrator", self.files) if action == "wheel" else ("rich", {"rich/__init__.py": ""})))


@pytest.fixture
def pip(places: Path, monkeypatch: pytest.MonkeyPatch) -> Pip:
    made = Pip()
    monkeypatch.setattr(install, "run", made)
    return made


def make(python: str = PYTHON) -> Path:
    return install.bundle(python, lambda _: None)


def test_bundle_holds_the_installer_and_what_is_in_every_wheel(pip: Pip) -> None:
    file = make("3.13")

    with zipfile.ZipFile(file) as bundle:
        about = json.loads(bundle.read(installer.ABOUT))
        names = set(bundle.namelist())
        with bundle.open(installer.SITE) as packed, tarfile.open(fileobj=packed) as tar:
            files = {entry.name: (entry.mode, entry.uid) for entry in tar if entry.name.endswith(".py")}
    assert names == {"__main__.py", installer.ABOUT, installer.SITE}
    assert set(files) == {"./orchestrator/__init__.py", "./orchestrator/errors.py", "./rich/__init__.py"}
    assert set(files.values()) == {(0o644, 0)}
    assert about["digest"] == install.our_digest()
    assert file.stem.endswith(about["id"])


def test_bundle_for_our_python_is_compiled_and_what_is_installed_compiles_nothing(pip: Pip, tmp_path: Path) -> None:
    prefix = tmp_path / "opt"
    run(make(), prefix)
    compiled = sorted((prefix / "lib").rglob("*.pyc"))
    before = [(file, file.stat().st_mtime_ns) for file in compiled]
    done = subprocess.run(
        [prefix / "bin/python", "-v", "-P", "-c", "import orchestrator.errors, rich; print(rich.__file__)"],
        capture_output=True,
        text=True,
        check=True,
    )

    assert [file.name.partition(".")[0] for file in compiled] == ["__init__", "errors", "__init__"]
    assert [(file, file.stat().st_mtime_ns) for file in sorted((prefix / "lib").rglob("*.pyc"))] == before
    assert done.stdout.startswith(str(prefix))
    assert len(re.findall(rf"code object from '{prefix}\S+\.pyc'", done.stderr)) == 3


def test_bundle_is_made_once(pip: Pip) -> None:
    first, second = make(), make()

    assert first == second
    assert pip.calls == ["wheel", "download"]


def test_bundles_for_two_pythons_share_the_toolkits_wheel(pip: Pip) -> None:
    make("3.11")
    make("3.13")

    assert pip.calls == ["wheel", "download", "download"]


def test_two_at_once_make_one(pip: Pip) -> None:
    made: list[Path] = []
    threads = [threading.Thread(target=lambda: made.append(make())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(set(made)) == 1
    assert pip.calls == ["wheel", "download"]


@pytest.mark.parametrize("how", [KeyboardInterrupt(), CommandError("pip failed")])
def test_bundle_that_was_not_finished_is_made_anew(pip: Pip, how: BaseException) -> None:
    pip.fail = how
    with pytest.raises((KeyboardInterrupt, HostError)):
        make()
    pip.fail = None

    with zipfile.ZipFile(make()) as bundle:
        assert not [name for name in bundle.namelist() if "half" in name]


def test_leavings_of_a_killed_command_are_removed(pip: Pip, places: Path) -> None:
    left = places / "cache/bundles/.build/wheels/half.whl"
    left.parent.mkdir(parents=True)
    left.write_text("")

    make()

    assert not left.parent.parent.exists()


def test_failure_of_pip_says_who_needs_the_index(pip: Pip) -> None:
    pip.fail = CommandError("pip failed", command="pip download", tail=["no route"])

    with pytest.raises(HostError) as caught:
        make()

    assert caught.value.tail == ("no route",)
    assert "the hosts need none" in str(caught.value.hint)


@pytest.mark.parametrize("version", ["3.10", "2.7", "4", "", "3.x; rm"])
def test_python_that_is_too_old_or_none_is_refused(pip: Pip, version: str) -> None:
    with pytest.raises(HostError, match=r"needs Python 3\.11"):
        make(version)


def test_wheel_that_is_not_simply_unpacked_is_refused(pip: Pip) -> None:
    pip.files = {"orchestrator-1.data/scripts/x": ""}

    with pytest.raises(HostError, match="not simply unpacked"):
        make()


def test_toolkit_that_was_installed_makes_no_bundle(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "_checkout", lambda: None)

    with pytest.raises(HostError, match="installed package"):
        make()


def test_old_bundles_are_forgotten(pip: Pip, monkeypatch: pytest.MonkeyPatch) -> None:
    old = make("3.11")
    monkeypatch.setattr(install, "KEEP_SECONDS", -1)

    new = make("3.12")

    assert new.exists()
    assert not old.exists()


# -- running it ------------------------------------------------------------------------------------------------------

Bundle = Callable[..., Path]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """Makes a bundle of a toolkit that prints its version."""

    def build(version: str = "1", python: str = PYTHON, files: int = 0) -> Path:
        sources = {
            "orchestrator/__init__.py": "",
            "orchestrator/errors.py": "",
            "orchestrator/__main__.py": f"import sys\nprint('{version}', *sys.argv[1:])\n",
            **{f"orchestrator/more{number}.py": "" for number in range(files)},
        }
        about = {"id": version, "version": version, "digest": version, "python": python, "machine": "x86_64"}
        target = tmp_path / f"{version}.pyz"
        install._write(target, about, [wheel(tmp_path, f"orchestrator{version}", sources)])
        return target

    return build


def run(file: Path, prefix: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(file), f"--prefix={prefix}", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def starts(prefix: Path) -> str:
    command = [str(prefix / "bin" / "orchestrator"), "a b"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_install_twice_changes_once(bundle: Bundle, tmp_path: Path) -> None:
    prefix = tmp_path / "with a space"
    said = [run(bundle(), prefix).stdout for _ in range(2)]

    assert said == ["changed\n", "unchanged\n"]
    assert starts(prefix) == "1 a b\n"


def test_check_changes_nothing(bundle: Bundle, tmp_path: Path) -> None:
    said = run(bundle(), tmp_path / "opt", "--check").stdout

    assert said == "changed\n"
    assert not (tmp_path / "opt").exists()


def test_installed_toolkit_knows_its_digest(bundle: Bundle, tmp_path: Path) -> None:
    run(bundle("7"), tmp_path / "opt")
    script = f"import json, sys; print(json.load(open(sys.prefix + '/{installer.ABOUT}'))['digest'])"

    command = [str(tmp_path / "opt/bin/python"), "-c", script]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "7\n"


def test_folder_in_which_it_is_started_does_not_matter(bundle: Bundle, tmp_path: Path) -> None:
    run(bundle(), tmp_path / "opt")
    (tmp_path / "orchestrator").mkdir()
    (tmp_path / "orchestrator/__init__.py").write_text("raise SystemExit('the wrong one')")

    done = subprocess.run([tmp_path / "opt/bin/orchestrator"], cwd=tmp_path, capture_output=True, text=True)

    assert done.stdout == "1\n"


def test_newer_one_replaces_it_and_what_may_still_run_is_kept(bundle: Bundle, tmp_path: Path) -> None:
    prefix = tmp_path / "opt"
    for version in ("1", "2", "3"):
        run(bundle(version), prefix)

    assert starts(prefix) == "3 a b\n"
    assert sorted(path.name for path in (prefix / "lib").iterdir()) == ["2", "3"]


def test_older_one_can_come_back(bundle: Bundle, tmp_path: Path) -> None:
    prefix = tmp_path / "opt"
    for version in ("2", "1"):
        run(bundle(version), prefix)

    assert starts(prefix) == "1 a b\n"


@pytest.mark.parametrize("damage", ["lib/1/lib", "lib/1/bin/python", "bin/python", "bin/orchestrator", "bin", "lib"])
def test_damage_is_repaired(bundle: Bundle, tmp_path: Path, damage: str) -> None:
    prefix = tmp_path / "opt"
    run(bundle(), prefix)
    (prefix / damage).rename(tmp_path / "gone")

    assert run(bundle(), prefix).stdout == "changed\n"
    assert starts(prefix) == "1 a b\n"
    assert run(bundle(), prefix).stdout == "unchanged\n"
    assert [path.name for path in (prefix / "lib").iterdir()] == ["1"]


def test_killed_at_any_moment_it_is_finished_by_the_next(bundle: Bundle, tmp_path: Path) -> None:
    prefix = tmp_path / "opt"
    run(bundle("1"), prefix)
    file = bundle("2", files=300)
    began = time.monotonic()
    run(file, tmp_path / "measure")
    whole = time.monotonic() - began
    for step in range(8):
        process = subprocess.Popen([sys.executable, str(file), f"--prefix={prefix}"], stdout=subprocess.DEVNULL)
        time.sleep(whole * step / 8)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert starts(prefix) in ("1 a b\n", "2 a b\n")

    run(file, prefix)

    assert starts(prefix) == "2 a b\n"
    assert sorted(path.name for path in (prefix / "lib").iterdir()) == ["1", "2"]


def test_two_installations_at_once_do_it_once(bundle: Bundle, tmp_path: Path) -> None:
    file = bundle("1", files=50)
    command = [sys.executable, str(file), f"--prefix={tmp_path / 'opt'}"]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = sorted(process.communicate()[0] for process in both)

    assert said == ["changed\n", "unchanged\n"]
    assert starts(tmp_path / "opt") == "1 a b\n"


def test_bundle_for_another_python_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    done = run(bundle(python="3.99"), tmp_path / "opt")

    assert done.returncode == 1
    assert "for python 3.99" in done.stderr
    assert not (tmp_path / "opt").exists()


def test_place_that_cannot_be_written_is_named(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    done = run(bundle(), tmp_path / "file")

    assert done.returncode == 1
    assert str(tmp_path / "file") in done.stderr
    assert "Traceback" not in done.stderr


def test_bundle_that_is_damaged_leaves_what_was_there(bundle: Bundle, tmp_path: Path) -> None:
    run(bundle("1"), tmp_path / "opt")
    damaged = bundle("2")
    with zipfile.ZipFile(damaged) as good:
        parts = {name: good.read(name) for name in good.namelist()}
    with zipfile.ZipFile(damaged, "w") as bad:
        for name, content in parts.items():
            bad.writestr(name, content[:-100] if name == installer.SITE else content)

    done = run(damaged, tmp_path / "opt")

    assert done.returncode == 1
    assert "cannot be unpacked" in done.stderr
    assert "Traceback" not in done.stderr
    assert starts(tmp_path / "opt") == "1 a b\n"
