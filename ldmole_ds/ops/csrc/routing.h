/* All of an input group's routing on a CPU: ldmole_ds/ops/routing_kernel.py in C, with the same steps. See routing.c. */

#ifndef LDMOLE_ROUTING_H
#define LDMOLE_ROUTING_H

#include <stdint.h>

/* What routing reads. Arrays are contiguous, with the tokens innermost. */
typedef struct {
    const float *logits;        /* (G, E, T) */
    const float *lambda_logits; /* (T) */
    const uint8_t *mask;        /* (T), or NULL */
    int64_t tokens, experts, members, target;
    int mask_padding;
} Routing;

/* Where tokens go: see Routing.destinations in routing_spec.py. */
typedef struct {
    uint8_t *destinations; /* (ep_size + 1, T), or NULL */
    int64_t ep_size, own_rank;
} Plan;

/* Rows of scratch memory for the largest logits: none where the target is no limit, and so no loss. */
static inline int64_t top_rows(const Routing *r) { return r->target < r->experts ? r->target + 1 : 0; }

/* Columns of the sums over tokens, which a projection has. */
static inline int64_t sum_columns(const Routing *r) { return 2 * r->experts + 3; }

/* Of the tokens `from` to `to`. probs (G, E, T) and lambdas (T) are written, totals (G, 2 E + 3) added to.
 * Both return 0, or 1 when memory is short. */
int route(const Routing *r, int64_t from, int64_t to, float *probs, float *lambdas, double *totals, const Plan *plan);

/* The same tokens backward. grad_probs (G, E, T) and grad_sums (G, 2 E + 3) may be NULL. */
int route_backward(const Routing *r, int64_t from, int64_t to, const float *grad_probs, const float *grad_sums,
                   float *grad_logits, float *grad_lambda_logits);

#endif
