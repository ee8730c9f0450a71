"""eBPF by way of libbpf: programs and maps of an object file, and those that run already.

libbpf is what every distribution has (iproute2 needs it), and it is called through :mod:`ctypes`: nothing is compiled
on a host. Nothing is pinned either: a program lives as long as the filters that call it, and its maps live as long as
it does; who comes later finds both by the filter (:func:`maps_of`).
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from orchestrator.errors import NetworkError

ANY, EXIST, LOCKED = 0, 2, 4  # flags of bpf_map_update_elem()
_PER_CPU = {5, 6, 10, 21}  # map types with a value for each CPU (enum bpf_map_type)
_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_LIBRARY = "libbpf.so.1"


class BpfError(NetworkError):
    """The kernel, or libbpf, refuses."""

    def __init__(self, message: str, number: int = 0, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.number = number


_be_silent = _PRINT(lambda level, text, arguments: 0)


@functools.cache
def _library() -> ctypes.CDLL:
    """:raise BpfError: there is no libbpf."""
    try:
        library = ctypes.CDLL(_LIBRARY, use_errno=True)
    except OSError as error:
        raise BpfError(f"{_LIBRARY} cannot be loaded: {error}", hint="apt-get install libbpf1") from error
    pointer, integer, name = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    for function, result, arguments in (
        ("bpf_object__open_file", pointer, [name, pointer]),
        ("bpf_object__load", integer, [pointer]),
        ("bpf_object__close", None, [pointer]),
        ("bpf_object__find_program_by_name", pointer, [pointer, name]),
        ("bpf_object__find_map_by_name", pointer, [pointer, name]),
        ("bpf_program__fd", integer, [pointer]),
        ("bpf_map__fd", integer, [pointer]),
        ("bpf_map__reuse_fd", integer, [pointer, integer]),
        ("bpf_map_update_elem", integer, [integer, pointer, pointer, ctypes.c_uint64]),
        ("bpf_map_lookup_elem", integer, [integer, pointer, pointer]),
        ("bpf_map_delete_elem", integer, [integer, pointer]),
        ("bpf_map_get_next_key", integer, [integer, pointer, pointer]),
        ("bpf_prog_get_fd_by_id", integer, [ctypes.c_uint32]),
        ("bpf_map_get_fd_by_id", integer, [ctypes.c_uint32]),
        ("bpf_obj_get_info_by_fd", integer, [integer, pointer, pointer]),
        ("bpf_prog_test_run_opts", integer, [integer, pointer]),
        ("libbpf_num_possible_cpus", integer, []),
    ):
        entry = getattr(library, function)
        entry.restype, entry.argtypes = result, arguments
    library.libbpf_set_print(_be_silent)
    return library


def _checked(result: int, what: str) -> int:
    """:raise BpfError: ``result`` is negative; libbpf then gives the error number, negated or in errno."""
    if result < 0:
        number = -result if result != -1 else ctypes.get_errno()
        hint = "it takes root, or CAP_BPF and CAP_NET_ADMIN" if number in (errno.EPERM, errno.EACCES) else None
        raise BpfError(f"{what}: {os.strerror(number)}", number, hint)
    return result


def _info(fd: int) -> bytes:
    """What the kernel says of a program or map: ``struct bpf_prog_info`` or ``struct bpf_map_info``."""
    buffer = ctypes.create_string_buffer(512)
    size = ctypes.c_uint32(len(buffer))
    _checked(_library().bpf_obj_get_info_by_fd(fd, buffer, ctypes.byref(size)), "a BPF object cannot be looked at")
    return buffer.raw


class Map:
    """A map of the kernel. Keys and values are bytes; of a map with a value for each CPU, a value is a list."""

    def __init__(self, fd: int, name: str) -> None:
        """:param fd: belongs to the map from now on."""
        self.fd = fd
        self.name = name
        kind, _, self.key_size, self.value_size, self.max_entries = struct.unpack_from("<5I", _info(fd))
        self._copies = _checked(_library().libbpf_num_possible_cpus(), "CPUs") if kind in _PER_CPU else 0
        self._stride = (self.value_size + 7) // 8 * 8 if self._copies else self.value_size

    def close(self) -> None:
        os.close(self.fd)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.key_size, self.value_size, self.max_entries

    def set(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        """:param value: of a map with a value for each CPU: the same for all.

        :raise BpfError: the map is full, or the kernel refuses.
        """
        self._check(key, value)
        raw = value.ljust(self._stride, b"\0") * self._copies if self._copies else value
        result = _library().bpf_map_update_elem(self.fd, key, raw, flags)
        if result < 0 and -result == errno.E2BIG:
            raise BpfError(f"the table {self.name!r} is full: it has {self.max_entries} entries", errno.E2BIG)
        _checked(result, f"table {self.name!r} cannot be changed")

    def get(self, key: bytes) -> bytes | None:
        """The value of a map with one value for all CPUs."""
        found = self._read(key)
        return found if found is None else found[: self.value_size]

    def each(self, key: bytes) -> list[bytes]:
        """The values of all CPUs; none where there is no such key."""
        found = self._read(key) or b""
        return [found[at : at + self.value_size] for at in range(0, len(found), self._stride)]

    def delete(self, key: bytes) -> None:
        """Delete an entry, if it is there."""
        self._check(key, None)
        result = _library().bpf_map_delete_elem(self.fd, key)
        if result != -errno.ENOENT:
            _checked(result, f"table {self.name!r} cannot be changed")

    def all_keys(self) -> list[bytes]:
        """Every key. Where others change the map meanwhile a key may be missing; none comes twice."""
        found: dict[bytes, None] = {}
        before: bytes | None = None
        buffer = ctypes.create_string_buffer(self.key_size)
        while _library().bpf_map_get_next_key(self.fd, before, buffer) == 0 and len(found) <= self.max_entries:
            before = buffer.raw
            found[before] = None
        return list(found)

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        for key in self.all_keys():
            if (value := self.get(key)) is not None:
                yield key, value

    def _read(self, key: bytes) -> bytes | None:
        self._check(key, None)
        buffer = ctypes.create_string_buffer(max(1, self._stride * max(1, self._copies)))
        result = _library().bpf_map_lookup_elem(self.fd, key, buffer)
        if result == -errno.ENOENT:
            return None
        _checked(result, f"table {self.name!r} cannot be read")
        return buffer.raw

    def _check(self, key: bytes, value: bytes | None) -> None:
        if len(key) != self.key_size or (value is not None and len(value) != self.value_size):
            raise ValueError(f"table {self.name}: a key of {len(key)} and a value of {len(value or b'')} bytes")


class Object:
    """The programs and maps of an object file, loaded into the kernel.

    :param reuse: maps that are there already, by name, in place of the file's own.
    :raise BpfError: it cannot be loaded.
    """

    def __init__(self, file: Path, reuse: Mapping[str, Map] | None = None) -> None:
        library = _library()
        self._object = library.bpf_object__open_file(str(file).encode(), None)
        if not self._object:
            raise BpfError(f"{file} cannot be opened: {os.strerror(ctypes.get_errno())}", ctypes.get_errno())
        try:
            for name, there in (reuse or {}).items():
                place = library.bpf_object__find_map_by_name(self._object, name.encode())
                _checked(library.bpf_map__reuse_fd(place, there.fd), f"map {name} cannot be taken over")
            _checked(library.bpf_object__load(self._object), f"{file.name} cannot be loaded into the kernel")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Object:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of it; programs that filters call, and their maps, stay."""
        if self._object:
            _library().bpf_object__close(self._object)
            self._object = None

    def program(self, name: str) -> int:
        """A file descriptor of a program, for the caller to close."""
        found = _library().bpf_object__find_program_by_name(self._object, name.encode())
        return os.dup(_checked(_library().bpf_program__fd(found), f"program {name}"))

    def map(self, name: str) -> Map:
        """The map, with a file descriptor of its own."""
        found = _library().bpf_object__find_map_by_name(self._object, name.encode())
        return Map(os.dup(_checked(_library().bpf_map__fd(found), f"map {name}")), name)


def program_by_id(number: int) -> int:
    """A file descriptor of a program that runs, for the caller to close.

    :raise BpfError: it has gone.
    """
    return _checked(_library().bpf_prog_get_fd_by_id(number), f"BPF program {number}")


def tag_of(program: int) -> str:
    """The kernel's digest of a program's instructions: equal for programs that do the same with the same maps' shape.

    Source: ``Documentation/bpf`` and ``struct bpf_prog_info`` in the kernel's uapi header.
    """
    return _info(program)[8:16].hex()


def maps_of(program: int) -> dict[str, Map]:
    """The maps that a program uses, by name (the kernel keeps 15 characters of it)."""
    ids = (ctypes.c_uint32 * 64)()
    request = bytearray(512)
    struct.pack_into("<IQ", request, 52, len(ids), ctypes.addressof(ids))
    buffer = ctypes.create_string_buffer(bytes(request), len(request))
    size = ctypes.c_uint32(len(request))
    _checked(_library().bpf_obj_get_info_by_fd(program, buffer, ctypes.byref(size)), "a BPF program")
    (count,) = struct.unpack_from("<I", buffer.raw, 52)
    found = {}
    for number in ids[: min(count, len(ids))]:
        fd = _checked(_library().bpf_map_get_fd_by_id(number), f"BPF map {number}")
        name = _info(fd)[24:40].partition(b"\0")[0].decode()
        found[name] = Map(fd, name)
    return found


_RUN = struct.Struct("<Q QQ II QQ II IIIIII")  # struct bpf_test_run_opts of libbpf 1.0
_CONTEXT = 192  # size of struct __sk_buff


def run(
    program: int, frame: bytes, *, ifindex: int, mark: int = 0, gso: tuple[int, int] = (0, 0)
) -> tuple[int, bytes]:
    """Run a tc program over one frame without any NIC (``BPF_PROG_TEST_RUN``): its verdict, and the frame after it.

    :param ifindex: the link that the frame comes in by, or goes out by; it must be there.
    :param gso: segments and bytes per segment of a frame that is to be segmented.
    :raise BpfError: the kernel refuses; it takes no frame below 14 bytes.
    """
    context = bytearray(_CONTEXT)
    struct.pack_into("<I", context, 8, mark)
    struct.pack_into("<I", context, 40, ifindex)
    struct.pack_into("<I", context, 164, gso[0])
    struct.pack_into("<I", context, 176, gso[1])
    given = ctypes.create_string_buffer(frame, len(frame))
    after = ctypes.create_string_buffer(len(frame) + 512)
    around = (ctypes.c_char * _CONTEXT).from_buffer(context)
    data_in, data_out, context_in = map(ctypes.addressof, (given, after, around))
    options = ctypes.create_string_buffer(
        _RUN.pack(
            *(_RUN.size, data_in, data_out, len(frame), len(after)),
            *(context_in, 0, _CONTEXT, 0),
            *(0, 1, 0, 0, 0, 0),
        ),
        _RUN.size,
    )
    _checked(_library().bpf_prog_test_run_opts(program, options), "the program cannot be run")
    size, verdict = struct.unpack_from("<I", options.raw, 28)[0], struct.unpack_from("<i", options.raw, 56)[0]
    return verdict, after.raw[:size]
