"""What a training TOML may say."""

from __future__ import annotations

from typing import Literal

import msgspec
from torch import nn

from rt_neds.model.config import ModelConfig
from rt_neds.model.neds import AHEAD, NEXT, SCHEMES, SPIKES

BEHAVIOUR_SCHEMES = ("decoding", "encoding", "within_behaviour", "cross_modal")
"""Schemes that show or ask for behaviours; the others are of spikes alone."""

TAKEN = (SPIKES, AHEAD, NEXT, *SCHEMES)
"""Names of other outputs and scores; those of a ``ModuleDict``, which holds the read-outs, are
taken, too."""


class BehaviourConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where a behaviour is in the session file and what it is decoded as.

    Attributes
    ----------
    source : str or list of str
        Dotted name, such as ``wheel.wheel_speed`` or ``trials.choice``; several for ``speed``.
    kind : {"continuous", "poisson", "categorical"}
    transform : {"none", "speed"}
        ``speed`` is the length of the step per second of a one-sided exponential average of the
        sources, restarted wherever they are.
    tau_s : float
        Time constant of that average, in seconds.
    classes : dict of str to number
        For a categorical one: its class names and the values that stand for them in the file.
    scored : (str, str)
        For a trial variable: columns of ``trials`` between which it is asked for.
    known_from : str
        For a trial variable: column of ``trials`` from which an observer could know it.
    unit : str
    weight : float
        Of its loss.
    live : bool
        Whether a rig may observe it while others are decoded: half of the samples of ``decoding``
        show such behaviours beside the spikes, each of them in three of four.
    """

    source: str | list[str]
    kind: Literal["continuous", "poisson", "categorical"] = "continuous"
    transform: Literal["none", "speed"] = "none"
    tau_s: float = 0.2
    classes: dict[str, float] = {}
    scored: tuple[str, str] = ("start", "end")
    known_from: str = "end"
    unit: str = ""
    weight: float = 1.0
    live: bool = False

    def __post_init__(self) -> None:
        of = ", ".join(self.sources) or "no source"
        if self.is_trial_variable and self.kind != "categorical":
            raise ValueError(
                f'{of}: one value a trial; kind = "categorical" and classes are needed'
            )
        if (self.kind == "categorical") != (len(self.classes) > 1):
            raise ValueError(
                f"{of}: classes: two or more for a categorical behaviour, none for another"
            )
        if len(set(self.classes.values())) < len(self.classes):
            raise ValueError(f"{of}: classes {self.classes}; each stands for a value of its own")
        if len(self.sources) != 1 and not (self.sources and self.transform == "speed"):
            raise ValueError(f"{of}: one source is needed, or several and transform = 'speed'")
        if self.transform != "none" and self.kind != "continuous":
            raise ValueError(f'{of}: transform is for kind = "continuous", and this is {self.kind}')
        if not self.is_trial_variable:
            for name, default in (("scored", ("start", "end")), ("known_from", "end")):
                if getattr(self, name) != default:
                    raise ValueError(f"{of}: {name} is for columns of trials; leave it out")
        if self.weight < 0:
            raise ValueError(f"{of}: weight is {self.weight}; 0 or more is needed")
        if self.tau_s <= 0:
            raise ValueError(f"{of}: tau_s is {self.tau_s:g}; more than 0 is needed")

    @property
    def sources(self) -> list[str]:
        return [self.source] if isinstance(self.source, str) else self.source

    @property
    def is_trial_variable(self) -> bool:
        return any(source.startswith("trials.") for source in self.sources)


class DataConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Bins and splits.

    Attributes
    ----------
    bin_ms : float
    window_bins : int
        Length of a training window; longer than the context, so that the banded mask is trained,
        and with a memory not much shorter than its span: what lies before a window is not learned
        to be kept.
    split : str
        ``time``: three contiguous pieces; ``trials``: contiguous folds over trial order; any other
        name ``X``: the intervals ``X_{train,val,test}_domain`` of the file; the last may be absent.
    fractions : (float, float, float)
        For ``time``: shares of train, validation and test.
    gap_s : float
        Left out between pieces.
    train_minutes : float
        Train on no more than the last so many minutes of the training split; 0 for all. What a
        calibration of that length before the experiment would give.
    folds, fold : int
        For ``trials``: their number, and which one is the test; the next one is validation.
    refit : bool
        Train on the validation split as well, and keep the last weights: for few labels, once
        everything, the number of steps too, was chosen on validation without it.
    cache : str
        Folder in which sessions are kept on the grid of bins, to be read from disk as training
        needs them; by default ``cache`` in the folder of the run. It may be shared and deleted.
    """

    bin_ms: float = 20.0
    window_bins: int = 300
    split: str = "time"
    fractions: tuple[float, float, float] = (0.7, 0.1, 0.2)
    gap_s: float = 2.0
    train_minutes: float = 0.0
    folds: int = 5
    fold: int = 0
    refit: bool = False
    cache: str = ""

    def __post_init__(self) -> None:
        if self.bin_ms <= 0 or self.window_bins < 2 or min(self.gap_s, self.train_minutes) < 0:
            raise ValueError(
                "bin_ms > 0, window_bins >= 2, gap_s >= 0 and train_minutes >= 0 are needed"
            )
        if min(self.fractions) <= 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions {self.fractions} must be positive and sum to 1")
        if not 0 <= self.fold < self.folds or self.folds < 3:
            raise ValueError("folds >= 3 and 0 <= fold < folds are needed")


class MaskingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What training hides.

    Attributes
    ----------
    schemes : dict of str to float
        Weight with which each scheme is drawn, per sample.
    ahead : bool
        Whether the samples of ``decoding`` are also asked each bin's spikes from the bins before.
    ratio : float
        Share of bins, or of units, hidden by the schemes that hide them at random; share of the
        window that ``forward`` hides.
    region : str
        Field of ``units`` that the schemes of regions read.
    unit_dropout : float
        Mean share of units replaced by their stand-in, per sample; what survives lost units.
    """

    schemes: dict[str, float] = msgspec.field(default_factory=lambda: {"decoding": 1.0})
    ahead: bool = False
    ratio: float = 0.3
    region: str = "region_beryl"
    unit_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name, weight in self.schemes.items():
            if name not in SCHEMES:
                raise ValueError(f"schemes: no scheme {name}; there are {', '.join(SCHEMES)}")
            if weight < 0:
                raise ValueError(f"schemes: weight {weight} of {name}; it must not be negative")
        if sum(self.schemes.values()) <= 0:
            raise ValueError("schemes: at least one needs a positive weight")
        if self.ahead and not self.schemes.get("decoding"):
            raise ValueError('ahead is asked of the samples of "decoding"; give schemes.decoding')
        if not 0 < self.ratio < 1 or not 0 <= self.unit_dropout < 0.5:
            raise ValueError("0 < ratio < 1 and 0 <= unit_dropout < 0.5 are needed")

    @property
    def by_region(self) -> bool:
        """Whether any scheme needs to know the region of a unit."""
        return any(self.schemes.get(name) for name in ("inter_region", "intra_region"))

    @property
    def taught(self) -> dict[str, float]:
        """Weights of all that is asked of the network, ``ahead`` among them."""
        return {**self.schemes, "ahead": float(self.ahead)}

    @property
    def of_behaviour(self) -> bool:
        """Whether any scheme shows or asks for a behaviour."""
        free = ("decoding",) if self.ahead else ()
        return any(
            weight and name in BEHAVIOUR_SCHEMES and name not in free
            for name, weight in self.schemes.items()
        )

    @property
    def of_spikes(self) -> bool:
        """Whether anything is asked that needs no behaviour."""
        return any(weight and name not in BEHAVIOUR_SCHEMES for name, weight in self.taught.items())


class TrainingConfig(msgspec.Struct, frozen=True, kw_only=True):
    """How the weights are found.

    Attributes
    ----------
    steps : int
        Optimiser steps.
    batch : int
        Windows per step, over all processes.
    sessions : int
        Sessions a step's windows are of, drawn anew each time; each gives as many.
    accumulate : int
        Parts a process does its windows of a step in, to save memory; it changes nothing else.
    precision : {"fp32", "bf16"}
        ``bf16``: products of matrices in bfloat16. Weights, sums and validation stay float32. On a
        CPU for which PyTorch has no such products that is float32, and ``train`` says so.
    learning_rate : float
        Highest of the one-cycle schedule.
    warmup : float
        Share of the steps in which it rises.
    weight_decay, clip : float
        AdamW's decay; largest gradient norm.
    average : float
        Decay of the running average of the weights, which is what is validated and kept.
    validate_every : int
        Steps between validations.
    spikes_weight : float
        Of the loss on spikes, where a scheme asks for them.
    frozen_steps : int
        Fine-tuning: steps in which only what belongs to sessions is trained.
    trunk_rate : float
        Fine-tuning: learning rate of the trunk after that, as a share of the sessions'.
    seed : int
    device : str
        ``auto``, ``cpu`` or ``cuda``.
    threads : int
        CPU threads; 0 leaves it to PyTorch. A small model is as fast on one, and does not stall
        when something else wants a core.
    """

    steps: int = 1000
    batch: int = 16
    sessions: int = 1
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    learning_rate: float = 2e-3
    warmup: float = 0.15
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.99
    validate_every: int = 100
    spikes_weight: float = 1.0
    frozen_steps: int = 0
    trunk_rate: float = 1.0
    seed: int = 0
    device: str = "auto"
    threads: int = 0

    def __post_init__(self) -> None:
        if min(self.weight_decay, self.spikes_weight) < 0 or self.clip <= 0:
            raise ValueError("weight_decay >= 0, spikes_weight >= 0 and clip > 0 are needed")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed {self.seed}; 0 <= seed < 2**63 is needed")
        if self.steps < 1 or self.batch < 1 or self.validate_every < 1:
            raise ValueError("steps, batch and validate_every must be at least 1")
        if min(self.sessions, self.accumulate) < 1 or self.batch % self.sessions:
            raise ValueError(
                "sessions and accumulate must be at least 1, and batch a multiple of sessions"
            )
        if min(self.threads, self.frozen_steps, self.trunk_rate) < 0:
            raise ValueError("threads, frozen_steps and trunk_rate must not be negative")
        if not 0 <= self.average < 1 or not 0 <= self.warmup <= 1 or self.learning_rate <= 0:
            raise ValueError("0 <= average < 1, 0 <= warmup <= 1 and learning_rate > 0 are needed")


class TrainConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One complete training run."""

    behaviour: dict[str, BehaviourConfig] = {}
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    training: TrainingConfig = TrainingConfig()

    def __post_init__(self) -> None:
        if not self.behaviour and self.masking.of_behaviour:
            raise ValueError(
                "behaviour: name at least one, as [behaviour.NAME] source = ..., or choose among "
                "the schemes of spikes alone: "
                + ", ".join(name for name in SCHEMES if name not in BEHAVIOUR_SCHEMES)
            )
        if self.model.attention != "causal" and self.masking.ahead:
            raise ValueError('masking.ahead needs model.attention = "causal"')
        for name in self.behaviour:
            if not name.isidentifier():
                raise ValueError(f"behaviour.{name}: use letters, digits and _")
            if name in TAKEN or hasattr(nn.ModuleDict(), name):
                raise ValueError(f"behaviour.{name}: that name is taken; call it my_{name}, say")
