/* Pieces of messages from one process to another, in order, through memory that both have mapped.
 *
 * A mailbox has a header and two slots behind it. The sender copies a piece into the slot that is free and counts it;
 * the receiver copies it out and counts that. Each word is written by one side only, and the other may sleep on it.
 * Neither needs the other to be there at the same moment: a piece waits in its slot.
 */

#define _GNU_SOURCE
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define SLOTS 2
#define HEADER 4096     /* bytes: slots begin at a page */
#define OWN_HEADER 1024 /* of which the rest is the callers' */
#define SPIN_NS 30000   /* about what going to sleep and being woken costs */

enum { DONE = 0, NOT_YET = 1, ANOTHER = 2 };

/* To which message a piece belongs: both ends must mean the same one. */
typedef struct {
    int64_t exchange, message_bytes, bytes;
} Label;

typedef struct {
    _Alignas(64) atomic_uint filled; /* pieces put in, modulo 2^32 */
    Label labels[SLOTS];
    _Alignas(64) atomic_uint taken; /* pieces taken out */
} Mailbox;

_Static_assert(sizeof(atomic_uint) == 4, "a futex is a word of four bytes");
_Static_assert(sizeof(Mailbox) <= OWN_HEADER, "the callers' part of the header");

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static int64_t now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Whether the word has left this value within the time. */
static int has_left(atomic_uint *word, unsigned value, int64_t wait_ns) {
    if (atomic_load_explicit(word, memory_order_acquire) != value)
        return 1;
    const int64_t begin = now_ns(), spin = wait_ns < SPIN_NS ? wait_ns : SPIN_NS;
    for (int64_t now = begin; now - begin < wait_ns; now = now_ns()) {
        if (now - begin < spin) {
            for (int i = 0; i < 16; i++)
                relax();
        } else {
            const int64_t left = wait_ns - (now - begin);
            const struct timespec rest = {left / 1000000000, left % 1000000000};
            /* Returns at once if the word has changed meanwhile; early for a signal. */
            syscall(SYS_futex, word, FUTEX_WAIT, value, &rest, NULL, 0);
        }
        if (atomic_load_explicit(word, memory_order_acquire) != value)
            return 1;
    }
    return 0;
}

static void count(atomic_uint *word, unsigned value) {
    atomic_store_explicit(word, value, memory_order_release);
    syscall(SYS_futex, word, FUTEX_WAKE, 1, NULL, NULL, 0);
}

static char *slot_of(Mailbox *box, unsigned piece, int64_t slot_bytes) {
    return (char *)box + HEADER + piece % SLOTS * slot_bytes;
}

/* Put a piece in. NOT_YET: both slots were full all the time; ANOTHER: it is larger than a slot. */
int mailbox_put(Mailbox *box, const void *data, int64_t exchange, int64_t message_bytes, int64_t bytes,
                int64_t slot_bytes, int64_t wait_ns) {
    const unsigned piece = atomic_load_explicit(&box->filled, memory_order_relaxed);
    if (bytes > slot_bytes)
        return ANOTHER;
    if (!has_left(&box->taken, piece - SLOTS, wait_ns))
        return NOT_YET;
    memcpy(slot_of(box, piece, slot_bytes), data, bytes);
    box->labels[piece % SLOTS] = (Label){exchange, message_bytes, bytes};
    count(&box->filled, piece + 1);
    return DONE;
}

/* Take the next piece out. NOT_YET: there was none all the time; ANOTHER: it is of another message, or not of so many
 * bytes. */
int mailbox_take(Mailbox *box, void *data, int64_t exchange, int64_t message_bytes, int64_t bytes, int64_t slot_bytes,
                 int64_t wait_ns) {
    const unsigned piece = atomic_load_explicit(&box->taken, memory_order_relaxed);
    if (!has_left(&box->filled, piece, wait_ns))
        return NOT_YET;
    const Label *label = &box->labels[piece % SLOTS];
    if (label->exchange != exchange || label->message_bytes != message_bytes || label->bytes != bytes)
        return ANOTHER;
    memcpy(data, slot_of(box, piece, slot_bytes), bytes);
    count(&box->taken, piece + 1);
    return DONE;
}
