"""Files that were changed at random, with digests that fit: every reader takes them or says in one line why not."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import TINY, TINY_ALGORITHM, last_of_each
from omegaconf import OmegaConf

from varshare_rl.adapters import read_adapter, write_adapter
from varshare_rl.adapters.adapter import LowRank, describe
from varshare_rl.adapters.folder import read_base_weights
from varshare_rl.assemble import build_run, build_suite, load_agent
from varshare_rl.cli import compose
from varshare_rl.config import Device, load_config
from varshare_rl.errors import UserError
from varshare_rl.nn.plain import read_network, write_network
from varshare_rl.run.checkpoint import _document_digest as checkpoint_digest
from varshare_rl.run.checkpoint import find_checkpoint, load_checkpoint
from varshare_rl.transfer.share.config import ShareConfig
from varshare_rl.transfer.share.folder import _digest as basis_digest
from varshare_rl.transfer.share.folder import read_basis, write_basis
from varshare_rl.transfer.share.model import consolidate

Json = Any
#: Values in place of what a file holds.
JUNK: tuple[Json, ...] = (
    None, True, 0, -1, 1, 2**31, 10**30, 0.5, -1e308, "", "x", "nan", "${oc.env:HOME}", "../x", [], {}, [[]], [0],
    {"a": 1}, {"$tensor": "x"}, {"$items": [1]}, {"$scalar": ["O", 1]}, {"$tuple": 3}, {"$float": "x"},
)  # fmt: skip


def places(node: Json, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the paths of all values in a document."""
    entries = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(place for key, item in entries for place in places(item, (*path, key)))]


def mutated(document: Json, chance: random.Random) -> Json:
    """Return a document with one to three values replaced, removed, doubled or exchanged."""
    document = copy.deepcopy(document)
    for _ in range(chance.randint(1, 3)):
        path = chance.choice(places(document)[1:] or [()])
        if not path:
            return chance.choice(JUNK)
        parent = document
        for key in path[:-1]:
            parent = parent[key]
        what = chance.randrange(5)
        if what == 0:
            del parent[path[-1]]
        elif what == 1 and isinstance(parent, list):
            parent.insert(path[-1], copy.deepcopy(parent[path[-1]]))
        elif what == 2 and isinstance(parent, dict):
            parent[f"{path[-1]}x"] = parent.pop(path[-1])
        else:
            parent[path[-1]] = copy.deepcopy(chance.choice(JUNK))
    return document


Seal = Callable[[dict[str, Any]], str]


def fuzz(file: Path, read: Callable[[], Any], count: int, seal: Seal | None = None) -> int:
    """Let ``read`` meet so many versions of a JSON file, every fourth changed in bytes; how many it refused."""
    document = json.loads(file.read_bytes())

    def version(original: bytes, number: int, chance: random.Random) -> bytes:
        if number % 4 == 3:
            return broken(original, chance, len(original))
        changed = mutated(document, chance)
        if seal is not None and isinstance(changed, dict):
            changed.pop("sha256", None)
            changed["sha256"] = seal(changed)
        return json.dumps(changed).encode()

    return refusals(file, read, count, version)


def fuzz_bytes(file: Path, read: Callable[[], Any], count: int) -> int:
    """As :func:`fuzz`, for a file that is no JSON: bytes of its header are changed, or it is cut."""
    return refusals(file, read, count, lambda original, _, chance: broken(original, chance, 200))


def broken(content: bytes, chance: random.Random, most: int) -> bytes:
    """Return bytes of which some of the first ``most`` are others, or that are cut."""
    changed = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        changed[chance.randrange(min(len(changed), most))] = chance.randrange(256)
    return bytes(changed[: chance.choice((None, chance.randrange(len(changed))))])


def refusals(
    file: Path, read: Callable[[], Any], count: int, version: Callable[[bytes, int, random.Random], bytes]
) -> int:
    """Count the versions of a file that ``read`` refuses in one line; the original is put back."""
    original, chance, messages = file.read_bytes(), random.Random(0), []
    for number in range(count):
        content = version(original, number, chance)
        file.write_bytes(content)
        try:
            read()
        except UserError as error:
            messages.append(str(error))
        except BaseException as error:
            raise AssertionError(f"version {number}: {content[:2000]!r}") from error
    file.write_bytes(original)
    assert not [message for message in messages if "\n" in message]
    return len(messages)


#: Versions of each file in a short run and in a long one.
COUNTS = [pytest.param(60, id="some"), pytest.param(1500, id="many", marks=pytest.mark.slow)]


def train_tiny(folder: Path, algorithm: str) -> Any:
    """Train a little, and return the run with its state on disk."""
    overrides = [*TINY, *TINY_ALGORITHM[algorithm], "total_transitions=320", "evaluate.every=160"]
    config = compose("train", last_of_each([*overrides, f"run_dir={folder}", "observe.every=0"]))
    folder.mkdir()
    run = build_run(config, build_suite(config), folder)
    run.start()
    run.train()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    return run


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("algorithm", ["ppo", "sac"])
def test_checkpoints(algorithm: str, count: int, tmp_path: Path) -> None:
    """The policy alone, as evaluating does, and the whole state, as going on does."""
    run = train_tiny(tmp_path / "run", algorithm)
    checkpoint = find_checkpoint(tmp_path / "run")

    def go_on() -> None:
        run.load_state(load_checkpoint(checkpoint))

    file = checkpoint / "state.json"
    assert fuzz(file, go_on, count, checkpoint_digest) > count / 4
    few = max(10, count // 20)
    fuzz(file, lambda: load_agent(tmp_path / "run", "last", Device.cpu), few, checkpoint_digest)
    run.close()


@pytest.mark.parametrize("count", COUNTS)
def test_configurations(count: int, tmp_path: Path) -> None:
    """A JSON document is YAML too."""
    train_tiny(tmp_path / "run", "ppo").close()
    file = tmp_path / "run" / "config.yaml"
    file.write_text(json.dumps(yaml.safe_load(file.read_text())))
    assert fuzz(file, lambda: load_config(file), count // 2) > count / 8


@pytest.mark.parametrize("count", COUNTS)
def test_adapters(count: int, tmp_path: Path) -> None:
    made = {
        "one": LowRank(torch.randn(2, 4), torch.randn(3, 2)),
        "two": LowRank(torch.randn(1, 3), torch.randn(3, 1), 2.0),
    }
    write_adapter(tmp_path / "adapter", made, describe(made))
    file = tmp_path / "adapter" / "adapter_config.json"

    def read() -> None:
        read_adapter(file.parent)
        read_base_weights(file.parent)

    assert fuzz(file, read, count) > count / 8
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert fuzz_bytes(file, read, count) > count / 4


@pytest.mark.parametrize("count", COUNTS)
def test_bases(count: int, tmp_path: Path) -> None:
    tasks = {name: {"layer": LowRank(torch.randn(2, 4), torch.randn(3, 2))} for name in ("one", "two")}
    write_basis(tmp_path / "basis", consolidate(tasks, ShareConfig(keep_originals=True)))
    file = tmp_path / "basis" / "basis.json"
    assert fuzz(file, lambda: read_basis(file.parent), count, basis_digest) > count / 4


@pytest.mark.parametrize("count", COUNTS)
def test_networks(count: int, tmp_path: Path) -> None:
    write_network(tmp_path, torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.LayerNorm(4)))
    assert fuzz(tmp_path / "network.json", lambda: read_network(tmp_path), count) > count / 4
    assert fuzz_bytes(tmp_path / "network.safetensors", lambda: read_network(tmp_path), count) > count / 4
