"""The Meta-World suite: tasks, goals, agreement with the package, state, success."""

from __future__ import annotations

import pickle

import metaworld
import numpy as np
import pytest
from metaworld.evaluation import evaluation
from metaworld.policies import SawyerDrawerCloseV3Policy, SawyerReachV3Policy

from varshare_rl.envs.engine import SlotEngine
from varshare_rl.envs.metaworld import BENCHMARKS, MetaWorldConfig, MetaWorldSuite
from varshare_rl.envs.sawyer.official import official_envs
from varshare_rl.envs.sawyer.tasks import make_goals
from varshare_rl.envs.suite import Suite
from varshare_rl.errors import UserError


def suite(*tasks: str, **kwargs: object) -> MetaWorldSuite:
    options: dict[str, object] = {"goals_per_task": 5, "workers": 1}
    return MetaWorldSuite(MetaWorldConfig(tasks=list(tasks), **(options | kwargs)))  # type: ignore[arg-type]


def roll(engine: SlotEngine, steps: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(steps):
        actions = rng.uniform(-1, 1, (engine.num_tasks, engine.envs_per_task, 4)).astype(np.float32)
        step = engine.step(actions)
        out += [step.obs, step.next_obs, step.reward, step.truncated, step.success]
    return out


def assert_same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a, b)


def test_benchmarks() -> None:
    assert [len(BENCHMARKS[name]) for name in ("mt3", "mt10", "mt25", "mt50")] == [3, 10, 25, 50]
    assert BENCHMARKS["mt10"] == (
        *("reach-v3", "push-v3", "pick-place-v3", "door-open-v3", "drawer-open-v3", "drawer-close-v3"),
        *("button-press-topdown-v3", "peg-insert-side-v3", "window-open-v3", "window-close-v3"),
    )
    for name, tasks in BENCHMARKS.items():
        assert MetaWorldSuite(MetaWorldConfig(benchmark=name)).task_names == tasks


def test_suite_follows_the_protocol_and_states_its_conditions() -> None:
    made = suite("push-v3", "reach-v3", horizon=200, goal_seed=3)
    assert isinstance(made, Suite)
    assert made.has_success
    assert made.observation_space.shape == (39,)
    assert made.action_mask.shape == (2, 4)
    assert made.action_mask.all()
    assert dict(made.provenance) == {
        "suite": "metaworld",
        "metaworld": "3.1.1",
        "mujoco": "3.3.0",
        "gymnasium": made.provenance["gymnasium"],
        "reward_function_version": "v2",
        "horizon": 200,
        "goals_per_task": 5,
        "goal_seed": 3,
        "tasks": "push-v3,reach-v3",
    }
    assert MetaWorldSuite(MetaWorldConfig(benchmark="mt1", tasks=["sweep-v3"])).name == "mt1"


def test_fixed_scales_bring_observations_near_one() -> None:
    made = suite("pick-place-v3", "peg-insert-side-v3", "drawer-open-v3", horizon=50)
    mean, std = made.observation_scale
    assert mean.dtype == std.dtype == np.float32
    engine = made.make_engine(1, seed=0)
    rng = np.random.default_rng(0)
    seen = [engine.reset()]
    for _ in range(60):
        seen.append(engine.step(rng.uniform(-1, 1, (3, 1, 4)).astype(np.float32)).obs)
    engine.close()
    scaled = (np.concatenate(seen, axis=1) - mean) / std
    assert np.abs(scaled).max() < 10
    assert np.abs(scaled[..., :7]).max() < 5  # hand, opening, first object
    assert scaled[..., :3].std() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["reech-v3"]}, "did you mean reach-v3"),
        ({"tasks": ["reach"]}, "did you mean reach"),
        ({"tasks": []}, "no Meta-World tasks"),
        ({"tasks": ["reach-v3", "reach-v3"]}, "listed twice"),
        ({"benchmark": "mt11"}, "choose mt1, mt3, mt10"),
        ({"benchmark": "mt10", "tasks": ["reach-v3"]}, "its own tasks"),
        ({"benchmark": "mt1", "tasks": ["reach-v3", "push-v3"]}, "exactly one task, 2 given"),
        ({"tasks": ["reach-v3"], "reward_function_version": "v3"}, "choose v1 or v2"),
        ({"tasks": ["reach-v3"], "horizon": 0}, "horizon=0"),
        ({"tasks": ["reach-v3"], "goals_per_task": 0}, "goals_per_task=0"),
    ],
)
def test_impossible_options_are_one_line_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        MetaWorldSuite(MetaWorldConfig(**options))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


def make_official(benchmark: str, *args: str, seed: int) -> metaworld.Benchmark:
    made: metaworld.Benchmark = getattr(metaworld, benchmark)(*args, seed=seed)
    return made


def official_goals(benchmark: metaworld.Benchmark, name: str) -> np.ndarray:
    return np.array([pickle.loads(t.data)["rand_vec"] for t in benchmark.train_tasks if t.env_name == name])


def test_goals_of_a_list_are_those_of_the_package() -> None:
    names = ("shelf-place-v3", "hammer-v3")
    goals = MetaWorldSuite(MetaWorldConfig(tasks=list(names), goal_seed=4)).goals
    for k, name in enumerate(names):
        np.testing.assert_array_equal(goals[k], official_goals(make_official("MT1", name, seed=4 + k), name))


@pytest.mark.slow
@pytest.mark.parametrize("benchmark", ["MT10", "MT50"])
def test_goals_of_a_benchmark_are_those_of_the_package(benchmark: str) -> None:
    official = make_official(benchmark, seed=11)
    made = MetaWorldSuite(MetaWorldConfig(benchmark=benchmark.lower(), goal_seed=11))
    for name, goals in zip(made.task_names, made.goals, strict=True):
        np.testing.assert_array_equal(goals, official_goals(official, name), err_msg=name)


def test_goals_leave_the_global_random_stream_alone() -> None:
    before = np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    make_goals(("reach-v3",), 123, 3, False)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # type: ignore[index]  # noqa: NPY002


def test_evaluation_visits_every_goal_once_and_training_does_not() -> None:
    made = suite("reach-v3", goals_per_task=6, horizon=2)
    for is_evaluation, distinct in ((True, 6), (False, None)):
        engine = made.make_engine(2, 0, evaluation=is_evaluation)
        seen = [engine.reset()[0, :, 36:39]]
        seen += [engine.step(np.zeros((1, 2, 4), np.float32)).obs[0, :, 36:39] for _ in range(5)][1::2]
        goals = np.concatenate(seen)
        expected = made.goals[0][:, 3:].astype(np.float32)
        if distinct:
            np.testing.assert_array_equal(goals, expected)
        assert all((goal == expected).all(axis=1).any() for goal in goals)


@pytest.mark.parametrize("tasks", [("window-close-v3", "door-open-v3", "pick-place-v3", "basketball-v3")])
def test_state_continues_bit_for_bit_in_a_fresh_process(tasks: tuple[str, ...]) -> None:
    made = suite(*tasks, horizon=12)
    engine = made.make_engine(1, 3)
    engine.reset()
    roll(engine, 17)  # in the middle of the second episode
    state = engine.state()
    expected = roll(engine, 20, seed=1)  # beyond two more resets
    assert [slot["episode"] for slot in state["slots"]] == [1] * 4
    made.config.workers = 2
    fresh = made.make_engine(1, 3)
    fresh.load_state(state)
    assert_same(roll(fresh, 20, seed=1), expected)
    fresh.close()


def test_workers_and_repeats_give_the_same_steps() -> None:
    made = suite("drawer-open-v3", "reach-v3", "window-open-v3", horizon=8)
    traces = []
    for workers in (1, 3):
        made.config.workers = workers
        engine = made.make_engine(1, 0)
        traces.append([engine.reset(), *roll(engine, 20)])
        engine.reset()
        assert_same(roll(engine, 20), traces[-1][1:])
        engine.close()
    assert_same(*traces)


def test_time_is_the_last_entry_of_an_observation() -> None:
    made, plain = (
        suite("reach-v3", "push-v3", horizon=4, staggered_resets=False, observe_time=time) for time in (True, False)
    )
    assert made.observation_space.shape == (40,)
    assert [len(part) for part in made.observation_scale] == [40, 40]
    engine, other = made.make_engine(2, 0), plain.make_engine(2, 0)
    seen, without = [engine.reset()], [other.reset()]
    for trace, stepped in ((seen, engine), (without, other)):
        steps = roll(stepped, 6)
        trace += steps[0::5]  # what is acted on next
    engine.close()
    other.close()
    assert_same([obs[..., :39] for obs in seen], without)
    assert [obs[..., 39].tolist() for obs in seen] == [
        [[x] * 2] * 2 for x in (-1.0, -0.5, 0.0, 0.5, -1.0, -0.5, 0.0)
    ]


def test_the_official_evaluation_tells_the_time() -> None:
    made, times = suite("reach-v3", "drawer-close-v3", horizon=5, observe_time=True), []

    def act(obs: np.ndarray) -> np.ndarray:
        times.append(obs[:, 39].tolist())
        return np.zeros((2, 4), np.float32)

    made.official_evaluation(act, lambda done: None, episodes=2, seed=0)
    assert np.allclose(times[:7], [[t, t] for t in (-1.0, -0.6, -0.2, 0.2, 0.6, -1.0, -0.6)])


@pytest.mark.filterwarnings("ignore:Constant")  # the scripted policies warn that actions get clipped
def test_agrees_with_the_official_evaluation() -> None:
    """Scripted policies, one of them spoilt: the success rates must agree, not only at 0 and 1."""
    made = suite("reach-v3", "drawer-close-v3", horizon=100)
    policies = [SawyerReachV3Policy(), SawyerDrawerCloseV3Policy()]

    def act(obs: np.ndarray) -> np.ndarray:
        actions = np.stack([policy.get_action(o) for policy, o in zip(policies, obs, strict=True)])
        actions[0] *= obs[0, 36] > 0  # reach moves to goals on the right only
        return np.clip(actions, -1, 1).astype(np.float32)

    class Agent:
        def eval_action(self, observations: np.ndarray) -> np.ndarray:
            return act(observations.astype(np.float32).astype(np.float64))

        def reset(self, env_mask: np.ndarray) -> None:
            """No state."""

    envs = official_envs(made)
    _, _, official, _ = evaluation(Agent(), envs, num_episodes=5)
    envs.close()
    engine = made.make_engine(1, 0, evaluation=True)
    obs = engine.reset()
    succeeded = np.zeros((2, 5), np.bool_)
    for episode in range(5):
        for _ in range(100):
            step = engine.step(act(obs[:, 0].astype(np.float64))[:, None])
            obs = step.obs
            succeeded[:, episode] |= step.success[:, 0]
        assert step.truncated.all()
    assert official == dict(zip(made.task_names, succeeded.mean(axis=1), strict=True))
    assert 0 < official["reach-v3"] < 1
    assert official["drawer-close-v3"] == 1
