"""The fast path gives what the untouched package gives, bit for bit, and leaves the package untouched."""

from __future__ import annotations

import importlib.metadata
import warnings
from collections.abc import Iterator
from typing import Any

import metaworld.sawyer_xyz_env
import mujoco
import numpy as np
import pytest
from metaworld.env_dict import ALL_V3_ENVIRONMENTS
from metaworld.policies import ENV_POLICY_MAP
from metaworld.utils import reward_utils
from scipy.spatial.transform import Rotation

from varshare_rl.envs import sawyer
from varshare_rl.envs.metaworld import MetaWorldConfig, MetaWorldSuite
from varshare_rl.envs.sawyer.arithmetic import Quaternion, make_hstack, make_norm, make_tolerance
from varshare_rl.envs.sawyer.fast import FastMetaWorldEnv, environment_classes, is_supported
from varshare_rl.envs.sawyer.tasks import MetaWorldEnv, make_goals
from varshare_rl.envs.slots import Episode

#: Between them: every kind of observation, the contact force, quaternions, stale first observations.
SAMPLE = ("push-v3", "door-open-v3", "window-close-v3", "basketball-v3", "stick-pull-v3", "faucet-open-v3")
HORIZON = 500


def compare(name: str, goal_order: tuple[int, ...], steps: int) -> int:
    """Drive both with one policy (scripted and random in turn); returns the successful steps.

    A second quick environment, which shares the model, plays another episode in between.
    """
    goals = make_goals((name,), 0, 3, False)[0]
    official, fast = MetaWorldEnv(name, goals, "v2", HORIZON), FastMetaWorldEnv(name, goals, HORIZON)
    neighbour = FastMetaWorldEnv(name, goals, HORIZON)
    policy: Any = ENV_POLICY_MAP[name]()  # type: ignore[abstract]
    rng = np.random.default_rng(0)
    successes = 0
    for k, goal in enumerate(goal_order):
        episode = Episode(np.random.SeedSequence(0), goal)
        obs = official.reset(episode)
        np.testing.assert_array_equal(obs, fast.reset(episode), err_msg=f"{name}: reset {k}")
        neighbour.reset(Episode(np.random.SeedSequence(0), goal + 1))
        for i in range(steps):
            scripted = policy.get_action(obs) + 0.1 * (k > 1) * rng.normal(size=4)
            action = rng.uniform(-1, 1, 4) if k % 2 else np.clip(scripted, -1, 1)
            action = action.astype(np.float32)
            neighbour.step(-action)
            fast._model.take(fast._places)  # as fast.step does
            one, other = official._env.step(action), fast._env.step(action)
            obs, place = one[0], f"{name}: episode {k}, step {i}"
            np.testing.assert_array_equal(obs, other[0], err_msg=place)
            assert one[1:] == other[1:], place  # reward, flags and every entry of info
            successes += int(one[4]["success"])
    return successes


@pytest.mark.filterwarnings("ignore:Constant")  # the scripted policies warn that actions get clipped
@pytest.mark.parametrize("name", SAMPLE)
def test_same_bits_as_the_package(name: str) -> None:
    successes = compare(name, goal_order=(0, 1, 0, 1), steps=140)
    assert successes > 0 or name in ("basketball-v3", "stick-pull-v3")  # slow to solve


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Constant")
@pytest.mark.parametrize("name", list(ALL_V3_ENVIRONMENTS))
def test_same_bits_as_the_package_for_every_task(name: str) -> None:
    """500 scripted and 500 random steps, then both on goals seen before, whose resets are remembered."""
    assert compare(name, goal_order=(0, 1, 0, 2, 1), steps=500) > 0


def after_resets(name: str, goals: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reset both to one goal after the other from wherever random actions led.

    Yields the observation, MuJoCo's state and the places of bodies and sites, all in one array, of each.
    """
    choices = make_goals((name,), 0, goals, False)[0]
    official, fast = MetaWorldEnv(name, choices, "v2", HORIZON), FastMetaWorldEnv(name, choices, HORIZON)
    rng = np.random.default_rng(1)
    size = mujoco.mj_stateSize(fast._env.model, mujoco.mjtState.mjSTATE_INTEGRATION)
    for k in range(goals):
        episode = Episode(np.random.SeedSequence(0), k)
        found = []
        for made, name_of_data in ((official, "data"), (fast, "real_data")):
            obs, env, state = made.reset(episode), made._env, np.empty(size)
            mujoco.mj_getState(env.model, getattr(env, name_of_data), state, mujoco.mjtState.mjSTATE_INTEGRATION)
            found.append(np.concatenate([obs, state, env.model.body_pos.ravel(), env.model.site_pos.ravel()]))
        yield found[0], found[1]
        for action in rng.uniform(-1, 1, (20, 4)).astype(np.float32):
            official.step(action)
            fast.step(action)


@pytest.mark.parametrize("name", SAMPLE)
def test_resets_lead_to_the_same_state(name: str) -> None:
    for official, fast in after_resets(name, goals=3):
        np.testing.assert_array_equal(official, fast)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(ALL_V3_ENVIRONMENTS))
def test_resets_lead_to_the_same_state_for_every_task_and_goal(name: str) -> None:
    for official, fast in after_resets(name, goals=50):
        np.testing.assert_array_equal(official, fast)


def test_environments_of_one_task_share_a_model() -> None:
    goals = make_goals(("reach-v3",), 0, 2, False)[0]
    one, other = (FastMetaWorldEnv("reach-v3", goals, 10) for _ in range(2))
    assert one._env.model is other._env.model
    assert one._env.real_data is not other._env.real_data


def test_the_model_has_what_touches_or_is_asked_for_and_no_pictures() -> None:
    goals = make_goals(("door-open-v3",), 0, 1, False)[0]
    quick: Any = FastMetaWorldEnv("door-open-v3", goals, 10)._env.model
    whole: Any = MetaWorldEnv("door-open-v3", goals, "v2", 10)._env.model
    names = [whole.geom(geom).name for geom in range(whole.ngeom)]
    needed = sum(
        bool(name) or any(touches)
        for name, *touches in zip(names, whole.geom_contype, whole.geom_conaffinity, strict=True)
    )
    assert quick.ngeom == needed < whole.ngeom
    assert quick.nbvh < whole.nbvh / 3
    assert (quick.ncam, quick.nlight) == (0, 0)
    for what in (
        "body_mass",
        "body_inertia",
        "body_ipos",
        "body_iquat",
        "body_pos",
        "dof_damping",
        "dof_invweight0",
    ):
        np.testing.assert_array_equal(getattr(quick, what), getattr(whole, what), err_msg=what)


def test_truncates_at_the_horizon() -> None:
    goals = make_goals(("reach-v3",), 0, 2, False)[0]
    for env in (FastMetaWorldEnv("reach-v3", goals, 3), MetaWorldEnv("reach-v3", goals, "v2", 3)):
        env.reset(Episode(np.random.SeedSequence(0), 0))
        flags = [env.step(np.zeros(4, np.float32))[2:4] for _ in range(3)]
        assert flags == [(False, False), (False, False), (False, True)]
        with pytest.raises(ValueError, match="reset"):
            env.step(np.zeros(4, np.float32))


def test_the_package_stays_untouched() -> None:
    private = environment_classes()["reach-v3"]
    official = ALL_V3_ENVIRONMENTS["reach-v3"]
    assert private is not official
    assert not issubclass(private, official)
    for module in (metaworld.sawyer_xyz_env, reward_utils):
        assert module.np is np
    assert official.step.__module__ == "metaworld.sawyer_xyz_env"
    assert private.step.__module__ == "varshare_rl.envs.sawyer.methods"
    assert reward_utils.tolerance.__module__ == "metaworld.utils.reward_utils"


@pytest.fixture
def unknown_version(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9.9")
    is_supported.cache_clear()
    yield
    is_supported.cache_clear()


@pytest.mark.usefixtures("unknown_version")
def test_unknown_version_warns_once_and_uses_the_package() -> None:
    with pytest.warns(UserWarning, match=r"checked with metaworld 3\.1\.1, this is 9\.9\.9"):
        suite = MetaWorldSuite(MetaWorldConfig(tasks=["reach-v3"]))
    assert not suite.fast
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        MetaWorldSuite(MetaWorldConfig(tasks=["reach-v3"]))


def test_another_scipy_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sawyer.fast, "quaternions_agree", lambda: False)
    is_supported.cache_clear()
    with pytest.warns(UserWarning, match="this scipy computes quaternions in another way"):
        assert not is_supported()
    is_supported.cache_clear()


@pytest.mark.parametrize(
    ("fast", "version", "expected"), [(True, "v2", True), (False, "v2", False), (True, "v1", False)]
)
def test_option(fast: bool, version: str, expected: bool) -> None:
    options = MetaWorldConfig(tasks=["reach-v3"], fast=fast, reward_function_version=version, workers=1)
    suite = MetaWorldSuite(options)
    assert suite.fast is expected
    engine = suite.make_engine(1, 0)
    assert engine._chunk is not None
    assert isinstance(engine._chunk.slots[0].env, FastMetaWorldEnv if expected else MetaWorldEnv)


def test_engines_agree_with_and_without() -> None:
    """Also where two environments in different episodes share one model."""
    results = []
    for fast in (True, False):
        options = MetaWorldConfig(
            tasks=["peg-insert-side-v3", "basketball-v3"], fast=fast, workers=1, horizon=30, goals_per_task=3
        )
        engine = MetaWorldSuite(options).make_engine(2, 0)
        rng = np.random.default_rng(1)
        arrays: list[Any] = [engine.reset()]
        for _ in range(130):
            step = engine.step(rng.uniform(-1, 1, (2, 2, 4)).astype(np.float32))
            arrays += [step.obs, step.next_obs, step.reward, step.truncated, step.success]
        results.append(arrays)
    for one, other in zip(*results, strict=True):
        np.testing.assert_array_equal(one, other)


def test_quaternion_is_scipys() -> None:
    rng = np.random.default_rng(2)
    for k in range(400):
        matrix = Rotation.from_quat(np.eye(4)[k % 4] if k < 4 else rng.normal(size=4)).as_matrix()
        np.testing.assert_array_equal(Quaternion(matrix).as_quat(), Rotation.from_matrix(matrix).as_quat())


def test_tolerance_is_the_packages() -> None:
    full: Any = reward_utils.tolerance
    quick = make_tolerance(full)
    rng = np.random.default_rng(3)
    kinds = ("long_tail", "gaussian", "hyperbolic", "linear", "quadratic")
    for k in range(500):
        x, lower, width, margin = rng.normal(size=4)
        arguments = {
            "bounds": (lower, lower + abs(width)),
            "margin": (abs(margin), np.float64(abs(margin)), 0, 0.0)[k % 4],
            "sigmoid": kinds[k % 5],
            "value_at_margin": 0.1 if k % 3 else 0.3,
        }
        for value in (float(x), np.float64(x), lower, np.array([x, lower])):
            one, other = full(value, **arguments), quick(value, **arguments)
            np.testing.assert_array_equal(one, other)
            assert type(one) is type(other)
    for bad in ({"bounds": (1.0, 0.0)}, {"margin": -1.0}):
        with pytest.raises(ValueError, match="must be"):
            quick(0.5, **bad)


def test_norm_is_numpys() -> None:
    norm = make_norm()
    rng = np.random.default_rng(4)
    for size in (1, 2, 3, 7):
        x = rng.normal(size=size)
        for value in (x, x.astype(np.float32), x[::-1], x[0], list(x), float(x[0]), np.outer(x, x)):
            one, other = np.linalg.norm(value), norm(value)
            assert one == other
            assert type(one) is type(other)
        for order in (1, 2, np.inf):
            assert norm(x, ord=order) == np.linalg.norm(x, ord=order)
        assert norm(np.outer(x, x), ord=2) == np.linalg.norm(np.outer(x, x), ord=2)
        assert norm(np.outer(x, x), axis=0).shape == (size,)


def test_hstack_is_numpys() -> None:
    hstack, one, other = make_hstack(), np.float64(0.1), np.float64(-3.0)
    cases: list[Any] = [
        (one, other),
        (one, 2.0),
        [one, other],
        (np.ones(2), one),
        (np.ones((2, 1)), np.zeros((2, 3))),
    ]
    for parts in cases:
        mine, theirs = hstack(parts), np.hstack(parts)
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == theirs.dtype


def test_views_show_the_present_and_take_what_is_set() -> None:
    goals = make_goals(("drawer-open-v3",), 0, 2, False)[0]
    env = FastMetaWorldEnv("drawer-open-v3", goals, 10)
    env.reset(Episode(np.random.SeedSequence(0), 0))
    named, real = env._env.data, env._env.real_data
    hand = named.body("hand").xpos
    before = hand.copy()
    env.step(np.array([1.0, 1.0, -1.0, 0.0], dtype=np.float32))
    assert named.body("hand").xpos is hand
    np.testing.assert_array_equal(hand, real.body("hand").xpos)
    assert not np.array_equal(hand, before)
    named.site("goal").xpos = np.array([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(real.site("goal").xpos, [1.0, 2.0, 3.0])
    assert named.body("hand").id == real.body("hand").id
