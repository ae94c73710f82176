"""Put the LoRA adapters of many tasks into one low-rank basis, and get them out again.

    python -m varshare_rl.share consolidate adapters/* out=basis k.max_error=0.05
    python -m varshare_rl.share add basis=basis adapter=adapters/another
    python -m varshare_rl.share reconstruct basis=basis task=another out=adapters/rebuilt

    consolidate        make a basis from the folders of adapters
    add                project one more adapter, or decompose again where it does not fit
    reconstruct        write a task's adapter, in the format of the peft library

`share <name> --help` says more; all keys: docs/share.md.
"""

from __future__ import annotations

import inspect
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf
from rich.console import Console
from rich.table import Table
from rich.text import Text

from varshare_rl.adapters import Adapter, read_adapter, write_adapter
from varshare_rl.adapters.folder import is_adapter, maker
from varshare_rl.cli import errors_in_one_line
from varshare_rl.command_line import is_folder
from varshare_rl.entry import wants_help
from varshare_rl.errors import UserError
from varshare_rl.fields import check_bounds
from varshare_rl.transfer.share.config import Merge, ShareConfig
from varshare_rl.transfer.share.folder import BASIS_FILE, check_target, read_basis, write_basis
from varshare_rl.transfer.share.model import Share, add, consolidate

#: Mark of the adapters that ``reconstruct`` writes, which it alone replaces.
MAKER = "share reconstruct"
#: Layers and tasks beyond these are in basis.json and not on screen.
SHOWN = 20
#: Folders of the adapters of an exported policy: `<task>_peft/actor`.
EXPORTED = re.compile(r"actor|critic(_\d+)?")


@dataclass
class ConsolidateConfig(ShareConfig):
    """Make a basis from the folders of LoRA adapters, with a bound on the error of every task.

        python -m varshare_rl.share consolidate adapters/* out=basis k.max_error=0.05

        <folders>          adapters in the format of the peft library (needed); a task takes its folder's name, and
                           that of the folder above for the actor and critic of an exported policy
        out=<folder>       of the new basis (needed)
        k.max_error=0.05   largest relative error of a task in a layer; or k.explained, or k.fixed
        method=share       or paper, delta (with centred=true: minus their mean)
        keep_originals=false   store the adapters beside the basis, for exact decompositions later

    All keys: docs/share.md.
    """

    out: str = MISSING
    "Folder of the new basis."


@dataclass
class AddConfig:
    """Add one more adapter to a basis.

        python -m varshare_rl.share add basis=basis adapter=adapters/another

        basis=<folder>     made by consolidate; it is replaced (needed)
        adapter=<folder>   in the format of the peft library (needed)
        name=<name>        of the task; as for consolidate unless given
        merge=needed       when the basis is decomposed again: needed, always or never

    All keys: docs/share.md.
    """

    basis: str = MISSING
    "Folder of the basis; it is replaced."
    adapter: str = MISSING
    "Folder of the adapter, in the format of the peft library."
    name: str | None = None
    "Name of the task; the folder's name unless given."
    merge: Merge = Merge.needed
    "Occasion on which the basis is decomposed again."


@dataclass
class ReconstructConfig:
    """Write a task's adapter, in the format of the peft library.

        python -m varshare_rl.share reconstruct basis=basis task=another out=adapters/rebuilt

        basis=<folder>     made by consolidate (needed)
        task=<name>        one of its tasks (needed)
        out=<folder>       of the adapter; one that this command did not write is not replaced (needed)

    All keys: docs/share.md.
    """

    basis: str = MISSING
    "Folder of the basis."
    task: str = MISSING
    "Name of one of its tasks."
    out: str = MISSING
    "Folder of the adapter."


def run_consolidate(given: ConsolidateConfig, folders: Sequence[str]) -> None:
    """Read the adapters, make a basis, write it, and say what it costs."""
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
            raise UserError(f"two adapters are called {name!r} ({folder}); a task takes its folder's name")
        adapters[name] = read_adapter(folder)[0]
    begin = time.perf_counter()
    share = consolidate(adapters, config)
    seconds = time.perf_counter() - begin
    write_basis(out, share)
    report(share, out, seconds)


def run_add(config: AddConfig, folders: Sequence[str]) -> None:
    """Read the basis and the adapter, merge or project, replace the basis, and say what it costs."""
    refuse_folders(folders, "adapter=")
    share = read_basis(config.basis)
    name = task_name(config.adapter) if config.name is None else config.name
    new = {name: read_adapter(config.adapter)[0]}
    begin = time.perf_counter()
    changed = add(share, new, config.merge)
    seconds = time.perf_counter() - begin
    write_basis(config.basis, changed)
    report(changed, Path(config.basis), seconds)
    print("decomposed again" if changed.merges > share.merges else "projected: the basis is as it was")


def run_reconstruct(config: ReconstructConfig, folders: Sequence[str]) -> None:
    """Read the basis and write one task's adapter."""
    refuse_folders(folders, "task=")
    share = read_basis(config.basis)
    adapter = share.rebuild(config.task)
    if is_adapter(config.out) and maker(config.out) != MAKER:
        raise UserError(f"{config.out} holds an adapter that reconstruct did not write; give a new folder")
    write_adapter(config.out, adapter, made_by=MAKER)
    worst = max(errors[config.task] for errors in share.errors().values())
    print(f"written: {config.out} ({config.task}, relative error at most {worst:.3g})")


def task_name(folder: str) -> str:
    """Return the last part of a folder's path, or of an exported policy's, which has ``actor`` in it, that above.

    Raises:
        UserError: it is no text.
    """
    path = Path(folder).resolve()
    name = path.parent.name if EXPORTED.fullmatch(path.name) else path.name
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the name of the folder {folder!r} is no UTF-8; rename it") from error
    return name


def refuse_folders(folders: Sequence[str], cure: str) -> None:
    """Refuse folders as plain arguments, which ``consolidate`` alone takes."""
    if folders:
        raise UserError(f"what is {folders[0]!r}? this takes key=value only; give {cure}...")


def report(share: Share, folder: Path, seconds: float) -> None:
    """Show errors by layer and by task, and what is stored."""
    errors = share.errors()
    by_task = {task: {name: found[task] for name, found in errors.items()} for task in share.tasks}
    ks = {name: str(layer.k) for name, layer in share.layers.items()}
    Console(highlight=False, force_terminal=sys.stdout.isatty()).print(
        error_table("layer", "task", dict(list(errors.items())[:SHOWN]), ks),
        error_table("task", "layer", dict(list(by_task.items())[-SHOWN:])),
    )
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


def error_table(
    of: str, by: str, errors: Mapping[str, Mapping[str, float]], ks: Mapping[str, str] | None = None
) -> Table:
    """Return a table with the mean and the worst relative error of every layer or task, and the layers' k."""
    table = Table(title=f"relative error by {of}", title_justify="left")
    for heading in (of, *(["k"] if ks else []), "mean", "worst", f"worst {by}"):
        table.add_column(heading, justify="left" if of in heading or by in heading else "right")
    for name, found in errors.items():
        worst = max(found, key=found.__getitem__)
        mean = sum(found.values()) / len(found)
        row = (name, *([ks[name]] if ks else []), f"{mean:.4f}", f"{found[worst]:.4f}", worst)
        table.add_row(*map(Text, row))  # as Text, names are not read as markup
    return table


#: A command takes its options and the folders among its arguments.
Run = Callable[[Any, Sequence[str]], None]
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
    if wants_help(arguments):
        print(inspect.getdoc(schema))
        return
    folders = [item for item in arguments[1:] if "=" not in item or is_folder(item)]
    config = [item for item in arguments[1:] if item not in folders]
    if any(item.startswith("k=") for item in config):
        raise UserError("k is a rule, not a number; give one of k.max_error, k.explained and k.fixed")
    run(read(schema, config), folders)


def read(schema: type, arguments: Sequence[str]) -> Any:
    """Return the options of a command; names and folders are text and taken as they are given.

    Raises:
        UserError: one is missing or empty.
    """
    texts = {option.name: option.default for option in fields(schema) if option.type in ("str", "str | None")}
    pairs = [item.partition("=") for item in arguments]
    given = {name: value for name, _, value in pairs if name in texts}
    for name, default in sorted(texts.items()):
        if given.get(name, default) == MISSING and name not in given:
            raise UserError(f"{name} is missing; give {name}=...")
        if given.get(name) == "":
            raise UserError(
                f"{name} is empty; give a name, or leave it out"
                if default is None
                else f"{name} is empty; give {name}=..."
            )
    others = [item for item, (name, _, _) in zip(arguments, pairs, strict=True) if name not in texts]
    composed = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.from_dotlist(others))
    composed.update(dict.fromkeys(texts, ""))
    options: Any = OmegaConf.to_object(composed)
    for name, default in texts.items():
        setattr(options, name, given.get(name, default))
    return options


def command() -> None:
    """Run the command line."""
    with errors_in_one_line():
        main(sys.argv[1:])
