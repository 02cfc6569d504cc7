// What the blocks of a team do together: tell each other numbers, and share the rows of linear maps.
//
// All blocks of a team are on the device at once. What one of them finds it tells the others in words
// of eight bytes, a number and the launch it is of: who needs it looks until it is of this launch. A
// word is written once in a launch, so none can be missed, and there is nothing else to wait for.
//
// A row of a map belongs to one warp, whose lanes take every LANES-th input, whatever the size of the
// team: the same stream gives the same bits alone and beside others.
//
// Sizes are constants, defined before this text: DIM, HIDDEN, SAID, TEAM, WARPS, LANES, and those of
// graph_kernel.cu, which follows it. NVRTC compiles both, without headers; a test compiles them for
// the processor, where it brings its own of the few things that only a GPU has.

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

__device__ constexpr int pieces(int n, int of) { return (n + of - 1) / of; }

constexpr int THREADS = WARPS * LANES;
constexpr int WORKERS = TEAM * WARPS;
constexpr int TOKEN = DIM + SAID;    // what is read of the spikes: a token to be, what is said
constexpr int WIDEST = HIDDEN > TOKEN ? HIDDEN : TOKEN;
constexpr int EACH = pieces(DIM, LANES);  // numbers of a token that a lane has

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

union Bits {
    float number;
    unsigned bits;
};

__device__ void tell(Word *word, float number, const Place &at) {
    Bits as;
    as.number = number;
    put(word, (Word)at.launch << 32 | as.bits);
}

__device__ bool is_missing(Word found, const Place &at) {
    return (unsigned)(found >> 32) != at.launch;
}

__device__ float number_in(Word found) {
    Bits as;
    as.bits = (unsigned)found;
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

// Where a block puts what it heard, by turns: whoever is slow still reads what was heard before.
struct Heard {
    float (*both)[WIDEST];
    int turn;

    __device__ float *next() { return both[turn ^= 1]; }
};

// Numbers that all warps of a block need.
template <int COUNT, int N>
__device__ void hear_all(float (&into)[N], Heard &heard, const Word *words, const Place &at) {
    float *to = heard.next();
    hear<pieces(COUNT, THREADS)>(
        COUNT, at, [&](int i) { return words + i; }, [&](int i, float v) { to[i] = v; });
    __syncthreads();
    fetch<COUNT>(into, to, at);
}

// ---- linear maps and norms -----------------------------------------------------------------------

__device__ float sum_of_lanes(float v) {
    for (int away = LANES / 2; away; away /= 2) v += __shfl_xor_sync(~0u, v, away);
    return v;
}

__device__ float max_of_lanes(float v) {
    for (int away = LANES / 2; away; away /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, away));
    return v;
}

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
