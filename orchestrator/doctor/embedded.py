"""Open libvirt's embedded driver at the folder that is named, and print as JSON what it says.

A program of its own, because the driver starts threads that nobody ends.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import json
import sys
import threading

import libvirt


def main(root: str, emulator: str) -> None:
    libvirt.registerErrorHandler(lambda *_: None, None)  # errors are raised; printing them too is noise
    libvirt.virEventRegisterDefaultImpl()
    threading.Thread(target=_loop, daemon=True).start()
    said: dict[str, object] = {}
    try:
        connection = libvirt.open(f"qemu:///embed?root={root}")
        said["library"] = connection.getLibVersion()
        said["emulator"] = connection.getVersion()
        connection.getDomainCapabilities(emulator, None, "q35", "qemu")
    except libvirt.libvirtError as error:
        said["error"] = error.get_error_message()
    sys.stdout.write(json.dumps(said))


def _loop() -> None:
    while True:
        libvirt.virEventRunDefaultImpl()


if __name__ == "__main__":
    main(*sys.argv[1:])
