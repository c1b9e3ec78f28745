/* A block of tokens, as routing looks at it: what both directions compute (routing.c).
 *
 * Each expert's logits of a block lie side by side, and every inner loop runs over its tokens, so that the compiler makes
 * vector instructions of it.
 */

#ifndef LDMOLE_BLOCK_H
#define LDMOLE_BLOCK_H

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "routing.h"

#define BLOCK 32
#define LOWEST_Z -1e30f  /* so that no sum of them overflows */
#define LAMBDA_EPS 0.01f /* lambda = logsigmoid(.) + 1 - eps, as LAMBDA_TOP in routing_spec.py */
#define EACH_TOKEN for (int t = 0; t < BLOCK; t++)

typedef float Row[BLOCK];

/* What is known of the tokens of a block. Flags are 1 and 0 as floats, which mix with floats without conversions. */
typedef struct {
    int64_t from;
    int size;       /* tokens of this block; the others count as padding */
    Row logit;      /* of lambda */
    Row lambda, slack;
    Row inside, real, routed, lambda_is_good;
} Tokens;

/* One projection's routing of a block. */
typedef struct {
    Row *z;         /* (E): logits less their maximum; 0 for tokens without a number */
    Row largest, good;
    Row tau, k, mean;
} Member;

static inline float largest_of(float a, float b) { return a > b ? a : b; }

/* exp for x <= 0, to the last bit or two; no branch, so that loops over it become vector instructions. */
static inline float exp_of(float x) {
    x = x < -87.0f ? -87.0f : x;
    const float shifter = 12582912.0f; /* 1.5 * 2^23: adding it rounds to whole numbers */
    const float n = (x * 1.44269504f + shifter) - shifter;
    const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    union { int32_t bits; float value; } power;
    power.bits = ((int32_t)n + 127) << 23;
    return p * power.value;
}

static void load_tokens(Tokens *b, const Routing *r, int64_t from, int64_t to) {
    b->from = from;
    b->size = to - from < BLOCK ? (int)(to - from) : BLOCK;
    EACH_TOKEN {
        const int inside = t < b->size;
        const float a = inside ? r->lambda_logits[from + t] : 0.0f;
        const float log_sigmoid = (a > 0 ? 0.0f : a) - log1pf(expf(-fabsf(a)));
        b->logit[t] = a;
        b->lambda[t] = log_sigmoid + (1.0f - LAMBDA_EPS);
        b->slack[t] = LAMBDA_EPS - log_sigmoid; /* 1 - lambda, without cancellation */
        b->inside[t] = inside;
        b->real[t] = inside && (r->mask == NULL || r->mask[from + t] != 0);
        b->routed[t] = r->mask_padding ? b->real[t] : b->inside[t];
        b->lambda_is_good[t] = b->slack[t] > 0 && b->slack[t] < INFINITY;
    }
}

/* Logits of a projection, and Sparsegen's support: the experts with z above tau, and the largest (z = 0) in any case. */
static void load_member(Member *m, const Tokens *b, const Routing *r, int64_t member) {
    const int64_t experts = r->experts;
    const float *logits = r->logits + member * experts * r->tokens + b->from;
    EACH_TOKEN { m->largest[t] = -INFINITY; m->good[t] = b->inside[t] * b->lambda_is_good[t]; }
    for (int64_t e = 0; e < experts; e++) {
        float *z = m->z[e];
        memset(z, 0, sizeof(Row));
        memcpy(z, logits + e * r->tokens, b->size * sizeof(float));
        EACH_TOKEN {
            m->good[t] = fabsf(z[t]) < INFINITY ? m->good[t] : 0.0f;
            m->largest[t] = largest_of(m->largest[t], z[t]);
        }
    }
    EACH_TOKEN m->largest[t] = m->good[t] > 0 ? m->largest[t] : 0.0f;
    Row slack;
    EACH_TOKEN slack[t] = m->good[t] > 0 ? b->slack[t] : 1.0f;
    for (int64_t e = 0; e < experts; e++) {
        float *z = m->z[e];
        EACH_TOKEN z[t] = m->good[t] > 0 ? largest_of(z[t] - m->largest[t], LOWEST_Z) : 0.0f;
    }

    /* Michelot's iteration. tau never falls, so the support only shrinks, and this ends after at most E rounds. */
    Row total;
    EACH_TOKEN { m->tau[t] = -INFINITY; m->k[t] = 0.0f; }
    for (int changed = 1; changed;) {
        Row k;
        EACH_TOKEN { total[t] = 0.0f; k[t] = 0.0f; }
        for (int64_t e = 0; e < experts; e++) {
            const float *z = m->z[e];
            EACH_TOKEN {
                const float in = (z[t] > m->tau[t]) | (z[t] >= 0) ? 1.0f : 0.0f;
                total[t] += in * z[t];
                k[t] += in;
            }
        }
        changed = 0;
        EACH_TOKEN {
            changed |= k[t] != m->k[t];
            m->k[t] = k[t];
            m->tau[t] = largest_of((total[t] - slack[t]) / k[t], m->tau[t]);
        }
    }
    EACH_TOKEN m->mean[t] = total[t] / m->k[t];
}

static inline float in_support(const Member *m, float z, int t) { return (z > m->tau[t]) | (z >= 0) ? 1.0f : 0.0f; }

/* relu(lower_k - lambda), with the `target` + 1 largest found by insertion into `top` (target + 1 rows). */
static void lambda_gap(const Member *m, const Tokens *b, int64_t experts, int64_t target, Row *top, float *gap) {
    for (int64_t i = 0; i <= target; i++) EACH_TOKEN top[i][t] = -INFINITY;
    for (int64_t e = 0; e < experts; e++) {
        Row rest;
        memcpy(rest, m->z[e], sizeof(Row));
        for (int64_t i = 0; i <= target; i++) EACH_TOKEN {
            const float kept = top[i][t], value = rest[t];
            top[i][t] = largest_of(kept, value);
            rest[t] = kept < value ? kept : value;
        }
    }
    EACH_TOKEN gap[t] = 0.0f;
    for (int64_t i = 0; i < target; i++) EACH_TOKEN gap[t] += top[i][t];
    EACH_TOKEN {
        const float lower = 1.0f - (gap[t] - (float)target * top[target][t]);
        gap[t] = largest_of(lower - b->lambda[t], 0.0f);
    }
}

/* Sum of exp(z), and the logarithm of that of exp(logits). */
static void log_sum_exp(const Member *m, int64_t experts, float *total, float *log_sum) {
    EACH_TOKEN total[t] = 0.0f;
    for (int64_t e = 0; e < experts; e++) {
        const float *z = m->z[e];
        EACH_TOKEN total[t] += exp_of(z[t]);
    }
    EACH_TOKEN log_sum[t] = m->largest[t] + logf(total[t]);
}

static double sum_of(const float *row) {
    float s = 0.0f;
    EACH_TOKEN s += row[t];
    return s;
}

/* `rows` of scratch memory for a block of E experts. */
static Row *scratch(int64_t rows) { return aligned_alloc(64, rows * sizeof(Row)); }

#endif
