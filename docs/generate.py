"""Write ``docs/configuration.md`` from the config classes: ``python docs/generate.py``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any, get_type_hints

from varshare_rl.commands.calibrate import CalibrateConfig
from varshare_rl.commands.evaluate import EvaluateConfig
from varshare_rl.commands.export import ExportConfig
from varshare_rl.commands.prune import PruneConfig
from varshare_rl.config import TrainConfig
from varshare_rl.continual.config import ContinualConfig
from varshare_rl.fields import sentences
from varshare_rl.registry import registered

PAGE = Path(__file__).with_name("configuration.md")
INTRODUCTION = """\
# Configuration

Every option of every command, generated from the config classes by `python docs/generate.py`. Groups are chosen
with a slash (`elbo/schedule=ramp`), options are set with dots (`elbo.schedule.late=0.1`). `configs/tuned/` changes
some defaults for a suite and an algorithm together, and recipes (`+experiment=<name>`) change many;
`python -m varshare_rl.train env=mt10 --cfg job` prints what a command would use. From Python the same options are
keyword arguments or the same words: `varshare_rl.train("mt10", "gradient=pcgrad", elbo={"kl_weight": 0.1})`.

*Transitions* without "per task" are those of all tasks together. Numbers outside their bounds, infinity and NaN are
refused before anything is built.
"""
GROUPS = {
    "env": "Suites: `env=<name>`.",
    "algorithm": "`algorithm=<name>`.",
    "network": "`network=<name>`; [architectures.md](architectures.md) says what each is.",
    "elbo/schedule": "How the weight of the divergence moves: `elbo/schedule=<name>`, "
    "[method.md](method.md#the-weight-of-the-divergence).",
    "elbo/prior": "How the prior moves: `elbo/prior=<name>`, [method.md](method.md#the-prior).",
    "gradient": "How losses per task become one gradient: `gradient=<name>`, "
    "[method.md](method.md#from-losses-to-a-step).",
    "method": "How a policy goes from task to task (`continual`): `method=<name>`, [continual.md](continual.md).",
}
COMMANDS = {
    "evaluate": EvaluateConfig,
    "export": ExportConfig,
    "prune": PruneConfig,
    "calibrate": CalibrateConfig,
}


@dataclass(frozen=True)
class Option:
    """A row of a table."""

    key: str
    kind: str
    default: str
    bounds: str
    sentence: str


def options(config: type, prefix: str = "", own: bool = False) -> Iterator[Option]:
    """Yield the options of a config class, those inside it too; ``own``: those that its own body declares alone."""
    hints = get_type_hints(config)
    known = sentences(config)
    for entry in fields(config):
        if entry.name == "name" or (own and entry.name not in config.__annotations__):
            continue
        inside = nested(entry)
        if inside is not None:
            yield from options(inside, f"{prefix}{entry.name}.")
            continue
        bounds = entry.metadata.get("bounds")
        yield Option(
            f"{prefix}{entry.name}",
            kind_of(hints.get(entry.name, Any)),
            default_of(entry),
            "" if bounds is None else str(bounds),
            known.get(entry.name, entry.metadata.get("sentence", "")),
        )


def nested(entry: Field[Any]) -> type | None:
    """Return the config class that a field holds, if it holds one that cannot be chosen."""
    if entry.default_factory is MISSING:
        return None
    value = entry.default_factory()
    return type(value) if is_dataclass(value) and not hasattr(value, "name") else None


def kind_of(hint: Any) -> str:
    """Return a type in a reader's words, an Enum by its values."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return ", ".join(f"`{member.value}`" for member in hint)
    parts = [part for part in getattr(hint, "__args__", ()) if part is not type(None)]
    if str(hint).startswith(("list", "dict")) or not parts:
        return str(hint).replace("typing.", "") if str(hint).startswith(("list", "dict")) else hint.__name__
    return " or ".join([*map(kind_of, parts), *(["null"] if type(None) in hint.__args__ else [])])


def default_of(entry: Field[Any]) -> str:
    """Return a default as it is written on the command line."""
    value = entry.default if entry.default is not MISSING else MISSING
    if entry.default_factory is not MISSING:
        value = entry.default_factory()
    if value is MISSING or value == "???":
        return ""
    plain = value.value if isinstance(value, Enum) else value
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[plain]}`" if plain is None or isinstance(plain, bool) else f"`{plain}`".replace("'", "")


def table(rows: list[Option]) -> str:
    """Return the rows as a table, with bounds where there are any."""
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        meaning = f"{row.sentence.rstrip('.')}; {row.bounds}." if row.bounds else row.sentence
        cells = [f"`{row.key}`", row.kind, row.default, meaning]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def group(name: str, words: str) -> str:
    """Return the section of a group: what all its components have in common, then each one's own."""
    prefix = f"{name.replace('/', '.')}."
    made = {component: list(options(config, prefix)) for component, config in registered(name).items()}
    if name == "gradient":  # options of an aggregator are under its own name
        made = {
            component: [replace(row, key=f"gradient.{component}.{row.key.removeprefix(prefix)}") for row in rows]
            for component, rows in made.items()
        }
    common = [row for row in next(iter(made.values())) if all(row in rows for rows in made.values())]
    parts = [f"## `{name}`\n\n{words} There are {', '.join(f'`{component}`' for component in made)}.\n"]
    if common:
        parts.append(table(common))
    for component, rows in made.items():
        own = [row for row in rows if row not in common]
        if own:
            parts.append(f"### `{name}={component}`\n\n{table(own)}")
    return "\n".join(parts)


def page() -> str:
    """Return the whole page."""
    chosen = ("env", "algorithm", "network", "elbo.schedule", "elbo.prior")
    rows = [row for row in options(TrainConfig) if row.key not in chosen]
    parts = [INTRODUCTION, "## `python -m varshare_rl.train`\n\n" + table(rows)]
    parts += [group(name, words) for name, words in GROUPS.items() if name != "method"]
    own = [row for row in options(ContinualConfig, own=True) if row.key != "method"]
    parts.append("## `python -m varshare_rl.continual`\n\nEverything of `train`, and:\n\n" + table(own))
    parts.append(group("method", GROUPS["method"]))
    for name, config in COMMANDS.items():
        parts.append(f"## `python -m varshare_rl.{name}`\n\n" + table(list(options(config))))
    parts += [
        f"## `python -m varshare_rl.report {name}`\n\n" + table(list(options(config)))
        for name, config in registered("report").items()
    ]
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
