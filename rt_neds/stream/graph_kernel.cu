// One bin of each of some streams in one launch: a team of TEAM blocks has a stream.
//
// A layer takes four trips through memory, where PyTorch launches thirty kernels, and nobody waits for
// more than what he needs; weights that come next, which depend on nobody, have been fetched by then.
// Every warp of a team keeps the whole token (`x`) in registers and adds the same numbers to it in the
// same order.
//
// Follows graph_team.cu. Constants beside its own: HEADS, LAYERS, CONTEXT, WIDTHS, HISTORY (WIDTHS
// numbers), OLDEST, REMEMBERS, LONGEST, AT_ONCE (blocks on a multiprocessor). What lies where is said
// by graph_kernel.py.

#ifndef MARK  // benchmarks/gpu_stages.py takes the time there
#define MARK(stage)
#endif

constexpr int WIDTH = DIM / HEADS;   // of a head
constexpr int HALF = WIDTH / 2;      // pairs of numbers that a rotary angle turns
constexpr int ROWS = CONTEXT + 2;    // of a ring: the sink, and a row for who has no bin
constexpr int SINK = CONTEXT;
constexpr int PARTS = TEAM < HEADS ? 1 : TEAM / HEADS;    // blocks that share a head
constexpr int STRIDE = TEAM < HEADS ? TEAM : HEADS;       // to a block's next head
constexpr int OF_HEAD = pieces(WIDTH, LANES);             // numbers of a head that a lane has
constexpr int BATCH = 16;                                 // most numbers on their way at once
constexpr i64 NEVER = -(1LL << 60);
constexpr float LOWEST = -3.4e38f;

// A stream: its sizes, and the addresses of its arrays. As the table of graph_kernel.py.
struct Stream {
    i64 units, outputs, layer;      // numbers read out of behaviours; from one layer's ring to the next's
    const float *given, *counts;    // what came up: live, spikes, seen, due, cosines, sines; counts
    const float *own;               // weights of its session
    const bool *missing;
    float *ring, *keys, *values, *memory;
    i64 *bin, *bin_of_row;
    Word *words;                    // what the blocks of a team tell each other
    float *raw;
    unsigned *launch;               // its number, and how many blocks have done all of it
};

// Weights of one layer, in the order they lie in.
constexpr i64 NORM1 = 0, QKV = NORM1 + 2 * DIM, QKV_BIAS = QKV + 3 * DIM * DIM,
              OUT = QKV_BIAS + 3 * DIM, OUT_BIAS = OUT + DIM * DIM, NORM2 = OUT_BIAS + DIM,
              WIDEN = NORM2 + 2 * DIM, WIDEN_BIAS = WIDEN + HIDDEN * DIM,
              NARROW = WIDEN_BIAS + HIDDEN, NARROW_BIAS = NARROW + DIM * HIDDEN,
              LAYER = NARROW_BIAS + DIM;
// Of the trunk: what makes a token, the layers, the memory, the last norm.
constexpr i64 SHARED = 0, SHARED_BIAS = SHARED + DIM * TOKEN, FIRST_LAYER = SHARED_BIAS + DIM,
              MEMORY_NORM = FIRST_LAYER + LAYERS * LAYER,
              PACE = MEMORY_NORM + REMEMBERS * 2 * DIM, PACE_BIAS = PACE + REMEMBERS * 2 * DIM * DIM,
              RECALL = PACE_BIAS + REMEMBERS * 2 * DIM, RECALL_BIAS = RECALL + REMEMBERS * DIM * DIM,
              LAST_NORM = RECALL_BIAS + REMEMBERS * DIM;
// Words of a layer: queries, keys and values, what heads make of it, the wide, what is added.
constexpr int HEADED = 0, MIXED = 3 * DIM, WIDE = MIXED + HEADS * DIM, ADDED = WIDE + HIDDEN,
              OF_LAYER = ADDED + DIM;
// Words of a stream; features come last, for there are as many as the session has.
constexpr int READ = 0, BEGIN = READ + TOKEN, FIRST = BEGIN + DIM,
              MEMORY = FIRST + LAYERS * OF_LAYER, RECALLED = MEMORY + DIM, FEATURES_AT = RECALLED + DIM;

struct Shared {
    float keys[ROWS][WIDTH + 1], values[ROWS][WIDTH + 1];
    float query[WIDTH], scores[ROWS], part[WARPS][WIDTH], weight[WARPS];
    float heard[2][WIDEST];  // whoever is slow still reads what was heard before
    float given[3 + WIDTH];  // whether spikes, anything, a bin; cosines, sines
    float hidden[ROWS], in_sight;
    float features[1];  // as many as there are
};

// ---- attention -----------------------------------------------------------------------------------

// Keys and values of a head, but for those of this bin.
__device__ void fetch_ring(Shared &s, const Stream &t, int layer, int head, int row,
                           const Place &at) {
    constexpr int COUNT = (CONTEXT + 1) * WIDTH, ALL = pieces(COUNT, THREADS);
    constexpr int SOME = ALL < BATCH ? ALL : BATCH;
    const float *keys = t.keys + layer * t.layer + (i64)head * ROWS * WIDTH;
    const float *values = t.values + layer * t.layer + (i64)head * ROWS * WIDTH;
    for (int first = at.thread; first < COUNT; first += SOME * THREADS) {
        float found[2][SOME];
#pragma unroll
        for (int e = 0; e < SOME; e++) {
            const int n = first + e * THREADS;
            found[0][e] = n < COUNT ? keys[n] : 0.0f;
            found[1][e] = n < COUNT ? values[n] : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < SOME; e++) {
            const int n = first + e * THREADS, r = n / WIDTH, f = n % WIDTH;
            if (n < COUNT && r != row) s.keys[r][f] = found[0][e], s.values[r][f] = found[1][e];
        }
    }
}

// Mix the values of a head.
__device__ void attend(Shared &s, float (&mixed)[OF_HEAD], const Word *words, int head, int row,
                       const Place &at) {
    hear<pieces(3 * WIDTH, THREADS)>(
        3 * WIDTH, at,
        [&](int n) { return words + HEADED + n / WIDTH * DIM + head * WIDTH + n % WIDTH; },
        [&](int n, float number) {
            const int which = n / WIDTH, f = n % WIDTH;
            (which == 0 ? s.query : which == 1 ? s.keys[row] : s.values[row])[f] = number;
        });
    __syncthreads();
    for (int r = at.thread; r < CONTEXT + 1; r += THREADS) {
        float score = 0.0f;
#pragma unroll 8
        for (int f = 0; f < WIDTH; f++) score += s.query[f] * s.keys[r][f];
        s.scores[r] = s.hidden[r] ? LOWEST : score;
    }
    __syncthreads();
    float most = LOWEST, weights = 0.0f, sums[OF_HEAD] = {};
    for (int r = at.lane; r < CONTEXT + 1; r += LANES) most = fmaxf(most, s.scores[r]);
    most = max_of_lanes(most);
#pragma unroll 4
    for (int r = at.warp; r < CONTEXT + 1; r += WARPS) {
        const float weight = expf(s.scores[r] - most);
        weights += weight;
#pragma unroll
        for (int e = 0; e < OF_HEAD; e++) {
            const int f = e * LANES + at.lane;
            if (f < WIDTH) sums[e] += weight * s.values[r][f];
        }
    }
#pragma unroll
    for (int e = 0; e < OF_HEAD; e++) {
        const int f = e * LANES + at.lane;
        if (f < WIDTH) s.part[at.warp][f] = sums[e];
    }
    if (at.lane == 0) s.weight[at.warp] = weights;
    __syncthreads();
    float all = 0.0f;
#pragma unroll
    for (int w = 0; w < WARPS; w++) all += s.weight[w];
#pragma unroll
    for (int e = 0; e < OF_HEAD; e++) {
        const int f = e * LANES + at.lane;
        float sum = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += f < WIDTH ? s.part[w][f] : 0.0f;
        mixed[e] = sum / all;
    }
}

// A head is mixed by each of its blocks, each of which makes some of the outputs of it.
__device__ void attention(Shared &s, const Stream &t, const float *own, Word *words, int layer,
                          int row, const Place &at) {
    constexpr int SOME = WARPS * PARTS, COUNT = pieces(DIM, SOME);
    const int first = (at.rank % PARTS) * WARPS + at.warp;
    for (int head = at.rank / PARTS; head < HEADS; head += STRIDE) {
        float out[COUNT][OF_HEAD], mixed[OF_HEAD];
#pragma unroll
        for (int m = 0; m < COUNT; m++)
            if (first + m * SOME < DIM)
                fetch<WIDTH>(out[m], own + OUT + (i64)(first + m * SOME) * DIM + head * WIDTH, at);
        fetch_ring(s, t, layer, head, row, at);
        MARK(RING_FETCHED);
        attend(s, mixed, words, head, row, at);
        MARK(ATTENDED);
#pragma unroll
        for (int m = 0; m < COUNT; m++) {
            const int d = first + m * SOME;
            if (d >= DIM) continue;
            const float sum = dot(out[m], mixed);
            if (at.lane == 0) tell(words + MIXED + head * DIM + d, sum, at);
        }
        __syncthreads();
    }
}

// ---- a step --------------------------------------------------------------------------------------

using Qkv = Mine<3 * DIM / 2, DIM, 2>;  // a row and that of half a head later: turned together
using FromRead = Mine<DIM, TOKEN>;

struct Step {
    Shared &s;
    const Stream t;
    const float *trunk;
    const Place at;
    const i64 bin;
    const int features, numbers;  // of the session's units; read out
    Heard heard;
    float spikes, seen, due;
    int row;                      // of the ring
    float x[EACH], cosines[Qkv::COUNT], sines[Qkv::COUNT];
    const Word *more;             // what is added to x next

    __device__ Step(Shared &s, const Stream &t, const float *trunk, const Place &at)
        : s(s), t(t), trunk(trunk), at(at), bin(*t.bin), features(WIDTHS * t.units),
          numbers(t.outputs + t.units), heard{s.heard, 0}, x{}, more(t.words + BEGIN) {}

    __device__ void hear_and_norm(const Norm &norm, float (&normed)[EACH]) {
        float added[EACH];
        hear_all<DIM>(added, heard, more, at);
#pragma unroll
        for (int e = 0; e < EACH; e++) x[e] += added[e];
        norm.of(x, normed, at);
    }

    // -- the token ---------------------------------------------------------------------------------

    __device__ void token() {
        const float *dark = t.own, *of_spikes = dark + DIM, *standard = of_spikes + DIM;
        const int unit = at.rank * THREADS + at.thread;
        const float now = unit < t.units ? t.counts[unit] : 0.0f;
        float without[FromRead::COUNT], with_spikes[FromRead::COUNT];  // of this warp's rows
#pragma unroll
        for (int m = 0; m < FromRead::COUNT; m++) {
            const int d = at.worker + m * WORKERS;
            without[m] = d < DIM ? dark[d] + t.given[d] : 0.0f;
            with_spikes[m] = d < DIM ? of_spikes[d] : 0.0f;
        }
        for (int i = at.thread; i < 3 + WIDTH; i += THREADS) s.given[i] = t.given[DIM + i];
        if (at.thread == 0) s.in_sight = 0.0f;
        __syncthreads();
        spikes = s.given[0], seen = s.given[1], due = s.given[2];
        row = due > 0 ? bin % CONTEXT : CONTEXT + 1;
        MARK(GIVEN);
        find_features(standard, now);
        look_back();
        turn();
        MARK(FEATURES);
        read_in(standard + 3 * features);
        MARK(READ_IN);
        const FromRead shared(trunk + SHARED, trunk + SHARED_BIAS, at);
        float in[pieces(TOKEN, LANES)];
        hear_all<TOKEN>(in, heard, t.words + READ, at);
        shared.of(in, at, [&](int m, int d, const float *token) {
            tell(t.words + BEGIN + d, without[m] + spikes * (*token + with_spikes[m]), at);
        });
        MARK(TOKEN_TOLD);
    }

    // Counts into the ring of counts, and their boxcar sums as standardised roots.
    __device__ void find_features(const float *standard, float now) {
        constexpr int widths[WIDTHS] = {HISTORY}, stride = TEAM * THREADS;
        const int N = t.units, newest = bin % OLDEST;
        for (int n = at.rank * THREADS + at.thread; n < N; n += stride) {
            float sums[WIDTHS] = {}, means[WIDTHS], deviations[WIDTHS], instead[WIDTHS];
            const bool missing = t.missing[n];
#pragma unroll
            for (int k = 0; k < WIDTHS; k++) {
                means[k] = standard[k * N + n];
                deviations[k] = standard[(WIDTHS + k) * N + n];
                instead[k] = standard[(2 * WIDTHS + k) * N + n];
            }
#pragma unroll 32
            for (int age = 0; age < OLDEST; age++) {
                const int row = newest < age ? newest - age + OLDEST : newest - age;
                const float count = age ? t.ring[(i64)row * N + n] : now;
#pragma unroll
                for (int k = 0; k < WIDTHS; k++)
                    if (age < widths[k]) sums[k] += count;
            }
#pragma unroll
            for (int k = 0; k < WIDTHS; k++) {
                const float z = (sqrtf(sums[k]) - means[k]) / deviations[k];
                tell(t.words + FEATURES_AT + k * N + n, missing ? instead[k] : z, at);
            }
            if (due > 0) t.ring[(i64)newest * N + n] = now;
            if (n + stride < N) now = t.counts[n + stride];
        }
    }

    // Who may be looked at; the row of this bin is told of by one block, for later.
    __device__ void look_back() {
        for (int r = at.thread; r < ROWS; r += THREADS) {
            const i64 of = r == row ? (seen > 0 ? bin : NEVER) : t.bin_of_row[r];
            s.hidden[r] = r != SINK && (r > SINK || bin - of >= CONTEXT);
            if (r < SINK && !s.hidden[r]) s.in_sight = 1.0f;
            if (r == row && at.rank == 0) t.bin_of_row[r] = of;
        }
    }

    // What turns the queries and keys of this warp, and scales the scores.
    __device__ void turn() {
#pragma unroll
        for (int m = 0; m < Qkv::COUNT; m++) {
            const int pair = at.worker + m * WORKERS, which = pair / (DIM / 2);
            const int f = pair % (DIM / 2) % HALF;
            const float scale = which ? 1.0f : rsqrtf((float)WIDTH);
            cosines[m] = which < 2 ? scale * s.given[3 + f] : 1.0f;
            sines[m] = which < 2 ? scale * s.given[3 + HALF + f] : 0.0f;
        }
    }

    // A token to be, and what a linear decoder says; the first weights come before the features.
    __device__ void read_in(const float *read) {
        const float *bias = read + (i64)TOKEN * features;
        float weights[BATCH];
        const auto fetch_some = [&](int e, int from) {
#pragma unroll
            for (int w = 0; w < BATCH; w++) {
                const int i = from + w * LANES;
                weights[w] = e < TOKEN && i < features ? read[(i64)e * features + i] : 0.0f;
            }
        };
        fetch_some(at.worker, at.lane);
        hear<8>(
            features, at, [&](int i) { return t.words + FEATURES_AT + i; },
            [&](int i, float z) { s.features[i] = z; });
        __syncthreads();
        for (int e = at.worker; e < TOKEN; e += WORKERS) {
            float sum = 0.0f;
            for (int from = at.lane; from < features; from += BATCH * LANES) {
                if (e != at.worker || from != at.lane) fetch_some(e, from);
#pragma unroll
                for (int w = 0; w < BATCH; w++) {
                    const int i = from + w * LANES;
                    sum += weights[w] * (i < features ? s.features[i] : 0.0f);
                }
            }
            sum = sum_of_lanes(sum) + bias[e];
            if (at.lane == 0)
                tell(t.words + READ + e, e < DIM ? sum / (1.0f + fabsf(sum)) : sum, at);
        }
    }

    // -- a layer -----------------------------------------------------------------------------------

    __device__ void layer(int n) {
        const float *own = trunk + FIRST_LAYER + n * LAYER;
        Word *words = t.words + FIRST + n * OF_LAYER;
        MARK(LAYER_BEGINS);
        query(n, own, words);
        MARK(QUERIED);
        attention(s, t, own, words, n, row, at);
        MARK(MIXED_TOLD);
        float normed[EACH];
        {
            const Mine<HIDDEN, DIM> widen(own + WIDEN, own + WIDEN_BIAS, at);
            const Norm norm(own + NORM2, at);
            hear_heads(words, own + OUT_BIAS);
            norm.of(x, normed, at);
            widen.of(normed, at, [&](int, int g, const float *wide) {
                tell(words + WIDE + g, 0.5f * *wide * (1.0f + erff(*wide * 0.70710678f)), at);
            });
        }
        MARK(WIDENED);
        const Mine<DIM, HIDDEN> narrow(own + NARROW, own + NARROW_BIAS, at);
        float wide[pieces(HIDDEN, LANES)];
        hear_all<HIDDEN>(wide, heard, words + WIDE, at);
        narrow.of(wide, at, [&](int, int d, const float *sum) {
            tell(words + ADDED + d, *sum, at);
        });
        more = words + ADDED;
        MARK(NARROWED);
    }

    // Queries, keys and values.
    __device__ void query(int n, const float *own, Word *words) {
        const Qkv qkv(own + QKV, own + QKV_BIAS, at);
        float normed[EACH];
        hear_and_norm(Norm(own + NORM1, at), normed);
        qkv.of(normed, at, [&](int m, int pair, const float *sums) {
            const int which = pair / (DIM / 2), of = pair % (DIM / 2), headed = of / HALF;
            const float a = sums[0] * cosines[m] - sums[1] * sines[m];
            const float b = sums[1] * cosines[m] + sums[0] * sines[m];
            const int f = of % HALF, first = which * DIM + headed * WIDTH + f;
            tell(words + HEADED + first, a, at);
            tell(words + HEADED + first + HALF, b, at);
            if (which == 0) return;
            float *ring = (which == 1 ? t.keys : t.values) + n * t.layer;
            ring[((i64)headed * ROWS + row) * WIDTH + f] = a;
            ring[((i64)headed * ROWS + row) * WIDTH + f + HALF] = b;
        });
    }

    // What all heads made of it, summed once for the block.
    __device__ void hear_heads(const Word *words, const float *bias) {
        float *sums = heard.next(), added[EACH];
        for (int d = at.thread; d < DIM; d += THREADS) {
            Word found[HEADS];
            bool missing;
            float sum = bias[d];
            do {
                missing = false;
#pragma unroll
                for (int h = 0; h < HEADS; h++) found[h] = look_at(words + MIXED + h * DIM + d);
#pragma unroll
                for (int h = 0; h < HEADS; h++) missing |= is_missing(found[h], at);
            } while (missing);
#pragma unroll
            for (int h = 0; h < HEADS; h++) sum += number_in(found[h]);
            sums[d] = sum;
        }
        __syncthreads();
        fetch<DIM>(added, sums, at);
#pragma unroll
        for (int e = 0; e < EACH; e++) x[e] += added[e];
    }

    // -- what comes of it --------------------------------------------------------------------------

    // Move memories on, and read them; in the dark they forget.
    __device__ void remember() {
        {
            const Mine<DIM, DIM, 2> pace(trunk + PACE, trunk + PACE_BIAS, at);
            float normed[EACH];
            hear_and_norm(Norm(trunk + MEMORY_NORM, at), normed);
            pace.of(normed, at, [&](int, int d, const float *sums) {
                const float by = 1.0f - LONGEST / (1.0f + expf(-sums[0]));
                const float before = s.in_sight > 0 || due == 0 ? t.memory[d] : 0.0f;
                const float now = before + (sums[1] - before) * (by * seen * due);
                t.memory[d] = now;
                tell(t.words + MEMORY + d, now, at);
            });
        }
        const Mine<DIM, DIM> recall(trunk + RECALL, trunk + RECALL_BIAS, at);
        float memory[EACH];
        hear_all<DIM>(memory, heard, t.words + MEMORY, at);
        recall.of(memory, at, [&](int, int d, const float *sum) {
            tell(t.words + RECALLED + d, *sum, at);
        });
        more = t.words + RECALLED;
    }

    // The numbers of behaviours, and log-rates of the next bin's spikes.
    __device__ void read_out() {
        const float *head = t.own + 2 * DIM + 3 * features + (i64)TOKEN * features + TOKEN,
                    *head_bias = head + (i64)numbers * DIM, *said = head_bias + numbers,
                    *said_bias = said + t.outputs * SAID;
        const Norm norm(trunk + LAST_NORM, at);
        float weights[EACH], normed[EACH], bias = 0.0f;
        if (at.worker < numbers) {
            fetch<DIM>(weights, head + (i64)at.worker * DIM, at);
            bias = head_bias[at.worker];
        }
        hear_and_norm(norm, normed);
        for (int o = at.worker; o < numbers; o += WORKERS) {
            if (o != at.worker) {
                fetch<DIM>(weights, head + (i64)o * DIM, at);
                bias = head_bias[o];
            }
            float sum = dot(weights, normed) + bias;
            if (at.lane > 0) continue;
            if (SAID && o < t.outputs) {
                float more = said_bias[o];
                for (int u = 0; u < SAID; u++)  // heard before
                    more += said[o * SAID + u] * number_in(look_at(t.words + READ + DIM + u));
                sum += spikes * more;
            }
            t.raw[o] = sum;
        }
    }

    // The last block to be done moves on: none looks any more at what bin or launch it is.
    __device__ void leave() {
        __syncthreads();
        if (at.thread == 0 && add_and_fetch(t.launch + 1) == TEAM) {
            t.launch[0] = at.launch + 1;
            t.launch[1] = 0;
            if (due > 0) *t.bin = bin + 1;
        }
    }
};

extern "C" __device__ const int bytes_of_block = sizeof(Shared);

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE)
one_bin_of_each(const Stream *streams, const float *trunk) {
    SHARED_MEMORY(memory_of_block);
    const Stream stream = streams[blockIdx.y];
    const int thread = threadIdx.x, warp = thread / LANES, rank = blockIdx.x;
    const Place at = {rank, warp, thread % LANES, thread, rank * WARPS + warp, *stream.launch};
    Step step(*(Shared *)memory_of_block, stream, trunk, at);
    MARK(BEGUN);
    step.token();
    for (int n = 0; n < LAYERS; n++) step.layer(n);
    if (REMEMBERS) step.remember();
    step.read_out();
    MARK(READ_OUT);
    step.leave();
}
