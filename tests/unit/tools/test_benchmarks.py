"""The benchmark scripts run on real ranks and print what they promise."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.ranks import run_forked

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "tools" / "benchmark"
TINY = """--hidden 32 --layers 2 --heads 4 --kv-heads 2 --ffn 48 --vocab 64 --batch 8
--prompt-len 5 --response-len 7 --iters 2""".split()


def benchmark(name, *options, check=True):
    if "--ranks" not in options:  # it needs no torchrun
        done = run_forked(FOLDER / f"{name}.py", *TINY, *options)
    else:
        command = [sys.executable, "-W", "ignore", str(FOLDER / f"{name}.py"), *TINY, *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0 or not check, done.stderr[-3000:]
    return done


@pytest.fixture
def common(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("common")


@pytest.mark.slow
def test_rollout_writes_what_it_prints_and_starts_its_ranks(tmp_path):
    out = tmp_path / "rollout.json"
    options = ["--ranks", "2", "--tensor-size", "2", "--lengths", "geometric:2:9", "--slots", "3"]
    lines = benchmark("rollout", *options, "--out", str(out)).stdout.splitlines()
    found = json.loads(lines[-1])
    assert json.loads(out.read_text()) == found
    assert found["layout"] == "2 ranks: TP2 x PP1 x DP1 (gloo, cpu)"
    assert 8 * 2 <= found["new_tokens"] <= 8 * 9
    seconds = found["seconds"]["rollout_s"]
    assert 0 < seconds["min"] <= seconds["median"] <= seconds["max"]
    spread = found["new_tokens_per_s_spread"]
    assert spread["max"] == pytest.approx(found["new_tokens"] / seconds["min"])
    assert found["new_tokens_per_s"] == spread["median"]
    assert found["peak_memory_bytes"]["largest_rank"] <= found["peak_memory_bytes"]["all_ranks"]


@pytest.mark.slow
def test_ppo_step_times_the_three_phases_of_an_iteration():
    options = ["--minibatches", "2", "--overlap"]
    found = json.loads(benchmark("ppo_step", *options).stdout.splitlines()[-1])
    seconds = {name: spread["median"] for name, spread in found["seconds"].items()}
    assert set(seconds) == {"iter_s", "generation_s", "scoring_s", "update_s"}
    assert all(set(spread) == {"median", "min", "max"} for spread in found["seconds"].values())
    phases = seconds["generation_s"] + seconds["scoring_s"] + seconds["update_s"]
    assert phases == pytest.approx(seconds["iter_s"], rel=0.5)
    flops = {name: phase["flops"] for name, phase in found["phases"].items()}
    assert flops["iter"] == flops["generation"] + flops["scoring"] + flops["update"]
    assert found["minibatch_size"] == 4
    assert max(found["gemm_peak_flops"].values()) > 1e9


@pytest.mark.slow
def test_overlap_runs_the_job_three_ways(tmp_path):
    out = tmp_path / "overlap.json"
    tiny = "model.num_layers=1 model.hidden_size=32 model.num_attention_heads=2".split()
    tiny += "model.num_query_groups=2 model.ffn_hidden_size=48 rollout.batch_size=4".split()
    tiny += "ppo.minibatch_size=4 rollout.max_response_tokens=8".split()
    script = [sys.executable, str(FOLDER / "overlap.py"), "--out", str(out)]
    often = ["--ranks", "2", "--rollout-ranks", "1", "--steps", "3", "--rounds", "1"]
    subprocess.run([*script, *often, *tiny], capture_output=True, check=True, timeout=240)
    found = json.loads(out.read_text())
    assert found["together"]["generation"]["median"] == 0
    for way in ("in turn", "one step ahead"):
        assert found[way]["generation"]["median"] > 0
        assert found[way]["reshard"]["median"] > 0
    in_turn = found["in turn"]
    assert in_turn["generation"]["median"] < in_turn["step"]["median"]


@pytest.mark.slow
def test_reshard_moves_all_bytes_that_a_rank_lacks():
    options = ["--ranks", "2", "--tensor-size", "1", "--pipeline-size", "2"]
    found = json.loads(benchmark("reshard", *options).stdout.splitlines()[-1])
    assert found["bit_exact"] is True
    assert found["rollout_layout"] == "2 ranks: TP1 x PP1 x DP2 (gloo, cpu)"
    # Each half of the model goes to one other rank, and both ranks keep theirs on the way back.
    assert found["moved_bytes"] == {"there": found["model_bytes"], "back": 0}
    assert set(found["seconds"]) == {"there_s", "back_s", "broadcast_s"}
    assert found["broadcast_fraction"]["there"] > 0


@pytest.mark.slow
def test_engines_generate_in_turn_from_the_same_weights():
    """vLLM, where it is installed, is started last."""
    options = ["--ranks", "2", "--tensor-size", "2", "--hidden", "128"]
    found = json.loads(benchmark("engines", *options).stdout.splitlines()[-1])
    ways = found["ways"]
    assert list(ways)[:2] == ["own", "resharded"]
    assert ways["own"]["load_s"] == 0 < ways["resharded"]["load_s"]
    for name, way in ways.items():
        assert way["tokens_per_s"] == 8 * 7 / found["seconds"][f"{name}_s"]["median"]
        assert way["first_s"] > 0
        assert way["memory_bytes"] > 0


@pytest.mark.slow
def test_train_step_counts_every_token():
    options = ["--microbatches", "4", "--overlap", "--dtype", "float32"]
    options += ["--lora-rank", "2", "--lora-dropout", "0.1"]
    found = json.loads(benchmark("train_step", *options).stdout.splitlines()[-1])
    median = found["seconds"]["step_s"]["median"]
    assert found["tokens_per_s"] == pytest.approx(8 * (5 + 7) / median)
    # Of a layer: q and o 2 * 64 each, k and v 2 * 48, gate, up and down 2 * 80.
    learn = 2 * (2 * 128 + 2 * 96 + 3 * 160)
    sizes = found["bytes_on_rank_0"]
    assert sizes["optimizer"] == 2 * 4 * learn
    assert 4 * learn <= sizes["gradients"] <= 4 * (learn + 16 * 64)
    layer = 2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32 + 2 * 32
    assert sizes["weights"] == 4 * (2 * 64 * 32 + 2 * layer + 32 + learn)


@pytest.mark.slow
def test_packed_microbatches_hold_only_real_tokens(common):
    ways = ["sequences:4", "tokens:25", "packed:40"]
    options = ["--lengths", "geometric:3:20", "--minibatches", "2", *ways]
    found = json.loads(benchmark("microbatches", *options).stdout.splitlines()[-1])["ways"]
    lengths = common.response_lengths("geometric:3:20", count=8, fixed=0, seed=1234)
    assert found["packed:40"]["tokens"] == 8 * 5 + sum(lengths) < found["tokens:25"]["tokens"]
    assert found["tokens:25"]["tokens"] < found["sequences:4"]["tokens"]
    assert found["sequences:4"]["microbatches"] == 2
    assert found["packed:40"]["scoring_s"]["median"] > 0


@pytest.mark.slow
def test_scaling_gives_every_rank_the_same_work(tmp_path):
    script, out = FOLDER / "scaling.py", tmp_path / "scaling.json"
    options = [*TINY, "--world", "1", "2", "--batch", "2", "--rounds", "1", "--out", str(out)]
    command = [sys.executable, "-W", "ignore", str(script), *options]
    subprocess.run(command, check=True, timeout=240)
    found = json.loads(out.read_text())
    one, two = (found["step_s"][ranks]["median"] for ranks in ("1", "2"))
    assert found["growth"] == {"1": 1.0, "2": pytest.approx(two / one)}


@pytest.mark.slow
def test_the_head_takes_no_more_memory_for_more_tokens():
    """A chunk is 2^22 logits, 256 rows of this shard; all rows would be 2^29 bytes a buffer."""
    sizes = ["--vocab", "32768", "--hidden", "16", "--tokens", "2048", "8192", "--warmup", "0"]
    done = benchmark("logprob_head", *sizes, "--ranks", "2", "--tensor-size", "2", "--iters", "1")
    extra = json.loads(done.stdout.splitlines()[-1])["extra_bytes"]
    # Three buffers of 2^24 bytes at a time, but glibc does not always find a freed one again.
    assert all(0 < extra[tokens] < 2**28 for tokens in ("2048", "8192")), extra


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--minibatches", "3"], "--minibatches=3: must split --batch=8 into"),
        (["--fp8", "e4m3"], "--fp8=e4m3: cannot be used here; there is no CUDA device. Use off."),
    ],
)
def test_options_that_do_not_fit_are_refused_in_one_line(options, line):
    done = benchmark("ppo_step", *options, check=False)
    assert done.returncode == 2
    assert line in done.stderr.splitlines()[-1]
    assert done.stdout == ""


@pytest.mark.slow
def test_cuda_graphs_need_a_gpu():
    done = benchmark("rollout", *TINY, "--cuda-graphs", check=False)
    assert done.returncode == 2
    line = "--cuda-graphs: needs a CUDA device; there is none. Leave it out."
    assert done.stderr.splitlines()[-1] == line


def test_geometric_lengths_keep_their_bounds_and_mean(common):
    lengths = common.response_lengths("geometric:16:256", count=20_000, fixed=0, seed=3)
    assert (min(lengths), max(lengths)) == (16, 256)
    # E[16 + min(k, 240)] of a geometric k with mean 60: 16 + 60 (1 - (60 / 61)^240).
    assert sum(lengths) / len(lengths) == pytest.approx(16 + 60 * (1 - (60 / 61) ** 240), rel=0.02)
    assert common.response_lengths(None, count=3, fixed=5, seed=3) == [5, 5, 5]


@pytest.mark.parametrize("text", ["geometric:4", "geometric:9:4", "uniform:1:5", "geometric:a:5"])
def test_other_lengths_are_refused(common, text):
    with pytest.raises(ValueError, match=f"--lengths={text}: must be geometric:LOW:HIGH"):
        common.response_lengths(text, count=1, fixed=1, seed=0)


def test_the_plan_of_a_70b_import_is_that_of_its_first_rank():
    """2,270,756,864 parameters of two bytes; the largest slice is a share of the embedding."""
    options = ["--plan", "--tensor-size", "8", "--pipeline-size", "4"]
    found = json.loads(benchmark("conversion", *options).stdout)
    assert found["parameters"] == 2_270_756_864
    assert found["weights_bytes"] == 2 * 2_270_756_864
    assert found["largest_slice_bytes"] == 2 * 128256 // 8 * 8192


@pytest.mark.slow
def test_conversion_compares_itself_with_the_disk(tmp_path):
    options = ["--ranks", "2", "--tensor-size", "2", "--pipeline-size", "1", "--iters", "1"]
    done = benchmark("conversion", *options, "--folder", str(tmp_path))
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes"] > 2 * 32 * 64
    assert found["import_cold_of_disk_read"] > 0
    assert not any(tmp_path.iterdir())
