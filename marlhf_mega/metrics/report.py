"""`report.html`: one self-contained file with results, curves, timings and samples of a run.

Made at the end of a run; made again by hand with
`python -m marlhf_mega.metrics.report RUN_DIR [RUN_DIR ...] --out report.html`.
"""

import argparse
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from marlhf_mega.metrics.progress import number
from marlhf_mega.metrics.samples_html import samples_section
from marlhf_mega.metrics.stage import Change, Stage, changes, read_stage
from marlhf_mega.metrics.style import STYLE
from marlhf_mega.metrics.svg import NUM_COLOURS, line_chart, stacked_chart

GROUPS = ("eval", "rollout", "policy", "critic", "macro", "sft", "reward", "time", "perf")
"""Curves are grouped by the first part of their name, in this order, others after."""

LABELS = {
    "eval/gold_mean": "gold reward",
    "eval/score_mean": "reward-model score",
    "eval/win_rate": "win rate",
    "eval/kl": "KL from the reference",
    "eval/response_tokens": "response tokens",
    "eval/accuracy": "accuracy",
    "eval/loss": "loss",
}
"""Held-out results in words, the most telling first."""

HIGHER_IS_BETTER = {"eval/gold_mean", "eval/score_mean", "eval/win_rate", "eval/accuracy"}

# Nothing may be loaded, whatever a sample's text holds.
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def report(run_dirs: Sequence[Path], out: Path) -> None:
    """Write one page about one or more runs, in order; the last one's results come first.

    Args:
        run_dirs: run directories, such as those of sft, reward and ppo.
        out: the HTML file.

    Raises:
        ValueError: a directory holds no metrics.jsonl, or a line of a file is damaged.
    """
    stages = [read_stage(Path(run_dir)) for run_dir in run_dirs]
    # Lone surrogates from a tokenizer cannot be encoded; control characters are not HTML.
    page = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\N{REPLACEMENT CHARACTER}", _page(stages))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8", errors="replace")


def _page(stages: Sequence[Stage]) -> str:
    final = stages[-1]
    title = escape(final.name)
    links = "".join(
        f'<a href="#stage{index}">{escape(stage.name)}</a>' for index, stage in enumerate(stages)
    )
    nav = f"<nav>{links}</nav>" if len(stages) > 1 else ""
    results = changes(final)
    body = [_tiles(results), _result_table(results)]
    body += [_stage(stage, f"stage{index}", results) for index, stage in enumerate(stages)]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><header><div>"
        f"<h1>{title}</h1>{_facts(final.config)}{nav}</div></header>\n<main>"
        f"{''.join(body)}<footer>marlhf_mega</footer></main></body></html>\n"
    )


def _facts(config: Mapping[str, Any]) -> str:
    facts = "".join(
        f"<li><span>{escape(label)}</span>{escape(value)}</li>"
        for label, value in _essentials(config)
    )
    return f'<ul class="facts">{facts}</ul>' if facts else ""


def _essentials(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    model = config.get("model", {})
    if model:
        yield "model", f"{model.get('num_layers')} layers x {model.get('hidden_size')}"
    if config.get("layout"):
        yield "layout", str(config["layout"])
    for section, key, label in (
        ("precision", "dtype", "dtype"),
        ("macro", "rule", "macro actions"),
        ("run", "seed", "seed"),
    ):
        if key in config.get(section, {}):
            yield label, str(config[section][key])
    yield from ((str(k), str(v)) for k, v in config.get("versions", {}).items())
    if config.get("git_revision"):
        yield "revision", str(config["git_revision"])[:12]


def _ordered(results: Sequence[Change]) -> list[Change]:
    order = list(LABELS)
    return sorted(results, key=lambda c: order.index(c.name) if c.name in order else len(order))


def _tiles(results: Sequence[Change]) -> str:
    tiles = [
        f'<div class="card tile"><small>{escape(LABELS[result.name])}</small>'
        f"<b>{result.before:.3g} &rarr; {result.after:.3g}</b>{_difference(result)}</div>"
        for result in _ordered(results)
        if result.name in LABELS
    ]
    return (
        f'<h3>Held-out prompts</h3><div class="tiles">{"".join(tiles[:5])}</div>' if tiles else ""
    )


def _difference(result: Change) -> str:
    sign = "+" if result.difference > 0 else ""
    text = f"{sign}{number(result.difference)}"
    if result.name not in HIGHER_IS_BETTER or result.difference == 0:
        return f"<small>{text}</small>"
    return f'<span class="{"up" if result.difference > 0 else "down"}">{text}</span>'


def _result_table(results: Sequence[Change]) -> str:
    if not results:
        return ""
    rows = "".join(
        f"<tr><td>{escape(LABELS.get(result.name, result.name.removeprefix('eval/')))}</td>"
        f"<td>{_with_error(result.before, result.before_error)}</td>"
        f"<td>{_with_error(result.after, result.after_error)}</td>"
        f"<td>{_difference(result)}{_significance(result)}</td></tr>"
        for result in _ordered(results)
    )
    return (
        '<div class="card" style="margin-top:14px"><table><thead><tr><th></th><th>before</th>'
        f"<th>after</th><th>change</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _significance(result: Change) -> str:
    distance = result.standard_errors
    return "" if distance is None else f" <small>{abs(distance):.1f} standard errors</small>"


def _with_error(value: float, error: float | None) -> str:
    return number(value) + ("" if error is None else f" <small>&plusmn; {number(error)}</small>")


def _stage(stage: Stage, anchor: str, shown: Sequence[Change]) -> str:
    own = changes(stage)
    parts = [f'<section id="{anchor}"><h2>{escape(stage.name)}</h2>']
    if own and own != list(shown):
        parts.append(_result_table(own))
    parts.append(_curves(stage))
    parts.append(samples_section(stage.samples))
    if stage.config_text:
        config = escape(stage.config_text)
        parts.append(f"<details><summary>config.yaml</summary><pre>{config}</pre></details>")
    return "".join(parts) + "</section>"


def _curves(stage: Stage) -> str:
    groups: dict[str, list[str]] = {}
    for name in stage.curves:
        if not name.endswith("_stderr"):
            groups.setdefault(name.partition("/")[0], []).append(name)
    parts = []
    for group in sorted(groups, key=lambda g: GROUPS.index(g) if g in GROUPS else len(GROUPS)):
        names, cards, num_cards = sorted(groups[group]), "", len(groups[group])
        if group == "time" and (cards := _phases_card(stage)):
            names = [name for name in names if name == "time/step_seconds"]
            num_cards = 2 + len(names)
        cards += "".join(_curve_card(name, stage) for name in names)
        parts.append(
            f'<div class="group" style="--cards:{num_cards}"><h3>{escape(group)}</h3>'
            f'<div class="grid">{cards}</div></div>'
        )
    return f'<div class="groups">{"".join(parts)}</div>'


def _curve_card(name: str, stage: Stage) -> str:
    points = stage.curves[name]
    label = escape(name.partition("/")[2] or name)
    return (
        f'<div class="card"><h4>{label}<output>{number(points[-1][1])}</output></h4>'
        f"{line_chart(points, label=name)}</div>"
    )


def _phases_card(stage: Stage) -> str:
    """Stack the seconds of the phases of every timed step, and show their shares of the run."""
    timed = {
        name: dict(points) for name, points in stage.curves.items() if name.startswith("time/")
    }
    whole = timed.pop("time/step_seconds", {})
    if not timed:
        return ""
    steps = sorted(whole or {step for values in timed.values() for step in values})
    series = {
        name.removeprefix("time/").removesuffix("_seconds"): [values.get(s, 0.0) for s in steps]
        for name, values in timed.items()
    }
    if whole:
        spent = [sum(column) for column in zip(*series.values(), strict=True)]
        rest = [max(whole[step] - used, 0.0) for step, used in zip(steps, spent, strict=True)]
        series["other"] = rest
    series = dict(sorted(series.items(), key=lambda item: -sum(item[1])))
    total = sum(map(sum, series.values())) or 1.0
    shares, legend = [], []
    for colour, (name, values) in enumerate(series.items()):
        share, shade = sum(values) / total, f"fill{colour % NUM_COLOURS}"
        shares.append(f'<div class="{shade}" style="width:{100 * share:.2f}%"></div>')
        legend.append(f'<li><i class="{shade}"></i>{escape(name)} {100 * share:.0f}%</li>')
    return (
        f'<div class="card wide"><h4>seconds per phase<output>{number(total)} s in all</output>'
        f'</h4>{stacked_chart(series, steps)}<div class="share">{"".join(shares)}</div>'
        f'<ul class="legend">{"".join(legend)}</ul></div>'
    )


def main() -> None:
    """Make a report from the command line."""
    parser = argparse.ArgumentParser(description="Write report.html about finished runs.")
    parser.add_argument("run_dirs", nargs="+", type=Path, metavar="RUN_DIR")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    report(arguments.run_dirs, arguments.out)


if __name__ == "__main__":
    main()
