"""``python -m varshare_rl.share``: one low-rank basis for the LoRA adapters of many tasks.

python -m varshare_rl.share consolidate adapters/* out=basis k.max_error=0.05
python -m varshare_rl.share add basis=basis adapter=adapters/another
python -m varshare_rl.share reconstruct basis=basis task=another out=adapters/rebuilt
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from varshare_rl.adapters import Adapter, read_adapter, write_adapter
from varshare_rl.cli import errors_in_one_line
from varshare_rl.errors import UserError
from varshare_rl.fields import check_bounds
from varshare_rl.transfer.share.config import Merge, ShareConfig
from varshare_rl.transfer.share.folder import BASIS_FILE, check_target, read_basis, write_basis
from varshare_rl.transfer.share.model import Share, add, consolidate

#: Layers and tasks beyond these are in basis.json and not on screen.
SHOWN = 20


@dataclass
class ConsolidateConfig(ShareConfig):
    """``consolidate <adapter folders>``: ``out`` is the folder of the new basis; the rest is how it is made."""

    out: str = "???"


@dataclass
class AddConfig:
    """``add``: one adapter folder as ``adapter=``; ``merge`` says when the basis is decomposed again."""

    basis: str = "???"
    adapter: str = "???"
    name: str | None = None  # of the task; the folder's name unless given
    merge: Merge = Merge.needed


@dataclass
class ReconstructConfig:
    """``reconstruct``: write a task's adapter, in the format of the `peft` library, to the folder ``out``."""

    basis: str = "???"
    task: str = "???"
    out: str = "???"


def run_consolidate(composed: DictConfig, folders: Sequence[str]) -> None:
    """Read the adapters, make a basis, write it, and say what it costs."""
    given = cast(ConsolidateConfig, OmegaConf.to_object(composed))
    config = ShareConfig(**{option.name: getattr(given, option.name) for option in fields(ShareConfig)})
    check_bounds(config)
    out = Path(given.out)
    if (out / BASIS_FILE).exists():
        raise UserError(f"{out} holds a basis already; add to it, or give another out")
    check_target(out)
    if not folders:
        raise UserError("no adapters to consolidate; give their folders: consolidate adapters/* out=basis")
    adapters: dict[str, Adapter] = {}
    for folder in folders:
        name = task_name(folder)
        if name in adapters:
            raise UserError(f"two adapters are called {name!r} ({folder}); a task takes the name of its folder")
        adapters[name] = read_adapter(folder)[0]
    begin = time.perf_counter()
    share = consolidate(adapters, config)
    seconds = time.perf_counter() - begin
    write_basis(out, share)
    report(share, out, seconds)


def run_add(composed: DictConfig, folders: Sequence[str]) -> None:
    """Read the basis and the adapter, merge or project, replace the basis, and say what it costs."""
    config = cast(AddConfig, OmegaConf.to_object(composed))
    refuse_folders(folders, "adapter=")
    share = read_basis(config.basis)
    name = config.name or task_name(config.adapter)
    new = {name: read_adapter(config.adapter)[0]}
    begin = time.perf_counter()
    changed = add(share, new, config.merge)
    seconds = time.perf_counter() - begin
    write_basis(config.basis, changed)
    report(changed, Path(config.basis), seconds)
    print("decomposed again" if changed.merges > share.merges else "projected: the basis is as it was")


def run_reconstruct(composed: DictConfig, folders: Sequence[str]) -> None:
    """Read the basis and write one task's adapter."""
    config = cast(ReconstructConfig, OmegaConf.to_object(composed))
    refuse_folders(folders, "task=")
    share = read_basis(config.basis)
    write_adapter(config.out, share.rebuild(config.task))
    worst = max(errors[config.task] for errors in share.errors().values())
    print(f"written: {config.out} ({config.task}, relative error at most {worst:.3g})")


def task_name(folder: str) -> str:
    """The last part of a folder's path."""
    return Path(folder).resolve().name


def refuse_folders(folders: Sequence[str], cure: str) -> None:
    """Folders as plain arguments belong to ``consolidate`` alone."""
    if folders:
        raise UserError(f"what is {folders[0]!r}? this takes key=value only; give {cure}...")


def report(share: Share, folder: Path, seconds: float) -> None:
    """Errors by layer and by task, and what is stored."""
    console = Console(highlight=False)
    errors = share.errors()
    layers = Table(title="relative error by layer", title_justify="left")
    for heading in ("layer", "k", "mean", "worst", "worst task"):
        layers.add_column(heading, justify="left" if "layer" in heading or "task" in heading else "right")
    for name, layer in list(share.layers.items())[:SHOWN]:
        worst = max(errors[name], key=errors[name].__getitem__)
        mean = sum(layer.errors) / len(layer.errors)
        layers.add_row(name, str(layer.k), f"{mean:.4f}", f"{errors[name][worst]:.4f}", worst)
    tasks = Table(title="relative error by task", title_justify="left")
    for heading in ("task", "mean", "worst", "worst layer"):
        tasks.add_column(heading, justify="left" if "layer" in heading or "task" in heading else "right")
    for task in share.tasks[-SHOWN:]:
        own = {name: by_task[task] for name, by_task in errors.items()}
        worst = max(own, key=own.__getitem__)
        tasks.add_row(task, f"{sum(own.values()) / len(own):.4f}", f"{own[worst]:.4f}", worst)
    console.print(layers, tasks)
    hidden = max(len(share.layers) - SHOWN, 0), max(len(share.tasks) - SHOWN, 0)
    if any(hidden):
        print(f"{hidden[0]} more layers and {hidden[1]} earlier tasks are in {folder / BASIS_FILE}")
    store = share.storage()
    even = "never" if store.break_even_tasks is None else f"from {store.break_even_tasks} tasks on"
    originals = f", {store.originals_bytes:,} of originals" if store.originals_bytes else ""
    print(
        f"stored: {store.total_bytes:,.0f} bytes for {store.tasks} tasks ({store.shared_bytes:,} shared, "
        f"{store.task_bytes:,.0f} per task{originals}); LoRA adapters: {store.lora_bytes:,.0f} "
        f"({store.lora_task_bytes:,.0f} per task)\n"
        f"that is {store.saving:.2f} times smaller, {store.saving_without_basis:.1f} times without counting the "
        f"basis; smaller than adapters {even}\n"
        f"a new task trains {store.trained_numbers:,} numbers, LoRA {store.lora_trained_numbers:,.0f}\n"
        f"written: {folder} ({seconds:.2f} s without reading and writing)"
    )


#: A command takes its options and the folders among its arguments.
Run = Callable[[DictConfig, Sequence[str]], None]
COMMANDS: dict[str, tuple[type, Run]] = {
    "consolidate": (ConsolidateConfig, run_consolidate),
    "add": (AddConfig, run_add),
    "reconstruct": (ReconstructConfig, run_reconstruct),
}


def main(arguments: Sequence[str]) -> None:
    """Run one command; ``key=value`` are its options, anything else is a folder.

    Raises:
        UserError: whatever the user got wrong.
    """
    if not arguments or arguments[0] not in COMMANDS:
        given = repr(arguments[0]) if arguments else "nothing"
        raise UserError(f"the command is {given}; choose {', '.join(COMMANDS)}")
    schema, run = COMMANDS[arguments[0]]
    folders = [item for item in arguments[1:] if "=" not in item or Path(item).is_dir()]
    config = [item for item in arguments[1:] if item not in folders]
    if any(item.startswith("k=") for item in config):
        raise UserError("k is a rule, not a number; give one of k.max_error, k.explained and k.fixed")
    composed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(config))
    for name in sorted(OmegaConf.missing_keys(composed)):
        raise UserError(f"{name} is missing; give {name}=...")
    run(cast(DictConfig, composed), folders)


def command() -> None:
    """Run the command line."""
    with errors_in_one_line():
        main(sys.argv[1:])
