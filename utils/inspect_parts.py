"""The parts of `utils/inspect.py`'s page, each a function of (look, report): compute, draw, write the CSV, say it."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from envs import state_views
from utils import datasets, inspect_figures, runs
from utils import occupancy as occupancies
from utils import values as agent_values

RANDOM_SEED = 0  # Of everything that is drawn for a report: two reports of one run are the same.
NUM_PRIOR_INTENTIONS, NUM_FUTURES, NUM_PICTURES = 3, 64, 6
NUM_SCORED_STATES, NUM_SCORED_FUTURES = 64, 128
NUM_EMBEDDED, NUM_NEIGHBOURS = 2000, 10
NUM_VALUE_STEPS, NUM_VALUE_INTENTIONS = 250, 16
MAX_VIDEO_BYTES = 64e6
NEXT_ACTIONS = frozenset({'next_actions'})


def _key(stream: int):
    return jax.random.fold_in(jax.random.key(RANDOM_SEED), stream)


def no_occupancy(look, report) -> bool:
    """Says so where there is no flow to look at."""
    if occupancies.models_occupancy(look.agent):
        return False
    report.text(f'Left out: {look.config["agent_name"]} has no flow over future states.')
    return True


# ------------------------------------------------------------------------------------------------ what the run logged


def scores(look, report):
    """The scores of summary.json: this seed's, and over all seeds where there are several."""
    try:
        summary = json.loads((look.directory / 'summary.json').read_text())
        tables = {f'seed {look.seed}': summary['per_seed'][str(look.seed)]}
        if len(summary['seeds']) > 1:
            tables |= {'mean over seeds': summary['mean'], 'standard deviation': summary['std']}
        names = list(tables[f'seed {look.seed}'][runs.SCORES[0]])
        rows = [
            (f'{score}, {whose}', *(table[score][name] for name in names))
            for score in runs.SCORES
            for whose, table in tables.items()
        ]
    except (OSError, ValueError, KeyError) as error:
        report.text(f'No readable summary.json ({type(error).__name__}): a run writes it when it ends.')
        return
    if not any(row[1] for row in rows):
        report.text('This run has not been evaluated: scores come with fine-tuning.')
        return
    report.table(('score', *names), rows)
    report.text('final_three is the mean of the last three evaluations; stability is its ratio to the best one.')


def curves(look, report):
    """Every metric over the updates."""
    rows = [row for row in runs.read_metrics(look.directory / 'metrics.jsonl') if row['seed'] == look.seed]
    path = look.figure('curves.png')
    if not inspect_figures.draw_curves(path, rows):
        report.text('Nothing has been logged yet.')
        return
    report.figure(path, 'Metrics over the updates; the vertical line is the switch from pre-training to fine-tuning.')


def videos(look, report):
    """The run's films, newest first."""
    paths = (look.directory / 'videos').glob('[!.]*.mp4')  # Hidden ones are being written.
    paths = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    if not paths:
        report.text('The run recorded none (--video_episodes=1 records one at each evaluation).')
    room = MAX_VIDEO_BYTES
    for path in paths:
        room -= path.stat().st_size
        if room < 0:
            report.text(f'{path.name} and older ones are left out: the page would become too large.')
            break
        report.video(path, path.stem)


# ----------------------------------------------------------------------------------------------------------- futures


def futures(look, report):
    """Sampled futures of a few held-out states, on coordinates and as pictures."""
    if no_occupancy(look, report):
        return
    panels = state_views.panels(look.task)
    if not panels:
        report.text('Left out: the flow of an image task lives in feature space, where no coordinate has a name.')
        return
    rows = chosen_rows(look.dataset, look.num_states)
    batch = datasets.gather_batch(look.dataset, jnp.asarray(rows), NEXT_ACTIONS)
    names, samples = sample_under_intentions(look.agent, batch, _key(0))  # (K, B, N, S)
    discount = look.agent.config.discount
    report.text(
        f'Each state below is a held-out one; star: where it is. Points: {NUM_FUTURES} futures for each of '
        f'{len(names)} intentions, drawn from the flow at the action that was taken there, discounted by γ = '
        f'{discount:g} (a mean horizon of {1 / (1 - discount):.0f} steps). One intention was inferred from the '
        'transition itself, the others come from the prior. All start from the same noise: points of different '
        'colours that lie on one another mean that z makes no difference. Grey: what came, in the next '
        f'{round(3 / (1 - discount))} steps of the trajectory (line) and at times discounted in the same way (crosses).'
    )
    raw = look.normalizer.inverse(samples)
    observations, ends = look.raw['observations'], np.asarray(look.dataset.ends)
    coordinates = {c.label: c for panel in panels for c in (panel.x, panel.y)}
    runs.write_csv(
        look.figure('futures.csv'),
        ('row', 'intention', 'sample', *coordinates),
        [
            (row, name, n, *(f'{float(c.of(raw[k, b, n])):.5g}' for c in coordinates.values()))
            for b, row in enumerate(rows)
            for k, name in enumerate(names)
            for n in range(NUM_FUTURES)
        ],
    )
    came = occupancies.geometric_futures(_key(4), jnp.asarray(rows), jnp.asarray(ends[rows]), discount, NUM_FUTURES)
    pictures = Pictures(look, report)
    for b, row in enumerate(rows):
        trajectory = observations[row : min(row + round(3 / (1 - discount)), ends[row]) + 1]
        truth = observations[np.asarray(came[b])]
        path = look.figure(f'futures_{b}.png')
        inspect_figures.draw_futures(path, panels, observations[row], trajectory, truth, raw[:, b], names)
        report.figure(path, f'Futures of row {row}: step {row - int(look.dataset.starts[row])} of its episode.')
        pictures.add(row, samples[:, b], names, look.figure(f'futures_{b}_pictures.png'))
    pictures.close()


def chosen_rows(dataset, count):
    """Rows spread evenly over the first halves of the held-out episodes."""
    rows = occupancies.early_rows(dataset)
    return rows[((np.arange(count) + 0.5) / count * len(rows)).astype(int)]


def sample_under_intentions(agent, batch, key):
    """(names, futures (K, B, N, S)): under the intention inferred from each transition, then under some of the
    prior."""
    inferred_key, prior_key, noise_key = jax.random.split(key, 3)
    rows = len(batch['actions'])
    sample = jax.jit(occupancies.sample_futures, static_argnames='num_samples')
    latents = [occupancies.inferred_intentions(agent, batch, inferred_key)[0]]
    names = ['z inferred']
    if latents[0].shape[1]:  # Without intentions there is nothing to choose.
        keys = jax.random.split(prior_key, NUM_PRIOR_INTENTIONS)
        latents += [occupancies.prior_intentions(agent, each, rows) for each in keys]
        names += [f'z from the prior, {i + 1}' for i in range(NUM_PRIOR_INTENTIONS)]
    return names, np.stack([sample(agent, batch, z, noise_key, num_samples=NUM_FUTURES) for z in latents])


class Pictures:
    """Pictures of the held-out states nearest to sampled futures, as far as this machine and the data allow any."""

    def __init__(self, look, report):
        self._look, self._report, self._renderer = look, report, None
        rows = len(look.raw['terminals'])
        self._states = state_views.load_states(look.task, look.phase, 'val', look.dataset_dir, rows)
        if self._states is None:
            report.text(
                f'No pictures: {look.raw["source"]["file"]} holds no states of the simulator; the validation files '
                'that this version makes of the benchmark do.'
            )
            return
        try:
            self._renderer = state_views.StateRenderer(look.task)
            self._renderer(self._states, 0)
        except Exception as error:  # What simulators raise without a working OpenGL is of any type at all.
            self._renderer = None
            report.text(f'No pictures: rendering does not work here ({type(error).__name__}: {str(error)[:200]}).')
            return
        report.text(
            'Pictures: an observation does not say where everything is, so each picture is of the held-out state '
            'nearest to a sample (Euclidean distance of normalised observations, given above it), put into the '
            'simulator with its stored physics. Large distances mean that no held-out state is like the sample.'
        )

    def add(self, row, samples, names, path):
        """samples (K, N, S) of the state at `row`."""
        if self._renderer is None:
            return
        observations = np.asarray(self._look.dataset.observations)
        images, distances = [], []
        for futures in samples[:, :NUM_PICTURES]:
            away = np.linalg.norm(observations - futures[:, None], axis=-1)  # (M, rows)
            images.append([self._renderer(self._states, nearest) for nearest in away.argmin(axis=1)])
            distances.append(away.min(axis=1))
        inspect_figures.draw_strip(path, self._renderer(self._states, row), images, distances, names)
        self._report.figure(path, f'Nearest held-out states to futures of row {row}, a row for each intention.')

    def close(self):
        """Frees the simulator."""
        if self._renderer is not None:
            self._renderer.close()


# -------------------------------------------------------------------------------------------------------- intentions


def intentions(look, report):
    """Inferred intentions in the plane, and whether they tell what is done next."""
    if no_occupancy(look, report):
        return
    if not occupancies.latent_shape(look.agent, 1)[1]:
        report.text('Left out: this ablation has no intentions.')
        return
    pool = np.asarray(look.dataset.next_action_rows)
    rows = pool[np.linspace(0, len(pool) - 1, min(NUM_EMBEDDED, len(pool))).round().astype(int)]
    batch = datasets.gather_batch(look.dataset, jnp.asarray(rows), NEXT_ACTIONS)
    latents, means, kl = jax.device_get(jax.jit(occupancies.inferred_intentions)(look.agent, batch, _key(1)))
    points, explained = principal_components(means)
    ends = np.asarray(look.dataset.ends)
    episodes = np.unique(ends, return_inverse=True)[1][rows]
    behaviour = state_views.behaviour(look.task, look.raw['observations'], ends)
    if behaviour is not None:
        behaviour = behaviour._replace(values=behaviour.values[rows])
    path = look.figure('intentions.png')
    inspect_figures.draw_intentions(path, points, explained, behaviour, episodes)
    report.figure(
        path, f'Intentions (means of q(z|s′,a′)) of {len(rows)} held-out transitions on their first two components.'
    )
    labels = np.full(len(rows), np.nan) if behaviour is None else behaviour.values
    runs.write_csv(
        look.figure('intentions.csv'),
        ('row', 'episode', 'label', 'component_1', 'component_2', 'kl'),
        [
            (row, episode, f'{label:g}', f'{x:.5g}', f'{y:.5g}', f'{nats:.5g}')
            for row, episode, label, (x, y), nats in zip(rows, episodes, labels, points, kl, strict=True)
        ],
    )
    if np.isfinite(kl).all():
        report.text(
            f'KL from the prior, summed over the {means.shape[1]} dimensions: {kl.mean():.3g} nats on average. z '
            'cannot tell more than that about the transition' + (': it tells nothing.' if kl.mean() < 0.01 else '.')
        )
    if behaviour is not None and behaviour.names is not None and len(set(episodes)) > 1:
        accuracy, chance = neighbour_accuracy(latents, behaviour.values, episodes)
        report.text(
            f'“{behaviour.title}”, guessed from the {NUM_NEIGHBOURS} nearest intentions of other episodes, drawn from '
            f'q as the flow gets them: {accuracy:.0%} right; always the most frequent label: {chance:.0%}.'
        )


def principal_components(points):
    """(projections (B, 2) on the first two principal components, their shares of the variance (2,))."""
    centred = points - points.mean(axis=0)
    left, singular, _ = np.linalg.svd(centred, full_matrices=False)
    projections = np.zeros((len(points), 2))
    count = min(2, len(singular))
    projections[:, :count] = left[:, :count] * singular[:count]
    shares = np.zeros(2)
    shares[:count] = singular[:count] ** 2 / max((singular**2).sum(), 1e-30)
    return projections, shares


def neighbour_accuracy(points, labels, groups, count=NUM_NEIGHBOURS):
    """(share of rows whose label is the commonest among the `count` nearest rows of other groups, share of the most
    frequent label). points (B, Z), labels and groups (B,) integers.

    Other groups only: rows of one episode are near each other in time, and so alike whatever z means.
    """
    kinds, labels = np.unique(labels, return_inverse=True)
    squares = (points**2).sum(axis=1)
    distances = squares[:, None] + squares - 2 * points @ points.T
    distances[groups[:, None] == groups] = np.inf
    nearest = np.argsort(distances, axis=1, kind='stable')[:, :count]
    votes = (labels[nearest][..., None] == np.arange(len(kinds))).sum(axis=1)
    return float((votes.argmax(axis=1) == labels).mean()), float(np.bincount(labels).max() / len(labels))


# --------------------------------------------------------------------------------------------------------- occupancy


def occupancy(look, report):
    """Distances between sampled and true futures at every kept checkpoint."""
    if no_occupancy(look, report):
        return
    scored = look.score_occupancy(_key(2), NUM_SCORED_STATES, NUM_SCORED_FUTURES)
    metas, reports = zip(*scored, strict=True)
    steps = [meta['step'] for meta in metas]
    report.text(
        'At held-out states: how far samples of the flow are from the states that really came, at geometrically '
        'distributed times, in the same trajectory (normalised observations; lower is better; ± one standard error). '
        'The marginal baseline answers with random held-out states, the copy baseline with the state itself. The '
        'truth is one trajectory for each state, so that not even the true distribution would reach 0. Where inferred '
        'intentions do better than those of other transitions, z tells something about the future; where those of '
        'other transitions do better than those from the prior, the flow was not trained on what the prior gives.'
    )
    if len({look.units(meta) for meta in metas}) > 1:
        report.text(
            'The checkpoints see the states in units of their own (each has its encoder, or its normaliser): compare '
            'predictors at one checkpoint, not one predictor over checkpoints.'
        )
    names = ('energy_distance', 'sliced_wasserstein')
    rows = [
        (step, predictor, *(value for name in names for value in (values[name], values[f'{name}_error'])))
        for step, each in zip(steps, reports, strict=True)
        for predictor, values in each.items()
    ]
    runs.write_csv(
        look.figure('occupancy.csv'), ('step', 'predictor', *(f'{n}{e}' for n in names for e in ('', '_error'))), rows
    )
    report.table(
        ('predictor', 'step', 'energy distance', 'sliced Wasserstein'),
        [(name, step, f'{e:.3f} ± {ee:.3f}', f'{w:.3f} ± {we:.3f}') for step, name, e, ee, w, we in rows],
    )
    path = look.figure('occupancy.png')
    inspect_figures.draw_occupancy(path, steps, reports, names[0], 'energy distance')
    report.figure(path, 'Energy distance to the true futures at the kept checkpoints.')


# ------------------------------------------------------------------------------------------------------------ values


def values(look, report):
    """What critic and occupancy say along a labelled held-out episode, beside the return that came."""
    if look.trained_on != 'finetuning':
        report.text('Left out: before fine-tuning there is no reward, hence neither a trained critic nor R.')
        return
    raw = look.load_raw('finetuning')
    look.mind_another_file('finetuning', raw, report)
    dataset = look.make_dataset(raw)
    start, end = most_varied_episode(raw['rewards'], np.asarray(dataset.starts), np.asarray(dataset.ends))
    rewards, masks = raw['rewards'][start:end], raw['masks'][start:end]  # The last row holds no action.
    discount = look.agent.config.discount
    steps = np.unique(np.linspace(0, end - start - 1, min(NUM_VALUE_STEPS, end - start)).round().astype(int))
    batch = {
        'observations': datasets.gather_observations(dataset, jnp.asarray(start + steps)),
        'actions': dataset.actions[start + steps],
    }
    # A reward of the state itself has one for the last row, too, where the discounted futures stay.
    last = end + 1 if look.task.reward_at == 'observations' else end
    realised = agent_values.discounted_returns(raw['rewards'][start:last], discount)[steps]
    drawn, bands = {'realised return': realised}, {}
    if not masks.all():
        drawn['realised return up to success'] = agent_values.discounted_returns(rewards, discount, masks)[steps]
    if hasattr(look.agent, 'q_values'):  # Contrastive critics give no number for a state and action alone.
        drawn['Q, as the actor sees it'] = np.asarray(jax.jit(look.agent.q_values)(**batch))
    if occupancies.models_occupancy(look.agent):
        whole = batch
        if look.agent.config.critic_latent_type != 'prior':
            whole = datasets.gather_batch(
                dataset, jnp.asarray(start + np.minimum(steps, end - start - 2)), NEXT_ACTIONS
            )
        estimate = jax.jit(agent_values.intention_values, static_argnames='num_intentions')
        estimates = np.asarray(estimate(look.agent, whole, _key(3), num_intentions=NUM_VALUE_INTENTIONS))
        label = 'Q̂, mean over intentions (band: 10 to 90 %)'
        drawn[label] = estimates.mean(axis=0)
        bands[label] = tuple(np.quantile(estimates, (0.1, 0.9), axis=0))
    if all(name.startswith('realised') for name in drawn):
        report.text(
            f'Left out: {look.config["agent_name"]} has no critic that gives one number for a state and action.'
        )
        return
    path = look.figure('values.png')
    inspect_figures.draw_values(path, steps, rewards[steps], drawn, bands)
    report.figure(
        path,
        f'Rows {start} to {end - 1} of {raw["source"]["file"]}, the held-out episode with the most varied rewards; '
        'values at the actions that were taken.',
    )
    runs.write_csv(
        look.figure('values.csv'),
        ('step', 'reward', *drawn),
        [
            (step, f'{rewards[step]:g}', *(f'{series[i]:.6g}' for series in drawn.values()))
            for i, step in enumerate(steps)
        ],
    )
    report.table(
        ('along this episode', 'mean', 'correlation with the realised return'),
        [(name, float(series.mean()), correlation(series, realised)) for name, series in drawn.items()],
    )
    report.text(
        'The realised return is that of whoever made the data, the last reward taken to go on for ever; Q is meant to '
        'be that of a better policy, so it should lie above and move with it. '
        + (
            'Q̂ is the mean of R over futures of the flow, divided by 1 − γ: the targets that Q is fitted to.'
            + (
                ' The occupancy counts the state itself, but here a reward belongs to the state after the action: Q̂ '
                'and Q are one step ahead of the realised return.'
                if look.task.reward_at != 'observations'
                else ''
            )
            if occupancies.models_occupancy(look.agent)
            else 'This agent bootstraps up to success, where there is one.'
        )
    )


def most_varied_episode(rewards, starts, ends):
    """(first row, last row) of the episode whose rewards, but the last row's, have the largest standard deviation."""
    episodes = [(start, end) for start, end in np.unique(np.stack([starts, ends], axis=1), axis=0) if end > start + 1]
    spread = [rewards[start:end].std() for start, end in episodes]
    return tuple(int(row) for row in episodes[int(np.argmax(spread))])


def correlation(x, y) -> float:
    """Pearson's; NaN where one of them does not vary."""
    return float(np.corrcoef(x, y)[0, 1]) if np.std(x) > 0 and np.std(y) > 0 else float('nan')
