"""What several agents share: losses that are no one's own, target averaging, and the per-module Adam step."""

import logging

import jax
import jax.numpy as jnp
import optax
from jax import lax

from utils.errors import UserError
from utils.networks import gaussian_log_prob


def require_choice(config, name: str, choices) -> None:
    """Raises UserError where a setting is none of `choices`."""
    if config[name] not in choices:
        raise UserError(f'agent.{name}={config[name]!r}: expected one of {", ".join(choices)}')


def require_at_least(minimum, config, *names: str) -> None:
    """Raises UserError where one of the settings is below `minimum`, or no number."""
    for name in names:
        if not config[name] >= minimum:
            raise UserError(f'agent.{name}={config[name]}: expected at least {minimum}')


def total(terms):
    """The sum of terms (loss, metrics), with the metrics of all and the sum as `loss`."""
    loss = sum(term for term, _ in terms)
    return loss, {'loss': loss, **{name: value for _, metrics in terms for name, value in metrics.items()}}


def expectile_loss(differences, expectile: float):
    """ρ_κ(u) = |κ − 1{u < 0}|·u², elementwise (IQL, arXiv 2110.06169, eq. 4)."""
    weights = jnp.where(differences < 0, 1.0 - expectile, expectile)
    return weights * differences**2


def behavioral_cloning(means, stds, actions):
    """Behavioural cloning of a Gaussian policy: L_BC = −E log π(a|s), with the mode's mean squared error to the data
    as a metric.

    means, stds, actions: (B, A).
    """
    loss = -gaussian_log_prob(means, stds, actions).mean()
    return loss, {'bc_loss': loss, 'actor_mse': jnp.mean((jnp.clip(means, -1, 1) - actions) ** 2)}


def reward_regression(predictions, rewards):
    """L_R = E(R(s̃) − r)² of a learned reward; predictions, rewards: (B,)."""
    loss = jnp.mean((predictions - rewards) ** 2)
    return loss, {'reward_loss': loss, 'reward_prediction': predictions.mean()}


def iql_value_loss(target_qs, values, expectile: float):
    """L_V = E ρ_κ(min_k Q̄_k(s, a) − V(s)) (IQL, arXiv 2110.06169, eq. 5).

    target_qs: (K, B), by the target critics; values: (B,).
    """
    loss = expectile_loss(target_qs.min(axis=0) - values, expectile).mean()
    return loss, {'value_loss': loss, 'v_mean': values.mean(), 'v_max': values.max(), 'v_min': values.min()}


def iql_critic_loss(qs, next_values, rewards, masks, discount: float):
    """L_Q = E Σ_k (Q_k(s, a) − (r + γ·m·sg V(s')))² (IQL, arXiv 2110.06169, eq. 6).

    qs: (K, B); next_values, rewards, masks: (B,).
    """
    targets = rewards + discount * masks * lax.stop_gradient(next_values)
    loss = ((qs - targets) ** 2).sum(axis=0).mean()
    return loss, {'critic_loss': loss, **q_metrics(qs)}


def q_metrics(qs):
    return {'q_mean': qs.mean(), 'q_max': qs.max(), 'q_min': qs.min()}


def advantage_weighted_regression(qs, values, means, stds, actions, alpha: float):
    """L_π = −E sg[w]·log π(a|s) with w = min(exp(α·A), 100), A = min_k Q_k(s, a) − V(s) (AWR, arXiv 1910.00177).

    qs: (K, B), of the data's actions; values: (B,); means, stds, actions: (B, A).
    """
    advantages = qs.min(axis=0) - values
    # The bound is put on the exponent, too: exp must not overflow, even where the result is cut.
    weights = lax.stop_gradient(jnp.exp(jnp.minimum(alpha * advantages, jnp.log(100.0))))
    loss = -(weights * gaussian_log_prob(means, stds, actions)).mean()
    _, bc_metrics = behavioral_cloning(means, stds, actions)
    return loss, {'actor_loss': loss, 'advantage': advantages.mean(), 'awr_weight': weights.mean(), **bc_metrics}


def q_maximization(q, normalize: bool):
    """−E q for the actor; with `normalize` divided by sg E|q|, which makes its scale independent of the rewards'.

    q: (B,), of the policy's own actions.
    """
    loss = -q.mean()
    return loss / lax.stop_gradient(jnp.abs(q).mean()) if normalize else loss


def pessimistic_q(agent, params, observations, actions, *latents):
    """min_k Q_k(s, a, …) of the critics in `params`: (B,)."""
    return agent.networks.critic.apply({'params': params['critic']}, observations, actions, *latents).min(axis=0)


def copy_of(params):
    """A copy on buffers of its own: a target network must never share a donated buffer with its online network."""
    return jax.tree.map(jnp.copy, params)


def target_update(params, target_params, tau: float):
    """Exponential moving average θ̄ ← τθ + (1−τ)θ̄ over the modules that have a target."""
    return {
        name: jax.tree.map(lambda p, t: tau * p + (1.0 - tau) * t, params[name], target)
        for name, target in target_params.items()
    }


def learning_rate(config, module: str) -> float:
    """`actor_lr` where it is set and the module is the actor, else `lr`."""
    if module == 'actor' and config.actor_lr is not None:
        return config.actor_lr
    return config.lr


def weight_decay(config, module: str) -> float:
    """The agent's `<module>_weight_decay` where it has one, else 0."""
    return config.get(f'{module}_weight_decay', 0.0)


STEP = 'finetuning_step'  # Beside the Adam states: updates of fine-tuning so far.


def validate_optimizer(config):
    """Raises UserError for a schedule that there is not, one without a length, or a weight decay below 0."""
    require_at_least(0, config, *(name for name in config if name.endswith('_weight_decay')))
    require_choice(config, 'finetuning_schedule', ('cosine', 'constant'))
    if config.schedule_steps is not None:
        require_at_least(1, config, 'schedule_steps')


def has_schedule(config) -> bool:
    """Whether anything changes over `schedule_steps`, so that a run has to say how many they are."""
    return config.finetuning_schedule != 'constant'


def finetuning_progress(agent):
    """Share of `schedule_steps` that fine-tuning has done: () in [0, 1]; 1 where the steps are not said."""
    if agent.config.schedule_steps is None:
        return 1.0
    return jnp.minimum(agent.opt_states[STEP] / agent.config.schedule_steps, 1.0)


def rate_schedule(agent):
    """Factor of all learning rates in the next update: half a cosine over fine-tuning, from 1 to 0 (arXiv 1608.03983,
    eq. 5, without restarts); 1 in pre-training, and for `constant`.

    Labelled data are few: at constant rates InFOM's success is lost again in long fine-tuning (docs/stability.md).
    """
    if not has_schedule(agent.config) or agent.config.schedule_steps is None:
        return 1.0
    return 0.5 * (1 + jnp.cos(jnp.pi * finetuning_progress(agent)))


def count_update(agent):
    """The agent after one more update of fine-tuning."""
    return agent.replace(opt_states=agent.opt_states | {STEP: agent.opt_states[STEP] + 1})


ACTING_ACTOR = 'acting_actor'  # Beside the Adam states: the average of the actor's parameters.


def acting_actor(agent):
    """The parameters that act: the moving average of the trained actor, which no loss sees. The average of the iterates
    varies less than the last of them (Polyak and Juditsky, 1992)."""
    return agent.opt_states[ACTING_ACTOR]


def averaged_actor(actor, average, count, tau: float):
    """The average after the `count`-th update of the actor: exponential with the rate `tau`, and as in Adam (arXiv
    1412.6980, §3) without a share of what it started from."""
    rate = -tau / jnp.expm1(count * jnp.log1p(-tau))
    return jax.tree.map(lambda new, old: rate * new + (1 - rate) * old, actor, average)


def init_adam(params, config):
    """One Adam state per module, the actor that acts, and the count of fine-tuning's updates."""
    states = {name: optax.adam(learning_rate(config, name)).init(module) for name, module in params.items()}
    return states | {ACTING_ACTOR: copy_of(params['actor']), STEP: jnp.zeros((), jnp.int32)}


def adam_step(agent, modules, loss_fn, rates=None):
    """One Adam step of `agent` on the named modules only, at the rates of `rate_schedule`; all others, and their Adam
    states, stay exactly where they are. The actor that acts follows the trained one.

    `loss_fn(params) -> (loss, metrics)` takes the full dict of parameters. Returns (params, opt_states, metrics).
    With `joint_adam` all modules take the step: those without a gradient move on by their Adam state's momentum, as
    under the one optimiser over all parameters of the published code; weight decay is for the named modules alone.
    `rates`: further factors of the learning rates of some modules.
    """
    decayed = modules  # What has no gradient would only shrink, by pre-training's end to nothing.
    modules = list(agent.params) if agent.config.joint_adam else modules
    trained = {name: agent.params[name] for name in modules}
    grads, metrics = jax.grad(lambda trained: loss_fn({**agent.params, **trained}), has_aux=True)(trained)
    params, opt_states = dict(agent.params), dict(agent.opt_states)
    schedule = rate_schedule(agent)
    for name in modules:
        rate = learning_rate(agent.config, name) * (rates or {}).get(name, 1.0) * schedule
        updates, opt_states[name] = optax.adam(rate).update(grads[name], opt_states[name])
        if name in decayed and (decay := weight_decay(agent.config, name)):
            # Decoupled from the gradient (AdamW, arXiv 1711.05101), and without a state of its own.
            shrinkage = rate * decay
            updates = jax.tree.map(lambda update, param: update - shrinkage * param, updates, params[name])
        params[name] = optax.apply_updates(params[name], updates)
    if 'actor' in modules:
        count = opt_states['actor'][0].count
        opt_states[ACTING_ACTOR] = averaged_actor(
            params['actor'], opt_states[ACTING_ACTOR], count, agent.config.actor_tau
        )
    return params, opt_states, metrics


# -------------------------------------------------------------------------------------------- contrastive occupancies


def contrastive_logits(state_actions, goals):
    """f_ij = φ(s_i, a_i)·ψ(g_j)/√Z for every pair of rows: (E, B, Z), (E, G, Z) → (E, B, G)."""
    return jnp.einsum('eik,ejk->eij', state_actions, goals) / jnp.sqrt(goals.shape[-1])


def contrastive_metrics(logits):
    """What tells positive pairs, the diagonal, from negative ones in logits (E, B, B)."""
    logits = logits.mean(axis=0)
    positives = jnp.diagonal(logits)
    negatives = (logits.sum() - positives.sum()) / max(logits.size - positives.size, 1)
    correct = jnp.argmax(logits, axis=1) == jnp.arange(logits.shape[0])
    return {'positive_logits': positives.mean(), 'negative_logits': negatives, 'contrastive_accuracy': correct.mean()}


def importance_weighted_actor_loss(logits, goal_rewards, means, stds, actions, alpha: float, normalize: bool):
    """L_π = −λ·E q − α·E log π(a|s) with q_i = w_i·R(g_i) and w_i = B·softmax_j(f_ij)_i, in log space: the estimate
    of the density ratio p(g_i | s_i, a_i) / p(g_i) (contrastive RL, arXiv 2206.07568, §4; TD InfoNCE, 2310.20141, §4).
    E q is then (1−γ)·Q where goals are drawn from p(g) (`actor_goals=marginal`); the published default takes later
    states of the row's own trajectory.

    logits: (B, B), of the policy's own actions; goal_rewards: (B,); means, stds, actions: (B, A).
    """
    log_weights = jnp.diagonal(logits) - jax.nn.logsumexp(logits, axis=1) + jnp.log(logits.shape[1])
    weights = jnp.exp(log_weights)
    q = weights * goal_rewards
    bc_loss, metrics = behavioral_cloning(means, stds, actions)
    loss = q_maximization(q, normalize) + alpha * bc_loss
    return loss, {'actor_loss': loss, 'actor_q': q.mean(), 'importance_weight': weights.mean(), **metrics}


# --------------------------------------------------------------------------------------------- latents of skills, tasks


def to_sphere(vectors):
    """vectors (…, Z) scaled to the norm √Z; those shorter than 1e-6 stay short, with a finite gradient."""
    squared_norms = jnp.sum(vectors**2, axis=-1, keepdims=True)
    return vectors * jnp.sqrt(vectors.shape[-1]) * lax.rsqrt(jnp.maximum(squared_norms, 1e-12))


def sphere_latents(key, shape):
    """Latents uniform on the sphere of radius √Z, Z = shape[-1]."""
    return to_sphere(jax.random.normal(key, shape))


def task_latent(direction, key):
    """The latent (Z,) of a task that was inferred as a `direction` of any length: scaled to √Z.

    Where there is none to scale, because all rewards are zero or the representation is constant, a random direction
    takes its place and the log says so.
    """
    largest = jnp.abs(direction).max()
    uninformative = ~(jnp.isfinite(largest) & (largest > 0))
    # A pure function cannot warn; the callback can, once for each seed under vmap.
    jax.debug.callback(_warn_of_random_latent, uninformative)
    # By its largest entry first: the squares of a tiny direction would vanish.
    scaled = to_sphere(direction / jnp.where(uninformative, 1.0, largest))
    return jnp.where(uninformative, sphere_latents(key, direction.shape), scaled)


def task_latents(agent, num_rows: int):
    """The task's latent for every row: (B, Z)."""
    return jnp.broadcast_to(agent.task_latent, (num_rows, agent.config.latent_dim))


def _warn_of_random_latent(uninformative):
    if uninformative:
        logging.warning(
            'the rewards of the labelled samples say nothing of the task (all are zero, or the representation is '
            'constant): its latent is a random direction'
        )


def map_observations(function, observations, block: int = 256):
    """function((S, …)) → features for many observations (N, …), `block` rows at a time: images of 10,000 rows would not
    fit through an encoder at once."""
    return lax.map(function, observations, batch_size=block)


def latent_iql_losses(agent, params, batch, latents, rewards, masks, *, alpha: float, update_actor: bool):
    """IQL (arXiv 2110.06169) with V(s, z), Q(s, a, z) and π(a|s, z): a list of (loss, metrics), L_V, L_Q and, with
    `update_actor`, the advantage-weighted L_π.

    agent: has networks value, critic and actor, a target critic, and config.discount and config.expectile.
    latents: (B, Z); rewards, masks: (B,).
    """
    networks, config = agent.networks, agent.config
    observations, actions = batch['observations'], batch['actions']
    values = networks.value.apply({'params': params['value']}, observations, latents)
    next_values = networks.value.apply({'params': params['value']}, batch['next_observations'], latents)
    qs = networks.critic.apply({'params': params['critic']}, observations, actions, latents)
    target_qs = networks.critic.apply({'params': agent.target_params['critic']}, observations, actions, latents)
    terms = [
        iql_value_loss(target_qs, values, config.expectile),
        iql_critic_loss(qs, next_values, rewards, masks, config.discount),
    ]
    if update_actor:
        means, stds = networks.actor.apply({'params': params['actor']}, observations, latents)
        terms.append(advantage_weighted_regression(qs, values, means, stds, actions, alpha))
    return terms


def update_modules(agent, modules, loss_fn, rates=None):
    """`adam_step`, then the moving average of the targets of the named modules; the other targets, which no loss of
    this phase reads, stay exactly as they are. Returns (agent, metrics)."""
    params, opt_states, metrics = adam_step(agent, modules, loss_fn, rates)
    moving = {name: target for name, target in agent.target_params.items() if name in modules}
    target_params = agent.target_params | target_update(params, moving, agent.config.tau)
    return agent.replace(params=params, opt_states=opt_states, target_params=target_params), metrics


def reset_targets(agent):
    """The agent with every target set to a copy of its online network; None for None."""
    if agent is None:
        return None
    return agent.replace(target_params=copy_of({name: agent.params[name] for name in agent.target_params}))
