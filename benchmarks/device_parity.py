"""Whether the accelerator trains as the host's processor does: the same updates on both, from the same agents.

    python -m benchmarks.device_parity --preset=small [--agent=infom] [--num_seeds=8] [--updates=200] [--repeats=5] \
        [--precision=highest]

Worth running on a new machine, driver or version of JAX, before hours of training. In each phase, chunks of `--updates`
(`--finetuning_updates`) start on both devices from the agents that the processor has reached, so that rounding has no
time to grow, on synthetic data of the task's shapes; and so does the switch between the phases, in which each part of
the agents is compared. Prints a Markdown table, what differs most first; exit code 1 where a metric or a part differs
by more than `--tolerance`, or is not finite. The other flags are those of `benchmarks/throughput.py`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

import agents
from benchmarks import throughput
from utils import cli, devices, training
from utils.errors import UserError

FLAGS = flags.FLAGS

SMALL = 0.01  # Numbers below it are told from 0 by their difference alone.


class Difference(NamedTuple):
    """One metric of one chunk, in the seed in which the devices differ most, or one part of the agents after the
    switch, where it differs most: `share` of the larger of the two."""

    phase: str
    start: int
    metric: str
    host: float
    device: float
    share: float


def differences(phase: str, start: int, on_host: dict, on_device: dict, *, of_arrays=False) -> list[Difference]:
    """Of {name: numbers} on the host's processor and on the device; `of_arrays`: as shares of the largest number there,
    for the moments of Adam are small throughout."""
    rows = []
    for name, host in on_host.items():
        host, device = np.ravel(host).astype(np.float64), np.ravel(on_device[name]).astype(np.float64)
        scale = max(np.abs(host).max(), 1e-30) if of_arrays else SMALL
        share = np.abs(host - device) / np.maximum(np.maximum(np.abs(host), np.abs(device)), scale)
        share = np.where(np.isfinite(host) & np.isfinite(device), share, np.inf)
        worst = int(np.argmax(share))
        rows.append(Difference(phase, start, name, float(host[worst]), float(device[worst]), float(share[worst])))
    return rows


def means(metrics: dict) -> dict:
    """The seeds' means of a chunk's {metric: (means (S,), first bad steps (S,))}."""
    return {name: mean for name, (mean, _) in metrics.items()}


def parts(agents) -> dict:
    """{path: array} of the agents' floats, on the host."""
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(agents))
    return {jax.tree_util.keystr(path): x for path, x in leaves if np.issubdtype(x.dtype, np.floating)}


def compare(problem, num_seeds: int, updates: dict[str, int], chunks: int, device: jax.Device) -> Iterator[Difference]:
    """Both phases, `chunks` chunks of `updates[phase]` updates each, on the host's processor and on `device`."""
    host, seeds = jax.devices('cpu')[0], list(range(num_seeds))
    with devices.host_precision():
        state = jax.device_get(training.create_agents(problem.agent_class, seeds, problem.example, problem.config))
    for phase in throughput.PHASES:
        data, keys = problem.dataset(phase), training.stream_keys(seeds, phase)
        if phase == 'finetuning':
            begin_keys = training.stream_keys(seeds, 'begin_finetuning')
            begun = training.begin_finetuning(*jax.device_put((state, data)), begin_keys)
            labelled = training.labelled_batches(state, jax.device_put(data, host), begin_keys)
            with devices.host_precision():
                begin = jax.vmap(problem.agent_class.begin_finetuning)
                state = jax.device_get(begin(*jax.device_put((state, *labelled), host)))
            yield from differences('switch', 0, parts(state), parts(begun), of_arrays=True)

        inputs = {where: jax.device_put((data, keys), where) for where in (host, device)}

        def train(where, start):
            agents = jax.device_put(state, where)
            return training.train_chunk(agents, *inputs[where], np.int32(start), phase=phase, n=updates[phase])

        for start in range(0, chunks * updates[phase], updates[phase]):
            _, on_device = train(device, start)
            with devices.host_precision():
                state, on_host = jax.device_get(train(host, start))
            yield from differences(phase, start, means(on_host), means(on_device))


def table(rows: list[Difference]) -> str:
    """Each metric where it differs most, those that differ most first."""
    worst: dict[tuple[str, str], Difference] = {}
    for row in rows:
        key = (row.phase, row.metric)
        if key not in worst or row.share > worst[key].share:
            worst[key] = row
    lines = [
        '| phase | metric | chunk from | processor | device | difference |',
        '| --- | --- | --- | --- | --- | --- |',
    ]
    for row in sorted(worst.values(), key=lambda row: -row.share):
        lines.append(
            f'| {row.phase} | {row.metric} | {row.start} | {row.host:.6g} | {row.device:.6g} | {row.share:.2g} |'
        )
    return '\n'.join(lines)


def main(_):
    device = jax.devices()[-1]
    if device == jax.devices('cpu')[0]:
        raise UserError('JAX finds no device but the processor, so that there is nothing to compare it with')
    devices.set_matmul_precision(FLAGS.precision)
    problem = throughput.make_problem(
        agents.resolve(FLAGS.agent), FLAGS.env_name, FLAGS.preset, FLAGS.rows, FLAGS.batch_size
    )
    updates = throughput.updates_of_a_turn(problem.config)
    rows = list(compare(problem, FLAGS.num_seeds, updates, FLAGS.repeats, device))
    print(table(rows))
    bad = [row for row in rows if row.share > FLAGS.tolerance]
    print(f'{device.device_kind}, {FLAGS.precision}: {len(bad)} of {len(rows)} differ by more than {FLAGS.tolerance:g}')
    return 1 if bad else 0


if __name__ == '__main__':
    flags.DEFINE_float('tolerance', 0.1, 'largest difference that rounding is taken to explain', lower_bound=0)
    cli.run(main)
