"""Models on the policy's base on one rank: whose memory it is, and who leaves whom alone."""

import pytest
import torch

from marlhf_mega.checkpoint.weights import digest_of_base, fill_adapters, fill_random
from marlhf_mega.config.schema import Config
from marlhf_mega.data.microbatch import MicrobatchLimit
from marlhf_mega.models.forward import make_batches, run_forward, score_forward
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.models.lora import adapters_of, merged_adapters, without_adapters
from marlhf_mega.models.offload import create_offload
from marlhf_mega.models.shared_base import build_on_base, unshared_parameters
from marlhf_mega.models.train_state import TrainState
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh
from tests.distributed.plan_ranks import highest

CONFIG = Config.model_validate(
    {
        "model": {
            "num_layers": 4,
            "hidden_size": 64,
            "num_attention_heads": 4,
            "ffn_hidden_size": 96,
            "vocab_size": 30,
            "lora": {"rank": 1},
        },
        "memory": {"offload_idle": True},
    }
)


@pytest.fixture(scope="module")
def mesh():
    mesh = create_mesh(CONFIG.parallel)
    yield mesh
    destroy_mesh()


def fill(chunks, mesh, seed, only=None):
    fill_random(chunks, mesh, seed=seed, only=only)
    fill_adapters(chunks, mesh, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters_of(chunks):
            adapter.b.copy_(torch.randn(adapter.b.shape, generator=generator))
    return chunks


@pytest.fixture
def policy(mesh):
    chunks = build_chunks(CONFIG.model, CONFIG.precision, mesh, head="language")
    fill(chunks, mesh, seed=1)
    chunks[0].base_digest = digest_of_base(chunks, mesh)
    return chunks


def on_base(policy, mesh, seed=2, **options):
    chunks = build_on_base(policy, CONFIG.model, CONFIG.precision, mesh, **options)
    return fill(chunks, mesh, seed=seed, only="output_layer")


def base_bytes(policy):
    return sum(p.nbytes for p in policy[0].parameters() if not p.requires_grad)


def scores(chunks, mesh):
    batches = make_batches(
        [[1, 2, 3]], [[4, 5, 6, 7]], limit=MicrobatchLimit(sequences=1), mesh=mesh
    )
    return run_forward(chunks, batches, score_forward)


def test_only_adapters_and_a_head_have_memory_of_their_own(mesh, policy):
    critic = []
    built = highest(
        lambda: critic.extend(build_on_base(policy, CONFIG.model, CONFIG.precision, mesh))
    )
    # The largest matrix is a sixteenth of the base: it is there for a moment, without the others.
    assert built < base_bytes(policy) / 2
    own = unshared_parameters(critic, policy)
    adapters = [p for a in adapters_of(critic) for p in (a.a, a.b)]
    assert sum(p.numel() for p in own) == sum(p.numel() for p in adapters) + 64
    assert all(p.requires_grad for p in adapters)
    base = dict(policy[0].named_parameters())
    for name, parameter in critic[0].named_parameters():
        if ".lora." not in name and not name.startswith("output_layer"):
            assert parameter.data_ptr() == base[name].data_ptr()
            assert not parameter.requires_grad
    assert digest_of_base(critic, mesh) == critic[0].base_digest
    assert policy[0].base_digest.startswith(f"{critic[0].base_digest}-")


def test_a_model_on_the_base_is_the_same_model_with_a_base_of_its_own(mesh, policy):
    alone = build_chunks(CONFIG.model, CONFIG.precision, mesh, head="scalar")
    fill_random(alone, mesh, seed=1)
    fill_random(alone, mesh, seed=2, only="output_layer")
    fill(alone, mesh, seed=2, only="output_layer")
    shared = on_base(policy, mesh)
    assert scores(shared, mesh).equal(scores(alone, mesh))


def test_models_leave_each_other_alone(mesh, policy):
    critic, reward = on_base(policy, mesh), on_base(policy, mesh, seed=3, frozen=True)
    before = scores(critic, mesh), scores(reward, mesh)
    assert not before[0].equal(before[1])
    with without_adapters(policy):
        assert scores(critic, mesh).equal(before[0])
    with merged_adapters(policy):
        pass
    with without_adapters(reward):
        assert scores(critic, mesh).equal(before[0])
    assert scores(reward, mesh).equal(before[1])
    assert not any(p.requires_grad for p in reward[0].parameters())


def test_the_base_stays_on_the_device_when_models_on_it_are_offloaded(mesh, policy, tmp_path):
    critic, reward = on_base(policy, mesh), on_base(policy, mesh, seed=3, frozen=True)
    before = scores(critic, mesh), scores(reward, mesh)
    states = [TrainState(c, CONFIG.policy, total_steps=1) for c in (policy, critic)]
    digest = digest_of_base(policy, mesh)
    offload = create_offload(
        CONFIG.memory,
        mesh.platform,
        tmp_path,
        policy=states[0],
        critic=states[1],
        reference=None,
        rewards=[reward],
    )
    offload.start()
    own = sum(p.nbytes for p in unshared_parameters(reward, policy))
    assert 2 * own <= offload.num_bytes < 2 * own + base_bytes(policy) / 4
    assert digest_of_base(policy, mesh) == digest
    offload.end()
    assert scores(critic, mesh).equal(before[0])
    assert scores(reward, mesh).equal(before[1])
