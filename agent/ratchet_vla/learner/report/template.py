"""The report's page: one jinja2 template with its style inside.

Knows how the report looks. Knows no file and computes no number. The content security policy lets the page load
nothing from anywhere: images are embedded.
"""

from ratchet_vla.learner.report import comparison as report_comparison

TEMPLATE = (
    """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Ratchet report: {{ title }}</title>
<style>
:root { color-scheme: light; --ink: #1f2933; --soft: #5b6b79; --line: #d5dce2; --accent: #0b6e8f; }
body { font: 15px/1.5 system-ui, "Segoe UI", Roboto, sans-serif; color: var(--ink); background: #fff;
  max-width: 1080px; margin: 0 auto; padding: 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0 .8rem; overflow-wrap: anywhere; } .soft { color: var(--soft); font-size: .88rem; }
code { font: .85em ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
table.facts th { font-weight: 500; color: var(--soft); white-space: nowrap; }
table.matrix td { text-align: center; min-width: 5.6rem; border: 2px solid #fff; font-variant-numeric: tabular-nums; }
table.matrix td b { display: block; font-size: 1.15rem; } table.matrix td span { display: block; font-size: .76rem; }
table.matrix th { min-width: 6.5rem; max-width: 17rem; overflow-wrap: anywhere; font-weight: 500; }
table.matrix td.trained { outline: 2px solid var(--ink); outline-offset: -4px; }
table.matrix td.none { background: #f3f5f7; color: var(--soft); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(220px, 1fr)); gap: .8rem; }
.card { border: 1px solid var(--line); border-radius: 6px; padding: .8rem 1rem; }
.card b { display: block; font-size: 1.7rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
img.chart { width: 100%; height: auto; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 1rem; max-width: 720px; margin-bottom: 1.2rem; }
figure { margin: 0; } figure img { width: 100%; height: auto; image-rendering: auto; background: #f3f5f7; }
figcaption { font-size: .85rem; color: var(--soft); }
.missing { border-left: 4px solid #c77700; background: #fff7e8; padding: .6rem 1rem; }
details summary { cursor: pointer; }
@media (max-width: 40rem) {
  body { padding: 1rem; } table.matrix td { min-width: 4.6rem; padding: .35rem .2rem; }
  table.facts, table.facts tbody, table.facts tr { display: block; }
  table.facts th, table.facts td { display: block; padding: .1rem 0; border: 0; white-space: normal; }
  table.facts tr { border-bottom: 1px solid var(--line); padding: .3rem 0; } .pair { gap: .5rem; }
}"""
    + report_comparison.STYLE
    + """</style>
</head>
<body>
<header>
<h1>{{ title }}</h1>
<p class="soft">Ratchet: continual learning of a vision-language-action model</p>
</header>
<main>
{% if missing %}
<section class="missing"><b>Missing from this run</b><ul>
{% for line in missing %}<li>{{ line }}</li>
{% endfor %}</ul></section>
{% endif %}

{% if comparison %}"""
    + report_comparison.TEMPLATE
    + """
{% else %}
<h2>Continual learning{% if measures %} after stage {{ measures.after }} of {{ stages - 1 }}{% endif %}</h2>
{% if cards %}
<div class="cards">
{% for card in cards %}
<div class="card"><span class="soft">{{ card.name }}</span><b>{{ card.value }}</b>
<span class="soft">{{ card.detail }}</span><p class="soft">{{ card.meaning }}</p></div>
{% endfor %}
</div>
<p class="soft">In %, with 95 % intervals. They cover the luck of the evaluation episodes on these tasks, not other
tasks or other training seeds. {{ methods }}</p>
{% else %}<p>Not measured yet.</p>{% endif %}

<h2>Success per task and stage</h2>
{% if rows %}
<div class="wide"><table class="matrix">
<thead><tr><th scope="col">task</th>
{% for k in range(stages) %}<th scope="col" class="n">{{ "base" if k == 0 else "stage " ~ k }}</th>
{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr><th scope="row">{{ row.label }}</th>
{% for cell in row.cells %}{% if cell %}<td{% if cell.trained %} class="trained"{% endif %}
 style="background:{{ cell.background }};color:{{ cell.ink }}"><b>{{ cell.rate }}</b>
<span>{{ cell.interval }}</span><span>{{ cell.counts }}</span></td>
{% else %}<td class="none">&ndash;</td>
{% endif %}{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p class="soft">Success in %, its 95 % Wilson interval, and successes / trials. Stage k is after
learning task k; a frame marks the evaluation right after a task was learned. H: held out, never trained on.</p>
{% else %}<p>No success matrix.</p>{% endif %}

<h2>Learning curves</h2>
{% if curves %}
<img class="chart" alt="Success rate per update with 95 % intervals" src="{{ curves[0] }}">
<img class="chart" alt="Loss, KL, entropy and clip fraction per update" src="{{ curves[1] }}">
<p class="soft">{% for name in curve_tasks %}task {{ loop.index }}: {{ name }}{{ "; " if not loop.last }}
{% endfor %}</p>
{% else %}<p>No updates were recorded.</p>{% endif %}

<h2>Rollouts before and after</h2>
{{ pairs(videos) }}

<h2>Time spent</h2>
{% if times %}
<div class="wide"><table><thead><tr><th scope="col">task</th><th scope="col" class="n">updates</th>
<th scope="col" class="n">episodes</th><th scope="col" class="n">rollouts</th>
<th scope="col" class="n">optimisation</th><th scope="col" class="n">total</th></tr></thead><tbody>
{% for t in times %}<tr><th scope="row">{{ t.task }}</th><td class="n">{{ t.updates }}</td>
<td class="n">{{ t.episodes }}</td><td class="n">{{ t.rollout }}</td><td class="n">{{ t.optimisation }}</td>
<td class="n">{{ t.total }}</td></tr>
{% endfor %}</tbody></table></div>
{% else %}<p>No updates were recorded.</p>{% endif %}
{% endif %}

<h2>What was run</h2>
{{ facts(header) }}

<h2>Adapters</h2>
{% if adapters %}
<div class="wide"><table><thead><tr>{% for key in adapter_keys %}<th scope="col">{{ key }}</th>
{% endfor %}</tr></thead><tbody>
{% for adapter in adapters %}<tr>{% for value in adapter %}<td><code>{{ value }}</code></td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
{% else %}<p>No adapters are listed.</p>{% endif %}

<h2>Configuration and environment</h2>
{% for name, table in details %}
<details{% if loop.last %} open{% endif %}><summary>{{ name }}</summary>{{ facts(table) }}</details>
{% else %}<p>Not recorded.</p>
{% endfor %}
</main>
</body>
</html>
"""
)

MACROS = """{% macro facts(table) %}{% if table %}<div class="wide"><table class="facts"><tbody>
{% for key, value in table %}<tr><th scope="row">{{ key }}</th><td><code>{{ value }}</code></td></tr>
{% endfor %}</tbody></table></div>{% else %}<p>Not recorded.</p>{% endif %}{% endmacro -%}
{% macro pairs(videos) %}{% for video in videos %}
<h3 class="soft">{{ video.name }}</h3>
<div class="pair">
{% for side in video.sides %}<figure>{% if side.source %}<img alt="{{ video.name }}, {{ side.label }}"
 src="{{ side.source }}">{% endif %}<figcaption>{{ side.label }}
{{- "" if side.source else ": not recorded" }}</figcaption></figure>
{% endfor %}</div>
{% else %}<p>No videos were recorded.</p>
{% endfor %}{% endmacro %}"""
