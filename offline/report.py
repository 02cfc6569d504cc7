"""``report.html``: an evaluation on one page that needs nothing but itself.

Pictures are embedded, nothing is fetched, no script runs; every name is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from offline import figures, tables
from rt_neds.bundle import BundleSpec
from rt_neds.errors import ConfigError

if TYPE_CHECKING:
    from offline.evaluate import Evaluation

STYLE = """
:root { color-scheme: light; --ink: #1d2429; --soft: #66727a; --line: #dfe4e7; --ours: #0b6e99; }
* { box-sizing: border-box; }
body { margin: 0; background: #f4f6f7; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1060px; margin: 0 auto; padding: 44px 28px 72px; }
h1 { font-size: 28px; line-height: 1.2; letter-spacing: -.01em; margin: 0 0 6px; }
h2 { font-size: 21px; margin: 52px 0 4px; padding-top: 20px; border-top: 2px solid var(--ink); }
h3 { font-size: 16px; margin: 34px 0 6px; }
p { margin: 6px 0 12px; max-width: 76ch; }
.soft, figcaption, caption { color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: 14px; margin: 20px 0 8px; }
.card { flex: 1 1 180px; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 14px 18px 12px; }
.card .name { font-weight: 600; overflow-wrap: anywhere; }
.card .big { font-size: 34px; line-height: 1.2; color: var(--ours); font-weight: 600;
  font-variant-numeric: tabular-nums; letter-spacing: -.02em; }
.card .soft { font-size: 13px; line-height: 1.45; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  margin: 10px 0 8px; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { padding: 8px 14px; text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
th { font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--line); font-size: 13px; }
tr + tr td { border-top: 1px solid #eef1f3; }
th:first-child, td:first-child { text-align: left; white-space: normal; }
th.how, td.how { text-align: left; color: var(--soft); padding-left: 26px; }
td.ours { color: var(--ours); font-weight: 600; }
figure { margin: 12px 0 8px; background: #fff; border: 1px solid var(--line); border-radius: 8px;
  padding: 18px 18px 12px; }
figure img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
figcaption { font-size: 13px; margin-top: 10px; max-width: 90ch; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 22px; font-size: 14px; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 13px ui-monospace, Menlo, Consolas, monospace; }
@media print { body { background: #fff; } main { padding: 0; } figure, .scroll, .card {
  break-inside: avoid; } }
"""


def write_report(
    folder: str | Path,
    spec: BundleSpec,
    evaluations: list[Evaluation],
    regions: dict[str, Any] | None,
) -> Path:
    """Write ``report.html``.

    Parameters
    ----------
    folder : path
        Made if need be.
    spec : BundleSpec
    evaluations : list of Evaluation
    regions : dict, optional
        As :func:`offline.regions.decode_regions` gives.

    Returns
    -------
    path
        Of the page.

    Raises
    ------
    ConfigError
        If it cannot be written there.
    """
    page = Path(folder) / "report.html"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(_page(spec, evaluations, regions), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {page} ({error.strerror}); name another folder") from None
    return page


def _page(spec: BundleSpec, evaluations: list[Evaluation], regions: dict[str, Any] | None) -> str:
    names = ", ".join(e.result["session"] for e in evaluations)
    parts = [_session(e) for e in evaluations]
    if regions is not None:
        parts.append(_regions(regions))
    parts.append(_provenance(spec))
    how = "bin by bin as at the rig"
    if not spec.model.streams:
        how = "offline, for it cannot be run bin by bin and served"
    title = f"rt-neds on {escape(names)}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title><style>{STYLE}</style></head>
<body><main>
<h1>{title}</h1>
<p class="soft">Scores of bundle <code>{escape(spec.name)}</code>, decoded {how}, each beside what a
trivial guess gets.</p>
{"".join(parts)}
</main></body></html>
"""


def _session(of: Evaluation) -> str:
    result = of.result
    minutes = result["bins"] * of.binned.width / of.binned.session.rate / 60
    apart = result["stream_vs_offline_max_abs"]
    compared = ""
    if apart is not None:
        compared = f" The stream and the offline pass differ by {apart:.1e} at most."
    parts = [
        f"<h2>{escape(result['session'])}</h2>",
        f'<p class="soft">Split <code>{escape(result["split"])}</code>: {result["bins"]} bins, '
        f"{minutes:.1f} minutes, {len(of.binned.session.unit_ids)} units.{compared}</p>",
        _cards(result),
    ]
    if of.behaviours:
        shown = " and ".join(["spikes", *result["live"]])
        parts += [
            f"<h3>Behaviour from {escape(shown)}</h3>",
            _table(tables.decoding_table(result)),
            _figure(
                lambda: figures.traces(of),
                "What was decoded and what was true, where most of the split was scored. "
                "Lines break where nothing was scored.",
            ),
            _figure(
                lambda: figures.over_time(of),
                "As time passes in the trial. Dotted: what knowing the clock alone gives, the mean "
                "profile of the training trials, or chance.",
            ),
            "<h3>Can what it states be believed?</h3>",
            _table(tables.continuous_trust_table(result)),
            _table(tables.categorical_trust_table(result)),
        ]
    if any(b.kind != "poisson" for b in of.behaviours):
        parts.append(
            _figure(
                lambda: figures.reliability(of),
                "On the dashed line, what is stated is what happens: an interval said to hold "
                "90 % of the values holds 90 %; a class given 80 % is right in 80 of 100 bins. "
                "Area of a dot: how many bins.",
            )
        )
    if of.predicted:
        parts += [
            "<h3>Spikes from behaviour, from other units, from the past</h3>",
            _table(tables.encoding_table(result)),
            _figure(
                lambda: figures.bits_of_units(of),
                "A dot is a unit, pale with fewer than 50 spikes in what was scored; bar: mean of "
                "the others (mean50). Zero is the unit's own mean rate in these very bins, which "
                "no prediction from the past knows.",
            ),
        ]
    return "".join(parts)


def _cards(result: dict[str, Any]) -> str:
    cards = []
    for name, scores in result["decoding"].items():
        key = tables.headline(scores)
        guess, what = tables.trivial(scores)
        beside = [f"{what} {tables.number(guess, 2)}"]
        for method, of in (*result["baselines"].items(), ("ideal observer", result["ideal"])):
            if name in of:
                beside.append(f"{method} {tables.number(of[name][key], 2)}")
        value = tables.number(scores[key], 2)
        cards.append((name, tables.HEADLINES[key], value, " · ".join(beside)))
    encoding = result["encoding"]["bits_per_spike"]
    if encoding is not None:
        bits = tables.number(encoding["mean50"])
        cards.append(("spikes", "bits per spike", bits, "from behaviour · mean rate 0"))
    return (
        '<div class="cards">'
        + "".join(
            f'<div class="card"><div class="name">{escape(name)}</div>'
            f'<div class="big">{escape(value) or "–"}</div>'
            f'<div class="soft">{escape(score)}<br>{escape(beside)}</div></div>'
            for name, score, value, beside in cards
        )
        + "</div>"
    )


def _regions(regions: dict[str, Any]) -> str:
    left = ", ".join(f"{name} ({units})" for name, units in regions["left_out"].items())
    note = f" Left out, with too few units: {escape(left)}." if left else ""
    return "".join(
        [
            "<h2>Regions</h2>",
            f"<p>A linear machine names the region of each of {regions['units']} units from what "
            f"the network learned about it, five-fold.{note}</p>",
            _table(tables.regions_table(regions)),
            _figure(
                lambda: figures.confusion(regions),
                "Per cent of the units of each region (rows) that were named so (columns).",
            ),
        ]
    )


def _provenance(spec: BundleSpec) -> str:
    config, model = spec.training["config"], spec.model
    masking = config["masking"]
    schemes = [name for name, weight in masking["schemes"].items() if weight]
    schemes += ["ahead"] if masking["ahead"] else []
    facts = {
        "bundle": spec.name,
        "made by": f"rt-neds {spec.version}",
        "bins": f"{spec.bin_ms:g} ms",
        "network": f"{_several(model.layers, 'layer')} of {model.dim}, {model.attention} "
        f"attention, context of {model.context} bins",
        "trained": f"{spec.training['steps']} steps on {_several(len(spec.sessions), 'session')}; "
        f"best at step {spec.training['best_step']}",
        "schemes": ", ".join(schemes),
    }
    left = spec.training.get("by_regression") or {}
    if names := sorted({name for of_session in left.values() for name in of_session}):
        facts["left to regression"] = f"{', '.join(names)} (docs/decisions/0033)"
    rows = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
    return f"<h2>What was evaluated</h2><dl>{rows}</dl>"


def _several(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _table(table: tables.Table) -> str:
    head, rows = table
    if not rows:
        return ""

    def cell(text: str, column: int) -> str:
        kind = {"rt-neds": ' class="ours"', tables.HOW: ' class="how"'}.get(head[column], "")
        return f"<td{kind}>{escape(text)}</td>"

    titles = "".join(
        f"<th{' class=how' if title == tables.HOW else ''}>{escape(title)}</th>" for title in head
    )
    body = "".join(
        "<tr>" + "".join(cell(text, column) for column, text in enumerate(row)) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _figure(draw: Callable[[], Figure | None], caption: str) -> str:
    with plt.rc_context(figures.PLAIN):
        figure = draw()
        if figure is None:
            return ""
        drawn = io.BytesIO()
        figure.savefig(drawn, format="svg", metadata={"Date": None})
        plt.close(figure)
    picture = base64.b64encode(drawn.getvalue()).decode("ascii")
    return (
        f'<figure><img alt="{escape(caption)}" src="data:image/svg+xml;base64,{picture}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )
