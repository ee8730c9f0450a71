"""Ansible inside a folder that a system is being installed into: the same roles that are played on machines by SSH.

The Ansible of the Python that we run in is lent to the new system, which must have a Python of the same version for
that; it is gone again afterwards. Where that cannot be, the roles are played when the machine runs.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
import shutil
import sys
from importlib import metadata
from pathlib import Path

from orchestrator import paths
from orchestrator.hosts import roles

_NAME = re.compile(r"[A-Za-z0-9._-]+")
_FOLDER = "tmp/roles"


def hooks(work: Path) -> list[str]:
    """Shell commands that play the roles on the system in the folder ``$1``, and leave the mark that they were; none
    where there is no Ansible.

    :param work: a folder for what is lent.
    """
    lent = work / "lent"
    try:
        for distribution in _with_requirements("ansible-core"):
            _copy(distribution, lent / "site")
    except metadata.PackageNotFoundError:
        return []
    shutil.copytree(paths.ansible(), lent / "ansible")
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    play = (
        f"env PYTHONPATH=/{_FOLDER}/site ANSIBLE_CONFIG=/{_FOLDER}/ansible/ansible.cfg ANSIBLE_HOME=/{_FOLDER}/home"
    )
    play += f" SYSTEMD_OFFLINE=1 LC_ALL=C.UTF-8 {python} -m ansible playbook -i localhost, /{_FOLDER}/ansible/box.yml"
    mark = f"mkdir -p $1{roles.MARK.parent} && echo {roles.digest()} > $1{roles.MARK}"
    there = f'"$1/{_FOLDER}"'
    return [
        f'if [ -e "$1/usr/bin/{python}" ]; then cp -r {lent} {there} && chroot "$1" {play} && {mark}; fi',
        f"rm -rf {there}",
    ]


def _with_requirements(name: str) -> list[metadata.Distribution]:
    """A Python package and all that it needs here.

    :raise importlib.metadata.PackageNotFoundError: it is not installed.
    """
    found: dict[str, metadata.Distribution] = {}
    queue = [name]
    while queue:
        distribution = metadata.distribution(queue.pop())
        if distribution.metadata["Name"] in found:
            continue
        found[distribution.metadata["Name"]] = distribution
        for requirement in distribution.requires or ():
            if ";" not in requirement and (wanted := _NAME.match(requirement)):
                queue.append(wanted[0])
    return list(found.values())


def _copy(distribution: metadata.Distribution, site: Path) -> None:
    for file in distribution.files or ():
        if ".." not in file.parts and file.suffix != ".pyc":
            target = site / file
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(str(distribution.locate_file(file)), target)
