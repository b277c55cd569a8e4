"""YAML and overrides to one configuration; every refusal is one line that says what to change."""

import pytest

from marlhf_mega.config.load import ConfigError, dump_config, load_config
from marlhf_mega.config.schema import Config


def refused(*overrides, path=None):
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    return str(error.value)


@pytest.fixture
def yaml_file(tmp_path):
    def write(text):
        path = tmp_path / "run.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_without_a_file_every_key_has_its_default():
    assert load_config(None) == Config()


def test_what_a_run_notes_beside_its_settings_is_no_setting(yaml_file):
    noted = "tokenizer_fingerprint: a\nlayout: b\nversions: {python: c}\ngit_revision: null\n"
    for more in ("", "prompt_fingerprint: d\n", "prompt_fingerprint: d\ndtype: float32\n"):
        assert load_config(yaml_file(f"{noted}{more}run: {{seed: 7}}\n")).run.seed == 7
    assert refused(path=yaml_file("layout: b\n")).startswith("layout: unknown key.")


def test_an_empty_file_changes_nothing(yaml_file):
    assert load_config(yaml_file("# only a remark\n")) == Config()


def test_overrides_win_over_the_file_and_the_last_one_wins(yaml_file):
    path = yaml_file("run: {seed: 1, name: a}\nppo: {epochs: 2}\n")
    config = load_config(path, ["run.seed=2", "run.seed=3", "rollout.top_k=4"])
    assert (config.run.seed, config.run.name) == (3, "a")
    assert (config.ppo.epochs, config.rollout.top_k) == (2, 4)


def test_values_of_overrides_are_yaml():
    config = load_config(
        None,
        [
            "macro.lengths=[2,4]",
            "reward.source=[{source: 'a:b', weight: 2}]",
            "ppo.kl_target=null",
            "policy.lr=1e-3",
            "run.name=a: b",
        ],
    )
    assert config.macro.lengths == (2, 4)
    assert config.reward.source[0].weight == 2
    assert config.ppo.kl_target is None
    assert config.policy.lr == 1e-3
    assert config.run.name == "a: b"


@pytest.mark.parametrize("word", ["null", "~", "", "none", "None"])
def test_a_key_that_may_be_null_is_unset_by_any_word_for_it(word):
    unset = [f"ppo.value_clip_range={word}", f"evaluate.gold={word}", f"tokenizer.path={word}"]
    config = load_config(None, ["evaluate.gold=a:b", "tokenizer.path=tok", *unset])
    assert config.ppo.value_clip_range is None
    assert config.evaluate.gold is None
    assert config.tokenizer.path is None


def test_none_is_a_word_where_a_key_cannot_be_null(yaml_file):
    path = yaml_file("memory: {recompute: none}\nrun: {name: none, steps: none}\n")
    config = load_config(path, ["reward.missing_eos=none", "model.rope_scaling.kind=none"])
    assert (config.memory.recompute, config.run.name, config.run.steps) == ("none", "none", None)
    assert (config.reward.missing_eos, config.model.rope_scaling.kind) == ("none", "none")


def test_whole_numbers_may_be_written_as_floats_and_floats_as_whole_numbers():
    overrides = ["policy.lr=1", "ppo.epochs=2.0", "run.steps=1e3", "rollout.staleness=0"]
    config = load_config(None, [*overrides, "data.shuffle=0", "ppo.packing=yes"])
    assert (config.policy.lr, config.ppo.epochs, config.run.steps) == (1.0, 2, 1000)
    assert (config.data.shuffle, config.ppo.packing) == (False, True)


def test_a_file_can_refer_to_its_own_keys(yaml_file):
    config = load_config(yaml_file("run: {name: x, dir: 'runs/${run.name}'}"), ["run.name=y"])
    assert config.run.dir.name == "y"


def test_the_dumped_tree_loads_as_the_same_configuration(yaml_file):
    config = load_config(
        None, ["reward.source=a:b", "macro.max_length=7", "model.rope_scaling.kind=linear"]
    )
    assert load_config(yaml_file(dump_config(config))) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.epoch=2", "ppo.epoch: unknown key. Did you mean ppo.epochs?"),
        ("rolout.top_k=2", "rolout: unknown key. Did you mean rollout?"),
        (
            "model.rope_scaling.facto=2",
            "model.rope_scaling.facto: unknown key. Did you mean model.rope_scaling.factor?",
        ),
        (
            "reward.source=[{source: 'a:b', weigth: 1}]",
            "reward.source.0.weigth: unknown key. Did you mean reward.source.0.weight?",
        ),
        ("tokenizer.qqqq=1", "tokenizer.qqqq: unknown key. Known keys: path."),
    ],
)
def test_an_unknown_key_names_the_nearest_or_all(override, message):
    assert refused(override) == message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.epochs=0", "ppo.epochs=0: input should be greater than 0. Change the value."),
        ("ppo.gamma=1.1", "ppo.gamma=1.1: input should be less than or equal to 1."),
        ("ppo.epochs=1.5", "ppo.epochs=1.5: input should be a valid integer"),
        ("ppo.epochs=true", "ppo.epochs=true: input should be a number, not true or false. Ch"),
        ("policy.lr=off", "policy.lr=false: input should be a number, not true or false. Change"),
        ("rollout.staleness=true", "rollout.staleness=true: input should be a number, not true"),
        ("macro.lengths=[2,true]", "macro.lengths=[2, True]: input should be a number, not true"),
        ("policy.lr=.inf", "policy.lr=inf: input should be a finite number. Change the value."),
        ("ppo.epochs=null", "ppo.epochs=null: input should be a valid integer. Change the value."),
        ("rollout.temperature=hot", "rollout.temperature=hot: input should be a valid number"),
        ("data.shuffle=maybe", "data.shuffle=maybe: input should be a valid boolean"),
        ("macro.rule=words", "macro.rule=words: input should be 'token', 'fixed_ngram'"),
        ("macro.lengths=[2,0]", "macro.lengths.1=0: input should be greater than 0"),
        ("run=5", "run=5: input should be a mapping of keys. Change the value."),
        ("run.dir=", "run.dir=null: input should be a path. Change the value."),
        ("macro.lengths=3", "macro.lengths=3: input should be a list, such as [a,b]. Change"),
        ("reward.source=[{weight: 1}]", "reward.source.0.source: must be given; it is not. Add"),
        ("run.seed.x=1", "run.seed={'x': 1}: input should be a valid integer"),
    ],
)
def test_a_value_of_the_wrong_type_or_range_is_shown(override, message):
    assert refused(override).startswith(message)


@pytest.mark.parametrize("override", ["run.steps=off", "ppo.dual_clip=0"])
def test_a_wrong_value_of_a_key_that_may_be_null_says_how_to_unset_it(override):
    assert refused(override).endswith(". Change the value, or write null to unset it.")


def test_every_problem_is_reported_on_a_line_of_its_own():
    lines = refused("run.seed=x", "ppo.epoch=1", "rollout.top_p=0").splitlines()
    assert [line.split("=")[0].split(":")[0] for line in lines] == [
        "run.seed",
        "rollout.top_p",
        "ppo.epoch",
    ]


@pytest.mark.parametrize("override", ["run.seed", "=1", ""])
def test_an_override_is_key_equals_value(override):
    line = f"{override}: an override must be key=value. Write for example run.seed=1."
    assert refused(override) == line


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("run:\n  seed: [1\n", ":3: not valid YAML; did not find expected ',' or ']'."),
        ("run: {seed: 1, seed: 2}", ":1: not valid YAML; found duplicate key seed."),
        ("run:\n\tseed: 1", ":2: not valid YAML; found character that cannot start any token."),
        (b"\xff\xfe", ": not valid YAML; 'utf-8' codec can't decode byte 0xff"),
        ("- 1\n", ": must be a mapping of sections; it is not. Fix the file."),
        ("7\n", ": must be a mapping of sections; it is not. Fix the file."),
    ],
)
def test_a_file_that_is_no_mapping_is_named_with_its_line(yaml_file, text, problem):
    path = yaml_file(text)
    message = refused(path=path)
    assert message.startswith(f"--config={path}{problem}")
    assert "\n" not in message


def test_a_file_that_is_not_there(tmp_path):
    path = tmp_path / "no.yaml"
    assert refused(path=path) == f"--config={path}: no such file. Give the path of a YAML file."


def test_an_interpolation_that_leads_nowhere():
    message = refused("run.steps=${run.nam}")
    assert message == (
        "run.steps: must be resolvable; Interpolation key 'run.nam' not found. "
        "Refer to keys that the file or an override sets."
    )


def test_an_override_inside_a_list_of_the_file(yaml_file):
    path = yaml_file("reward: {source: [{source: 'a:b'}]}")
    assert refused("reward.source.0.weight=2", path=path) == (
        "--config: an override cannot set a key inside a list. Override the whole list."
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["rollout.batch_size=10", "rollout.samples_per_prompt=3"],
            "rollout.batch_size=10: must be a multiple of rollout.samples_per_prompt=3. "
            "Change one of them.",
        ),
        (
            ["parallel.sequence_parallel=true"],
            "parallel.sequence_parallel=true: needs parallel.tensor_size > 1; it is 1. "
            "Set it to false.",
        ),
        *(
            (
                [f"checkpoint.allow_changed=[policy,{key}]"],
                f"checkpoint.allow_changed=[{key}]: must name keys or sections; there is no {key}. "
                "Write for example [policy.lr,reward].",
            )
            for key in ("polcy.lr", "policy.rate", "lr", "rollout_parallel", "policy.lr.x")
        ),
        (
            ["model.num_query_groups=3"],
            "model.num_query_groups=3: must divide model.num_attention_heads=4. Use a divisor.",
        ),
        (
            ["model.hidden_size=30"],
            "model.num_attention_heads=4: must divide model.hidden_size=30 unless model.head_dim "
            "is set. Change one of them.",
        ),
        (
            ["model.num_experts=4", "model.experts_per_token=5"],
            "model.experts_per_token=5: cannot exceed model.num_experts=4. Lower it.",
        ),
        (
            ["model.hf_path=here", "model.init=there"],
            "model.init=there: cannot be combined with model.hf_path, which gives the weights too. "
            "Remove one of the two.",
        ),
    ],
)
def test_keys_that_contradict_each_other(overrides, message):
    assert refused(*overrides) == message


@pytest.mark.parametrize("key", ["model.init", "model.hf_path"])
def test_an_origin_that_is_not_there(key, tmp_path):
    line = refused(f"{key}={tmp_path / 'gone'}")
    assert line.startswith(f"{key}={tmp_path / 'gone'}: must be a run directory or a Hugging Face")


@pytest.mark.parametrize(
    "text", ["d #2", "12:30", "2024", "${x}", "a: b", "[1]", "true", "1e3", "~"]
)
def test_texts_and_paths_mean_what_they_say(text):
    config = load_config(None, [f"run.name={text}", f"run.dir={text}", f"macro.parser={text}"])
    assert (config.run.name, str(config.run.dir), config.macro.parser) == (text, text, text)


def test_a_text_that_may_be_unset_is_unset_by_null():
    assert load_config(None, ["logging.wandb=null"]).logging.wandb is None
    assert load_config(None, ["tokenizer.path=none"]).tokenizer.path is None
    assert load_config(None, ["run.name=null"]).run.name == "null"


@pytest.mark.parametrize("seed", [2**63, 2**64 - 1, 10**23])
def test_a_seed_that_is_no_63_bit_number_is_refused(seed):
    with pytest.raises(ConfigError, match=r"^run\.seed=\d+: input should be less than"):
        load_config(None, [f"run.seed={seed}"])
    assert load_config(None, [f"run.seed={2**63 - 1}"]).run.seed == 2**63 - 1


def test_data_may_be_a_path_or_a_list_of_paths_with_weights(yaml_file):
    config = load_config(None, ["data.train_path=a: [b] #1.jsonl", "data.fields={prompt: q}"])
    assert [source.path for source in config.data.train_path] == ["a: [b] #1.jsonl"]
    assert config.data.fields == {"prompt": "q"}
    path = yaml_file("data: {train_path: [a.jsonl, {path: b.parquet, weight: 0.3}]}")
    config = load_config(path)
    found = [(source.path, source.weight) for source in config.data.train_path]
    assert found == [("a.jsonl", 1.0), ("b.parquet", 0.3)]
    assert load_config(yaml_file(dump_config(config))) == config
    for unset in ("null", "[]", ""):
        assert load_config(path, [f"data.train_path={unset}"]).data.train_path is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_path=[{weight: 1}]", "data.train_path.0.path: must be given; it is not."),
        ("data.train_path=[{path: a, weight: 0}]", "data.train_path.0.weight=0: input should be "),
        ("data.train_path={path: a}", "data.train_path={'path': 'a'}: input should be a list"),
        ("data.fields=question", "data.fields=question: input should be a mapping, such as {a: b}"),
        ("data.fields={promt: q}", "data.fields.promt.[key]=promt: input should be 'prompt', "),
    ],
)
def test_data_of_another_form_is_refused(override, message):
    assert refused(override).startswith(message)


def test_steps_and_epochs_exclude_each_other():
    assert refused("run.steps=3", "run.epochs=2") == (
        "run.epochs=2: cannot be combined with run.steps=3, which gives the length too. Remove one "
        "of the two, or set it to null."
    )
