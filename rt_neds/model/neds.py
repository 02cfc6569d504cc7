"""NEDS, causal: the whole forward pass in the order the data takes, and the same one bin at a time.

Neural Encoding and Decoding at Scale (arXiv 2504.08201): one transformer whose tokens are, at each
bin, the spikes and each behaviour; hiding some and asking for them back makes it encode and decode.
Two things differ from the paper's, on purpose: attention may be causal (banded and block-causal, so
that a bin can be decoded when it closes), and a hidden token can see without being seen
(``masked = "queries"``), so that what was observed never depends on what is being asked.

Shape suffixes: B batch, T bins, M modalities (0 is spikes, then each behaviour), N units, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import msgspec
import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from rt_neds.model.attention import Attention, Ring, rotary_table, visible
from rt_neds.model.readin import CategoricalReadIn, ContinuousReadIn, SpikeReadIn
from rt_neds.model.readout import Behaviour, ReadOut

SCHEMES = ("decoding", "encoding", "within_spikes", "within_behaviour", "cross_modal")
"""Training schemes of NEDS (arXiv 2504.08201, section 3): each says what is hidden."""

SPIKES = "spikes"


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Size and kind of the network.

    Attributes
    ----------
    dim, layers, heads : int
    widen : int
        Width of the feed-forward layer over ``dim``.
    context : int
        Bins a token sees in each layer, its own included.
    attention : {"causal", "full"}
        ``full`` is the paper's, for comparison; it cannot be served.
    masked : {"queries", "seen"}
        Whether hidden tokens stay out of everyone's sight, or serve as keys as in the paper.
    history : tuple of int
        Widths, in bins, of the running sums of counts that a spike token is made of.
    shortcut : bool
        Whether each behaviour also hears the standardised spikes of its own bin directly, through
        one linear map, which training begins with at the ridge solution.
    dropout : float
    """

    dim: int = 128
    layers: int = 4
    heads: int = 4
    widen: int = 2
    context: int = 100
    attention: Literal["causal", "full"] = "causal"
    masked: Literal["queries", "seen"] = "queries"
    history: tuple[int, ...] = (1, 5, 25)
    shortcut: bool = True
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if min(self.dim, self.layers, self.heads, self.widen, self.context) < 1:
            raise ValueError("dim, layers, heads, widen and context must be at least 1")
        if self.dim % (2 * self.heads):
            raise ValueError(f"dim {self.dim} must be an even multiple of heads {self.heads}")
        if not self.history or min(self.history) < 1:
            raise ValueError("history needs widths of at least one bin")

    @property
    def receptive_field(self) -> int:
        """Bins that can influence an output: the band of each layer, and the boxcars below."""
        return self.layers * (self.context - 1) + max(self.history)


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attention = Attention(config.dim, config.heads)
        self.norm2 = nn.LayerNorm(config.dim)
        self.widen = nn.Linear(config.dim, config.widen * config.dim)
        self.narrow = nn.Linear(config.widen * config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(attended)
        return x + self.dropout(self.narrow(nnf.gelu(self.widen(self.norm2(x)))))


class SessionParts(nn.Module):
    """What belongs to one session: read-in and read-out of its units and continuous behaviours."""

    def __init__(self, units: int, config: ModelConfig, behaviours: Sequence[Behaviour]) -> None:
        super().__init__()
        self.units = units
        self.spikes_in = SpikeReadIn(units, config.dim, config.history)
        self.spikes_out = ReadOut(config.dim, units)
        self.behaviour_in = nn.ModuleDict(
            {b.name: ContinuousReadIn(config.dim) for b in behaviours if b.kind != "categorical"}
        )
        self.behaviour_out = nn.ModuleDict(
            {b.name: ReadOut(config.dim, b.outputs) for b in behaviours}
        )
        features = len(config.history) * units
        self.shortcut = nn.ModuleDict()
        for b in behaviours if config.shortcut else ():
            straight = nn.Linear(features, b.outputs, bias=False)
            nn.init.zeros_(straight.weight)
            self.shortcut[b.name] = straight


@dataclass(slots=True)
class StreamState:
    """Everything ``step`` knows of the past.

    Attributes
    ----------
    next_bin : int
        Number of the bin the next step begins with; the first can be any.
    ring : Ring
    counts_BHN : tensor
        Counts of the last ``max(history) - 1`` bins, for the boxcars.
    kept : tuple of int
        Modalities whose keys are kept: those that may be observed.
    """

    next_bin: int
    ring: Ring
    counts_BHN: Tensor
    kept: tuple[int, ...]


class NEDS(nn.Module):
    """The network, for any number of sessions.

    Parameters
    ----------
    config : ModelConfig
    behaviours : sequence of Behaviour
        In the order of their tokens and outputs.
    sessions : mapping of str to int
        Units of each session, by session id (never by unit count: two sessions can have as many).
    """

    def __init__(
        self, config: ModelConfig, behaviours: Sequence[Behaviour], sessions: Mapping[str, int]
    ) -> None:
        super().__init__()
        self.config = config
        self.behaviours = tuple(behaviours)
        self.modalities = (SPIKES, *(b.name for b in behaviours))
        self.session_ids = tuple(sessions)
        dim = config.dim
        self.sessions = nn.ModuleList(
            SessionParts(units, config, behaviours) for units in sessions.values()
        )
        self.spikes_shared = nn.Linear(dim, dim)
        self.categorical_in = nn.ModuleDict(
            {
                b.name: CategoricalReadIn(len(b.classes), dim)
                for b in behaviours
                if b.kind == "categorical"
            }
        )
        self.hidden_D = nn.Parameter(torch.zeros(dim))
        self.modality_MD = nn.Parameter(0.02 * torch.randn(len(self.modalities), dim))
        self.session_XD = nn.Parameter(0.02 * torch.randn(len(sessions), dim))
        self.scheme_XD = nn.Parameter(0.02 * torch.randn(len(SCHEMES), dim))
        self.token_dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(dim)
        self._table = rotary_table(range(1), dim // config.heads)

    def parts(self, session: str) -> SessionParts:
        """Read-ins and read-outs of a session."""
        return cast(SessionParts, self.sessions[self.session_ids.index(session)])

    def stack(self) -> list[Layer]:
        """The layers, first to last."""
        return cast(list[Layer], list(self.layers))

    # -- the whole sequence ----------------------------------------------------------------------

    def forward(
        self,
        session: str,
        counts_BTN: Tensor,
        values_BTM: Tensor,
        observed_BTM: Tensor,
        scheme_B: Tensor,
        *,
        missing_BTN: Tensor | None = None,
        wanted: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Outputs of every bin of a sequence.

        Parameters
        ----------
        session : str
            Session id.
        counts_BTN : tensor of float32
            Spike counts; those of bins that are not observed are ignored.
        values_BTM : tensor of float32
            Behaviours: normalised values, or class numbers; column 0 (spikes) is ignored.
        observed_BTM : tensor of bool
            What the network is shown; everything else is hidden and may be asked for.
        scheme_B : tensor of int64
            Index into ``SCHEMES``.
        missing_BTN : tensor of bool, optional
            Units to replace by their learned stand-in; broadcasts over bins.
        wanted : sequence of str, optional
            Modalities to read out; all by default. Tokens that are neither shown nor wanted are
            left out, which changes nothing where hidden tokens are queries.

        Returns
        -------
        dict of str to tensor, shape (B, T, numbers of that output)
        """
        wanted = self.modalities if wanted is None else tuple(wanted)
        use = self._used(observed_BTM.any(dim=1).any(dim=0).tolist(), wanted)
        counts_BTN = torch.where(observed_BTM[:, :, :1], counts_BTN, 0.0)
        x_BTMD, z_BTF = self._tokens(
            session, counts_BTN, values_BTM, observed_BTM, scheme_B, missing_BTN, use
        )
        seen_BTM = observed_BTM[:, :, use]
        if self.config.masked == "seen":
            seen_BTM = torch.ones_like(seen_BTM)
        table_2TF = self._rotary(x_BTMD.shape[1]).to(x_BTMD.device)
        causal = self.config.attention == "causal"
        for layer in self.stack():
            attended = layer.attention.sequence(
                layer.norm1(x_BTMD), table_2TF, seen_BTM, self.config.context, causal
            )
            x_BTMD = layer.add(x_BTMD, attended)
        return self._read_out(session, x_BTMD, z_BTF, use, wanted)

    def _used(self, shown_M: Sequence[bool], wanted: Sequence[str]) -> list[int]:
        if self.config.masked == "seen":
            return list(range(len(self.modalities)))
        return [m for m, name in enumerate(self.modalities) if shown_M[m] or name in wanted]

    def _tokens(
        self,
        session: str,
        counts_BTN: Tensor,
        values_BTM: Tensor,
        observed_BTM: Tensor,
        scheme_B: Tensor,
        missing_BTN: Tensor | None,
        use: Sequence[int],
        past: int = 0,
    ) -> tuple[Tensor, Tensor | None]:
        """One token per bin and used modality, and the features of shown spikes (else zero).

        The first ``past`` bins of the counts only feed boxcars.
        """
        z_BTF = None
        index, parts = self.session_ids.index(session), self.parts(session)
        tokens = []
        for m in use:
            name = self.modalities[m]
            if m == 0:
                z_BTF = parts.spikes_in.standardise(counts_BTN, missing_BTN)[:, past:]
                token = self.spikes_shared(nnf.softsign(parts.spikes_in(z_BTF)))
            elif name in self.categorical_in:
                token = self.categorical_in[name](values_BTM[:, :, m])
            else:
                token = parts.behaviour_in[name](values_BTM[:, :, m])
            shown = observed_BTM[:, :, m, None]
            tokens.append(torch.where(shown, token, self.hidden_D) + self.modality_MD[m])
        x_BTMD = torch.stack(tokens, dim=2)
        x_BTMD = x_BTMD + self.session_XD[index] + self.scheme_XD[scheme_B][:, None, None]
        if z_BTF is not None:
            z_BTF = z_BTF * observed_BTM[:, :, :1]
        return self.token_dropout(x_BTMD), z_BTF

    def _rotary(self, bins: int) -> Tensor:
        if self._table.shape[1] < bins:
            self._table = rotary_table(range(bins), self.config.dim // self.config.heads)
        return self._table[:, :bins]

    def _read_out(
        self,
        session: str,
        x_BTMD: Tensor,
        z_BTF: Tensor | None,
        use: Sequence[int],
        wanted: Sequence[str],
    ) -> dict[str, Tensor]:
        parts = self.parts(session)
        x_BTMD = self.norm(x_BTMD)
        outputs = {}
        for position, m in enumerate(use):
            name = self.modalities[m]
            if name in wanted:
                head = parts.spikes_out if m == 0 else parts.behaviour_out[name]
                outputs[name] = head(x_BTMD[:, :, position])
                if name in parts.shortcut and z_BTF is not None:
                    outputs[name] = outputs[name] + parts.shortcut[name](z_BTF)
        return outputs

    # -- one bin, or a few, at a time ------------------------------------------------------------

    def start(
        self,
        session: str,
        *,
        batch: int = 1,
        first_bin: int = 0,
        chunk: int = 1,
        observable: Sequence[str] = (SPIKES,),
    ) -> StreamState:
        """State of a stream of which nothing has been seen.

        Parameters
        ----------
        session : str
        batch : int
            Streams that run side by side.
        first_bin : int
            Number of the first bin.
        chunk : int
            Most bins that one ``step`` will be given.
        observable : sequence of str
            Modalities that may be observed; only their keys are kept.
        """
        if self.config.attention != "causal" or self.config.masked != "queries":
            raise ValueError(
                'a stream needs attention = "causal" and masked = "queries"; '
                f"this model has {self.config.attention!r} and {self.config.masked!r}"
            )
        config = self.config
        kept = tuple(self.modalities.index(name) for name in observable)
        rows = config.context + chunk - 1
        shape = (batch, config.heads, rows, len(kept), config.dim // config.heads)
        units = self.parts(session).units
        return StreamState(
            next_bin=first_bin,
            ring=Ring.empty(config.layers, shape, self.hidden_D),
            counts_BHN=self.hidden_D.new_zeros(batch, max(config.history) - 1, units),
            kept=kept,
        )

    @torch.no_grad()
    def step(
        self,
        session: str,
        state: StreamState,
        counts_BTN: Tensor,
        values_BTM: Tensor,
        observed_BTM: Tensor,
        scheme_B: Tensor,
        *,
        missing_BTN: Tensor | None = None,
        wanted: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Outputs of the next bins of a stream, equal to ``forward`` over the whole of it.

        Arguments are those of :meth:`forward` for the new bins only; ``state`` is advanced.
        """
        wanted = self.modalities if wanted is None else tuple(wanted)
        shown = [m in state.kept for m in range(len(self.modalities))]
        use = self._used(shown, wanted)
        counts_BTN = torch.where(observed_BTM[:, :, :1], counts_BTN, 0.0)
        past = state.counts_BHN.shape[1]
        with_past = torch.cat([state.counts_BHN, counts_BTN], dim=1)
        x_BTMD, z_BTF = self._tokens(
            session, with_past, values_BTM, observed_BTM, scheme_B, missing_BTN, use, past
        )
        state.counts_BHN = with_past[:, with_past.shape[1] - past :]

        ring, T = state.ring, x_BTMD.shape[1]
        assert len(ring.bin_R) - self.config.context + 1 >= T, "more bins than the state's chunk"
        bins = range(state.next_bin, state.next_bin + T)
        bins_T = torch.arange(bins.start, bins.stop, device=x_BTMD.device)
        rows_T = bins_T % len(ring.bin_R)
        ring.bin_R[rows_T] = bins_T
        ring.seen_BRM[:, rows_T] = observed_BTM[:, :, state.kept]
        band_TR = visible(bins_T, ring.bin_R, self.config.context, causal=True)
        allowed_BTRM = band_TR[None, :, :, None] & ring.seen_BRM[:, None]
        table_2TF = rotary_table(bins, self.config.dim // self.config.heads).to(x_BTMD.device)
        kept_positions = [use.index(m) for m in state.kept]
        for layer, keys, values in zip(self.stack(), ring.keys, ring.values, strict=True):
            q, k, v = layer.attention.project(layer.norm1(x_BTMD), table_2TF)
            keys[:, :, rows_T] = k[:, :, :, kept_positions]
            values[:, :, rows_T] = v[:, :, :, kept_positions]
            x_BTMD = layer.add(x_BTMD, layer.attention.attend(q, keys, values, allowed_BTRM))
        state.next_bin += T
        return self._read_out(session, x_BTMD, z_BTF, use, wanted)
