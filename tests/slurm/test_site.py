"""The site file: what it gives, where it is found, and what is said of mistakes in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from potamos.slurm.site import Site, SiteContainer, SiteError, load_site, read_site, site_path

WHOLE = """\
prologue:
  - module load cuda/12.8
  - source "$HOME/my venv/bin/activate"
python: /shared/venv/bin/python
partition: gpu
account: proj-1
qos: high
constraint: h100&ib
environment: {NCCL_SOCKET_IFNAME: ib0, NCCL_DEBUG: 1, FLAG: no, EMPTY: ""}
shared: [/home, /scratch]
container: {kind: pyxis, mounts: [/scratch, "/data:/mnt"], arguments: [--container-writable], python: python3.12}
"""


def test_a_whole_file():
    assert read_site(WHOLE, Path("site.yaml")) == Site(
        prologue=("module load cuda/12.8", 'source "$HOME/my venv/bin/activate"'),
        python="/shared/venv/bin/python",
        partition="gpu",
        account="proj-1",
        qos="high",
        constraint="h100&ib",
        environment={"NCCL_SOCKET_IFNAME": "ib0", "NCCL_DEBUG": "1", "FLAG": "no", "EMPTY": ""},
        shared=(Path("/home"), Path("/scratch")),
        container=SiteContainer("pyxis", ("/scratch", "/data:/mnt"), ("--container-writable",), "python3.12"),
    )


def test_a_prologue_may_be_a_block_of_text():
    text = "prologue: |\n  module purge\n\n  module load cuda\n"
    assert read_site(text, Path("site.yaml")).prologue == ("module purge", "module load cuda")


@pytest.mark.parametrize("text", ["", "# nothing yet\n", "null\n", "partition:\nshared: ~\n"])
def test_what_is_not_set_is_left_to_the_cluster(text: str):
    assert read_site(text, Path("site.yaml")) == Site()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "python: x\npartitoin: gpu\n",
            r"s\.yaml:2: partitoin: unknown key; did you mean `partition`\?",
        ),
        ("container:\n  kind: docker\n", r"s\.yaml:2: container\.kind: 'docker' is none of pyxis, apptainer"),
        ("container: {mount: [/a]}\n", r"s\.yaml:1: container\.mount: unknown key; did you mean `mounts`\?"),
        ("container: pyxis\n", r"s\.yaml:1: container: expected keys and values"),
        ("- partition\n", r"s\.yaml:1: a site file: expected keys and values"),
        ("partition: a\nqos: b\npartition: c\n", r"s\.yaml:3: partition: given twice"),
        ("partition: [a, b]\n", r"s\.yaml:1: partition: expected text"),
        ("partition: ''\n", r"s\.yaml:1: partition: is empty"),
        ("shared: /home\n", r"s\.yaml:1: shared: expected a list, as in \[a, b\]"),
        ("shared: [home]\n", r"s\.yaml:1: shared: 'home' is relative; give the whole path"),
        ("environment:\n  A: 1\n  B C: 2\n", r"s\.yaml:3: environment: 'B C' is no name of a variable"),
        ("environment: {A: [1]}\n", r"s\.yaml:1: environment\.A: expected text"),
        ("a: [\n", r"s\.yaml:2: not valid YAML"),
        ("a: !!python/object:os.system x\n", r"s\.yaml:1: a: unknown key"),
        ("[a]: b\n", r"s\.yaml:1: None: unknown key"),
    ],
)
def test_mistakes_name_file_line_and_key(text: str, message: str):
    with pytest.raises(SiteError, match=message):
        read_site(text, Path("s.yaml"))


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.delenv("POTAMOS_SITE", raising=False)


def test_where_the_file_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert site_path() == tmp_path / ".config/potamos/site.yaml"
    monkeypatch.setenv("XDG_CONFIG_HOME", "relative")  # to be ignored, says the specification of these folders
    assert site_path() == tmp_path / ".config/potamos/site.yaml"
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "c"))
    assert site_path() == tmp_path / "c/potamos/site.yaml"
    monkeypatch.setenv("POTAMOS_SITE", str(tmp_path / "s.yaml"))
    assert site_path() == tmp_path / "s.yaml"


def test_a_site_file_is_optional_but_a_named_one_must_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert load_site() == Site()
    monkeypatch.setenv("POTAMOS_SITE", str(tmp_path / "none.yaml"))
    with pytest.raises(SiteError, match=r"none\.yaml: there is no such site file"):
        load_site()
    (tmp_path / "none.yaml").write_text("partition: gpu\n")
    assert load_site().partition == "gpu"
    assert load_site().source == tmp_path / "none.yaml"


def test_what_cannot_be_read(tmp_path: Path):
    with pytest.raises(SiteError, match="cannot be read: Is a directory"):
        load_site(tmp_path)
    (tmp_path / "s.yaml").write_bytes(b"partition: \xff\n")
    with pytest.raises(SiteError, match="not text in UTF-8"):
        load_site(tmp_path / "s.yaml")
