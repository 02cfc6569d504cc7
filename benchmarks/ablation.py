"""What each training scheme is worth: the same small network and steps, with and without it.

NEDS and MtM train one network by several schemes at once. Here each set of schemes trains one of
its own, on a real recording and on a simulated session whose units have regions; what a network was
never taught is not asked of it. Small networks (2 layers of 64), few steps: the sets are compared
with each other, and with nothing else. As many windows for all: who is taught more sees less of
each.

    python benchmarks/ablation.py --data FOLDER_OF_RECORDINGS --out runs/ablation

writes ``results/ablation.json``: dataset -> schemes -> score -> [mean, sd over seeds], test split,
decoding streamed bin by bin, spikes in bits per spike over units that fired 50 times.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from variants import Case, cases, compare, sessions

from offline.evaluate import evaluate
from rt_neds.bundle import load_spec

RESULTS = Path(__file__).resolve().parent / "results" / "ablation.json"
SETS = {
    "decoding": "decoding=1.0",
    "encoding": "encoding=1.0",
    "decoding, encoding": "decoding=1.0, encoding=0.6",
    "NEDS": "decoding=1.0, encoding=0.6, within_spikes=0.2, within_behaviour=0.2, cross_modal=0.2",
    "MtM": "neuron=0.6, intra_region=0.4, inter_region=0.4, forward=0.6",
    "all": "decoding=1.0, encoding=0.6, within_spikes=0.2, within_behaviour=0.2, cross_modal=0.2, "
    "neuron=0.2, intra_region=0.2, inter_region=0.2, forward=0.2",
}
AHEAD = "decoding, encoding and ahead"
"""The second of them, asked each bin's spikes from the bins before as well."""


def changes_of(label: str, dataset: str) -> list[str]:
    """Settings of one set of schemes."""
    schemes = SETS["decoding, encoding" if label == AHEAD else label]
    if dataset != "simulated":  # its units are all of one region
        parts = [part for part in schemes.split(", ") if "region" not in part]
        schemes = ", ".join(parts)
    memory = [] if dataset == "simulated" else ["model.memory=500"]  # windows are short
    return [
        *memory,
        f"masking.schemes={{{schemes}}}",
        f"masking.ahead={'true' if label == AHEAD else 'false'}",
    ]


def scores_of(case: Case, bundle: str) -> dict[str, float]:
    """One number for each thing that the network was taught."""
    result = evaluate(bundle, case.session, baselines="none")
    schemes = load_spec(bundle).training["config"]["masking"]["schemes"]
    found = {}
    for name, of in result["decoding"].items() if schemes.get("decoding") else ():
        found[name] = of["r2"] if "r2" in of else of["balanced_accuracy_bins"]
    for metric, of in result["encoding"].items():
        if of is not None:
            found[metric] = of["mean50"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    session_of = sessions(args.data, args.out)
    all_cases = cases(session_of, (*SETS, AHEAD), changes_of, args.seeds, args.steps)
    compare(RESULTS, args.out, all_cases, scores_of)


if __name__ == "__main__":
    main()
