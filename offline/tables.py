"""The tables of an evaluation, as text: for the terminal and for the report."""

from __future__ import annotations

from typing import Any

METHODS = {
    "ridge": "ridge / logistic",
    "logistic": "ridge / logistic",
    "gru": "GRU",
    "glm": "Poisson GLM",
}
"""Columns of the baselines; those that share one decode different kinds of behaviour."""

QUESTIONS = {
    "bits_per_spike": ("from behaviour", "all spikes hidden, every behaviour shown"),
    "co_smoothing": ("co-smoothing", "one unit hidden at a time, all others shown"),
    "intra_region": ("intra-region", "one unit hidden, only others of its region shown"),
    "inter_region": ("inter-region", "a whole region hidden, all others shown"),
    "forward": ("forward", "the last 10 of 100 bins hidden"),
    "forward_1": ("next bin", "each bin from the bins before it"),
}
"""Metrics of ``encoding`` in words."""

HOW = "what is hidden"
"""The one column of words."""

HEADLINES = {"r2": "R²", "d2": "D²", "balanced_accuracy": "balanced accuracy"}

Table = tuple[list[str], list[list[str]]]


def number(value: float | None, digits: int = 3) -> str:
    """A number as people read it; an empty string for what there is not."""
    if value is None or value != value:
        return ""
    return f"{value:.{digits}f}".replace("-", "−")


def headline(scores: dict[str, Any]) -> str:
    """Key of the one score of an output that a person asks for first."""
    return next(key for key in HEADLINES if key in scores)


def trivial(scores: dict[str, Any]) -> tuple[float | None, str]:
    """What the trivial guess gets by the same score, and what it is."""
    key = headline(scores)
    if key == "r2":
        return scores["r2_profile"], "mean profile"
    if key == "d2":
        return 0.0, "mean rate"
    return scores["chance"], "chance"


def decoding_table(result: dict[str, Any]) -> Table:
    """How well each behaviour is decoded, beside the trivial guess, the baselines and the ideal."""
    methods: dict[str, dict[str, Any]] = {}
    for method, of in result["baselines"].items():
        decoded = {name: scores for name, scores in of.items() if name in result["decoding"]}
        if decoded:
            methods.setdefault(METHODS.get(method, method), {}).update(decoded)
    if result["ideal"]:
        methods["ideal observer"] = result["ideal"]
    rows = []
    for name, scores in result["decoding"].items():
        key = headline(scores)
        guess, what = trivial(scores)
        others = [number(of.get(name, {}).get(key)) for of in methods.values()]
        rows.append(
            [f"{name} ({HEADLINES[key]})", number(scores[key]), f"{number(guess)} {what}", *others]
        )
    return ["decoded", "rt-neds", "trivial", *methods], rows


def continuous_trust_table(result: dict[str, Any]) -> Table:
    """How often truth lies in the intervals that the stated sd spans."""
    percents = ("50", "68", "90", "95")
    rows = []
    for name, scores in result["decoding"].items():
        if "coverage_68" in scores:
            shares = [number(100 * scores[f"coverage_{p}"], 1) + " %" for p in percents]
            sizes = (number(scores[key]) for key in ("error_over_sd", "nll", "nll_profile"))
            rows.append([name, *shares, *sizes])
    head = ["stated", *(f"{p} % interval" for p in percents)]
    return [*head, "error over sd, rms", "nats per bin", "of mean profile"], rows


def categorical_trust_table(result: dict[str, Any]) -> Table:
    """Whether stated probabilities are how often they are right."""
    rows = [
        [
            name,
            number(scores["accuracy"]),
            number(scores["majority"]),
            number(scores["auc"]),
            number(scores["ece"]),
            number(scores["brier"]),
            str(scores["trials"]),
        ]
        for name, scores in result["decoding"].items()
        if "ece" in scores
    ]
    head = ["stated", "accuracy", "of the commonest", "AUC", "calibration error", "Brier", "trials"]
    return head, rows


def encoding_table(result: dict[str, Any]) -> Table:
    """Bits per spike of everything that was predicted of spikes."""
    baselines = {
        METHODS.get(method, method): of
        for method, of in result["baselines"].items()
        if any(metric in of for metric in QUESTIONS)
    }
    rows = []
    for metric, (name, what) in QUESTIONS.items():
        scores = result["encoding"].get(metric)
        if scores is not None:
            row = [name, *(number(scores[key]) for key in ("mean50", "pooled", "mean"))]
            row += [number(of.get(metric, {}).get("mean50")) for of in baselines.values()]
            rows.append([*row, str(scores["units"]), str(scores["bins"]), what])
    head = ["bits per spike", "mean50", "pooled", "mean"]
    return [*head, *(f"{name}, mean50" for name in baselines), "units", "bins", HOW], rows


def regions_table(regions: dict[str, Any]) -> Table:
    """Regions named from embeddings, beside what gives less away."""
    keys, floor = ("macro_f1", "balanced_accuracy"), regions["shuffled"]
    shuffled = [f"{number(floor[key])} ± {number(floor[f'{key}_sd'])}" for key in keys]
    rows = [
        ["learned embedding", *(number(regions["embedding"][key]) for key in keys)],
        ["mean rate alone", *(number(regions["rate"][key]) for key in keys)],
        ["embedding, labels shuffled in each session", *shuffled],
    ]
    return ["region of a unit from", "macro F1", "balanced accuracy"], rows


def regions_sentence(regions: dict[str, Any]) -> str:
    """The same in a line."""
    floor = regions["shuffled"]
    return (
        f"region of a unit from its embedding: macro F1 {number(regions['embedding']['macro_f1'])} "
        f"over {len(regions['regions'])} regions, {regions['units']} units; "
        f"shuffled {number(floor['macro_f1'])} ± {number(floor['macro_f1_sd'])}"
    )
