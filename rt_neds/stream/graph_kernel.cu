// One bin of each of some streams in one launch.
//
// A stream has a team of TEAM blocks, all of which are on the device at once. What one of them finds
// it tells the others in words of eight bytes, a number and the launch it is of: who needs it looks
// until it is of this launch. So a layer takes four trips through memory, where PyTorch launches
// thirty kernels, and nobody waits for more than what he needs; weights that come next, which depend
// on nobody, have been fetched by then. A word is written once in a launch, so none can be missed.
//
// A row of a linear map belongs to one warp, whose lanes take every 32nd input, whatever the size of
// the team: the same stream gives the same bits alone and beside others. Every warp of a team keeps
// the whole token (`x`) in registers and adds the same numbers to it in the same order.
//
// Sizes are constants, defined before this text: DIM, HEADS, LAYERS, CONTEXT, HIDDEN, SAID, WIDTHS,
// HISTORY (WIDTHS numbers), OLDEST, REMEMBERS, LONGEST, TEAM, AT_ONCE (blocks on a
// multiprocessor), WARPS, LANES. What lies where is said by graph_kernel.py. NVRTC compiles it, without headers; a test compiles it for the processor, where it
// brings its own of the few things that only a GPU has.

typedef long long i64;
typedef unsigned long long Word;  // the upper half says of which launch the number in the lower is

#ifndef ON_CPU
#define SHARED_MEMORY(name) extern __shared__ float name[]

__device__ Word look_at(const Word *word) {
    Word found;
    asm volatile("ld.relaxed.gpu.global.u64 %0, [%1];" : "=l"(found) : "l"(word) : "memory");
    return found;
}

__device__ void put(Word *word, Word what) {
    asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(word), "l"(what) : "memory");
}

__device__ unsigned add_and_fetch(unsigned *count) { return atomicAdd(count, 1u) + 1u; }
#endif

constexpr int THREADS = WARPS * LANES;
constexpr int WORKERS = TEAM * WARPS;
constexpr int WIDTH = DIM / HEADS;   // of a head
constexpr int HALF = WIDTH / 2;      // pairs of numbers that a rotary angle turns
constexpr int ROWS = CONTEXT + 2;    // of a ring: the sink, and a row for who has no bin
constexpr int SINK = CONTEXT;
constexpr int TOKEN = DIM + SAID;    // what is read of the spikes: a token to be, what is said
constexpr int PARTS = TEAM < HEADS ? 1 : TEAM / HEADS;    // blocks that share a head
constexpr int STRIDE = TEAM < HEADS ? TEAM : HEADS;       // to a block's next head
constexpr i64 NEVER = -(1LL << 60);
constexpr float LOWEST = -3.4e38f;
constexpr int WIDEST = HIDDEN > TOKEN ? HIDDEN : TOKEN;

__device__ constexpr int pieces(int n, int of) { return (n + of - 1) / of; }

constexpr int EACH = pieces(DIM, LANES);         // numbers of a token that a lane has
constexpr int OF_HEAD = pieces(WIDTH, LANES);

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
              MEMORY = FIRST + LAYERS * OF_LAYER, RECALLED = MEMORY + DIM, FEATURES = RECALLED + DIM;

struct Shared {
    float keys[ROWS][WIDTH + 1], values[ROWS][WIDTH + 1];
    float query[WIDTH], scores[ROWS], part[WARPS][WIDTH], weight[WARPS];
    float heard[2][WIDEST];  // whoever is slow still reads what was heard before
    float given[3 + WIDTH];  // whether spikes, anything, a bin; cosines, sines
    float hidden[ROWS], in_sight;
    float features[1];  // as many as there are
};

struct Place {  // of this thread, and of which launch it is
    int rank, warp, lane, thread, worker;
    unsigned launch;
};

// Every LANES-th of some numbers, from this lane's first.
template <int COUNT, int N>
__device__ void fetch(float (&into)[N], const float *from, const Place &at) {
#pragma unroll
    for (int e = 0; e < N; e++) {
        const int i = e * LANES + at.lane;
        into[e] = i < COUNT ? from[i] : 0.0f;
    }
}

// ---- what warps tell each other ------------------------------------------------------------------

__device__ void tell(Word *word, float number, const Place &at) {
    union {
        float number;
        unsigned bits;
    } as = {number};
    put(word, (Word)at.launch << 32 | as.bits);
}

__device__ bool is_missing(Word found, const Place &at) {
    return (unsigned)(found >> 32) != at.launch;
}

__device__ float number_in(Word found) {
    union {
        unsigned bits;
        float number;
    } as = {(unsigned)found};
    return as.number;
}

// Words of which each thread takes every THREADS-th, N at once: looked at again until all are of this
// launch. `word(i)` is where the i-th is, `take(i, number)` what is done with it.
template <int N, class Where, class Take>
__device__ void hear(int count, const Place &at, Where word, Take take) {
    for (int first = at.thread; first < count; first += N * THREADS) {
        Word found[N];
        bool missing;
        do {
            missing = false;
#pragma unroll
            for (int e = 0; e < N; e++)
                if (first + e * THREADS < count) found[e] = look_at(word(first + e * THREADS));
#pragma unroll
            for (int e = 0; e < N; e++)
                if (first + e * THREADS < count) missing |= is_missing(found[e], at);
        } while (missing);
#pragma unroll
        for (int e = 0; e < N; e++)
            if (first + e * THREADS < count) take(first + e * THREADS, number_in(found[e]));
    }
}

// Numbers that all warps of a block need: every LANES-th of them, from this lane's first.
template <int COUNT, int N>
__device__ void hear_all(Shared &s, float (&into)[N], int &turn, const Word *words,
                         const Place &at) {
    float *heard = s.heard[turn ^= 1];
    hear<pieces(COUNT, THREADS)>(
        COUNT, at, [&](int i) { return words + i; }, [&](int i, float v) { heard[i] = v; });
    __syncthreads();
    fetch<COUNT>(into, heard, at);
}

__device__ float sum_of_lanes(float v) {
    for (int away = LANES / 2; away; away /= 2) v += __shfl_xor_sync(~0u, v, away);
    return v;
}

__device__ float max_of_lanes(float v) {
    for (int away = LANES / 2; away; away /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, away));
    return v;
}

// ---- linear maps and norms -----------------------------------------------------------------------

template <int N>
__device__ float dot(const float (&a)[N], const float (&b)[N]) {
    float sum = 0.0f;
#pragma unroll
    for (int e = 0; e < N; e++) sum += a[e] * b[e];
    return sum_of_lanes(sum);
}

// The rows of a map that one warp answers for, in registers; PER rows make an item.
template <int ITEMS, int INPUTS, int PER = 1>
struct Mine {
    static constexpr int COUNT = pieces(ITEMS, WORKERS);
    float weights[COUNT][PER][pieces(INPUTS, LANES)], biases[COUNT][PER];

    __device__ Mine(const float *map, const float *bias, const Place &at) {
#pragma unroll
        for (int m = 0; m < COUNT; m++)
#pragma unroll
            for (int r = 0; r < PER; r++) {
                const int item = at.worker + m * WORKERS, row = item * PER + r;
                if (item < ITEMS) {
                    fetch<INPUTS>(weights[m][r], map + (i64)row * INPUTS, at);
                    biases[m][r] = bias[row];
                }
            }
    }

    // `then(m, item, sums)` of each item whose warp this is, by its first lane.
    template <class Then>
    __device__ void of(const float (&in)[pieces(INPUTS, LANES)], const Place &at, Then then) const {
#pragma unroll
        for (int m = 0; m < COUNT; m++) {
            const int item = at.worker + m * WORKERS;
            if (item >= ITEMS) continue;
            float sums[PER];
#pragma unroll
            for (int r = 0; r < PER; r++) sums[r] = dot(weights[m][r], in) + biases[m][r];
            if (at.lane == 0) then(m, item, sums);
        }
    }
};

struct Norm {
    float scale[EACH], shift[EACH];

    __device__ Norm(const float *norm, const Place &at) {
        fetch<DIM>(scale, norm, at);
        fetch<DIM>(shift, norm + DIM, at);
    }

    __device__ void of(const float (&x)[EACH], float (&normed)[EACH], const Place &at) const {
        float mean = 0.0f, square = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) mean += x[e];
        mean = sum_of_lanes(mean) / DIM;
#pragma unroll
        for (int e = 0; e < EACH; e++)
            if (e * LANES + at.lane < DIM) square += (x[e] - mean) * (x[e] - mean);
        const float by = 1.0f / sqrtf(sum_of_lanes(square) / DIM + 1e-5f);
#pragma unroll
        for (int e = 0; e < EACH; e++) normed[e] = (x[e] - mean) * by * scale[e] + shift[e];
    }
};

// What is added to the token.
__device__ void hear_and_add(Shared &s, float (&x)[EACH], int &turn, const Word *words,
                             const Place &at) {
    float more[EACH];
    hear_all<DIM>(s, more, turn, words, at);
#pragma unroll
    for (int e = 0; e < EACH; e++) x[e] += more[e];
}

// ---- attention -----------------------------------------------------------------------------------

// Keys and values of a head, but for those of this bin.
__device__ void fetch_ring(Shared &s, const Stream &t, int layer, int head, int row,
                           const Place &at) {
    constexpr int COUNT = (CONTEXT + 1) * WIDTH, BATCH = 13;  // that many on their way at once
    const float *keys = t.keys + layer * t.layer + (i64)head * ROWS * WIDTH;
    const float *values = t.values + layer * t.layer + (i64)head * ROWS * WIDTH;
    for (int first = at.thread; first < COUNT; first += BATCH * THREADS) {
        float found[2][BATCH];
#pragma unroll
        for (int e = 0; e < BATCH; e++) {
            const int n = first + e * THREADS;
            found[0][e] = n < COUNT ? keys[n] : 0.0f;
            found[1][e] = n < COUNT ? values[n] : 0.0f;
        }
#pragma unroll
        for (int e = 0; e < BATCH; e++) {
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
        attend(s, mixed, words, head, row, at);
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

// What all heads made of it, summed once for the block.
__device__ void hear_heads(Shared &s, float (&x)[EACH], int &turn, const Word *words,
                           const float *bias, const Place &at) {
    float *sums = s.heard[turn ^= 1], more[EACH];
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
    fetch<DIM>(more, sums, at);
#pragma unroll
    for (int e = 0; e < EACH; e++) x[e] += more[e];
}

// ---- a step --------------------------------------------------------------------------------------

// Counts into the ring of counts, and their boxcar sums as standardised roots.
__device__ void find_features(const Stream &t, const float *standard, i64 bin, bool due,
                              float now, const Place &at) {
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
            tell(t.words + FEATURES + k * N + n, missing ? instead[k] : z, at);
        }
        if (due) t.ring[(i64)newest * N + n] = now;
        if (n + stride < N) now = t.counts[n + stride];
    }
}

// Who may be looked at; the row of this bin is told of by one block, for later.
__device__ void look_back(Shared &s, const Stream &t, i64 bin, int row, bool seen,
                          const Place &at) {
    for (int r = at.thread; r < ROWS; r += THREADS) {
        const i64 of = r == row ? (seen ? bin : NEVER) : t.bin_of_row[r];
        s.hidden[r] = r != SINK && (r > SINK || bin - of >= CONTEXT);
        if (r < SINK && !s.hidden[r]) s.in_sight = 1.0f;
        if (r == row && at.rank == 0) t.bin_of_row[r] = of;
    }
}

__device__ void step(Shared &s, const Stream t, const float *trunk, const Place &at) {
    const int F = WIDTHS * t.units, O = t.outputs + t.units;
    const float *dark = t.own, *of_spikes = dark + DIM, *standard = of_spikes + DIM,
                *read = standard + 3 * F, *read_bias = read + (i64)TOKEN * F,
                *head = read_bias + TOKEN, *head_bias = head + (i64)O * DIM,
                *said = head_bias + O, *said_bias = said + t.outputs * SAID;
    const i64 bin = *t.bin;
    int turn = 0;

    const int unit = at.rank * THREADS + at.thread;
    const float now = unit < t.units ? t.counts[unit] : 0.0f;
    using FromRead = Mine<DIM, TOKEN>;
    float without[FromRead::COUNT], with_spikes[FromRead::COUNT];  // of this warp's tokens
#pragma unroll
    for (int m = 0; m < FromRead::COUNT; m++) {
        const int d = at.worker + m * WORKERS;
        without[m] = d < DIM ? dark[d] + t.given[d] : 0.0f;
        with_spikes[m] = d < DIM ? of_spikes[d] : 0.0f;
    }
    for (int i = at.thread; i < 3 + WIDTH; i += THREADS) s.given[i] = t.given[DIM + i];
    if (at.thread == 0) s.in_sight = 0.0f;
    __syncthreads();
    const float spikes = s.given[0], seen = s.given[1], due = s.given[2];
    const int row = due > 0 ? bin % CONTEXT : CONTEXT + 1;
    find_features(t, standard, bin, due > 0, now, at);
    look_back(s, t, bin, row, seen > 0, at);

    // What turns the queries and keys of this warp, and that the scores are scaled.
    using Qkv = Mine<3 * DIM / 2, DIM, 2>;
    float cosines[Qkv::COUNT], sines[Qkv::COUNT];
#pragma unroll
    for (int m = 0; m < Qkv::COUNT; m++) {
        const int pair = at.worker + m * WORKERS, which = pair / (DIM / 2);
        const int f = pair % (DIM / 2) % HALF;
        const float scale = which ? 1.0f : rsqrtf((float)WIDTH);
        cosines[m] = which < 2 ? scale * s.given[3 + f] : 1.0f;
        sines[m] = which < 2 ? scale * s.given[3 + HALF + f] : 0.0f;
    }
    float weights[16];  // the first of those that this warp needs next
    const int first = at.worker < TOKEN ? F : 0;
#pragma unroll
    for (int e = 0; e < 16; e++) {
        const int i = e * LANES + at.lane;
        weights[e] = i < first ? read[(i64)at.worker * F + i] : 0.0f;
    }
    hear<8>(
        F, at, [&](int i) { return t.words + FEATURES + i; },
        [&](int i, float z) { s.features[i] = z; });
    __syncthreads();
    for (int e = at.worker; e < TOKEN; e += WORKERS) {
        float sum = 0.0f;
        int from = at.lane;
        if (e == at.worker) {
#pragma unroll
            for (int w = 0; w < 16; w++, from += LANES)
                sum += weights[w] * (from < F ? s.features[from] : 0.0f);
        }
        for (; from < F; from += 12 * LANES) {
            float more[12];
#pragma unroll
            for (int w = 0; w < 12; w++) {
                const int i = from + w * LANES;
                more[w] = i < F ? read[(i64)e * F + i] : 0.0f;
            }
#pragma unroll
            for (int w = 0; w < 12; w++) {
                const int i = from + w * LANES;
                sum += more[w] * (i < F ? s.features[i] : 0.0f);
            }
        }
        sum = sum_of_lanes(sum) + read_bias[e];
        if (at.lane == 0) tell(t.words + READ + e, e < DIM ? sum / (1.0f + fabsf(sum)) : sum, at);
    }
    {
        const FromRead shared(trunk + SHARED, trunk + SHARED_BIAS, at);
        float in[pieces(TOKEN, LANES)];
        hear_all<TOKEN>(s, in, turn, t.words + READ, at);
        shared.of(in, at, [&](int m, int d, const float *token) {
            tell(t.words + BEGIN + d, without[m] + spikes * (*token + with_spikes[m]), at);
        });
    }

    float x[EACH] = {}, normed[EACH];
    const Word *more = t.words + BEGIN;
    for (int layer = 0; layer < LAYERS; layer++) {
        const float *own = trunk + FIRST_LAYER + layer * LAYER;
        Word *words = t.words + FIRST + layer * OF_LAYER;
        {
            // Queries, keys, values: a row and that of half a head later, which are turned together.
            const Qkv qkv(own + QKV, own + QKV_BIAS, at);
            const Norm norm(own + NORM1, at);
            hear_and_add(s, x, turn, more, at);
            norm.of(x, normed, at);
            qkv.of(normed, at, [&](int m, int pair, const float *sums) {
                const int which = pair / (DIM / 2), of = pair % (DIM / 2), headed = of / HALF;
                const float a = sums[0] * cosines[m] - sums[1] * sines[m];
                const float b = sums[1] * cosines[m] + sums[0] * sines[m];
                const int f = of % HALF, first = which * DIM + headed * WIDTH + f;
                tell(words + HEADED + first, a, at);
                tell(words + HEADED + first + HALF, b, at);
                if (which == 0) return;
                float *ring = (which == 1 ? t.keys : t.values) + layer * t.layer;
                ring[((i64)headed * ROWS + row) * WIDTH + f] = a;
                ring[((i64)headed * ROWS + row) * WIDTH + f + HALF] = b;
            });
        }
        attention(s, t, own, words, layer, row, at);
        {
            const Mine<HIDDEN, DIM> widen(own + WIDEN, own + WIDEN_BIAS, at);
            const Norm norm(own + NORM2, at);
            hear_heads(s, x, turn, words, own + OUT_BIAS, at);
            norm.of(x, normed, at);
            widen.of(normed, at, [&](int, int g, const float *wide) {
                tell(words + WIDE + g, 0.5f * *wide * (1.0f + erff(*wide * 0.70710678f)), at);
            });
        }
        {
            const Mine<DIM, HIDDEN> narrow(own + NARROW, own + NARROW_BIAS, at);
            float wide[pieces(HIDDEN, LANES)];
            hear_all<HIDDEN>(s, wide, turn, words + WIDE, at);
            narrow.of(wide, at, [&](int, int d, const float *sum) {
                tell(words + ADDED + d, *sum, at);
            });
        }
        more = words + ADDED;
    }

    if (REMEMBERS) {
        {
            const Mine<DIM, DIM, 2> pace(trunk + PACE, trunk + PACE_BIAS, at);
            const Norm norm(trunk + MEMORY_NORM, at);
            hear_and_add(s, x, turn, more, at);
            norm.of(x, normed, at);
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
        hear_all<DIM>(s, memory, turn, t.words + MEMORY, at);
        recall.of(memory, at, [&](int, int d, const float *sum) {
            tell(t.words + RECALLED + d, *sum, at);
        });
        more = t.words + RECALLED;
    }

    const Norm norm(trunk + LAST_NORM, at);
    float row_of_head[EACH], bias = 0.0f;
    if (at.worker < O) {
        fetch<DIM>(row_of_head, head + (i64)at.worker * DIM, at);
        bias = head_bias[at.worker];
    }
    hear_and_add(s, x, turn, more, at);
    norm.of(x, normed, at);
    for (int o = at.worker; o < O; o += WORKERS) {
        if (o != at.worker) {
            fetch<DIM>(row_of_head, head + (i64)o * DIM, at);
            bias = head_bias[o];
        }
        float sum = dot(row_of_head, normed) + bias;
        if (at.lane > 0) continue;
        if (SAID && o < t.outputs) {
            float more = said_bias[o];
            for (int u = 0; u < SAID; u++)  // heard before
                more += said[o * SAID + u] * number_in(look_at(t.words + READ + DIM + u));
            sum += spikes * more;
        }
        t.raw[o] = sum;
    }
    // The last block to be done moves on: none looks any more at what bin or launch it is.
    __syncthreads();
    if (at.thread == 0 && add_and_fetch(t.launch + 1) == TEAM) {
        t.launch[0] = at.launch + 1;
        t.launch[1] = 0;
        if (due > 0) *t.bin = bin + 1;
    }
}

extern "C" __device__ const int bytes_of_block = sizeof(Shared);

extern "C" __global__ void __launch_bounds__(THREADS, AT_ONCE)
one_bin_of_each(const Stream *streams, const float *trunk) {
    SHARED_MEMORY(memory_of_block);
    const Stream stream = streams[blockIdx.y];
    const int thread = threadIdx.x, warp = thread / LANES, rank = blockIdx.x;
    const Place at = {rank, warp, thread % LANES, thread, rank * WARPS + warp, *stream.launch};
    step(*(Shared *)memory_of_block, stream, trunk, at);
}
