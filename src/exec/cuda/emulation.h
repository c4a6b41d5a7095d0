// What of CUDA the kernels use, for a C++ compiler: a launch runs block after block, and in a block
// every thread is a coroutine that gives way where its warp exchanges values. Threads that reach no
// such point run to their end at once.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <ucontext.h>
#include <vector>

#define EMULATED
#define __device__
#define __global__

struct dim3_t { unsigned x, y, z; };
static dim3_t blockIdx, blockDim, gridDim, threadIdx;

struct Args;

namespace emulation {
struct Thread {
    ucontext_t context;
    std::vector<char> stack;
    bool done;
    float given;
};
static std::vector<Thread> threads;
static ucontext_t scheduler;
static void (*kernel)(Args);
static const Args *arguments;
static unsigned current;
static bool exchanges;
void run_current();
static void begin() {
    run_current();
    threads[current].done = true;
    swapcontext(&threads[current].context, &scheduler);
}
}

// Every thread of the block gives its value, then every one takes another's.
static inline float __shfl_xor_sync(unsigned, float value, int lane) {
    using namespace emulation;
    unsigned self = current;
    if (!exchanges) abort();
    threads[self].given = value;
    swapcontext(&threads[self].context, &scheduler);
    float other = threads[self ^ (unsigned)lane].given;
    swapcontext(&threads[self].context, &scheduler);
    return other;
}

// kernels.cu follows; then this, which the tests call.
#define EMULATED_LAUNCH                                                                           \
    namespace emulation {                                                                         \
    void run_current() { kernel(*arguments); }                                                    \
    }                                                                                             \
    extern "C" void launch(void (*k)(Args), const Args *args, unsigned grid, unsigned block,      \
                           int warps) {                                                           \
        using namespace emulation;                                                                \
        kernel = k;                                                                               \
        arguments = args;                                                                         \
        exchanges = warps;                                                                        \
        gridDim = {grid, 1, 1};                                                                   \
        blockDim = {block, 1, 1};                                                                 \
        if (warps && threads.size() < block) threads.resize(block);                               \
        for (unsigned b = 0; b < grid; b++) {                                                     \
            blockIdx = {b, 0, 0};                                                                 \
            if (!warps) {                                                                         \
                for (unsigned t = 0; t < block; t++) {                                            \
                    threadIdx = {t, 0, 0};                                                        \
                    k(*args);                                                                     \
                }                                                                                 \
                continue;                                                                         \
            }                                                                                     \
            for (unsigned t = 0; t < block; t++) {                                                \
                Thread &thread = threads[t];                                                      \
                thread.done = false;                                                              \
                thread.stack.resize(64 << 10);                                                    \
                getcontext(&thread.context);                                                      \
                thread.context.uc_stack.ss_sp = thread.stack.data();                              \
                thread.context.uc_stack.ss_size = thread.stack.size();                            \
                thread.context.uc_link = 0;                                                       \
                makecontext(&thread.context, begin, 0);                                           \
            }                                                                                     \
            for (bool left = true; left;) {                                                       \
                left = false;                                                                     \
                for (unsigned t = 0; t < block; t++) {                                            \
                    if (threads[t].done) continue;                                                \
                    left = true;                                                                  \
                    current = t;                                                                  \
                    threadIdx = {t, 0, 0};                                                        \
                    swapcontext(&scheduler, &threads[t].context);                                 \
                }                                                                                 \
            }                                                                                     \
        }                                                                                         \
    }
