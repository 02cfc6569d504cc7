"""Numbers of the report are those of the result, and names in its tables are escaped."""

from types import SimpleNamespace

from offline import report


def test_a_card_has_the_score_beside_the_trivial_guess_the_baselines_and_the_ideal():
    choice = {"balanced_accuracy": 0.75, "chance": 0.5}
    result = {
        "decoding": {"choice": choice},
        "baselines": {"logistic": {"choice": {"balanced_accuracy": 0.66}}, "ridge": {}},
        "ideal": {"choice": {"balanced_accuracy": 0.91}},
        "encoding": {"bits_per_spike": {"mean50": 0.125, "pooled": 0.5}},
    }
    cards = report._cards(result)
    assert '<div class="big">0.75</div>' in cards
    assert "chance 0.50 · logistic 0.66 · ideal observer 0.91" in cards
    assert '<div class="big">0.125</div>' in cards


def test_what_was_evaluated_is_told_of_its_training():
    spec = SimpleNamespace(
        name="<b>",
        version="1",
        bin_ms=20.0,
        model=SimpleNamespace(layers=1, dim=16, attention="causal", context=10),
        sessions=[1, 2],
        training={
            "config": {
                "masking": {"schemes": {"decoding": 1.0, "neuron": 0.0}, "ahead": True},
            },
            "steps": 120,
            "best_step": 60,
            "by_regression": {"a": ["speed"], "b": ["choice", "speed"]},
        },
    )
    told = report._provenance(spec)
    for words in (
        "&lt;b&gt;",
        "120 steps on 2 sessions; best at step 60",
        "<dd>decoding, ahead</dd>",
        "1 layer of 16",
        "choice, speed (docs",
    ):
        assert words in told


def test_cells_of_a_table_are_escaped():
    table = report._table((["<i>", "rt-neds"], [["<b>", "0.5"]]))
    assert "<i>" not in table
    assert "<td>&lt;b&gt;</td>" in table
