"""Every agent's configuration: the published defaults, and values that no run can have."""

import pytest

import agents
from tests import tiny_agents
from utils.errors import UserError

COMMON_DEFAULTS = dict(
    lr=3e-4, actor_lr=None, joint_adam=False, batch_size=256, discount=0.99, actor_freq=4, actor_layer_norm=False,
    const_std=True, value_layer_norm=True, actor_hidden_dims=(512,) * 4, value_hidden_dims=(512,) * 4,
)  # fmt: skip
REBRAC_DEFAULTS = dict(
    tanh_squash=True, alpha_actor=0.1, alpha_critic=0.1, actor_noise=0.2, actor_noise_clip=0.5, normalize_q_loss=True
)
DEFAULTS = {
    'infom': dict(latent_dim=512, kl_weight=0.01, alpha=10.0, num_flow_goals=16, num_flow_steps=10, encoder=None),
    'iql': dict(alpha=10.0, actor_loss='awr', expectile=0.9, encoder=None),
    'rebrac': dict(**REBRAC_DEFAULTS, encoder=None),
    'dino_rebrac': dict(
        **REBRAC_DEFAULTS, repr_noise=0.2, repr_noise_clip=0.2, repr_temp=0.1, target_repr_temp=0.04, center_rate=0.1,
        encoder='mlp', encoder_hidden_dims=(512,) * 4,
    ),
    'mbpo_rebrac': dict(
        **REBRAC_DEFAULTS, num_model_rollouts=256, num_model_rollout_steps=2, transition_layer_norm=True,
        reward_layer_norm=True, encoder=None,
    ),
    'crl_infonce': dict(
        latent_dim=512, alpha=0.1, contrastive_loss='forward_infonce', logsumexp_penalty_coeff=0.01,
        normalize_q_loss=True, goal_offset=1, actor_goals='trajectory', encoder=None,
    ),
    'td_infonce': dict(
        latent_dim=512, alpha=0.1, logit_agg='mean', normalize_q_loss=True, actor_goals='trajectory', encoder=None
    ),
    'fb_iql': dict(
        latent_dim=512, alpha_repr=10.0, alpha_awr=10.0, repr_agg='mean', orthonorm_coeff=1.0, latent_mix_prob=0.5,
        num_latent_inference_samples=10_000, expectile=0.9, encoder=None,
    ),
    'hilp_iql': dict(latent_dim=512, alpha=10.0, num_latent_inference_samples=10_000, expectile=0.9, encoder=None),
}  # fmt: skip


@pytest.mark.parametrize('name', agents.available())
def test_published_defaults(name):
    config = agents.load(name).get_config()
    tau = {} if name in tiny_agents.WITHOUT_TARGETS else dict(tau=0.005)
    expected = {**COMMON_DEFAULTS, **tau, **DEFAULTS[name]}
    assert {key: config[key] for key in expected} == expected
    assert config.agent_name == name


@pytest.mark.parametrize(
    ('name', 'overrides'),
    [
        ('infom', dict(reward_weight_decay=-1.0)),
        ('infom', dict(alpha=-1.0)),
        ('infom', dict(kl_weight=-1.0)),
        ('crl_infonce', dict(alpha=-1.0)),
        ('td_infonce', dict(alpha=-1.0)),
        ('fb_iql', dict(alpha_repr=-1.0)),
        ('fb_iql', dict(alpha_awr=-1.0)),
        ('hilp_iql', dict(alpha=-1.0)),
        ('mbpo_rebrac', dict(reward_weight_decay=-1.0)),
        ('iql', dict(actor_loss='ddpg')),
        ('iql', dict(alpha=-1.0)),
        ('iql', dict(encoder='impala_tiny')),
        ('rebrac', dict(alpha_actor=-0.1)),
        ('rebrac', dict(alpha_critic=-0.1)),
        ('rebrac', dict(actor_noise=-0.2)),
        ('rebrac', dict(actor_noise_clip=-0.5)),
        ('dino_rebrac', dict(alpha_actor=-0.1)),
        ('dino_rebrac', dict(encoder=None)),
        ('dino_rebrac', dict(repr_temp=0.0)),
        ('dino_rebrac', dict(target_repr_temp=-0.04)),
        ('dino_rebrac', dict(repr_noise=-0.2)),
        ('dino_rebrac', dict(repr_noise_clip=-0.2)),
        ('dino_rebrac', dict(center_rate=0.0)),
        ('mbpo_rebrac', dict(alpha_critic=-0.1)),
        ('mbpo_rebrac', dict(encoder='impala_debug')),
        ('mbpo_rebrac', dict(num_model_rollouts=0)),
        ('mbpo_rebrac', dict(num_model_rollout_steps=0)),
        ('mbpo_rebrac', dict(model_buffer_batches=0)),
        ('mbpo_rebrac', dict(batch_size=1)),
        ('crl_infonce', dict(contrastive_loss='nce')),
        ('crl_infonce', dict(actor_goals='future')),
        ('crl_infonce', dict(goal_offset=-1)),
        ('crl_infonce', dict(logsumexp_penalty_coeff=-0.1)),
        ('td_infonce', dict(logit_agg='max')),
        ('td_infonce', dict(goals='trajectory')),
        ('td_infonce', dict(actor_goals='future')),
        ('fb_iql', dict(repr_agg='max')),
        ('fb_iql', dict(latent_mix_prob=1.5)),
        ('fb_iql', dict(orthonorm_coeff=-1.0)),
        ('fb_iql', dict(num_latent_inference_samples=0)),
        ('hilp_iql', dict(num_latent_inference_samples=0)),
    ],
)
def test_impossible_configurations_are_user_errors(name, overrides):
    (key,) = overrides
    with pytest.raises(UserError, match=key):
        tiny_agents.make_agent(name, tiny_agents.make_batch(), **overrides)
