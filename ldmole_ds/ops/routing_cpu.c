/* All of an input group's routing on a CPU: ldmole_ds/ops/routing_kernel.py in C, with the same steps.
 *
 * Plain C without dependencies, so that any compiler builds it in a second (ldmole_ds/ops/c_library.py). BLOCK tokens go
 * through at a time; each expert's logits of a block lie side by side, and every inner loop runs over them, so that the
 * compiler makes vector instructions of it. One thread: it takes microseconds where the products beside take milliseconds.
 *
 * Arrays are contiguous: logits, probs, grad_* (G, E, T); lambdas (T); sums (G, 2 E + 3); destinations (ep_size + 1, T).
 * Pointers that may be NULL are marked. All functions return 0, or 1 when memory is short.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "routing_cpu.h"

#define BLOCK 32
#define LAMBDA_EPS 0.01f /* lambda = logsigmoid(.) + 1 - eps, as LAMBDA_TOP in routing_spec.py */
#define EACH_TOKEN for (int t = 0; t < BLOCK; t++)

typedef float Row[BLOCK];

/* What is known of the tokens of a block. Flags are 1 and 0 as floats, which mix with floats without conversions. */
typedef struct {
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

static void load_tokens(Tokens *b, const float *lambda_logits, const uint8_t *mask, int mask_padding, int64_t from, int64_t t_all) {
    b->size = t_all - from < BLOCK ? (int)(t_all - from) : BLOCK;
    EACH_TOKEN {
        const int inside = t < b->size;
        const float a = inside ? lambda_logits[from + t] : 0.0f;
        const float log_sigmoid = (a > 0 ? 0.0f : a) - log1pf(expf(-fabsf(a)));
        b->logit[t] = a;
        b->lambda[t] = log_sigmoid + (1.0f - LAMBDA_EPS);
        b->slack[t] = LAMBDA_EPS - log_sigmoid; /* 1 - lambda, without cancellation */
        b->inside[t] = inside;
        b->real[t] = inside && (mask == NULL || mask[from + t] != 0);
        b->routed[t] = mask_padding ? b->real[t] : b->inside[t];
        b->lambda_is_good[t] = b->slack[t] > 0 && b->slack[t] < INFINITY;
    }
}

/* Logits of a projection, and Sparsegen's support: the experts with z above tau, and the largest (z = 0) in any case. */
static void load_member(Member *m, const Tokens *b, const float *logits, int64_t from, int64_t t_all, int64_t experts) {
    EACH_TOKEN { m->largest[t] = -INFINITY; m->good[t] = b->inside[t] * b->lambda_is_good[t]; }
    for (int64_t e = 0; e < experts; e++) {
        float *z = m->z[e];
        memset(z, 0, sizeof(Row));
        memcpy(z, logits + e * t_all + from, b->size * sizeof(float));
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
        EACH_TOKEN z[t] = m->good[t] > 0 ? z[t] - m->largest[t] : 0.0f;
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

int routing_forward(
    const float *logits, const float *lambda_logits, const uint8_t *mask /* or NULL */, float *probs, float *lambdas,
    float *sums, uint8_t *destinations /* or NULL */, int64_t t_all, int64_t experts, int64_t members, int64_t target,
    int64_t ep_size, int64_t own_rank, int mask_padding) {
    const int64_t columns = 2 * experts + 3, sparsity = target < experts, held = experts / (ep_size > 0 ? ep_size : 1);
    Row *memory = scratch(experts + target + 2 + ep_size + 1);
    double *totals = calloc(members * columns, sizeof(double));
    if (!memory || !totals) { free(memory); free(totals); return 1; }
    Member m = {.z = memory};
    Row *top = memory + experts, *visits = top + target + 2;
    for (int64_t from = 0; from < t_all; from += BLOCK) {
        Tokens b;
        load_tokens(&b, lambda_logits, mask, mask_padding, from, t_all);
        memcpy(lambdas + from, b.lambda, b.size * sizeof(float));
        memset(visits, 0, (ep_size + 1) * sizeof(Row));
        for (int64_t g = 0; g < members; g++) {
            const int64_t first = g * experts * t_all;
            double *row = totals + g * columns;
            load_member(&m, &b, logits + first, from, t_all, experts);
            Row counted, counts, gap, total, log_sum, per_slack, per_k, broken;
            EACH_TOKEN {
                broken[t] = b.inside[t] * (1.0f - m.good[t]);
                counted[t] = b.real[t] * m.good[t];
                counts[t] = b.routed[t] * m.good[t];
                per_slack[t] = m.good[t] > 0 ? 1.0f / b.slack[t] : 0.0f;
                per_k[t] = 1.0f / m.k[t];
            }
            for (int64_t e = 0; e < experts; e++) {
                const float *z = m.z[e];
                float *visit = visits[e / held];
                Row p, active, weight;
                EACH_TOKEN {
                    const float in = in_support(&m, z[t], t);
                    p[t] = in * largest_of((z[t] - m.mean[t]) * per_slack[t] + per_k[t], 0.0f);
                    weight[t] = b.routed[t] * p[t];
                    weight[t] = b.routed[t] * broken[t] > 0 ? NAN : weight[t];
                    p[t] *= counted[t];
                    active[t] = p[t] > 0 ? 1.0f : 0.0f;
                }
                if (destinations) EACH_TOKEN visit[t] = weight[t] != 0 ? 1.0f : visit[t];
                memcpy(probs + first + e * t_all + from, weight, b.size * sizeof(float));
                row[e] += sum_of(active);
                row[experts + e] += sum_of(p);
            }
            if (sparsity) {
                lambda_gap(&m, &b, experts, target, top, gap);
                EACH_TOKEN gap[t] = counts[t] > 0 ? gap[t] : 0.0f;
                row[2 * experts] += sum_of(gap);
            }
            log_sum_exp(&m, experts, total, log_sum);
            EACH_TOKEN log_sum[t] *= counts[t] * log_sum[t];
            row[2 * experts + 1] += sum_of(log_sum);
            row[2 * experts + 2] += sum_of(broken);
            if (destinations) EACH_TOKEN visits[ep_size][t] = largest_of(visits[ep_size][t], broken[t]);
        }
        if (!destinations) continue;
        for (int64_t rank = 0; rank <= ep_size; rank++)
            for (int t = 0; t < b.size; t++)
                destinations[rank * t_all + from + t] = rank != own_rank && visits[rank][t] > 0;
    }
    for (int64_t i = 0; i < members * columns; i++) sums[i] = (float)totals[i];
    free(memory);
    free(totals);
    return 0;
}

int routing_backward(
    const float *logits, const float *lambda_logits, const uint8_t *mask /* or NULL */, const float *grad_probs /* or NULL */,
    const float *grad_sums /* or NULL */, float *grad_logits, float *grad_lambda_logits, int64_t t_all, int64_t experts,
    int64_t members, int64_t target, int mask_padding) {
    const int64_t columns = 2 * experts + 3, sparsity = target < experts;
    Row *memory = scratch(2 * experts + target + 2);
    if (!memory) return 1;
    Member m = {.z = memory};
    Row *grads = memory + experts, *top = grads + experts;
    for (int64_t from = 0; from < t_all; from += BLOCK) {
        Tokens b;
        Row grad_lambda;
        load_tokens(&b, lambda_logits, mask, mask_padding, from, t_all);
        EACH_TOKEN grad_lambda[t] = 0.0f;
        for (int64_t g = 0; g < members; g++) {
            const int64_t first = g * experts * t_all;
            const float *of_sums = grad_sums ? grad_sums + g * columns : NULL;
            load_member(&m, &b, logits + first, from, t_all, experts);
            Row counted, counts, mean, per_slack, by_lambda, total, log_sum;
            EACH_TOKEN {
                counted[t] = b.real[t] * m.good[t];
                counts[t] = b.routed[t] * m.good[t];
                per_slack[t] = m.good[t] > 0 ? 1.0f / b.slack[t] : 0.0f;
                mean[t] = by_lambda[t] = 0.0f;
            }
            for (int64_t e = 0; e < experts; e++) {
                const float *z = m.z[e];
                const float of_sum = of_sums ? of_sums[experts + e] : 0.0f;
                float *grad = grads[e];
                memset(grad, 0, sizeof(Row));
                if (grad_probs) memcpy(grad, grad_probs + first + e * t_all + from, b.size * sizeof(float));
                EACH_TOKEN {
                    grad[t] = counts[t] > 0 ? grad[t] : 0.0f; /* that of a broken token may be anything */
                    grad[t] = (grad[t] + counted[t] * of_sum) * in_support(&m, z[t], t);
                    mean[t] += grad[t];
                }
            }
            EACH_TOKEN mean[t] /= m.k[t];
            for (int64_t e = 0; e < experts; e++) {
                const float *z = m.z[e];
                float *grad = grads[e];
                EACH_TOKEN {
                    grad[t] = (grad[t] - mean[t]) * per_slack[t] * in_support(&m, z[t], t);
                    by_lambda[t] += grad[t] * (z[t] - m.mean[t]) * per_slack[t];
                }
            }
            if (of_sums && sparsity) {
                Row gap;
                lambda_gap(&m, &b, experts, target, top, gap);
                EACH_TOKEN by_lambda[t] -= gap[t] > 0 ? of_sums[2 * experts] : 0.0f;
            }
            if (of_sums) {
                log_sum_exp(&m, experts, total, log_sum);
                EACH_TOKEN total[t] = counts[t] * 2.0f * of_sums[2 * experts + 1] * log_sum[t] / total[t];
                for (int64_t e = 0; e < experts; e++) {
                    const float *z = m.z[e];
                    float *grad = grads[e];
                    EACH_TOKEN grad[t] += total[t] * exp_of(z[t]);
                }
            }
            for (int64_t e = 0; e < experts; e++)
                memcpy(grad_logits + first + e * t_all + from, grads[e], b.size * sizeof(float));
            EACH_TOKEN grad_lambda[t] += counts[t] * by_lambda[t];
        }
        for (int t = 0; t < b.size; t++) /* d lambda / d logit = 1 - sigmoid(logit) */
            grad_lambda_logits[from + t] = b.lambda_is_good[t] > 0 ? grad_lambda[t] / (1.0f + expf(b.logit[t])) : 0.0f;
    }
    free(memory);
    return 0;
}
