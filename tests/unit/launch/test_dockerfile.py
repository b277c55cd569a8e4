"""The image agrees with what starts it and with what the project needs."""

import re
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "launch" / "Dockerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_what_is_copied_exists_and_reaches_the_builder():
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", TEXT, re.M) for name in line.split()]
    assert {"marlhf_mega", "launch", "pyproject.toml"} <= set(copied)
    sent = (ROOT / ".dockerignore").read_text().splitlines()
    for name in copied:
        assert (ROOT / name).exists()
        assert f"!{name}" in sent


def test_kubernetes_starts_this_image_and_finds_the_project_in_it():
    runtime = (ROOT / "launch/kubernetes/runtime.yaml").read_text()
    job = yaml.safe_load((ROOT / "launch/kubernetes/trainjob.yaml").read_text())
    (root,) = (e["value"] for e in job["spec"]["trainer"]["env"] if e["name"] == "MARLHF_ROOT")
    assert f"WORKDIR {root}\n" in TEXT
    built = re.search(r"docker build .* -t (\S+) ", TEXT)[1]
    assert f"image: {built}:latest" in runtime


def test_it_installs_a_megatron_that_the_project_allows_and_extras_that_it_has():
    wanted = Requirement(re.search(r"megatron-core==[\d.]+", TEXT)[0])
    (allowed,) = (r for r in map(Requirement, PROJECT["dependencies"]) if r.name == "megatron-core")
    (pinned,) = wanted.specifier
    assert allowed.specifier.contains(pinned.version)
    extras = re.search(r"'\.\[(.*)\]'", TEXT)[1].split(",")
    assert set(extras) <= set(PROJECT["optional-dependencies"])
