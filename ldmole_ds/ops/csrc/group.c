/* What an input group computes between its products on a CPU (ldmole_ds/ops/group_product.py), in one call each way:
 * the lambda MLP after its first product, routing (routing.c), and the experts' rows times their routing weights.
 *
 * `rows` is the product of all that the group multiplies its input with, tokens innermost:
 *
 *     G * E * r rows h = A x      then G * E rows of router logits      then H rows of the lambda MLP's hidden units
 *
 * Called after a large product, code and data come from far away: what counts is how many small steps there are. Sums
 * over tokens are made by parts (parts.h) and added in their order, so that the same threads give the same sums.
 */

#include <stdint.h>
#include <stdlib.h>

#include "parts.h"
#include "routing.h"

#define LANES 16

/* Sum of products, in lanes that the compiler keeps in a vector. b may be NULL, for a sum. */
static double dot(const float *a, const float *b, int64_t n) {
    float lanes[LANES] = {0};
    int64_t t = 0;
    for (; t + LANES <= n; t += LANES)
        for (int i = 0; i < LANES; i++) lanes[i] += b ? a[t + i] * b[t + i] : a[t + i];
    float total = 0.0f;
    for (; t < n; t++) total += b ? a[t] * b[t] : a[t];
    for (int i = 0; i < LANES; i++) total += lanes[i];
    return total;
}

typedef struct {
    Routing routing;
    int64_t r, units;
    float scaling;
} Group;

static int64_t pairs_of(const Group *g) { return g->routing.members * g->routing.experts; }

/* Rows of h, of router logits and of hidden units, in `rows` or in their gradient. */
static int64_t first_logit(const Group *g) { return pairs_of(g) * g->r * g->routing.tokens; }
static int64_t first_hidden(const Group *g) { return first_logit(g) + pairs_of(g) * g->routing.tokens; }

typedef struct {
    Group group;
    float *rows, *lambda_logit, *probs, *lambdas, *weighted;
    const float *bias_in, *weight_out, *bias_out;
    uint8_t *live; /* (H), of all parts: they only ever write 1 */
    double *totals; /* of each part */
    int failed;
} Forward;

/* In place: the hidden units' rows get bias and ReLU. Comparisons are such that NaN stays NaN. */
static void lambda_forward(const Forward *f, int64_t from, int64_t to) {
    const int64_t tokens = f->group.routing.tokens;
    float *logit = f->lambda_logit, *hidden = f->rows + first_hidden(&f->group);
    for (int64_t t = from; t < to; t++) logit[t] = *f->bias_out;
    for (int64_t j = 0; j < f->group.units; j++) {
        float *row = hidden + j * tokens;
        const float bias = f->bias_in[j], weight = f->weight_out[j];
        int fired = 0;
        for (int64_t t = from; t < to; t++) {
            const float value = row[t] + bias;
            row[t] = value < 0 ? 0.0f : value;
            logit[t] += weight * row[t];
            fired |= row[t] > 0;
        }
        if (fired) set_flag(f->live + j);
    }
}

static void forward_part(void *call, int64_t part, int64_t from, int64_t to) {
    Forward *f = call;
    const Group *g = &f->group;
    const Plan nowhere = {NULL, 0, 0};
    const int64_t tokens = g->routing.tokens;
    lambda_forward(f, from, to);
    double *totals = f->totals + part * g->routing.members * sum_columns(&g->routing);
    if (route(&g->routing, from, to, f->probs, f->lambdas, totals, &nowhere)) {
        set_failed(&f->failed);
        return;
    }
    for (int64_t i = 0; i < pairs_of(g); i++)
        for (int64_t k = i * g->r; k < (i + 1) * g->r; k++) {
            const float *h = f->rows + k * tokens, *p = f->probs + i * tokens;
            float *out = f->weighted + k * tokens;
            for (int64_t t = from; t < to; t++) out[t] = h[t] * (p[t] * g->scaling);
        }
}

int group_forward(float *rows, const float *bias_in, const float *weight_out, const float *bias_out,
                  const uint8_t *mask /* or NULL */, float *lambda_logit, uint8_t *live, float *probs, float *lambdas,
                  float *sums, float *weighted, int64_t tokens, int64_t experts, int64_t members, int64_t r, int64_t units,
                  int64_t target, int mask_padding, float scaling, int threads) {
    Forward f = {.group = {{NULL, lambda_logit, mask, tokens, experts, members, target, mask_padding}, r, units, scaling},
                 .rows = rows, .lambda_logit = lambda_logit, .probs = probs, .lambdas = lambdas, .weighted = weighted,
                 .bias_in = bias_in, .weight_out = weight_out, .bias_out = bias_out, .live = live};
    f.group.routing.logits = rows + first_logit(&f.group);
    const int64_t parts = parts_of(tokens, threads), numbers = members * sum_columns(&f.group.routing);
    f.totals = calloc(parts * numbers, sizeof(double));
    if (!f.totals) return 1;
    for (int64_t j = 0; j < units; j++) live[j] = 0;
    run_parts(forward_part, &f, parts, tokens, threads);
    sum_parts(f.totals, parts, numbers, sums);
    free(f.totals);
    return f.failed;
}

typedef struct {
    Group group;
    const float *rows, *weight_out, *probs, *grad_sums;
    float *grad_rows, *grad_probs, *grad_lambda;
    double *totals; /* of each part: gradients of weight_out (H), bias_in (H) and bias_out */
    int failed;
} Backward;

static void backward_part(void *call, int64_t part, int64_t from, int64_t to) {
    Backward *b = call;
    const Group *g = &b->group;
    const int64_t tokens = g->routing.tokens;
    for (int64_t i = 0; i < pairs_of(g); i++) {
        const float *p = b->probs + i * tokens;
        float *grad_p = b->grad_probs + i * tokens;
        for (int64_t k = i * g->r; k < (i + 1) * g->r; k++) {
            const float *h = b->rows + k * tokens;
            float *grad = b->grad_rows + k * tokens;
            for (int64_t t = from; t < to; t++) {
                grad_p[t] += g->scaling * grad[t] * h[t];
                grad[t] *= p[t] * g->scaling;
            }
        }
    }
    float *grad_logits = b->grad_rows + first_logit(g);
    if (route_backward(&g->routing, from, to, b->grad_probs, b->grad_sums, grad_logits, b->grad_lambda)) {
        set_failed(&b->failed);
        return;
    }
    const float *hidden = b->rows + first_hidden(g);
    float *grad_hidden = b->grad_rows + first_hidden(g);
    double *of_weight = b->totals + part * (2 * g->units + 1), *of_bias = of_weight + g->units;
    for (int64_t j = 0; j < g->units; j++) {
        const float *row = hidden + j * tokens, weight = b->weight_out[j];
        float *grad = grad_hidden + j * tokens;
        for (int64_t t = from; t < to; t++) grad[t] = row[t] > 0 ? weight * b->grad_lambda[t] : 0.0f;
        of_weight[j] = dot(b->grad_lambda + from, row + from, to - from);
        of_bias[j] = dot(grad + from, NULL, to - from);
    }
    of_bias[g->units] = dot(b->grad_lambda + from, NULL, to - from);
}

/* `grad_rows` comes with the gradients of the weighted rows where h was, and leaves with those of all rows.
 * `grad_mlp` (2 H + 1): of the lambda MLP's weight_out, bias_in and bias_out. */
int group_backward(const float *rows, const float *weight_out, const uint8_t *mask /* or NULL */, const float *lambda_logit,
                   const float *probs, const float *grad_sums /* or NULL */, float *grad_rows, float *grad_mlp,
                   int64_t tokens, int64_t experts, int64_t members, int64_t r, int64_t units, int64_t target,
                   int mask_padding, float scaling, int threads) {
    Backward b = {.group = {{NULL, lambda_logit, mask, tokens, experts, members, target, mask_padding}, r, units, scaling},
                  .rows = rows, .weight_out = weight_out, .probs = probs, .grad_sums = grad_sums, .grad_rows = grad_rows};
    b.group.routing.logits = rows + first_logit(&b.group);
    const int64_t parts = parts_of(tokens, threads), pairs = pairs_of(&b.group);
    b.grad_probs = calloc((pairs + 1) * tokens + 1, sizeof(float));
    b.totals = calloc(parts * (2 * units + 1), sizeof(double));
    if (b.grad_probs && b.totals) {
        b.grad_lambda = b.grad_probs + pairs * tokens;
        run_parts(backward_part, &b, parts, tokens, threads);
        sum_parts(b.totals, parts, 2 * units + 1, grad_mlp);
    } else {
        b.failed = 1;
    }
    free(b.grad_probs);
    free(b.totals);
    return b.failed;
}
