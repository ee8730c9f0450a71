"""The lab file loader: what is right is read, what is wrong is told with its place.

Each ``data/spec/NAME.lab`` is wrong in some way and ``NAME.err`` is what the loader says of it. The files are
not named ``.yaml`` because some are not YAML, which linters need not tell us.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import io
import json
import os
import re
import string
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from orchestrator.errors import Place, SpecError, from_wire
from orchestrator.spec.load import LoadedLab, load
from orchestrator.spec.model import LabSpec
from orchestrator.spec.resolve import resolve
from tests.unit.labs import EXAMPLES

DATA = Path(__file__).parent / "data" / "spec"

#: Write the expected texts anew, to be read before they are kept.
UPDATE = "UPDATE_EXPECTED" in os.environ

BASE = "lab: t\nhosts: {a: {}}\n"

Load = Callable[..., LoadedLab]


@pytest.fixture
def load_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """Loads a text as ``lab.yaml`` in a folder of its own, with other files beside it."""
    monkeypatch.chdir(tmp_path)

    def load_it(text: str, environ: dict[str, str] | None = None, **files: str) -> LoadedLab:
        for name, content in files.items():
            Path(f"{name}.yaml").write_text(content)
        Path("lab.yaml").write_text(text)
        return load(Path("lab.yaml"), environ=environ or {})

    return load_it


# --- what is wrong


@pytest.mark.parametrize("name", sorted(path.stem for path in DATA.glob("*.lab")))
def test_wrong_file_is_reported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(DATA)
    with pytest.raises(SpecError) as caught:
        load(Path(f"{name}.lab"), environ={})
    text = str(caught.value) + "\n"
    expected = Path(f"{name}.err")
    if UPDATE:
        expected.write_text(text)
    assert text == expected.read_text()
    assert caught.value.problems


def test_missing_file_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SpecError) as caught:
        load(Path("lab.yaml"))
    assert (caught.value.message, caught.value.hint) == ("lab.yaml: no such file", "name the lab file with -f")
    Path("labs.yaml").touch()
    Path("zoo.yml").touch()
    with pytest.raises(SpecError) as caught:
        load(Path("lab.yaml"))
    assert caught.value.hint == "did you mean 'labs.yaml'?"
    assert caught.value.problems == ()


def test_folder_is_no_lab_file(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").touch()
    with pytest.raises(SpecError, match="is a folder, not a file") as caught:
        load(tmp_path)
    assert caught.value.hint == f"did you mean '{tmp_path / 'lab.yaml'}'?"


def test_unreadable_file(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").touch()
    with pytest.raises(SpecError, match="cannot be read: Not a directory"):
        load(tmp_path / "lab.yaml" / "lab.yaml")


def test_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").symlink_to("lab.yaml")
    with pytest.raises(SpecError, match="cannot be read: Too many levels of symbolic links"):
        load(tmp_path / "lab.yaml")


def test_large_file(tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text("#" * (1 << 20) + "\n")
    with pytest.raises(SpecError, match="larger than 1 MiB"):
        load(tmp_path / "lab.yaml")


def test_includes_too_deep(load_text: Load) -> None:
    chain = {f"f{i}": f"include: f{i + 1}.yaml" for i in range(20)}
    with pytest.raises(SpecError, match=r"f14.yaml:1:10: include: .*includes deeper than 16"):
        load_text(BASE + "include: f0.yaml", **chain)


def test_too_many_includes(load_text: Load) -> None:
    with pytest.raises(SpecError, match="more than 256 files"):
        load_text(BASE + f"include: [{'f.yaml, ' * 300}]", f="networks:")


def test_values_of_all_files_are_counted_together(load_text: Load) -> None:
    content = f"x: &a [{'1, ' * 100}]\ny: [{'*a, ' * 100}]\n"
    with pytest.raises(SpecError, match=r"f\.yaml:.*more than 100000 values"):
        load_text(BASE + f"include: [{'f.yaml, ' * 10}]", f=content)


def test_unprintable_text_is_not_sent_to_the_terminal(load_text: Load) -> None:
    with pytest.raises(SpecError) as caught:
        load_text("lab: t\nhosts: {a: {}, \x1b[31mred: {}}\n")
    assert "\x1b" not in str(caught.value)
    assert (caught.value.problems[0].place.line, caught.value.problems[0].place.column) == (2, 16)


def test_long_line_is_cut_around_the_place(load_text: Load) -> None:
    with pytest.raises(SpecError) as caught:
        load_text(BASE + f"description: [{'x' * 500}]\nnetworks: {{{'n' * 32}: {{}}, {' ' * 500} b: {{mtu: 1}}}}\n")
    header, source, caret, *_ = str(caught.value.problems[1]).splitlines()
    assert header.startswith("lab.yaml:4:")
    assert len(source) < 120
    assert source[caret.index("^")] == "1"


def test_many_problems_are_cut_in_the_message_only(load_text: Load) -> None:
    with pytest.raises(SpecError) as caught:
        load_text(BASE + "".join(f"k{i}: 1\n" for i in range(60)))
    assert len(caught.value.problems) == 60
    assert caught.value.message.splitlines()[-1] == "... and 10 more problems"


def test_error_survives_the_wire(load_text: Load) -> None:
    with pytest.raises(SpecError) as caught:
        load_text(BASE + "network: {}\nlab: u\n")
    received = from_wire(json.loads(json.dumps(caught.value.to_wire())))
    assert isinstance(received, SpecError)
    assert (received.message, received.problems) == (caught.value.message, caught.value.problems)
    assert received.problems[0].place == Place(Path("lab.yaml"), 3, 1)


@pytest.mark.parametrize("problems", [None, 5, [5], [{}], [{"place": {}}], {"a": 1}])
def test_damaged_problems_of_a_peer_leave_the_message(problems: object) -> None:
    received = from_wire({"kind": "SpecError", "message": "lab.yaml: wrong", "problems": problems})
    assert isinstance(received, SpecError)
    assert (received.message, received.problems) == ("lab.yaml: wrong", ())


# --- what is right


def test_values_and_places(load_text: Load) -> None:
    lab = load_text(
        "lab: t\n"
        "hosts:\n"
        "  a: {}\n"
        "networks:\n"
        "  lan: {ipv4: 10.10.0.0/24}\n"
        "guests:\n"
        "  web:\n"
        "    host: a\n"
        "    nics:\n"
        "      - lan\n"
        "      - network: lan\n"
        "        ipv4: 10.10.0.7\n"
    )
    assert lab.file == Path("lab.yaml").absolute()
    assert str(lab.spec.guests["web"].nics[1].ipv4) == "10.10.0.7"
    place = Path("lab.yaml")
    assert lab.place_of("guests", "web", "nics", 1, "ipv4") == Place(place, 12, 15)
    assert lab.place_of("guests", "web", "nics", 0) == Place(place, 10, 9)
    assert lab.place_of("guests", "web", "nics", 0, "ipv4") == Place(place, 10, 9)  # written in the short form
    assert lab.place_of("guests", "web", "nics", -1) == Place(place, 9, 5)
    assert lab.place_of("guests", "web", "memory") == Place(place, 7, 3)
    assert lab.place_of("images", "x", "url") == lab.place_of() == Place(place, 1, 1)
    assert lab.places["guests", "web", "nics", 1, "ipv4"] == Place(place, 12, 15)


def test_problem_of_a_later_stage(load_text: Load) -> None:
    lab = load_text("lab: t\nhosts: {a: {}}\ndefaults: {guest: {memory: 1G}}\nguests: {web: {host: a}}\n")
    problem = lab.problem("guests", "web", "memory", message="the host has less", hint="take less")
    assert str(problem) == (
        "lab.yaml:3:28: defaults.guest.memory: the host has less\n"
        "    3 | defaults: {guest: {memory: 1G}}\n"
        "      |                            ^\n"
        "  hint: take less"
    )
    assert SpecError.of([problem]).problems == (problem,)


def test_sections_and_entries_may_be_empty(load_text: Load) -> None:
    lab = load_text("lab: t\nhosts:\n  a:\n  b:\nnetworks:\nguests:\ndefaults:\n  guest:\ninclude:\n")
    assert list(lab.spec.hosts) == ["a", "b"]
    assert lab.spec.networks == {}


def test_defaults_lie_under_every_entry(load_text: Load) -> None:
    spec = load_text(
        BASE + "networks: {lan: , wide: {mtu: 9000}}\n"
        "defaults:\n"
        "  guest: {host: a, memory: {size: 1G, max: 2G}, vcpus: 2, nics: [lan]}\n"
        "  network: {mtu: 1400, uplink: true}\n"
        "guests:\n"
        "  asis:\n"
        "  scalar: {memory: 512M, vcpus: {max: 4}, nics: []}\n"
        "  deep: {memory: {max: 4G}}\n"
    ).spec
    assert (spec.networks["lan"].mtu, spec.networks["wide"].mtu) == (1400, 9000)
    asis, scalar, deep = spec.guests.values()
    assert (asis.host, asis.memory.size, asis.memory.max, asis.vcpus.count) == ("a", 1 << 30, 2 << 30, 2)
    assert (scalar.memory.size, scalar.memory.max) == (512 << 20, None)
    assert (scalar.vcpus.count, scalar.vcpus.max, scalar.nics) == (1, 4, [])
    assert (deep.memory.size, deep.memory.max) == (1 << 30, 4 << 30)


def test_host_defaults_reach_the_kinds_that_have_them(load_text: Load) -> None:
    spec = load_text(
        "lab: t\n"
        "hosts: {a: {}, b: {kind: ssh, address: b.example}, c: {kind: ssh, address: c.example, user: me}}\n"
        "defaults: {host: {user: lab, description: mine}}\n"
    ).spec
    assert spec.hosts["a"].model_dump() == {"kind": "local", "address": None, "description": "mine"}
    assert [spec.hosts[name].model_dump()["user"] for name in "bc"] == ["lab", "me"]


def test_kind_of_host_may_be_a_default(load_text: Load) -> None:
    spec = load_text(
        "lab: t\nhosts: {a: {address: a.example}, b: {kind: local}}\ndefaults: {host: {kind: ssh, port: 2222}}\n"
    ).spec
    assert [host.kind for host in spec.hosts.values()] == ["ssh", "local"]


def test_included_files_lie_below(load_text: Load) -> None:
    lab = load_text(
        "include: [one.yaml, two.yaml]\nlab: t\nhosts: {a: {}}\nnetworks:\nguests: {g: {host: a, cpu: top}}\n",
        one="networks: {lan: {mtu: 1400, ipv4: 10.1.0.0/24}}\nguests: {g: {nics: [lan], cpu: one}}\n",
        two="include: three.yaml\nnetworks: {lan: {mtu: 1300}}\ndefaults: {guest: {memory: 1G}}\n",
        three="networks:\n  lan:\n    mtu: 1200\n    ipv6: fd10::/64\nguests: {g: {nics: [lan, lan]}}\n",
    )
    assert lab.spec.networks["lan"].model_dump(exclude_none=True, exclude_defaults=True, mode="json") == {
        "mtu": 1300,
        "ipv4": "10.1.0.0/24",
        "ipv6": "fd10::/64",
    }
    guest = lab.spec.guests["g"]
    assert (guest.cpu, guest.memory.size, len(guest.nics)) == ("top", 1 << 30, 2)
    assert lab.place_of("networks", "lan", "ipv6") == Place(Path("three.yaml"), 4, 11)
    assert lab.place_of("networks", "lan", "mtu").file == Path("two.yaml")


def test_include_is_relative_to_the_including_file(load_text: Load, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "one.yaml").write_text("include: two.yaml\n")
    (tmp_path / "sub" / "two.yaml").write_text("description: from sub\n")
    assert load_text(BASE + "include: sub/${WHICH}.yaml\n", {"WHICH": "one"}).spec.description == "from sub"


def test_one_file_may_be_included_twice(load_text: Load) -> None:
    assert load_text(BASE + "include: [f.yaml, f.yaml]", f="description: x\n").spec.description == "x"


def test_variables(load_text: Load) -> None:
    spec = load_text(
        "lab: ${LAB}\n"
        "hosts: {a: {kind: ssh, address: '${NAME:-b}.${DOMAIN:-example}', port: '${PORT}'}}\n"
        "networks: {lan: {uplink: '${UP}', mtu: '${MTU}'}}\n"
        "guests:\n"
        "  g:\n"
        "    host: a\n"
        "    vcpus: ${CPUS}\n"
        "    memory: ${MEM:-256M}\n"
        "    cmdline: a=$$1 b=$b ${EMPTY}${EMPTY:-full} ${YAML}\n"
        "    user_data: |\n"
        "      #!/bin/sh\n"
        "      echo ${LAB} $${LAB} $HOME\n",
        {"LAB": "t", "PORT": "2222", "UP": "yes", "MTU": "1400", "CPUS": "3", "EMPTY": "", "YAML": "{a: [1]}"},
    ).spec
    host, guest = spec.hosts["a"], spec.guests["g"]
    assert host.model_dump(include={"address", "port"}) == {"address": "b.example", "port": 2222}
    assert (spec.lab, spec.networks["lan"].uplink, spec.networks["lan"].mtu) == ("t", True, 1400)
    assert (guest.vcpus.count, guest.memory.size) == (3, 256 << 20)
    assert guest.cmdline == "a=$1 b=$b full {a: [1]}"
    assert guest.user_data == "#!/bin/sh\necho t ${LAB} $HOME\n"


def test_variable_with_a_control_character(load_text: Load) -> None:
    with pytest.raises(SpecError, match=r"lab.yaml:3:14: description: the character '\\x07' is not allowed"):
        load_text(BASE + "description: ${BELL}\n", {"BELL": "\a"})


def test_anchors_aliases_and_merge_keys(load_text: Load) -> None:
    spec = load_text(
        BASE + "networks: {lan: &net {ipv4: 10.1.0.0/24, mtu: 1400}, wan: {<<: *net, ipv4: 10.2.0.0/24}}\n"
        "guests:\n"
        "  g: &g {host: a, nics: &n [lan], cpu: one}\n"
        "  h: {cpu: two, <<: [*g, {cpu: three, machine: pc}]}\n"
        "  i: {host: a, nics: *n}\n"
        "  j: &g {host: a}\n"
    ).spec
    assert (spec.networks["wan"].mtu, str(spec.networks["wan"].ipv4)) == (1400, "10.2.0.0/24")
    assert (spec.guests["h"].cpu, spec.guests["h"].machine, spec.guests["h"].host) == ("two", "pc", "a")
    assert spec.guests["i"].nics == spec.guests["g"].nics


@pytest.mark.parametrize(
    ("text", "value"),
    [("0x578", 1400), ("0o2570", 1400), ("+1_400", 1400), ("01400", 1400), ("'1400'", 1400), ("!!int 1400", 1400)],
)
def test_numbers(load_text: Load, text: str, value: int) -> None:
    assert load_text(BASE + f"networks: {{lan: {{mtu: {text}}}}}").spec.networks["lan"].mtu == value


@pytest.mark.parametrize("text", ["2026-01-02", "=", "!!str 5", "yes", "12:30:45", "'~'"])
def test_text(load_text: Load, text: str) -> None:
    assert load_text(BASE + f"description: {text}").spec.description == text.removeprefix("!!str ").strip("'")


def test_escapes_of_json(load_text: Load) -> None:
    assert load_text(json.dumps({"lab": "t", "hosts": {"a": {}}, "description": "😀"})).spec.description == "😀"
    with pytest.raises(SpecError, match=r"the character '\\ud83d' is not allowed"):
        load_text(BASE + 'description: "\\ud83d"')


def test_names_in_hints_are_printable(load_text: Load) -> None:
    with pytest.raises(SpecError) as caught:
        load_text('lab: t\nhosts: {a: {}, "\\e[31m": {}}\nguests: {g: {host: zzz}}\n')
    assert "\x1b" not in str(caught.value)
    assert "hint: known" in str(caught.value)


@pytest.mark.parametrize("text", ["1.5", ".inf", "-.nan", "1e3", "1e999999", "~", "true", "!!int x", "!!float x"])
def test_what_is_no_whole_number(load_text: Load, text: str) -> None:
    with pytest.raises(SpecError, match=r"lab.yaml:3:19: underlay.mtu: .*a whole number"):
        load_text(BASE + f"underlay: {{  mtu: {text}}}")


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_line_ends_and_byte_order_mark(tmp_path: Path, newline: str, mark: str) -> None:
    file = tmp_path / "lab.yaml"
    file.write_bytes((mark + newline.join(["lab: t", "hosts: {a: {}}", "description: 5"])).encode())
    with pytest.raises(SpecError) as caught:
        load(file)
    assert [problem.place for problem in caught.value.problems] == [Place(file, 3, 14)]
    assert caught.value.problems[0].source == "description: 5"


@pytest.mark.parametrize(
    "value",
    [
        "xml: <memoryBacking><locked/></memoryBacking>",
        "xml: <q:commandline xmlns:q='http://libvirt.org/schemas/domain/qemu/1.0'/>",
        "xml: ''",
        "user_data: '#!/bin/sh'",
        "user_data: '#cloud-config'",
        "user_data: 'packages: [vim]'",
        "user_data: '## template: jinja'",
        "ready: 'console:[[]a-z]'",
        "ready: agent",
    ],
)
def test_right_settings_of_a_guest(load_text: Load, value: str) -> None:
    assert load_text(BASE + f"guests:\n  g:\n    host: a\n    {value}\n").spec.guests


def test_ssh_host_needs_no_place_on_the_underlay(load_text: Load) -> None:
    spec = load_text(
        "lab: t\nhosts: {a: {kind: ssh, address: a, underlay: 192.168.7.1}}\nnetworks: {lan: {ipv4: 10.213.0.0/24}}\n"
    ).spec
    assert spec.networks["lan"].ipv4 is not None


# --- whatever comes


def load_bytes(content: bytes, environ: dict[str, str] | None = None) -> LoadedLab:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "lab.yaml"
        file.write_bytes(content)
        return load(file, environ=environ or {})


def check_any(content: bytes) -> None:
    """Loading gives a lab, or a SpecError whose places lie inside the file."""
    lines = re.split("\r\n|\r|\n", content.decode("utf-8-sig", errors="replace"))
    try:
        load_bytes(content)
        return
    except SpecError as caught:
        error = caught
    assert error.problems
    for problem in error.problems:
        assert 1 <= problem.place.line <= len(lines)
        assert problem.source == lines[problem.place.line - 1]
        assert 1 <= problem.place.column <= len(problem.source) + 1
        assert problem.message
        assert str(problem) in error.message or len(error.problems) > 50


#: Text that is often nearly YAML.
yamlish = st.lists(
    st.one_of(
        st.sampled_from(
            [
                *"\n\n\n  --:?,[]{}&*!|>'\"%@`#$~<=\t\r\\",
                ": ",
                "- ",
                "a",
                "<<: ",
                "&a ",
                "*a",
                "!!",
                "${",
                "}",
                "${A}",
                "---\n",
            ]
        ),
        st.sampled_from(
            ["lab", "hosts", "guests", "include", "defaults", "memory", "1", "256M", "\x85", "\ufeff", "\0"]
        ),
        st.text(max_size=3),
    ),
    max_size=30,
).map("".join)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(["a", "10.0.0.0/8", "1G"]),
)
known = st.sampled_from(sorted({*LabSpec.model_fields, *("host", "nics", "memory", "include", "defaults", "a")}))
structures = st.recursive(
    scalars,
    lambda below: st.lists(below, max_size=3) | st.dictionaries(known | st.text(max_size=4), below, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(st.one_of(yamlish, yamlish.map(lambda text: BASE + text), st.text()))
def test_any_text_is_a_lab_or_a_spec_error(text: str) -> None:
    check_any(text.encode(errors="surrogatepass"))


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_a_lab_or_a_spec_error(content: bytes) -> None:
    check_any(content)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(known, structures, max_size=5))
def test_any_structure_is_a_lab_or_a_spec_error(data: dict[str, Any]) -> None:
    check_any(json.dumps({"lab": "t", "hosts": {"a": None}, **data}).encode())


names = st.text(string.ascii_lowercase, min_size=1, max_size=6)
words = st.text(st.characters(categories=["L", "N", "P", "S", "Zs"]), max_size=12)
sizes = st.integers(64, 4096).map(lambda size: f"{size}M")


@st.composite
def labs(draw: st.DrawFn) -> dict[str, Any]:
    """A lab that is right, as the data of its model."""
    hosts: dict[str, Any] = {
        name: draw(
            st.just({"kind": "local"})
            | st.fixed_dictionaries(
                {"kind": st.just("ssh"), "address": names}, optional={"port": st.integers(1, 65535)}
            )
        )
        for name in draw(st.lists(names, min_size=1, max_size=3, unique=True))
    }
    networks = {
        name: {
            "ipv4": draw(st.none() | st.just(f"10.{index}.0.0/16")),
            "ipv6": draw(st.none() | st.just(f"fd{index:02}::/64")),
            "mtu": draw(st.none() | st.integers(1280, 8950)),
            "uplink": draw(st.booleans()),
        }
        for index, name in enumerate(draw(st.lists(names, max_size=3, unique=True)))
    }
    guests: dict[str, Any] = {}
    for number, name in enumerate(draw(st.lists(names, max_size=3, unique=True))):
        nics: list[Any] = []
        for network in draw(st.lists(st.sampled_from(sorted(networks)), max_size=2, unique=True)) if networks else []:
            nic = {"network": network, "model": draw(st.sampled_from(["virtio", "e1000e"]))}
            if networks[network]["ipv4"] and draw(st.booleans()):
                nic["ipv4"] = networks[network]["ipv4"].replace("0/16", str(number + 2))
            nics.append(draw(st.just(nic) | st.just(network)))
        guests[name] = {
            "host": draw(st.sampled_from(sorted(hosts))),
            "image": draw(st.sampled_from(["tiny", "debian"])),
            "memory": draw(sizes | st.fixed_dictionaries({"size": sizes})),
            "vcpus": draw(st.integers(1, 8) | st.just({"count": 2, "max": 4})),
            "nics": nics,
            "disks": [{"name": disk, "size": "1G"} for disk in draw(st.lists(names, max_size=2, unique=True))],
            "description": draw(words),
            "cmdline": draw(words),
        }
    return {"lab": draw(names), "description": draw(words), "hosts": hosts, "networks": networks, "guests": guests}


def as_yaml(data: Any) -> str:
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.width = 1 << 20
    out = io.StringIO()
    yaml.dump(data, out)
    return out.getvalue()


def escaped(data: Any) -> Any:
    """``data`` with its dollar signs doubled, as they are written in a lab file."""
    if isinstance(data, dict):
        return {key: escaped(value) for key, value in data.items()}
    if isinstance(data, list):
        return [escaped(value) for value in data]
    return data.replace("$", "$$") if isinstance(data, str) else data


@settings(max_examples=60, deadline=None)
@given(labs(), st.sampled_from([as_yaml, json.dumps]))
def test_valid_lab_is_read_as_it_was_written(data: dict[str, Any], write: Callable[[Any], str]) -> None:
    spec = LabSpec.model_validate(data)
    assert load_bytes(write(escaped(data)).encode()).spec == spec
    dumped = spec.model_dump(mode="json", exclude_none=True)
    assert load_bytes(write(escaped(dumped)).encode()).spec == spec


def leaves(data: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if isinstance(data, (dict, list)):
        for key, value in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(value, (*keys, key))
    else:
        yield keys


@settings(max_examples=150, deadline=None)
@given(
    labs(),
    st.data(),
    st.sampled_from(["[[1]]", "{x: {y: 1}}", "'\u2603'", "{[a]: b}", "${UNSET_VARIABLE}", "-1", "!x y"]),
)
def test_one_wrong_value_is_reported_in_its_line(lab: dict[str, Any], data: st.DataObject, garbage: str) -> None:
    keys = data.draw(st.sampled_from(list(leaves(lab))))
    free = keys[-1] in ("description", "cmdline") or (keys[0] == "hosts" and keys[-1] == "address")
    assume(not (free and garbage == "'\u2603'"))
    holder = lab
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = "MARK"
    text = as_yaml(escaped(lab))
    line = 1 + text[: text.index("MARK")].count("\n")
    with pytest.raises(SpecError) as caught:
        load_bytes(text.replace("MARK", garbage).encode())
    assert line in [problem.place.line for problem in caught.value.problems]


@pytest.mark.parametrize("file", sorted(EXAMPLES.glob("*.yaml")), ids=lambda file: file.stem)
def test_examples_are_lab_files(file: Path) -> None:
    loaded = load(file)

    assert set(resolve(loaded.spec, loaded.file).guests) == {"ann", "bob", "eve", "dan"}
