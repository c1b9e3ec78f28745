/* Tokens in parts, each in a thread of its own.
 *
 * The threads are those of the OpenMP runtime that is in the process: PyTorch's, which its products have just used. A
 * runtime of our own would compete with them for the cores. Without one, parts run one after another.
 */

#ifndef LDMOLE_PARTS_H
#define LDMOLE_PARTS_H

#include <stdint.h>

#define PART_MULTIPLE 32 /* tokens: a cache line of flags, two of floats */
#define SMALLEST_PART 128

typedef void (*PartBody)(void *call, int64_t part, int64_t from, int64_t to);

typedef struct {
    PartBody body;
    void *call;
    int64_t count, tokens;
} Parts;

#ifdef __linux__
extern void GOMP_parallel(void (*)(void *), void *, unsigned, unsigned) __attribute__((weak));
extern int omp_get_thread_num(void) __attribute__((weak));
extern int omp_get_num_threads(void) __attribute__((weak));
#define HAS_OPENMP (GOMP_parallel && omp_get_thread_num && omp_get_num_threads)
#endif

/* In how many parts to compute so many tokens; at least one. */
static inline int64_t parts_of(int64_t tokens, int64_t threads) {
    const int64_t most = (tokens + SMALLEST_PART - 1) / SMALLEST_PART;
    const int64_t parts = threads < most ? threads : most;
    return parts > 1 ? parts : 1;
}

static inline void run_part(const Parts *parts, int64_t part) {
    const int64_t multiples = (parts->tokens + PART_MULTIPLE - 1) / PART_MULTIPLE;
    const int64_t size = (multiples + parts->count - 1) / parts->count * PART_MULTIPLE;
    const int64_t from = part * size < parts->tokens ? part * size : parts->tokens;
    const int64_t to = from + size < parts->tokens ? from + size : parts->tokens;
    parts->body(parts->call, part, from, to);
}

#ifdef HAS_OPENMP
/* There may be fewer threads than were asked for. */
static inline void run_parts_of_thread(void *data) {
    const Parts *parts = data;
    for (int64_t part = omp_get_thread_num(); part < parts->count; part += omp_get_num_threads()) run_part(parts, part);
}
#endif

/* `body` for each part; those of no tokens, too. All of the runtime's threads are asked for, also where some get no part:
 * a smaller team would end the others, and the next product start them anew. */
static inline void run_parts(PartBody body, void *call, int64_t count, int64_t tokens, int64_t threads) {
    Parts parts = {body, call, count, tokens};
#ifdef HAS_OPENMP
    if (count > 1 && HAS_OPENMP) {
        GOMP_parallel(run_parts_of_thread, &parts, (unsigned)threads, 0);
        return;
    }
#endif
    (void)threads;
    for (int64_t part = 0; part < count; part++) run_part(&parts, part);
}

/* Several threads may say so at once. */
static inline void set_failed(int *failed) { __atomic_store_n(failed, 1, __ATOMIC_RELAXED); }
static inline void set_flag(uint8_t *flag) { __atomic_store_n(flag, 1, __ATOMIC_RELAXED); }

/* Numbers of each part, added in the order of the parts. */
static inline void sum_parts(const double *of_parts, int64_t parts, int64_t numbers, float *sums) {
    for (int64_t i = 0; i < numbers; i++) {
        double total = 0.0;
        for (int64_t part = 0; part < parts; part++) total += of_parts[part * numbers + i];
        sums[i] = (float)total;
    }
}

#endif
