import pytest

from marlhf_mega.config.schema import Config
from marlhf_mega.models.gpt import build_chunks
from marlhf_mega.parallel.mesh import create_mesh, destroy_mesh

VOCAB = 50


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request):
    config = Config.model_validate(
        {
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "ffn_hidden_size": 48,
                "vocab_size": VOCAB,
            },
            "precision": {"dtype": request.param},
            "reward": {"source": "random"},
        }
    )
    mesh = create_mesh(config.parallel)
    yield build_chunks(config.model, config.precision, mesh, head="language"), mesh
    destroy_mesh()
