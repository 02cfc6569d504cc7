"""One token per bin, or the paper's one per modality and bin? The same network and training, both.

Ours (``model.tokens = "bin"``) makes one token of what a bin shows and leaves out what is hidden;
the paper's (arXiv 2504.08201) has a token for each modality, and a learned vector where one is
hidden, which all others see. Small networks without memory, few steps: what is compared is one with
the other, nothing else. On a real recording and a simulated session; on another real one the
question is answered at full size by ``accuracy.py`` (``neds_modality``).

    python benchmarks/tokens.py --data FOLDER_OF_RECORDINGS --out runs/tokens

writes ``results/tokens.json``: dataset -> tokens -> target -> [mean, sd over seeds], R2 or balanced
accuracy on the test split, offline, beside the seconds of training.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from variants import Case, cases, compare, sessions

from offline.batches import prepare
from offline.validation import validate
from rt_neds.bundle import build_model, load_spec

RESULTS = Path(__file__).resolve().parent / "results" / "tokens.json"
TOKENS = ("bin", "modality")
ALIKE = (
    "model.memory=0",
    "masking.schemes={decoding=1.0, encoding=0.5, cross_modal=0.25}",
    "masking.ahead=false",
)


def scores_of(case: Case, bundle: str) -> dict[str, float]:
    """Scores on the test split."""
    subject = prepare(case.session, case.config)
    model = build_model(bundle, load_spec(bundle))
    return validate(model, [subject], case.config, "test", torch.device("cpu")).scores[subject.id]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/tokens"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)

    def changes_of(tokens: str, dataset: str) -> list[str]:
        return [*ALIKE, f"model.tokens={tokens}"]

    session_of = sessions(args.data, args.out)
    all_cases = cases(session_of, TOKENS, changes_of, args.seeds, args.steps)
    compare(RESULTS, args.out, all_cases, scores_of)


if __name__ == "__main__":
    main()
