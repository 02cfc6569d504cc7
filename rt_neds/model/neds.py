"""NEDS, causal: the whole forward pass in the order the data takes, and the same one bin at a time.

Neural Encoding and Decoding at Scale (arXiv 2504.08201): one transformer is shown some of the
spikes and behaviours of each bin, and asked for the rest. Two things differ from the paper's, on
purpose: attention may be causal (banded and block-causal, so that a bin can be decoded when it
closes), and a bin is one token, made of what it shows, instead of one token per modality
(``docs/decisions/0001``): what was observed never depends on what is being asked, and a step costs
the same however many behaviours there are.

Shape suffixes: B batch, T bins, M modalities (0 is spikes, then each behaviour), N units, D width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from rt_neds.model import passes
from rt_neds.model.attention import Attention, Ring, rotary_table, visible
from rt_neds.model.config import ModelConfig
from rt_neds.model.dropout import Dropout
from rt_neds.model.linear import LinearDecoder, numbers_said
from rt_neds.model.memory import Memory, in_sight
from rt_neds.model.readin import CategoricalReadIn, ContinuousReadIn, SpikeReadIn
from rt_neds.model.readout import Behaviour, ReadOut

SCHEMES = (
    "decoding",
    "encoding",
    "within_spikes",
    "within_behaviour",
    "cross_modal",
    "neuron",
    "inter_region",
    "intra_region",
    "forward",
)
"""Training schemes: five of NEDS (arXiv 2504.08201, section 3) and four of MtM (arXiv 2407.14668,
section 3). Each says what is hidden (``offline.masking``)."""

SPIKES = "spikes"
ALONE = 0.5
"""Share of training samples that are shown of the spikes only what a linear decoder makes of them.
That means the same of every animal: what is learned of it is of use for the next one, and a few
trials are not learned by heart (``docs/decisions/0029``)."""
AHEAD = "ahead"
"""Output: log-rates of each bin's spikes, read from what the bin before it knew."""
NEXT = "next"
"""The same a bin earlier: log-rates of the spikes of the bin after each."""


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attention = Attention(config.dim, config.heads)
        self.norm2 = nn.LayerNorm(config.dim)
        self.widen = nn.Linear(config.dim, config.widen * config.dim)
        self.narrow = nn.Linear(config.widen * config.dim, config.dim)
        self.dropout = Dropout(config.dropout)

    def add(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.dropout(attended)
        return x + self.dropout(self.narrow(nnf.gelu(self.widen(self.norm2(x)))))

    def feed(self, x: Tensor, mixed: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """All that follows what attention mixed; and its norm, for what follows the layer."""
        if passes.pay(self, x):
            p = self.dropout.p
            x, normed = passes.added_and_normed(x, mixed, self.attention.out, p, self.norm2)
            wide = passes.gelu(normed, self.widen)
            return passes.added_and_normed(x, wide, self.narrow, p, norm)
        x = self.add(x, self.attention.out(mixed))
        return x, norm(x)


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
        self.linear = LinearDecoder(features, behaviours) if config.linear and behaviours else None


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
    memory_BMD : tensor
        What :class:`Memory` holds after the last bin.
    """

    next_bin: int
    ring: Ring
    counts_BHN: Tensor
    memory_BMD: Tensor


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
        said = sum(map(numbers_said, behaviours))
        self.linear_in = nn.Linear(said, dim) if config.linear and behaviours else None
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
        self.token_dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.memory = Memory(dim, config.memory) if config.memory else None
        self.norm = nn.LayerNorm(dim)
        self.next = nn.Linear(dim, dim)
        self._table = rotary_table(range(1), dim // config.heads)

    def parts(self, session: str) -> SessionParts:
        """Read-ins and read-outs of a session."""
        return cast(SessionParts, self.sessions[self.session_ids.index(session)])

    def stack(self) -> list[Layer]:
        """The layers, first to last."""
        return cast(list[Layer], list(self.layers))

    def norms(self) -> list[nn.LayerNorm]:
        """That before each layer, and that after the last: the memory's, or before the read-out."""
        last = self.norm if self.memory is None else self.memory.norm
        return [*(layer.norm1 for layer in self.stack()), last]

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
        fits: tuple[Tensor, Tensor, Tensor] | None = None,
        wanted: Sequence[str] | None = None,
    ) -> dict[str, Tensor]:
        """Outputs of every bin of a sequence.

        Parameters
        ----------
        session : str
            Session id.
        counts_BTN : tensor of float32
            Spike counts; those of bins that are not observed are ignored. It may begin earlier than
            the rest: what it has more only feeds running sums.
        values_BTM : tensor of float32
            Behaviours: normalised values, or class numbers; column 0 (spikes) is ignored.
        observed_BTM : tensor of bool
            What the network is shown; everything else is hidden and may be asked for.
        scheme_B : tensor of int64
            Index into ``SCHEMES``.
        missing_BTN : tensor of bool, optional
            Units to replace by their learned stand-in; broadcasts over bins.
        fits : (tensor, tensor, tensor), optional
            Linear decoders to hear instead of the session's own: see ``LinearDecoder``.
        wanted : sequence of str, optional
            Modalities to read out; all by default. ``"ahead"`` reads each bin's spikes from the
            token of the bin before it, ``"next"`` those of the bin after it from its own.

        Returns
        -------
        dict of str to tensor, shape (B, T, numbers of that output)
        """
        wanted = self.modalities if wanted is None else tuple(wanted)
        if not wanted:
            return {}
        causal = self.config.attention == "causal"
        assert causal or AHEAD not in wanted, "full attention has no earlier"
        past = counts_BTN.shape[1] - observed_BTM.shape[1]
        if not observed_BTM[:, :, 0].all():
            shown_BT1 = nnf.pad(observed_BTM[:, :, :1], (0, 0, past, 0), value=True)
            counts_BTN = torch.where(shown_BT1, counts_BTN, 0.0)
        z_BTF, said_BTU = self._features(session, counts_BTN, observed_BTM, missing_BTN, fits, past)
        x_BTMD, seen_BTM = self._tokens(
            session, z_BTF, said_BTU, values_BTM, observed_BTM, scheme_B
        )
        askers = {name: self._asker(name) for name in wanted}
        readers = sorted(set(askers.values()))
        table_2TF = self._rotary(x_BTMD.shape[1]).to(x_BTMD.device)
        everyone, norms = list(range(x_BTMD.shape[2])), self.norms()
        x_BTMD, normed_BTMD = self._first(x_BTMD, norms[0])
        for n, layer in enumerate(self.stack()):
            asking = everyone if n + 1 < self.config.layers else readers
            mixed = layer.attention.sequence(
                normed_BTMD,
                table_2TF,
                seen_BTM,
                asking,
                self.config.context,
                causal,
            )
            if asking != everyone:
                x_BTMD = x_BTMD[:, :, asking]
            x_BTMD, normed_BTMD = layer.feed(x_BTMD, mixed, norms[n + 1])
        if self.memory is not None:
            seen_BTM = seen_BTM[:, :, readers]
            near_BTM = in_sight(seen_BTM, self.config.context)
            memory_BTMD = self.memory.sequence(normed_BTMD, seen_BTM, near_BTM)
            normed_BTMD = self._last(x_BTMD, memory_BTMD, self.memory.out)
        tokens = {name: readers.index(token) for name, token in askers.items()}
        return self._read_out(session, normed_BTMD, said_BTU, observed_BTM, tokens)

    def _asker(self, name: str) -> int:
        """Which token of a bin an output is read from."""
        apart = self.config.tokens == "modality" and name not in (AHEAD, NEXT)
        return self.modalities.index(name) if apart else 0

    def _features(
        self,
        session: str,
        counts_BTN: Tensor,
        observed_BTM: Tensor,
        missing_BTN: Tensor | None,
        fits: tuple[Tensor, Tensor, Tensor] | None,
        past: int,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Features of the spikes, and what a linear decoder makes of them; None if none is shown.

        The first ``past`` bins of the counts only feed boxcars.
        """
        if not observed_BTM[:, :, 0].any():
            return None, None
        parts = self.parts(session)
        z_BTF = parts.spikes_in.standardise(counts_BTN, missing_BTN)[:, past:]
        if parts.linear is None:
            return z_BTF, None
        return z_BTF, parts.linear(z_BTF, fits)

    def _tokens(
        self,
        session: str,
        z_BTF: Tensor | None,
        said_BTU: Tensor | None,
        values_BTM: Tensor,
        observed_BTM: Tensor,
        scheme_B: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Tokens of each bin, and which of them serve as keys."""
        apart = self.config.tokens == "modality"
        any_M = observed_BTM.any(dim=1).any(dim=0).tolist()
        all_M = observed_BTM.all(dim=1).all(dim=0).tolist()
        session_D = self.session_XD[self.session_ids.index(session)]
        about_B1D = session_D + self.scheme_XD[scheme_B][:, None]
        tokens, sum_BTD = [], self.hidden_D + about_B1D
        for m in range(len(self.modalities)):
            token = hidden_D = self.hidden_D + self.modality_MD[m]
            if any_M[m]:
                token = self._token(m, session, z_BTF, said_BTU, values_BTM) + self.modality_MD[m]
            if any_M[m] and not all_M[m]:
                dark = hidden_D if apart else 0.0
                token = torch.where(observed_BTM[:, :, m, None], token, dark)
            if apart:
                tokens.append((token + about_B1D).expand(*observed_BTM.shape[:2], -1))
            elif any_M[m]:
                sum_BTD = sum_BTD + token
        if apart:
            x_BTMD, seen_BTM = torch.stack(tokens, dim=2), torch.ones_like(observed_BTM)
        else:
            x_BTMD = sum_BTD.expand(*observed_BTM.shape[:2], -1).unsqueeze(2)
            seen_BTM = observed_BTM.any(2, keepdim=True)
        return x_BTMD, seen_BTM

    def _first(self, x_BTMD: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """What the first layer begins with: tokens, and their norm."""
        if passes.pay(self, x_BTMD):
            return passes.dropped_and_normed(x_BTMD, self.token_dropout.p, norm)
        x_BTMD = self.token_dropout(x_BTMD)
        return x_BTMD, norm(x_BTMD)

    def _last(self, x_BTMD: Tensor, memory_BTMD: Tensor, out: nn.Linear) -> Tensor:
        """What is read out, normed."""
        if passes.pay(self, x_BTMD):
            p = self.token_dropout.p
            return passes.added_and_normed(x_BTMD, memory_BTMD, out, p, self.norm)[1]
        return self.norm(x_BTMD + self.token_dropout(out(memory_BTMD)))

    def _token(
        self,
        m: int,
        session: str,
        z_BTF: Tensor | None,
        said_BTU: Tensor | None,
        values_BTM: Tensor,
    ) -> Tensor:
        """What modality ``m`` of each bin reads in as, shape (B, T, D)."""
        name, parts = self.modalities[m], self.parts(session)
        if m == 0:
            assert z_BTF is not None, "spikes are shown"
            if self.linear_in is None:
                return self.spikes_shared(self._squashed(parts, z_BTF))
            token = self.linear_in(said_BTU)
            if not self.training:
                return self.spikes_shared(self._squashed(parts, z_BTF)) + token
            heard = (torch.rand(len(token)) >= ALONE).nonzero()[:, 0].to(token.device)
            squashed = self._squashed(parts, z_BTF[heard])
            more = nnf.linear(squashed, self.spikes_shared.weight)
            token = token + self.spikes_shared.bias
            return token.index_add(0, heard, more.to(token.dtype))
        if name in self.categorical_in:
            return self.categorical_in[name](values_BTM[:, :, m])
        return parts.behaviour_in[name](values_BTM[:, :, m])

    def _squashed(self, parts: SessionParts, z_BTF: Tensor) -> Tensor:
        if passes.pay(self, z_BTF):
            return passes.softsign(z_BTF, parts.spikes_in.linear)
        return nnf.softsign(parts.spikes_in(z_BTF))

    def _rotary(self, bins: int) -> Tensor:
        if self._table.shape[1] < bins:
            self._table = rotary_table(range(bins), self.config.dim // self.config.heads)
        return self._table[:, :bins]

    def _read_out(
        self,
        session: str,
        normed_BTMD: Tensor,
        said_BTU: Tensor | None,
        observed_BTM: Tensor,
        token_of: Mapping[str, int],
    ) -> dict[str, Tensor]:
        """Each wanted output, from the token that asks for it."""
        parts, outputs, tokens = self.parts(session), {}, normed_BTMD.unbind(2)
        for name, token in token_of.items():
            x_BTD = tokens[token]
            if name == NEXT:
                outputs[name] = parts.spikes_out(self.next(x_BTD))
            elif name == AHEAD:
                before_BTD = nnf.pad(self.next(x_BTD)[:, :-1], (0, 0, 1, 0))
                outputs[name] = parts.spikes_out(before_BTD)
            else:
                head = parts.spikes_out if name == SPIKES else parts.behaviour_out[name]
                outputs[name] = head(x_BTD)
                if parts.linear is not None and said_BTU is not None and name != SPIKES:
                    more_BTC = parts.linear.read_out(name, said_BTU)
                    outputs[name] += torch.where(observed_BTM[:, :, :1], more_BTC, 0.0)
        return outputs

    # -- one bin, or a few, at a time ------------------------------------------------------------

    def start(
        self,
        session: str,
        *,
        batch: int = 1,
        first_bin: int = 0,
        chunk: int = 1,
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
        """
        config = self.config
        if config.attention != "causal" or config.tokens != "bin":
            raise ValueError(
                'a stream needs attention = "causal" and tokens = "bin"; '
                f"this model has {config.attention!r} and {config.tokens!r}"
            )
        rows = config.context + chunk - 1
        shape = (batch, config.heads, rows, 1, config.dim // config.heads)
        units = self.parts(session).units
        return StreamState(
            next_bin=first_bin,
            ring=Ring.empty(config.layers, shape, self.hidden_D),
            counts_BHN=self.hidden_D.new_zeros(batch, max(config.history) - 1, units),
            memory_BMD=self.hidden_D.new_zeros(batch, 1, config.dim),
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
        assert AHEAD not in wanted, "a step knows no bin before its own"
        counts_BTN = torch.where(observed_BTM[:, :, :1], counts_BTN, 0.0)
        past = state.counts_BHN.shape[1]
        with_past = torch.cat([state.counts_BHN, counts_BTN], dim=1)
        z_BTF, said_BTU = self._features(session, with_past, observed_BTM, missing_BTN, None, past)
        x_BTMD, seen_BTM = self._tokens(
            session, z_BTF, said_BTU, values_BTM, observed_BTM, scheme_B
        )
        state.counts_BHN = with_past[:, with_past.shape[1] - past :]

        ring, T = state.ring, x_BTMD.shape[1]
        assert len(ring.bin_R) - self.config.context + 1 >= T, "more bins than the state's chunk"
        bins = range(state.next_bin, state.next_bin + T)
        bins_T = torch.arange(bins.start, bins.stop, device=x_BTMD.device)
        rows_T = bins_T % len(ring.bin_R)
        ring.bin_R[rows_T] = bins_T
        ring.seen_BRM[:, rows_T] = seen_BTM
        band_TR = visible(bins_T, ring.bin_R, self.config.context, causal=True)
        allowed_BTMP = (band_TR[None, :, :, None] & ring.seen_BRM[:, None]).flatten(2)[:, :, None]
        table_2TF = rotary_table(bins, self.config.dim // self.config.heads).to(x_BTMD.device)
        norms = self.norms()
        normed_BTMD = norms[0](x_BTMD)
        for layer, norm, keys, values in zip(
            self.stack(), norms[1:], ring.keys, ring.values, strict=True
        ):
            q, k, v = layer.attention.project(normed_BTMD, table_2TF, [0], [0])
            keys[:, :, rows_T] = k
            values[:, :, rows_T] = v
            mixed = layer.attention.attend(q, keys, values, allowed_BTMP)
            x_BTMD, normed_BTMD = layer.feed(x_BTMD, mixed, norm)
        if self.memory is not None:
            near_BTM = allowed_BTMP.any(dim=3)
            memory_BTMD = self.memory.sequence(normed_BTMD, seen_BTM, near_BTM, state.memory_BMD)
            state.memory_BMD = memory_BTMD[:, -1]
            normed_BTMD = self.norm(x_BTMD + self.memory.out(memory_BTMD))
        state.next_bin += T
        return self._read_out(
            session, normed_BTMD, said_BTU, observed_BTM, dict.fromkeys(wanted, 0)
        )
