/* All of an input group's routing on a CPU: ldmole_ds/ops/routing_kernel.py in C, with the same steps.
 *
 * Plain C without dependencies, so that any compiler builds it in a second (ldmole_ds/ops/c_library.py). BLOCK tokens go
 * through at a time (block.h), parts of the tokens in threads (parts.h).
 *
 * Arrays are contiguous: logits, probs, grad_* (G, E, T); lambdas (T); sums (G, 2 E + 3); destinations (ep_size + 1, T).
 * Pointers that may be NULL are marked. What Python calls returns 0, or 1 when memory is short.
 */

#include "routing.h"

#include "block.h"
#include "parts.h"

/* One projection of a block forward; `visits` (ep_size + 1) collects which ranks its tokens visit. */
static void route_member(const Routing *r, const Tokens *b, Member *m, int64_t member, float *probs, double *totals,
                         const Plan *plan, Row *visits, Row *top) {
    const int64_t experts = r->experts, held = experts / (plan->ep_size > 0 ? plan->ep_size : 1);
    load_member(m, b, r, member);
    Row counted, counts, per_slack, per_k, broken;
    EACH_TOKEN {
        broken[t] = b->inside[t] * (1.0f - m->good[t]);
        counted[t] = b->real[t] * m->good[t];
        counts[t] = b->routed[t] * m->good[t];
        per_slack[t] = m->good[t] > 0 ? 1.0f / b->slack[t] : 0.0f;
        per_k[t] = 1.0f / m->k[t];
    }
    for (int64_t e = 0; e < experts; e++) {
        const float *z = m->z[e];
        float *visit = visits[e / held];
        Row p, active, weight;
        EACH_TOKEN {
            const float in = in_support(m, z[t], t);
            p[t] = in * largest_of((z[t] - m->mean[t]) * per_slack[t] + per_k[t], 0.0f);
            weight[t] = b->routed[t] * p[t];
            weight[t] = b->routed[t] * broken[t] > 0 ? NAN : weight[t];
            p[t] *= counted[t];
            active[t] = p[t] > 0 ? 1.0f : 0.0f;
        }
        if (plan->destinations) EACH_TOKEN visit[t] = weight[t] != 0 ? 1.0f : visit[t];
        memcpy(probs + (member * experts + e) * r->tokens + b->from, weight, b->size * sizeof(float));
        totals[e] += sum_of(active);
        totals[experts + e] += sum_of(p);
    }
    if (plan->destinations) EACH_TOKEN visits[plan->ep_size][t] = largest_of(visits[plan->ep_size][t], broken[t]);
    if (r->target < experts) {
        Row gap;
        lambda_gap(m, b, experts, r->target, top, gap);
        EACH_TOKEN gap[t] = counts[t] > 0 ? gap[t] : 0.0f;
        totals[2 * experts] += sum_of(gap);
    }
    Row total, log_sum;
    log_sum_exp(m, experts, total, log_sum);
    EACH_TOKEN log_sum[t] *= counts[t] * log_sum[t];
    totals[2 * experts + 1] += sum_of(log_sum);
    totals[2 * experts + 2] += sum_of(broken);
}

int route(const Routing *r, int64_t from, int64_t to, float *probs, float *lambdas, double *totals, const Plan *plan) {
    Row *memory = scratch(r->experts + top_rows(r) + plan->ep_size + 1);
    if (!memory) return 1;
    Member m = {.z = memory};
    Row *top = memory + r->experts, *visits = top + top_rows(r);
    for (int64_t at = from; at < to; at += BLOCK) {
        Tokens b;
        load_tokens(&b, r, at, to);
        memcpy(lambdas + at, b.lambda, b.size * sizeof(float));
        memset(visits, 0, (plan->ep_size + 1) * sizeof(Row));
        for (int64_t g = 0; g < r->members; g++)
            route_member(r, &b, &m, g, probs, totals + g * sum_columns(r), plan, visits, top);
        if (!plan->destinations) continue;
        for (int64_t rank = 0; rank <= plan->ep_size; rank++)
            for (int t = 0; t < b.size; t++)
                plan->destinations[rank * r->tokens + at + t] = rank != plan->own_rank && visits[rank][t] > 0;
    }
    free(memory);
    return 0;
}

/* One projection of a block backward; adds to the gradient of lambda. */
static void route_member_backward(const Routing *r, const Tokens *b, Member *m, int64_t member, const float *grad_probs,
                                  const float *of_sums, float *grad_logits, float *grad_lambda, Row *grads, Row *top) {
    const int64_t experts = r->experts, first = member * experts * r->tokens + b->from;
    load_member(m, b, r, member);
    Row counted, counts, mean, per_slack, by_lambda;
    EACH_TOKEN {
        counted[t] = b->real[t] * m->good[t];
        counts[t] = b->routed[t] * m->good[t];
        per_slack[t] = m->good[t] > 0 ? 1.0f / b->slack[t] : 0.0f;
        mean[t] = by_lambda[t] = 0.0f;
    }
    for (int64_t e = 0; e < experts; e++) {
        const float *z = m->z[e];
        const float of_sum = of_sums ? of_sums[experts + e] : 0.0f;
        float *grad = grads[e];
        memset(grad, 0, sizeof(Row));
        if (grad_probs) memcpy(grad, grad_probs + first + e * r->tokens, b->size * sizeof(float));
        EACH_TOKEN {
            grad[t] = counts[t] > 0 ? grad[t] : 0.0f; /* that of a broken token may be anything */
            grad[t] = (grad[t] + counted[t] * of_sum) * in_support(m, z[t], t);
            mean[t] += grad[t];
        }
    }
    EACH_TOKEN mean[t] /= m->k[t];
    for (int64_t e = 0; e < experts; e++) {
        const float *z = m->z[e];
        float *grad = grads[e];
        EACH_TOKEN {
            grad[t] = (grad[t] - mean[t]) * per_slack[t] * in_support(m, z[t], t);
            by_lambda[t] += grad[t] * (z[t] - m->mean[t]) * per_slack[t];
        }
    }
    if (of_sums && r->target < experts) {
        Row gap;
        lambda_gap(m, b, experts, r->target, top, gap);
        EACH_TOKEN by_lambda[t] -= gap[t] > 0 ? of_sums[2 * experts] : 0.0f;
    }
    if (of_sums) {
        Row total, log_sum;
        log_sum_exp(m, experts, total, log_sum);
        EACH_TOKEN total[t] = counts[t] * 2.0f * of_sums[2 * experts + 1] * log_sum[t] / total[t];
        for (int64_t e = 0; e < experts; e++) {
            const float *z = m->z[e];
            float *grad = grads[e];
            EACH_TOKEN grad[t] += total[t] * exp_of(z[t]);
        }
    }
    for (int64_t e = 0; e < experts; e++)
        memcpy(grad_logits + first + e * r->tokens, grads[e], b->size * sizeof(float));
    EACH_TOKEN grad_lambda[t] += counts[t] * by_lambda[t];
}

int route_backward(const Routing *r, int64_t from, int64_t to, const float *grad_probs, const float *grad_sums,
                   float *grad_logits, float *grad_lambda_logits) {
    Row *memory = scratch(2 * r->experts + top_rows(r));
    if (!memory) return 1;
    Member m = {.z = memory};
    Row *grads = memory + r->experts, *top = grads + r->experts;
    for (int64_t at = from; at < to; at += BLOCK) {
        Tokens b;
        Row grad_lambda;
        load_tokens(&b, r, at, to);
        EACH_TOKEN grad_lambda[t] = 0.0f;
        for (int64_t g = 0; g < r->members; g++) {
            const float *of_sums = grad_sums ? grad_sums + g * sum_columns(r) : NULL;
            route_member_backward(r, &b, &m, g, grad_probs, of_sums, grad_logits, grad_lambda, grads, top);
        }
        for (int t = 0; t < b.size; t++) /* d lambda / d logit = 1 - sigmoid(logit) */
            grad_lambda_logits[at + t] = b.lambda_is_good[t] > 0 ? grad_lambda[t] / (1.0f + expf(b.logit[t])) : 0.0f;
    }
    free(memory);
    return 0;
}

/* ---- what Python calls ---- */

typedef struct {
    Routing routing;
    Plan plan;
    float *probs, *lambdas;
    double *totals; /* of each part */
    int failed;
} Forward;

static void forward_part(void *call, int64_t part, int64_t from, int64_t to) {
    Forward *f = call;
    double *totals = f->totals + part * f->routing.members * sum_columns(&f->routing);
    if (route(&f->routing, from, to, f->probs, f->lambdas, totals, &f->plan)) set_failed(&f->failed);
}

int routing_forward(
    const float *logits, const float *lambda_logits, const uint8_t *mask /* or NULL */, float *probs, float *lambdas,
    float *sums, uint8_t *destinations /* or NULL */, int64_t tokens, int64_t experts, int64_t members, int64_t target,
    int64_t ep_size, int64_t own_rank, int mask_padding, int threads) {
    Forward f = {{logits, lambda_logits, mask, tokens, experts, members, target, mask_padding},
                 {destinations, ep_size, own_rank}, probs, lambdas, NULL, 0};
    const int64_t parts = parts_of(tokens, threads), numbers = members * sum_columns(&f.routing);
    f.totals = calloc(parts * numbers, sizeof(double));
    if (!f.totals) return 1;
    run_parts(forward_part, &f, parts, tokens, threads);
    sum_parts(f.totals, parts, numbers, sums);
    free(f.totals);
    return f.failed;
}

typedef struct {
    Routing routing;
    const float *grad_probs, *grad_sums;
    float *grad_logits, *grad_lambda_logits;
    int failed;
} Backward;

static void backward_part(void *call, int64_t part, int64_t from, int64_t to) {
    Backward *b = call;
    (void)part;
    if (route_backward(&b->routing, from, to, b->grad_probs, b->grad_sums, b->grad_logits, b->grad_lambda_logits))
        set_failed(&b->failed);
}

int routing_backward(
    const float *logits, const float *lambda_logits, const uint8_t *mask /* or NULL */, const float *grad_probs /* or NULL */,
    const float *grad_sums /* or NULL */, float *grad_logits, float *grad_lambda_logits, int64_t tokens, int64_t experts,
    int64_t members, int64_t target, int mask_padding, int threads) {
    Backward b = {{logits, lambda_logits, mask, tokens, experts, members, target, mask_padding},
                  grad_probs, grad_sums, grad_logits, grad_lambda_logits, 0};
    run_parts(backward_part, &b, parts_of(tokens, threads), tokens, threads);
    return b.failed;
}
