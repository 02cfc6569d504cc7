// One bin of each of some streams in one launch.
//
// A stream has a team of TEAM blocks, all of which are on the device at once and wait for each other
// at a barrier in memory: four times in a layer, where PyTorch launches thirty kernels. Whoever waits
// has fetched the weights that come next beforehand, since those depend on nobody.
//
// A row of a linear map belongs to one warp, whose lanes take every 32nd input, whatever the size of
// the team: the same stream gives the same bits alone and beside others. Every block of a team keeps
// the whole token (`x`) in shared memory and adds the same numbers to it in the same order.
//
// Sizes are constants, defined before this text: DIM, HEADS, LAYERS, CONTEXT, HIDDEN, SAID, WIDTHS,
// HISTORY (WIDTHS numbers), OLDEST, REMEMBERS, LONGEST, TEAM, WARPS, LANES. What lies where is said by
// graph_kernel.py. NVRTC compiles it, without headers; a test compiles it for the processor, where it
// brings its own of the few things that only a GPU has.

typedef long long i64;

#ifndef ON_CPU
#define SHARED_MEMORY(type, name) \
    extern __shared__ char memory_of_block[]; \
    type *name = (type *)memory_of_block

// What other blocks wrote before the last barrier: not from this processor's own cache.
__device__ float newest(const float *from) { return __ldcg(from); }

__device__ unsigned add_and_fetch(unsigned *count) { return atomicAdd(count, 1u) + 1u; }

__device__ void arrive_and_wait(unsigned *arrived, unsigned goal) {
    unsigned now;
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(arrived) : "memory");
    do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(arrived) : "memory");
    while (now < goal);
}
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

// A stream: its sizes, and the addresses of its arrays. As STREAM in graph_kernel.py.
struct Stream {
    i64 units, outputs, layer;      // numbers read out of behaviours; from one layer's ring to the next's
    const float *given, *counts;    // what came up: live, spikes, seen, due, cosines, sines; counts
    const float *own;               // weights of its session
    const bool *missing;
    float *ring, *keys, *values, *memory;
    i64 *bin, *bin_of_row;
    float *between;                 // what the blocks of a team tell each other
    float *raw;
    unsigned *barrier;
};

// Of one layer, in the order they lie in.
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
// Between the blocks of a team: features come last, for there are as many as the session has.
constexpr int READ = 0, QUERY = READ + TOKEN, MIXED = QUERY + DIM, WIDE = MIXED + HEADS * DIM,
              DELTA = WIDE + HIDDEN, FEATURES = DELTA + DIM;

struct Shared {
    float x[DIM], in[WIDEST];
    float keys[ROWS][WIDTH + 1], values[ROWS][WIDTH + 1];
    float query[WIDTH], scores[ROWS], part[WARPS][WIDTH], weight[WARPS], mixed[WIDTH];
    bool hidden[ROWS], in_sight;
};

struct Place {  // of this thread
    int rank, warp, lane, thread, worker;
};

// ---- what the lanes of a warp do together, and the blocks of a team ------------------------------

__device__ float sum_of_lanes(float v) {
    for (int away = LANES / 2; away; away /= 2) v += __shfl_xor_sync(~0u, v, away);
    return v;
}

__device__ float max_of_lanes(float v) {
    for (int away = LANES / 2; away; away /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, away));
    return v;
}

struct Barrier {
    unsigned *arrived, goal;

    // All blocks of the team have come, and see what the others wrote before it.
    __device__ void wait(const Place &at) {
        goal += TEAM;
        __syncthreads();
        if (at.thread == 0) arrive_and_wait(arrived, goal);
        __syncthreads();
    }

    // The last to leave leaves it as it was.
    __device__ void leave(const Place &at) {
        __syncthreads();
        if (at.thread == 0 && add_and_fetch(arrived + 1) == TEAM) arrived[0] = arrived[1] = 0;
    }
};

// ---- linear maps ---------------------------------------------------------------------------------

// The rows of a map that one warp answers for, in registers; PER rows make an item.
template <int ITEMS, int INPUTS, int PER = 1>
struct Mine {
    static constexpr int COUNT = pieces(ITEMS, WORKERS), EACH = pieces(INPUTS, LANES);
    float weights[COUNT][PER][EACH];

    __device__ void fetch(const float *map, const Place &at) {
#pragma unroll
        for (int m = 0; m < COUNT; m++)
#pragma unroll
            for (int r = 0; r < PER; r++)
#pragma unroll
                for (int e = 0; e < EACH; e++) {
                    const int item = at.worker + m * WORKERS, i = e * LANES + at.lane;
                    const bool there = item < ITEMS && i < INPUTS;
                    weights[m][r][e] = there ? map[(i64)(item * PER + r) * INPUTS + i] : 0.0f;
                }
    }

    __device__ float dot(int m, int r, const float *in, const Place &at) const {
        float sum = 0.0f;
#pragma unroll
        for (int e = 0; e < EACH; e++) {
            const int i = e * LANES + at.lane;
            sum += weights[m][r][e] * (i < INPUTS ? in[i] : 0.0f);
        }
        return sum_of_lanes(sum);
    }
};

// The token plus what others found (`extra(d)`), and its norm, for all threads of the block.
template <class Extra>
__device__ void add_and_norm(Shared &s, const float *norm, const Place &at, Extra extra) {
    for (int d = at.thread; d < DIM; d += THREADS) s.x[d] += extra(d);
    __syncthreads();
    float mean = 0.0f, square = 0.0f;
    for (int d = at.lane; d < DIM; d += LANES) mean += s.x[d];
    mean = sum_of_lanes(mean) / DIM;
    for (int d = at.lane; d < DIM; d += LANES) square += (s.x[d] - mean) * (s.x[d] - mean);
    const float scale = 1.0f / sqrtf(sum_of_lanes(square) / DIM + 1e-5f);
    for (int d = at.thread; d < DIM; d += THREADS)
        s.in[d] = (s.x[d] - mean) * scale * norm[d] + norm[DIM + d];
    __syncthreads();
}

__device__ void take(float *in, const float *from, int n, const Place &at) {
    for (int i = at.thread; i < n; i += THREADS) in[i] = newest(from + i);
    __syncthreads();
}

// ---- attention -----------------------------------------------------------------------------------

// Keys and values of a head but for those of this bin, which nobody may have written yet.
__device__ void fetch_ring(Shared &s, const Stream &t, int layer, int head, const Place &at) {
    const i64 from = layer * t.layer + (i64)head * ROWS * WIDTH;
    for (int n = at.thread; n < (CONTEXT + 1) * WIDTH; n += THREADS) {
        s.keys[n / WIDTH][n % WIDTH] = newest(t.keys + from + n);
        s.values[n / WIDTH][n % WIDTH] = newest(t.values + from + n);
    }
}

// Mix the values of a head: `mixed` is there for all threads of the block.
__device__ void attend(Shared &s, const Stream &t, int layer, int head, int row, const Place &at) {
    const i64 from = layer * t.layer + ((i64)head * ROWS + row) * WIDTH;
    for (int f = at.thread; f < WIDTH; f += THREADS) {
        s.keys[row][f] = newest(t.keys + from + f);
        s.values[row][f] = newest(t.values + from + f);
        s.query[f] = newest(t.between + QUERY + head * WIDTH + f);
    }
    __syncthreads();
    for (int r = at.thread; r < CONTEXT + 1; r += THREADS) {
        float score = 0.0f;
        for (int f = 0; f < WIDTH; f++) score += s.query[f] * s.keys[r][f];
        s.scores[r] = s.hidden[r] ? LOWEST : score;
    }
    __syncthreads();
    float most = LOWEST, weights = 0.0f;
    for (int r = at.lane; r < CONTEXT + 1; r += LANES) most = fmaxf(most, s.scores[r]);
    most = max_of_lanes(most);
    float sums[pieces(WIDTH, LANES)] = {};
    for (int r = at.warp; r < CONTEXT + 1; r += WARPS) {
        const float weight = expf(s.scores[r] - most);
        weights += weight;
#pragma unroll
        for (int e = 0; e < pieces(WIDTH, LANES); e++) {
            const int f = e * LANES + at.lane;
            if (f < WIDTH) sums[e] += weight * s.values[r][f];
        }
    }
#pragma unroll
    for (int e = 0; e < pieces(WIDTH, LANES); e++) {
        const int f = e * LANES + at.lane;
        if (f < WIDTH) s.part[at.warp][f] = sums[e];
    }
    if (at.lane == 0) s.weight[at.warp] = weights;
    __syncthreads();
    for (int f = at.thread; f < WIDTH; f += THREADS) {
        float sum = 0.0f, all = 0.0f;
        for (int w = 0; w < WARPS; w++) sum += s.part[w][f], all += s.weight[w];
        s.mixed[f] = sum / all;
    }
    __syncthreads();
}

// ---- a step --------------------------------------------------------------------------------------

// Counts into the ring of counts, and their boxcar sums as standardised roots.
__device__ void find_features(const Stream &t, const float *standard, i64 bin, bool due,
                              const Place &at) {
    constexpr int widths[WIDTHS] = {HISTORY};
    const int N = t.units;
    for (int n = at.rank * THREADS + at.thread; n < N; n += TEAM * THREADS) {
        float sums[WIDTHS] = {}, now = t.counts[n];
        for (int age = 0; age < OLDEST; age++) {
            const i64 row = ((bin - age) % OLDEST + OLDEST) % OLDEST;
            const float count = age ? t.ring[row * N + n] : now;
#pragma unroll
            for (int k = 0; k < WIDTHS; k++)
                if (age < widths[k]) sums[k] += count;
        }
        if (due) t.ring[((bin % OLDEST + OLDEST) % OLDEST) * N + n] = now;
#pragma unroll
        for (int k = 0; k < WIDTHS; k++) {  // means, then deviations, then what stands in
            const int i = k * N + n;
            const float z = (sqrtf(sums[k]) - standard[i]) / standard[WIDTHS * N + i];
            t.between[FEATURES + i] = t.missing[n] ? standard[2 * WIDTHS * N + i] : z;
        }
    }
}

// Who may be looked at; the row of this bin is told of by one block, for later.
__device__ void look(Shared &s, const Stream &t, i64 bin, int row, bool seen, const Place &at) {
    if (at.thread == 0) s.in_sight = false;
    __syncthreads();
    for (int r = at.thread; r < ROWS; r += THREADS) {
        const i64 of = r == row ? (seen ? bin : NEVER) : t.bin_of_row[r];
        s.hidden[r] = r != SINK && (r > SINK || bin - of >= CONTEXT);
        if (r < SINK && !s.hidden[r]) s.in_sight = true;
        if (r == row && at.rank == 0) t.bin_of_row[r] = of;
    }
    __syncthreads();
}

__device__ void step(Shared &s, const Stream t, const float *trunk, const Place &at) {
    const float *given = t.given, *cosines = given + DIM + 3, *sines = cosines + HALF;
    const float spikes = given[DIM], seen = given[DIM + 1], due = given[DIM + 2];
    const int F = WIDTHS * t.units, O = t.outputs + t.units;
    const float *dark = t.own, *of_spikes = dark + DIM, *standard = of_spikes + DIM,
                *read = standard + 3 * F, *read_bias = read + (i64)TOKEN * F,
                *head = read_bias + TOKEN, *head_bias = head + (i64)O * DIM,
                *said = head_bias + O, *said_bias = said + t.outputs * SAID;
    const i64 bin = *t.bin;
    const int row = due > 0 ? bin % CONTEXT : CONTEXT + 1;
    Barrier barrier = {t.barrier, 0};

    find_features(t, standard, bin, due > 0, at);
    look(s, t, bin, row, seen > 0, at);
    for (int d = at.thread; d < DIM; d += THREADS) s.x[d] = 0.0f;
    barrier.wait(at);

    for (int e = at.worker; e < TOKEN; e += WORKERS) {
        float sum = 0.0f;
#pragma unroll 8
        for (int i = at.lane; i < F; i += LANES)
            sum += read[(i64)e * F + i] * newest(t.between + FEATURES + i);
        sum = sum_of_lanes(sum) + read_bias[e];
        if (at.lane == 0) t.between[READ + e] = e < DIM ? sum / (1.0f + fabsf(sum)) : sum;
    }
    Mine<DIM, TOKEN> shared;
    shared.fetch(trunk + SHARED, at);
    barrier.wait(at);

    take(s.in, t.between + READ, TOKEN, at);
#pragma unroll
    for (int m = 0; m < shared.COUNT; m++) {
        const int d = at.worker + m * WORKERS;
        const float token = shared.dot(m, 0, s.in, at);
        if (d < DIM && at.lane == 0)
            t.between[DELTA + d] = dark[d] + given[d] +
                                   spikes * (token + trunk[SHARED_BIAS + d] + of_spikes[d]);
    }

    for (int layer = 0; layer < LAYERS; layer++) {
        const float *own = trunk + FIRST_LAYER + layer * LAYER;
        // Queries, keys and values: a row and that of half a head later, which are turned together.
        Mine<3 * DIM / 2, DIM, 2> qkv;
        qkv.fetch(own + QKV, at);
        barrier.wait(at);
        add_and_norm(s, own + NORM1, at, [&](int d) { return newest(t.between + DELTA + d); });
#pragma unroll
        for (int m = 0; m < qkv.COUNT; m++) {
            const int pair = at.worker + m * WORKERS, of = pair % (DIM / 2), f = of % HALF;
            const int which = pair / (DIM / 2), headed = of / HALF;
            float a = qkv.dot(m, 0, s.in, at), b = qkv.dot(m, 1, s.in, at);
            if (which > 2 || at.lane > 0) continue;
            a += own[QKV_BIAS + 2 * pair], b += own[QKV_BIAS + 2 * pair + 1];
            const float c = which < 2 ? cosines[f] : 1.0f, sine = which < 2 ? sines[f] : 0.0f;
            const float scale = which ? 1.0f : rsqrtf((float)WIDTH);
            float *to = which == 0 ? t.between + QUERY + headed * WIDTH
                                   : (which == 1 ? t.keys : t.values) + layer * t.layer +
                                         ((i64)headed * ROWS + row) * WIDTH;
            to[f] = (a * c - b * sine) * scale;
            to[f + HALF] = (b * c + a * sine) * scale;
        }

        // A head is mixed by each of its blocks, each of which makes some of the outputs of it.
        constexpr int SOME = WARPS * PARTS, COUNT = pieces(DIM, SOME), EACH = pieces(WIDTH, LANES);
        int headed = at.rank / PARTS;
        if (headed < HEADS) fetch_ring(s, t, layer, headed, at);
        barrier.wait(at);
        for (; headed < HEADS; headed += STRIDE) {
            float out[COUNT][EACH];
#pragma unroll
            for (int m = 0; m < COUNT; m++)
#pragma unroll
                for (int e = 0; e < EACH; e++) {
                    const int f = e * LANES + at.lane;
                    const int d = (at.rank % PARTS) * WARPS + at.warp + m * SOME;
                    const bool there = d < DIM && f < WIDTH;
                    out[m][e] = there ? own[OUT + (i64)d * DIM + headed * WIDTH + f] : 0.0f;
                }
            if (headed != at.rank / PARTS) {
                __syncthreads();
                fetch_ring(s, t, layer, headed, at);
                __syncthreads();
            }
            attend(s, t, layer, headed, row, at);
#pragma unroll
            for (int m = 0; m < COUNT; m++) {
                const int d = (at.rank % PARTS) * WARPS + at.warp + m * SOME;
                float sum = 0.0f;
#pragma unroll
                for (int e = 0; e < EACH; e++) {
                    const int f = e * LANES + at.lane;
                    if (f < WIDTH) sum += out[m][e] * s.mixed[f];
                }
                sum = sum_of_lanes(sum);
                if (d < DIM && at.lane == 0) t.between[MIXED + headed * DIM + d] = sum;
            }
        }

        Mine<HIDDEN, DIM> widen;
        widen.fetch(own + WIDEN, at);
        barrier.wait(at);
        add_and_norm(s, own + NORM2, at, [&](int d) {
            float sum = own[OUT_BIAS + d];
#pragma unroll
            for (int h = 0; h < HEADS; h++) sum += newest(t.between + MIXED + h * DIM + d);
            return sum;
        });
#pragma unroll
        for (int m = 0; m < widen.COUNT; m++) {
            const int g = at.worker + m * WORKERS;
            const float sum = widen.dot(m, 0, s.in, at);
            if (g >= HIDDEN || at.lane > 0) continue;
            const float wide = sum + own[WIDEN_BIAS + g];
            t.between[WIDE + g] = 0.5f * wide * (1.0f + erff(wide * 0.70710678118654752f));
        }

        Mine<DIM, HIDDEN> narrow;
        narrow.fetch(own + NARROW, at);
        barrier.wait(at);
        take(s.in, t.between + WIDE, HIDDEN, at);
#pragma unroll
        for (int m = 0; m < narrow.COUNT; m++) {
            const int d = at.worker + m * WORKERS;
            const float sum = narrow.dot(m, 0, s.in, at);
            if (d < DIM && at.lane == 0) t.between[DELTA + d] = sum + own[NARROW_BIAS + d];
        }
    }

    if (REMEMBERS) {
        barrier.wait(at);
        add_and_norm(s, trunk + MEMORY_NORM, at,
                     [&](int d) { return newest(t.between + DELTA + d); });
        for (int d = at.worker; d < DIM; d += WORKERS) {
            float gate = 0.0f, value = 0.0f;
            for (int i = at.lane; i < DIM; i += LANES) {
                gate += trunk[PACE + (i64)(2 * d) * DIM + i] * s.in[i];
                value += trunk[PACE + (i64)(2 * d + 1) * DIM + i] * s.in[i];
            }
            gate = sum_of_lanes(gate) + trunk[PACE_BIAS + 2 * d];
            value = sum_of_lanes(value) + trunk[PACE_BIAS + 2 * d + 1];
            const float pace = 1.0f - LONGEST / (1.0f + expf(-gate));
            if (at.lane > 0) continue;
            const float before = s.in_sight || due == 0 ? t.memory[d] : 0.0f;
            t.memory[d] = before + (value - before) * (pace * seen * due);
        }
        barrier.wait(at);
        take(s.in, t.memory, DIM, at);
        for (int d = at.worker; d < DIM; d += WORKERS) {
            float sum = 0.0f;
            for (int i = at.lane; i < DIM; i += LANES) sum += trunk[RECALL + (i64)d * DIM + i] * s.in[i];
            sum = sum_of_lanes(sum);
            if (at.lane == 0) t.between[DELTA + d] = sum + trunk[RECALL_BIAS + d];
        }
    }
    barrier.wait(at);
    add_and_norm(s, trunk + LAST_NORM, at, [&](int d) { return newest(t.between + DELTA + d); });
    for (int o = at.worker; o < O; o += WORKERS) {
        float sum = 0.0f;
#pragma unroll 8
        for (int i = at.lane; i < DIM; i += LANES) sum += head[(i64)o * DIM + i] * s.in[i];
        sum = sum_of_lanes(sum) + head_bias[o];
        if (at.lane > 0) continue;
        if (SAID && o < t.outputs) {
            float more = said_bias[o];
            for (int u = 0; u < SAID; u++)
                more += said[o * SAID + u] * newest(t.between + READ + DIM + u);
            sum += spikes * more;
        }
        t.raw[o] = sum;
    }
    if (at.rank == 0 && at.thread == 0 && due > 0) *t.bin = bin + 1;
    barrier.leave(at);
}

extern "C" __device__ const int bytes_of_block = sizeof(Shared);

extern "C" __global__ void __launch_bounds__(THREADS, 2)
one_bin_of_each(const Stream *streams, const float *trunk) {
    SHARED_MEMORY(Shared, shared);
    const int thread = threadIdx.x, warp = thread / LANES, rank = blockIdx.x;
    const Place at = {rank, warp, thread % LANES, thread, rank * WARPS + warp};
    step(*shared, streams[blockIdx.y], trunk, at);
}
