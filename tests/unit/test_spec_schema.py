"""The JSON schema and the reference page describe the lab file as the loader reads it."""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic_core import PydanticUndefined
from ruamel.yaml import YAML

from orchestrator.errors import SpecError
from orchestrator.guests.model import DiskSpec, GuestSpec, MemorySpec, VcpuSpec
from orchestrator.hosts.model import HostDisk, LocalHost, SshHost, Underlay, VagrantHost
from orchestrator.images.model import ImageSpec
from orchestrator.spec.base import Part, format_size
from orchestrator.spec.load import load
from orchestrator.spec.model import LabSpec
from orchestrator.spec.schema import schema
from orchestrator.switch.model import NetworkSpec, NicSpec, RuleSpec

TOP = Path(__file__).parents[2]
PAGE = (TOP / "docs" / "lab-file.md").read_text()

#: Heading of the reference page → what its table describes.
TABLES: dict[str, type[Part]] = {
    "The file": LabSpec,
    "Hosts of kind `local`": LocalHost,
    "Hosts of kind `ssh`": SshHost,
    "Hosts of kind `vagrant`": VagrantHost,
    "Disks of a Vagrant host": HostDisk,
    "The underlay": Underlay,
    "Networks": NetworkSpec,
    "Rules": RuleSpec,
    "Images": ImageSpec,
    "Guests": GuestSpec,
    "Memory": MemorySpec,
    "Processors": VcpuSpec,
    "NICs": NicSpec,
    "Disks": DiskSpec,
}

#: What the examples of the page that are parts of a lab lie over.
FRAME = """\
lab: frame
hosts: {alpha: {}, beta: {}}
networks: {lan: {ipv4: 10.10.0.0/24}}
"""


def read(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(text)


def complaints(text: str) -> list[str]:
    return [error.json_path for error in Draft202012Validator(schema()).iter_errors(read(text))]


def examples() -> list[str]:
    return re.findall(r"^```yaml\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


# --- the schema


def test_schema_is_one() -> None:
    made = schema()
    Draft202012Validator.check_schema(made)
    assert made["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert made["title"]
    assert made["description"]
    assert set(made["properties"]) == {"include", "defaults", *LabSpec.model_fields}


def test_schema_knows_every_model() -> None:
    assert set(schema()["$defs"]) == {
        "Variable",
        *(model.__name__ for model in TABLES.values() if model is not LabSpec),
    }


@pytest.mark.parametrize("model", TABLES.values())
def test_every_field_is_described(model: type[Part]) -> None:
    made = schema()
    properties = made["properties"] if model is LabSpec else made["$defs"][model.__name__]["properties"]
    assert set(model.model_fields) <= set(properties)
    assert all(properties[name].get("description") for name in model.model_fields)


def test_schema_holds_no_markup_of_python() -> None:
    assert "``" not in str(schema())
    assert ":class:" not in str(schema())


def test_schema_takes_the_examples() -> None:
    files = [path.read_text() for path in TOP.glob("examples/*.yaml")]
    assert [found for text in (*examples(), *files) if (found := complaints(text))] == []


@pytest.mark.parametrize(
    "text",
    [
        "hosts: {a: , b: {}}\nnetworks:\nguests: {g: }\ndefaults: {guest: , host: }\ninclude:\n",
        "include: one.yaml",
        "hosts: {a: {kind: ssh, address: a, port: '${PORT}'}}",
        "guests: {g: {memory: '${MEM:-1G}', vcpus: '${CPUS}', nics: ['${NET}'], accel: '${ACCEL}'}}",
        "guests: {g: {memory: {max: 1G}, ready: null}}",
        "defaults: {host: {port: 22, address: a.example}, network: {mtu: 1400}, guest: {vcpus: {max: 2}}}",
    ],
)
def test_schema_takes_what_may_be_written(text: str) -> None:
    assert complaints(text) == []


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("network: {}", "$"),
        ("hosts: {A: {}}", "$.hosts"),
        ("hosts: {a: {bogus: 1}}", "$.hosts.a"),
        ("networks: {n: {mtu: 5}}", "$.networks.n"),
        ("guests: {g: {memory: 256}}", "$.guests.g"),
        ("guests: {g: {nics: [{ipv4: 10.0.0.1}]}}", "$.guests.g"),
        ("guests: {g: {vcpus: {count: 0}}}", "$.guests.g"),
        ("defaults: {guests: {}}", "$.defaults"),
        ("defaults: {guest: {memroy: 1G}}", "$.defaults.guest"),
        ("include: [1]", "$.include"),
    ],
)
def test_schema_refuses(text: str, place: str) -> None:
    assert complaints(text) == [place]


# --- the page


@pytest.mark.parametrize("heading", TABLES)
def test_table_of_the_page_is_complete(heading: str) -> None:
    section = re.search(rf"^##+ {re.escape(heading)}$(.*?)(?=^##|\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert section
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^| ]*) *\|", section[1], re.MULTILINE))
    assert rows == {name: told(field.default) for name, field in TABLES[heading].model_fields.items()}


def told(default: Any) -> str:
    """A field's default as the page's tables have it."""
    if default is PydanticUndefined:
        return "required"
    if isinstance(default, MemorySpec):
        return f"`{format_size(default.size)}`"
    if isinstance(default, VcpuSpec):
        return f"`{default.count}`"
    if type(default) is int and default >= 1 << 20:  # no field but a size has so large a default
        return f"`{format_size(default)}`"
    if default in (None, "", [], {}) or isinstance(default, Part):
        return ""
    return f"`{str(default).lower()}`"


def test_examples_of_the_page_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("frame.yaml").write_text(FRAME)
    for text in examples():
        name = re.match(r"# file: (\S+)", text)
        file = Path(name[1] if name else "example.yaml")
        file.write_text(text)
        if "lab" not in read(text):
            Path("lab.yaml").write_text(f"include: [frame.yaml, {file}]\n")
            file = Path("lab.yaml")
        assert load(file, environ={}).spec.hosts


def test_problems_on_the_page_are_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = re.search(r"^```\n(lab\.yaml:.*?)\n```", PAGE, re.MULTILINE | re.DOTALL)
    assert shown
    Path("lab.yaml").write_text(
        "lab: t\nhosts: {a: }\nguests:\n  web:\n    memory: 256\n    imgae: debian\n    host: a\n"
    )
    with pytest.raises(SpecError) as caught:
        load(Path("lab.yaml"))
    assert str(caught.value) == shown[1]


@pytest.mark.parametrize("file", sorted(TOP.glob("examples/*.yaml")), ids=lambda path: path.stem)
def test_examples_are_right(file: Path) -> None:
    assert load(file, environ={}).spec.lab
