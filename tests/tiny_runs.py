"""Run directories as a run leaves them, made in a moment: for the tests of whatever reads runs."""

import json

from utils import runs

CUBE = 'cube-single-play-singletask-task{}-v0'
CUBE_1 = CUBE.format(1)
PRETRAINING_STEPS = 100


def write_run(
    save_dir,
    name,
    curves,
    *,
    env_name=CUBE_1,
    agent='infom',
    settings=None,
    explicit=(),
    interval=100,
    finished=True,
    environment=None,
    fingerprint='f' * 64,
):
    """Writes a run and returns its directory.

    curves: {seed: scores at each evaluation}, successes for OGBench's tasks, returns for the others. settings: values
    of config.json, with 'agent.<key>' for the agent's; explicit: which of them the command line chose. finished: else
    the run stopped before its last evaluation was done.
    """
    settings = {'agent.alpha': 10.0, 'preset': 'small', **(settings or {})}
    directory = runs.make_run_directory(save_dir / name)
    evaluations = max(map(len, curves.values()))
    config = {
        'agent_name': agent,
        'env_name': env_name,
        'seed': min(curves),
        'num_seeds': len(curves),
        'pretraining_steps': PRETRAINING_STEPS,
        'finetuning_steps': interval * (evaluations - 1),
        'sources': dict.fromkeys(explicit, 'command line'),
        'agent': {'agent_name': agent},
        'data': {'pretraining/train': {'fingerprint': fingerprint}},
        'environment': {'git_commit': 'abc', 'packages': {'jax': '0.10.2'}, **(environment or {})},
    }
    for key, value in settings.items():
        if key.startswith('agent.'):
            config['agent'][key.removeprefix('agent.')] = value
        else:
            config[key] = value
    (directory / 'config.json').write_text(json.dumps(config))
    with runs.MetricsLog(directory / 'metrics.jsonl') as log:
        for seed in curves:
            log.write(PRETRAINING_STEPS, 'pretraining', seed, {'training/flow_loss': 0.5, 'validation/flow_loss': 0.75})
        for number in range(evaluations if finished else evaluations - 1):
            for seed, curve in curves.items():
                if number < len(curve):
                    metrics = {'evaluation/episode.return': curve[number], 'evaluation/episode.length': 200.0}
                    if 'singletask' in env_name:
                        metrics |= {'evaluation/episode.success': curve[number]}
                    log.write(PRETRAINING_STEPS + number * interval, 'finetuning', seed, metrics)
    if finished:
        runs.write_summary(directory)
    return directory
