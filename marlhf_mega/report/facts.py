"""What a run was: the chips under its name."""

from collections.abc import Iterator, Mapping
from typing import Any

from marlhf_mega.config.checks import TrainingJob
from marlhf_mega.metrics.format import number
from marlhf_mega.report.run import Stage

Settings = Mapping[str, Any]


def stage_facts(stage: Stage) -> list[tuple[str, str]]:
    """Return (label, text) of the model, the machine, and the settings that the job has used."""
    config = stage.config
    found = [*_model(config), *_settings(config, stage.job)]
    if "seed" in config.get("run", {}):
        found.append(("seed", str(config["run"]["seed"])))
    found += [(str(name), str(text)) for name, text in config.get("versions", {}).items()]
    if other := config.get("evaluate", {}).get("against"):
        found.append(("against", str(other)))
    if config.get("git_revision"):
        found.append(("revision", str(config["git_revision"])[:12]))
    return found


def _model(config: Settings) -> Iterator[tuple[str, str]]:
    if model := config.get("model"):
        yield "model", f"{model.get('num_layers')} layers x {model.get('hidden_size')}"
    if layout := config.get("layout"):
        yield "layout", str(layout)
    # `auto` in the configuration: the run has noted what it has found here.
    if dtype := config.get("dtype") or config.get("precision", {}).get("dtype"):
        yield "dtype", str(dtype)


def _settings(config: Settings, job: TrainingJob | None) -> Iterator[tuple[str, str]]:
    """Yield the settings that people change first."""
    section, optimizer = "", ""
    match job:
        case "sft" | "preference" | "offline":
            section, optimizer = job, "policy"
        case "reward":
            section, optimizer = "reward_model", "reward_model"
        case "ppo":
            section, optimizer = "rollout", "policy"
    if batch := config.get(section, {}).get("batch_size"):
        yield "batch", str(batch)
    if "lr" in config.get(optimizer, {}):
        yield "learning rate", number(config[optimizer]["lr"])
    if job == "offline" and "algorithm" in config.get("offline", {}):
        yield "algorithm", str(config["offline"]["algorithm"])
    if job == "preference" and "loss" in config.get("preference", {}):
        yield "loss", str(config["preference"]["loss"])
        yield "beta", number(config["preference"]["beta"])
    if job == "ppo":
        yield from _ppo(config)


def _ppo(config: Settings) -> Iterator[tuple[str, str]]:
    macro, ppo = config.get("macro", {}), config.get("ppo", {})
    if rule := macro.get("rule"):
        yield "macro actions", f"{rule}, n = {macro.get('n')}" if rule == "fixed_ngram" else rule
    if "kl_coef" in ppo:
        yield "KL coefficient", number(ppo["kl_coef"])
