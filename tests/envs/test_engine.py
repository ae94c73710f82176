"""The engine of one environment per slot: layout, autoreset, seeds, workers, state, failures."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gymnasium.spaces import Box, Discrete

from envs.cores import cores, physical_cores
from envs.engine import SlotEngine, choose_workers
from envs.slots import EngineSpec, Episode
from envs.suite import SuiteError
from envs.workers import WorkerError, Workers

BOX = Box(-1.0, 1.0, (2,), np.float32)


class Walk:
    """Position moved by the action and the seed's noise; ends beyond 5 or after ``task + 3`` steps."""

    def __init__(self, task: int, fail_at: int, noise: bool, sleep: float) -> None:
        self.task, self.fail_at, self.noise, self.sleep = task, fail_at, noise, sleep
        self.rng: Any = None

    def reset(self, episode: Episode) -> np.ndarray:
        self.rng = np.random.default_rng(episode.seed if self.noise else None)
        self.sweep = -1.0 if episode.sweep is None else float(episode.sweep)
        self.x, self.steps = float(self.rng.normal()), 0
        return np.array([self.x, self.steps, self.sweep])

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, bool]:
        self.steps += 1
        time.sleep(self.sleep)
        if self.steps == self.fail_at:
            raise RuntimeError("the walker tripped")
        if self.steps == -self.fail_at:
            os._exit(3)
        self.x += float(action.sum()) + 0.01 * float(self.rng.normal())
        over, late = self.x > 5, self.steps >= self.task + 3
        return np.array([self.x, self.steps, self.sweep]), self.x, over, late, over

    def close(self) -> None:
        self.rng = None


@dataclass(frozen=True)
class WalkFactory:
    fail_at: int = 0
    noise: bool = True
    sleep: float = 0.0

    def __call__(self, task: int) -> Walk:
        return Walk(task, self.fail_at, self.noise, self.sleep)


def make(
    workers: int = 1,
    evaluation: bool = False,
    envs: int = 2,
    seed: int = 7,
    processes: Workers | None = None,
    **kwargs: Any,
) -> SlotEngine:
    return SlotEngine(
        WalkFactory(**kwargs),
        step_seconds=[1e-3, 3e-3, 1e-3],
        envs_per_task=envs,
        observation_size=3,
        action_space=BOX,
        seed=seed,
        evaluation=evaluation,
        workers=workers,
        processes=processes,
    )


def actions(step: int, envs: int = 2) -> np.ndarray:
    return np.random.default_rng(step).uniform(-1, 1, (3, envs, 2)).astype(np.float32)


def trace(engine: SlotEngine, start: int, stop: int) -> list[np.ndarray]:
    out = []
    for k in range(start, stop):
        s = engine.step(actions(k, engine.envs_per_task))
        out += [s.obs, s.next_obs, s.reward, s.terminated, s.truncated, s.success, s.task_id]
    return out


def assert_same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_shapes_types_and_task_ids() -> None:
    engine = make()
    obs = engine.reset()
    step = engine.step(actions(0))
    assert obs.shape == step.obs.shape == step.next_obs.shape == (3, 2, 3)
    assert obs.dtype == step.obs.dtype == step.reward.dtype == np.float32
    assert step.terminated.dtype == step.truncated.dtype == step.success.dtype == np.bool_
    np.testing.assert_array_equal(step.task_id, [[0, 0], [1, 1], [2, 2]])
    assert step.task_id.dtype == np.int64


def test_autoreset_gives_true_last_observation_and_new_first_one() -> None:
    engine = make()
    engine.reset()
    lengths = np.zeros((3, 2))
    for _ in range(12):
        step = engine.step(np.zeros((3, 2, 2), np.float32))
        lengths += 1
        done = step.terminated | step.truncated
        np.testing.assert_array_equal(step.next_obs[..., 1], lengths)  # counts the steps of the old episode
        np.testing.assert_array_equal(step.obs[..., 1], np.where(done, 0, lengths))
        np.testing.assert_array_equal(step.truncated, (lengths == [[3], [4], [5]]) & ~step.terminated)
        lengths[done] = 0


def test_terminated_wins_over_truncated() -> None:
    engine = make()
    engine.reset()
    for size in (0, 0, 9):
        step = engine.step(np.full((3, 2, 2), size, np.float32))
    assert step.terminated[0].all()  # task 0 is past 5 exactly at its time limit
    assert step.success[0].all()
    assert not step.truncated[0].any()


def test_arrays_belong_to_the_caller() -> None:
    engine = make()
    first = engine.reset()
    kept = first.copy()
    step = engine.step(actions(0))
    obs = step.obs.copy()
    step.obs[:] = 99
    engine.step(actions(1))
    np.testing.assert_array_equal(first, kept)
    replayed = make()
    replayed.reset()
    np.testing.assert_array_equal(replayed.step(actions(0)).obs, obs)


@pytest.mark.parametrize("evaluation", [False, True])
def test_results_do_not_depend_on_the_number_of_workers(evaluation: bool) -> None:
    traces = []
    for workers in (1, 2, 3):
        engine = make(workers, evaluation)
        assert engine.workers == workers
        traces.append([engine.reset(), *trace(engine, 0, 20), engine.reset(), *trace(engine, 0, 5)])
        engine.close()
    assert_same(traces[0], traces[1])
    assert_same(traces[0], traces[2])
    assert_same(traces[0][-36:-1], traces[0][: 5 * 7])  # a reset restarts at episode 0


def test_episodes_differ_between_slots_tasks_seeds_and_modes() -> None:
    firsts = [make(seed=s, evaluation=e).reset()[..., 0] for s in (0, 1) for e in (False, True)]
    assert len(np.unique(np.array(firsts))) == 4 * 6
    engine = make()
    before = engine.reset()
    for k in range(5):
        after = engine.step(actions(k)).obs
    assert not np.isin(after[..., 0], before[..., 0]).any()


def test_evaluation_sweeps_and_does_not_depend_on_envs_per_task() -> None:
    seen = {}
    for envs in (1, 2):
        engine = make(evaluation=True, envs=envs)
        obs = engine.reset()
        begun = [obs[0]]
        for _ in range(3 * (4 // envs) - 1):
            step = engine.step(np.zeros((3, envs, 2), np.float32))
            if step.truncated[0].any():
                begun.append(step.obs[0])
        seen[envs] = np.concatenate(begun)
        np.testing.assert_array_equal(seen[envs][:, 2], np.arange(4))
    np.testing.assert_array_equal(seen[1], seen[2])


def test_training_slot_does_not_depend_on_other_slots() -> None:
    small, large = make(envs=1), make(envs=3)
    np.testing.assert_array_equal(small.reset()[:, 0], large.reset()[:, 0])


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_state_continues_bit_for_bit(before: int, after: int) -> None:
    engine = make(before)
    engine.reset()
    trace(engine, 0, 9)
    state = engine.state()
    expected = trace(engine, 9, 20)
    engine.close()
    fresh = make(after)
    obs = fresh.load_state(state)
    np.testing.assert_array_equal(obs.reshape(6, 3), [slot["obs"] for slot in state["slots"]])
    assert_same(trace(fresh, 9, 20), expected)
    fresh.close()


def test_state_holds_only_plain_leaves() -> None:
    engine = make()
    engine.reset()
    trace(engine, 0, 3)

    def check(node: Any) -> None:
        if isinstance(node, dict):
            assert all(isinstance(key, str) for key in node)
            for value in node.values():
                check(value)
        elif isinstance(node, list):
            for value in node:
                check(value)
        else:
            assert node is None or type(node) in (np.ndarray, int, float, str, bool)

    check(engine.state())


@pytest.mark.parametrize("workers", [1, 2])
def test_irreproducible_environment_is_refused_when_loaded(workers: int) -> None:
    engine = make(workers, noise=False)
    engine.reset()
    state = engine.state()
    with pytest.raises(SuiteError, match="not deterministic"):
        engine.load_state(state)
    engine.close()


def test_state_of_other_settings_is_refused() -> None:
    engine = make()
    engine.reset()
    with pytest.raises(SuiteError, match="seed 7, this engine 8"):
        make(seed=8).load_state(engine.state())


def test_wrong_use_is_an_error() -> None:
    engine = make()
    with pytest.raises(RuntimeError, match="before reset"):
        engine.step(actions(0))
    engine.reset()
    with pytest.raises(ValueError, match=r"\(3, 2\); this engine takes \(3, 2, 2\)"):
        engine.step(np.zeros((3, 2), np.float32))
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="closed"):
        engine.reset()
    for envs, seed, workers in ((0, 0, 1), (1, -1, 1), (1, 0, -1)):
        with pytest.raises(SuiteError, match="is not possible"):
            make(workers, envs=envs, seed=seed)


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
    with pytest.raises(RuntimeError, match="tripped") as caught:
        engine.step(actions(1))
    text = str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    assert "task 0, environment 0, episode 0, step 1" in text
    engine.close()


def test_dead_worker_is_an_error() -> None:
    engine = make(2, fail_at=-2)
    engine.reset()
    engine.step(actions(0))
    with pytest.raises(WorkerError, match="died with exit code 3"):
        engine.step(actions(1))
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
    monkeypatch.setattr("envs.workers.cores", lambda: places)
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
    with pytest.raises(SuiteError, match="use workers=1"):
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
import test_engine
engine = test_engine.make(2)
engine.reset()
print(*[process.pid for process in engine._pool.processes], flush=True)
while True:
    engine.step(test_engine.actions(0))
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
        "import sys; sys.path.insert(0, sys.argv[1]); import test_engine as t; e = t.make(2); e.reset();"
        "print(*[open(f'/proc/{p.pid}/maps').read().count('libtorch') for p in e._pool.processes])"
    )
    done = subprocess.run(
        [sys.executable, "-c", "import torch;" + code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["0", "0"]


def test_discrete_actions_reach_the_environment() -> None:
    engine = SlotEngine(
        WalkFactory(),
        step_seconds=[1.0, 1.0],
        envs_per_task=1,
        observation_size=3,
        action_space=Discrete(4),
        seed=0,
        evaluation=False,
        workers=1,
    )
    obs = engine.reset()
    step = engine.step(np.array([[3], [0]]))
    np.testing.assert_allclose((step.next_obs - obs)[:, 0, 0], [3, 0], atol=0.1)


def test_number_of_workers() -> None:
    count = physical_cores()
    assert 1 <= count <= len(cores()) <= (os.cpu_count() or 1)
    assert choose_workers(0, 2, [1.0] * 5) == min(count, 10)
    assert choose_workers(0, 2, [1e-5] * 5) == 1  # nothing to share out
    assert choose_workers(0, 1, [1e-5, 3e-4]) == 1
    assert choose_workers(4, 1, [1.0, 1.0]) == 2  # never more than slots
    assert choose_workers(3, 1, [1e-9] * 10) == 3  # as asked


def test_episode_seeds() -> None:
    spec = EngineSpec(2, 3, 1, (), "int64", seed=5, evaluation=False)
    episode = spec.episode(slot=4, index=9)
    assert episode.sweep is None
    assert episode.seed.entropy == (5, 0)
    assert episode.seed.spawn_key == (1, 1, 9)
    swept = replace(spec, evaluation=True).episode(slot=4, index=9)
    assert swept.sweep == 9 * 3 + 1
    assert swept.seed.entropy == (5, 1)
    assert swept.seed.spawn_key == (1, 28)
    assert episode.integer_seed() != swept.integer_seed()
