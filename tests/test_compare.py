"""The comparison of two commits: the ratio it reports is the one that is there."""

import importlib.util
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def compare():
    spec = importlib.util.spec_from_file_location("compare", ROOT / "benchmarks" / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_ratio_survives_what_hits_both(compare):
    rng = np.random.default_rng(0)
    load = rng.lognormal(0, 1, 30)  # the machine is up to many times slower, for both of a round
    a = 100 * load * rng.normal(1, 0.02, 30)
    b = 80 * load * rng.normal(1, 0.02, 30)
    said = compare.ratio_of(a, b)
    assert said["low"] < 0.8 < said["high"]
    assert said["ratio"] == pytest.approx(0.8, abs=0.02)
    assert said["high"] < 1


def test_equals_are_not_told_apart(compare):
    rng = np.random.default_rng(1)
    said = compare.ratio_of(rng.normal(100, 5, 30), rng.normal(100, 5, 30))
    assert said["low"] < 1 < said["high"]


def test_two_trees_are_compared_by_processes_of_their_own(compare, tmp_path):
    trees = []
    for name in ("a", "b"):
        tree = tmp_path / name
        shutil.copytree(ROOT / "rt_neds", tree / "rt_neds")
        trees.append(str(tree))
    compare.main([*trees, "wire", "--rounds", "4", "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert (result["a"], result["b"], result["rounds"]) == (*trees, 4)
    row = result["cases"]["wire"]
    assert 0 < row["low"] <= row["ratio"] <= row["high"] < 100


def test_mistakes_are_told(compare, tmp_path):
    with pytest.raises(SystemExit):
        compare.main(["a", "b", "no such case"])
    with pytest.raises(SystemExit, match="neither a folder nor a commit"):
        compare.main(["no-such-commit", str(tmp_path), "wire"])
    with pytest.raises(SystemExit, match="cannot be run"):
        compare.main([str(tmp_path), str(tmp_path), "wire"])  # a tree without rt_neds
