// What graph_kernel.cu takes from a GPU, on a processor: a thread for each warp, of one lane.
//
// So all of it runs as it does on a GPU, blocks at the same time and waiting for each other, but for
// the sums over lanes.
#include <barrier>
#include <cmath>
#include <memory>
#include <sched.h>
#include <thread>
#include <vector>

#define ON_CPU
#define __device__
#define __global__
#define __launch_bounds__(...)
#define __shfl_xor_sync(mask, value, away) (value)
#define SHARED_MEMORY(name)
#define __syncthreads() block_barrier->arrive_and_wait()

struct Index {
    int x, y;
};
static thread_local Index threadIdx, blockIdx;
static thread_local std::barrier<> *block_barrier;
static thread_local float *memory_of_block;

static float rsqrtf(float v) { return 1.0f / sqrtf(v); }

typedef unsigned long long Word;

static Word look_at(const Word *word) {
    sched_yield();
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static void put(Word *word, Word what) { __atomic_store_n(word, what, __ATOMIC_RELAXED); }

static unsigned add_and_fetch(unsigned *count) { return __atomic_add_fetch(count, 1u, __ATOMIC_SEQ_CST); }

#include KERNEL

extern "C" void launch(int team, int streams, int features, const Stream *table, const float *trunk) {
    std::vector<std::thread> threads;
    std::vector<std::unique_ptr<std::barrier<>>> barriers;
    const int floats = sizeof(Shared) / sizeof(float) + features;
    std::vector<std::vector<float>> memory(team * streams, std::vector<float>(floats));
    for (int block = 0; block < team * streams; block++) {
        barriers.push_back(std::make_unique<std::barrier<>>(THREADS));
        for (int thread = 0; thread < THREADS; thread++)
            threads.emplace_back([=, barrier = barriers[block].get(), own = memory[block].data()] {
                threadIdx = {thread, 0}, blockIdx = {block % team, block / team};
                block_barrier = barrier, memory_of_block = own;
                one_bin_of_each(table, trunk);
            });
    }
    for (auto &thread : threads) thread.join();
}
