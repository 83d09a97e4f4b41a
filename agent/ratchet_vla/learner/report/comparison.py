"""The report's section on a stored adapter against its base: what was measured, episode by episode, and what was lost.

Knows comparison.json and how the section looks. Knows no policy and runs nothing.

comparison.json, every key is needed:

    adapter    facts of its origin, by name
    verdict    the gate's decision in this run, `GateDecision.as_dict`
    change     an `Interval`: adapter minus base, mean over the decision's tasks
    outcomes   {task: {"base": {episode key: success}, "adapter": {episode key: success}}}
    when_made  the decision that stood on the adapter's card before, {} where there is none
    video      {"task", "episode", "why"} of the two GIFs, null without them
    update     the update that goes on from the adapter, as in updates.jsonl, and "to", the id that it led to
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

TEMPLATE = """
<h2>The shipped adapter against the base</h2>
<p class="decision"><b>{{ comparison.change }}</b> points {{ comparison.bounds }}
<span class="soft">success of the adapter minus success of the base
{{- ", mean of %d tasks" % comparison.tasks | length if comparison.tasks | length > 1 }};
{{ comparison.conclusion }}. The gate's decision: {{ comparison.decision }}.</span></p>
<p class="soft">{{ comparison.how }}</p>
{% for task in comparison.tasks %}
<h3>{{ task.name }} <span class="soft">({{ task.role }})</span></h3>
<div class="wide"><table class="paired">
{% for line in task.lines %}<tr><th scope="row">{{ line.who }}</th><td class="n"><b>{{ line.rate }}</b></td>
<td class="n">{{ line.counts }}</td><td class="marks">{% for mark in line.marks -%}
{{- "<br>" | safe if mark.first_of_draw and not loop.first -}}
<span class="{{ 'won' if mark.ok else 'lost' }}" title="{{ mark.episode }}">{{ "●" if mark.ok else "○" }}</span>
{%- endfor %}</td></tr>
{% endfor %}</table></div>
<p class="soft">change {{ task.change }} points {{ task.bounds }}; {{ task.gains }} episodes only the adapter solved,
{{ task.losses }} only the base</p>
{% endfor %}
<p class="soft">One mark per episode, a column per initial state and a line per draw of noise: ● solved, ○ not. In %
and points, with 95 % intervals over the luck of these episodes (paired, Newcombe).</p>
{% if comparison.video %}
<h2>The same initial state, base and adapter</h2>
<p class="soft">{{ comparison.video }}</p>
{{ pairs(videos) }}
{% endif %}

<h2>What became of tasks that it never learned</h2>
{% if comparison.held_out %}
<div class="wide"><table class="held"><thead><tr><th scope="col">task</th><th scope="col" class="n">base</th>
<th scope="col" class="n">adapter</th><th scope="col" class="n">change</th><th scope="col" class="n">lost / gained</th>
</tr></thead><tbody>
{% for row in comparison.held_out %}<tr><th scope="row">{{ row.name }}</th><td class="n">{{ row.base }}</td>
<td class="n">{{ row.adapter }}</td><td class="n{{ ' fell' if row.fell }}">{{ row.change }} {{ row.bounds }}</td>
<td class="n">{{ row.counts }}</td></tr>
{% endfor %}</tbody></table></div>
<p class="soft">Not measured in this run: these figures stand on the adapter's card since it was made, by the same
gate.</p>
{% else %}<p>Its card holds no measurement on other tasks.</p>{% endif %}

<h2>One update that goes on from it</h2>
<p>The loop runs here too: {{ comparison.step.episodes }} episodes sampled by the adapter on
<b>{{ comparison.step.task }}</b>, which it never learned, and one update from them. So few episodes show no gain:
none was looked for, and the result was swapped in but not promoted.</p>
{{ facts(comparison.step.rows) }}

<h2>Where the adapter comes from</h2>
{{ facts(comparison.origin) }}
"""

STYLE = """
.decision b { font-size: 1.7rem; font-variant-numeric: tabular-nums; } .decision span { display: block; }
h3 { font-size: 1rem; margin: 1.1rem 0 .2rem; overflow-wrap: anywhere; } h3 .soft { font-weight: 400; }
table.paired th, table.paired td { border: 0; padding: .1rem .6rem .1rem 0; white-space: nowrap; }
td.marks { letter-spacing: .12em; white-space: normal; }
@media (max-width: 40rem) {
  table.paired tr { display: flex; flex-wrap: wrap; } table.paired td.marks { flex-basis: 100%; }
}
table.held th[scope=row] { overflow-wrap: anywhere; min-width: 7rem; } .fell { color: #b4442c; font-weight: 600; }
@media (max-width: 40rem) { table.held th, table.held td { padding: .3rem .35rem; font-size: .85rem; } }
 .won { color: var(--accent); } .lost { color: #b4442c; }
"""


def shown(data: Mapping[str, Any]) -> dict[str, Any]:
    """The section's words and figures, ready for the template.

    Raises:
        KeyError, TypeError, ValueError: for data that is not as the module says.
    """
    decision = data["verdict"]
    change = data["change"]
    figure, bounds = _points(change["estimate"], change["low"], change["high"])
    tasks = [_task(row, data["outcomes"][row["task"]]) for row in decision["tasks"]]
    episodes = sum(row["episodes"] for row in decision["tasks"])
    return {
        "change": figure,
        "bounds": bounds,
        "conclusion": "larger than its interval" if change["low"] > 0 else "NOT larger than its interval",
        "decision": decision["decision"],
        "how": _procedure(episodes, decision["config"]),
        "tasks": tasks,
        "held_out": [_held_out(row) for row in data["when_made"].get("tasks", ()) if row["role"] == "held_out"],
        "video": _video(data["video"]),
        "step": _update(data["update"]),
        "origin": [(name, _text(fact)) for name, fact in data["adapter"].items()],
    }


def _video(video: Mapping[str, str] | None) -> str:
    return f"{video['task']}, {video['episode']}: {video['why']}." if video else ""


def _text(fact: Any) -> str:
    return " ".join(fact) if isinstance(fact, list) else str(fact)


def _procedure(episodes: int, config: Mapping[str, Any]) -> str:
    """How the pairs of episodes were run. config: of the gate, as it stands in the decision."""
    acting = f"sampled at temperature {config['temperature']:g}" if config["temperature"] else "greedy"
    horizon = f"at most {config['horizon']} control steps" if config["horizon"] else "each task's own horizon"
    # Decisions from before there were draws made one per state.
    draw_count = config.get("draws", 1)
    draws = f" ({draw_count} per state)" if draw_count > 1 else ""
    return (
        f"{episodes} pairs of episodes: the same initial states, none of which was trained on, and the same "
        f"noise{draws}; actions {acting}, {horizon}. The adapter was swapped into the running policy in between."
    )


def _task(row: Mapping[str, Any], outcomes: Mapping[str, Mapping[str, bool]]) -> dict[str, Any]:
    figure, bounds = _points(row["change"], row["low"], row["high"])
    lines = []
    for policy_label in ("base", "adapter"):
        episodes = outcomes[policy_label]
        marks = []
        draw_before = 0
        for episode_key in sorted(episodes, key=_draw_and_state):
            draw, _ = _draw_and_state(episode_key)
            marks.append({"episode": episode_key, "ok": episodes[episode_key], "first_of_draw": draw != draw_before})
            draw_before = draw
        solved = sum(episodes.values())
        lines.append(
            {
                "who": policy_label,
                "rate": f"{100 * solved / len(episodes):.0f} %",
                "counts": f"{solved}/{len(episodes)}",
                "marks": marks,
            }
        )
    return {
        "name": row["task"],
        "role": {"new": "learned", "earlier": "learned before that"}.get(row["role"], "held out"),
        "lines": lines,
        "change": figure,
        "bounds": bounds,
        "gains": row["gains"],
        "losses": row["losses"],
    }


def _held_out(row: Mapping[str, Any]) -> dict[str, str]:
    figure, bounds = _points(row["change"], row["low"], row["high"])
    return {
        "name": row["task"],
        "base": f"{100 * row['active']:.0f} %",
        "adapter": f"{100 * row['candidate']:.0f} %",
        "change": figure,
        "bounds": bounds,
        "fell": row["high"] < 0,
        "counts": f"{row['losses']} / {row['gains']} of {row['episodes']}",
    }


def _update(update: Mapping[str, Any]) -> dict[str, Any]:
    rows = [("succeeded", f"{update['successes']} of {update['episodes']}")]
    if "skipped" in update:
        rows.append(("update", f"skipped: {update['skipped']}"))
    names = {"approx_kl": "KL from the sampling policy", "entropy": "entropy", "clip_fraction": "share clipped"}
    rows += [(label, f"{update[key]:.4f}") for key, label in names.items() if key in update]
    times = {"seconds_rollout": "episodes", "seconds_update": "optimisation"}
    rows += [(f"time, {label}", f"{update[key]:.0f} s") for key, label in times.items() if key in update]
    rows.append(("adapter", f"{update['adapter_id'][:12]} -> {update['to'][:12]}"))
    return {"task": update["task"], "episodes": update["episodes"], "rows": rows}


def _points(estimate: float, low: float, high: float) -> tuple[str, str]:
    return f"{100 * estimate:+.0f}", f"[{100 * low:+.0f}, {100 * high:+.0f}]"


def _draw_and_state(key: str) -> tuple[int, int]:
    """Where an episode's mark stands, from a key of `specs.episode_keys`."""
    state, _, draw = key.partition("/")
    return int(draw.removeprefix("draw-") or 0), int(state.removeprefix("state-"))
