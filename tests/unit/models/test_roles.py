"""Which of the models of ppo learn."""

from marlhf_mega.models.roles import Roles


def test_without_a_critic_only_the_policy_learns():
    policy, critic = object(), object()
    both = Roles(policy=policy, critic=critic, reference=[], rewards=[])
    assert both.learning == {"policy": policy, "critic": critic}
    alone = Roles(policy=policy, critic=None, reference=[], rewards=[])
    assert alone.learning == {"policy": policy}
