"""Worker processes: shared, bound, interrupted, failing, gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from walk import BOX, Walk, actions, assert_same, make, trace

from varshare_rl.envs.engine import SlotEngine, cut_off, leave_out
from varshare_rl.envs.slots import EnvironmentFailure
from varshare_rl.envs.workers import WorkerError, Workers
from varshare_rl.errors import UserError


def test_closed_workers_are_an_error_and_are_gone() -> None:
    engine = make(2)
    engine.reset()
    assert engine._pool is not None
    processes = engine._pool.processes
    engine.close()
    engine.close()
    assert [process.returncode for process in processes] == [0, 0]
    with pytest.raises(RuntimeError, match="closed"):
        engine.reset()


def test_an_interrupted_step_leaves_a_usable_engine() -> None:
    """Ctrl-C in the middle of a step: the workers finish it, and the state that is saved then is right."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    engine = make(2, sleep=0.1)
    engine.reset()
    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            engine.step(actions(0))
    finally:
        signal.signal(signal.SIGALRM, before)
    state = engine.state()
    assert [len(slot["actions"]) for slot in state["slots"]] == [1] * 6
    expected = trace(engine, 1, 2)
    engine.close()
    calm = make(1)
    calm.reset()
    assert_same(trace(calm, 0, 2)[7:], expected)


@pytest.mark.parametrize("workers", [1, 2])
def test_failure_names_the_place_and_keeps_the_traceback(workers: int) -> None:
    engine = make(workers, fail_at=2)
    engine.reset()
    engine.step(actions(0))
    with pytest.raises(EnvironmentFailure) as caught:
        engine.step(actions(1))
    assert str(caught.value) == (
        "task 0 fails with RuntimeError: the walker tripped (environment 0, episode 0, step 1)"
    )
    cause = caught.value.__cause__
    assert "the walker tripped" in (caught.value.details if cause is None else str(cause))
    engine.close()


def test_dead_worker_is_an_error() -> None:
    engine = make(2, fail_at=-2)
    engine.reset()
    engine.step(actions(0))
    with pytest.raises(
        WorkerError, match=r"died with exit code 3; it was in task 0 \(environment 0, episode 0\)"
    ) as caught:
        engine.step(actions(1))
    assert caught.value.episode == (0, 0, 0)
    engine.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_episode_that_is_left_out_is_passed_over(workers: int) -> None:
    """A slot that is in it begins the next, one that is before it never comes to it, others go on as they were."""
    engine, other = make(workers), make(workers)
    engine.reset()
    for k in range(2):
        engine.step(actions(k))
    state = engine.state()
    leave_out(state, 0, 1, 0)  # slot 1 is in its episode 0
    leave_out(state, 1, 0, 1)  # slot 2 is before its episode 1
    leave_out(state, 0, 99, 0)
    before, after = engine.load_state(engine.state()), other.load_state(state)
    assert cut_off(state, engine.state()) == []
    assert cut_off(state, other.state()) == [(0, 1)]
    same = (before == after).all(-1)
    assert not same[0, 1]
    assert same.sum() == same.size - 1
    episodes: list[list[int]] = []
    for k in range(60):
        other.step(actions(k))
        episodes.append([slot["episode"] for slot in other.state()["slots"]])
    seen = [set(numbers) for numbers in zip(*episodes, strict=True)]
    assert (min(seen[1]), {0, 1} & seen[2]) == (1, {0})
    assert 2 in seen[2]
    engine.close(), other.close()


def test_a_worker_that_does_not_answer_is_ended_and_its_tasks_are_named() -> None:
    shared = Workers()
    engine = make(2, processes=shared)
    engine.reset()
    shared.patience = 1.5
    processes = shared.processes
    os.kill(processes[0].pid, signal.SIGSTOP)
    with pytest.raises(WorkerError, match=r"worker 0 did not answer for 1\.5 s; it steps task 0"):
        engine.step(actions(0))
    assert all(process.poll() is not None for process in processes)
    engine.close()


def test_engines_share_processes_and_not_their_state() -> None:
    """Steps of one between those of another change nothing; processes end with the last engine, and start again."""
    shared = Workers()
    alone, first = make(2), make(2, processes=shared)
    second = make(3, evaluation=True, processes=shared)
    assert first._pool is not None
    assert second._pool is not None
    assert second._pool.processes[:2] == first._pool.processes
    alone.reset(), first.reset(), second.reset()
    for k in range(5):
        expected, got = alone.step(actions(k)), first.step(actions(k))
        second.step(actions(k + 1))
        np.testing.assert_array_equal(expected.obs, got.obs)
        np.testing.assert_array_equal(expected.reward, got.reward)
    processes = shared.processes
    first.close()
    with pytest.raises(RuntimeError):
        first.step(actions(0))
    second.step(actions(0))
    second.close()
    assert all(process.poll() is not None for process in processes)
    third = make(2, processes=shared)
    np.testing.assert_array_equal(third.reset(), alone.reset())
    third.close(), alone.close()


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="this system places processes itself")
def test_a_worker_for_every_core_stays_on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    allowed = sorted(os.sched_getaffinity(0))
    places = [frozenset({allowed[0]}), frozenset({allowed[-1]})]
    monkeypatch.setattr("varshare_rl.envs.workers.cores", lambda: places)
    for workers, expected in ((2, places), (3, [frozenset(allowed)] * 3)):
        engine = make(workers)
        assert engine._pool is not None
        assert [os.sched_getaffinity(process.pid) for process in engine._pool.processes] == expected
        engine.close()


def test_a_failure_closes_all_engines_of_the_processes() -> None:
    shared = Workers()
    good, bad = make(2, processes=shared), make(2, fail_at=-2, processes=shared)
    good.reset(), bad.reset()
    bad.step(actions(0))
    with pytest.raises(WorkerError, match="died with exit code 3"):
        bad.step(actions(1))
    with pytest.raises(RuntimeError, match="closed"):
        good.step(actions(0))
    good.close(), bad.close()


def test_factory_that_workers_cannot_import_is_refused() -> None:
    with pytest.raises(UserError, match="use workers=1"):
        SlotEngine(
            lambda task: Walk(task, 0, True, 0.0),
            step_seconds=[1.0, 1.0],
            envs_per_task=1,
            observation_size=3,
            action_space=BOX,
            seed=0,
            evaluation=False,
            workers=2,
        )


_PARENT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background may begin with it ignored
sys.path.insert(0, sys.argv[1])
import walk
engine = walk.make(2)
engine.reset()
print(*[process.pid for process in engine._pool.processes], flush=True)
while True:
    engine.step(walk.actions(0))
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc").exists(), reason="looks processes up in /proc")
@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(blow: signal.Signals) -> None:
    command = [sys.executable, "-c", _PARENT, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(_alive(pid) for pid in pids)
        parent.send_signal(blow)
        errors = parent.communicate(timeout=30)[1]
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_alive(pid) for pid in pids)
    assert errors.count("Traceback") == (0 if blow is signal.SIGKILL else 1)


def test_workers_do_not_import_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import walk as t; e = t.make(2); e.reset();"
        "print(*[open(f'/proc/{p.pid}/maps').read().count('libtorch') for p in e._pool.processes])"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import torch;" + code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["0", "0"]
