"""One HTML page that holds everything: tables, and the plots as base64. It links to nothing outside itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hope_train.report.runs import PERPLEXITIES, Run, eval_label
from hope_train.report.summary import FINAL_STEPS, PUBLISHED, PUBLISHED_TITLE, Summary, plain_number

CAPTIONS = {
    "loss": "Thin: each logged step. Thick: centred mean over 2% of the run. Hollow markers: held-out text.",
    "word_ppl": "Word perplexity by its named protocol. Hollow markers cover a part of the pages only; a star is the "
    "test split. Published lines belong to models of another size and training length.",
    "throughput": "Tokens per second over the whole job, and the peak memory of one device.",
    "learning_rate": "Learning rate of the core; gradient norm before clipping.",
    "levels": "Each level steps once per period. A level that learns keeps a size of update well above rounding and "
    "makes the number of updates its period promises.",
}

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; color: #1d1d1f; max-width: 76rem; margin: 2rem auto; padding: 0 1.2rem; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
  table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
  th, td { padding: .3rem .75rem; border-bottom: 1px solid #ddd; text-align: right; }
  th:first-child, td:first-child, .text { text-align: left; }
  thead th { border-bottom: 2px solid #888; }
  figure { margin: 1.2rem 0; } img { max-width: 100%; height: auto; }
  figcaption, .note { color: #555; font-size: .9rem; }
  .wide { overflow-x: auto; } pre { background: #f6f6f6; padding: .8rem; overflow-x: auto; font-size: .82rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>

<h2>Summary</h2>
<div class="wide"><table>
<thead><tr><th></th>{% for s in summaries %}<th>{{ s.run }}</th>{% endfor %}</tr></thead>
<tbody>{% for label, cells in summary_rows %}
<tr><th>{{ label }}</th>{% for cell in cells %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table></div>
<p class="note">The final loss is the mean over the last {{ final_steps }} logged steps. The best perplexity prefers
complete evaluations to partial ones.</p>
{% for note in notes %}<p class="note">{{ note }}</p>{% endfor %}

{% for stem, image in images.items() %}<figure>
<img alt="{{ stem }}" src="data:image/png;base64,{{ image }}">
<figcaption>{{ captions[stem] }}</figcaption>
</figure>
{% endfor %}
{% if evals %}<h2>Last evaluations</h2>
<div class="wide"><table>
<thead><tr><th>run</th><th class="text">text, split, protocol</th><th>tokens</th>
{% for key in eval_keys %}<th>{{ key }}</th>{% endfor %}</tr></thead>
<tbody>{% for row in evals %}
<tr>{% for cell in row %}<td{% if loop.index == 2 %} class="text"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table></div>
{% endif %}
{% if show_published %}<h2>Published, for comparison: {{ published_title }}</h2>
<table>
<thead><tr><th>model</th><th>WikiText word_ppl</th><th>LAMBADA ppl</th><th>accuracy, 8 tasks (%)</th></tr></thead>
<tbody>{% for name, figures in published %}
<tr><td>{{ name }}</td>{% for figure in figures %}<td>{{ "%.2f"|format(figure) }}</td>{% endfor %}</tr>{% endfor %}
</tbody></table>
{% endif %}
{% for name, text in configs %}<details><summary>Configuration of {{ name }}</summary><pre>{{ text }}</pre></details>
{% endfor %}
</body>
</html>
"""


def render_page(runs: Sequence[Run], summaries: Sequence[Summary], images: Mapping[str, str]) -> str:
    """The page as text. `images`: file stem -> PNG in base64."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    eval_keys, evals = _last_evaluations(runs)
    title = "Training report: " + " and ".join(run.name for run in runs)
    return environment.from_string(_TEMPLATE).render(
        title=title,
        summaries=summaries,
        summary_rows=summary_rows(summaries),
        final_steps=FINAL_STEPS,
        notes=[f"{run.name}: {note}." for run in runs for note in run.notes],
        images=images,
        captions={stem: CAPTIONS[stem.split("_")[0] if stem.startswith("levels") else stem] for stem in images},
        eval_keys=eval_keys,
        evals=evals,
        show_published="word_ppl" in eval_keys,
        published=[(name, figures) for name, *figures in PUBLISHED],
        published_title=PUBLISHED_TITLE,
        configs=[(run.name, _yaml(run.config)) for run in runs if run.config],
    )


def summary_rows(summaries: Sequence[Summary]) -> list[tuple[str, list[str]]]:
    """(label, one cell per run); a row that no run has a figure for is left out."""
    rows: list[tuple[str, list[str]]] = [
        ("architecture", [s.arch or "–" for s in summaries]),
        ("parameters", [_number(s.parameters) for s in summaries]),
        ("steps", [_number(s.steps) for s in summaries]),
        ("tokens", [_number(s.tokens) for s in summaries]),
        ("final loss (nats/token)", [_number(s.final_loss) for s in summaries]),
        ("best validation loss", [_number(s.best_validation_loss) for s in summaries]),
        ("best perplexity per word", [_number(s.best_word_ppl) for s in summaries]),
        ("… logged as", [s.word_ppl_name or "–" for s in summaries]),
        ("… measured on", [s.word_ppl_what or "–" for s in summaries]),
        ("… after tokens", [_number(s.word_ppl_tokens) for s in summaries]),
        ("word_ppl, whole test split", [_number(s.test_word_ppl) for s in summaries]),
        ("median tokens/s", [_number(s.median_tokens_per_s) for s in summaries]),
        ("peak memory", [_gib(s.peak_memory_bytes) for s in summaries]),
        ("log cut back by a resume", [f"{s.resumes} times" if s.resumes else "–" for s in summaries]),
        ("stopped", [s.stopped for s in summaries]),
    ]
    return [(label, cells) for label, cells in rows if any(cell != "–" for cell in cells)]


def _last_evaluations(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Columns measured at all, and for each run and kind of evaluation its newest line."""
    keys = [key for key in (*PERPLEXITIES, "validation_loss") if any(run.eval_series(key) for run in runs)]
    rows = []
    for run in runs:
        newest: dict[str, dict[str, Any]] = {}
        for row in run.evals:
            if any(key in row for key in keys):
                newest[eval_label(row)] = row
        for label, row in newest.items():
            rows.append([run.name, label, _number(int(row["tokens"])), *(_number(row.get(key)) for key in keys)])
    return keys, rows


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "–"
    return plain_number(value)


def _gib(value: int | None) -> str:
    return "–" if value is None else f"{value / 2**30:,.2f} GiB"


def _yaml(config: Mapping[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    return text
