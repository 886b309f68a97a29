"""The loop of `collect_exorl --policy=rnd`: environments in parallel processes, one learner, and resuming.

Environments are stepped side by side, so that one call of the policy serves all; the learner works while they do. After
each round of E episodes the learner is written to `explorer.msgpack` beside the buffer, and a resumed command goes on
from there with the very same numbers as one that was never stopped. An episode that is lost meanwhile cannot be made
again: another is made in its place. What is learnt is in `rnd.py`, what is written in `exploration.py`.
"""

import json
import time
from pathlib import Path

import flax
import jax
import jax.numpy as jnp
import numpy as np

from envs import EXORL_SIZES, commands, episode_parts, exorl_episodes, rnd, worker_pool
from envs.exorl_episodes import EXPLORER_NAME, HISTORY_NAME
from utils.errors import UserError


def make_group(domain: str, episode_length: int, buffer: str, count: int):
    """In a worker: a function that drives `count` simulators side by side; its job is (command, one value for each)."""
    from envs import exploration

    recorders = [exploration.EpisodeRecorder(domain, episode_length, buffer) for _ in range(count)]

    def run(job):
        command, values = job
        if command == 'start':
            return np.stack([recorder.start(*value) for recorder, value in zip(recorders, values, strict=True)])
        if command == 'step':
            steps = [recorder.step(value) for recorder, value in zip(recorders, values, strict=True)]
            return tuple(np.stack(arrays) for arrays in zip(*steps, strict=True))
        return [recorder.finish() for recorder in recorders]

    return run


class _Simulators:
    """E simulators in W processes, as one array."""

    def __init__(self, crew: worker_pool.Crew, counts: list[int]):
        self._crew = crew
        self._ends = np.cumsum(counts)[:-1]

    def start(self, values) -> np.ndarray:
        """Begins an episode in each, with its index and seed; returns the first observations (E, d)."""
        self._send('start', values)
        return np.concatenate(self._crew.receive())

    def step(self, actions) -> None:
        """Has each begin a step."""
        self._send('step', actions)

    def receive(self) -> tuple[np.ndarray, np.ndarray]:
        """The next observations (E, d), and the actions (E, a) that were taken."""
        return tuple(np.concatenate(arrays) for arrays in zip(*self._crew.receive(), strict=True))

    def _send(self, command: str, values) -> None:
        self._crew.send([(command, part) for part in np.split(values, self._ends)])

    def finish(self) -> list[np.ndarray]:
        self._crew.send([('finish', None)] * (len(self._ends) + 1))
        return [cells for group in self._crew.receive() for cells in group]


def collect(buffer: Path, settings: dict, num_transitions: int, workers: int, progress, overwrite: bool) -> None:
    """Makes rounds of `num_envs` episodes until there are `num_transitions` transitions, and learns meanwhile.

    Args:
        buffer: folder of the episodes, claimed for these settings.
        settings: domain, seed, episode_length and num_envs count here.
        num_transitions: at least as many there will be.
        workers: number of processes, at most num_envs.
        progress: `collect_exorl.Progress`.
        overwrite: whether to throw away what is there if it cannot be continued.

    Raises:
        UserError: what is there cannot be continued; a worker died.
    """
    domain, length, num_envs = settings['domain'], settings['episode_length'], settings['num_envs']
    base_key = jax.random.key(settings['seed'])
    explorer = rnd.create(jax.random.fold_in(base_key, 2**31 - 1), *EXORL_SIZES[domain])
    try:
        explorer, replay, known, done, rounds, history = _resume(buffer, settings, num_transitions, explorer)
    except UserError:
        if not overwrite:
            raise
        commands.say(f'the episodes in {buffer} cannot be continued: starting over')
        _forget(buffer)
        explorer, replay, known, done, rounds, history = _resume(buffer, settings, num_transitions, explorer)
    progress.found_episodes(known)
    if done >= rounds:
        return
    counts = [len(part) for part in np.array_split(np.arange(num_envs), workers)]
    arguments = [(domain, length, str(buffer), count) for count in counts]
    updates = max(1, num_envs // rnd.TRANSITIONS_PER_UPDATE)
    with worker_pool.Crew(make_group, arguments) as crew:
        simulators = _Simulators(crew, counts)
        for number in range(done, rounds):
            began = time.monotonic()
            bonuses = []
            explorer, replay = _play_round(explorer, replay, simulators, number, settings, base_key, updates, bonuses)
            cells = simulators.finish()
            seconds = time.monotonic() - began
            bonus = float(np.mean(jax.device_get(bonuses))) if bonuses else None
            shown = {
                'bonus': 'none yet' if bonus is None else f'{bonus:.2e}',
                'updates/s': f'{len(bonuses) * updates / seconds:.0f}',
            }
            for each in cells:
                progress.finished_episode(each, **shown)
            history.append(
                {
                    'transitions': (number + 1) * num_envs * length,
                    'coverage': progress.coverage,
                    'bonus': bonus,
                    'updates_per_second': len(bonuses) * updates / seconds,
                    'transitions_per_second': num_envs * length / seconds,
                }
            )
            _save(buffer, explorer, number + 1, history)


def _play_round(explorer, replay, simulators, number: int, settings: dict, base_key, updates: int, bonuses: list):
    """One episode in every simulator; appends the bonus of each step's updates, still on the device."""
    length, num_envs = settings['episode_length'], settings['num_envs']
    action_size = replay.actions.shape[-1]
    first_row = number * (length + 1)
    indices = number * num_envs + np.arange(num_envs)
    seeds = [np.random.SeedSequence((settings['seed'], 2, index)).generate_state(1)[0] for index in indices.tolist()]
    observations = simulators.start(np.stack([indices, np.array(seeds, np.int64)], axis=1))
    explorer, replay = rnd.see(explorer, replay, first_row, observations)
    for t in range(length):
        step = number * length + t  # Of each simulator, over all rounds.
        act_key, learn_key = jax.random.split(jax.random.fold_in(base_key, step))
        is_learning = step * num_envs >= rnd.RANDOM_TRANSITIONS
        if is_learning:
            actions = rnd.act(explorer, observations, act_key, action_size=action_size)
        else:
            actions = jax.random.uniform(act_key, (num_envs, action_size), minval=-1.0, maxval=1.0)
        simulators.step(np.asarray(actions))
        if is_learning:  # The device is busy while the simulators are.
            explorer, metrics = rnd.learn(explorer, replay, step, learn_key, episode_length=length, updates=updates)
            bonuses.append(metrics['bonus'])
        observations, actions = simulators.receive()  # As they were taken, and are in the files to resume from.
        replay = rnd.do(replay, first_row + t, actions)
        explorer, replay = rnd.see(explorer, replay, first_row + t + 1, observations)
    return explorer, replay


def _save(buffer: Path, explorer: rnd.Explorer, rounds: int, history: list[dict]) -> None:
    """Writes the learner and its history, each wholly or not at all."""
    content = flax.serialization.to_bytes({'explorer': jax.device_get(explorer), 'rounds': rounds})
    for name, data in ((HISTORY_NAME, json.dumps(history, indent=1).encode()), (EXPLORER_NAME, content)):
        with episode_parts.atomic_path(buffer.parent / name) as temporary:
            temporary.write_bytes(data)


def _resume(buffer: Path, settings: dict, num_transitions: int, explorer: rnd.Explorer):
    """What an earlier command left, for rounds enough that there are `num_transitions` transitions in the end.

    Returns:
        The learner (the given one, if there is none), the replay, the paths of the episodes in it, how many rounds are
        done, how many there should be, and the history.

    Raises:
        UserError: what is there cannot be continued.
    """
    length, num_envs = settings['episode_length'], settings['num_envs']
    explorer, done, history = _restore(buffer, explorer)
    known = _known_episodes(buffer, length, num_envs, done)
    lost = done * num_envs - len(known)
    rounds = max(done, -(-(num_transitions + lost * length) // (length * num_envs)))
    if known:
        commands.say(f'continuing: {len(known)} episodes are already there')
    if lost:
        commands.say(
            f'{lost} more are lost, which rnd cannot make again: others are made in their place, and the explorer '
            'learns from what is there; an uninterrupted command would have made different ones'
        )
    replay = _load_replay(known, settings['domain'], length, num_envs, done, rounds)
    return explorer, replay, list(known.values()), done, rounds, history


def _restore(buffer: Path, explorer: rnd.Explorer) -> tuple[rnd.Explorer, int, list[dict]]:
    """The learner, the number of rounds that it has seen, and its history; as given, 0 and none if nothing is there."""
    path = buffer.parent / EXPLORER_NAME
    if not path.exists():
        return explorer, 0, []
    try:
        restored = flax.serialization.from_bytes({'explorer': explorer, 'rounds': 0}, path.read_bytes())
        history = json.loads((buffer.parent / HISTORY_NAME).read_text())
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f'{path} cannot be continued from ({type(error).__name__}): it is damaged, or of another version; '
            '--overwrite starts over'
        ) from error
    rounds = int(restored['rounds'])
    return jax.tree.map(jnp.array, restored['explorer']), rounds, history[:rounds]


def _known_episodes(buffer: Path, length: int, num_envs: int, done: int) -> dict[int, Path]:
    """The episodes of the rounds that the learner has seen, by index; those of a round that was cut off are deleted.

    Raises:
        UserError: there are later ones, which are not this learner's, or there is none of what it has seen.
    """
    checkpoint = buffer.parent / EXPLORER_NAME
    count, listed = done * num_envs, exorl_episodes.list_episodes(buffer)
    if listed and exorl_episodes.named_index(listed[-1]) >= count + num_envs:
        state = f'an older copy, which has learnt from {count} episodes' if checkpoint.exists() else 'missing'
        raise UserError(
            f'{checkpoint} is {state}, and {buffer} holds {listed[-1].name}: put the newest copy back, collect into '
            'another --exorl_dir, or throw these episodes away with --overwrite'
        )
    paths = {index: buffer / exorl_episodes.episode_name(index, length) for index in range(count)}
    there = set(listed)
    known = {index: path for index, path in paths.items() if path in there}
    if count and not known:
        raise UserError(
            f'{buffer} holds none of the {count} episodes that {checkpoint} has learnt from: put them back, collect '
            'into another --exorl_dir, or start over with --overwrite'
        )
    for path in listed:
        if exorl_episodes.named_index(path) >= count:
            path.unlink()  # Of a round that was not finished: the learner does not know them.
    return known


def _load_replay(known: dict[int, Path], domain: str, length: int, num_envs: int, done: int, rounds: int) -> rnd.Replay:
    """The replay with room for all rounds and the episodes of the first `done`; the one before stands in for a lost
    one."""
    observation_size, action_size = EXORL_SIZES[domain]
    observations = np.zeros((rounds * (length + 1), num_envs, observation_size), np.float32)
    actions = np.zeros((rounds * (length + 1), num_envs, action_size), np.float32)
    for index in range(done * num_envs):
        if index in known or not index:
            path = known.get(index) or next(iter(known.values()))
            # With what the coverage is counted from, so that a damaged episode is met before anything is.
            episode = exorl_episodes.read_episode(path, domain, ('observation', 'action', 'physics'))
        rows = slice(index // num_envs * (length + 1), (index // num_envs + 1) * (length + 1))
        observations[rows, index % num_envs] = episode['observation']
        actions[rows, index % num_envs] = np.roll(episode['action'], -1, axis=0)
    return rnd.Replay(jnp.array(observations), jnp.array(actions))


def _forget(buffer: Path) -> None:
    """Removes the learner, and then its episodes: without it, they are not taken for the rest of what it knows."""
    for path in (buffer.parent / EXPLORER_NAME, buffer.parent / HISTORY_NAME, *exorl_episodes.list_episodes(buffer)):
        path.unlink(missing_ok=True)
