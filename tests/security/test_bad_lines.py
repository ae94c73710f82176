"""Bad command lines, hundreds of them over all commands: one line, exit code 2, and nothing is left or begun."""

from __future__ import annotations

import io
import random
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from conftest import OPTIONS

from varshare_rl import entry
from varshare_rl.cli import compose
from varshare_rl.commands import attempts, share
from varshare_rl.commands.common import ReportConfig
from varshare_rl.config import flat_options
from varshare_rl.continual import command as continual
from varshare_rl.registry import registered

#: Values that hardly any option takes.
BAD = (
    "abc", "''", "null", "nan", "inf", "-1", "-1e300", "1e300", "1e999", "1.5", "9" * 400, "[", "{", "]", "[1,[2]]",
    "{a: 1}", "true", "[true]", "${seed}", "${oc.env:HOME}", "${nothing:}", "a=b", "'", '"', "$x", "../x",
    "/dev/null", "\u00e9", "\udcff", "a" * 3000, "[" * 300, "[" + "a," * 3000 + "a]", "1,2", "range(3)", "glob(*)",
    " ",
)  # fmt: skip
#: Words that are no override.
WORDS = (
    "=", "=1", "==", "seed", "seed==1", "+", "++", "~", "~seed", "~env", "+seed=1", "++nothing=1", "+a.b.c=1", "-",
    "--", "---", "-x", "--seed", "--seed=1", "--cfg", "--cfg=nothing", "--info=nothing", "--config-dir",
    "--config-dir=nowhere", "-m=1", "nothing=1", "env.nothing=1", "seed.x=1", "a b=1", ".=1", "seed.=1", ".seed=1",
    "hydra.x=1", "@=1", "env@algorithm=mt10", "+_target_=os.system", "+defaults=[mt10]", "env=nothing",
    "env=../env/mt10", "env=[]", "env={}", "env=null", "env=1", "algorithm=nothing", "network=nothing",
    "critic=nothing", "gradient=nothing", "elbo/schedule=x", "elbo/prior=x", "+experiment=nothing",
    "plugins=[nothing]", "plugins=nothing", "plugins=[1]", "plugins=[a-b]", "plugins=[", "resume=nowhere",
    "resume=''", "run_dir=''", "run_dir=/dev/null/x", f"run_dir={'x' * 300}", "run_dir=/proc/x",
    "resume=auto overwrite=true", "\0", "seed=\0", "\n", "seed=1\nseed=2", "seed=1 seed=2",
    "hydra/launcher=nothing", "hydra.run.dir=x", "hydra.sweep.dir=x", "algorithm.name=sac", "env.name=cartpole",
)  # fmt: skip
REPORTS = ("sharing", "compare", "continual")
STARTS = ("env=pointmass", "device=cpu", "total_transitions=640")


class Accepted(BaseException):
    """There was nothing wrong with a command line, and a run would begin."""


def lines() -> Iterator[list[str]]:
    """Every option of every command with every value, and every word."""
    for command in ("train", "continual"):
        start = STARTS if command == "train" else ("env=light8", "device=cpu")
        for word in WORDS:
            yield [command, *start, *word.split(" ")] if "=" in word else [command, *start, word]
        for name in flat_options(compose(command, start)):
            if name.rpartition(".")[2] not in ("name", "spaces") and not name.startswith("resume"):
                yield from ([command, *start, f"{name}={value}"] for value in BAD)
    for command, schema in OPTIONS.items():
        for word in WORDS:
            yield [command, "run=nowhere", word]
        for option in fields(schema):
            yield from (
                [command, "run=nowhere"] * (option.name != "run") + [f"{option.name}={value}"] for value in BAD
            )
    reports: dict[str, type[ReportConfig]] = registered("report")
    for name in REPORTS:
        for word in WORDS:
            yield ["report", name, word]
        for option in fields(reports[name]):
            yield from (["report", name, "nowhere", f"{option.name}={value}"] for value in BAD)
    for name, (schema, _) in share.COMMANDS.items():
        for option in fields(schema):
            yield from (["share", name, f"{option.name}={value}"] for value in BAD)
        yield from (["share", name, word] for word in WORDS)
    for word in ("list", "show", "rm"):
        yield from (
            ["runs", word, value] for value in ("nowhere", "a" * 3000, "\0", "\udcff", "/dev/null", "x=1", "")
        )
    yield from ([command, word] for command in ("report", "share", "runs") for word in BAD)
    yield from ([command] for command in ("export", "evaluate", "prune", "report", "share", "runs"))


def ends(words: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[int | str | None, str, str]:
    """Exit code, output and errors of a command; code "begins" where it would run."""
    out, err = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["varshare", *words])
    code: int | str | None = 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            entry.main()
        except SystemExit as stop:
            code = stop.code
        except Accepted:
            code = "begins"
        except Exception as error:
            code = f"{type(error).__name__}: {error}"[:200]
    return code, out.getvalue(), err.getvalue()


def check(chosen: list[list[str]], folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Type the lines, and return how many of them were bad."""

    def begin(*_: object, **__: object) -> None:
        raise Accepted

    monkeypatch.setattr(attempts, "build_run", begin)
    monkeypatch.setattr(continual, "build_sequence", begin)
    bad, wrong = 0, list[Any]()
    for words in chosen:
        began = time.process_time()
        code, out, err = ends(words, monkeypatch)
        seconds = time.process_time() - began
        left = [path.name for path in folder.iterdir()]
        for path in left:
            (folder / path).rename(folder.parent / f"left-{len(wrong)}-{path[:20]}")
        if code in (0, "begins") and not left:
            continue
        bad += 1
        one_line = err.startswith("error: ") and err.count("\n") == 1 and len(err) < 1500 and not out
        if code != 2 or not one_line or left or seconds > 5:
            wrong.append((" ".join(words)[:150], code, err[:300], out[:80], left, round(seconds, 1)))
    assert not wrong, f"{len(wrong)} of {len(chosen)} lines:\n" + "\n".join(map(str, wrong[:60]))
    return bad


def test_a_sample_of_bad_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = random.Random(0).sample(list(lines()), 40)
    assert check(chosen, folder, monkeypatch) >= 25


@pytest.mark.slow
def test_many_bad_lines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = list(lines())
    assert check(random.Random(1).sample(every, 1200), folder, monkeypatch) >= 800
