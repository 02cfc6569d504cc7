"""Slow, obvious twins of the triggers: a condition as a tree, a rule as a list of past bins."""

import math

from rt_neds.stream.trigger import NO_AGE


def holds(tree, values):
    """Whether a condition is true; ``None`` anywhere a value is not a number."""
    kind = tree[0]
    if kind in ("<", "<=", ">", ">="):
        _, name, number, _turned = tree
        value = values[name]
        if not math.isfinite(value):
            return None
        return {"<": value < number, "<=": value <= number, ">": value > number,
                ">=": value >= number}[kind]  # fmt: skip
    parts = [holds(part, values) for part in tree[1:]]
    if None in parts:
        return None
    return {"and": all(parts), "or": any(parts), "not": not parts[0]}[kind]


def written(tree):
    """A tree as one would write it."""
    kind = tree[0]
    if kind in ("<", "<=", ">", ">="):
        _, name, number, turned = tree
        order = kind.translate(str.maketrans("<>", "><"))
        return f"{number!r} {order} {name}" if turned else f"{name} {kind} {number!r}"
    if kind == "not":
        return f"not ({written(tree[1])})"
    return "(" + f" {kind} ".join(written(part) for part in tree[1:]) + ")"


def decisions(frames, hold, refractory, oldest, refuse):
    """What becomes of each frame: None, or the set of reasons (empty: it fires).

    ``frames`` are ``(epoch, bin, true, flags, age)``; bins are counted on through all epochs, each
    epoch's first coming after the last of the epoch before.
    """
    out, fired_at, offset = [], None, 0
    run, decided, before = [], False, None  # flags of the bins held
    for epoch, bin_, true, flags, age in frames:
        if before is not None and epoch != before[0]:
            offset += before[1] + 1 - bin_
            run, decided = [], False
        elif before is not None and bin_ != before[1] + 1:
            run = []
        before = epoch, bin_
        if not true:
            run, decided = [], False
            out.append(None)
            continue
        run.append(flags)
        if decided or len(run) < hold:
            out.append(None)
            continue
        decided = True
        reasons = {bit for bit in (1 << n for n in range(16)) for f in run if f & refuse & bit}
        if fired_at is not None and offset + bin_ - fired_at < refractory:
            reasons.add("refractory")
        if oldest and age == NO_AGE:
            reasons.add("age_unknown")
        elif oldest and age > oldest:
            reasons.add("too_old")
        if not reasons:
            fired_at = offset + bin_
        out.append(reasons)
    return out
